"""One sequence to train on, and where it stands in a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Document:
    """One sequence to train on: the completion, given the prompt. `T` is the number of completion tokens.

    >>> Document(prompt_ids=(5, 6), token_ids=(7, 1), behavior_logp=(-0.1, -0.2), advantage=1.0).length
    4
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    behavior_logp: tuple[float, ...]
    advantage: float | Tensor = 0.0
    """One for all tokens, or `[T]`."""
    group: int = 0
    """Documents of one group came from one prompt, on whatever rank."""
    version: int = 0
    later_versions: tuple[tuple[int, int], ...] = ()
    """As in `Rollout`: (first completion token, version) of what later versions wrote."""
    off_policy: bool = False
    sampled_prompt_ids: tuple[int, ...] | None = None
    """What the writer saw; None: the prompt."""
    inclusion: float = 1.0
    """With what probability it came to be trained; 0: it is not, and counts in denominators alone."""
    correct: bool = False
    """Whether the answer may be imitated."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Figures of each completion token `[T]` from earlier forward passes."""
    weight: float = 0.0
    imitation_weight: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def trained(self) -> list[bool]:
        """Which completion tokens enter the loss: those with a finite log-prob, and something in front of them."""
        finite = [math.isfinite(logp) for logp in self.behavior_logp]
        return finite if self.prompt_ids else [False, *finite[1:]][: len(finite)]

    @property
    def num_trained(self) -> int:
        """Completion tokens that enter the loss."""
        return sum(self.trained)


def values_of(document: Document, name: str) -> Tensor:
    """A figure of each completion token `[T]`, float32."""
    length = len(document.token_ids)
    if name == "behavior_logp":
        return torch.tensor(document.behavior_logp, dtype=torch.float32)
    if name in document.scores:
        return document.scores[name].to("cpu", torch.float32)
    return torch.as_tensor(getattr(document, name, 0.0), dtype=torch.float32).expand(length)


def block_length(block: Sequence[Document]) -> int:
    """Positions of a block: a document, or several behind one copy of their prompt.

    >>> one, two = (Document((5, 6, 7), ids, (0.0,) * len(ids)) for ids in ((8, 1), (9, 9, 1)))
    >>> block_length([one]), block_length([one, two])          # 5 6 7 8 1;  5 6 | 7 8 1 | 7 9 9 1
    (5, 9)
    """
    if len(block) == 1:
        return block[0].length
    return len(block[0].prompt_ids) - 1 + sum(1 + len(document.token_ids) for document in block)


def places(block: Sequence[Document], start: int) -> Iterator[tuple[Document, int, int]]:
    """(document, where it begins, the first position that it has for itself) of a block that begins at `start`.

    Documents that share a prompt have for themselves its last token, which predicts their first one, and what follows:
    they begin as far in front of it as their prompt is long, in what the others hold as well.
    """
    if len(block) == 1:
        yield block[0], start, start
        return
    own = start + len(block[0].prompt_ids) - 1
    for document in block:
        yield document, own - (len(document.prompt_ids) - 1), own
        own += 1 + len(document.token_ids)


def span(document: Document, start: int) -> tuple[slice, slice]:
    """The positions that speak of a document's completion, and the completion tokens that they speak of.

    Position s predicts token s + 1, so the completion's first token is predicted by the prompt's last; where there is
    no prompt, nothing predicts it.
    """
    end = start + document.length - 1
    if not document.prompt_ids:
        return slice(start, max(end, start)), slice(1, None)
    return slice(start + len(document.prompt_ids) - 1, end), slice(0, None)
