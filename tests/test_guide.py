import json
from dataclasses import replace

import pytest
from groups import TASK, Letters, group, guided, rollout, sampling

from rlpost.errors import RunError
from rlpost.explore._hints import HintSource, copied_frac, first_parts, leaks, read_hints, with_hint
from rlpost.explore.expert import Expert
from rlpost.explore.guide import Guide
from rlpost.types import Outcome, Task


def guide(**asked):
    return Guide(seed=0, renderer=Letters(), sampling=sampling(), **{"template": "{prompt}|{hint}", **asked})


def levels(requests):
    return [(request.level, request.hint, request.n) for request in requests]


def test_a_hint_is_due_where_all_have_failed():
    one = group(False, False)
    [request] = guide(n=3).more(one)
    assert (request.level, request.hint, request.n, request.role, request.group) == (1, "weak", 3, "guided", 0)
    assert request.prompt_ids == tuple(map(ord, "7-0+6-3=|weak"))
    assert request.loss_prompt_ids == tuple(map(ord, "7-0+6-3="))
    assert request.seed == 102
    for others in ((True, False), (None, None), ()):
        assert guide().more(group(*others)) == []
    assert guide(threshold=0.5).more(group(True, False)) != [] != guide(threshold=1.0).more(group(True, True))


def test_the_ladder_goes_on_until_a_level_succeeds():
    ladder, one = guide(), group(False, False)
    one.rollouts += [guided(False), guided(False)]
    assert levels(ladder.more(one)) == [(2, "strong", 8)]
    one.rollouts.append(guided(True, level=2))
    assert ladder.more(one) == []
    one.rollouts[-1] = guided(False, level=2)
    assert ladder.more(one) == []  # no level is left


def test_all_levels_at_once_have_seeds_of_their_own():
    requests = guide(ladder="all", n=4).more(group(False, False))
    assert levels(requests) == [(1, "weak", 4), (2, "strong", 4)]
    assert [request.seed for request in requests] == [102, 106]


def test_a_ladder_remembers_where_a_task_succeeded_and_resumes_with_it():
    one, again = guide(remember=True), guide(remember=True)
    one.observe([Outcome("a", (0.0,), 0, (False,), ((1, False), (2, True)))])
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert levels(again.more(group(False))) == [(2, "strong", 8)]
    assert levels(guide().more(group(False))) == [(1, "weak", 8)]


def test_the_loss_may_condition_on_the_hint():
    [request] = guide(prompt="hinted").more(group(False))
    assert request.loss_prompt_ids is None
    answer = request.rollout((1,), (-1.0,), finish_reason="stop", version=0, text="")
    assert not answer.off_policy and answer.role == "guided"
    [request] = guide().more(group(False))
    assert request.rollout((1,), (-1.0,), finish_reason="stop", version=0, text="").off_policy


def test_hints_come_late_and_fade():
    faded, one = guide(start_step=2, fade_from=10, fade_steps=10), [group(False, id=i) for i in range(200)]

    def share(step):
        faded.begin(step, one)
        return sum(bool(faded.more(each)) for each in one) / len(one)

    assert [share(step) for step in (0, 1, 2, 10, 20, 25)] == [0, 0, 1, 1, 0, 0]
    assert 0.4 < share(15) < 0.6


def test_what_does_not_fit_is_counted_and_not_cut():
    long = replace(TASK, hints=("weak", "x" * 60))
    one = guide(ladder="all")
    assert levels(one.more(group(False, task=long))) == [(1, "weak", 8)]
    assert one.metrics() == {"too_long": 1.0, "leaks": 0.0}
    assert one.metrics() == {"too_long": 0.0, "leaks": 0.0}


def test_a_hint_with_the_answer_in_it_is_counted_and_skipped_on_request():
    telling = replace(TASK, hints=("it is 10", "strong"))
    for how, expected in (("use", [(1, "it is 10", 8)]), ("skip", [(2, "strong", 8)])):
        one = guide(leaks=how)
        assert levels(one.more(group(False, task=telling))) == expected
        assert one.metrics()["leaks"] == 1


def chosen(place, *answers, own=(False, False, False), **asked):
    one = group(*own)
    one.rollouts += answers
    guide(place=place, **asked).choose(one)
    return [(rollout.role, rollout.passed) for rollout in one.rollouts], len(one.left_out)


F, G, B = ("policy", False), ("guided", True), ("guided", False)


@pytest.mark.parametrize(
    ("place", "answers", "expected"),
    [
        ("group", [guided(True), guided(False)], ([G, B], 3)),
        ("group", [guided(False), guided(False)], ([F, F, F], 2)),
        ("group", [guided(False), guided(True, level=2)], ([G], 4)),
        ("add", [guided(True), guided(False)], ([F, F, F, G, B], 0)),
        ("failures", [guided(True), guided(False), guided(True)], ([F, F, G], 3)),
    ],
)
def test_guided_answers_take_the_place_that_the_recipe_gives_them(place, answers, expected):
    assert chosen(place, *answers) == expected


def test_up_to_k_failures_give_way():
    assert chosen("failures", guided(True), guided(True), k=2) == ([F, G, G], 2)
    assert chosen("failures", guided(True), guided(True), own=(True, False), k=2) == ([("policy", True), G], 2)


def test_an_answer_that_copies_its_hint_is_left_out_on_request():
    copy, own = (guided(True, hint="first add the tens", text=text) for text in ("first add the tens, 10", "so 10"))
    assert chosen("group", copy, own, copy_limit=0.5) == ([G], 4)
    assert chosen("group", copy, own) == ([G, G], 3)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"use": "column"}, ["weak", "strong"]),
        ({"use": "answer"}, ["10"]),
        ({"use": "solution", "levels": (0.5, -1), "separator": ";"}, ["7-0=7;7+6=13;", "7-0=7;7+6=13;13-3=10;"]),
        ({"use": "solution", "levels": (0.25, 1.0), "unit": "characters"}, ["7-0=7;", TASK.solution]),
        ({"use": "file", "written": {"a": ["x", "y"]}}, ["x", "y"]),
        ({"use": "file", "written": {"b": ["x"]}}, []),
    ],
)
def test_hints_come_from_where_the_recipe_says(asked, expected):
    assert HintSource(**asked).of(TASK) == expected


def test_first_parts_grow_and_are_never_empty():
    assert first_parts("one two three four", [0.1, 0.2, 0.5, 1.0], "words", "") == [
        "one",
        "one two",
        "one two three four",
    ]
    assert first_parts("a\nb\nc", [-2, -1], "steps", "\n") == ["a\n", "a\nb\n"]
    assert first_parts("a", [-1], "steps", "\n") == []
    assert first_parts("", [0.5], "words", "") == []


def test_a_hint_stands_in_the_last_message():
    task = Task("a", [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}])
    hinted = with_hint(task, "h", "{prompt} {hint}")
    assert hinted.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1= h"}]
    assert task.prompt[-1]["content"] == "1+1="


@pytest.mark.parametrize(
    ("hint", "answer", "expected"),
    [
        ("so x = 10.", "10", True),
        ("so x = 10.5", "10", False),
        ("110 or 101", "10", False),
        ("(10)", "10", True),
        ("x", "", False),
        ("x", None, False),
        ("the answer is -3", "-3", True),
        ("use \\frac{1}{2} here", "\\frac{1}{2}", True),
    ],
)
def test_leaks(hint, answer, expected):
    assert leaks(hint, answer) is expected


def test_copied_frac_ignores_spacing():
    assert copied_frac("add  the\ntens first", "we add the tens first") == 1.0
    assert 0 < copied_frac("add the tens first, then the ones", "add the tens first, and so on") < 1
    assert copied_frac("", "x") == 0.0 == copied_frac("ab", "xyz") and copied_frac("ab", "xaby") == 1.0


def test_a_torn_last_line_of_hints_is_left_out_and_any_other_is_an_error(tmp_path):
    file = tmp_path / "hints.jsonl"
    file.write_text('{"key": "a", "hints": ["x"]}\n{"key": "b", "hi')
    assert read_hints(file) == {"a": ["x"]}
    file.write_text('{"key": "a"}\n')
    with pytest.raises(RunError, match="line 1"):
        read_hints(file)
    with pytest.raises(RunError, match="rlpost hints"):
        read_hints(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"source": "web"}, "source must be one of"),
        ({"source": "solution"}, "levels must be given for source=solution"),
        ({"source": "solution", "levels": [0.0]}, "levels must be shares in"),
        ({"source": "solution", "levels": [-1.5]}, "levels must be shares in"),
        ({"template": "{prompt}"}, "template must be a text with {hint}"),
        ({"source": "file"}, "path must be given"),
        ({"threshold": 2.0}, "threshold must be in"),
        ({"place": "first"}, "place must be one of group, failures, add"),
    ],
)
def test_parameters_that_make_no_sense_are_named(asked, words):
    with pytest.raises(RunError, match=words):
        guide(**asked)


def expert(**asked):
    return Expert(renderer=Letters(), **asked)


def test_an_experts_solution_comes_once_and_is_certain():
    one = group(True, False)
    [request] = expert().more(one)
    assert (request.given, request.role, request.n) == (TASK.solution, "expert", 1)
    one.rollouts.append(rollout(True, role="expert"))
    assert expert().more(one) == []


def test_an_expert_is_asked_only_below_its_threshold():
    assert expert(threshold=0.0).more(group(True, False)) == []
    assert len(expert(threshold=0.0).more(group(False, False))) == 1
    assert len(expert(field="trace").more(group(False, task=replace(TASK, extra={"trace": "x"})))) == 1


def test_what_an_expert_cannot_say_is_counted():
    one = expert()
    assert one.more(group(False, task=replace(TASK, solution=None))) == []
    assert one.more(group(False, task=replace(TASK, solution="x" * 80))) == []
    assert one.metrics() == {"too_long": 1.0, "missing": 1.0}


def test_an_expert_takes_the_place_of_a_failure():
    one = group(True, False, False)
    one.rollouts.append(rollout(True, role="expert"))
    expert(place="failures").choose(one)
    assert [(each.role, each.passed) for each in one.rollouts] == [("policy", True), F, ("expert", True)]
