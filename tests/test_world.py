import os

import pytest
from ranks import run_ranks

from rlpost.world import World


def collectives(world):
    world.barrier()
    return {
        "rank": world.rank,
        "main": world.is_main,
        "gathered": world.all_gather_object({"rank": world.rank, "text": "x" * world.rank}),
        "sum": world.sum(10 + world.rank),
        "max": world.max(10 - world.rank),
        "large_sum": world.sum(2**60 + world.rank),
    }


@pytest.mark.slow
def test_two_ranks_agree_on_every_collective():
    results = run_ranks(collectives)
    gathered = [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
    shared = {"gathered": gathered, "sum": 21, "max": 10, "large_sum": 2**61 + 1}
    assert results == [{"rank": 0, "main": True, **shared}, {"rank": 1, "main": False, **shared}]


def test_alone_every_collective_is_the_identity(single_rank):
    assert (single_rank.rank, single_rank.size, single_rank.is_main) == (0, 1, True)
    assert collectives(single_rank)["gathered"] == [{"rank": 0, "text": ""}]
    assert (single_rank.sum(3), single_rank.max(-3)) == (3, -3)


def test_world_takes_its_place_from_torchrun(monkeypatch):
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    world = World()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (5, 8, 1, False)


def test_starting_twice_joins_once(single_rank):
    port = os.environ["MASTER_PORT"]
    assert World().start().size == 1
    assert os.environ["MASTER_PORT"] == port
