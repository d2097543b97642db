"""Reward for the form `<think>...</think><answer>...</answer>`; small beside one for the truth."""

from __future__ import annotations

import re

from rlpost.types import Rollout


def format_tags(rollout: Rollout, *, tags: list = ["think", "answer"], begun: bool = False) -> float:  # noqa: B006
    """1 where the text is these tags in this order, each once, each with something in it, and nothing outside; else 0.

    `begun`: the prompt has opened the first tag already. What was cut off has no form.
    """
    if rollout.truncated:
        return 0.0
    text = f"<{tags[0]}>{rollout.text}" if begun else rollout.text
    if any(text.count(f"<{slash}{tag}>") != 1 for tag in tags for slash in ("", "/")):
        return 0.0
    whole = r"\s*".join(rf"<{re.escape(tag)}>(.*\S.*)</{re.escape(tag)}>" for tag in tags)
    return float(re.fullmatch(rf"\s*{whole}\s*", text, re.DOTALL) is not None)
