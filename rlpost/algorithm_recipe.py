"""The `algorithm` section of a recipe. `algorithms.py` says what a named algorithm puts into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class KlReset:
    """When the reference becomes a copy of the policy; what is 0 is off."""

    every: int = 0
    """Steps since the last reset."""
    kl_spike: float = 0.0
    """Mean KL to the reference above which a reset is due, in nats a token."""
    patience: int = 0
    """Held-out evaluations in a row without a new best."""
    min_gap: int = 1
    """Steps that lie between two resets at least."""
    clear_optimizer: bool = False
    """Also start the optimizer's moments anew (ProRL v1; ProRLv2 keeps them)."""


@dataclass
class Kl:
    """The pull towards the reference, which is the policy that the run started from until it is reset."""

    coef: float = 0.0
    """0: no reference is kept."""
    place: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3", "k1_plus", "k3_plus", "corrected_k3"] = "k3"
    target: float | None = None
    """Nats a token that `coef` is steered to, once a step; null: `coef` stays."""
    horizon: float = 10000.0
    """Rollouts over which the steered coefficient changes by up to a fifth."""
    reset: KlReset = field(default_factory=KlReset)


@dataclass
class Entropy:
    """What keeps the policy from becoming certain too early."""

    coef: float = 0.0
    """Nats of bonus for a nat of entropy."""
    target: float | None = None
    """Nats a token below which the bonus applies and `coef` grows, above which it shrinks; null: `coef` stays."""
    delta: float = 0.005
    """How much the steered coefficient changes in a step."""
    low: float = 0.0
    high: float = 1.0
    """Bounds of the steered coefficient."""
    top_frac: float = 1.0
    """Share of the step's tokens, those of highest entropy, that the policy gradient comes from."""


@dataclass
class Groups:
    """What becomes of groups whose rewards are all equal: with most advantages they carry no gradient."""

    without_spread: Literal["keep", "drop", "refill"] = "drop"
    """`refill`: generate until `prompts_per_step` groups have spread."""
    max_waves: int = 10
    """Waves of generation in a step; what has been found by then is trained on."""


@dataclass
class Interruption:
    """Ends an answer that has used up `sampling.max_new_tokens`: text is put into it, and the model may conclude."""

    text: str | None = None
    """Such as "Okay, time is up. Let me stop thinking and formulate a final answer now.</think>"; null: off."""
    answer_tokens: int = 2048
    """Tokens that may follow."""


@dataclass
class Mismatch:
    """Correction for rollouts whose log-probs in the generator are not those of the trainer."""

    mode: Literal["bypass", "decoupled"] = "bypass"
    """What the ratio of the loss is taken against: `bypass`, the generator's log-probs; `decoupled`, the trainer's own
    before the step's first update, with `weights` for the rest."""
    weights: list[dict[str, Any]] = field(default_factory=list)
    """Each with `use` (a name in `CORRECTIONS`) and its parameters; they multiply."""
    offpolicy_limit: float | None = None
    """Nats a token beyond which answers of negative advantage are left out, mean log(mu / pi); null: off."""


@dataclass
class OffPolicy:
    """Answers that the policy did not write on the problem alone: under a hint, or an expert's (`explore`)."""

    loss: dict[str, Any] = field(default_factory=lambda: {"use": "same"})
    """`use`: `same`, as the others; or a name in `LOSSES` or a path, of the ratio policy(o | problem) / writer(o)."""
    behavior: Literal["generator", "trainer", "plain"] = "generator"
    """The ratio's denominator: what the tokens were sampled with, under the hint; the trainer's own log-probs under the
    hint, before the step's first update; or its own on the problem alone, so that the first ratio is 1."""
    statistics: Literal["pooled", "role", "policy"] = "pooled"
    """Whose rewards an advantage compares: the whole group's; those of the same role; or those of the policy."""


@dataclass
class CriticRecipe:
    """The value model of `advantage.use=gae`: the policy's own start, with one number for a head."""

    lr: float | None = None
    """null: twice `engine.lr`."""
    gamma: float = 1.0
    lam: float = 1.0
    """The critic's lambda; 1: it is fitted to Monte-Carlo returns."""
    value_clip: float = 0.2
    """How far a value may move from where the rollout was scored, in units of the reward."""
    pretrain_steps: int | None = 0
    """First steps of the run, in which the critic learns alone, from Monte-Carlo returns; null: 50, or a quarter of
    `steps` where that is less."""


@dataclass
class Algorithm:
    """The objective. What a recipe leaves out is as `name` has it in `ALGORITHMS`, else as it stands here."""

    name: str = "grpo"
    advantage: dict[str, Any] = field(default_factory=lambda: {"use": "grpo", "scale_by_std": True})
    """`use`: a name in `ADVANTAGES` or the path of a function of a group's rewards `[G]`; the rest are parameters."""
    loss: dict[str, Any] = field(default_factory=lambda: {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28})
    """`use`: a name in `LOSSES` or the path of a function with the signature of `losses.ppo_clip`."""
    aggregation: Literal["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"] = "token_mean"
    """What a token counts in the loss of an optimizer step (`aggregation.py`)."""
    aggregation_tokens: int | None = None
    """The constant of `seq_sum_const`; null: `sampling.max_new_tokens`."""
    kl: Kl = field(default_factory=Kl)
    entropy: Entropy = field(default_factory=Entropy)
    length: dict[str, Any] = field(default_factory=lambda: {"use": "none"})
    """`use`: a name in `LENGTHS`."""
    groups: Groups = field(default_factory=Groups)
    truncated: Literal["keep", "mask", "exclude"] = "keep"
    """Answers that ran into the length limit: `mask` does not train them, `exclude` also leaves them out of the group's
    baseline."""
    earlier: Literal["train", "context"] = "train"
    """What becomes of the tokens of an answer that was begun by an older policy than the one that ended it."""
    interruption: Interruption = field(default_factory=Interruption)
    mismatch: Mismatch = field(default_factory=Mismatch)
    off_policy: OffPolicy = field(default_factory=OffPolicy)
    imitation_coef: float = 0.0
    """Weight of the negative log-likelihood of correct answers."""
    critic: CriticRecipe = field(default_factory=CriticRecipe)
    minibatches: int = 1
    """Optimizer steps that one batch of rollouts is divided into, however large it is."""
    minibatch_rollouts: int | None = None
    """In place of `minibatches`: rollouts of an optimizer step, so that a larger batch takes more steps."""
    epochs: int = 1
    """Passes over one batch of rollouts."""
    fresh_optimizer: bool = False
    """Start the optimizer's moments anew with every batch of rollouts."""
