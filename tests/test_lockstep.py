"""Answers in several turns, with a scripted generator: one token a character, log-prob -1 for each that it wrote."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from groups import Letters

from rlpost.batch import document
from rlpost.collect import answers, collect
from rlpost.errors import Preempted, RunError
from rlpost.losses import ppo_clip, weighted_sum
from rlpost.packing import Packer
from rlpost.preempt import preemption
from rlpost.saved_groups import group_of, saved
from rlpost.talk import Turn
from rlpost.turns.calculator import calculator
from rlpost.types import Group, Request, Sampling, Task

END = 0
TASKS = [Task("a", "1+1="), Task("b", "2+2="), Task("c", "3+3=")]


class Scripted:
    """Says to each prompt what `says` gives for (prompt, place in the request), cut at its stop texts and its limit."""

    def __init__(self, says):
        self.says, self.calls = says, []

    def generate(self, requests, sampling):
        self.calls.append((list(requests), sampling))
        return [self._one(request, i, sampling) for request in requests for i in range(request.n)]

    def _one(self, request, i, sampling):
        text = self.says("".join(map(chr, request.prompt_ids)), i)
        ends = [text.index(stop) + len(stop) for stop in sampling.stop if stop in text]
        ids = [*map(ord, text[: min(ends)])] if ends else [*map(ord, text), END]
        limit = request.max_new_tokens(sampling)
        reason = "stop" if len(ids) <= limit else "length"
        ids = ids[:limit]
        return request.rollout(ids, [-1.0] * len(ids), finish_reason=reason, version=3, text="")


def ask(function, says, *, n=2, tasks=TASKS[:1], max_new_tokens=40, whole=None):
    """The rollouts, and the generator that was asked for them."""
    generator, renderer = Scripted(says), Letters()
    sampling = Sampling(max_new_tokens, stop_ids=(END,), rollout=function)
    requests = [Request(i, task, renderer.prompt_ids(task), n, seed=100 * (i + 1)) for i, task in enumerate(tasks)]
    return answers(generator, renderer, requests, sampling, whole=whole), generator


def by_calls(prompt, i):
    """Rollout 0 of a request calls twice, the others end at once."""
    if i and "]" not in prompt:
        return "#2"
    return {0: "[1+1]", 1: "[2+2]", 2: "#4"}[prompt.count("]")]


async def brackets(talk):
    await calculator(talk, begin="[", end="]", result="{}")


def test_what_a_tool_says_stands_between_the_turns_and_has_no_log_prob():
    [two, none], _ = ask(brackets, by_calls)
    assert two.text == "[1+1]2[2+2]4#4\0" and two.finish_reason == "stop" and two.version == 3
    assert two.token_ids == tuple(map(ord, two.text)) and two.prompt_ids == two.sampled_prompt_ids
    unknown = [i for i, logp in enumerate(two.behavior_logp) if math.isnan(logp)]
    assert unknown == [5, 11] and set(two.behavior_logp) - {two.behavior_logp[5], two.behavior_logp[11]} == {-1.0}
    assert two.turns == (
        Turn("policy", "[1+1]", 5, stop="]"),
        Turn("tool", "2", 1),
        Turn("policy", "[2+2]", 5, stop="]"),
        Turn("tool", "4", 1),
        Turn("policy", "#4\0", 3),
    )
    assert (two.num_written, none.num_written, len(none.turns)) == (13, 3, 1)


def test_a_round_is_one_call_for_all_talks_that_wait():
    rollouts, generator = ask(brackets, by_calls, n=3, tasks=TASKS)
    assert [len(one.turns) for one in rollouts] == [5, 1, 1] * 3
    assert [[(one.group, one.n) for one in requests] for requests, _ in generator.calls] == [
        [(0, 3), (1, 3), (2, 3)],
        [(0, 1), (1, 1), (2, 1)],
        [(0, 1), (1, 1), (2, 1)],
    ]
    assert [sampling.stop for _, sampling in generator.calls] == [("]",)] * 3
    assert all(sampling.rollout is None for _, sampling in generator.calls)


def test_different_stop_texts_are_different_calls_of_a_round():
    async def two_kinds(talk):
        await talk.generate(stop="]" if talk.place % 2 else ("+", "-"))

    _, generator = ask(two_kinds, lambda prompt, i: "[1+1]", n=4)
    assert [(sampling.stop, [one.n for one in requests]) for requests, sampling in generator.calls] == [
        (("+", "-"), [1, 1]),
        (("]",), [1, 1]),
    ]


def test_prompts_and_seeds_of_later_turns_follow_from_the_answer_alone():
    rollouts, alone = ask(brackets, by_calls)
    _, together = ask(brackets, by_calls, tasks=TASKS)
    first, second, third = (requests[0] for requests, _ in alone.calls)
    assert (first.seed, first.n, first.known) == (100, 2, 0)
    prompt = len("1+1=")
    assert second.prompt_ids == (*first.prompt_ids, *rollouts[0].token_ids[:6]) and third.n == second.n == 1
    assert (second.known, third.known) == (prompt + 5 - 1, prompt + 11 - 1)  # all but the last written one
    assert len({first.seed, second.seed, third.seed}) == 3
    for (requests, _), (more, _) in zip(alone.calls, together.calls, strict=True):
        assert requests[0] == more[0]


def test_the_first_turn_is_drawn_as_a_plain_answer():
    async def once(talk):
        await talk.generate()

    rollouts, generator = ask(once, lambda prompt, i: f"#{i}", n=4, tasks=TASKS)
    plain = Scripted(lambda prompt, i: f"#{i}")
    requests = [Request(i, task, Letters().prompt_ids(task), 4, seed=100 * (i + 1)) for i, task in enumerate(TASKS)]
    expected = answers(plain, Letters(), requests, Sampling(40, stop_ids=(END,)))
    [(asked, _)] = generator.calls
    assert [(one.prompt_ids, one.n, one.seed) for one in asked] == [(x.prompt_ids, x.n, x.seed) for x in requests]
    assert [(one.token_ids, one.behavior_logp) for one in rollouts] == [
        (one.token_ids, one.behavior_logp) for one in expected
    ]


def test_room_holds_for_policy_and_tools_together():
    seen = []

    async def talkative(talk):
        seen.append(talk.room)
        await talk.generate(stop="]")
        seen.append(talk.room)
        talk.append("x" * 20)
        seen.append(talk.room)
        turn = await talk.generate()
        seen.append((turn.text, turn.ended))

    [one], generator = ask(talkative, by_calls, n=1, max_new_tokens=12)
    assert seen == [12, 7, 0, ("", "length")] and len(generator.calls) == 1
    assert one.text == "[1+1]" + "x" * 7 and one.truncated and one.turns[-1] == Turn("tool", "x" * 7, 7)


def test_room_ends_with_the_context():
    async def once(talk):
        await talk.generate()

    [one], _ = ask(once, lambda prompt, i: "y" * 99, n=1, max_new_tokens=1000)
    assert len(one.token_ids) == Letters.context - len("1+1=") and one.truncated


def test_a_turn_s_own_limit_binds_also_where_a_generator_does_not_know_of_it():
    ended = []

    class Deaf(Scripted):
        def _one(self, request, i, sampling):
            ids = [*map(ord, self.says("", i)), END]
            return request.rollout(ids, [-1.0] * len(ids), finish_reason="stop", version=0, text="")

    async def short(talk):
        ended.append((await talk.generate(max_new_tokens=3)).ended)

    sampling = Sampling(40, stop_ids=(END,), rollout=short)
    [one] = answers(Deaf(lambda prompt, i: "12345"), Letters(), [Request(0, TASKS[0], (1,), 1, seed=0)], sampling)
    assert (one.text, one.behavior_logp, ended) == ("123", (-1.0,) * 3, ["length"]) and one.truncated


def test_a_stop_text_binds_also_where_a_generator_goes_on_behind_it():
    class Deaf(Scripted):
        def _one(self, request, i, sampling):
            return super()._one(request, i, replace(sampling, stop=()))

    def says(prompt, i):
        return by_calls(prompt, i) + (" [9+9]" if by_calls(prompt, i).endswith("]") else "")

    rollouts, _ = ask(brackets, says)
    deaf = Deaf(says)
    sampling = Sampling(40, stop_ids=(END,), rollout=brackets)
    again = answers(deaf, Letters(), [Request(0, TASKS[0], Letters().prompt_ids(TASKS[0]), 2, seed=100)], sampling)
    assert [repr(one) for one in again] == [repr(one) for one in rollouts]  # NaN is not itself, and reads the same
    assert again[0].turns[0] == Turn("policy", "[1+1]", 5, stop="]")


def test_each_token_keeps_the_version_that_wrote_it():
    class Moving(Scripted):
        def _one(self, request, i, sampling):
            one = super()._one(request, i, sampling)
            first = 3 + len(self.calls)
            return replace(one, version=first, later_versions=((2, 5), (4, 6)) if first == 4 else ())

    generator = Moving(by_calls)
    sampling = Sampling(40, stop_ids=(END,), rollout=brackets)
    [one] = answers(generator, Letters(), [Request(0, TASKS[0], (1,), 1, seed=0)], sampling)
    # [1+1]2 by 4, 5 from the second token on, 6 from the last on; [2+2]4 by 5; #4 by 6
    assert one.versions == ((0, 4), (2, 5), (4, 6), (6, 5), (12, 6))
    [again] = group_of(saved(Group(0, TASKS[0], []), [one])).rollouts
    assert repr(again) == repr(one)


def test_tools_of_many_answers_run_beside_each_other():
    meeting = threading.Barrier(8, timeout=20)

    async def together(talk):
        await talk.generate(stop="]")
        talk.append(str(await talk.run(meeting.wait) < 8))
        await talk.generate()

    rollouts, generator = ask(together, lambda prompt, i: "#" if "]" in prompt else "[1+1]", n=8)
    assert {one.text for one in rollouts} == {"[1+1]True#\0"} and len(generator.calls) == 2


def test_a_tool_that_takes_too_long_may_be_told_of_and_holds_nobody():
    async def patient(talk):
        await talk.generate(stop="]")
        try:
            await talk.run(time.sleep, 60, seconds=0.05)
        except TimeoutError:
            talk.append("?", error=True)

    started = time.monotonic()
    rollouts, _ = ask(patient, by_calls, n=40)
    assert time.monotonic() - started < 10
    assert all(one.turns[-1] == Turn("tool", "?", 1, error=True) for one in rollouts)


async def fails_in_a_tool(talk):
    await talk.generate(stop="]")
    if talk.task.key == "b" and talk.place == 1:
        await talk.run(int, "seven")


async def returns_at_once(talk):
    talk.append("7")


async def asks_twice_at_once(talk):
    await asyncio.gather(talk.generate(), talk.generate())


async def stops_at_nothing(talk):
    await talk.generate(stop=("]", ""))


async def leaves(talk):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails_in_a_tool, r"^rollout `fails_in_a_tool` .*raised ValueError: .*'seven' at .*test_lockstep\.py:\d+ for "
        r"task b, whose answer so far ends '\[1\+1\]': mend it"),
        (returns_at_once, "RuntimeError: it returned without having awaited talk.generate at .*test_lockstep"),
        (asks_twice_at_once, "RuntimeError: talk.generate must be awaited before it is called again"),
        (stops_at_nothing, r"ValueError: talk.generate must have texts in `stop` .*\('\]', ''\)"),
        (leaves, r"raised SystemExit: 3 at .*test_lockstep\.py:\d+ for task a"),
    ],
)  # fmt: skip
def test_what_a_function_raises_is_one_message_with_its_place_and_the_task(function, message):
    ended = []

    async def watched(talk):
        try:
            await function(talk)
        finally:
            ended.append(talk)

    watched.__wrapped__ = function
    with pytest.raises(RunError, match=message.replace(f"`{function.__name__}`", "`watched`")):
        ask(watched, lambda prompt, i: "[1+1]", tasks=TASKS)
    assert len(ended) == 6  # nothing goes on behind the error


def test_a_generator_that_fails_ends_the_talks():
    ended = []

    async def watched(talk):
        try:
            await talk.generate()
        finally:
            ended.append(talk)

    def says(prompt, i):
        raise RunError("no memory")

    with pytest.raises(RunError, match=r"^no memory$"):
        ask(watched, says)
    assert len(ended) == 2


def test_the_wait_for_tools_looks_whether_the_run_has_been_asked_to_leave():
    async def waits(talk):
        await talk.generate(stop="]")
        preemption.ask("the test")
        await asyncio.sleep(600)

    started = time.monotonic()
    try:
        with pytest.raises(Preempted, match="the test"):
            ask(waits, by_calls)
    finally:
        preemption.reset()
    assert time.monotonic() - started < 10


def test_a_request_is_told_of_as_soon_as_its_last_talk_has_ended_and_with_these_very_rollouts():
    told = []

    def says(prompt, i):
        told.append("call")
        return by_calls(prompt, i) if prompt.startswith("1") else "#"

    rollouts, _ = ask(brackets, says, tasks=TASKS[:2], whole=told.append)
    groups = [one for one in told if one != "call"]
    assert [id(one) for group in groups for one in group] == [id(one) for one in (*rollouts[2:], *rollouts[:2])]
    assert [one == "call" for one in told] == [True] * 4 + [False] + [True] * 2 + [False]


def test_it_works_in_a_thread_beside_the_loop():
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(brackets, by_calls)[0]))
    thread.start()
    thread.join(20)
    assert [one.text for one in found[0]] == [one.text for one in ask(brackets, by_calls)[0]]


def test_groups_have_their_rollouts_and_given_answers_are_nobody_s_turn():
    generator = Scripted(by_calls)
    sampling = Sampling(40, stop_ids=(END,), rollout=brackets)
    places = list(enumerate(TASKS))
    groups = collect(generator, Letters(), places, sampling, group_size=2, first_group=7, seed=1)
    assert [(group.id, [len(one.turns) for one in group.rollouts]) for group in groups] == [
        (7, [5, 1]), (8, [5, 1]), (9, [5, 1])
    ]  # fmt: skip
    given = Request(7, TASKS[0], (1,), 1, seed=0, role="expert", given="#2")
    [one] = answers(generator, Letters(), [given], sampling)
    assert one.turns == () and one.text == "#2"


def test_hints_stay_out_of_the_loss_and_roles_stay():
    request = Request(0, TASKS[0], (9, 9, 1), 1, seed=0, loss_prompt_ids=(1,), role="guided", hint="h", level=2)
    [one] = answers(Scripted(by_calls), Letters(), [request], Sampling(40, stop_ids=(END,), rollout=brackets))
    assert (one.prompt_ids, one.sampled_prompt_ids) == ((1,), (9, 9, 1)) and len(one.turns) == 5
    assert (one.role, one.hint, one.level, one.off_policy) == ("guided", "h", 2, True)


def test_the_gradient_of_what_tools_wrote_is_exactly_zero():
    rollouts, _ = ask(brackets, by_calls)
    for one in rollouts:
        one.reward = 1.0
    documents = [document(one) for one in rollouts]
    micro = Packer(64, 64, torch.device("cpu")).micro([documents])
    written = [not math.isnan(logp) for one in rollouts for logp in one.behavior_logp]
    spoken = micro.document_BT.ge(0)
    assert micro.num_trained == sum(written) == sum(one.num_written for one in rollouts)
    logp_BT = torch.full(micro.mask_BT.shape, -1.5, requires_grad=True)
    loss_BT, _ = ppo_clip(logp_BT, micro.behavior_logp_BT, torch.ones_like(logp_BT), clip_low=0.9, clip_high=0.9)
    weighted_sum(loss_BT, torch.where(micro.mask_BT, 1.0, 0.0), 1).backward()
    answer_BT = torch.zeros_like(spoken)
    start = 0
    for one in rollouts:  # position s speaks of token s + 1
        stop = start + len(one.prompt_ids) + len(one.token_ids)
        answer_BT[0, start + len(one.prompt_ids) - 1 : stop - 1] = True
        start = stop
    assert (logp_BT.grad[answer_BT] != 0).tolist() == written
    assert not logp_BT.grad[~answer_BT].any()
