"""One denominator: the same gradient for every way of splitting a step. Tn names a known trap."""

import pytest
import torch

from rlpost import losses
from rlpost.aggregation import count, sum_counts, token_weights

MODES = ["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"]
LENGTHS = [5, 1, 3, 0, 7, 2, 2, 4, 6, 1, 0, 3]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]  # group 3 has one document with nothing trained
BUDGET = 10
SPLITS = [(1, 12), (3, 4), (12, 1)]  # micro-batches x documents of each, at most
LOSSES = ["ppo_clip", "gspo", "value_clip"]


def data():
    """Features of each token, its log-prob when sampled, and the advantage of each document."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(n + 1, 3), 0.3 * draw(n + 1), draw(1)) for n in LENGTHS]  # one position more: the masked prompt


def gradient(mode, loss_name, num_ranks, num_micros):
    """The averaged gradient over simulated ranks, each with its micro-batches: as the engine would see it."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    documents, total = data(), torch.zeros((), dtype=torch.float64)
    shards = [range(len(LENGTHS))[rank::num_ranks] for rank in range(num_ranks)]
    step = sum_counts(count([LENGTHS[i] for i in shard], [GROUPS[i] for i in shard]) for shard in shards)
    for shard in shards:
        weights = token_weights(mode, [LENGTHS[i] for i in shard], [GROUPS[i] for i in shard], step, max_tokens=BUDGET)
        for micro in range(num_micros):
            chosen = list(zip(shard, weights, strict=True))[micro::num_micros]
            if chosen:
                total = total + micro_loss(loss_name, theta, documents, chosen, num_ranks)
    (total / num_ranks).backward()
    return theta.grad


def micro_loss(loss_name, theta, documents, chosen, dp_size):
    """Pack the chosen documents into one row and reduce their loss with their weights."""
    features = torch.cat([documents[i][0] for i, _ in chosen])[None]
    offset = torch.cat([documents[i][1] for i, _ in chosen])[None]
    adv = torch.cat([documents[i][2].expand(LENGTHS[i] + 1) for i, _ in chosen])[None]
    document = torch.cat([torch.full((LENGTHS[i] + 1,), d) for d, (i, _) in enumerate(chosen)])[None]
    mask = torch.cat([torch.tensor([False] + [True] * LENGTHS[i]) for i, _ in chosen])[None]
    weight = torch.tensor([w for _, w in chosen], dtype=torch.float64)[document] * mask
    x = -torch.nn.functional.softplus(features @ theta)
    behavior = x.detach() + offset
    if loss_name == "value_clip":
        loss, _ = losses.value_clip(x, behavior, adv, clip=0.2)
    elif loss_name == "gspo":
        loss, _ = losses.gspo(x, behavior, adv, document_BT=document, mask_BT=mask, clip_low=0.2, clip_high=0.2)
    else:
        loss, _ = losses.ppo_clip(x, behavior, adv, clip_low=0.2, clip_high=0.2)
    return losses.weighted_sum(loss, weight, dp_size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_t1_t5_t32_gradient_is_the_same_for_every_split(mode, loss_name):
    whole = gradient(mode, loss_name, num_ranks=1, num_micros=1)
    assert whole.abs().min() > 1e-4
    for num_ranks in (1, 2, 4):
        for num_micros, _ in SPLITS:
            split = gradient(mode, loss_name, num_ranks, num_micros)
            torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "prompt_mean"])
def test_t1_weights_of_all_tokens_of_a_step_add_up_to_one(mode):
    weights = token_weights(mode, LENGTHS, GROUPS, count(LENGTHS, GROUPS), max_tokens=BUDGET)
    assert sum(w * n for w, n in zip(weights, LENGTHS, strict=True)) == pytest.approx(1.0, abs=1e-12)


def test_weights_match_hand_table():
    # Lengths 4, 2 in group 0 and 2 in group 1, one empty: 8 tokens, 3 sequences, 2 groups of 6 and 2 tokens.
    lengths, groups = [4, 2, 2, 0], [0, 0, 1, 1]
    table = {
        "token_mean": [1 / 8, 1 / 8, 1 / 8, 0],
        "seq_mean": [1 / 12, 1 / 6, 1 / 6, 0],
        "seq_sum_const": [1 / 30, 1 / 30, 1 / 30, 0],
        "prompt_mean": [1 / 12, 1 / 12, 1 / 4, 0],
    }
    for mode, expected in table.items():
        found = token_weights(mode, lengths, groups, count(lengths, groups), max_tokens=10)
        assert found == pytest.approx(expected), mode


def test_t3_each_optimizer_step_has_the_denominator_of_its_own_window():
    first, second = LENGTHS[:6], LENGTHS[6:]
    for lengths, groups in ((first, GROUPS[:6]), (second, GROUPS[6:])):
        weights = token_weights("token_mean", lengths, groups, count(lengths, groups), max_tokens=BUDGET)
        assert max(weights) == pytest.approx(1 / sum(lengths))


def test_t6_a_fully_masked_sequence_is_not_a_sequence():
    with_empty = token_weights("seq_mean", [4, 0], [0, 1], count([4, 0], [0, 1]), max_tokens=8)
    assert with_empty == [0.25, 0.0]
    prompts = token_weights("prompt_mean", [4, 0], [0, 1], count([4, 0], [0, 1]), max_tokens=8)
    assert prompts == [0.25, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_t6_a_step_with_nothing_to_train_is_exactly_zero_with_a_finite_gradient(mode):
    assert token_weights(mode, [0, 0], [0, 1], count([0, 0], [0, 1]), max_tokens=8) == [0.0, 0.0]
    x = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    loss = losses.weighted_sum(x, torch.zeros(1, 2), dp_size=2)
    loss.backward()
    assert loss == 0 and x.grad.eq(0).all()


def test_t7_the_constant_is_the_configured_budget_and_not_the_width_of_a_batch():
    narrow = token_weights("seq_sum_const", [2], [0], count([2, 9], [0, 1]), max_tokens=100)
    wide = token_weights("seq_sum_const", [9], [1], count([2, 9], [0, 1]), max_tokens=100)
    assert narrow == wide == [1 / 200]


def test_a_group_spread_over_ranks_has_one_denominator():
    step = count([4], [7]) + count([2, 6], [7, 8])
    assert dict(step.group_tokens) == {7: 6, 8: 6}
    assert token_weights("prompt_mean", [4], [7], step, max_tokens=8) == [1 / 12]


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"mode must be token_mean, .* \(got 'mean'\)"):
        token_weights("mean", [1], [0], count([1], [0]), max_tokens=8)
