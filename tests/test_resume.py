"""A run that is killed goes on exactly where its newest checkpoint stands."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from lab import logged, rlpost, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_killed_run_resumes_to_the_same_figures_and_weights(lab) -> None:
    checkpoints = lab / "runs/killed/checkpoints"
    killed = rlpost(lab, "train", "name=killed", accident=f"SIGKILL:{checkpoints / 'step-000002'}")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000002"]

    assert train(lab, "killed", "resume=auto", anew=True) == logged(lab, "first")
    ours, theirs = weights(lab, "killed", 4), weights(lab, "first", 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    summaries = [json.loads((lab / f"runs/{name}/summary.json").read_text()) for name in ("killed", "first")]
    assert summaries[0]["eval"] == summaries[1]["eval"]


def test_a_run_goes_on_with_more_ranks_of_another_stage_and_the_same_tasks(lab) -> None:
    """Rollouts have a seed each, so that they are the same; sums over ranks differ by float32 rounding."""
    shared = ["generator.kind=hf", "tasks.eval=null", "logging.samples_per_step=1000", "save_every=2"]
    whole = train(lab, "one-rank", *shared)
    train(lab, "elastic", *shared, "steps=2")
    again = train(lab, "elastic", *shared, "steps=4", "engine.zero_stage=3", "resume=auto", ranks=2)
    assert again[:2] == whole[:2] and len(again) == len(whole) == 4
    for ours, theirs in zip(again[2:], whole[2:], strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], abs=1e-9)
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-3)
        assert ours["optim/steps"] == theirs["optim/steps"]
    tasks = [sorted((row["step"], row["task"]) for row in samples(lab, name)) for name in ("elastic", "one-rank")]
    # The main rank writes its own groups: half of all once there are two ranks.
    mine = [[row for row in rows if row[0] < 2] for rows in tasks]
    assert mine[0] == mine[1]
    assert {row for row in tasks[0] if row[0] >= 2} < {row for row in tasks[1] if row[0] >= 2}


def samples(lab, name):
    return [json.loads(line) for line in (lab / "runs" / name / "samples.jsonl").read_text().splitlines()]
