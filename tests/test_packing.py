"""Prompts shared by several answers of a row: the same numbers as with a copy for each, for less work."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import CPU, gradients, logp_and_entropy, tiny_policy

from rlpost.critic import ValueModel
from rlpost.document import Document
from rlpost.packing import Packer, shared_blocks
from rlpost.policy import seen

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def answers(prompts=(9, 5, 1), answers_each=4, *, seed=0, vocab=29):
    """Documents of a few prompts in mixed order, told apart by their advantage."""
    dice = random.Random(seed)
    asked = [tuple(dice.randrange(2, vocab) for _ in range(length)) for length in prompts]
    documents = []
    for prompt_ids in asked * answers_each:
        token_ids = tuple(dice.randrange(2, vocab) for _ in range(dice.randint(1, 6)))
        logp = tuple(-3 * dice.random() for _ in token_ids)
        documents.append(Document(prompt_ids, token_ids, logp, advantage=float(len(documents) + 1)))
    return documents


def sharing(row_tokens=40, micro_tokens=80):
    return Packer(micro_tokens, row_tokens, CPU, hidden_size=32, share_prompts=True)


def by_document(micros, values_of):
    found = {}
    for micro in micros:
        values_BT = values_of(micro)
        for advantage, value in zip(micro.adv_BT[micro.mask_BT].tolist(), values_BT[micro.mask_BT], strict=True):
            found.setdefault(advantage, []).append(value)
    return {advantage: torch.stack(values) for advantage, values in found.items()}


def test_a_shared_prompt_stands_once_and_every_answer_begins_with_its_last_token():
    one, two = Document((5, 6, 7), (8, 1), (-0.1, -0.2), 1.0), Document((5, 6, 7), (9, 1), (-0.3, -0.4), 2.0)
    micro = sharing().micro_of_blocks([[[one, two]]], 10)
    assert micro.tokens_BT.tolist() == [[5, 6, 7, 8, 1, 7, 9, 1, 0, 0]]
    assert micro.position_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 0, 1]]
    assert micro.target_BT[micro.mask_BT].tolist() == [8, 1, 9, 1]
    assert micro.mask_BT.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert micro.document_BT.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, -1, -1]]
    assert micro.prefix_BT.tolist() == [[0] * 8 + [-1, -1]] and micro.shares_prompts
    looked_at = {t: seen(micro)[0, t].nonzero().flatten().tolist() for t in (1, 3, 6, 8)}
    assert looked_at == {1: [0, 1], 3: [0, 1, 2, 3], 6: [0, 1, 5, 6], 8: [8]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [(40, 80), (24, 24), (200, 200)])
def test_t27_shared_prompts_change_no_log_prob_and_no_entropy(shape, attention):
    policy, documents = tiny_policy(attention=attention), answers()
    shared = sharing(*shape).micros(documents)
    assert any(micro.shares_prompts for micro in shared)
    alone = [Packer(1, 1, CPU).micro([[one]]) for one in documents]
    for part in (0, 1):
        ours = by_document(shared, lambda micro, part=part: logp_and_entropy(policy, micro)[part])
        theirs = by_document(alone, lambda micro, part=part: logp_and_entropy(policy, micro)[part])
        assert ours.keys() == theirs.keys()
        for advantage, values in theirs.items():
            torch.testing.assert_close(ours[advantage], values, **TOLERANCE)


def test_t27_shared_prompts_change_no_gradient():
    policy, documents = tiny_policy(), answers()
    results = []
    for micros in (sharing().micros(documents), [Packer(1, 1, CPU).micro([[one]]) for one in documents]):
        policy.zero_grad()
        for micro in micros:
            (logp_and_entropy(policy, micro)[0] * micro.adv_BT).sum().backward()
        results.append(gradients(policy))
    for name, grad in results[1].items():
        torch.testing.assert_close(results[0][name], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())


def test_t27_shared_prompts_change_no_value_of_the_critic():
    model = ValueModel(tiny_policy().model.base_model)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    documents = answers()

    def values(micro):
        return model(micro.tokens_BT, micro.position_BT, micro.mask_BT, seen_BTT=seen(micro))

    ours = by_document(sharing().micros(documents), values)
    for advantage, theirs in by_document([Packer(1, 1, CPU).micro([[one]]) for one in documents], values).items():
        torch.testing.assert_close(ours[advantage], theirs, **TOLERANCE)


def test_blocks_hold_every_document_once_with_its_own_prompt_and_fit():
    documents = answers(prompts=(9, 5, 1, 30), answers_each=7, seed=3)
    blocks = shared_blocks(documents, capacity=24)
    assert sorted(i for block in blocks for i in block) == list(range(len(documents)))
    for block in blocks:
        assert len({documents[i].prompt_ids for i in block}) == 1
        length = len(documents[block[0]].prompt_ids) - 1 + sum(1 + len(documents[i].token_ids) for i in block)
        assert len(block) == 1 or length <= 24


def test_documents_without_a_prompt_share_nothing():
    documents = [replace(one, prompt_ids=()) for one in answers(answers_each=2)]
    assert all(len(block) == 1 for block in shared_blocks(documents, 100))


def test_prompts_are_shared_only_where_that_costs_less():
    long = answers(prompts=(24,), answers_each=6)
    assert any(micro.shares_prompts for micro in sharing(60, 60).micros(long))
    # One row of 1 token prompts is as long either way: what stands alone needs no mask.
    assert not any(micro.shares_prompts for micro in sharing(60, 60).micros(answers(prompts=(1,))))
    assert not any(micro.shares_prompts for micro in replace(sharing(60, 60), share_prompts=False).micros(long))


def lengths_of(lengths, prompt_tokens=4):
    return [Document((1,) * prompt_tokens, (2,) * length, (0.0,) * length) for length in lengths]


def narrow(hidden_size, micro_tokens=2048, row_tokens=512):
    return Packer(micro_tokens, row_tokens, CPU, hidden_size=hidden_size, narrow_rows=True)


def test_rows_are_narrow_where_attention_would_cost_more_than_they_save():
    dice = random.Random(0)
    documents = lengths_of([dice.randint(20, 90) for _ in range(200)])
    packers = {"narrow": narrow(64), "wide": Packer(2048, 512, CPU, hidden_size=64)}
    widest = {name: max(m.tokens_BT.shape[1] for m in packer.micros(documents)) for name, packer in packers.items()}
    assert widest["narrow"] <= 128 and widest["wide"] > 500, widest


def test_a_long_document_widens_no_row_of_short_ones():
    documents = lengths_of([996, *([28] * 64)])
    shapes = [micro.tokens_BT.shape for micro in narrow(64).micros(documents)]
    assert shapes[0] == (1, 1000) and all(width <= 500 for _, width in shapes[1:]), shapes


def test_narrow_rows_change_no_gradient():
    documents, results, widths = answers(answers_each=12), [], []
    for packer in (Packer(120, 100, CPU), narrow(2, 120, 100)):
        policy, micros = tiny_policy(), packer.micros(documents)
        for micro in micros:
            (logp_and_entropy(policy, micro)[0] * micro.adv_BT).sum().backward()
        widths.append(max(micro.tokens_BT.shape[1] for micro in micros))
        results.append(gradients(policy))
    assert widths[1] <= 64 < widths[0]
    for name, grad in results[1].items():
        torch.testing.assert_close(results[0][name], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())
