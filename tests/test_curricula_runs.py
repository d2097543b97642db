"""Every curriculum in the real loop, from a recipe by its name; also where it measures, corrects and resumes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from lab import make_lab, train_here
from test_readme import blocks

from rlpost.check import load_and_check
from rlpost.errors import RunError
from rlpost.plugins import resolve

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "curricula/README.md").read_text(encoding="utf-8")
NAMES = sorted(file.stem for file in (ROOT / "curricula").glob("[a-z]*.py"))
RECIPES = {name: f"{{use: {name}}}" for name in NAMES} | {
    "adarft": "{use: adarft, difficulty: terms}",
    "staged": "{use: staged, difficulty: terms, stages: [{steps: 1, at_most: 2}, {}]}",
    "adcl": "{use: adcl, batches: 4, measure_tries: 2, draws: 16}",
    "learnable": "{use: learnable, difficulty: terms, correct: true, weight: mixed}",
}
FAULTY = """
from curricula.uniform import Uniform


class Few(Uniform):
    def select(self, n):
        return super().select(n)[: n - (self.epoch + self.position > 4)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder."""
    return make_lab(tmp_path_factory.mktemp("curricula"))


def run(folder, world, name, *overrides):
    solved = f"rewards=[{{use: '{folder}/mylab/rewards.py:foreseeable'}}]"  # some tasks always pass, others never
    return train_here(folder, world, name, "algorithm.groups.without_spread=keep", solved, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_curriculum_runs_from_a_recipe_by_its_name(folder, single_rank, name):
    lines = run(folder, single_rank, name, f"curriculum={RECIPES[name]}", "steps=3")
    assert len(lines) == 3
    assert all(any(key.startswith("curriculum/") for key in line) for line in lines)
    if name not in ("uniform", "scalerl"):
        assert all(line["curriculum/chosen"] == 4 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adcl", "learnable", "irt"])
def test_a_run_resumes_with_its_curriculum(folder, single_rank, name):
    choice = f"curriculum={RECIPES[name]}"
    whole = run(folder, single_rank, f"{name}-whole", choice, "steps=6")
    run(folder, single_rank, f"{name}-parts", choice, "steps=3")
    parts = run(folder, single_rank, f"{name}-parts", choice, "steps=6", "resume=auto")
    assert parts == whole
    if name == "adcl":
        assert [line.get("rollouts/measured", 0) for line in whole] == [32, 8, 8, 8, 8, 8]


@pytest.mark.slow
def test_a_faulty_curriculum_of_a_user_ends_with_a_message_and_a_checkpoint(folder, single_rank):
    (folder / "mylab" / "curricula.py").write_text(FAULTY)
    with pytest.raises(RunError, match=r"curriculum\.use: `select` of Few must return as many tasks .*got 3 of 4"):
        run(folder, single_rank, "few", f"curriculum={{use: '{folder}/mylab/curricula.py:Few'}}", "steps=4")
    assert (folder / "runs/few/checkpoints/step-000001/manifest.json").exists()


def test_the_page_lists_every_curriculum_with_its_parameters():
    rows = re.findall(r"^\| `(\w+)` \| (.*)", PAGE, re.MULTILINE)
    described = [name for name, _ in rows]
    assert sorted(described) == sorted(NAMES * 2)
    shared = {"difficulty", "half_life", "borrow"}
    for name, text in rows[len(NAMES) :]:
        takes = set(inspect.signature(resolve(name, "curricula")).parameters) - {"tasks", "seed"}
        said = set(re.findall(r"`(\w+)`", text.split(" | ")[0])) | (shared if "shared" in text else set())
        assert takes <= said, (name, takes - said)


@pytest.mark.parametrize("block", [block for block in blocks(PAGE, "yaml") if "mylab" not in block])
def test_the_recipes_of_the_page_have_no_problem(block, tmp_path):
    text = (ROOT / "recipes/quickstart.yaml").read_text() + f"\n{block}"
    (tmp_path / "own.yaml").write_text(text)
    recipe = load_and_check(tmp_path / "own.yaml", [f"run_dir={tmp_path}"])
    assert json.loads(json.dumps(recipe.curriculum))["use"] in NAMES
