import asyncio
import math
import re
import time
from functools import partial
from pathlib import Path

import pytest

from rlpost.cluster_recipe import Failure
from rlpost.errors import Preempted, RecipeError, RunError
from rlpost.plugins import make_importable
from rlpost.preempt import preemption
from rlpost.reward_recipe import bind_rewards
from rlpost.score import BoundReward, score
from rlpost.types import Group, Rollout, Task


def group(*texts):
    task = Task("k1", "1+1=", "2")
    ids = {"prompt_ids": (5,), "sampled_prompt_ids": (5,), "token_ids": (7,), "behavior_logp": (-0.1,)}
    rollouts = [Rollout(task, group=0, finish_reason="stop", version=0, text=text, **ids) for text in texts]
    return Group(0, task, rollouts)


def exact(rollout):
    return rollout.text == rollout.task.answer


def short(rollout, *, limit):
    return float(len(rollout.text) <= limit) if rollout.text else None


def test_reward_is_the_weighted_sum_of_its_parts():
    one = group("2", "123")
    unjudged = score([one], [BoundReward("exact", 1.0, exact), BoundReward("short", 0.5, partial(short, limit=2))])
    assert one.rewards == [1.5, 0.0]
    assert [rollout.reward_parts for rollout in one.rollouts] == [
        {"exact": 1.0, "short": 1.0},
        {"exact": 0.0, "short": 0.0},
    ]
    assert unjudged == {"exact": 0, "short": 0}


def test_a_part_that_cannot_judge_leaves_the_sum_and_is_counted():
    one = group("", "2")
    unjudged = score([one], [BoundReward("exact", 1.0, exact), BoundReward("short", 0.5, partial(short, limit=2))])
    assert one.rewards == [0.0, 1.5]
    assert one.rollouts[0].reward_parts == {"exact": 0.0, "short": None}
    assert unjudged == {"exact": 0, "short": 1}


def test_a_rollout_that_no_part_could_judge_has_no_reward():
    one = group("", "2")
    assert score([one], [BoundReward("short", 0.5, partial(short, limit=2))]) == {"short": 1}
    assert one.rewards == [None, 0.5]


def test_scoring_again_forgets_the_parts_of_before():
    one = group("2")
    score([one], [BoundReward("old", 1.0, exact)])
    score([one], [BoundReward("new", 1.0, exact)])
    assert one.rollouts[0].reward_parts == {"new": 1.0}


def test_async_rewards_wait_together():
    waiting = []

    async def judge(rollout, *, answer):
        waiting.append(rollout)
        while len(waiting) < 3:
            await asyncio.sleep(0)
        return rollout.text == answer

    one = group("2", "3", "2")
    score([one], [BoundReward("judge", 2.0, partial(judge, answer="2"))])
    assert one.rewards == [2.0, 0.0, 2.0]


def raises_in_a_helper(rollout):
    return helper(rollout)


def helper(rollout):
    return int(rollout.text)  # the line that raises


async def raises_async(rollout):
    await asyncio.sleep(0)
    return helper(rollout)


@pytest.mark.parametrize("call", [raises_in_a_helper, raises_async])
def test_a_reward_that_raises_names_itself_the_task_and_the_line(call):
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "# the line that raises" in text)
    one = group("2", "two")
    with pytest.raises(RunError) as caught:
        score([one], [BoundReward("broken", 1.0, call)])
    message = str(caught.value)
    for part in ("reward `broken`", "ValueError: invalid literal", f"{__file__}:{line} ", "task k1", "'two'", "None"):
        assert part in message


def test_a_reward_that_raises_inside_a_library_names_the_users_line():
    import json

    def parse(rollout):
        return json.loads(rollout.text)

    with pytest.raises(RunError, match=rf"{__file__}:\d+ for task k1"):
        score([group("{")], [BoundReward("parse", 1.0, parse)])


@pytest.mark.parametrize("value", ["1", math.nan, math.inf, [1.0], {}])
def test_a_reward_that_is_no_finite_number_is_refused(value):
    with pytest.raises(
        RunError,
        match=r"`odd` must judge .*, and returned .*must return a finite number.*test_score\.py.*task k1",
    ):
        score([group("2")], [BoundReward("odd", 1.0, lambda rollout: value)])


def test_numbers_of_other_kinds_are_numbers():
    import numpy as np

    one = group("2")
    score([one], [BoundReward("np", 1.0, lambda rollout: np.float32(0.5)), BoundReward("int", 1.0, lambda rollout: 2)])
    assert one.rewards == [2.5]
    assert type(one.rewards[0]) is float


def test_bound_rewards_have_their_weights_and_distinct_part_names(tmp_path):
    (tmp_path / "mylab_score_test.py").write_text(
        "def brevity(rollout, *, limit: int = 3):\n    return float(len(rollout.text) <= limit)\n\n"
        "def mean(rollout):\n    return 0.5\n"
    )
    make_importable(tmp_path)
    use = "mylab_score_test:brevity"
    rewards = bind_rewards([{"use": use}, {"use": use, "weight": 0.5, "limit": 1}, {"use": "mylab_score_test:mean"}])
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("brevity", 1.0),
        ("brevity_2", 0.5),
        ("mean_2", 1.0),
    ]
    one = group("22")
    score([one], rewards)
    assert one.rewards == [1.5]
    assert one.rollouts[0].reward_parts == {"brevity": 1.0, "brevity_2": 0.0, "mean_2": 0.5}
    with pytest.raises(RecipeError, match=r"rewards\.0\.weight must be a finite number \(got 'much'\)"):
        bind_rewards([{"use": use, "weight": "much"}])


def never(rollout):
    while rollout.text == "hang":
        time.sleep(0.01)
    return 1.0


async def never_async(rollout):
    if rollout.text == "hang":
        await asyncio.sleep(3600)
    return 1.0


@pytest.mark.parametrize("hung", [never, never_async])
def test_a_reward_that_takes_too_long_leaves_its_rollout_unjudged_or_ends_the_run(hung):
    one = group("2", "hang", "3")
    left_out = BoundReward("slow", 1.0, hung, Failure(reward_s=0.2, reward="drop"))
    assert score([one], [left_out]) == {"slow": 1}
    assert one.rewards == [1.0, None, 1.0]
    place = re.escape(__file__)
    with pytest.raises(
        RunError, match=rf"`slow` must judge .*longer than 0.2 s.*{place}.*task k1.*'hang'.*failure.reward_s"
    ):
        score([one], [BoundReward("slow", 1.0, hung, Failure(reward_s=0.2))])


@pytest.mark.parametrize("waits", [never, never_async])
def test_a_rank_that_scores_leaves_when_it_is_asked_to(waits):
    """Between rollouts, or while it waits for async ones."""
    texts = ("2", "hang") if waits is never_async else ("2", "3")
    preemption.ask("SIGTERM")
    try:
        with pytest.raises(Preempted, match="SIGTERM"):
            score([group(*texts)], [BoundReward("slow", 1.0, waits)])
    finally:
        preemption.reset()
