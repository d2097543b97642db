"""The random generators of a rank, as text: Python's, numpy's, and torch's on the CPU and on its GPU."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_all(seed: int) -> None:
    """Start every generator of this process anew."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> str:
    """Where every generator of this process stands, as JSON."""
    import numpy as np
    import torch

    numpy_state = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    found = {"python": random.getstate(), "numpy": numpy_state, "torch": _hex(torch.get_rng_state())}
    if device.type == "cuda":
        found["cuda"] = _hex(torch.cuda.get_rng_state(device))
    return json.dumps(found)


def set_random_state(text: str, device: torch.device) -> None:
    """Go on where `random_state` was taken."""
    import numpy as np
    import torch

    found = json.loads(text)
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = found["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(_tensor(found["torch"]))
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(_tensor(found["cuda"]), device)


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    import torch

    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
