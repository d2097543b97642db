import inspect
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from groups import Letters, rollout
from test_lockstep import END, Scripted

from rlpost import algorithms, losses
from rlpost.check import load_and_check
from rlpost.collect import answers
from rlpost.document import Document
from rlpost.metrics import metric_info
from rlpost.objective import bind_loss
from rlpost.packing import Packer
from rlpost.recipe import read
from rlpost.types import Group, Micro, Outcome, Request, Sampling, Task

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "launch/README.md",
    "recipes/README.md",
    "rewards/README.md",
    "curricula/README.md",
    "rlpost/explore/README.md",
    "rlpost/turns/README.md",
)
DESCRIBED = (
    "launch/*",
    "recipes/*",
    "rlpost/*.py",
    "rlpost/*/*.py",
    "rlpost/*/*/*.py",
    "rlpost/*/*.md",
    "rlpost/report/*.*",
    "rlpost/evaluation/*.*",
    "rewards/*",
    "curricula/*",
)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for _, body in found]


def test_readme_describes_every_file_once_and_none_that_is_gone():
    described = re.findall(r"^((?:launch|recipes|rlpost|rewards|curricula)/\S+) +\S", README, re.MULTILINE)
    files = {path for pattern in DESCRIBED for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"}
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


def test_the_loss_in_contributing_passes_its_own_test_and_can_be_named(tmp_path, monkeypatch):
    loss, piece, bundle, test = blocks(CONTRIBUTING, "python")
    names = vars(losses).copy()
    exec(loss, names)
    exec(test, names)
    names["test_cispo_two_sided_matches_hand_table"]()
    pieces, bundles = (eval(f"{{{row}}}", vars(algorithms).copy()) for row in (piece, bundle))
    assert pieces.keys() == bundles.keys() == {"cispo_two_sided"}
    takes = inspect.signature(names["cispo_two_sided"]).parameters.values()
    given = {one.name for one in takes if one.kind == one.KEYWORD_ONLY}
    assert given == pieces["cispo_two_sided"].parameters.keys()

    monkeypatch.setattr(losses, "cispo_two_sided", names["cispo_two_sided"], raising=False)
    monkeypatch.setitem(algorithms.LOSSES, "cispo_two_sided", pieces["cispo_two_sided"])
    monkeypatch.setitem(algorithms.ALGORITHMS, "cispo_two_sided", bundles["cispo_two_sided"])
    recipe = load_and_check(ROOT / "recipes/quickstart.yaml", ["algorithm.name=cispo_two_sided", f"run_dir={tmp_path}"])
    assert recipe.algorithm.loss == {"use": "cispo_two_sided", "clip_low": 0.2, "clip_high": 0.28}
    _, stats = bind_loss(recipe.algorithm.loss)(*torch.zeros(3, 1, 2), packed(1, 2))
    assert stats.keys() == {"ratio", "clipped"}


def test_the_loss_of_the_readme_has_the_policy_gradient_at_first_and_passes_the_check(tmp_path, monkeypatch):
    code = next(block for block in blocks(README, "python") if "def soft_clip" in block)
    (tmp_path / "readmelab").mkdir()
    (tmp_path / "readmelab/losses.py").write_text(code, encoding="utf-8")
    section = next(block for block in blocks(README, "yaml") if "soft_clip" in block).replace("mylab", "readmelab")
    (tmp_path / "mine.yaml").write_text(blocks(README, "yaml")[0].replace("algorithm:", "# ") + section)
    monkeypatch.setattr("sys.path", [*sys.path])
    recipe = load_and_check(tmp_path / "mine.yaml")
    assert recipe.algorithm.loss == {"use": "readmelab.losses:soft_clip", "width": 0.3}
    logp = torch.full((1, 2), -2.0, requires_grad=True)
    loss, _ = bind_loss(recipe.algorithm.loss)(logp, logp.detach(), torch.tensor([[1.0, -0.5]]), packed(1, 2))
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, 0.5]]))


def test_the_rollout_functions_of_the_documents_lead_answers():
    def led(code: str, name: str, section: str, replies: list[str]) -> str:
        names: dict = {}
        exec(code, names)
        _, colon, plugin = yaml.safe_load(section)["rollout"].pop("use").rpartition(":")
        assert (colon, plugin) == (":", name)
        said = iter(replies)
        sampling = Sampling(60, stop_ids=(END,), rollout=names[name])
        asked = [Request(0, Task("a", "1+1="), (1,), 1, seed=0)]
        [one] = answers(Scripted(lambda prompt, i: next(said)), Letters(), asked, sampling)
        return one.text

    code = next(block for block in blocks(README, "python") if "once_more" in block)
    assert led(code, "once_more", "rollout: {use: 'mylab.turns:once_more'}", ["1+1=2;#2", "2;#2"]) == "1+1=2;+0=2;#2\0"
    text = (ROOT / "rlpost/turns/README.md").read_text(encoding="utf-8")
    [code], section = blocks(text, "python"), blocks(text, "yaml")[-1]
    said = ["[48-92]", ";[1+x]", ";#-44"]
    assert led(code, "with_lookup", section, said) == "[48-92]-44;[1+x]?;#-44\0"


def packed(rows: int, width: int) -> Micro:
    """A micro-batch of one document a row; nothing in it but its shape is read."""
    documents = [[Document((2,), (3,) * (width - 1), (-1.0,) * (width - 1))] for _ in range(rows)]
    return Packer(width, width, torch.device("cpu")).micro(documents)


def test_readme_lists_every_algorithm_in_the_order_of_the_table():
    table = README.partition("| `algorithm.name` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(algorithms.ALGORITHMS)


def test_contributing_names_places_that_exist():
    for file, quoted in {
        "credit.py": "def _of_the_group(",
        "check_algorithm.py": "_BOUNDS",
        "check.py": "_BOUNDS",
        "losses.py": "def weighted_sum(",
        "mismatch.py": "def icepop(",
    }.items():
        assert quoted in (ROOT / "rlpost" / file).read_text(encoding="utf-8"), quoted


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


def test_the_explorer_of_its_readme_asks_again_until_its_limit_and_resumes_exactly():
    names: dict = {}
    exec(blocks((ROOT / "rlpost/explore/README.md").read_text(encoding="utf-8"), "python")[0], names)
    explorer, resumed = names["SecondLook"](limit=6), names["SecondLook"]()
    failed = Group(0, Task("a", "1+1="), [rollout(False)] * 4, seed=7)
    [request] = explorer.more(failed)
    assert (request.n, request.seed) == (4, 11)
    failed.rollouts += [rollout(False)] * 4
    assert explorer.more(failed) == [] == explorer.more(Group(1, failed.task, [rollout(True)]))
    explorer.observe([Outcome("a", (0.0,) * 8, 0, (False,) * 8), Outcome("b", (1.0,), 0, (True,))])
    resumed.load_state_dict(json.loads(json.dumps(explorer.state_dict())))
    assert resumed.metrics() == explorer.metrics() == {"needed": 1}
