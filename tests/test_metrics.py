import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlpost.metrics import METRICS, Metrics, metric_info


class OneRank:
    def all_gather_object(self, item):
        return [item]


class Ranks:
    """Ranks as threads: `all_gather_object` meets at a barrier."""

    def __init__(self, size):
        self.size, self.items, self.meet = size, [None] * size, threading.Barrier(size)

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(rank, OfRanks(self, rank)), range(self.size)))


class OfRanks:
    def __init__(self, ranks, rank):
        self.ranks, self.rank = ranks, rank

    def all_gather_object(self, item):
        self.ranks.items[self.rank] = item
        self.ranks.meet.wait(timeout=5)
        items = list(self.ranks.items)
        self.ranks.meet.wait(timeout=5)
        return items


def test_mean_is_weighted_over_ranks_and_not_a_mean_of_means():
    def work(rank, world):
        metrics = Metrics(world)
        metrics.mean("reward/mean", value=float(rank), weight=1 + 2 * rank)
        return metrics.reduce()

    assert Ranks(2).run(work) == [{"reward/mean": 0.75}] * 2


def test_reductions_are_those_declared_and_names_may_be_missing_on_a_rank():
    def work(rank, world):
        metrics = Metrics(world)
        metrics.sum("rollouts/num", 3)
        metrics.sum("rollouts/num", rank)
        metrics.max("rollouts/length_max", 10 - rank)
        metrics.last("optim/lr", 1.0)
        metrics.last("optim/lr", 0.5)
        if rank == 1:
            metrics.mean("reward/brevity", 0.25)
        return metrics.reduce()

    expected = {"rollouts/num": 7.0, "rollouts/length_max": 10.0, "optim/lr": 0.5, "reward/brevity": 0.25}
    assert Ranks(2).run(work) == [expected] * 2


def test_tokens_give_the_same_figures_for_every_split():
    torch.manual_seed(0)
    mask, entropy, ratio = torch.rand(4, 6) < 0.5, torch.rand(4, 6), torch.rand(4, 6)

    def work_on(splits):
        def work(rank, world):
            metrics = Metrics(world)
            for rows in splits[rank]:
                values = {"policy/entropy": entropy[rows], "policy/ratio_max": ratio[rows]}
                metrics.tokens(mask[rows], **values)
            return metrics.reduce()

        return Ranks(len(splits)).run(work)[0]

    whole = work_on([[slice(0, 4)]])
    assert whole["policy/entropy"] == pytest.approx(entropy[mask].mean().item(), abs=1e-7)
    assert whole["policy/ratio_max"] == ratio[mask].max().item()
    assert work_on([[slice(0, 1), slice(1, 2)], [slice(2, 4)]]) == pytest.approx(whole, abs=1e-12)
    assert work_on([[slice(0, 3), slice(3, 4)]]) == pytest.approx(whole, abs=1e-12)


def test_tokens_never_read_what_is_masked():
    mask = torch.tensor([[True, False, False, True]])
    value = torch.tensor([[-1.0, math.inf, math.nan, -3.0]])
    metrics = Metrics(OneRank())
    metrics.tokens(mask, **{"policy/entropy": value, "policy/ratio_max": value})
    assert metrics.reduce() == {"policy/entropy": -2.0, "policy/ratio_max": -1.0}


def test_tokens_keep_no_graph():
    value = torch.ones(1, 2, requires_grad=True) * 2
    metrics = Metrics(OneRank())
    metrics.tokens(torch.ones(1, 2, dtype=torch.bool), **{"policy/loss": value})
    assert not any(tensor.requires_grad for pair in metrics._tensors.values() for tensor in pair)


def test_a_mean_of_nothing_is_left_out():
    metrics = Metrics(OneRank())
    metrics.mean("reward/mean", math.nan, weight=0)
    metrics.tokens(torch.zeros(1, 2, dtype=torch.bool), **{"policy/entropy": torch.ones(1, 2)})
    metrics.tokens(torch.zeros(1, 2, dtype=torch.bool), **{"policy/ratio_max": torch.ones(1, 2)})
    assert metrics.reduce() == {}


def test_nan_shows_in_mean_and_max():
    metrics = Metrics(OneRank())
    for value in (1.0, math.nan, 2.0):
        metrics.mean("reward/mean", value)
        metrics.max("canary/logp_diff_max", value)
    assert all(math.isnan(value) for value in metrics.reduce().values())


def test_spread_is_that_of_all_ranks_together():
    def work(rank, world):
        metrics = Metrics(world)
        metrics.quantiles("rollouts/length", [10 * rank + i for i in range(1, 11)])
        metrics.std("reward/std_all", [0.0, 1.0] if rank else [0.0])
        return metrics.reduce() | metrics.reduce()

    quantiles = {"p10": 2, "p50": 10, "p90": 18, "p99": 20}
    expected = {f"rollouts/length_{name}": x for name, x in quantiles.items()}
    assert Ranks(2).run(work) == [expected | {"reward/std_all": pytest.approx(math.sqrt(2) / 3)}] * 2


def test_spread_of_nothing_is_left_out_and_of_another_kind_refused():
    metrics = Metrics(OneRank())
    metrics.quantiles("rollouts/length", [])
    metrics.std("reward/std_all", [])
    assert metrics.reduce() == {}
    with pytest.raises(ValueError, match="'reward/mean' is declared as 'mean'"):
        metrics.std("reward/mean", [1.0])
    with pytest.raises(ValueError, match="'speed_p50' is not declared"):
        metrics.quantiles("speed", [1.0])


def test_reduce_starts_the_next_step_empty():
    metrics = Metrics(OneRank())
    metrics.sum("rollouts/num", 3)
    metrics.tokens(torch.ones(1, 1, dtype=torch.bool), **{"policy/loss": torch.ones(1, 1)})
    metrics.reduce()
    assert metrics.reduce() == {}


def test_undeclared_name_is_refused():
    with pytest.raises(ValueError, match="'speed' is not declared"):
        Metrics(OneRank()).sum("speed", 1)
    with pytest.raises(ValueError, match="'speed' is not declared"):
        Metrics(OneRank()).tokens(torch.ones(1, 1, dtype=torch.bool), speed=torch.ones(1, 1))


def test_another_reduction_than_the_declared_one_is_refused():
    with pytest.raises(ValueError, match="'rollouts/num' is declared as 'sum' in METRICS and was logged as 'mean'"):
        Metrics(OneRank()).mean("rollouts/num", 1)
    with pytest.raises(ValueError, match="tokens"):
        Metrics(OneRank()).tokens(torch.ones(1, 1, dtype=torch.bool), **{"optim/lr": torch.ones(1, 1)})


def test_exact_names_and_narrow_families_come_before_wide_ones():
    assert metric_info("reward/solved_frac") is METRICS["reward/solved_frac"]
    assert metric_info("reward/unjudged/brevity").reduction == "sum"
    assert metric_info("reward/brevity").reduction == "mean"
    assert metric_info("eval/pass@8") is METRICS["eval/pass@*"]
