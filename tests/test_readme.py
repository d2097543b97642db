import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlpost import algorithms, losses
from rlpost.check import load_and_check
from rlpost.metrics import metric_info
from rlpost.recipe import read
from rlpost.types import Outcome, Task

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "launch/README.md", "rewards/README.md", "curricula/README.md")
DESCRIBED = ("launch/*", "recipes/*", "rlpost/*.py", "rlpost/*/*.py", "rewards/*", "curricula/*")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for _, body in found]


def test_readme_describes_every_file_once_and_none_that_is_gone():
    described = re.findall(r"^((?:launch|recipes|rlpost|rewards|curricula)/\S+) +\S", README, re.MULTILINE)
    files = [path for pattern in DESCRIBED for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"]
    assert sorted(described) == sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_readme_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named
    assert named <= defined, named - defined


def test_readme_names_metrics_that_are_declared():
    table = README.partition("| figure | unit |")[2].partition("\n\n")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) > 5
    for row in rows:
        for name in re.findall(r"`(\w+/[\w/@<>]+)`", row.split("|")[1]):
            assert metric_info(re.sub(r"<\w+>", "x", name))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8")):
        if not target.startswith("results/"):  # written when a recipe is run
            assert (folder / target).exists(), target


def test_the_first_recipe_of_the_readme_has_no_problem(tmp_path: Path):
    recipe = tmp_path / "gsm8k.yaml"
    recipe.write_text(blocks(README, "yaml")[0], encoding="utf-8")
    for world_size in (1, 8):
        assert load_and_check(recipe, world_size=world_size).name == "gsm8k"


def test_the_loss_in_contributing_passes_its_own_test():
    loss, row, table, test = blocks(CONTRIBUTING, "python")
    names = vars(losses).copy()
    exec(loss, names)
    exec(test, names)
    names["test_cispo_two_sided_matches_hand_table"]()
    exec(f"rows = {{{row}}}", names | vars(algorithms))
    exec(table, {"losses": SimpleNamespace(**names)})


def test_contributing_names_places_that_exist():
    train = (ROOT / "rlpost/train.py").read_text(encoding="utf-8")
    for quoted in ("losses.ppo_clip(", "def policy_loss(", "def group_advantages("):
        assert quoted in train, quoted
    assert "_BOUNDS" in (ROOT / "rlpost/check.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "launch/README.md"])
def test_commands_set_fields_that_exist(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    overrides = re.findall(r"\b((?:\w+\.)+\w+=[\w.\-/]+|resume=\w+|name=[\w-]+)", text)
    assert overrides
    for override in overrides:
        _, problems = read(ROOT / "recipes/quickstart.yaml", [override])
        assert not problems, override


def test_the_curriculum_of_its_readme_chooses_near_the_target_and_resumes_exactly():
    names: dict = {}
    exec(blocks((ROOT / "curricula/README.md").read_text(encoding="utf-8"), "python")[0], names)
    tasks = [Task(key, key) for key in "abc"]
    curriculum, resumed = (names["NearTarget"](tasks, seed=0, target=0.3) for _ in range(2))
    curriculum.observe([Outcome("a", (1.0, 1.0), 0), Outcome("b", (1.0, 0.0), 0), Outcome("c", (0.0, None), 0)])
    assert [task.key for task in curriculum.select(2)] == ["b", "c"]
    resumed.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert resumed.select(3) == curriculum.select(3)
