"""Verdicts a second of `math_answer`, through the processes and in this one, beside `math_verify` called directly.

    python -m tests.bench.rewards                    # about two minutes

10,000 answers as models give them: mostly whole numbers, some fractions, percents, units, pairs and intervals, and one
in twenty an expression that only `math_verify` can compare. Half are right. All ways judge the same rollouts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rewards.math_answer import math_answer
from rlpost.cluster_recipe import Failure
from rlpost.reward_recipe import bind_rewards
from rlpost.summary import git_commit, machine
from rlpost.types import Group, Rollout, Task

IN_A_GROUP, DIRECT = 8, 1000
TARGET = 1000
"""Verdicts a second, on two cores."""
THOUGHT = "Let us work it out step by step. 6 * 12 = 72, and half of that is 36. " * 10


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rewards/rewards.json"))
    options = parser.parse_args()
    result = measure(num=options.num, repeats=options.repeats, workers=options.workers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(result))
    Console().print(f"{result['machine']}, commit {result['commit']}")


def measure(*, num: int = 10_000, repeats: int = 3, workers: int = 2) -> dict[str, Any]:
    """Seconds of each way, and how the verdicts of `math_answer` and `math_verify` differ."""
    groups = answers(num)
    every = [rollout for group in groups for rollout in group.rollouts]
    limits = Failure(reward_s=20.0, reward_workers=workers)
    with closing(bind_rewards([{"use": "math_answer"}], limits)) as apart:
        apart.score(groups[:4])  # the processes have started
        seconds = {f"{workers} processes": [timed(lambda: apart.score(groups)) for _ in range(repeats)]}
        verdicts = [rollout.reward for rollout in every]
    one = [timed(lambda: [math_answer(rollout) for rollout in every]) for _ in range(repeats)]
    direct = every[:DIRECT]
    found: list[float] = []
    verify = [timed(lambda: found.extend(map(directly, direct))) for _ in range(repeats)]
    differ = [(mine, theirs, one) for mine, theirs, one in zip(verdicts, found, direct, strict=False) if mine != theirs]
    return {
        "num": num,
        "rates": {name: [num / s for s in runs] for name, runs in (seconds | {"this process": one}).items()}
        | {"math_verify itself": [len(direct) / s for s in verify]},
        "right_frac": sum(value == 1 for value in verdicts) / num,
        "differ": len(differ),
        "differ_of": len(direct),
        "differences": [
            [rollout.text[-60:], rollout.task.answer, mine, theirs] for mine, theirs, rollout in differ[:10]
        ],
        "machine": machine(),
        "commit": git_commit(),
    }


def directly(rollout: Rollout) -> float:
    """As its own page shows it, without its alarms."""
    from math_verify import parse, verify

    wanted = parse(f"${rollout.task.answer}$", parsing_timeout=None)
    return float(verify(wanted, parse(rollout.text, parsing_timeout=None), timeout_seconds=None))


def answers(num: int) -> list[Group]:
    """Groups of the same problem, half of whose answers are right."""
    dice, groups = random.Random(0), []
    for number in range(num // IN_A_GROUP):
        wanted, ways, wrong = problem(dice)
        task = Task(str(number), "What is it?", wanted)
        said = [dice.choice(ways if dice.random() < 0.5 else wrong) for _ in range(IN_A_GROUP)]
        groups.append(Group(number, task, [rollout(task, number, text, dice) for text in said]))
    return groups


def problem(dice: random.Random) -> tuple[str, Sequence[str], Sequence[str]]:
    """(reference, right ways to write it, wrong answers)."""
    a, b = dice.randint(2, 999), dice.randint(2, 99)
    kinds: list[tuple[float, Callable[[], tuple[str, list[str], list[str]]]]] = [
        (0.6, lambda: (f"{a * b}", [f"{a * b}", f"{a * b:,}", f"{a * b}.0"], [f"{a * b + 1}", f"-{a * b}", f"{a}"])),
        (
            0.15,
            lambda: (f"\\frac{{{a}}}{{{b}}}", [f"{a}/{b}", f"\\dfrac{{{a}}}{{{b}}}"], [f"{b}/{a}", f"{a / b:.3f}"]),
        ),
        (0.05, lambda: (f"{b}\\%", [f"{b}\\%", f"{b / 100}"], [f"{b + 1}\\%"])),
        (0.05, lambda: (f"{a}", [f"{a} \\text{{ cm}}", f"{a}\\text{{ cm}}"], [f"{a}x", f"{b} \\text{{ cm}}"])),
        (0.05, lambda: (f"({a}, {b})", [f"({a},{b})", f"\\left({a}, {b}\\right)"], [f"({b}, {a})", f"{a}, {b}"])),
        (0.05, lambda: (f"[{b}, \\infty)", [f"[{b},\\infty)"], [f"({b}, \\infty)"])),
        (0.05, lambda: (f"{b}\\sqrt{{2}}", [f"\\sqrt{{{2 * b * b}}}", f"{b}\\sqrt2"], [f"{b}\\sqrt{{3}}"])),
    ]
    [(_, make)] = dice.choices(kinds, weights=[weight for weight, _ in kinds])
    return make()


def rollout(task: Task, group: int, said: str, dice: random.Random) -> Rollout:
    """An answer with its reasoning, of as many tokens as such a text has."""
    text = THOUGHT + dice.choice(["So it is $\\boxed{%s}$.", "The answer is \\boxed{%s}"]) % said
    ids = tuple(range(len(text) // 4))
    return Rollout(task, group, (1,) * 60, (1,) * 60, ids, (-0.5,) * len(ids), "stop", 0, text)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> Table:
    """Verdicts a second."""
    shown = Table("way", "verdicts/s", "from", "to", title=f"{result['num']} answers; target {TARGET}/s")
    for name, rates in result["rates"].items():
        shown.add_row(name, f"{statistics.median(rates):.0f}", f"{min(rates):.0f}", f"{max(rates):.0f}")
    shown.caption = (
        f"{result['right_frac']:.0%} right; math_verify says otherwise on {result['differ']} of {result['differ_of']}"
    )
    return shown


if __name__ == "__main__":
    main()
