"""The table of algorithms: it agrees with the functions that it names, loads as it stands, and is checked."""

import inspect
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from rlpost import advantages, credit, losses, mismatch
from rlpost.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    CORRECTIONS,
    GIVEN_TO_LOSSES,
    LENGTHS,
    LOSSES,
    PIECES,
    with_bundle,
)
from rlpost.check import check
from rlpost.recipe import load, to_yaml
from rlpost.types import Group, Rollout, Task
from rlpost.yaml_tree import expand

QUICKSTART = Path(__file__).parent.parent / "recipes/quickstart.yaml"
NAMES = ", ".join(ALGORITHMS)
OF_CREDIT = {"count", "lam", "length_alpha"}
"""Options of an advantage that `credit.py` acts on."""


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *overrides: load(QUICKSTART, overrides)


def keywords(function):
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}


def functions_on(module, first):
    """The functions of a module whose first parameters these are."""
    members = vars(module).items()
    own = {name: one for name, one in members if inspect.isfunction(one) and one.__module__ == module.__name__}
    return {name: one for name, one in own.items() if list(inspect.signature(one).parameters)[: len(first)] == first}


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_parameters_are_those_of_its_function(name):
    assert set(LOSSES[name].parameters) == keywords(getattr(losses, name)) - GIVEN_TO_LOSSES


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_corrections_parameters_are_those_of_its_function(name):
    assert set(CORRECTIONS[name].parameters) == keywords(getattr(mismatch, name)) - {"document_BT", "mask_BT"}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantages_parameters_are_those_of_its_function(name):
    of_the_run = {"eps", "gamma", "lam", "bootstrap"}
    assert set(ADVANTAGES[name].parameters) - OF_CREDIT == keywords(getattr(advantages, name)) - of_the_run


@pytest.mark.parametrize("name", LENGTHS)
def test_a_lengths_parameters_are_all_that_it_is_computed_from(name):
    rollout = Rollout(Task("a", "1+1="), 0, (2,), (2,), (4, 5, 6), (-1.0,) * 3, "stop", 0, reward=1.0)
    group = Group(0, rollout.task, [rollout])
    asked = Recorded({"use": name, **LENGTHS[name].parameters})
    credit.add_length_rewards([group], asked, budget=3, step=100)
    assert asked.keys_read - {"use"} == set(LENGTHS[name].parameters) - (
        {"low", "high", "weight"} if asked.off else set()
    )


class Recorded(dict):
    """A choice that remembers which of its keys were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.keys_read = set()

    @property
    def off(self):
        """Whether a schedule is in the part without a length reward at step 100."""
        return self.get("steps_on", 101) <= 100

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)


def test_every_loss_and_every_correction_is_in_the_table():
    tensors = ["logp_BT", "behavior_logp_BT", "adv_BT"]
    returning = {
        name
        for name, function in functions_on(losses, tensors).items()
        if inspect.signature(function).return_annotation == "tuple[Tensor, Stats]"
    }
    assert returning == set(LOSSES)
    public = {name for name in functions_on(mismatch, ["prox_logp_BT", "behavior_logp_BT"]) if name[0] != "_"}
    assert public == set(CORRECTIONS)


def leaves(section, *path):
    for key, value in section.items():
        yield from leaves(value, *path, key) if isinstance(value, dict) else [((*path, key), value)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_bundle_loads_with_every_value_at_its_place_and_passes_the_check(quickstart, name):
    helped = ["tasks.train.solution=solution", "tasks.train.hints=[solution]"]
    recipe = quickstart(f"algorithm.name={name}", *(helped if ALGORITHMS[name].explore else []))
    whole = asdict(recipe.algorithm)
    for path, wanted in leaves(ALGORITHMS[name].section):
        found = whole
        for key in path:
            found = found[key]
        assert found == (10 if path == ("critic", "pretrain_steps") else wanted), path  # null: a quarter of 40 steps
    for part, pieces in PIECES.items():
        assert set(whole[part]) == {"use", *pieces[whole[part]["use"]].parameters}
    assert recipe.curriculum == {"use": ALGORITHMS[name].curriculum}
    assert recipe.explore == list(ALGORITHMS[name].explore)
    assert check(recipe) == []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_saved_recipe_of_every_bundle_loads_equal(quickstart, tmp_path, name):
    recipe = quickstart(f"algorithm.name={name}")
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    assert load(tmp_path / "saved.yaml") == recipe


def test_loading_leaves_the_table_as_it_is(quickstart):
    before = repr(ALGORITHMS)
    assert quickstart("algorithm.name=ghpo", "explore.0.levels.0=0.1").explore[0]["levels"] == [0.1, 0.5, 0.75]
    recipe = quickstart("algorithm.name=prorl_v2", "algorithm.loss.clip_low=0.1")
    recipe.algorithm.loss["clip_high"] = 9.0
    recipe.algorithm.mismatch.weights[0]["high"] = 9.0
    assert repr(ALGORITHMS) == before


@pytest.mark.parametrize(
    ("section", "part", "wanted"),
    [
        ({"loss": {"clip_high": 0.4}}, "loss", {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.4}),
        (
            {"loss": {"use": "ppo_clip", "clip_low": 0.1}},
            "loss",
            {"use": "ppo_clip", "clip_low": 0.1, "clip_high": 0.28},
        ),
        ({"loss": {"use": "gspo"}}, "loss", {"use": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}),
        ({"loss": "reinforce"}, "loss", {"use": "reinforce"}),
        ({"loss": "mylab:loss"}, "loss", {"use": "mylab:loss"}),
        ({"advantage": "rloo"}, "advantage", {"use": "rloo"}),
        ({"advantage": {"scale_by_std": False}}, "advantage", {"use": "grpo", "scale_by_std": False}),
        ({"length": "soft_overlong"}, "length", {"use": "soft_overlong", "buffer_frac": 0.2, "weight": 1.0}),
        ({"groups": {"max_waves": 3}}, "groups", {"without_spread": "drop", "max_waves": 3}),
        (
            {"mismatch": {"weights": [{"use": "icepop", "low": 0.25}, {"use": "tis_token"}]}},
            "mismatch",
            {"weights": [{"use": "icepop", "low": 0.25, "high": 5.0}, {"use": "tis_token", "cap": 2.0}]},
        ),
        (
            {"name": "prorl_v2", "kl": {"reset": {"patience": 2}}},
            "kl",
            {"coef": 1e-4, "place": "loss", "estimator": "k2", "reset": {"every": 300, "patience": 2}},
        ),
        ({"name": "gspo"}, "minibatches", 4),
        ({"name": "gspo", "minibatches": 2}, "minibatches", 2),
    ],
)
def test_a_recipe_goes_over_its_bundle(section, part, wanted):
    assert with_bundle(expand({"algorithm": section})["algorithm"])[part] == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=grpoo"], f"algorithm.name must be one of {NAMES} (got 'grpoo'), did you mean `grpo`?"),
        (
            ["loss=ppo_clipp"],
            f"algorithm.loss.use must be one of {', '.join(LOSSES)}, or the path of a function, as in "
            "`pkg.module:function` (got 'ppo_clipp'), did you mean `ppo_clip`?",
        ),
        (
            ["advantage=gea"],
            f"algorithm.advantage.use must be one of {', '.join(ADVANTAGES)}, or the path of a function, as in "
            "`pkg.module:function` (got 'gea'), did you mean `gae`?",
        ),
        (
            ["length=kimmi"],
            "algorithm.length.use must be one of none, soft_overlong, kimi, cosine (got 'kimmi'), did you mean `kimi`?",
        ),
        (
            ["length.weight=1"],
            "algorithm.length.use must be one of none, soft_overlong, kimi, cosine (got None)",
        ),
        (
            ["mismatch.mode=decoupled", "mismatch.weights=[{use: icepo}]"],
            f"algorithm.mismatch.weights.0.use must be one of {', '.join(CORRECTIONS)} (got 'icepo'), did you mean "
            "`icepop`?",
        ),
        (
            ["loss.clip_hihg=0.3"],
            "algorithm.loss.clip_hihg: `ppo_clip` has no such parameter, did you mean `clip_high`? (it takes clip_low, "
            "clip_high)",
        ),
        (
            ["advantage={use: rloo, eps: 1}"],
            "algorithm.advantage.eps: `rloo` has no such parameter (it takes no parameters)",
        ),
        (["loss.clip_low=null"], "algorithm.loss.clip_low must be given: `ppo_clip` has no default for it"),
        (["loss.clip_low=low"], "algorithm.loss.clip_low must be a number (got 'low')"),
        (["loss.clip_low=true"], "algorithm.loss.clip_low must be a number (got True)"),
        (["loss.clip_high=.nan"], "algorithm.loss.clip_high must be a number (got nan)"),
        (["advantage.scale_by_std=1"], "algorithm.advantage.scale_by_std must be true or false (got 1)"),
        (
            ["name=prorl_v2", "advantage.count=words"],
            "algorithm.advantage.count must be one of tokens, rollouts (got 'words')",
        ),
        (["length.use=cosine", "length.steps_on=1.5"], "algorithm.length.steps_on must be a whole number (got 1.5)"),
        (["length.use=cosine", "length.steps_on=0"], "algorithm.length.steps_on must be >= 1 (got 0)"),
        (
            ["length={use: cosine, low: 0.5}"],
            "algorithm.length.low must be less than algorithm.length.high (got 0.5 and 0.0)",
        ),
        (["length={use: soft_overlong, buffer_frac: 0}"], "algorithm.length.buffer_frac must be in (0, 1] (got 0)"),
        (["length={use: soft_overlong, weight: -1}"], "algorithm.length.weight must be >= 0 (got -1)"),
        (["loss.clip_low=1"], "algorithm.loss.clip_low must be in (0, 1) (got 1)"),
        (["loss={use: gmpo, clip_low: 0}"], "algorithm.loss.clip_low must be > 0 (got 0)"),
        (["loss.clip_high=0"], "algorithm.loss.clip_high must be > 0 (got 0)"),
        (["loss={use: cispo, ratio_cap: 0.5}"], "algorithm.loss.ratio_cap must be >= 1 (got 0.5)"),
        (["loss={use: ppo_dual_clip, dual_clip: 1}"], "algorithm.loss.dual_clip must be > 1 (got 1)"),
        (["loss={use: kl_cov, frac: 1.5}"], "algorithm.loss.frac must be in (0, 1] (got 1.5)"),
        (["loss={use: dppo_tv, tv_low: 1}"], "algorithm.loss.tv_low must be in (0, 1) (got 1)"),
        (
            ["loss={use: clip_cov, cov_low: 5}"],
            "algorithm.loss.cov_low must be less than algorithm.loss.cov_high (got 5 and 5.0)",
        ),
        (["name=ppo", "advantage.lam=1.5"], "algorithm.advantage.lam must be in [0, 1] (got 1.5)"),
        (["name=vapo", "advantage.length_alpha=-1"], "algorithm.advantage.length_alpha must be >= 0 (got -1)"),
        (
            ["name=prorl_v2", "mismatch.weights=[{use: icepop, low: 7}]"],
            "algorithm.mismatch.weights.0.low must be less than algorithm.mismatch.weights.0.high (got 7 and 5.0)",
        ),
        (
            ["mismatch={mode: decoupled, weights: [{use: tis_token, cap: 0}]}"],
            "algorithm.mismatch.weights.0.cap must be > 0 (got 0)",
        ),
        (
            ["mismatch.weights=[{use: tis_token}]"],
            "algorithm.mismatch.mode must be decoupled for algorithm.mismatch.weights (got bypass): there the ratio of "
            "the loss contains them already; set it, or leave the weights out",
        ),
        (["mismatch.offpolicy_limit=0"], "algorithm.mismatch.offpolicy_limit must be > 0 (got 0.0)"),
        (
            ["kl={coef: 0.1, place: reward, estimator: k3_plus}"],
            "algorithm.kl.estimator must be one of k1, k2, k3 for algorithm.kl.place=reward (got k3_plus): the others "
            "differ in their gradient, which a reward has none of",
        ),
        (
            ["kl.target=0.1"],
            "algorithm.kl.coef must be > 0 for algorithm.kl.target=0.1 (got 0.0): without it no reference is kept; "
            "raise it, or set algorithm.kl.target=null",
        ),
        (
            ["name=prorl_v2", "kl.coef=0"],
            "algorithm.kl.coef must be > 0 for algorithm.kl.reset.every=300 (got 0.0): without it no reference is "
            "kept; raise it, or set algorithm.kl.reset.every=0",
        ),
        (
            ["kl={coef: 0.1, reset: {patience: 2}}"],
            "algorithm.kl.reset.patience needs tasks.eval and evaluation.every > 0 (got rlpost.testbed:chain_sums and "
            "0): it counts held-out evaluations; give both, or set it to 0",
        ),
        (["kl={coef: 0.1, target: 0}"], "algorithm.kl.target must be > 0 (got 0.0)"),
        (["kl.reset.every=-1"], "algorithm.kl.reset.every must be >= 0 (got -1)"),
        (["entropy.low=2"], "algorithm.entropy.low must be <= algorithm.entropy.high (got 2.0 and 1.0)"),
        (
            ["critic.pretrain_steps=5"],
            "algorithm.critic.pretrain_steps must be 0 for algorithm.advantage.use=grpo (got 5): only gae has a critic",
        ),
        (
            ["name=ppo", "critic.pretrain_steps=40"],
            "algorithm.critic.pretrain_steps must be less than steps (got 40 and 40): the critic alone learns in them",
        ),
        (["groups.max_waves=0"], "algorithm.groups.max_waves must be > 0 (got 0)"),
        (["imitation_coef=-1"], "algorithm.imitation_coef must be >= 0 (got -1.0)"),
    ],
)
def test_check_finds_each_problem_of_an_algorithm(quickstart, overrides, message):
    assert check(quickstart(*(f"algorithm.{override}" for override in overrides))) == [message]


@pytest.mark.parametrize("use", sorted(ADVANTAGES))
def test_a_group_of_one_is_refused_by_what_compares_within_a_group(quickstart, use):
    alone = ["sampling.group_size=1", "algorithm.groups.without_spread=keep"]
    found = check(quickstart(*alone, f"algorithm.advantage={use}"))
    if use in ("remax", "reinforce_pp", "gae"):
        assert found == []
    else:
        assert found == [
            f"sampling.group_size must be >= 2 for algorithm.advantage.use={use} (got 1): rewards are compared within "
            "a group; raise it"
        ]


@pytest.mark.parametrize("rule", ["drop", "refill"])
def test_a_lone_reward_has_no_spread_to_select_by(quickstart, rule):
    overrides = ["algorithm.advantage=remax", f"algorithm.groups.without_spread={rule}"]
    assert check(quickstart(*overrides)) == []
    assert check(quickstart(*overrides, "sampling.group_size=1")) == [
        f"sampling.group_size must be >= 2 for algorithm.groups.without_spread={rule} (got 1): a lone reward has no "
        "spread, so nothing would be left; raise it, or use keep"
    ]


def test_resets_by_patience_are_fine_with_held_out_evaluations(quickstart):
    overrides = ["algorithm.kl={coef: 0.1, reset: {patience: 2}}", "evaluation.every=5"]
    assert check(quickstart(*overrides)) == []
    assert check(quickstart(*overrides, "tasks.eval=null", "evaluation.by=null")) == [
        "algorithm.kl.reset.patience needs tasks.eval and evaluation.every > 0 (got none and 5): it counts held-out "
        "evaluations; give both, or set it to 0"
    ]


OURS = """\
def halved(rewards_G, *, by: float = 2.0): return rewards_G / by
def plain(logp_BT, behavior_logp_BT, adv_BT): return -logp_BT * adv_BT, {}
def masked(logp_BT, behavior_logp_BT, adv_BT, *, mask_BT, power: float): return -logp_BT * adv_BT, {}
def greedy(rewards_G, *, greedy_reward: float): return rewards_G
def few(logp_BT): return -logp_BT, {}
"""


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("advantage={use: 'our_algorithms:halved', by: 3}", []),
        ("loss=our_algorithms:plain", []),
        ("loss={use: 'our_algorithms:masked', power: 2}", []),
        (
            "loss=our_algorithms:masked",
            ["algorithm.loss.power must be given: `our_algorithms:masked` has no default for it"],
        ),
        ("advantage={use: 'our_algorithms:halved', by: x}", ["algorithm.advantage.by must be float (got 'x')"]),
        (
            "loss={use: 'our_algorithms:masked', power: 2, mask_BT: 1}",
            ["algorithm.loss.mask_BT is given by the run and cannot be set in a recipe"],
        ),
        (
            "advantage=our_algorithms:greedy",
            ["algorithm.advantage.greedy_reward must be given: `our_algorithms:greedy` has no default for it"],
        ),
        ("loss=our_algorithms:few", ["algorithm.loss: `our_algorithms:few` must take 3 positional arguments"]),
    ],
)
def test_a_users_function_must_fit_its_place_and_its_parameters(quickstart, tmp_path, override, found):
    (tmp_path / "our_algorithms.py").write_text(OURS)
    assert check(quickstart(f"algorithm.{override}")) == found


def test_a_users_function_that_is_not_there_is_named(quickstart, tmp_path):
    (tmp_path / "our_algorithms.py").write_text(OURS)
    (problem,) = check(quickstart("algorithm.loss=our_algorithms:plian"))
    assert problem.startswith("algorithm.loss.use: `our_algorithms:plian`: ")
    assert "has no function or class `plian`, did you mean `plain`?" in problem
