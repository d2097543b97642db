import base64
import json
from array import array

from rlpost.report.rollouts import text_of
from rlpost.rescore import rollout_of
from rlpost.samples import Samples, best_and_worst, prompt_text, render, sample
from rlpost.talk import Turn
from rlpost.types import Group, Rollout, Task


def rollout(reward, text="out", key="a"):
    return Rollout(
        Task(key, "1+1=", "2"),
        group=0,
        prompt_ids=(5, 6),
        sampled_prompt_ids=(5, 6),
        token_ids=(7, 8, 1),
        behavior_logp=(-0.1, -0.2, -0.3),
        finish_reason="stop",
        version=0,
        text=text,
        reward=reward,
        reward_parts={"exact": reward},
    )


def rewards(rollouts):
    return [one.reward for one in rollouts]


def test_best_and_worst_come_in_turn_and_unjudged_last():
    rollouts = [rollout(x) for x in (0.2, None, 1.0, 0.0, 0.5)]
    assert rewards(best_and_worst(rollouts, 9)) == [1.0, 0.0, 0.5, 0.2, None]
    assert rewards(best_and_worst(rollouts, 3)) == [1.0, 0.0, 0.5]
    assert rewards(best_and_worst([rollout(0.5)], 4)) == [0.5]
    assert best_and_worst([], 4) == []


def test_written_sample_says_what_a_reader_needs(tmp_path):
    group = Group(0, Task("a", "1+1=", "2"), [rollout(1.0, text="ä2"), rollout(0.0)])
    samples = Samples(tmp_path, per_step=1)
    samples.choose([group])
    samples.write(3)
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "ä2" in text
    assert json.loads(text) == {
        "step": 3,
        "group": 0,
        "task": "a",
        "prompt": "1+1=",
        "answer": "2",
        "completion": "ä2",
        "reward": 1.0,
        "parts": {"exact": 1.0},
        "finish_reason": "stop",
        "num_tokens": 3,
        "token_ids": base64.b64encode(array("I", [7, 8, 1]).tobytes()).decode(),
    }


def test_figures_of_tokens_stand_in_the_sample_and_are_forgotten_with_the_step(tmp_path):
    samples = Samples(tmp_path, per_step=2)
    samples.choose([Group(0, Task("a", "1+1=", "2"), [rollout(1.0), rollout(0.0)])])
    samples.write(0, [{"advantage": 0.5}, {"advantage": -0.5}])
    samples.write(0)
    rows = [json.loads(line) for line in samples.path.read_text().splitlines()]
    assert [(row["reward"], row["tokens"]) for row in rows] == [(1.0, {"advantage": 0.5}), (0.0, {"advantage": -0.5})]


def test_short_runs_of_tokens_are_decoded_once(tmp_path):
    asked = []
    decode = Samples(tmp_path, per_step=1).remembered(lambda ids: asked.append(ids) or "x")
    assert [decode((5,)), decode((5,)), decode((5, 6))] == ["x", "x", "x"]
    assert asked == [(5,), (5, 6)]


def test_rewind_forgets_later_steps(tmp_path):
    samples = Samples(tmp_path, per_step=2)
    group = Group(0, Task("a", "1+1=", "2"), [rollout(1.0), rollout(0.0)])
    for step in range(3):
        samples.choose([group])
        samples.write(step)
    samples.rewind(1)
    rows = [json.loads(line) for line in samples.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0]


def test_zero_samples_write_no_file(tmp_path):
    samples = Samples(tmp_path, per_step=0)
    samples.rewind(0)
    samples.choose([Group(0, Task("a", "1+1="), [rollout(1.0)])])
    samples.write(0)
    assert list(tmp_path.iterdir()) == []


def test_chat_prompt_reads_as_lines():
    task = Task("a", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}])
    assert prompt_text(task) == "system: Be brief.\nuser: 1+1="


def test_a_reader_sees_what_a_tool_wrote():
    one = rollout(1.0, text="[1+1]2")
    one.turns = (Turn("policy", "[1+1]", 2, stop="]"), Turn("tool", "2", 1))
    row = json.loads(json.dumps(sample(0, one)))
    assert [(turn["writer"], turn["text"], turn["num_tokens"]) for turn in row["turns"]] == [
        ("policy", "[1+1]", 2),
        ("tool", "2", 1),
    ]
    shown = render(row)
    assert "\n[1+1]2\n" in shown.plain
    assert [shown.plain[one.start : one.end] for one in shown.spans if one.style == "reverse"] == ["2"]
    assert rollout_of(row, 0, {}).turns == one.turns and text_of(row)["turns"] == [["policy", 2], ["tool", 1]]


def test_render_shows_brackets_of_a_completion_as_they_are():
    text = render(sample(2, rollout(None, text="[/bold] [red]x[/red] \\[1]"))).plain
    assert "[/bold] [red]x[/red] \\[1]" in text
    assert "step 2  task a  reward unjudged (exact -)" in text
    assert "3 tokens, stop; answer: 2" in text
