"""What a recipe's `algorithm` section must be: its choices, their parameters, and what they need of the rest."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from rlpost.algorithms import (
    ALGORITHMS,
    COMPARE_WITHIN_GROUP,
    CORRECTIONS,
    GIVEN_TO_LOSSES,
    OFF_POLICY_LOSSES,
    PIECES,
    Piece,
)
from rlpost.errors import RecipeError, RunError
from rlpost.plugins import bind, did_you_mean, resolve
from rlpost.recipe import Recipe

POSITIONAL = {"advantage": 1, "loss": 3}
"""The parts that may be a function of the user's, and how many tensors it is called with."""
WORDS = {"count": ("tokens", "rollouts")}
"""The values of parameters that are words."""
ORDERED = (("low", "high"), ("cov_low", "cov_high"))
REWARD_ESTIMATORS = ("k1", "k2", "k3")
"""The others have a value of one and a gradient of another, and a reward has no gradient."""
RESET_TRIGGERS = ("every", "kl_spike", "patience")

_BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    ("in (0, 1)", lambda x: 0 < x < 1, "clip_low tv_low tv_high"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "frac buffer_frac"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "lam"),
    ("> 1", lambda x: x > 1, "dual_clip"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "quantile"),
    (">= 1", lambda x: x >= 1, "ratio_cap steps_on"),
    (
        "> 0",
        lambda x: x > 0,
        "gamma clip_high gmpo.clip_low cap limit icepop.low geometric_rejection.low tau tau_pos tau_neg k_pos k_neg "
        "lambda_pos lambda_neg",
    ),
    (">= 0", lambda x: x >= 0, "coef weight warmup_steps steps_off length_alpha"),
]
"""By parameter, or by choice and parameter where one choice differs: gmpo clips the logarithm of the ratio."""
_BOUND_OF = {name: (text, holds) for text, holds, names in _BOUNDS for name in names.split()}


def algorithm_problems(recipe: Recipe) -> list[str]:
    """Every problem of the `algorithm` section that shows without loading a model, one line each."""
    algorithm = recipe.algorithm
    problems = []
    if algorithm.name not in ALGORITHMS:
        hint = did_you_mean(algorithm.name, ALGORITHMS)
        problems.append(f"algorithm.name must be one of {', '.join(ALGORITHMS)} (got {algorithm.name!r}){hint}")
    for part, pieces in PIECES.items():
        problems += _choice(getattr(algorithm, part), pieces, f"algorithm.{part}", POSITIONAL.get(part))
    problems += _choice(algorithm.off_policy.loss, OFF_POLICY_LOSSES, "algorithm.off_policy.loss", POSITIONAL["loss"])
    for index, weight in enumerate(algorithm.mismatch.weights):
        problems += _choice(weight, CORRECTIONS, f"algorithm.mismatch.weights.{index}", None)
    return [*problems, *_groups(recipe), *_mismatch(recipe), *_kl(recipe), *_entropy(recipe), *_critic(recipe)]


def _choice(chosen: Mapping[str, Any], pieces: Mapping[str, Piece], where: str, positional: int | None) -> list[str]:
    """What is wrong with a choice; with `positional` it may also be a function of so many tensors."""
    use = chosen.get("use")
    if isinstance(use, str) and use in pieces:
        return _parameters(chosen, pieces[use], where)
    if positional is not None and isinstance(use, str) and ":" in use:
        return _function(chosen, where, positional)
    path = ", or the path of a function, as in `pkg.module:function`" if positional is not None else ""
    hint = did_you_mean(use, pieces) if isinstance(use, str) else ""
    return [f"{where}.use must be one of {', '.join(pieces)}{path} (got {use!r}){hint}"]


def _function(chosen: Mapping[str, Any], where: str, positional: int) -> list[str]:
    """A user's function must take the tensors, and the parameters must fit its signature."""
    try:
        given = set(inspect.signature(resolve(chosen["use"], "rlpost")).parameters) & GIVEN_TO_LOSSES
        bind(chosen, "rlpost", where=where, skip=positional, supplied=given if positional == POSITIONAL["loss"] else ())
    except RecipeError as error:
        return error.problems
    except RunError as error:
        return [f"{where}.use: {error}"]
    return []


def _parameters(chosen: Mapping[str, Any], piece: Piece, where: str) -> list[str]:
    use, problems = chosen["use"], []
    for name, value in chosen.items():
        if name == "use":
            continue
        if name not in piece.parameters:
            takes, hint = ", ".join(piece.parameters) or "no parameters", did_you_mean(name, piece.parameters)
            problems.append(f"{where}.{name}: `{use}` has no such parameter{hint} (it takes {takes})")
        elif value is None:
            problems.append(f"{where}.{name} must be given: `{use}` has no default for it")
        else:
            problems += _value(f"{use}.{name}", value, piece.parameters[name], f"{where}.{name}")
    if problems:
        return problems
    return [
        f"{where}.{low} must be less than {where}.{high} (got {chosen[low]} and {chosen[high]})"
        for low, high in ORDERED
        if low in piece.parameters and chosen[low] >= chosen[high]
    ]


def _value(key: str, value: Any, default: float | bool | str | None, where: str) -> list[str]:
    """What is wrong with one parameter; `key` is `<choice>.<parameter>`, and the default says of what type it is."""
    name = key.partition(".")[2]
    if name in WORDS:
        return [] if value in WORDS[name] else [f"{where} must be one of {', '.join(WORDS[name])} (got {value!r})"]
    if isinstance(default, bool):
        return [] if isinstance(value, bool) else [f"{where} must be true or false (got {value!r})"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"{where} must be a number (got {value!r})"]
    if isinstance(default, int) and not isinstance(value, int):
        return [f"{where} must be a whole number (got {value})"]
    text, holds = _BOUND_OF.get(key) or _BOUND_OF.get(name) or ("", lambda _: True)
    return [] if holds(value) else [f"{where} must be {text} (got {value})"]


def _groups(recipe: Recipe) -> list[str]:
    if recipe.sampling.group_size != 1:
        return []
    use, rule = recipe.algorithm.advantage.get("use"), recipe.algorithm.groups.without_spread
    if use in COMPARE_WITHIN_GROUP:
        return [
            f"sampling.group_size must be >= 2 for algorithm.advantage.use={use} (got 1): rewards are compared within "
            "a group; raise it"
        ]
    if rule != "keep":
        return [
            f"sampling.group_size must be >= 2 for algorithm.groups.without_spread={rule} (got 1): a lone reward has "
            "no spread, so nothing would be left; raise it, or use keep"
        ]
    return []


def _mismatch(recipe: Recipe) -> list[str]:
    mismatch = recipe.algorithm.mismatch
    if not mismatch.weights or mismatch.mode == "decoupled":
        return []
    return [
        "algorithm.mismatch.mode must be decoupled for algorithm.mismatch.weights (got bypass): there the ratio of the "
        "loss contains them already; set it, or leave the weights out"
    ]


def _kl(recipe: Recipe) -> list[str]:
    kl, evaluation = recipe.algorithm.kl, recipe.evaluation
    problems = []
    if kl.place == "reward" and kl.estimator not in REWARD_ESTIMATORS:
        problems.append(
            f"algorithm.kl.estimator must be one of {', '.join(REWARD_ESTIMATORS)} for algorithm.kl.place=reward (got "
            f"{kl.estimator}): the others differ in their gradient, which a reward has none of"
        )
    if kl.place == "reward" and kl.coef and recipe.algorithm.advantage.get("use") == "gdpo":
        problems.append(
            "algorithm.kl.place must be loss for algorithm.advantage.use=gdpo (got reward): it looks at each reward by "
            "itself, and the KL is none of them"
        )
    needing = {"target": kl.target, **{f"reset.{name}": getattr(kl.reset, name) for name in RESET_TRIGGERS}}
    problems += [
        f"algorithm.kl.coef must be > 0 for algorithm.kl.{name}={value} (got {kl.coef}): without it no reference is "
        f"kept; raise it, or set algorithm.kl.{name}={'null' if name == 'target' else 0}"
        for name, value in needing.items()
        if value is not None and value > 0 and kl.coef == 0
    ]
    if kl.reset.patience and not (evaluation.every > 0 and recipe.tasks.eval is not None):
        found = "none" if recipe.tasks.eval is None else recipe.tasks.eval.path
        problems.append(
            f"algorithm.kl.reset.patience needs tasks.eval and evaluation.every > 0 (got {found} and "
            f"{evaluation.every}): it counts held-out evaluations; give both, or set it to 0"
        )
    return problems


def _entropy(recipe: Recipe) -> list[str]:
    low, high = recipe.algorithm.entropy.low, recipe.algorithm.entropy.high
    if low <= high:
        return []
    return [f"algorithm.entropy.low must be <= algorithm.entropy.high (got {low} and {high})"]


def _critic(recipe: Recipe) -> list[str]:
    use, pretrain_steps = recipe.algorithm.advantage.get("use"), recipe.algorithm.critic.pretrain_steps or 0
    if use != "gae" and pretrain_steps > 0:
        return [
            f"algorithm.critic.pretrain_steps must be 0 for algorithm.advantage.use={use} (got {pretrain_steps}): only "
            "gae has a critic"
        ]
    if use == "gae" and pretrain_steps >= recipe.steps:
        return [
            f"algorithm.critic.pretrain_steps must be less than steps (got {pretrain_steps} and {recipe.steps}): the "
            "critic alone learns in them"
        ]
    return []
