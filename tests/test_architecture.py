"""What the shape of the code promises: heavy imports in one file each, a step on one screen, one place that divides."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("rlpost", "rewards", "curricula") for file in (ROOT / package).rglob("*.py"))
AT_HOME = {
    "vllm": {
        "rlpost/generate/local_vllm.py",
        "rlpost/generate/server_gate.py",
        "rlpost/generate/shm_engine.py",
        "rlpost/generate/transfer.py",
        "rlpost/generate/vllm_features.py",
        "rlpost/generate/weight_source.py",
    },
    "deepspeed": {"rlpost/engine.py", "rlpost/sequence_parallel.py"},
    "httpx": {"rewards/_endpoint.py", "rlpost/servers/replica.py", "rlpost/sources.py"},
    "starlette": {"rlpost/generate/server_gate.py"},
    "math_verify": {"rewards/_symbolic.py"},
    "pebble": {"rlpost/judges.py"},
    "omegaconf": {"rlpost/recipe.py", "rlpost/yaml_tree.py"},
    "datasets": {"rlpost/sources.py"},
    "datasketch": {"rlpost/duplicates.py"},
    "pyarrow": {"rlpost/sources.py"},
    "reasoning_gym": {"rewards/reasoning_gym_score.py", "rlpost/sources.py"},
    "matplotlib": {
        "rlpost/report/plots.py",
        "rlpost/scaling/plots.py",
        "rlpost/simulate/brorl.py",
        "rlpost/simulate/pipeline_command.py",
        "rlpost/synth/collect.py",
    },
    "rich": {
        "rlpost/catalogue.py",
        "rlpost/evaluation/table.py",
        "rlpost/progress.py",
        "rlpost/rescore.py",
        "rlpost/samples.py",
        "rlpost/simulate/brorl.py",
        "rlpost/simulate/pipeline_command.py",
        "rlpost/try_reward.py",
        "rlpost/watch.py",
    },
    "scipy": {
        "curricula/_irt.py",
        "rlpost/scaling/bootstrap.py",
        "rlpost/scaling/fit.py",
        "rlpost/scaling/fits.py",
        "rlpost/scaling/search.py",
        "rlpost/simulate/rates.py",
    },
    "sklearn": {"curricula/_irt.py"},
    "wandb": {"rlpost/trackers.py"},
}
HEAVY = (
    "torch",
    "vllm",
    "deepspeed",
    "transformers",
    "datasets",
    "datasketch",
    "pyarrow",
    "reasoning_gym",
    "numpy",
    "scipy",
    "sklearn",
)
MATHEMATICS = (
    "advantages",
    "aggregation",
    "entropy",
    "kl",
    "lengths",
    "losses",
    "masked",
    "mass_balance",
    "mismatch",
    "reference",
    "subsample",
)
LIGHT = [
    "recipe",
    "check",
    "check_servers",
    "check_tasks",
    "server_recipe",
    "servers.options",
    "servers.supervisor",
    "evaluation.options",
    "evaluation.sets",
    "evaluation.audit_command",
    "task_report",
    "plugins",
    "tasks",
    "sources",
    "types",
    "errors",
    "algorithms",
    "algorithm_recipe",
    "check_algorithm",
    "catalogue",
    "yaml_tree",
    "render",
    "score",
    "judging",
    "judges",
    "reward_recipe",
    "rollout_recipe",
    "talk",
    "turns.calculator",
    "turns.python",
    "alarms",
    "history",
    "watch",
    "report.command",
    "report.payload",
    "report.page",
    "report.rollouts",
    "synth.command",
    "synth_recipe",
]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh Python has loaded after `code`."""
    probe = f"{code}\nimport sys\nprint('loaded:', *(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("library", AT_HOME)
def test_heavy_library_is_imported_in_its_own_files_only(library: str) -> None:
    assert {name_of(file) for file in SOURCES if library in imports(file)} == AT_HOME[library]


def test_checking_a_recipe_loads_no_heavy_library() -> None:
    check = "from rlpost.__main__ import main\nassert main(['check', 'recipes/quickstart.yaml']) == 0"
    assert loaded_by(check) == set()


def test_light_files_import_without_heavy_libraries() -> None:
    rlpost_files = [f"rlpost.{name}" for name in (*LIGHT, "score", "__main__")]
    curricula = [f"curricula.{file.stem}" for file in sorted((ROOT / "curricula").glob("[a-z]*.py"))]
    names = [*rlpost_files, "rewards.final_number", *curricula]
    assert loaded_by("\n".join(f"import {name}" for name in names)) == set()


def test_mathematics_needs_torch_only() -> None:
    assert loaded_by("\n".join(f"import rlpost.{name}" for name in MATHEMATICS)) <= {
        "torch",
        "numpy",
    }  # torch brings it


def test_mathematics_knows_no_recipe_and_no_ranks() -> None:
    standard = {"__future__", "collections", "dataclasses", "enum", "itertools", "math", "random", "torch", "typing"}
    for name in MATHEMATICS:
        text = (ROOT / f"rlpost/{name}.py").read_text()
        ours = set(re.findall(r"from rlpost\.(\w+) import", text))
        assert ours <= set(MATHEMATICS), name
        assert set(imports(ROOT / f"rlpost/{name}.py")) <= standard | {"rlpost"}, name


def test_a_training_step_is_one_screen() -> None:
    lengths = {
        f"{name_of(file)}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for file in SOURCES
        for function in functions(file)
    }
    assert lengths.pop("rlpost/train.py:train_step") <= 60
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_files_are_short_enough_to_read() -> None:
    assert {name_of(file): length for file in SOURCES if (length := len(file.read_text().splitlines())) > 400} == {}


def test_only_aggregation_divides_by_a_token_count() -> None:
    """And nothing at all is divided or averaged where losses are put together: weights have seen to that."""
    found = [division for file in SOURCES for division in divisions(file)]
    assert {place for place, divisor in found if "token" in divisor or "_denominator" in divisor} == {
        "rlpost/aggregation.py:token_weights"
    }
    whole = {"objective.py:policy_loss", "objective.py:value_loss", "losses.py:weighted_sum", "update.py:update"}
    assert not {f"rlpost/{place}" for place in whole} & {place for place, _ in found}


def divisions(file: Path) -> Iterator[tuple[str, str]]:
    """Every division and mean in a file: the function that it stands in, and what is divided by."""
    for function in functions(file):
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                yield f"{name_of(file)}:{function.name}", ast.unparse(node.right)
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
                yield f"{name_of(file)}:{function.name}", ast.unparse(node.value)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("mean", "div")
            ):
                yield f"{name_of(file)}:{function.name}", ast.unparse(node)


def test_nothing_is_called_old() -> None:
    for file in SOURCES:
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not {name for name in names if name.startswith("old_")}, name_of(file)
