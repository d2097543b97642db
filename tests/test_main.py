"""The command line: exit codes, and one message where something is wrong."""

from __future__ import annotations

import os

import pytest

from rlpost.__main__ import BAD_RECIPE, FAILED, INTERRUPTED, main, parser, quiet
from rlpost.errors import RunError
from rlpost.recipe import load

RECIPE = "recipes/quickstart.yaml"


def test_check_prints_the_resolved_recipe_and_counts_problems(capsys, tmp_path) -> None:
    assert main(["check", RECIPE, "steps=7", "engine.warmup_steps=1"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.endswith("# no problem found\n")
    assert f"# tasks.eval: {load(RECIPE).tasks.eval.config['size']} problems\n" in printed.out  # type: ignore[union-attr]
    (tmp_path / "quickstart.yaml").write_text(printed.out)
    assert load(tmp_path / "quickstart.yaml") == load(RECIPE, ["steps=7", "engine.warmup_steps=1"])


def test_a_bad_recipe_is_told_once_with_every_problem(capsys) -> None:
    assert main(["train", RECIPE, "samplin.group_size=4", "engine.lr=0", "steps=many"]) == BAD_RECIPE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: 3 problems in the recipe:\n"
        "  - steps must be an integer (got 'many')\n"
        "  - samplin: no such key, did you mean `sampling`?\n"
        "  - engine.lr must be > 0 (got 0.0)\n"
    )


def test_a_bad_recipe_is_told_by_the_first_rank_only(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["check", RECIPE, "steps=0"]) == BAD_RECIPE
    assert capsys.readouterr().err == ""


def test_the_number_of_ranks_is_checked_against_the_batch(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["check", RECIPE]) == BAD_RECIPE
    assert "prompts_per_step must be a multiple of the number of ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (RunError("the disk is full"), FAILED, "error (rank 1): the disk is full\n"),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ],
)
def test_what_ends_a_run_sets_the_exit_code(raised, code, told, capsys, monkeypatch) -> None:
    def check(options) -> None:
        raise raised

    monkeypatch.setattr("rlpost.__main__.check", check)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["check", RECIPE]) == code
    assert capsys.readouterr().err == told


def test_interrupted_run_says_how_to_go_on(capsys, monkeypatch) -> None:
    def check(options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlpost.__main__.check", check)
    assert main(["check", RECIPE]) == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted; go on from the last checkpoint with resume=auto\n"


def test_a_fault_in_the_program_keeps_its_stack(monkeypatch) -> None:
    def check(options) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr("rlpost.__main__.check", check)
    with pytest.raises(AssertionError, match="a fault"):
        main(["check", RECIPE])


def test_an_unknown_command_exits_with_usage(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian", RECIPE])
    assert ended.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_every_command_has_its_help() -> None:
    text = parser().format_help()
    assert all(command in text for command in ("train", "sft", "eval", "check", "export"))


def test_quiet_keeps_what_a_person_has_set(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    quiet()
    assert (os.environ["VLLM_LOGGING_LEVEL"], os.environ["TQDM_DISABLE"]) == ("INFO", "1")
