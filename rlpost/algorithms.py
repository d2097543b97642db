"""The table of algorithms: what each one is, where it is published, and its vetted defaults. The file to open first.

A bundle in `ALGORITHMS` is a recipe's `algorithm` section: what departs from the defaults in `algorithm_recipe.py`. A
recipe overrides any of it. The pieces that a bundle names stand below it, each with its parameters: `ADVANTAGES`
(rewards -> advantages, `advantages.py`), `LOSSES` (`losses.py`), `CORRECTIONS` (`mismatch.py`), `LENGTHS`. Those that
ask for further rollouts, wide groups or hints, are rows in `algorithms_explore.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpost.algorithms_explore import EXPLORING
from rlpost.bundle import Bundle

ALGORITHMS: dict[str, Bundle] = {
    "grpo": Bundle(
        summary="rewards centred and scaled within a prompt's group; clipped ratio, mean over all tokens of the step",
        paper="arXiv:2402.03300; clip_high and token mean: DAPO, arXiv:2503.14476",
        conflicts="the paper: aggregation=seq_mean, clips .2/.2, kl.coef=.04 (k3); this is what is used since DAPO",
        section={
            "advantage": {"use": "grpo", "scale_by_std": True},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28},
            "groups": {"without_spread": "drop"},
        },
    ),
    "dapo": Bundle(
        summary="grpo, refilled until every group has spread, with a soft punishment of overlong answers",
        paper="arXiv:2503.14476",
        conflicts="ScaleRL drops groups without spread and does not refill; no KL, unlike ProRL; paper: 16 minibatches",
        section={
            "advantage": {"use": "grpo", "scale_by_std": True},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28},
            "length": {"use": "soft_overlong", "buffer_frac": 0.2, "weight": 1.0},
            "groups": {"without_spread": "refill", "max_waves": 10},
        },
    ),
    "dr_grpo": Bundle(
        summary="rewards centred only, token losses summed over a constant length: no bias by length or difficulty",
        paper="arXiv:2503.20783",
        conflicts="no division by the group's std (GRPO) nor the batch's (ScaleRL); groups without spread stay in the "
        "denominator",
        section={
            "advantage": {"use": "dr_grpo"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "aggregation": "seq_sum_const",
            "groups": {"without_spread": "keep"},
        },
    ),
    "rloo": Bundle(
        summary="leave-one-out baseline within the group, whole sequences as actions",
        paper="arXiv:2402.14740",
        conflicts="no std; the paper's KL in the reward (.03 to .05, for RLHF) is off: kl={coef: .05, place: reward, "
        "estimator: k1}; the ratio is clipped as in TRL, which on one update a batch changes nothing",
        section={
            "advantage": {"use": "rloo"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "aggregation": "seq_sum_const",
            "groups": {"without_spread": "keep"},
        },
    ),
    "reinforce_pp": Bundle(
        summary="no group: returns whitened over the tokens of the batch, KL to the start in the reward",
        paper="REINFORCE++, arXiv:2501.03262",
        conflicts="a baseline of the batch, where GRPO and RLOO have one of the group; with several rollouts a prompt "
        "see prorl_v2; works with sampling.group_size=1",
        section={
            "advantage": {"use": "reinforce_pp"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "kl": {"coef": 0.001, "place": "reward", "estimator": "k1"},
            "groups": {"without_spread": "keep"},
        },
    ),
    "prorl_v2": Bundle(
        summary="group mean off, whitened over the batch; clip-higher, k2 loss, reference reset, IcePop, refill",
        paper="ProRL, arXiv:2505.24864; ProRLv2: NVIDIA's posts, OpenRLHF's script; arXiv:2501.03262 (baseline)",
        conflicts="v1 clears the optimizer at a reset (kl.reset.clear_optimizer=true) and has clip_high=.4; the script "
        "has .27; the weights of its scheduled cosine length reward are not published: length={use: cosine, ...}",
        section={
            "advantage": {"use": "reinforce_pp_baseline", "count": "tokens"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28},
            "kl": {"coef": 1e-4, "place": "loss", "estimator": "k2", "reset": {"every": 300}},
            "groups": {"without_spread": "refill", "max_waves": 10},
            "mismatch": {"mode": "decoupled", "weights": [{"use": "icepop", "low": 0.5, "high": 5.0}]},
        },
    ),
    "gspo": Bundle(
        summary="one length-normalised ratio a sequence, clipped very tightly; 4 updates a batch",
        paper="arXiv:2507.18071",
        conflicts="its clips are of sequence ratios: those of ppo_clip would never act; mean over sequences",
        section={
            "advantage": {"use": "grpo", "scale_by_std": True},
            "loss": {"use": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
            "aggregation": "seq_mean",
            "groups": {"without_spread": "drop"},
            "minibatches": 4,
        },
    ),
    "cispo": Bundle(
        summary="REINFORCE with a truncated importance weight: no token loses its gradient",
        paper="MiniMax-M1, arXiv:2506.13585",
        conflicts="an upper bound only (verl also has a lower one); MiniMax's value is not published, 4 to 8 do "
        "equally well in ScaleRL",
        section={
            "advantage": {"use": "grpo", "scale_by_std": True},
            "loss": {"use": "cispo", "ratio_cap": 5.0},
            "groups": {"without_spread": "drop"},
        },
    ),
    "scalerl": Bundle(
        summary="cispo, std of the batch, mean over prompts, groups without spread dropped, solved prompts retired",
        paper="arXiv:2510.13786",
        conflicts="drops where DAPO refills; not in the bundle: forced interruption (its text depends on the model: "
        "interruption.text=...), the float32 head (model.head_dtype=float32), the asynchronous pipeline",
        section={
            "advantage": {"use": "batch_std"},
            "loss": {"use": "cispo", "ratio_cap": 5.0},
            "aggregation": "prompt_mean",
            "groups": {"without_spread": "drop"},
        },
        curriculum="scalerl",
    ),
    "kimi_k15": Bundle(
        summary="mirror descent: policy gradient with the sequence's squared log-ratio; length reward after warm-up",
        paper="Kimi k1.5, arXiv:2501.12599",
        conflicts="tau, the length weight and the updates an iteration are not published: .1, .1, 4 are chosen here; "
        "fresh_optimizer=true as in the paper, where ProRLv2 keeps the optimizer at a reset",
        section={
            "advantage": {"use": "dr_grpo"},
            "loss": {"use": "kimi_mirror", "tau": 0.1},
            "aggregation": "seq_sum_const",
            "aggregation_tokens": 1,
            "length": {"use": "kimi", "weight": 0.1, "warmup_steps": 100},
            "groups": {"without_spread": "keep"},
            "minibatches": 4,
            "fresh_optimizer": True,
        },
    ),
    "ppo": Bundle(
        summary="a critic, generalised advantages whitened over the batch, clipped ratio and clipped value",
        paper="PPO, arXiv:1707.06347; GAE, arXiv:1506.02438; both lambdas 1: Open-Reasoner-Zero, arXiv:2503.24290",
        conflicts="PPO's lambda of .95 loses the reward of long answers (VC-PPO, arXiv:2503.01491): advantage.lam=.95",
        section={
            "advantage": {"use": "gae", "lam": 1.0},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "groups": {"without_spread": "keep"},
        },
    ),
    "vapo": Bundle(
        summary="ppo with a pre-trained critic, lambda by length, clip-higher, imitation of correct answers",
        paper="arXiv:2504.05118",
        conflicts="its lambda, 1 - 1 / (.05 length), is 0 for 20 tokens: here it is never below advantage.lam; keeps "
        "groups without spread; the first steps train the critic only",
        section={
            "advantage": {"use": "gae", "lam": 0.95, "length_alpha": 0.05},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28},
            "groups": {"without_spread": "keep"},
            "imitation_coef": 0.1,
            "critic": {"pretrain_steps": None},
        },
    ),
    **EXPLORING,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One choice that `use` may name: what it is and its parameters with their defaults; None must be given."""

    summary: str
    parameters: Mapping[str, float | bool | str | None] = field(default_factory=dict)


ADVANTAGES: dict[str, Piece] = {
    "grpo": Piece("(r - group mean) / group std", {"scale_by_std": True}),
    "dr_grpo": Piece("r - group mean"),
    "rloo": Piece("r - mean of the others"),
    "opo": Piece("r - length-weighted group mean"),
    "remax": Piece("r - reward of the greedy answer, which is generated too"),
    "passk": Piece("only the best of the group, by its lead over the second", {"scale_by_std": True}),
    "reinforce_pp": Piece("returns whitened over the tokens of the batch"),
    "reinforce_pp_baseline": Piece("r - group mean, whitened over the batch's tokens or rollouts", {"count": "tokens"}),
    "batch_std": Piece("(r - group mean) / std of the batch"),
    "gdpo": Piece("each reward normalised in its group, summed, whitened over the batch"),
    "gae": Piece("with a critic, whitened; lambda: lam, or more by length", {"lam": 1.0, "length_alpha": 0.0}),
}
COMPARE_WITHIN_GROUP = frozenset(ADVANTAGES) - {"remax", "reinforce_pp", "gae"}
"""Advantages that are 0 for a group of one."""

GIVEN_TO_LOSSES = frozenset({"document_BT", "mask_BT", "draw_BT"})
"""What a loss may ask the run for by keyword, beside log-probs and advantages; `draw_BT` are uniform random numbers."""
LOSSES: dict[str, Piece] = {
    "ppo_clip": Piece("clipped surrogate", {"clip_low": 0.2, "clip_high": 0.2}),
    "ppo_dual_clip": Piece(
        "clipped surrogate, bounded for negative advantages", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    ),
    "two_sided": Piece(
        "clipped surrogate with a cap on the unclipped branch", {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 4.0}
    ),
    "gspo": Piece("clipped ratio of the sequence", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "gspo_token": Piece("gspo with a gradient per token", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "gmpo": Piece("geometric mean of clipped ratios", {"clip_low": 0.4, "clip_high": 0.4}),
    "cispo": Piece("truncated weight, gradient of every token", {"ratio_cap": 5.0}),
    "sapo": Piece("sigmoid gate in place of the clip", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "vespo": Piece(
        "soft kernel of the sequence's ratio", {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    ),
    "dppo_tv": Piece("trust region of probabilities", {"tv_low": 0.2, "tv_high": 0.2, "ratio_cap": 3.0}),
    "clip_cov": Piece(
        "ppo_clip without a few tokens of high covariance",
        {"clip_low": 0.2, "clip_high": 0.2, "frac": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    ),
    "kl_cov": Piece("unclipped, with a penalty on tokens of high covariance", {"frac": 2e-4, "coef": 1.0}),
    "reinforce": Piece("log-prob times advantage, no ratio"),
    "importance": Piece("ratio times advantage, not clipped"),
    "importance_sequence": Piece("the sequence's ratio times advantage, not clipped"),
    "shaped": Piece("r / (r + gamma) in place of the ratio", {"gamma": 0.1}),
    "kimi_mirror": Piece("squared log-ratio of the sequence", {"tau": 0.1}),
}

OFF_POLICY_LOSSES: dict[str, Piece] = {
    "same": Piece("the loss of the other tokens"),
    **LOSSES,
    "shaped": Piece("r / (r + gamma); gamma: that quantile of the step's ratios", {"gamma": 0.1, "quantile": 0.0}),
}
"""Of tokens that the policy did not write on the problem alone. A quantile of 0 leaves gamma as it stands."""

CORRECTIONS: dict[str, Piece] = {
    "tis_token": Piece("token ratio, truncated", {"cap": 2.0}),
    "tis_sequence": Piece("product of the sequence's ratios, truncated", {"cap": 2.0}),
    "mis_token": Piece("token ratio, 0 above the cap", {"cap": 2.0}),
    "mis_sequence": Piece("product of the sequence's ratios, 0 above the cap", {"cap": 3.0}),
    "icepop": Piece("token ratio, 0 outside the bounds", {"low": 0.5, "high": 5.0}),
    "geometric_rejection": Piece("0 for a sequence with a mean ratio outside", {"low": 0.999, "high": 1.001}),
    "k3_rejection": Piece("0 for a sequence with a mean k3 above", {"limit": 0.01}),
}

LENGTHS: dict[str, Piece] = {
    "none": Piece("no reward for length"),
    "soft_overlong": Piece("0 down to -1 over the last part of the budget", {"buffer_frac": 0.2, "weight": 1.0}),
    "kimi": Piece("+.5 for the group's shortest to -.5 for its longest", {"weight": 0.1, "warmup_steps": 100}),
    "cosine": Piece(
        "a cosine from high to low over the budget, on for some steps, then off",
        {"low": -0.1, "high": 0.0, "steps_on": 100, "steps_off": 500, "weight": 1.0},
    ),
}

PIECES: dict[str, dict[str, Piece]] = {"advantage": ADVANTAGES, "loss": LOSSES, "length": LENGTHS}
"""The parts of `Algorithm` that a recipe names with `use`."""


def with_bundle(section: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `algorithm` section over the bundle that it names; another `use` drops the bundle's parameters.

    >>> with_bundle({"name": "cispo", "loss": {"ratio_cap": 8.0}})["loss"]
    {'use': 'cispo', 'ratio_cap': 8.0}
    >>> with_bundle({"name": "cispo", "loss": {"use": "gspo"}})["loss"]
    {'use': 'gspo', 'clip_low': 0.0003, 'clip_high': 0.0004}
    """
    bundle = ALGORITHMS.get(str(section.get("name", "grpo")))
    merged = _over(bundle.section if bundle is not None else {}, section)
    for part, pieces in PIECES.items():
        if isinstance(chosen := merged.get(part), dict):
            merged[part] = with_parameters(chosen, pieces)
    off_policy = merged.get("off_policy")
    if isinstance(off_policy, dict) and (chosen := off_policy.get("loss")) is not None:
        named = {"use": chosen} if isinstance(chosen, str) else chosen
        if isinstance(named, dict):
            off_policy["loss"] = with_parameters(named, OFF_POLICY_LOSSES)
    mismatch = merged.get("mismatch")
    if isinstance(mismatch, dict) and isinstance(weights := mismatch.get("weights"), list):
        mismatch["weights"] = [with_parameters(one, CORRECTIONS) if isinstance(one, dict) else one for one in weights]
    return merged


def with_parameters(chosen: Mapping[str, Any], pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """A choice with the defaults of the piece that it names filled in."""
    piece = pieces.get(str(chosen.get("use")))
    return {"use": chosen.get("use"), **(piece.parameters if piece is not None else {}), **chosen}


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: _over(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in over.items():
        below = merged.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(below, dict)
            and value.get("use", below.get("use")) == below.get("use")
        ):
            merged[key] = _over(below, value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged
