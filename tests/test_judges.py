"""Rewards in real processes, which are killed where they hang."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from rlpost.cluster_recipe import Failure
from rlpost.errors import Preempted, RunError
from rlpost.preempt import preemption
from rlpost.reward_recipe import bind_rewards
from rlpost.types import Group, Rollout, Task

LIMITS = Failure(reward="drop", reward_s=1.0, reward_memory_gib=0.5, reward_workers=2)
OBEYS = "hostile_rewards:obeys"


def group(*texts, id=0):
    task = Task(f"k{id}", "1+1=", "2")
    ids = {"prompt_ids": (5,), "sampled_prompt_ids": (5,), "token_ids": (7,), "behavior_logp": (-0.1,)}
    return Group(id, task, [Rollout(task, id, finish_reason="stop", version=0, text=text, **ids) for text in texts])


@pytest.fixture(scope="module")
def judged():
    """Rewards of one kind after the other, in the same processes where they may be."""
    made = {}

    def rewards(*plugins, of_groups=(), limits=LIMITS):
        key = repr((plugins, of_groups, limits))
        if key not in made:
            made[key] = bind_rewards(
                [{"use": use} for use in plugins], limits, of_groups=[{"use": use} for use in of_groups]
            )
        return made[key]

    yield rewards
    for one in made.values():
        one.close()


def endings(one, name="obeys"):
    return [rollout.verdicts[name].ending for rollout in one.rollouts]


HOSTILE = {
    "sleep": "timeout",
    "sleep_and_catch_all": "timeout",
    "block": "timeout",
    "allocate": "crash",
    "exit": "crash",
    "die": "crash",
    "segfault": "crash",
    "fail": "error",
    "nonsense": "error",
    "fork": "wrong",
}


def test_a_hostile_rollout_costs_its_own_verdict_and_no_other(judged):
    rewards = judged(OBEYS)
    one = group("right", *[text for command in HOSTILE for text in (command, "right")])
    started = time.monotonic()
    counts = rewards.score([one])
    assert dict(zip(HOSTILE, endings(one)[1::2], strict=True)) == HOSTILE
    assert set(endings(one)[::2]) == {"ok"}
    assert one.rewards == [1.0] + [x for command in HOSTILE for x in (0.0 if command == "fork" else None, 1.0)]
    assert counts == {"obeys": len(HOSTILE) - 1}
    assert time.monotonic() - started < 200


def test_a_clock_that_jumps_ahead_costs_no_verdict(judged, monkeypatch):
    rewards = judged(OBEYS)
    rewards.score([group("right", "right")])  # the processes are there
    real, started = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (0.3 < time.monotonic() - started < 3))
    one = group("slow", "right")
    assert rewards.score([one]) == {"obeys": 0}
    assert "timeout" not in endings(one)


def test_what_failed_says_where(judged):
    one = group("sleep", "fail", "segfault")
    judged(OBEYS).score([one])
    sleep, error, died = (rollout.verdicts["obeys"].note for rollout in one.rollouts)
    assert "took longer than 1 s" in sleep and "hostile_rewards.py:" in sleep
    assert "raised ValueError: as it was told at " in error and "hostile_rewards.py:" in error
    assert died == "its process was killed by SIGSEGV"


@pytest.mark.parametrize(("policy", "reward"), [("drop", None), ("zero", 0.0)])
def test_a_failure_is_dropped_or_zero_as_the_reward_says(policy, reward):
    plugin = {"use": OBEYS, "on_error": policy, "isolate": False, "timeout_s": 0.2}
    one = group("sleep", "cannot", "right")
    counts = bind_rewards([plugin, {"use": "hostile_rewards:who", "isolate": False}]).score([one])
    assert [rollout.reward_parts["obeys"] for rollout in one.rollouts] == [reward, None, 1.0]
    assert one.rewards == [None if reward is None else 1.0, 1.0, 2.0]  # what failed leaves the baseline, None the sum
    assert endings(one) == ["timeout", "unparsable", "ok"]
    assert counts["obeys"] == (2 if reward is None else 1)


def test_by_default_a_failure_ends_the_run_with_everything_that_helps(judged):
    rewards = judged(OBEYS, limits=Failure(reward_s=0.3, reward_workers=1))
    with pytest.raises(RunError, match=r"`obeys` .*raised ValueError: as it was told at .*:\d+ for task k0.*on_error"):
        rewards.score([group("right", "fail")])
    with pytest.raises(RunError, match=r"took longer than 0.3 s.*hostile_rewards.py:\d+ .*timeout_s"):
        rewards.score([group("sleep")])


def test_verdicts_do_not_depend_on_who_judges_or_when(judged):
    rewards = judged("hostile_rewards:draws", "hostile_rewards:who")
    groups = [group(*(f"{i} {j}" for j in range(6)), id=i) for i in range(4)]
    rewards.score(groups)
    first = [rollout.reward_parts["draws"] for one in groups for rollout in one.rollouts]
    assert len(set(first)) == 24
    assert [one.verdicts["who"].note for g in groups for one in g.rollouts] == [
        one.text for g in groups for one in g.rollouts
    ]
    for one in reversed(groups):
        rewards.begin(one.rollouts)
    rewards.score(groups)
    assert [rollout.reward_parts["draws"] for one in groups for rollout in one.rollouts] == first


def test_rewards_run_apart_and_the_processes_stay(judged):
    rewards = judged("hostile_rewards:draws", "hostile_rewards:who")
    one = group(*map(str, range(20)))
    rewards.score([one])
    pids = {rollout.verdicts["who"].parts["pid"] for rollout in one.rollouts}
    rewards.score([one])
    pids |= {rollout.verdicts["who"].parts["pid"] for rollout in one.rollouts}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


def test_async_rewards_wait_together_and_one_that_dies_takes_no_other(judged):
    one = group("right", "sleep", "die", "wrong", *["right"] * 9)
    started = time.monotonic()
    judged("hostile_rewards:waits").score([one])
    assert endings(one, "waits") == ["ok", "timeout", "crash", "wrong", *["ok"] * 9]
    assert time.monotonic() - started < 100  # and not a second for each


def test_a_list_is_a_groups_rollouts(judged):
    groups = [group("a", "bbb", id=0), group("a", "", id=1)]
    judged("hostile_rewards:longest").score(groups)
    assert [one.rewards for one in groups] == [[0.0, 1.0], [1.0, 0.0]]


def test_rewards_of_groups_add_to_what_their_rollouts_have(judged):
    rewards = judged(OBEYS, of_groups=["hostile_rewards:rarity"])
    one = group("right", "right", "wrong", "cannot")
    rewards.score([one])
    assert one.rewards == [1.0, 1.0, 0.0, None]
    rewards.score_groups([one, Group(1, one.task, [])])
    assert one.rewards == [1.5, 1.5, 0.75, None]
    assert [rollout.passed for rollout in one.rollouts] == [True, True, False, None]
    assert rewards.weights == {"obeys": 1.0, "rarity": 1.0}


def test_a_group_reward_with_too_few_values_is_an_error(judged):
    with pytest.raises(RunError, match="returned 1 values for 2 rollouts"):
        judged(OBEYS, of_groups=["hostile_rewards:too_few"], limits=Failure()).score_groups([group("a", "b")])


def test_what_a_killed_reward_has_started_dies_with_it(tmp_path):
    mark = tmp_path / "pid"
    with closing(bind_rewards([{"use": OBEYS, "mark": str(mark)}], LIMITS)) as rewards:
        rewards.score([group("leave_a_child_and_hang")])
        wait_until(lambda: not lives(int(mark.read_text())))
    with closing(bind_rewards([{"use": OBEYS, "mark": str(mark)}])) as rewards:
        rewards.score([group("leave_a_child")])
        assert lives(int(mark.read_text()))  # it may be a helper that the reward means to keep
    wait_until(lambda: not lives(int(mark.read_text())))


def test_a_run_that_is_asked_to_leave_does_not_wait_for_a_reward():
    with closing(bind_rewards([{"use": OBEYS}], Failure(reward_s=None, reward_workers=1))) as rewards:
        rewards.score([group("right")])
        rewards.begin(group("sleep").rollouts)
        preemption.ask("SIGTERM")
        try:
            with pytest.raises(Preempted, match="SIGTERM"):
                rewards.score([group("sleep")])
        finally:
            preemption.reset()


def test_the_processes_end_with_one_that_is_killed(tmp_path):
    program = """
        import os, sys, time
        from test_judges import OBEYS, group
        from rlpost.reward_recipe import bind_rewards
        if __name__ == "__main__":
            rewards = bind_rewards([{"use": "hostile_rewards:who"}])
            one = group("a")
            rewards.score([one])
            print(int(one.rollouts[0].verdicts["who"].parts["pid"]), flush=True)
            time.sleep(600)
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        worker = int(process.stdout.readline())
        assert lives(worker)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not lives(worker))


def lives(pid):
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
