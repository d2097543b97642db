import json
import math
import platform
import subprocess
import sys
from importlib.metadata import version

from rlpost.recipe import Recipe
from rlpost.summary import git_commit, overhead_frac, phase_fractions, versions, write_summary

PHASES = {"setup": 30.0, "generate": 6.0, "train": 3.0, "sync": 0.75, "other": 0.25, "evaluate": 5.0}
MEMORY = {"of": "device memory", "peak_gib": {"train": 61.5, "generate": 70.0}}


def test_summary_holds_what_is_needed_to_compare_runs(tmp_path):
    before, after = {"pass@1": 0.25}, {"pass@1": math.nan}
    written = write_summary(
        tmp_path,
        recipe=Recipe(name="quick", seed=3),
        seeds=[3],
        before=before,
        after=after,
        wall_s=45.0,
        phase_s=PHASES,
        memory=MEMORY,
        steps=7,
    )
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read == written
    assert read["eval"]["before"] == {"pass@1": 0.25}
    assert read["eval"]["after"] == {"pass@1": None}
    assert (read["name"], read["seed"], read["steps"], read["wall_s"]) == ("quick", 3, 7, 45.0)
    assert read["recipe"]["sampling"]["group_size"] == 8
    assert read["phase_s"] == PHASES and read["memory"] == MEMORY
    assert read["overhead_frac"] == 0.1
    assert read["machine"]["cores"] >= 1 and isinstance(read["machine"]["gpus"], list) and read["machine"]["cpu"]


def test_a_run_without_evaluation_says_so(tmp_path):
    summary = write_summary(
        tmp_path, recipe=Recipe(), seeds=[0], before=None, after=None, wall_s=1.0, phase_s={}, memory=None, steps=0
    )
    assert summary["eval"] == {"before": None, "after": None}
    assert summary["overhead_frac"] == 0.0


def test_overhead_is_everything_in_a_step_but_generation_and_training():
    assert overhead_frac(PHASES) == 0.1
    assert phase_fractions(PHASES) == {"generate": 0.6, "train": 0.3, "sync": 0.075, "other": 0.025}


def test_versions_are_those_installed():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert "not-a-package" not in found


def test_versions_import_no_heavy_package():
    program = "import sys; from rlpost.summary import versions; versions(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_git_commit_is_none_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
