import json
from collections import Counter

from rlpost.chosen import BINS, Chosen, bins, difficulty_of_tasks, quantiles, source_of, top
from rlpost.types import Outcome, Task

TASKS = [Task(key, key, extra={"terms": i + 1, "source": "odd" if i % 2 else "even"}) for i, key in enumerate("abcd")]


def outcome(key, *passed):
    return Outcome(key, tuple(float(bool(one)) for one in passed), 0, passed)


def lines(folder):
    return [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]


def test_a_step_of_two_waves_is_one_line(tmp_path):
    chosen = Chosen(tmp_path, TASKS, difficulty={"a": 1.0, "b": 2.0, "c": 3.0}, writes=True)
    chosen.observe([outcome("a", True, False), outcome("b", False, False)])
    chosen.observe([outcome("a", True, True), outcome("new", None, None)])
    chosen.write(3)
    chosen.write(4)
    assert lines(tmp_path) == [
        {
            "step": 3,
            "groups": 4,
            "tasks": 3,
            "success": [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0],
            "success_bins": [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
            "source": {"even": 2, "odd": 1, "added in the run": 1},
            "difficulty": [1.0, 1.0, 1.0, 1.0, 1.5, 1.8, 2.0],
        }
    ]


def test_other_ranks_write_nothing_and_resumed_runs_forget_later_steps(tmp_path):
    Chosen(tmp_path, [], difficulty={}, writes=False).observe([outcome("a", True)])
    assert not (tmp_path / "chosen.jsonl").exists()
    chosen = Chosen(tmp_path, TASKS, difficulty={}, writes=True)
    for step in range(3):
        chosen.observe([outcome("a", True)])
        chosen.write(step)
    chosen.rewind(1)
    assert [row["step"] for row in lines(tmp_path)] == [0]
    assert "difficulty" not in lines(tmp_path)[0]


def test_every_rate_is_in_one_bin_and_rates_of_whole_tenths_in_the_upper_one():
    for tries in (4, 7, 8, 10, 16):
        rates = [passes / tries for passes in range(tries + 1)]
        counts = bins(rates)
        assert (len(counts), sum(counts), counts[0], counts[-1]) == (BINS, tries + 1, 1, 1)
    assert bins([0.1, 0.3, 0.7])[1:-1] == [0, 1, 0, 1, 0, 0, 0, 1, 0, 0]


def test_quantiles_of_one_value_and_of_none():
    assert quantiles([0.5]) == [0.5] * 7
    assert quantiles([]) is None


def test_many_sources_are_counted_together():
    counts = top(Counter({f"s{i}": 100 - i for i in range(20)}))
    assert len(counts) == 13 and counts["other"] == sum(100 - i for i in range(12, 20))


def test_source_is_a_column_or_the_file():
    assert source_of(TASKS[0]) == "even"
    assert source_of(Task("a", "a", source="data.jsonl")) == "data.jsonl"
    assert source_of(Task("a", "a", extra={"source": 3})) == "tasks.train"


def test_difficulty_comes_from_the_curriculum_then_from_a_column(tmp_path):
    file = tmp_path / "difficulty.jsonl"
    file.write_text('{"key": "a", "difficulty": 0.9}\n{"key": "b", "difficulty": 0.1}\n')
    assert difficulty_of_tasks(TASKS, {"difficulty": str(file)}, ["terms"]) == {"a": 0.9, "b": 0.1}
    assert difficulty_of_tasks(TASKS, {"difficulty": "terms"}, []) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert difficulty_of_tasks(TASKS, {}, ["difficulty", None, "terms"]) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert difficulty_of_tasks(TASKS, {"difficulty": "hard"}, ["source"]) == {}
    assert difficulty_of_tasks([], {"difficulty": "terms"}, ["terms"]) == {}
