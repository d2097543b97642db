"""The random generators of this process, taken and put back in memory: a step that is left never drew from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def take(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's own generators."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def put_back(state: dict[str, Any], device: torch.device) -> None:
    """As they were when `take` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
