"""Stages and filters of a user's own, without a model: they are as quick as the files around them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

uses_model = False
RECIPE = """
model: {dtype: float32, context: 64, init: {tokenizer: char, alphabet: "0123456789+-=;#"}}
tasks: {train: {path: "rlpost.testbed:chain_sums", answer: solution,
                config: {split: train, size: 40, min_terms: 3, max_terms: 6}}}
rewards: [{use: "rlpost.testbed:same_chain"}]
generator: {kind: hf}
sampling: {max_new_tokens: 48}
synth:
  identify: {use: "synth_lab:long_ones", at_least: 5}
  train: {use: "synth_lab:no_generator"}
  sample: {use: "synth_lab:sums", number: 200}
  screen: [{use: rules, pattern: '\\\\d([+-]\\\\d){2,}='}, {use: near_duplicates, threshold: 0.95}]
  distil: {use: "synth_lab:solver", k: 3}
  filters: [{use: solution_rules}, {use: agreement, at_least: 0.6}, {use: "synth_lab:no_nines"}]
"""


def write_recipe(folder: Path) -> Path:
    """The recipe in a file."""
    path = folder / "lab.yaml"
    path.write_text(RECIPE.replace("\\\\", "\\"))
    return path


def accident() -> None:
    """Be killed once where the test has left a file that says after how many calls."""
    trigger = Path(os.environ.get("ACCIDENT", "/nonexistent"))
    if trigger.exists():
        left = int(trigger.read_text())
        if left <= 0:
            trigger.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        trigger.write_text(str(left - 1))


def long_ones(rows, bench, *, at_least: int):
    for row in rows:
        accident()
        terms = sum(one in "+-" for one in row["prompt"]) + 1
        yield {**row, "score": terms / 10, "difficult": terms >= at_least}


def no_generator(rows, bench):
    return {"model": "none", "problems": len(rows)}


def sums(rows, bench, *, number: int):
    """Problems by their seed: some are alike, some are malformed, some are cut off. In another order than asked for."""
    held = []
    for row in rows:
        accident()
        held.append(row)
        if len(held) == 3:
            yield from map(_problem, reversed(held))
            held = []
    yield from map(_problem, held)


def _problem(row):
    i = row["seed"] % (1 << 32)
    prompt = "7+*=" if i % 10 == 3 else f"{i % 7}+{i % 5}-{i % 3}+{i % 9}="
    prompt = "1+2+3=" if i % 25 == 5 else "4+5-9+" + prompt if i % 20 == 2 else prompt
    return {"id": row["id"], "prompt": prompt, "seed": row["seed"], "finish": "length" if i % 11 == 4 else "stop"}


def solver(rows, bench, *, k: int):
    """The right chain, and a slip in the first of the solutions of every fourth problem, in two of every eighth."""
    from rlpost.testbed import correct_chain

    for row in rows:
        accident()
        right = correct_chain(row["prompt"])
        slips = 2 if row["seed"] % 8 == 0 else 1 if row["seed"] % 4 == 0 else 0
        texts = [right + "9" * (j + 1) if j < slips else right for j in range(k)]
        yield {**row, "solutions": [{"reasoning": "", "text": t, "answer": t, "finish": "stop"} for t in texts]}


def no_nines(row):
    accident()
    return "a nine" if "9" in row["prompt"] else None


def forgetful(rows, bench):
    yield from list(rows)[1:]


def repeating(rows, bench):
    for row in rows:
        yield row
        yield row


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def coin(rollout) -> float:
    """A reward that answers of one task pass and fail alike."""
    return float(sum(rollout.token_ids) % 2)
