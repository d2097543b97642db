"""A few rollouts of each step in `samples.jsonl`, for readers: the best and the worst first."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from rlpost.trackers import rewind_jsonl
from rlpost.types import Group, Rollout, Task, Verdict

REMEMBERED = 1 << 17
"""Decoded tokens, and pairs of them, that are kept."""


class Samples:
    """Writes `per_step` rollouts of a step; 0, as ranks other than the main one have it, writes none."""

    def __init__(self, run_dir: Path, per_step: int) -> None:
        self.path = run_dir / "samples.jsonl"
        self.per_step = per_step
        self.chosen: list[Rollout] = []
        """Of this step."""
        self._decoded: dict[tuple[int, ...], str] = {}

    def rewind(self, step: int, size: int | None = None) -> None:
        """Forget the samples of `step` and later: the run continues there."""
        if self.per_step:
            rewind_jsonl(self.path, step, size)

    def choose(self, groups: Sequence[Group]) -> None:
        """Take this step's samples."""
        self.chosen = best_and_worst([rollout for group in groups for rollout in group.rollouts], self.per_step)

    def write(self, step: int, tokens: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Append what was chosen, each with its figures of tokens where there are some."""
        chosen, self.chosen = self.chosen, []
        if not chosen:
            return
        rows = [sample(step, rollout) for rollout in chosen]
        for row, figures in zip(rows, tokens or (), strict=tokens is not None):
            row["tokens"] = figures
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def remembered(self, decode: Callable[[tuple[int, ...]], str]) -> Callable[[tuple[int, ...]], str]:
        """`decode`, asked once for each short run of tokens."""

        def known(ids: tuple[int, ...]) -> str:
            if ids not in self._decoded:
                if len(self._decoded) > REMEMBERED:
                    self._decoded.clear()
                self._decoded[ids] = decode(ids)
            return self._decoded[ids]

        return known


def best_and_worst(rollouts: Sequence[Rollout], n: int) -> list[Rollout]:
    """Take n rollouts from both ends of the order by reward in turn, the best first; unjudged ones come last."""
    judged = [(rollout.reward, rollout) for rollout in rollouts if rollout.reward is not None]
    ranked = [rollout for _, rollout in sorted(judged, key=lambda pair: -pair[0])]
    middle = (len(ranked) + 1) // 2
    best, worst = ranked[:middle], ranked[middle:][::-1]
    turns = [rollout for pair in zip(best, worst, strict=False) for rollout in pair] + best[len(worst) :]
    return (turns + [rollout for rollout in rollouts if rollout.reward is None])[:n]


def sample(step: int, rollout: Rollout) -> dict[str, Any]:
    """One rollout as a JSON object that a person can read."""
    verdicts = {name: told for name, verdict in rollout.verdicts.items() if (told := told_of(verdict))}
    return {
        "step": step,
        "group": rollout.group,
        "task": rollout.task.key,
        "prompt": prompt_text(rollout.task),
        "answer": rollout.task.answer,
        "completion": rollout.text,
        "reward": rollout.reward,
        "parts": rollout.reward_parts,
        **({"verdicts": verdicts} if verdicts else {}),
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.token_ids),
        "token_ids": base64.b64encode(array("I", rollout.token_ids).tobytes()).decode(),
        **({"turns": [asdict(turn) for turn in rollout.turns]} if rollout.turns else {}),
        **({"role": rollout.role, "hint": rollout.hint, "level": rollout.level} if rollout.role != "policy" else {}),
    }


def told_of(verdict: Verdict) -> dict[str, Any]:
    """What a verdict has beside its value; how long it took is left out, as two runs differ by it.

    >>> told_of(Verdict(1.0, "ok")), told_of(Verdict(0.0, "unparsable", note="no box"))
    ({}, {'ending': 'unparsable', 'note': 'no box'})
    """
    found: dict[str, Any] = {} if verdict.ending in ("ok", "wrong") else {"ending": verdict.ending}
    return (
        found
        | ({"parts": dict(verdict.parts)} if verdict.parts else {})
        | ({"note": verdict.note} if verdict.note else {})
    )


def prompt_text(task: Task) -> str:
    """The task's prompt as text; chat messages as one `role: content` a line.

    >>> prompt_text(Task("a", [{"role": "user", "content": "1+1="}]))
    'user: 1+1='
    """
    if isinstance(task.prompt, str):
        return task.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in task.prompt)


def render(sample: Mapping[str, Any]) -> Text:
    """One sample for rich to print, what a tool wrote in reverse; never as markup, which would eat a backslash."""
    reward = "unjudged" if sample["reward"] is None else f"{sample['reward']:.3g}"
    parts = ", ".join(f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in sample["parts"].items())
    hint = f"hint of level {sample['level']}: {sample['hint']}\n" if sample.get("hint") else ""
    turns = [(turn["text"], "reverse" if turn["writer"] == "tool" else "") for turn in sample.get("turns", ())]
    return Text.assemble(
        (f"step {sample['step']}  task {sample['task']}  reward {reward} ({parts})\n", "bold"),
        (f"{sample['prompt']}\n", "dim"),
        (hint, "dim italic"),
        *(turns or [sample["completion"]]),
        "\n",
        (f"{sample['num_tokens']} tokens, {sample['finish_reason']}; answer: {sample['answer']}", "dim"),
    )
