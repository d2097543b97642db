"""What goes over all ranks before an optimizer step: scores of the documents, and the weights of their tokens."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_batch import TOLERANCE, own_logp, packer
from threads import World, on_ranks
from tiny import logp_and_entropy, ragged, tiny_policy

from rlpost.batch import make_batch, with_scores
from rlpost.document import Document

MANY = [replace(one, group=i // 3, correct=i % 4 == 0) for i, one in enumerate(ragged(12))]
SHARES = [MANY[:2], MANY[2:7], [], MANY[7:]]
"""Ranks with unequal work: one has none, and groups lie across ranks."""


def score_of(policy):
    def score(micro):
        logp_BT, entropy_BT = logp_and_entropy(policy, micro)
        return {"prox_logp": logp_BT, "entropy": entropy_BT}

    return score


def test_with_scores_returns_to_each_document_what_the_packed_pass_said():
    policy, without_prompt = tiny_policy(), Document((), (4, 5, 1), (-1.0, -1.0, -1.0))
    documents = [*ragged(), without_prompt]
    scored = with_scores(documents, packer(), World(), score_of(policy))
    assert not scored[0].scores["prox_logp"].requires_grad
    for one, before in zip(scored[:-1], documents, strict=False):
        torch.testing.assert_close(one.scores["prox_logp"], own_logp(policy, before), **TOLERANCE)
        assert (one.token_ids, one.advantage, one.group) == (before.token_ids, before.advantage, before.group)
    first, *rest = scored[-1].scores["prox_logp"].tolist()
    ids = torch.tensor([without_prompt.token_ids])
    logp_TV = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0].float(), -1)
    assert first == 0.0 and rest == pytest.approx([logp_TV[0, 5].item(), logp_TV[1, 1].item()], abs=1e-5)


def test_with_scores_keeps_earlier_scores_and_packs_back_to_where_they_came_from():
    policy, tight = tiny_policy(), packer(20, 20)
    documents = [replace(one, scores={"mark": torch.ones(len(one.token_ids))}) for one in ragged()]
    scored = with_scores(documents, packer(), World(), score_of(policy))
    for micro in tight.micros(scored):
        assert sorted(micro.scores) == ["entropy", "mark", "prox_logp"]
        logp_BT, _ = logp_and_entropy(policy, micro)
        torch.testing.assert_close(micro.scores["prox_logp"][micro.mask_BT], logp_BT[micro.mask_BT], **TOLERANCE)
        assert torch.equal(micro.scores["mark"], micro.mask_BT.float())


def test_with_scores_runs_as_many_passes_on_every_rank():
    calls = Counter()

    def run(share, world):
        def score(micro):
            calls[world.rank] += 1
            return {"mark": micro.target_BT}

        return with_scores(share, packer(20, 20), world, score)

    found = on_ranks(run, *SHARES)
    assert [calls[rank] for rank in range(4)] == [max(calls.values())] * 4 and max(calls.values()) > 1
    for share, scored in zip(SHARES, found, strict=True):
        wanted = [list(map(float, one.token_ids)) for one in share]
        assert [one.scores["mark"].tolist() for one in scored] == wanted  # the target of the position is the token


def batches_of(shares, *aggregation):
    return on_ranks(lambda share, world: make_batch(share, packer(20, 20), world, *aggregation), *shares)


def test_step_tokens_is_the_sum_of_the_masks_over_all_ranks():
    silent = Document((3,), (4, 5), (math.nan, -1.0))
    batches = batches_of([[*MANY[:2], silent], *SHARES[1:]])
    count = sum(int(micro.mask_BT.sum()) for batch in batches for micro in batch.micros)
    assert count == sum(one.num_trained for one in MANY) + 1
    assert [batch.step_tokens for batch in batches] == [count] * 4


def test_every_rank_has_as_many_micro_batches_as_the_busiest():
    """Two documents cannot be evened out over four ranks."""
    batches = batches_of([MANY[:2], [], [], []])
    assert [len(batch.micros) for batch in batches] == [1] * 4
    idle = [micro for batch in batches for micro in batch.micros if not micro.mask_BT.any()]
    assert len(idle) == 2 and not any(micro.weight_BT.any() for micro in idle)
    whole = batches_of(SHARES)
    assert len({len(batch.micros) for batch in whole}) == 1


def test_an_added_micro_batch_has_the_scores_of_the_others():
    scored = [replace(one, scores={"mark": torch.ones(len(one.token_ids))}) for one in MANY]
    _, nothing = batches_of([scored[:1], []])
    [micro] = nothing.micros
    assert list(micro.scores) == ["mark"] and not micro.mask_BT.any()


def total(batches, name):
    return sum(getattr(micro, name).double().sum().item() for batch in batches for micro in batch.micros)


@pytest.mark.parametrize("shares", [[MANY], SHARES])
@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"])
def test_t3_weights_add_up_over_ranks_to_one_or_to_the_mean_share_of_the_constant(mode, shares):
    tokens = sum(one.num_trained for one in MANY)
    wanted = tokens / (12 * 7) if mode == "seq_sum_const" else 1.0
    assert total(batches_of(shares, mode, 7), "weight_BT") == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"])
def test_t5_a_tokens_weight_does_not_depend_on_the_ranks(mode):
    def weights(shares):
        found = {}
        for batch in batches_of(shares, mode, 7):
            for micro in batch.micros:
                pairs = zip(micro.adv_BT[micro.mask_BT].tolist(), micro.weight_BT[micro.mask_BT].tolist(), strict=True)
                found |= dict(pairs)
        return found

    alone = weights([MANY])
    assert len(alone) == 12 and weights(SHARES) == alone


def test_documents_that_train_nothing_count_in_no_denominator():
    silent = [Document((3,), (4,), (math.nan,), group=50 + i, correct=True) for i in range(4)]
    for mode in ("seq_mean", "prompt_mean", "seq_sum_const"):
        (batch,) = batches_of([[*silent, *MANY]], mode, 7)
        (clean,) = batches_of([MANY], mode, 7)
        assert total([batch], "weight_BT") == total([clean], "weight_BT")
        assert total([batch], "imitation_weight_BT") == total([clean], "imitation_weight_BT")


@pytest.mark.parametrize("shares", [[MANY], SHARES])
def test_imitation_weights_are_a_mean_over_the_tokens_of_correct_answers(shares):
    count = sum(one.num_trained for one in MANY if one.correct)
    correct = {torch.tensor(one.advantage).item() for one in MANY if one.correct}
    batches = batches_of(shares, "seq_mean")
    for micro in (micro for batch in batches for micro in batch.micros):
        wanted = torch.tensor([[x in correct for x in row] for row in micro.adv_BT.tolist()]) & micro.mask_BT
        torch.testing.assert_close(micro.imitation_weight_BT, wanted.float() / count, rtol=1e-6, atol=0)
    assert total(batches, "imitation_weight_BT") == pytest.approx(1.0, rel=1e-6)


def test_imitation_weights_are_zero_where_nothing_is_correct():
    batches = batches_of([[replace(one, correct=False) for one in share] for share in SHARES])
    assert total(batches, "imitation_weight_BT") == 0.0 and total(batches, "weight_BT") == pytest.approx(1.0)
