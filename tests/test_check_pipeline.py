"""Rollouts ahead of their step, in parts, ended early: what `check` refuses, and why."""

from pathlib import Path

import pytest

from rlpost.__main__ import main
from rlpost.check import check
from rlpost.recipe import load

QUICKSTART = Path(__file__).parent.parent / "recipes/quickstart.yaml"
PARTS = "generator.partial_tokens=20"


def problems(*overrides):
    return check(load(QUICKSTART, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["generator.max_staleness=1", "algorithm.groups.without_spread=refill"],
        ["generator.max_staleness=2", "generator.first_come=true"],
        [PARTS, "algorithm.earlier=context"],
        ["sampling.repeats=2", "sampling.repeat_tokens=1"],
    ],
)
def test_what_goes_together_has_no_problem(overrides):
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generator.max_staleness=-1"], "generator.max_staleness must be >= 0 (got -1)"),
        (
            ["generator.max_staleness=1", "generator.first_come=true"],
            "generator.max_staleness must be at least 2 (got 1)",
        ),
        (
            ["generator.max_staleness=2", "generator.first_come=true", "algorithm.groups.without_spread=refill"],
            "algorithm.groups.without_spread=refill asks for more",
        ),
        (
            ["generator.max_staleness=2", "generator.first_come=true", "algorithm.advantage=remax"],
            "generator.first_come and algorithm.advantage=remax do not go together",
        ),
        (["generator.partial_tokens=40"], "in (0, sampling.max_new_tokens) (got 40 of 40): null writes whole answers"),
        (["generator.partial_tokens=0"], "in (0, sampling.max_new_tokens) (got 0 of 40)"),
        ([PARTS, "generator.max_staleness=1"], "partial_tokens=20 and generator.max_staleness do not go together"),
        ([PARTS, "algorithm.name=dapo"], "algorithm.groups.without_spread=refill do not go together"),
        ([PARTS, "algorithm.advantage=remax"], "partial_tokens=20 and algorithm.advantage=remax do not go together"),
        ([PARTS, "algorithm.interruption.text=;#"], "and algorithm.interruption.text do not go together"),
        (["sampling.repeats=1"], "sampling.repeats must be at least 2"),
        (["sampling.repeats=2", "sampling.repeat_tokens=0"], "sampling.repeat_tokens at least 1 (got 2 and 0)"),
    ],
)
def test_what_does_not_is_named_with_the_way_out(overrides, message):
    found = problems(*overrides)
    assert any(message in problem for problem in found), found


PLAIN = "algorithm.mismatch={mode: decoupled, weights: []}"
WEIGHTED = "algorithm.mismatch={mode: decoupled, weights: [{use: tis_token}]}"


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ([PLAIN, "generator.max_staleness=2"], ["generator.max_staleness=2"]),
        ([PLAIN, PARTS], ["generator.partial_tokens=20"]),
        ([PLAIN], []),
        ([WEIGHTED, "generator.max_staleness=2"], []),
        (["generator.max_staleness=2"], []),
    ],
)
def test_rollouts_of_older_weights_without_any_correction_are_noted(capsys, overrides, noted):
    assert main(["check", str(QUICKSTART), *overrides]) == 0
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said == noted
