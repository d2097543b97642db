"""The table of figures against what runs log: nothing in it that no run has, and nothing logged that it has not."""

from __future__ import annotations

import io
import json

import pytest
from lab import make_lab, train_here
from rich.console import Console

from rlpost.catalogue import print_metrics
from rlpost.metrics import METRICS, metric_info

ELSEWHERE = {"mfu/*", "energy/*_j", "total/energy/*"} | {
    name for name in METRICS if name.startswith(("synth/", "servers/"))
}
"""Where the hardware tells, or a model has to write: `test_accounts`, `test_energy`, `test_synth_online` have them;
and where servers are: `test_remote_vllm`."""
NOT_FIGURES = {"step", "unix_s"}
COINS = '''
def coin(rollout):
    """Even or odd: success that comes and goes."""
    return float(sum(rollout.token_ids) % 2)


def helped(rollout):
    """Right under a hint and never alone, so that hints are asked for and trained."""
    return float(rollout.role == "guided")


def unsure(rollout):
    """Judges short answers only."""
    return 0.5 if len(rollout.token_ids) < 3 else None
'''
HELPED = "rewards=[{use: 'mylab.coins:helped'}]"
COIN = "rewards=[{use: 'mylab.coins:coin'}, {use: 'mylab.coins:unsure', weight: 0.1}]"
HINTS = (
    "{source: solution, levels: [0.5, -1], separator: ';', template: '{hint}#{prompt}', use: guide, n: 2, place: add}"
)
LONG = ["tasks.train.solution=solution", "model.context=96"]
RUNS = {
    "plain": [
        *(
            COIN,
            "steps=11",
            "logging.noise_every=2",
            "evaluation={n: 2, every: 4, by: terms, until: 4, vote: final_number}",
            "tasks.train.config.size=9",
        ),
        *(
            "tasks.eval={path: 'rlpost.testbed:chain_sums', extra: [terms], config: {split: eval, size: 4, "
            "min_terms: 2, max_terms: 3}}",
        ),
        *("algorithm.kl={coef: 0.01, place: reward}", "algorithm.entropy.coef=0.001", "curriculum={use: adcl}"),
    ],
    "ppo": [COIN, "algorithm.name=ppo", "steps=1", "algorithm.minibatches=2"],
    "kimi": [COIN, "algorithm.name=kimi_k15", "steps=1", "algorithm.interruption={text: ';', answer_tokens: 4}"],
    "guide": [*LONG, "algorithm.name=guide_grpo", f"explore=[{HINTS}]", "steps=1", HELPED],
    "own": ["algorithm.loss={use: 'mylab.losses:length_mean'}", "steps=1"],
    "wide": ["algorithm.name=brorl", "explore.0.width=8", "explore.0.chunk=2", "steps=1"],
    "tools": [
        *(COIN, "steps=1", "rollout={use: calculator, begin: '+', end: '=', result: '{}', error: '0'}"),
    ],
    "ahead": [HELPED, "steps=2", "algorithm.name=dapo", "algorithm.groups.max_waves=2", "generator.max_staleness=1"],
    "luffy": [*LONG, "algorithm.name=luffy", "steps=1"],
}


def declared_by(name: str) -> str:
    """The row of the table that a figure belongs to."""
    info = metric_info(name)
    return next(key for key, one in METRICS.items() if one is info)


@pytest.fixture(scope="module")
def logged(single_rank, tmp_path_factory) -> set[str]:
    """Every name that a line of these runs has."""
    lab = make_lab(tmp_path_factory.mktemp("table"))
    (lab / "mylab" / "coins.py").write_text(COINS)
    found: set[str] = set()
    for name, asked in RUNS.items():
        train_here(lab, single_rank, name, "sft=null", *asked)
        lines = (lab / "runs" / name / "metrics.jsonl").read_text().splitlines()
        found |= {key for line in lines for key in json.loads(line)} - NOT_FIGURES
    return found


@pytest.mark.slow
def test_every_figure_of_a_run_is_in_the_table_and_every_row_is_logged_by_a_run(logged) -> None:
    assert {declared_by(name) for name in logged} == METRICS.keys() - ELSEWHERE


def test_every_row_says_unit_reduction_and_meaning_and_is_printed_whole() -> None:
    stream = io.StringIO()
    print_metrics(Console(file=stream, width=100))
    text = stream.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 100
    squeezed = "".join(text.split())
    for name, info in METRICS.items():
        assert info.unit and info.meaning and not info.meaning.endswith(".")
        assert name in squeezed and info.reduction in text
