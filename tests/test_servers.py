"""The client of generator servers against small HTTP servers with accidents (`fake_servers.py`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fake_servers import KEY, FakeServer, written

from rlpost.errors import Preempted, RunError
from rlpost.preempt import preemption
from rlpost.servers.dispatch import Call, Unit
from rlpost.servers.fleet import Admission, Fleet
from rlpost.servers.replica import Lost, Replica
from rlpost.types import Request, Sampling, Task

SAMPLING = Sampling(max_new_tokens=8, stop_ids=(1,))
REQUESTS = [Request(i, Task(f"t{i}", "x"), (2, 3 + i), n=3, seed=10 * i + 5) for i in range(4)]
EXPECTED = [(one.group, i, written(one.seed + i)) for one in REQUESTS for i in range(one.n)]

Make = Callable[..., tuple[Fleet, list[FakeServer]]]


@pytest.fixture
def make() -> Iterator[Make]:
    """A fleet of fake servers, each with its plan of accidents, all open with version 3."""
    ends: list[Callable[[], None]] = []

    def made(*plans: tuple[str, ...], rank: int = 0, size: int = 1, start_s: float = 5.0, opens: bool = True):
        servers = [FakeServer(*plan, silence_s=3.0) for plan in plans]
        replicas = [Replica(server.url, KEY, timeout_s=1.0) for server in servers]
        fleet = Fleet(replicas, rank=rank, size=size, start_s=start_s, in_flight="recompute")
        for server, replica in zip(servers, replicas, strict=True):
            server.version, server.is_open, replica.alive = 3, opens, True

        def load(replica: Replica) -> None:
            replica.post("/update_weights")

        def prove(replica: Replica) -> None:
            if replica.score((5, 6, 7)) != [-0.5, -0.5]:
                raise RunError("canary")

        fleet.admission = Admission(3, load, prove)
        fleet._keeper.start()
        ends.extend([fleet.end, *(server.stop for server in servers)])
        return fleet, servers

    yield made
    for end in ends:
        end()


def run(fleet: Fleet, version: int = 3) -> tuple[Call, list[int]]:
    call = Call(fleet, REQUESTS, SAMPLING, seeded=True)
    whole: list[int] = []
    call.run(whole.append, lambda: version)
    return call, whole


def found(call: Call) -> list[tuple[int, int, list[int]]]:
    return [(REQUESTS[unit.request].group, unit.index, unit.token_ids) for unit in call.units]


def test_requests_are_shared_out_and_every_rollout_comes_back_in_its_place(make: Make) -> None:
    fleet, servers = make((), ())
    call, whole = run(fleet)
    assert found(call) == EXPECTED and sorted(whole) == [0, 1, 2, 3] and call.resent == 0
    assert [len(server.asked[0]["rollouts"]) for server in servers] == [6, 6]
    assert all(unit.spans == [(0, 3)] and unit.finish == "stop" for unit in call.units)
    prompts = {prompt for prompt, *_ in servers[0].asked[0]["rollouts"]}
    assert prompts == {0, 1}  # the rollouts of a request stay together, for its prompt is then computed once


@pytest.mark.parametrize("accident", ["die", "silence", "cut", "error", "nonsense"])
def test_what_a_failing_server_did_not_answer_is_answered_by_another_exactly_once(make: Make, accident: str) -> None:
    fleet, servers = make((accident,), ())
    started = time.monotonic()
    call, whole = run(fleet)
    assert found(call) == EXPECTED and sorted(whole) == [0, 1, 2, 3]
    assert call.resent == (6 if accident == "error" else 3)
    assert time.monotonic() - started < 2.5  # timeout_s, and a moment
    again = [len(asked["rollouts"]) for server in servers for asked in server.asked]
    assert sum(again) == 12 + call.resent


def test_a_server_that_comes_back_is_given_the_weights_and_proved_before_it_serves(make: Make) -> None:
    fleet, [server] = make(("die",))
    threading.Timer(0.5, server.restart).start()
    call, _ = run(fleet)
    assert found(call) == EXPECTED and call.resent == 6
    calls = [path for path in server.calls[1:] if path != "/rlpost/state"]
    own = ["/rlpost/close", "/update_weights", "/rlpost/score", "/rlpost/open", "/rlpost/generate"]
    assert calls == own and server.version == 3


def test_where_no_server_comes_back_the_run_ends_with_one_message(make: Make) -> None:
    fleet, _ = make(("die",), start_s=1.0)
    with pytest.raises(RunError, match="start_s=1 s in vain for a server that is alive"):
        run(fleet)


def test_a_thread_that_waits_for_answers_ends_with_the_run(make: Make) -> None:
    fleet, _ = make(("die",), start_s=60.0)
    threading.Timer(0.3, fleet.end).start()
    started = time.monotonic()
    with pytest.raises(RunError, match="the run has ended"):
        run(fleet)
    assert time.monotonic() - started < 20


def test_a_server_that_comes_back_with_other_weights_than_it_was_given_ends_the_run(make: Make) -> None:
    fleet, [server] = make(("die",))
    server.scores = -0.7
    threading.Timer(0.2, server.restart).start()
    with pytest.raises(RunError, match=r"^canary$"):
        run(fleet)
    assert "/rlpost/open" not in server.calls


def test_a_server_that_cannot_load_is_tried_again_and_serves_nothing(make: Make) -> None:
    fleet, [server] = make(("die",), start_s=2.5)
    server.refuses.add("/update_weights")
    threading.Timer(0.2, server.restart).start()
    with pytest.raises(RunError, match="answered 500"):
        run(fleet)
    assert server.calls.count("/rlpost/generate") == 1 and server.calls.count("/update_weights") >= 1


def test_a_rank_whose_own_server_is_lost_asks_that_of_another(make: Make) -> None:
    fleet, [own, other] = make(("die",), (), rank=0, size=2)
    call, _ = run(fleet)
    assert found(call) == EXPECTED and call.resent == 6
    assert len(own.asked) == 1 and len(other.asked) == 1
    assert "/rlpost/close" not in other.calls  # its weights are its owner's to change


def test_an_update_in_flight_goes_on_from_the_tokens_that_are_there(make: Make) -> None:
    fleet, [server] = make(("abort",))

    def versions() -> int:
        server.version = 3 if not server.asked else 4  # as if `awake` had been entered
        return server.version

    call = Call(fleet, REQUESTS, SAMPLING, seeded=True)
    call.run(lambda _: None, versions)
    first, again = (asked["rollouts"] for asked in server.asked)
    assert [(one[1], one[3]) for one in first] == [([], 8)] * 12
    assert [(one[1], one[3]) for one in again] == [(whole[:2], 6) for _, _, whole in EXPECTED]
    assert all(old[2] != new[2] for old, new in zip(first, again, strict=True))  # other dice, the same in every run
    assert all(
        unit.spans == [(0, 3), (2, 4)] and unit.token_ids[:2] == whole[:2]
        for unit, (_, _, whole) in zip(call.units, EXPECTED, strict=True)
    )
    assert all(len(unit.logp) == len(unit.token_ids) for unit in call.units) and call.resent == 0


def test_what_is_asked_for_waits_for_weights_that_are_new_enough(make: Make) -> None:
    fleet, [server] = make(())
    threading.Timer(0.4, lambda: setattr(server, "version", 5)).start()
    started = time.monotonic()
    call, _ = run(fleet, version=5)
    assert time.monotonic() - started > 0.3
    assert all(unit.spans == [(0, 5)] for unit in call.units)


def test_without_seeds_of_their_own_a_call_has_one_that_depends_on_what_is_asked(make: Make) -> None:
    fleet, [server] = make(())
    for requests in (REQUESTS, REQUESTS, REQUESTS[:2]):
        Call(fleet, requests, SAMPLING, seeded=False).run(lambda _: None, lambda: 3)
    seeds = [asked["seed"] for asked in server.asked]
    assert seeds[0] == seeds[1] != seeds[2] and None not in seeds
    assert {one[2] for asked in server.asked for one in asked["rollouts"]} == {None}


def test_a_rank_that_is_asked_to_leave_does_so_while_it_waits(make: Make) -> None:
    fleet, _ = make((), opens=False)
    threading.Timer(0.3, preemption.ask, ["SIGTERM"]).start()
    started = time.monotonic()
    try:
        with pytest.raises(Preempted, match="asked to leave by SIGTERM"):
            run(fleet)
    finally:
        preemption.reset()
    assert time.monotonic() - started < 1.5


def test_another_key_is_named_and_nothing_of_it_is_said(make: Make) -> None:
    _, [server] = make(())
    stranger = Replica(server.url, "wrong", timeout_s=1.0)
    with pytest.raises(RunError, match="RLPOST_SERVER_KEY differs") as caught:
        stranger.state()
    assert "wrong" not in str(caught.value)
    with pytest.raises(RunError, match="RLPOST_SERVER_KEY differs"):
        next(stranger.generate({"version": 0, "rollouts": []}))


def test_tokens_without_log_probs_are_no_answer() -> None:
    with pytest.raises(Lost, match="2 tokens came with 1 log-probs"):
        Unit(0, 0, seed=1, max_tokens=4).take({"tokens": [3, 4], "logp": [-1.0], "finish": "stop", "spans": [[0, 1]]})


def test_an_answer_that_was_stopped_at_its_last_token_has_run_out_of_tokens() -> None:
    unit = Unit(0, 0, seed=1, max_tokens=2)
    unit.take({"tokens": [3, 4], "logp": [-1.0, -2.0], "finish": "abort", "spans": [[0, 1]]})
    assert unit.finish == "length"
