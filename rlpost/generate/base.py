"""What a generator is, and the canary that proves that it samples from the policy being trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlpost.document import Document
from rlpost.errors import RunError
from rlpost.packing import Packer
from rlpost.types import Micro, Request, Rollout, Sampling

if TYPE_CHECKING:
    from rlpost.engine import Engine


@dataclass
class SyncReport:
    """What the last weight sync moved and what the canary saw.

    >>> SyncReport(seconds=0.5, num_bytes=10**9).gb_per_s
    2.0
    """

    seconds: float = 0.0
    """From the first gather until the generator has all weights: without its waking up and without the canary."""
    num_bytes: int = 0
    canary_mean: float = math.nan
    """Mean |trainer - generator| log-prob over the canary's tokens, in nats."""
    canary_max: float = math.nan
    figures: dict[str, float] = field(default_factory=dict)
    """What a generator has to say beside that, under the names of the table of metrics."""

    @property
    def gb_per_s(self) -> float:
        """Rate of the last sync, in 10^9 bytes a second; 0 before the first."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0


CANARY_MIN, CANARY_MAX = 16, 64
"""Tokens of the canary: enough for a mean, few enough to cost one short forward pass."""


Whole = Callable[[Sequence[Rollout]], None]
"""Is told of the rollouts of a request."""


class Generator(Protocol):
    """Samples rollouts. `awake` is the sole owner of the generator's weights and memory."""

    @property
    def concurrent(self) -> bool:
        """Whether `generate` may be called in a thread, while the main one trains and pushes weights."""
        ...

    @property
    def report(self) -> SyncReport:
        """What the last weight sync moved and what the canary saw."""
        ...

    @property
    def prompt_block(self) -> int:
        """Answers to one prompt find whole blocks of so many of its tokens computed; 0: each computes all of it."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling, whole: Whole | None = None) -> list[Rollout]:
        """All rollouts of all requests, in the order of requests and n in a row for each.

        `whole` is told of a request's rollouts, the very ones that are returned, when the last of them has ended.
        """
        ...

    def awake(self, engine: Engine, version: int) -> AbstractContextManager[None]:
        """Push the engine's weights, prove that they arrived, let the body generate, and give the memory back."""
        ...

    def close(self) -> None:
        """End the generator, while the ranks' process group is still there."""
        ...


@dataclass(frozen=True)
class Canary:
    """A fixed token sequence that trainer and generator both score after every weight sync."""

    token_ids: tuple[int, ...]
    tolerance: float
    micro: Micro = field(compare=False)

    @classmethod
    def of(cls, token_ids: Sequence[int], *, tolerance: float, device: torch.device) -> Canary:
        """A canary of these tokens; the first is given, the others are scored."""
        document = Document(tuple(token_ids[:1]), tuple(token_ids[1:]), (0.0,) * (len(token_ids) - 1))
        micro = Packer(len(token_ids), len(token_ids), device).micro([[document]])
        return cls(tuple(token_ids), tolerance, micro)

    @torch.no_grad()
    def trainer_logp(self, engine: Engine) -> Tensor:
        """The trainer's log-prob `[T]` of each token but the first, float64, while its weights are on the device."""
        logp_BT, _ = engine.token_logp(self.micro, temperature=1.0)  # as vLLM scores a prompt, whatever is sampled
        return logp_BT[0, :-1].double().cpu()

    def compare(self, trainer_T: Tensor, generator_logp: Sequence[float], report: SyncReport) -> None:
        """Write the difference into the report; stop the run where its mean is above the tolerance."""
        diff_T = (trainer_T - torch.tensor(generator_logp, dtype=torch.float64)).abs()
        report.canary_mean, report.canary_max = float(diff_T.mean()), float(diff_T.max())
        if not report.canary_mean <= self.tolerance:
            raise RunError(
                f"generator.canary_tolerance: trainer and generator must give the same log-probs after a weight sync, "
                f"to {self.tolerance:g} nats on average (they differ by {report.canary_mean:.3g}, at most "
                f"{report.canary_max:.3g}, over {len(diff_T)} tokens): the generator does not sample from the policy "
                "that is trained. Check that both read the model in the same way (model.dtype, generator.options); "
                "raise the tolerance only if the difference is rounding"
            )


def circles(token_ids: Sequence[int], times: int, longest: int) -> bool:
    """Whether tokens end in one piece, of at most `longest`, that comes `times` times in a row.

    >>> circles([9, 1, 2, 1, 2, 1, 2], times=3, longest=4), circles([1, 2, 2, 1, 2], times=2, longest=1)
    (True, False)
    """
    for size in range(1, min(longest, len(token_ids) // times) + 1):
        tail = token_ids[-size * times :]
        if all(tail[i] == tail[i - size] for i in range(size, len(tail))):
            return True
    return False


def canary_tokens(prompt_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The first tokens of a real prompt; a very short one goes on with a fixed walk through the vocabulary.

    Tokens that the model finds likely are the better canary: in bfloat16 an unlikely one is rounded ten times as much.
    """
    walk = [(7 + 31 * i) % vocab_size for i in range(max(0, CANARY_MIN - len(prompt_ids)))]
    return (*prompt_ids[:CANARY_MAX], *walk)
