"""What a person sees of each mistake: one message, before work is lost, and no library above it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from lab import RECIPE, logged, make_lab, rlpost, train

from rlpost.__main__ import BAD_RECIPE, FAILED, INTERRUPTED, main

FILE = "tasks.train={path: %s}"


@pytest.fixture
def told(tmp_path, capsys, monkeypatch):
    """Runs `rlpost check` on the small recipe in a fresh user's folder; gives the exit code and the message."""
    lab = make_lab(tmp_path)
    monkeypatch.chdir(lab)

    def run(*overrides: str, files: dict[str, str] | None = None) -> tuple[int, str]:
        for name, text in (files or {}).items():
            (lab / name).write_text(text)
        code = main(["check", "tiny.yaml", *overrides])
        return code, capsys.readouterr().err

    return run


def row(prompt: str, answer: str) -> str:
    return json.dumps({"prompt": prompt, "answer": answer}) + "\n"


def test_bad_lines_of_a_tasks_file_are_all_named(told) -> None:
    lines = row("1+1=", "2") + '{"prompt": "1+2=", "ans\n' + "\n" + row("2+2=", "") + '{"prompt": "3+3="}\n'
    code, message = told(FILE % "bad.jsonl", "tasks.eval=null", files={"bad.jsonl": lines})
    assert code == FAILED
    assert message.splitlines() == [
        "error: tasks.train: 4 rows of bad.jsonl cannot be used:",
        "  - line 2: must be one JSON object a line (Unterminated string starting at at column 20)",
        "  - line 3: must be one JSON object a line (this one is empty)",
        "  - line 4: tasks.train.answer: a task must have an answer in `answer` (fill it in, or set "
        "tasks.train.answer=null where no reward needs one)",
        "  - line 5: tasks.train.answer: no column `answer` (the columns are prompt)",
    ]


def test_empty_tasks_file_is_named(told) -> None:
    assert told(FILE % "none.jsonl", files={"none.jsonl": ""}) == (
        FAILED,
        "error: tasks.train.path must hold at least one task (none.jsonl has none)\n",
    )


def test_missing_files_and_folders_are_named_together(told) -> None:
    code, message = told(FILE % "trian.jsonl", "model={path: ./nowhere}", files={"train.jsonl": row("1+1=", "2")})
    assert code == BAD_RECIPE
    assert "  - model.path: the folder './nowhere' does not exist" in message
    assert "  - tasks.train.path: the file trian.jsonl does not exist, did you mean `train.jsonl`?" in message


def test_problems_that_are_trained_on_and_held_out_are_named(told) -> None:
    files = {"train.jsonl": row("1+1=", "2") + row("1+2=", "3"), "eval.jsonl": row("1+1= ", "2")}
    code, message = told(FILE % "train.jsonl", "tasks.eval={path: eval.jsonl}", files=files)
    assert code == FAILED
    assert message.startswith("error: tasks.train and tasks.eval must not share problems: 1 of 2 training tasks")
    assert "tasks.train.duplicates=drop" in message


def test_missing_plugin_and_wrong_parameter_are_named(told) -> None:
    code, message = told('rewards=[{use: final_numbr}, {use: "mylab.rewards:brevity", traget: 3}]')
    assert code == BAD_RECIPE
    assert "  - rewards.0.use: rewards/ has no `final_numbr`, did you mean `final_number`?" in message
    assert "  - rewards.1.traget: `mylab.rewards:brevity` has no such parameter, did you mean `target`?" in message


def test_reward_file_that_cannot_be_imported_is_named(told) -> None:
    code, message = told('rewards=[{use: "broken.py:judge"}]', files={"broken.py": "import nothing_of_that_name\n"})
    assert code == BAD_RECIPE
    assert "  - rewards.0.use: `broken.py` cannot be imported: ModuleNotFoundError" in message


def test_run_dir_that_is_a_file_is_named(told) -> None:
    code, message = told("run_dir=tiny.yaml")
    assert code == BAD_RECIPE
    assert "  - run_dir must be a folder (got tiny.yaml, and " in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_dir_that_cannot_be_written_is_named(told, tmp_path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    code, message = told("run_dir=shut/runs")
    assert code == BAD_RECIPE
    assert "  - run_dir must be writable" in message


def test_answers_longer_than_the_context_are_named(told) -> None:
    code, message = told("sampling.max_new_tokens=64")
    assert code == BAD_RECIPE
    assert "  - sampling.max_new_tokens must be less than model.context, which holds the prompt too" in message


# From here on in a process of its own: each loads torch, and some of them a model.


def message_of(lab: Path, *overrides: str, code: int = FAILED, accident: str = "") -> str:
    """Standard error of a run that ends early; nothing else may stand there."""
    done = rlpost(lab, "train", *overrides, accident=accident)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompt_longer_than_the_context_is_found_before_anything_is_trained(tmp_path) -> None:
    lab = make_lab(tmp_path)
    (lab / "long.jsonl").write_text(row("1+" * 60 + "1=", "61"))
    message = message_of(lab, FILE % (lab / "long.jsonl"), "tasks.eval=null")
    assert "tasks.train: a prompt may have 40 tokens (model.context 64 - max_new_tokens 24), and 1 of 1" in message
    assert not list((lab / "runs").glob("models/sft-*"))
    assert not (lab / "runs/tiny").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_folder_that_holds_a_run_is_kept(lab) -> None:
    before = logged(lab, "first")
    message = message_of(lab, "name=first", "seed=5")
    assert "runs/first must be new or empty (it holds another run): go on with that run with resume=auto" in message
    assert logged(lab, "first") == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hub_name_that_cannot_be_reached_is_named(lab, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = message_of(lab, "name=hub", "model={path: nobody/no-such-model, dtype: float32}", "sft=null")
    assert "model.path must be a folder with config.json, a .gguf file, or a hub name that can be reached" in message
    assert "'nobody/no-such-model'" in message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cache_too_small_for_one_answer_names_its_size(lab) -> None:
    message = message_of(lab, "name=cache", "sft=null", "model.context=8192", "generator.kv_cache_gib=0.001")
    assert "generator.kv_cache_gib=0.001 must leave vLLM room for at least one answer of full length" in message
    assert "or lower model.context" in message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reward_that_raises_names_the_task_and_loses_no_step(lab) -> None:
    checkpoints = lab / "runs/raised/checkpoints"
    message = message_of(lab, "name=raised", "save_every=1", accident=f"raise:{checkpoints / 'step-000001'}")
    assert "reward `brevity` must judge every rollout, and raised KeyError: 'no such column' at " in message
    assert (checkpoints / "step-000001").is_dir()
    assert train(lab, "raised", "save_every=1", "resume=auto")[1:] == logged(lab, "first")[1:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_run_goes_on(lab) -> None:
    step = lab / "runs/stopped/checkpoints/step-000002"
    message = message_of(lab, "name=stopped", code=INTERRUPTED, accident=f"{signal.SIGINT.name}:{step}")
    assert message == "error: interrupted; go on from the last checkpoint with resume=auto\n"
    assert train(lab, "stopped", "resume=auto") == logged(lab, "first")


def test_the_small_recipe_itself_has_no_problem(told) -> None:
    assert "mylab.rewards:brevity" in RECIPE
    assert told() == (0, "")
