import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlpost.errors import RunError
from rlpost.recipe import TaskSource
from rlpost.tasks import check_overlap, load_tasks
from rlpost.types import Task

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        file = tmp_path / "tasks.jsonl"
        file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(file)

    return write


def load(path, **fields):
    return load_tasks(TaskSource(path=path, **fields), "tasks.train")


def failure(path, **fields):
    with pytest.raises(RunError) as raised:
        load(path, **fields)
    return str(raised.value)


def rows_of(kind, **kwargs):
    """A function source: `kind` says which rows."""
    if kind == "raises":
        raise KeyError("no such level")
    if kind == "text":
        return ["a row of text"]
    return [{"question": f"{kind} {i}", "answer": i, "level": i % 2, **kwargs} for i in range(3)]


def test_jsonl_rows_become_tasks(jsonl):
    path = jsonl({"q": "1+1=", "a": 2, "s": "1+1=2", "h1": "count", "h2": None, "level": 1, "id": 7, "other": 0})
    fields = {"prompt": "q", "answer": "a", "solution": "s", "hints": ["h1", "h2"], "extra": ["level"], "key": "id"}
    assert load(path, **fields) == [Task("7", "1+1=", "2", "1+1=2", ("count",), {"level": 1}, path)]


def test_templates_fill_in_columns(jsonl):
    path = jsonl({"Body": "Two cats.", "Question": "How many?", "Answer": 2.0})
    (task,) = load(path, prompt="{Body} {Question} Use {{}}.", answer="={Answer}")
    assert (task.prompt, task.answer) == ("Two cats. How many? Use {}.", "=2")


def test_chat_messages_are_kept_as_messages(jsonl):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (task,) = load(jsonl({"prompt": messages, "answer": "x"}))
    assert task.prompt == tuple(messages)


@pytest.mark.parametrize(
    ("cell", "answer"),
    [(72, "72"), (72.0, "72"), (72.5, "72.5"), (" 72 ", "72"), (-3, "-3"), (0, "0"), (1e20, str(10**20))],
)
def test_answers_become_text(jsonl, cell, answer):
    assert load(jsonl({"prompt": "p", "answer": cell}))[0].answer == answer


def test_answer_regex_keeps_its_first_group(jsonl):
    path = jsonl({"prompt": "p", "answer": "48/2 = 24\n#### 72"})
    assert load(path, answer_regex="#### (.+)")[0].answer == "72"
    assert load(path, answer_regex=r"\d+$")[0].answer == "72"


def test_tasks_need_no_answer_where_the_recipe_has_none(jsonl):
    assert load(jsonl({"prompt": "p"}), answer=None)[0].answer is None


def test_keys_are_stable_and_follow_from_the_prompt(jsonl):
    (task,) = load(jsonl({"prompt": "1+1=", "answer": "2"}))
    assert task.key == "f4213d54ddc645f2"


def test_limit_reads_only_the_first_rows(jsonl):
    path = jsonl({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1}, "broken")
    assert [task.prompt for task in load(path, limit=2)] == ["a", "b"]


def test_empty_lines_at_the_end_mean_nothing_and_between_rows_are_named(jsonl):
    row, other = {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1}
    assert len(load(jsonl(row, other, "", " "))) == 2
    assert "line 2: must be one JSON object a line (this one is empty)" in failure(jsonl(row, "", other))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "line 2: must be one JSON object a line (Expecting ',' delimiter at column 15)"),
        ("[1, 2]", 'line 2: must be a JSON object, as in {"prompt": ...} (got list)'),
        ('{"prompt": "b"}', "line 2: tasks.train.answer: no column `answer` (the columns are prompt)"),
        ('{"prompt": "b", "answer": null}', "line 2: tasks.train.answer: a task must have an answer in `answer`"),
        ('{"prompt": "b", "answer": " "}', "line 2: tasks.train.answer: a task must have an answer in `answer`"),
        ('{"prompt": "b", "answer": true}', "line 2: tasks.train.answer must be text or a number (got bool True)"),
        ('{"prompt": "b", "answer": [1]}', "line 2: tasks.train.answer must be text or a number (got list [1])"),
        ('{"prompt": "", "answer": 1}', "line 2: tasks.train.prompt must not be empty"),
        ('{"prompt": [], "answer": 1}', "line 2: tasks.train.prompt must be text or messages"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', "line 2: tasks.train.prompt must be text or messages"),
    ],
)
def test_bad_rows_are_named_by_line(jsonl, line, message):
    assert message in failure(jsonl({"prompt": "a", "answer": 1}, line))


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a", "answer": 1}\n{"prompt": "\xff"}\n')
    assert "line 2: must be UTF-8" in failure(str(tmp_path / "x.jsonl"))


def test_every_bad_row_is_in_one_error(jsonl):
    message = failure(jsonl({"prompt": "a"}, "x", *[{"prompt": "b", "answer": None}] * 7))
    assert message.splitlines()[0].startswith("tasks.train: 9 rows of")
    assert "line 3, line 4, line 5, line 6, line 7 and 2 more: tasks.train.answer" in message


def test_a_long_list_of_problems_is_cut(jsonl):
    message = failure(jsonl(*[{f"column{i}": 1} for i in range(14)]))
    assert len(message.splitlines()) == 12
    assert message.endswith("- and 4 more kinds of problem")


def test_a_missing_column_is_named_with_the_nearest_one(jsonl):
    message = failure(jsonl({"question": "a", "answer": 1}), prompt="{questoin}")
    assert (
        "tasks.train.prompt: no column `questoin`, did you mean `question`? (the columns are question, answer)"
        in message
    )


def test_an_answer_that_the_regex_does_not_match_is_named(jsonl):
    message = failure(jsonl({"prompt": "a", "answer": "72"}), answer_regex="#### (.+)")
    assert "line 1: tasks.train.answer_regex '#### (.+)' must match the answer" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer_regex": "("}, "tasks.train.answer_regex must be a regular expression"),
        ({"prompt": "{a"}, "tasks.train.prompt must be a column or a template with balanced braces"),
        ({"prompt": "boxed{} {a}"}, "tasks.train.prompt: `{}` names no column; write {{}}"),
        ({"limit": 0}, "tasks.train.limit must be >= 1"),
        ({"config": {"seed": 1}}, "tasks.train.config is for reasoning_gym and function sources"),
        ({"answer": None, "answer_regex": "x"}, "tasks.train.answer_regex needs tasks.train.answer"),
    ],
)
def test_a_wrong_field_is_named(jsonl, fields, message):
    assert message in failure(jsonl({"prompt": "a", "answer": 1}), **fields)


def test_an_empty_file_is_refused(jsonl):
    assert "tasks.train.path must hold at least one task" in failure(jsonl())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/x.jsonl", "tasks.train.path: the file nowhere/x.jsonl does not exist"),
        ("x.csv", "tasks.train.path must be `file.jsonl`, `file.parquet`"),
        ("hf:openai/gsm8k", "tasks.train.path must be `hf:owner/name:split`"),
        ("no_such_lab.data:rows", "tasks.train.path: no module `no_such_lab`"),
        ("reasoning_gym:chain_sum", "tasks.train.config.seed must be an integer (got none)"),
    ],
)
def test_a_wrong_path_is_named(path, message):
    assert message in failure(path)


def test_a_near_file_name_is_suggested(jsonl):
    assert "did you mean `tasks.jsonl`?" in failure(jsonl().replace("tasks.", "task."))


def test_parquet_rows_become_tasks(tmp_path):
    path = str(tmp_path / "x.parquet")
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "answer": [1.0, 2.5]}), path)
    assert [(task.prompt, task.answer) for task in load(path)] == [("a", "1"), ("b", "2.5")]
    assert len(load(path, limit=1)) == 1


def test_a_parquet_row_without_an_answer_is_named(tmp_path):
    path = str(tmp_path / "x.parquet")
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "answer": [1.0, float("nan")]}), path)
    assert "row 2: tasks.train.answer: a task must have an answer" in failure(path)


def test_a_broken_parquet_file_is_one_message(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    assert "must be a parquet file" in failure(str(tmp_path / "x.parquet"))


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch):
    import datasets

    def unreachable(name, config, split):
        raise ConnectionError(f"Couldn't reach {name} {config} {split}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = failure("hf:openai/gsm8k:main:train[:5]")
    assert "tasks.train.path: hf:openai/gsm8k:main:train[:5] cannot be loaded from the hub" in message
    assert "Couldn't reach openai/gsm8k main train[:5]" in message


def test_hub_rows_become_tasks(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["#### 1", "#### 2"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    tasks = load("hf:openai/gsm8k:train", prompt="question", answer_regex="#### (.+)")
    assert [(task.prompt, task.answer) for task in tasks] == [("a", "1"), ("b", "2")]


def test_function_rows_become_tasks_with_every_other_column_in_extra():
    tasks = load(f"{__file__}:rows_of", prompt="question", config={"kind": "sum", "depth": 3})
    assert [task.prompt for task in tasks] == ["sum 0", "sum 1", "sum 2"]
    assert tasks[1].extra == {"level": 1, "depth": 3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "tasks.train.config.kind must be given"),
        ({"kind": "raises"}, f"failed: KeyError: 'no such level' ({__file__}, line "),
        ({"kind": "text"}, "row 1: must be a dict of columns (got str)"),
    ],
)
def test_a_function_that_fails_is_one_message(config, message):
    assert message in failure(f"{__file__}:rows_of", config=config)


def test_shipped_sums_load_without_overlap():
    config = {"size": 50, "min_terms": 4, "max_terms": 6}
    train = load("rlpost.testbed:chain_sums", solution="solution", config={"split": "train", **config})
    held_out = load("rlpost.testbed:chain_sums", config={"split": "eval", **config})
    assert check_overlap(train, held_out) == train
    assert set(train[0].extra) == {"terms"}


def test_reasoning_gym_metadata_can_be_named_and_repeated_problems_are_dropped(caplog):
    config = {"seed": 1, "size": 30, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with caplog.at_level(logging.WARNING, logger="rlpost.tasks"):
        tasks = load("reasoning_gym:chain_sum", prompt="{expression} =", extra=["num_terms"], config=config)
    assert 20 < len({task.prompt for task in tasks}) == len(tasks) < 30
    assert f"tasks.train: dropped {30 - len(tasks)} of 30 tasks as duplicates" in caplog.text
    assert tasks[0].extra["num_terms"] == 2 and tasks[0].extra["source_dataset"] == "chain_sum"


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("reasoning_gym:chain_sun", {"seed": 1}, "reasoning_gym has no task `chain_sun`, did you mean `chain_sum`?"),
        (
            "reasoning_gym:chain_sum",
            {"seed": 1, "siz": 3},
            "tasks.train.config does not fit reasoning_gym's `chain_sum`",
        ),
        ("reasoning_gym:chain_sum", {"seed": 1, "min_terms": 0}, "tasks.train.config does not fit"),
    ],
)
def test_a_wrong_reasoning_gym_source_is_one_message(path, config, message):
    assert message in failure(path, config=config)


def test_duplicate_prompts_are_refused_with_their_keys(jsonl):
    rows = [{"prompt": f"p{i % 7}", "answer": 1} for i in range(14)]
    message = failure(jsonl(*rows))
    assert "tasks.train: keys must be unique, and 7 are not" in message
    assert message.count(",") >= 5 and "and 2 more" in message


def test_duplicate_keys_and_prompts_under_other_keys_are_refused(jsonl):
    rows = [{"prompt": "a", "answer": 1, "id": 1}, {"prompt": "b", "answer": 1, "id": 1}]
    assert "keys must be unique, and 1 are not (1)" in failure(jsonl(*rows), key="id")
    rows[1] = {"prompt": "a", "answer": 1, "id": 2}
    assert "prompts must be unique, and 1 have several keys (1 = 2)" in failure(jsonl(*rows), key="id")


def test_duplicates_are_dropped_where_the_recipe_says_so(jsonl):
    path = jsonl({"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}, {"prompt": "b", "answer": 3})
    assert [(task.prompt, task.answer) for task in load(path, duplicates="drop")] == [("a", "1"), ("b", "3")]


def test_overlap_is_refused_by_key_and_by_normalised_prompt():
    train = [Task("1", "How many?"), Task("2", "b"), Task("3", "c")]
    with pytest.raises(RunError, match=r"2 of 3 training tasks are also held out \(keys 1, 3\)"):
        check_overlap(train, [Task("9", " how  MANY?\n"), Task("3", "other")])


def test_overlap_can_be_dropped_but_never_everything():
    train = [Task("1", "a"), Task("2", "b")]
    assert check_overlap(train, [Task("9", "A")], drop=True) == [train[1]]
    with pytest.raises(RunError, match=r"must hold a task that is not in tasks\.eval"):
        check_overlap(train, train, drop=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_gsm8k_and_svamp_load_by_path():
    gsm8k = load(str(DATA / "gsm8k" / "train.jsonl"), prompt="question", answer_regex="#### (.+)", solution="answer")
    svamp = load(str(DATA / "svamp" / "test.jsonl"), prompt="{Body} {Question}", answer="Answer", extra=["Type"])
    assert (len(gsm8k), gsm8k[0].answer) == (7473, "72")
    assert (len(svamp), svamp[0].answer, svamp[0].extra) == (1000, "145", {"Type": "Common-Division"})
