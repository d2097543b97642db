"""What a step says of each token of the rollouts in `samples.jsonl`, compactly: advantage, log-prob, its difference.

A list of numbers is `{"max": m, "bytes": b}`: base64 of a signed byte a token, value = byte / 127 * m. `pieces` is the
number of characters that each token brings to the completion, base64 of a byte a token.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rlpost.batch import with_scores
from rlpost.document import Document, values_of
from rlpost.run import Run
from rlpost.types import Group, Micro, Rollout

LEVELS = 127


def write_samples(run: Run, step: int, groups: Sequence[Group], credited: Sequence[Document]) -> None:
    """Write the step's samples with what is known of their tokens before the first update; every rank calls it.

    `credited` are the documents of the groups' rollouts, in order, with their advantages.
    """
    if not run.samples.per_step:
        return
    chosen = run.samples.chosen
    scored = trainer_logp(run, chosen, groups, credited)
    if not run.world.is_main:
        return
    rollouts = (rollout for group in groups for rollout in group.rollouts)
    advantage = {id(rollout): document.advantage for rollout, document in zip(rollouts, credited, strict=True)}
    decode = run.samples.remembered(run.renderer.decode)
    tokens = [token_figures(rollout, advantage.get(id(rollout)), scored.get(id(rollout)), decode) for rollout in chosen]
    run.samples.write(step, tokens)


def trainer_logp(
    run: Run, chosen: Sequence[Rollout], groups: Sequence[Group], credited: Sequence[Document]
) -> dict[int, Tensor]:
    """The trainer's log-probs `[T]` of chosen rollouts by id: those that the step has made, else of one more pass."""
    if run.objective.needs_prox:
        rollouts = (rollout for group in groups for rollout in group.rollouts)
        both = zip(rollouts, credited, strict=True)
        return {id(rollout): one.scores["prox_logp"] for rollout, one in both if "prox_logp" in one.scores}

    def scores(micro: Micro) -> dict[str, Tensor]:
        return {"logp": run.engine.token_logp(micro)[0]}

    with_prompt = [rollout for rollout in chosen if rollout.prompt_ids and rollout.token_ids]
    documents = [Document(one.prompt_ids, one.token_ids, one.behavior_logp) for one in with_prompt]
    scored = with_scores(documents, run.packer, run.world, scores)
    return {id(rollout): one.scores["logp"] for rollout, one in zip(with_prompt, scored, strict=True)}


def token_figures(
    rollout: Rollout, advantage: float | Tensor | None, logp_T: Tensor | None, decode: Callable[[tuple[int, ...]], str]
) -> dict[str, Any]:
    """One rollout's figures; `advantage` None: it is not trained."""
    figures: dict[str, Any] = {"logp": packed(rollout.behavior_logp)}
    pieces = pieces_of(rollout.token_ids, rollout.text, decode)
    if pieces is not None:
        figures["pieces"] = base64.b64encode(bytes(pieces)).decode()
    if isinstance(advantage, Tensor):
        values = values_of(Document((), rollout.token_ids, rollout.behavior_logp, advantage=advantage), "advantage")
        figures["advantage"] = packed(values.tolist())
    elif advantage is not None:
        figures["advantage"] = float(f"{advantage:.4g}")
    if logp_T is not None:
        both = zip(logp_T.tolist(), rollout.behavior_logp, strict=True)
        figures["logp_diff"] = packed([trainer - writer for trainer, writer in both])
    return figures


def packed(values: Sequence[float]) -> dict[str, Any]:
    """Numbers as signed bytes of their largest size; what is not finite becomes 0.

    >>> packed([0.5, -1.0, 0.0])
    {'max': 1.0, 'bytes': 'QIEA'}
    """
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    largest = max((abs(value) for value in finite), default=0.0)
    scale = LEVELS / largest if largest else 0.0
    levels = array("b", (round(value * scale) for value in finite))
    return {"max": float(f"{largest:.4g}"), "bytes": base64.b64encode(levels.tobytes()).decode()}


def pieces_of(token_ids: Sequence[int], text: str, decode: Callable[[tuple[int, ...]], str]) -> list[int] | None:
    """Characters of `text` that each token brings; None where tokens do not make up the text one by one.

    Bytes of one character that several tokens share count with the last of them.
    """
    for pieces in (_alone(token_ids, decode), _after_another(token_ids, decode)):
        found = list(pieces)
        if "".join(found) == text and max(map(len, found), default=0) < 256:
            return [len(piece) for piece in found]
    return None


def _alone(token_ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> Iterator[str]:
    pending: tuple[int, ...] = ()
    for token in token_ids:
        pending = (*pending, token)
        piece = decode(pending)
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 8:
            yield ""
        else:
            yield piece
            pending = ()
    if pending:
        yield decode(pending)


def _after_another(token_ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> Iterator[str]:
    """For tokenizers that treat the beginning of a text in their own way."""
    before: tuple[int, ...] = ()
    for token in token_ids:
        yield decode((*before, token))[len(decode(before)) if before else 0 :]
        before = (token,)
