"""Who the ratio of an off-policy token is taken against: the generator, or the trainer with the hint or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from rlpost.batch import with_scores
from rlpost.document import Document
from rlpost.run import Run
from rlpost.types import Micro


def with_behavior(run: Run, documents: Sequence[Document]) -> list[Document]:
    """The documents, off-policy ones with the behaviour log-probs that `algorithm.off_policy.behavior` asks for.

    `generator`: what the tokens were sampled with, under the prompt that the generator saw; `trainer`: the trainer's
    own under that prompt, before the step's first update (one more forward pass); `plain`: the trainer's own under the
    prompt of the loss, so that the first ratio is 1. An expert's answer stays certain (pi_phi = 1).
    """
    use = run.recipe.algorithm.off_policy.behavior
    if use == "generator":
        return list(documents)
    places = [
        i for i, one in enumerate(documents) if one.inclusion and one.sampled_prompt_ids not in (None, one.prompt_ids)
    ]
    if use == "plain":
        found = [documents[i].scores["prox_logp"] for i in places]
    else:
        hinted = [replace(documents[i], prompt_ids=documents[i].sampled_prompt_ids or ()) for i in places]

        def scores(micro: Micro) -> dict[str, Tensor]:
            return {"behavior": run.engine.token_logp(micro)[0]}

        found = [one.scores["behavior"] for one in with_scores(hinted, run.packer, run.world, scores)]
    changed = list(documents)
    for i, logp_T in zip(places, found, strict=True):
        changed[i] = replace(documents[i], behavior_logp=_where_trained(documents[i], logp_T))
    return changed


def _where_trained(document: Document, logp_T: Tensor) -> tuple[float, ...]:
    """The new log-probs; what has none because the policy did not write it keeps none."""
    pairs = zip(document.behavior_logp, logp_T.tolist(), strict=True)
    return tuple(new if known == known else known for known, new in pairs)  # noqa: PLR0124 -- NaN is not itself
