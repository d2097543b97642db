"""`rlpost try-reward` and `rlpost rescore`, as a person gives them."""

import json
import textwrap

import pytest

from rlpost.__main__ import main
from rlpost.reward_commands import read_plugins
from rlpost.samples import Samples
from rlpost.types import Group, Rollout, Task

MINE = """
    import time

    from rlpost.types import Group, Rollout, Score


    def brevity(rollout: Rollout, *, target: int = 200) -> float:
        return max(0.0, 1.0 - len(rollout.token_ids) / target)


    def hangs(rollout: Rollout) -> float:
        while "boxed" in rollout.text:
            time.sleep(1)
        return 1.0


    def raises(rollout: Rollout) -> float:
        return float(rollout.text.split("####")[1])


    def shares(group: Group) -> list[float]:
        return [1 / len(group.rollouts)] * len(group.rollouts)


    def helper(text):
        return text
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A new user's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    return tmp_path


def test_a_file_is_tried_whole_and_what_fails_is_an_error_after_the_table(mine, capsys):
    assert main(["try-reward", "mine.py", "--timeout", "0.5"]) == 1
    told = capsys.readouterr()
    for name in ("brevity", "hangs", "raises", "shares"):
        assert name in told.out
    assert "helper" not in told.out
    assert "took longer than 0.5 s, and was at mine.py:13" in told.out
    assert "raised IndexError: list index out of range at" in told.err and "on_error" in told.err


def test_one_reward_with_parameters_on_answers_of_a_file(mine, capsys):
    rows = [{"prompt": "1+1=", "answer": 2, "completion": r"\boxed{2}"}, {"completion": "ab cd", "answer": "2"}]
    (mine / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["try-reward", "math_answer", "where=boxed", "--answers", "answers.jsonl"]) == 0
    told = capsys.readouterr().out
    assert "ok" in told and "unparsable" in told and "no final answer" in told
    assert main(["try-reward", "mine.py:brevity", "target=4", "--answers", "answers.jsonl"]) == 0
    assert "0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.py:brevity", "targt=3"], "no such parameter, did you mean `target`"),
        (["mine.py:brevity", "target"], "must be key=value"),
        (["nowhere.py"], "does not exist"),
        (["{use"], "must be YAML"),
        (["final_number", "--answers", "no.jsonl"], "does not exist"),
        (["final_number", "--run", "runs/none"], "samples.jsonl must hold rollouts"),
    ],
)
def test_mistakes_are_one_message(mine, capsys, arguments, said):
    assert main(["try-reward", *arguments]) in (1, 2)
    assert said in capsys.readouterr().err


def write_run(folder, rewards):
    """A run's samples: a group of two a step, of which one says 0.50 and one .5."""
    folder.mkdir(parents=True)
    task = Task("half", "1/2=", "0.5", extra={"not": "saved"})
    samples = Samples(folder, per_step=2)
    for step, values in enumerate(rewards):
        rollouts = [
            Rollout(
                task, step, (5,), (5,), (7, 8), (-0.1, -0.2), "stop", 0, text=text, reward=x, reward_parts={"old": x}
            )
            for text, x in zip((r"\boxed{\frac{1}{2}}", r"\boxed{2}"), values, strict=True)
        ]
        samples.choose([Group(step, task, rollouts)])
        samples.write(step)
    return folder


def test_rescore_says_what_would_have_changed(mine, capsys):
    run = write_run(mine / "runs" / "a", [(0.0, 0.0), (1.0, 0.0)])
    assert main(["rescore", str(run), "--rewards", "math_answer", "--out", "new.jsonl"]) == 0
    told = capsys.readouterr().out
    assert "rollouts: 4 of 2 steps" in told
    assert "mean reward: 0.25 before, 0.5 after" in told
    assert "passed: 1 before and after, 1 only after, 0 only before" in told
    assert "1 before, 2 after, of 2" in told
    assert "step 1, task half, answer 0.5: 0.0 -> 1.0" in told
    rows = [json.loads(line) for line in (mine / "new.jsonl").read_text().splitlines()]
    assert [row["after"]["reward"] for row in rows] == [1.0, 0.0, 1.0, 0.0]


def test_rescore_sees_token_ids_groups_and_failures(mine, capsys):
    run = write_run(mine / "runs" / "a", [(1.0, 0.0)])
    each = ["{use: 'mine.py:brevity', target: 4}", "{use: 'mine.py:raises', weight: 2}"]
    assert main(["rescore", str(run), "--rewards", *each, "--group-rewards", "mine.py:shares"]) == 0
    told = capsys.readouterr().out
    assert "endings: brevity/wrong 2, raises/error 2, shares/wrong 2" in told
    assert "mean reward: 0.5 before, none after" in told
    assert "not judged after: 0" in told
    assert main(["rescore", str(run), "--rewards", "repetition"]) == 0
    assert "mean reward: 0.5 before, 0 after" in capsys.readouterr().out


def test_rewards_are_read_from_the_command_line():
    assert read_plugins(["[a, {use: b, weight: 2}]", "c.py:d"]) == [
        {"use": "a"},
        {"use": "b", "weight": 2},
        {"use": "c.py:d"},
    ]
