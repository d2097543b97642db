"""Wide groups, hints and expert answers from the first line of a run to the last; killed in the middle of waves."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from lab import ROOT, logged, rlpost, train, train_here, weights

from rlpost.algorithms_explore import EXPLORING
from rlpost.check import load_and_check
from rlpost.errors import RecipeError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOLVED = ["tasks.train.solution=solution", "model.context=96"]
STEPS = "{source: solution, levels: [0.5, -1], unit: steps, separator: ';', template: '{hint}#{prompt}'"
HINTS = f"explore=[{STEPS}, use: guide, n: 3}}]"
SOME_SEVENS = "rewards=[{use: 'mylab.rewards:sevens'}]"
"""Of rewards that are rare, so that nothing passes (none is 1) and most groups differ."""
ASKED = {
    "brorl": ["explore.0.width=8", "explore.0.chunk=2", "algorithm.groups.max_waves=2"],
    "guide_grpo": [HINTS],
    "guide_ppo": [HINTS],
    "luffy": [],
    "ghpo": ["explore.0.n=3", "explore.0.template='{hint}#{prompt}'"],
    "scaf_grpo": [f"explore=[{STEPS}, use: guide, n: 1, place: failures, prompt: hinted}}]"],
    "egsr": ["explore.0.template='{hint}#{prompt}'"],
}


@pytest.fixture
def here(lab, single_rank):
    """Train in this process with the plain generator."""

    def run(name: str, *overrides: str) -> list[dict]:
        return train_here(lab, single_rank, name, *SOLVED, *overrides)

    return run


@pytest.mark.parametrize("name", EXPLORING)
def test_every_exploring_algorithm_trains_from_its_name_and_its_hints(here, name: str) -> None:
    curve = here(f"explores-{name}", f"algorithm.name={name}", *ASKED[name], "steps=2")
    assert [line["step"] for line in curve] == [0, 1]
    for line in curve:
        assert all(map(math.isfinite, line.values())), line
        assert line["rollouts/num"] >= 16 and {"rollouts/pass@1", "rollouts/pass@4", "mass/q_pos"} <= line.keys()
        assert line["explore/rollouts"] > 0
        if name == "brorl":
            assert line["rollouts/num"] == 8 * line["groups/num"] and line["explore/width_mean"] == 8
        elif name == "luffy":
            assert line["expert/num"] == line["groups/num"] == 4 and line["guided/trained_frac"] == 1 / 5
            assert line["guided/ratio_p50"] < 1 and line["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
        else:
            assert line["guided/num"] > 0 and "explore/too_long" in line and "guided/copied_frac" in line
        assert line["rollouts/num"] + line.get("guided/num", 0) - line["rollouts/discarded"] >= 0


def test_what_a_sampled_group_trains_is_what_it_is_told_to(here) -> None:
    wide = "explore=[{use: broaden, width: 16, chunk: 6, train: 4, rule: spread}]"
    for line in here("sampled", SOME_SEVENS, wide, "algorithm.groups.without_spread=keep", "steps=2"):
        assert line["rollouts/num"] == 64 and line["rollouts/discarded"] == 48
        assert 0 < line["tokens/trained"] < line["tokens/generated"] - line["tokens/discarded"] + 1


def test_chunks_are_the_rollouts_of_one_request(lab) -> None:
    """Where every rollout has its own seed, a group in chunks is the group that one request gives."""
    asked = ["generator.seeding=request", SOME_SEVENS, "steps=1", "tasks.eval=null", "save_every=0"]
    [whole] = train(lab, "whole", *asked, "sampling.group_size=8")
    [chunks] = train(lab, "chunks", *asked, "explore=[{use: broaden, width: 8, chunk: 2}]")
    for key in ("reward/mean", "reward/std", "tokens/generated", "policy/loss", "optim/grad_norm"):
        assert chunks[key] == pytest.approx(whole[key], rel=1e-4), key


OWN = '''
class SecondLook:
    """`n` more answers where all have failed, up to `limit` in all; remembers how often a task needed that."""

    def __init__(self, *, n: int = 4, limit: int = 12) -> None:
        self.n, self.limit, self.needed = n, limit, {}

    def more(self, group):
        if any(rollout.passed for rollout in group.rollouts) or len(group.rollouts) >= self.limit:
            return []
        return [group.request(min(self.n, self.limit - len(group.rollouts)))]

    def observe(self, outcomes):
        for outcome in outcomes:
            if len(outcome.rewards) > self.n:
                self.needed[outcome.key] = self.needed.get(outcome.key, 0) + 1

    def state_dict(self):
        return {"needed": dict(self.needed)}

    def load_state_dict(self, state):
        self.needed = dict(state["needed"])

    def metrics(self):
        return {"needed": float(len(self.needed))}
'''
BOTH = (
    "explore=[{use: 'mylab.explorers:SecondLook'}, {use: guide, remember: true, n: 2, source: solution, "
    "levels: [0.5, -1], separator: ';', template: '{hint}#{prompt}'}]"
)


@pytest.fixture
def explorer(lab) -> Path:
    file = lab / "mylab/explorers.py"
    file.write_text(OWN)
    return file


def test_a_run_killed_between_waves_resumes_to_the_same_figures_weights_and_state(lab, explorer) -> None:
    whole = train(lab, "waves", *SOLVED, BOTH)
    assert max(line.get("explore/waves", 0) for line in whole) >= 3
    checkpoints = lab / "runs/waves-killed/checkpoints"
    accident = f"SIGKILL:{checkpoints / 'step-000002'}"  # in a reward of the third step, and so between its waves
    killed = rlpost(lab, "train", "name=waves-killed", *SOLVED, BOTH, accident=accident)
    assert killed.returncode == -signal.SIGKILL
    state = json.loads((checkpoints / "step-000002/state.json").read_text())
    assert state["explorers"]["0"]["needed"] and "worked" in state["explorers"]["1"] and state["frontier"]["failures"]
    assert train(lab, "waves-killed", *SOLVED, BOTH, "resume=auto") == logged(lab, "waves")
    ours, theirs = weights(lab, "waves-killed", 4), weights(lab, "waves", 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_share_the_waves_and_have_one_state(lab, explorer) -> None:
    asked = [*SOLVED, BOTH, "engine.zero_stage=3", "save_every=0", "steps=2"]
    for line in [line for line in train(lab, "waves-ranks", *asked, ranks=2) if "reward/mean" in line]:
        assert line["explore/rollouts"] > 0 and all(map(math.isfinite, line.values()))
        assert line["rollouts/num"] >= 16


@pytest.mark.parametrize("name", EXPLORING)
def test_the_recipe_of_every_exploring_algorithm_is_whole(name: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_and_check(f"recipes/{name}.yaml")
    assert recipe.algorithm.name == name and recipe.explore


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["explore=[{use: guid}]"], "explore.0.use: rlpost.explore/ has no `guid`, did you mean `guide`?"),
        (["explore=[{use: broaden, wide: 4}]"], "explore.0.wide: `broaden` has no such parameter"),
        (["explore=[{use: broaden, rule: best}]"], "explore.0: broaden.rule must be one of"),
        (["explore=[{use: broaden, train: 8}]", "algorithm.name=ppo"], "broaden.train must be 0 for"),
        (
            ["explore=[{use: broaden, train: 8, rule: spread}]", "algorithm.advantage=opo"],
            "rule must be balanced or random",
        ),
        (["explore=[{use: guide}]"], "guide.source=column needs tasks.train.hints"),
        (["algorithm.off_policy.statistics=policy", "algorithm.advantage=rloo"], "statistics must be pooled or role"),
        (["algorithm.off_policy.loss=shapd"], "algorithm.off_policy.loss.use must be one of"),
        (["algorithm.off_policy.loss={use: shaped, quantile: 1.5}"], r"quantile must be in \[0, 1\)"),
        (["algorithm.minibatch_rollouts=64", "algorithm.minibatches=2"], "algorithm.minibatches must be 1"),
        (["explore_budget.waves=-1"], "explore_budget.waves must be >= 0"),
        (["explore=[{use: 'rlpost.testbed:correct_chain'}]"], "explore.0"),
    ],
)
def test_check_names_what_is_wrong_with_exploration(asked, words, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=words):
        load_and_check("recipes/quickstart.yaml", asked)
