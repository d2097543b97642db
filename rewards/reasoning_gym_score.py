"""Reward by the scorer that a `reasoning_gym` task brings along."""

from __future__ import annotations

import re

from rewards._found import boxed, marked
from rlpost.types import Rollout, Score

NEEDS = ("reasoning_gym",)
ON_HANG = "drop"


def reasoning_gym_score(rollout: Rollout, *, tag: str = "answer") -> Score:
    r"""What `reasoning_gym` gives, from 0 to 1; the tasks need `extra: [metadata]`.

    Scored is what the last `<answer>...</answer>` holds, else the last box, else what follows the last "answer is".
    """
    metadata = rollout.task.extra.get("metadata")
    if not isinstance(metadata, dict) or "source_dataset" not in metadata:
        raise ValueError(
            f"reasoning_gym_score needs reasoning_gym tasks with extra: [metadata] (task {rollout.task.key} has none)"
        )
    from reasoning_gym import get_score_answer_fn

    tagged = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", rollout.text, re.DOTALL)
    said = tagged[-1].strip() if tagged else boxed(rollout.text) or marked(rollout.text)
    if not said:
        return Score(0.0, unparsable=True, note="no final answer")
    entry = {"question": rollout.task.prompt, "answer": rollout.task.answer, "metadata": metadata}
    return Score(float(get_score_answer_fn(metadata["source_dataset"])(said, entry)), note=said[:80])
