"""The pipeline's simulation: cases worked out by hand, a walk of single decode steps beside it, what must hold."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import numpy as np
import pytest

from rlpost.simulate.cluster import Cluster, Failures, Lengths, Replicas, Sync, Training, changed
from rlpost.simulate.pipeline import Pipeline, Result
from rlpost.simulate.pipeline_figures import figures, simulated
from rlpost.simulate.rates import Rates, draw
from rlpost.simulate.replica import Answer, Replica

REPLICAS = Replicas(step_s=0.5, sequence_s=0.25, prefill_rate=4.0, max_num_seqs=2)
NO_COST = {"sync": Sync(seconds=0.0), "train": Training(rate=1e12, fixed_s=0.0)}


def small(**values: Any) -> Cluster:
    """Two GPUs that generate and two that train, with a heavy tail; nothing that takes long."""
    known: dict[str, Any] = {
        "gpus": 4,
        "steps": 12,
        "prompts_per_step": 8,
        "group_size": 4,
        "replicas": Replicas(step_s=0.01, sequence_s=0.001, prefill_rate=5e3, max_num_seqs=8),
        "lengths": Lengths(mean=60, sigma=1.0, max_new_tokens=500, prompt=20),
        "train": Training(rate=2e3, fixed_s=0.3),
        "sync": Sync(seconds=0.2),
    }
    return Cluster(**(known | values))


def fixed(num: int, prompt: int = 0) -> Lengths:
    return Lengths(kind="fixed", mean=num, max_new_tokens=10_000, prompt=prompt)


def made(slots: int, step_s: float, sequence_s: float, prefill_rate: float) -> Rates:
    decode_s = (0.0, *(step_s + sequence_s * num for num in range(1, slots + 1)))
    return Rates(slots, decode_s, prefill_rate, train_rate=1.0, sync_s=0.0, whole_groups=True)


def started(rates: Rates, prompt: int, answers: list[Answer]) -> Replica:
    replica = Replica(rates, prompt, limit=lambda answer: answer.length - answer.written)
    replica.take(answers)
    replica.halted, replica.admitting = False, True
    replica.update(0.0, 0, read_again=False)
    replica.admit()
    return replica


def stops(replica: Replica) -> dict[tuple[int, int], float]:
    """When each answer stops, by group and length."""
    found = {}
    while replica.running:
        for answer in replica.stop_next():
            found[answer.group, answer.length] = replica.time
        replica.admit()
    return found


def test_replica_of_two_answers_matches_hand_times() -> None:
    # A step of two takes 1.0 s and of one 0.75 s. The prompt of 8 is read once for the group, in 2 s: then 3 steps of
    # both to 5 s, and 2 of one to 6.5 s.
    assert stops(started(made(2, 0.5, 0.25, 4.0), 8, [Answer(0, 3), Answer(0, 5)])) == {(0, 3): 5.0, (0, 5): 6.5}


def test_replica_takes_in_what_waits_when_a_slot_is_free() -> None:
    # At 5 s the third, of another group, has its prompt read until 7 s while the second stands still.
    found = stops(started(made(2, 0.5, 0.25, 4.0), 8, [Answer(0, 3), Answer(0, 5), Answer(1, 4)]))
    assert found == {(0, 3): 5.0, (0, 5): 9.0, (1, 4): 10.5}


def test_update_in_flight_matches_hand_times() -> None:
    # As above; at 3.2 s the step that ends at 4.0 goes on. From 5.0 on other weights: 8 + 2 tokens and 2 more are read
    # in 3 s, then one step of both and two of one.
    replica = started(made(2, 0.5, 0.25, 4.0), 8, [Answer(0, 3), Answer(0, 5)])
    assert replica.advance(3.2) == [] and replica.time == 4.0
    replica.update(5.0, 1, read_again=True)
    assert replica.time == 8.0
    [first] = replica.stop_next()
    assert (replica.time, first.length, first.version_sum, first.oldest) == (9.0, 3, 1, 0)
    [second] = replica.stop_next()
    assert (replica.time, second.version_sum, second.written) == (10.5, 3, 5)
    assert replica.work.read_again == 4 and replica.work.generated == 8


def test_death_loses_whole_steps_and_the_answers_start_again() -> None:
    replica = started(made(2, 0.5, 0.25, 4.0), 8, [Answer(0, 3), Answer(0, 5), Answer(1, 1)])
    gone = replica.die(4.5)  # in the middle of the third step
    assert [(answer.length, answer.written) for answer in gone] == [(3, 0), (5, 0), (1, 0)]
    assert (replica.work.lost, replica.work.generated, replica.work.busy_s) == (4, 4, 4.5)
    assert not replica.running and not replica.waiting


def walked(rates: Rates, prompt: int, answers: list[tuple[int, int]]) -> dict[int, float]:
    """The same by single steps, one answer a token: when each answer of (group, length) stops."""
    waiting, running, cached = deque(enumerate(answers)), {}, set()
    time, found = 0.0, {}
    while waiting or running:
        while waiting and len(running) < rates.slots:
            number, (group, length) = waiting.popleft()
            time += 0 if group in cached else prompt / rates.prefill_rate
            cached.add(group)
            running[number] = length
        time += rates.decode_s[len(running)]
        for number in list(running):
            running[number] -= 1
            if not running[number]:
                found[number] = time
                del running[number]
    return found


@pytest.mark.parametrize("slots", [1, 3, 16, 200])
def test_jumps_between_changes_equal_a_walk_of_single_steps(slots: int) -> None:
    rng = np.random.default_rng(slots)
    lengths = np.minimum(rng.pareto(1.3, 120) * 20 + 1, 700).astype(int)
    answers = [(i // 8, int(length)) for i, length in enumerate(lengths)]
    rates = made(slots, 0.013, 0.0007, 900.0)
    objects = [Answer(group, length) for group, length in answers]
    replica, found = started(rates, 37, objects), {}
    while replica.running:
        for answer in replica.stop_next():
            found[objects.index(answer)] = replica.time
        replica.admit()
    exact = walked(rates, 37, answers)
    assert found.keys() == exact.keys()
    assert [found[i] for i in exact] == pytest.approx(list(exact.values()), rel=1e-9)
    assert replica.work.busy_s == pytest.approx(max(exact.values()), rel=1e-9)


def test_a_synchronous_step_is_the_sum_of_its_phases() -> None:
    # 2 replicas of 4 answers each: 100 steps of (0.5 + 0.25 x 4) s after 2 prompts of 8 tokens at 4 a second; training
    # of 8 x 108 tokens by 2 GPUs of 12 a second and 3 s; 7 s of sync.
    cluster = Cluster(
        gpus=4,
        steps=4,
        prompts_per_step=4,
        group_size=2,
        max_staleness=0,
        replicas=Replicas(step_s=0.5, sequence_s=0.25, prefill_rate=4.0, max_num_seqs=4),
        lengths=fixed(100, prompt=8),
        train=Training(rate=12.0, fixed_s=3.0),
        sync=Sync(seconds=7.0),
    )
    found = figures(simulated(cluster))
    assert (found.wait_s, found.train_s, found.sync_s) == pytest.approx((154.0, 39.0, 7.0))
    assert found.step_s == pytest.approx(200.0)
    assert found.trained_per_s == pytest.approx(4.0)
    assert (found.stale_mean, found.stale_max, found.length_bias) == (0.0, 0, 0.0)
    assert (found.trainer_frac, found.generator_frac) == pytest.approx((39 / 200, 154 / 200))
    colocated = figures(simulated(changed(cluster, placement="colocated")))
    assert colocated.wait_s == pytest.approx(2 + 100 * 1.0)  # 4 replicas of 2 answers
    assert colocated.train_s == pytest.approx(21.0)


@pytest.mark.parametrize(("train_s", "step_s"), [(150.0, 150.0), (100.0, 150.0), (300.0, 300.0)])
def test_a_pipelined_step_is_the_longer_phase_and_not_the_sum(train_s: float, step_s: float) -> None:
    # A wave takes 100 steps of 1.5 s; it is given out when the wave before has been waited for.
    cluster = Cluster(
        gpus=2,
        steps=8,
        prompts_per_step=2,
        group_size=2,
        max_staleness=1,
        replicas=Replicas(step_s=0.5, sequence_s=0.25, prefill_rate=1e9, max_num_seqs=4),
        lengths=fixed(100),
        train=Training(rate=1e12, fixed_s=train_s),
        sync=Sync(seconds=0.0),
    )
    alone = figures(simulated(changed(cluster, max_staleness=0)))
    assert alone.step_s == pytest.approx(150 + train_s)
    ahead = figures(simulated(cluster))
    assert ahead.step_s == pytest.approx(step_s, rel=1e-6)
    assert ahead.stale_max == 1


def ticked(cluster: Cluster, sync: int, train: int) -> list[tuple[int, int]]:
    """The same pipeline walked second by second, where a decode step takes one: when each step is ready and ends."""
    rng, slots, now, given, found = np.random.default_rng([cluster.seed, 0]), cluster.replicas.max_num_seqs, 0, 0, []
    queues: list[list[list[int]]] = [[] for _ in range(cluster.num_replicas)]  # [wave, tokens to go], slots first
    apart = cluster.placement == "separate"

    def tick(generating: bool) -> None:
        nonlocal now
        now += 1
        for place, queue in enumerate(queues if generating else []):
            for answer in queue[:slots]:
                answer[1] -= 1
            queues[place] = [answer for answer in queue if answer[1]]

    for step in range(cluster.steps):
        for _ in range(sync):
            tick(False)
        while given <= step + cluster.max_staleness:
            for group in draw(cluster.lengths, cluster.prompts_per_step, cluster.group_size, rng).tolist():
                min(queues, key=len).extend([given, length] for length in group)
            given += 1
        while any(wave == step for queue in queues for wave, _ in queue):
            tick(True)
        found.append((now, now + train))
        for _ in range(train):
            tick(apart)
    return found


@pytest.mark.parametrize("placement", ["separate", "colocated"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_a_whole_pipeline_equals_a_walk_second_by_second(k: int, placement: str) -> None:
    values: dict[str, Any] = {"max_staleness": k, "placement": placement, "steps": 15, "in_flight": "keep"}
    cluster = small(
        **values,
        gpus=6,
        prompts_per_step=9,
        replicas=Replicas(step_s=1.0, sequence_s=0.0, prefill_rate=1e18, max_num_seqs=5),
        lengths=Lengths(kind="pareto", mean=30, tail=1.4, max_new_tokens=300, prompt=0),
        train=Training(rate=1e18, fixed_s=70.0),
        sync=Sync(seconds=4.0),
    )
    exact = ticked(cluster, sync=4, train=70)
    times = [(step.ready, step.end) for step in simulated(cluster).steps]
    assert times == [pytest.approx(pair) for pair in exact]
    assert k == 0 or any(step.stale_sum for step in simulated(cluster).steps)


CASES = {
    "synchronous": {"max_staleness": 0},
    "one step ahead": {"max_staleness": 1},
    "kept cache": {"max_staleness": 2, "in_flight": "keep"},
    "drained": {"max_staleness": 2, "in_flight": "wait"},
    "split groups": {"max_staleness": 2, "gpus": 40, "generator_gpus": 20},
    "first come": {"max_staleness": 3, "ahead": 1, "first_come": True},
    "dropped": {"max_staleness": 1, "first_come": True, "late": "drop"},
    "first come, few ahead": {"max_staleness": 4, "ahead": 0, "first_come": True},
    "in parts": {"max_staleness": 0, "partial_tokens": 40, "steps": 30},
    "in parts, colocated": {"max_staleness": 0, "partial_tokens": 25, "placement": "colocated", "steps": 40},
    "colocated": {"placement": "colocated", "max_staleness": 0},
    "colocated, carried over": {"placement": "colocated", "max_staleness": 2},
    "colocated, drained": {"placement": "colocated", "max_staleness": 1, "in_flight": "wait"},
}
DYING = Failures(mtbf_h=8 / 3600, restart_s=1.5)


@pytest.mark.parametrize("failures", [Failures(), DYING], ids=["alive", "dying"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_or_trained_twice_and_no_token_is_unaccounted_for(case: str, failures: Failures) -> None:
    cluster = small(failures=failures, **CASES[case])
    pipeline = Pipeline(cluster)
    result = pipeline.run()
    num, parts = cluster.steps * cluster.prompts_per_step, cluster.partial_tokens
    assert len(result.trained) == len(set(result.trained))
    if parts:  # what is not trained goes on, and is no more than a step's groups
        assert pipeline.next_id - cluster.prompts_per_step <= len(result.trained) < num
    else:
        assert len(result.trained) == num
    assert len(set(result.trained) | set(pipeline.groups)) == pipeline.next_id - result.dropped_groups
    work, trained = result.work, sum(step.tokens for step in result.steps)
    assert work.generated == trained + work.lost + result.dropped_tokens + result.open_tokens
    # In parts an answer takes as many steps as it has parts, and one more for each time that it dies.
    most = cluster.max_staleness if parts is None else 500 // parts if failures is not DYING else cluster.steps
    assert max(step.oldest for step in result.steps) <= most
    assert all(0 <= step.stale_sum <= step.oldest * step.tokens for step in result.steps)
    if not cluster.first_come and not parts:
        size = cluster.prompts_per_step
        assert [sorted(result.trained[i : i + size]) for i in range(0, num, size)] == np.arange(num).reshape(
            -1, size
        ).tolist()
        assert trained == result.drawn_tokens
    assert (result.deaths > 5) == (failures is DYING)
    assert (result.dropped_groups > 0) <= (cluster.late == "drop")
    check_times(result)
    check_littles_law(pipeline, result)


def check_times(result: Result) -> None:
    """Phases follow each other, and nobody works longer than there is time."""
    for step, following in zip(result.steps, [*result.steps[1:], None], strict=True):
        assert step.begin < step.synced <= step.ready <= step.begun < step.end
        assert following is None or following.begin == step.end
    end = result.steps[-1].end
    assert 0 < result.work.busy_s <= end * result.cluster.num_replicas + 1
    assert result.work.resident_s <= end * result.cluster.num_replicas * result.slots + 10


def check_littles_law(pipeline: Pipeline, result: Result) -> None:
    """Answers in slots, over time, are answers times the time of each: L = lambda W."""
    inside = sum(replica.time - answer.entered for replica in pipeline.replicas for *_, answer in replica.running)
    assert result.work.resident_s == pytest.approx(result.work.stay_s + inside, rel=1e-6)


def test_without_deaths_fewer_gpus_longer_answers_and_slower_sync_cost_time() -> None:
    def step_s(**values: Any) -> float:
        return figures(simulated(small(**values))).step_s

    for k in (0, 1, 3):
        base = step_s(max_staleness=k)
        assert step_s(max_staleness=k, gpus=8, generator_gpus=4) < base
        assert step_s(max_staleness=k, lengths=Lengths(mean=90, max_new_tokens=500, prompt=20)) > base
        assert step_s(max_staleness=k, sync=Sync(seconds=0.6)) > base
        assert step_s(max_staleness=k, train=Training(rate=1e3, fixed_s=0.3)) > base
        assert step_s(max_staleness=k, failures=DYING) > base
    bounds = [step_s(max_staleness=k, steps=30) for k in (0, 1, 2, 4)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1.2 * bounds[1]


def test_the_same_seed_gives_the_same_simulation_and_lengths_do_not_depend_on_the_pipeline() -> None:
    first, again, other = (simulated(small(seed=seed, failures=DYING)) for seed in (0, 0, 1))
    assert first == again and first != other
    # Common random numbers: what differs between two descriptions is not the luck of the draw.
    assert simulated(small(max_staleness=0)).drawn_tokens == first.drawn_tokens


def test_first_come_with_no_slack_is_the_order_of_submission() -> None:
    """With everything given out that the bound allows, what is due in a step is all that it trains."""
    order, first_come = (simulated(small(max_staleness=2, first_come=one)) for one in (False, True))
    assert first_come.steps == order.steps
    size = order.cluster.prompts_per_step
    for i in range(0, len(order.trained), size):
        assert set(order.trained[i : i + size]) == set(first_come.trained[i : i + size])


def test_dropping_what_is_late_trains_short_answers_and_waiting_for_it_does_not() -> None:
    heavy = {"steps": 60, "lengths": Lengths(kind="pareto", mean=60, tail=1.3, max_new_tokens=2000, prompt=20)}
    heavy |= {"train": Training(rate=1e5, fixed_s=0.1), "first_come": True}
    dropped = figures(simulated(small(max_staleness=1, late="drop", **heavy)))
    waited = figures(simulated(small(max_staleness=3, ahead=1, **heavy)))
    assert dropped.length_bias < -0.1 and dropped.dropped_frac > 0.1
    assert abs(waited.length_bias) < 0.05 and waited.dropped_frac == 0


def test_staleness_of_tokens_matches_a_case_by_hand() -> None:
    # One replica of two slots, one group of one answer a step, of 4 tokens at 1 s each; training takes 2 s. k = 1:
    # both waves begin at 0 with version 0. Step 0 trains from 5 s (two answers decode in 1.25 s each) on.
    cluster = Cluster(
        gpus=2,
        steps=3,
        prompts_per_step=1,
        group_size=1,
        max_staleness=1,
        replicas=Replicas(step_s=0.75, sequence_s=0.25, prefill_rate=1e9, max_num_seqs=2),
        lengths=fixed(4),
        train=Training(rate=1e12, fixed_s=2.0),
        sync=Sync(seconds=0.0),
    )
    # Step 1: wave 1 was whole at 5 s as well, with version 0, so it is trained at 7 s; wave 2 begins at 7 s with
    # version 1 and has two tokens at 9 s. Then wave 3 joins it, and version 2 writes the other two in 2.5 s.
    times = [(step.ready, step.end, step.stale_sum, step.oldest) for step in simulated(cluster).steps]
    assert times == [
        (pytest.approx(5), pytest.approx(7), 0, 0),
        (pytest.approx(7), pytest.approx(9), 4, 1),
        (pytest.approx(11.5), pytest.approx(13.5), 2, 1),
    ]


def test_an_update_that_waits_leaves_answers_of_one_version() -> None:
    shape = fixed(61)
    waits, goes_on = (simulated(small(max_staleness=2, in_flight=one, lengths=shape)) for one in ("wait", "recompute"))
    assert waits.work.read_again == 0 < goes_on.work.read_again
    assert all(step.stale_sum % 61 == 0 for step in waits.steps)
    assert any(step.stale_sum % 61 for step in goes_on.steps)
    assert figures(waits).sync_s > figures(goes_on).sync_s + 0.1


def test_answers_in_parts_match_a_case_by_hand() -> None:
    # One answer a group and two groups a step, of 5 tokens, at most 2 a step of the pipeline; a decode step of two
    # takes 1 s. Steps 0 and 1 end nothing; step 2 writes the fifth token of both. Then two new groups begin.
    cluster = Cluster(
        gpus=2,
        steps=6,
        prompts_per_step=2,
        group_size=1,
        max_staleness=0,
        partial_tokens=2,
        replicas=Replicas(step_s=0.5, sequence_s=0.25, prefill_rate=1e9, max_num_seqs=2),
        lengths=fixed(5),
        train=Training(rate=1e12, fixed_s=3.0),
        sync=Sync(seconds=0.0),
    )
    result = simulated(cluster)
    assert [step.ready - step.synced for step in result.steps] == pytest.approx([2, 2, 1, 2, 2, 1])
    assert [step.tokens for step in result.steps] == [0, 0, 10, 0, 0, 10]
    # Two tokens of version 0 are two steps stale, two of version 1 one step, the last not at all; of each answer.
    assert [(step.stale_sum, step.oldest) for step in result.steps[2::3]] == [(12, 2), (12, 2)]
    assert (result.trained, result.work.read_again) == ([0, 1, 2, 3], 2 * 2 * (2 + 4))


def test_a_measured_table_is_used_and_groups_are_split_where_there_are_few() -> None:
    line = small(max_staleness=1)
    table = [[1, 0.011], [8, 0.018]]
    same = small(
        max_staleness=1, replicas=dataclasses.replace(line.replicas, step_s=None, sequence_s=None, table=table)
    )
    assert [one.end for one in simulated(same).steps] == pytest.approx([one.end for one in simulated(line).steps])
    many = {"gpus": 34, "generator_gpus": 32, "max_staleness": 0, "lengths": fixed(50, prompt=20)}
    split, whole = (
        simulated(small(**many, replicas=dataclasses.replace(line.replicas, whole_groups=one))) for one in (None, True)
    )
    # 32 answers on 32 replicas, each of which reads its prompt; or on 8 of them.
    assert split.work.read == 4 * whole.work.read
    assert figures(split).wait_s == pytest.approx(20 / 5e3 + 50 * 0.011)
    assert figures(whole).wait_s == pytest.approx(20 / 5e3 + 50 * 0.014)


@pytest.mark.parametrize("kind", ["lognormal", "pareto", "fixed", "quantiles"])
def test_lengths_have_the_mean_and_the_likeness_that_was_asked_for(kind: str) -> None:
    shape = Lengths(kind=kind, mean=200.0, sigma=0.6, tail=2.5, alike=0.5, max_new_tokens=100_000)  # type: ignore[arg-type]
    if kind == "quantiles":
        shape = dataclasses.replace(shape, quantiles=[[0, 100], [0.5, 200], [1, 300]])
    lengths_PG = draw(shape, 4000, 8, np.random.default_rng(0))
    assert lengths_PG.shape == (4000, 8) and lengths_PG.min() >= 1
    assert lengths_PG.mean() == pytest.approx(200, rel=0.03)
    if kind in ("lognormal", "quantiles"):
        logs = np.log(lengths_PG)
        assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] == pytest.approx(0.5, abs=0.04)
    assert draw(dataclasses.replace(shape, max_new_tokens=150), 10, 8, np.random.default_rng(0)).max() <= 150
