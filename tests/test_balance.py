"""Work moved between ranks: nothing lost, nothing twice, the busiest less busy."""

import random

import pytest
from threads import on_ranks
from tiny import CPU, ragged

from rlpost.balance import balanced, cost, moves
from rlpost.batch import make_batch
from rlpost.packing import Packer


def after(costs):
    left = [dict(enumerate(own)) for own in costs]
    for rank, i, to in moves(costs):
        left[to][(rank, i)] = left[rank].pop(i)
    return [sorted(own.values()) for own in left]


@pytest.mark.parametrize("seed", range(20))
def test_moves_lose_nothing_and_leave_no_rank_much_above_the_mean(seed):
    dice = random.Random(seed)
    costs = [[dice.expovariate(1.0) for _ in range(dice.randint(0, 40))] for _ in range(dice.randint(2, 8))]
    found = after(costs)
    assert sorted(c for own in found for c in own) == sorted(c for own in costs for c in own)
    whole, largest = sum(map(sum, costs)), max((c for own in costs for c in own), default=0.0)
    assert max(map(sum, found)) <= whole / len(costs) + largest
    assert max(map(sum, found)) <= max(map(sum, costs))


def test_equal_work_moves_nothing():
    assert moves([[3.0, 1.0], [2.0, 2.0], [4.0]]) == []
    assert moves([[], []]) == []
    assert moves([[5.0], []]) == []  # the other rank would be as busy, and this one idle


def test_a_long_document_costs_more_than_its_tokens():
    assert cost(1024, hidden_size=64) > 2 * cost(512, hidden_size=64)


def test_every_rank_agrees_and_keeps_the_order_of_what_stays():
    shares = [list(range(0, 12)), [100], [200, 201]]
    found = on_ranks(lambda share, world: balanced(share, [1.0] * len(share), world), *shares)
    assert sorted(x for own in found for x in own) == sorted(x for own in shares for x in own)
    assert [len(own) for own in found] == [5, 5, 5]
    assert found[0] == sorted(found[0]) and found[1][0] == 100 and found[2][:2] == [200, 201]


def test_documents_of_a_busy_rank_are_trained_by_an_idle_one():
    shares = [ragged(20), []]
    packer = Packer(40, 20, CPU, hidden_size=32)
    batches = on_ranks(lambda share, world: make_batch(share, packer, world), *shares)
    tokens = [sum(int(micro.mask_BT.sum()) for micro in batch.micros) for batch in batches]
    assert sum(tokens) == batches[0].step_tokens == sum(one.num_trained for one in shares[0])
    assert min(tokens) > 0.4 * sum(tokens)
