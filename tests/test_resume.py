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
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000002"]

    assert train(lab, "killed", "resume=auto") == logged(lab, "first")
    ours, theirs = weights(lab, "killed", 4), weights(lab, "first", 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    summaries = [json.loads((lab / f"runs/{name}/summary.json").read_text()) for name in ("killed", "first")]
    assert summaries[0]["eval"] == summaries[1]["eval"]
