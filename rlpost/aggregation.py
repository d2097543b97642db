"""How much each trained token counts in the loss of an optimizer step: the one place that knows a denominator.

Every mode is a weight per token, made from counts over the whole step (all ranks, all micro-batches), so the gradient
does not depend on how the work is split. A sequence with no trained token is not a sequence.

    rank_counts = count(lengths, groups)              # of this rank's documents of the step
    step = sum_counts(all_gather(rank_counts))
    weights = token_weights("prompt_mean", lengths, groups, step, max_tokens=8192)
    loss = losses.weighted_sum(loss_BT, weight_BT, dp_size)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Aggregation = Literal["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"]


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a step holds; adds up over ranks, and a group may be spread over them.

    >>> count([3, 0, 2], groups=[7, 7, 9]) + count([4], groups=[7])
    StepCounts(tokens=9, sequences=3, group_tokens={7: 7, 9: 2})
    """

    tokens: int = 0
    sequences: int = 0
    """Those with at least one trained token."""
    group_tokens: Mapping[int, int] = field(default_factory=dict)
    """Trained tokens of each group that has any."""

    def __add__(self, other: StepCounts) -> StepCounts:
        groups = dict(Counter(self.group_tokens) + Counter(other.group_tokens))
        return StepCounts(self.tokens + other.tokens, self.sequences + other.sequences, groups)


def count(lengths: Sequence[int], groups: Sequence[int]) -> StepCounts:
    """Counts of some documents: the trained tokens and the group of each."""
    group_tokens: Counter[int] = Counter()
    for length, group in zip(lengths, groups, strict=True):
        if length:
            group_tokens[group] += length
    return StepCounts(sum(lengths), sum(length > 0 for length in lengths), dict(group_tokens))


def sum_counts(counts: Iterable[StepCounts]) -> StepCounts:
    """The counts of the step from those of its ranks."""
    return sum(counts, StepCounts())


def token_weights(
    mode: Aggregation, lengths: Sequence[int], groups: Sequence[int], step: StepCounts, *, max_tokens: int
) -> list[float]:
    """The weight of each trained token of each document, for documents of `lengths` trained tokens.

    token_mean     1 / tokens                                      DAPO, arXiv:2503.14476
    seq_mean       1 / (sequences * length)                        GRPO, arXiv:2402.03300
    seq_sum_const  1 / (sequences * max_tokens)                    Dr. GRPO, arXiv:2503.20783; Kimi with max_tokens = 1
    prompt_mean    1 / (groups * trained tokens of the group)      ScaleRL, arXiv:2510.13786

    `max_tokens` is the configured budget of a response, never the padded width of a batch.

    >>> token_weights("seq_mean", [4, 0], [0, 0], count([4, 0, 1], [0, 0, 1]), max_tokens=8)
    [0.125, 0.0]
    """
    return [
        1.0 / _denominator(mode, length, step.group_tokens.get(group, 0), step, max_tokens) if length else 0.0
        for length, group in zip(lengths, groups, strict=True)
    ]


def _denominator(mode: Aggregation, length: int, group_tokens: int, step: StepCounts, max_tokens: int) -> int:
    if mode == "token_mean":
        return step.tokens
    if mode == "seq_mean":
        return step.sequences * length
    if mode == "seq_sum_const":
        return step.sequences * max_tokens
    if mode == "prompt_mean":
        return len(step.group_tokens) * group_tokens
    raise ValueError(f"mode must be token_mean, seq_mean, seq_sum_const or prompt_mean (got {mode!r})")
