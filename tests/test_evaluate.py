from contextlib import contextmanager
from itertools import combinations
from types import SimpleNamespace

import pytest

from rlpost.errors import RunError
from rlpost.evaluate import EVAL_SEED_OFFSET, Evaluator, pass_at_k, tabulate
from rlpost.recipe import Evaluation
from rlpost.reward_recipe import bind_rewards
from rlpost.types import Rollout, Sampling, Task


def row(correct, level=None, tokens=40, truncated=0, unjudged=0, **more):
    return {"correct": correct, "unjudged": unjudged, "level": level, "tokens": tokens, "truncated": truncated, **more}


def test_t40_pass_at_k_matches_hand_table():
    assert [pass_at_k(4, 2, k) for k in (1, 2, 4)] == pytest.approx([1 / 2, 5 / 6, 1], abs=1e-15)
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 4, 1) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(n, c, k) for n in (1, 5, 6) for c in range(n + 1) for k in range(1, n + 1)])
def test_t40_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, c, k):
    draws = list(combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_t40_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(10_000, 5_000, 1) == pytest.approx(0.5, rel=1e-9)


def test_tabulate_averages_over_problems_and_levels():
    rows = [row(2, "terms=2"), row(0, "terms=10", tokens=80, truncated=4), row(4, "terms=2")]
    assert tabulate(rows, 4) == pytest.approx(
        {
            "pass@1": (0.5 + 0 + 1) / 3,
            "pass@2": (5 / 6 + 0 + 1) / 3,
            "pass@4": 2 / 3,
            "loss": 0.5,
            "concentration": 0.75,
            "length_mean": 160 / 12,
            "truncated_frac": 4 / 12,
            "num_problems": 3,
            "n": 4,
            "unjudged": 0,
            "pass@1/terms=2": 0.75,
            "pass@1/terms=10": 0.0,
        }
    )


def test_tabulate_reports_powers_of_two_up_to_n_and_levels_in_their_order():
    result = tabulate([row(1, "l=10"), row(1, "l=9")], 6)
    names = [key for key in result if key.startswith("pass@")]
    assert names == ["pass@1", "pass@2", "pass@4", "pass@1/l=9", "pass@1/l=10"]


def test_tabulate_of_nothing_says_what_to_do():
    with pytest.raises(RunError, match=r"tasks\.eval must hold at least one problem"):
        tabulate([], 4)


class Generator:
    """Right on even tasks for half of the samples; keeps what it was asked."""

    def __init__(self):
        self.requests, self.versions = [], []

    @contextmanager
    def awake(self, engine, version):
        self.versions.append(version)
        yield

    def generate(self, requests, sampling, whole=None):
        self.requests += requests
        return [self.answer(request, i) for request in requests for i in range(request.n)]

    def answer(self, request, i):
        right = i % 2 and int(request.task.answer) % 2 == 0
        text = request.task.answer if right else "999"
        reason = "length" if i == 0 else "stop"
        return Rollout(request.task, request.group, (1,), (1,), (2,) * 3, (-1.0,) * 3, reason, 0, text=text)


def evaluator(rank=0, size=1, gather=lambda item: [item]):
    tasks = [Task(f"t{i}", "p", str(i), extra={"level": i % 2}) for i in range(4)]
    world = SimpleNamespace(rank=rank, size=size, all_gather_object=gather, together=lambda work: work())
    renderer = SimpleNamespace(prompt_ids=lambda task: (1,))
    rewards = bind_rewards([{"use": "final_number"}])
    return Evaluator(tasks, Evaluation(n=4, by="level"), renderer, rewards, Sampling(max_new_tokens=5), 9, world)


def test_evaluator_counts_right_answers_by_the_first_reward():
    generator = Generator()
    result = evaluator()(generator, SimpleNamespace(updates=6))
    assert generator.versions == [6]
    assert result["pass@1"] == 0.25 and result["pass@4"] == 0.5
    assert (result["pass@1/level=0"], result["pass@1/level=1"]) == (0.5, 0.0)
    assert (result["truncated_frac"], result["length_mean"], result["num_problems"]) == (0.25, 3.0, 4)


def test_evaluator_asks_for_the_same_seeds_at_every_call_and_not_those_of_training():
    from rlpost.collect import request_seed

    first, second = Generator(), Generator()
    for generator in (first, second):
        evaluator()(generator, SimpleNamespace(updates=0))
    assert first.requests == second.requests
    assert [request.seed for request in first.requests] == [request_seed(9 + EVAL_SEED_OFFSET, i) for i in range(4)]


def test_two_ranks_give_the_figures_of_one():
    rows = []
    for rank in range(2):
        evaluator(rank, 2, lambda item: rows.append(item) or [item])(Generator(), SimpleNamespace(updates=0))
    together = evaluator(0, 2, lambda item: rows)(Generator(), SimpleNamespace(updates=0))
    assert together == evaluator()(Generator(), SimpleNamespace(updates=0))


def test_what_could_not_be_judged_counts_nowhere():
    rows = [row(1, unjudged=2), row(0, unjudged=4), row(4)]
    result = tabulate(rows, 4)
    assert result["pass@1"] == pytest.approx((1 / 2 + 1) / 2)  # the second problem has no figure
    assert result["pass@2"] == pytest.approx((1 + 1) / 2) and result["pass@4"] == 1.0
    assert result["unjudged"] == 6


def test_votes_and_further_k_are_tabulated():
    rows = [row(2, votes=[[2, 1], [1, 0]]), row(1, votes=[[1, 1], [3, 0]])]
    result = tabulate(rows, 4, [3, 9])
    assert [name for name in result if name.startswith("maj")] == ["maj@2", "maj@3", "maj@4"]
    assert "pass@3" in result and "pass@9" not in result
    assert result["maj@4"] == 0.5


def test_evaluator_votes_and_tries_on_where_passes_are_rare():
    from dataclasses import replace

    from rlpost.votes import number_of

    class Rare(Generator):
        """The n-th call for a task is right on its last answer."""

        def answer(self, request, i):
            text = request.task.answer if i == request.n - 1 else "999"
            return Rollout(request.task, request.group, (1,), (1,), (2,) * 3, (-1.0,) * 3, "stop", 0, text=text)

    one = replace(evaluator(), recipe=Evaluation(n=4, until=32), vote=number_of)
    generator = Rare()
    rows = one.rows(generator, SimpleNamespace(updates=0))
    # 4, 4 and 8 answers: the third pass is the 16th, and (3 - 1) / (16 - 1) is the estimate
    assert [request.n for request in generator.requests] == [4] * 4 + [4] * 4 + [8] * 4
    assert {row["pass_rate"] for row in rows} == {2 / 15} and {row["drawn"] for row in rows} == {16}
    result = tabulate(rows, 4)
    assert (result["pass@1"], result["passuntil"], result["drawn"]) == (0.25, pytest.approx(2 / 15), 64)
    assert result["maj@4"] == 0.0  # 999 three times
    seeds = [request.seed for request in generator.requests]
    assert len(set(seeds)) == len(seeds)
