"""The pipeline of synthesis with quick stages: what goes through, what is written, what a kill leaves."""

from __future__ import annotations

import json
import os

import nursery
import pytest
from lab import ROOT
from synth_lab import rows_of, write_recipe

from rlpost.__main__ import BAD_RECIPE, FAILED, main
from rlpost.report.funnels import funnel_of_file
from rlpost.synth.store import Part, is_done, read
from rlpost.testbed import correct_chain


def run(folder, *more, trigger=None):
    """`rlpost synth` in a process of its own, which may be killed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    if trigger is not None:
        environment["ACCIDENT"] = str(trigger)
    command = ["synth", str(folder / "lab.yaml"), f"run_dir={folder / 'runs'}", *more]
    return nursery.run_module("rlpost", *command, env=environment, cwd=folder, timeout_s=250)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline that was run without interruption."""
    folder = tmp_path_factory.mktemp("synth")
    write_recipe(folder)
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def files(folder):
    synth = folder / "runs/lab/synth"
    parts = sorted(synth.rglob("*.jsonl"))
    return {str(path.relative_to(synth)): rows_of(path) for path in parts}


def test_what_comes_through_is_well_posed_right_and_said_of_by_a_funnel(made):
    synth = made / "runs/lab/synth"
    kept, gone = rows_of(synth / "problems.jsonl"), rows_of(synth / "quarantine.jsonl")
    assert len(kept) + len(gone) == 200 and len({row["prompt"] for row in kept}) == len(kept) > 20
    assert all(row["answer"] == row["solution"] == correct_chain(row["prompt"]) for row in kept)
    assert {row["reason"] for row in gone} == {
        "form",
        "cut off",
        "near another",
        "the teacher does not agree with itself",
        "a nine",
    }
    found = json.loads((synth / "funnel.json").read_text())
    assert [one["stage"] for one in found][:4] == ["identify", "sample", "screen-0-rules", "screen-1-near_duplicates"]
    assert found[-1]["out"] == len(kept)
    for one in found:
        assert one["in"] == one["out"] + sum(one["reasons"].values())
    [shown] = funnel_of_file(made / "runs/lab")
    assert shown["stages"][0] == ["sample", 200] and shown["stages"][-1] == ["problems", len(kept)]
    assert (synth / "funnel.png").stat().st_size > 1000


def test_every_problem_knows_where_it_comes_from_and_can_be_shown(made, capsys):
    row = rows_of(made / "runs/lab/synth/problems.jsonl")[0]
    assert row["lineage"]["generator"] == "none"
    assert row["lineage"]["identify"]["at_least"] == 5
    assert list(row["lineage"]["filters"]) == [
        "screen-0-rules",
        "screen-1-near_duplicates",
        "filters-0-solution_rules",
        "filters-1-agreement",
        "filters-2-no_nines",
    ]
    assert main(["synth", "show", row["key"], str(made / "runs/lab")]) == 0
    assert row["prompt"] in capsys.readouterr().out
    assert main(["synth", "show", "nobody", str(made / "runs/lab")]) == FAILED
    assert "no run has a problem nobody" in capsys.readouterr().err


def test_a_pipeline_that_is_killed_again_and_again_ends_with_the_same_rows(made, tmp_path):
    write_recipe(tmp_path)
    trigger, kills = tmp_path / "accident", 0
    for calls in (25, 30, 150, 20, 60):  # in every stage that can be killed
        trigger.write_text(str(calls))
        done = run(tmp_path, trigger=trigger)
        kills += done.returncode != 0
        torn = sorted((tmp_path / "runs/lab/synth").rglob("part-0-of-1.jsonl"), key=lambda path: path.stat().st_mtime)
        if done.returncode != 0 and torn and not torn[-1].with_suffix(".done").exists():
            with torn[-1].open("a") as file:
                file.write('{"id": "cut o')
    trigger.unlink(missing_ok=True)
    assert run(tmp_path).returncode == 0
    assert kills >= 4
    ours, theirs = files(tmp_path), files(made)
    assert ours.keys() == theirs.keys()
    for name, rows in theirs.items():
        assert len(ours[name]) == len(rows), name
        assert sorted(ours[name], key=str) == sorted(rows, key=str), name


def test_parts_of_a_stage_make_what_one_process_makes(made, tmp_path):
    write_recipe(tmp_path)
    for stage in ("identify", "train"):
        assert run(tmp_path, "--stage", stage).returncode == 0
    halves = [run(tmp_path, "--stage", "sample", "--part", f"{i}/2").returncode for i in range(2)]
    assert halves == [0, 0]
    whole = sorted(read(made / "runs/lab/synth/sample"), key=str)
    assert sorted(read(tmp_path / "runs/lab/synth/sample"), key=str) == whole


def test_other_settings_are_not_mixed_with_what_is_there(made):
    done = run(made, "synth.filters.1.at_least=0.7")
    assert done.returncode == FAILED
    assert "filters-1-agreement was made with other settings" in done.stderr
    assert "'at_least': 0.6" in done.stderr and "'at_least': 0.7" in done.stderr


@pytest.mark.parametrize(
    ("stage", "message"), [("forgetful", "must yield a row for each"), ("repeating", "must yield each row")]
)
def test_a_stage_of_ones_own_that_loses_or_repeats_a_row_is_stopped(tmp_path, stage, message):
    write_recipe(tmp_path)
    done = run(tmp_path, f"synth.identify={{use: 'synth_lab:{stage}'}}", "--stage", "identify")
    assert done.returncode == FAILED and message in done.stderr


def test_check_names_every_problem_of_the_section(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    path = write_recipe(tmp_path)
    wrong = [
        "synth.identify={use: pas_rate}",
        "synth.sample={number: 0}",
        "synth.distil={kk: 2, model: nobody.yaml}",
        "synth.filters=[{use: agreement, at_leas: 1}]",
        "synth.online={share: 2}",
    ]
    assert main(["check", str(path), *wrong]) == BAD_RECIPE
    said = capsys.readouterr().err
    for part in (
        "did you mean `pass_rate`",
        "synth.sample.number must be > 0",
        "synth.distil.kk",
        "synth.filters.0.at_leas",
        "synth.online.share must be in [0, 1]",
    ):
        assert part in said, said


def test_a_part_cuts_what_was_torn_and_is_done_only_when_all_are(tmp_path):
    part = Part(tmp_path / "stage", part=0, parts=2)
    assert part.open({"a": 1}) == set()
    part.write(iter([{"id": "x"}]))
    with part.file.open("a") as file:
        file.write('{"id": "y"')
    assert Part(tmp_path / "stage", part=0, parts=2).open({"a": 1}) == {"x"}
    part.finish(1, 0.5)
    assert not is_done(tmp_path / "stage")
    other = Part(tmp_path / "stage", part=1, parts=2)
    other.open({"a": 1})
    other.write(iter([{"id": "z"}]))
    other.finish(1, 0.5)
    assert [row["id"] for row in read(tmp_path / "stage")] == ["x", "z"]
