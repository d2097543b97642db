"""What must not be in a recipe: secrets, and code that is no named plug-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.__main__ import BAD_RECIPE, main
from rlpost.check import check
from rlpost.check_secrets import secret_problems
from rlpost.recipe import load

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz"


def test_secrets_are_refused_by_key_or_by_shape_and_not_repeated() -> None:
    recipe = load(ROOT / "recipes/quickstart.yaml")
    assert secret_problems(recipe) == []
    recipe.rewards.append({"use": "final_number", "judge": {"api_key": "anything"}})
    recipe.generator.options["hf_overrides"] = [TOKEN]
    problems = check(recipe)
    named = [problem.split()[0] for problem in problems if "must not hold a secret" in problem]
    assert named == [f"rewards.{len(recipe.rewards) - 1}.judge.api_key", "generator.options.hf_overrides.0"]
    assert TOKEN not in "".join(problems)


def test_a_secret_from_the_environment_is_not_printed_either(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = (ROOT / "recipes/quickstart.yaml").read_text()
    # One where a text may stand, and one where it may not, which its message would quote.
    quoted = "logging: {wandb: '${oc.env:HF_TOKEN}'}\nkeep_checkpoints: ${oc.env:HF_TOKEN}\n"
    (tmp_path / "quickstart.yaml").write_text(recipe + quoted)
    assert main(["check", str(tmp_path / "quickstart.yaml")]) == BAD_RECIPE
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_a_recipe_that_names_a_python_object_runs_nothing(tag, tmp_path, capsys) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.yaml").write_text(f"steps: {tag} ['touch {marker}']\n")
    assert main(["check", str(tmp_path / "evil.yaml")]) != 0
    assert not marker.exists()
