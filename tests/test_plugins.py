import subprocess
import sys
from pathlib import Path

import pytest

from rlpost.errors import RecipeError, RunError
from rlpost.plugins import argument_problems, bind, make_importable, resolve


def brevity(rollout, *, target: int, scale: float = 1.0, name: str | None = None):
    return (rollout, target, scale, name)


def test_resolve_finds_shipped_function_and_class_by_file_name():
    assert resolve("final_number", "rewards").__name__ == "final_number"
    assert resolve("uniform", "curricula").__name__ == "Uniform"


def test_resolve_suggests_the_nearest_name_and_lists_what_there_is():
    with pytest.raises(
        RunError, match=r"no `boxd_answer`, did you mean `boxed_answer`\? \(it has boxed_answer, choice"
    ):
        resolve("boxd_answer", "rewards")


def test_resolve_asks_for_a_colon_in_a_dotted_path():
    with pytest.raises(RunError, match="must name its object after a colon"):
        resolve("mylab.rewards.brevity", "rewards")


def test_resolve_finds_a_users_module_in_an_importable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lab_of_plugins").mkdir()
    (tmp_path / "lab_of_plugins" / "rewards.py").write_text("def brevity(rollout): return 1.0\n")
    make_importable(tmp_path)
    assert resolve("lab_of_plugins.rewards:brevity", "rewards")(None) == 1.0


def test_make_importable_adds_a_folder_once_and_last(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_importable(tmp_path)
    make_importable(str(tmp_path))
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)


def test_resolve_loads_a_file_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def brevity(rollout): return 1.0\n")
    assert resolve(f"{file}:brevity", "rewards") is resolve(f"{file}:brevity", "rewards")


def test_resolve_names_a_missing_module():
    with pytest.raises(RunError, match=r"no module `no_such_lab` for `no_such_lab.rewards:x`"):
        resolve("no_such_lab.rewards:x", "rewards")


def test_resolve_names_a_missing_file():
    with pytest.raises(RunError, match=r"the file nowhere/x\.py does not exist"):
        resolve("nowhere/x.py:f", "rewards")


def test_resolve_lists_what_a_module_has_where_the_object_is_missing(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from pathlib import Path\ndef brevity(rollout): ...\n")
    with pytest.raises(RunError, match=r"no function or class `brevty`, did you mean `brevity`\? \(it has brevity\)"):
        resolve(f"{file}:brevty", "rewards")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "x = 1\nimport no_such_library\n",
            r"ModuleNotFoundError: No module named 'no_such_library' \(.*bad\.py, line 2\)",
        ),
        ("x = 1\ny = undefined\n", r"NameError: name 'undefined' is not defined \(.*bad\.py, line 2\)"),
        ("def f(:\n", r"SyntaxError: invalid syntax \(.*bad\.py, line 1\)"),
    ],
)
def test_resolve_shows_file_and_line_of_a_broken_plugin(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(RunError, match=message):
        resolve(f"{tmp_path / 'bad.py'}:f", "rewards")


def test_resolve_shows_file_and_line_of_a_broken_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "broken_module_x.py").write_text("\n\nimport no_such_library\n")
    with pytest.raises(RunError, match=r"No module named 'no_such_library' \(.*broken_module_x\.py, line 3\)"):
        resolve("broken_module_x:f", "rewards")


def test_bind_fills_in_the_recipes_parameters():
    plugin = {"use": f"{Path(__file__)}:brevity", "weight": 0.5, "target": 3}
    assert bind(plugin, "rewards", where="rewards.0", skip=1)("rollout") == ("rollout", 3, 1.0, None)


def test_bind_collects_every_problem():
    plugin = {"use": f"{Path(__file__)}:brevity", "sclae": 2.0, "name": 3, "rollout": None}
    with pytest.raises(RecipeError) as raised:
        bind(plugin, "rewards", where="rewards.0", skip=1)
    assert [problem.split("`")[0] for problem in raised.value.problems] == [
        "rewards.0.sclae: ",
        "rewards.0.name must be str | None (got 3)",
        "rewards.0.rollout is given by the run and cannot be set in a recipe",
        "rewards.0.target must be given: ",
    ]
    assert "did you mean `scale`?" in raised.value.problems[0]


@pytest.mark.parametrize("plugin", [{}, {"use": None}, {"use": 3}])
def test_bind_asks_for_use(plugin):
    with pytest.raises(RecipeError, match=r"rewards\.0\.use must name a plug-in"):
        bind(plugin, "rewards", where="rewards.0", skip=1)


def test_bind_names_the_key_of_a_plugin_that_does_not_resolve():
    with pytest.raises(RecipeError, match=r"curriculum\.use: curricula/ has no `unifrom`, did you mean `uniform`\?"):
        bind({"use": "unifrom"}, "curricula", where="curriculum", skip=1, supplied=("seed",))


def test_bind_refuses_a_weight_where_nothing_is_weighted():
    with pytest.raises(RecipeError, match=r"curriculum\.weight: `uniform` has no such parameter"):
        bind({"use": "uniform", "weight": 1.0}, "curricula", where="curriculum", skip=1, supplied=("seed",))


@pytest.mark.parametrize(("value", "fits"), [(1, True), (1.5, False), (True, False), ("1", False), (None, False)])
def test_argument_problems_compare_an_int_annotation(value, fits):
    assert (argument_problems(brevity, {"target": value}, where="x", use="brevity", skip=1) == []) is fits


def test_argument_problems_let_an_int_be_a_float():
    assert argument_problems(brevity, {"target": 1, "scale": 2}, where="x", use="brevity", skip=1) == []


def test_argument_problems_name_a_function_that_takes_no_rollout():
    assert argument_problems(lambda: 0.0, {}, where="x", use="f", skip=1) == ["x: `f` must take 1 positional argument"]


def test_argument_problems_let_var_keywords_take_anything():
    assert argument_problems(lambda rollout, **rest: 0.0, {"any": 1}, where="x", use="f", skip=1) == []


def test_argument_problems_ask_for_keywords_that_the_run_supplies():
    assert argument_problems(lambda tasks: 0, {}, where="x", use="f", skip=1, supplied=("seed",)) == [
        "x: `f` must take the keyword `seed`"
    ]


def test_plugins_and_checks_need_no_heavy_library():
    code = (
        "import sys, rlpost.check, rewards.final_number, rewards.boxed_answer, rewards.exact_chain, curricula.uniform;"
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
