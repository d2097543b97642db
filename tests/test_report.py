import argparse
import base64
import json
import random
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs_made import make_run, sample, write

from rlpost.__main__ import main
from rlpost.errors import RunError
from rlpost.history import read_history
from rlpost.report import command
from rlpost.report.columns import choice_columns, eval_columns, evenly, step_columns
from rlpost.report.command import report_of_finished, write_report
from rlpost.report.fits import card
from rlpost.report.funnels import by_level, funnels
from rlpost.report.intervals import effective_tries, interval, wilson
from rlpost.report.page import SCRIPTS, digest
from rlpost.report.payload import arms_of, differences
from rlpost.report.rollouts import read_rollouts

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'> "
    "\u2028\u2029 \U0001f4a9 <!-- \x00 ]]>"
)
MAKES_ELEMENTS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|https?://(?!www\.w3\.org)"
)
OWN_TAGS = "html head meta title style body header h1 p div nav main noscript footer script"


def unpacked(text):
    return json.loads(zlib.decompress(base64.b64decode(text), -15))


class Page(HTMLParser):
    """What a page is made of: tags, and the text of each script by its id."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id", "own") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data


def test_a_run_has_one_page_that_loads_nothing(tmp_path, capsys):
    folder = make_run(tmp_path / "run", name="one")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    page = Page(folder / "report.html")
    assert not [tag for tag, attrs in page.tags if tag in ("link", "iframe", "img") or {"src", "href"} & attrs.keys()]
    data = unpacked(page.scripts["data"])
    assert data["runs"][0]["steps"]["x"]["step"] == list(range(1, 13))
    assert len(unpacked(page.scripts["rollouts-0-0"])) == 24 == len(data["runs"][0]["rollouts"]["step"])
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and digest(page.scripts["own"]) in policy and "unsafe" not in policy


def test_text_of_a_model_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", name=HOSTILE)
    rows = [{**sample(0, random.Random(0)), "prompt": HOSTILE, "completion": HOSTILE, "task": HOSTILE, "hint": HOSTILE}]
    write(
        folder / "samples.jsonl", [{**rows[0], "answer": HOSTILE, "finish_reason": HOSTILE, "parts": {HOSTILE: None}}]
    )
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 1, "prompt": "\\ud800 alone", "completion": "\\udfff", "reward": null}\n')
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert [tag for tag, _ in page.tags].count("script") == 3, "data, one part of rollouts, the page's own"
    assert {tag for tag, _ in page.tags} <= set(OWN_TAGS.split())
    one, two = unpacked(page.scripts["rollouts-0-0"])
    assert one["completion"] == HOSTILE and one["parts"] == {HOSTILE: None} and two["prompt"] == "? alone"


def test_no_script_makes_elements_of_text():
    for name in SCRIPTS:
        text = (Path(command.__file__).parent / name).read_text()
        assert not MAKES_ELEMENTS.findall(text), name


def test_many_steps_and_rollouts_are_thinned_and_said_to_be(tmp_path):
    folder = make_run(tmp_path / "run", steps=50, samples=4)
    columns, parts = read_rollouts(folder, most_bytes=(folder / "samples.jsonl").stat().st_size // 5)
    assert columns["of"] == 200 and 36 <= len(columns["step"]) <= 44 and len(parts) == 1
    assert columns["step"][0] == 1 and columns["step"][-1] == 50
    assert evenly(10_000, 2000)[-1] == 9999 and len(set(evenly(10_000, 2000))) == 2000


def test_a_text_that_is_too_long_is_cut_and_says_so(tmp_path):
    folder = make_run(tmp_path / "run", steps=1, samples=1)
    [row] = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    write(folder / "samples.jsonl", [{**row, "completion": "x" * 100_000}])
    _, [part] = read_rollouts(folder)
    [one] = unpacked(part)
    assert one["completion"].endswith("(40000 more characters)") and "figures" not in one


def test_a_run_that_goes_on_and_one_that_has_hardly_begun_have_reports(tmp_path):
    folder = make_run(tmp_path / "run", finished=False, steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, ')
    (tmp_path / "new").mkdir()
    (tmp_path / "new/recipe.yaml").write_text("name: new\nsteps: 9\n")
    page = Page(write_report([folder, tmp_path / "new"], tmp_path / "out" / "both.html"))
    states = [run["state"] for run in unpacked(page.scripts["data"])["runs"]]
    assert states == ["3 of 3 steps, not finished", "0 of 9 steps, not finished"]


def test_a_page_that_cannot_be_written_is_one_message(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--out", str(tmp_path / "file" / "x.html")]) == 1
    assert "--out" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_report_that_fails_is_a_warning_of_a_finished_run(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    assert report_of_finished(folder) == f"report: {folder / 'report.html'}"
    (folder / "report.html").unlink()
    (folder / "samples.jsonl").write_text("not json\n")
    said = report_of_finished(folder)
    assert (
        said.startswith("warning: the run has ended well, but its report was not written: RunError")
        and "\n" not in said
    )
    monkeypatch.setattr(command, "write_report", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in report_of_finished(folder)
    assert not list(folder.glob("report*"))


def test_pictures_of_several_runs(tmp_path):
    runs = [make_run(tmp_path / str(i), name=name, steps=4) for i, name in enumerate(("b $x$", "a/../b"))]
    options = argparse.Namespace(runs=runs, out=tmp_path / "r.html", png=tmp_path / "png")
    command.report(options)
    names = sorted(file.name for file in (tmp_path / "png").iterdir())
    assert names == sorted(
        ["curves.png", *(f"{kind}-{one}.png" for kind in ("time", "chosen") for one in ("b_x_", "a_.._b"))]
    )
    assert all((tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_only_fields_that_differ_are_in_the_difference():
    one = {"name": "a", "engine": {"lr": 1e-6, "zero": 2}, "rewards": [{"use": "x"}], "flag": True}
    two = {"name": "b", "engine": {"lr": 2e-6, "zero": 2}, "rewards": [{"use": "x", "weight": 0.5}], "flag": None}
    assert differences([one, two]) == [
        ["name", "a", "b"],
        ["engine.lr", "1e-06", "2e-06"],
        ["flag", "true", "null"],
        ["rewards.0.weight", "-", "0.5"],
    ]
    assert differences([one, one]) == []


def test_runs_that_differ_by_their_seed_are_one_arm(tmp_path):
    made = [("a", 0, 1e-6), ("b", 1, 1e-6), ("c", 0, 2e-6)]
    folders = [make_run(tmp_path / name, name=name, seed=seed, lr=lr) for name, seed, lr in made]
    assert arms_of([read_history(folder) for folder in folders]) == [0, 0, 1]


def test_the_interval_of_a_mean_over_problems_covers_as_often_as_it_says():
    """1000 evaluations of problems with rates of a known spread: 95 % must hold the true mean, within 3 sigma."""
    rng, problems, n, held = random.Random(0), 60, 4, 0
    for _ in range(1000):
        rates = [rng.choice((0.05, 0.5, 0.95)) for _ in range(problems)]
        passes = [sum(rng.random() < rate for _ in range(n)) for rate in rates]
        one = sum(passes) / n / problems
        two = sum(1 - (n - c) * (n - c - 1) / (n * (n - 1)) for c in passes) / problems
        low, high = interval({"eval/pass@1": one, "eval/pass@2": two}, "eval/pass@1", problems=problems, n=n)
        held += low <= 0.5 <= high
    assert 930 <= held <= 970  # 950 is nominal, and sqrt(1000 * 0.95 * 0.05) = 6.9


def test_tries_count_between_problems_and_answers():
    assert effective_tries(0.5, None, 100, 8) == 100
    assert 100 < effective_tries(0.5, 0.65, 100, 8) < 800
    assert wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert interval({}, "eval/pass@1", problems=10, n=2) is None
    figures = {"eval/pass@4": 0.5, "eval/pass@2": 0.4}
    assert interval(figures, "eval/pass@4", problems=100, n=8) == wilson(0.5, 100)


def test_columns_have_axes_that_add_up_and_bands(tmp_path):
    history = read_history(make_run(tmp_path / "run", steps=4))
    steps, evals = step_columns(history), eval_columns(history)
    assert steps["x"]["tokens"] == [1600, 3200, 4800, 6400]
    assert steps["x"]["hours"] == pytest.approx([1.5 * i / 3600 for i in range(1, 5)], rel=1e-4)
    assert evals["x"] == {"step": [0, 4], "tokens": [0, 6400], "hours": [0, pytest.approx(6 / 3600, rel=1e-4)]}
    low, high = steps["bands"]["rollouts/pass@1"][0]
    assert low < steps["figures"]["rollouts/pass@1"][0] < high
    assert evals["bands"]["eval/pass@1"][0] is not None and "eval/pass@1/terms=3" not in evals["bands"]


def test_choices_of_many_steps_are_put_together():
    line = {"groups": 4, "tasks": 2, "success": [0.5] * 7, "success_bins": [1] + [0] * 10 + [3], "source": {"a": 4}}
    columns = choice_columns([{"step": i, **line} for i in range(300)])
    assert len(columns["x"]) == 150 and columns["bins"][0] == [2] + [0] * 10 + [6]
    assert columns["sources"] == {"a": [8] * 150} and columns["difficulty"] == [None] * 150
    assert choice_columns([]) is None


def test_funnels_count_what_came_through():
    steps = [
        {
            "groups/num": 10.0,
            "groups/spread_frac": 0.5,
            "groups/trained": 4.0,
            "guided/num": 2.0,
            "explore/rollouts": 3.0,
        },
        {"groups/num": 10.0, "groups/spread_frac": 0.3, "groups/trained": 3.0, "guided/solved_frac/level_1": 0.5},
    ]
    found = {funnel["title"]: funnel["stages"] for funnel in funnels(steps)}
    assert found["Groups"] == [["generated", 20], ["with differing rewards", 8], ["trained on", 7]]
    assert found["Exploration"] == [["asked for by explorers", 3], ["under a hint", 2]]
    assert "Synthesis" not in found and by_level(steps) == [["1", 0.5]]


def test_a_fit_says_what_it_cannot_tell():
    parameter = {
        "name": "A",
        "value": 0.9,
        "low": 0.5,
        "high": 1.4,
        "unit": "1",
        "meaning": "asymptote",
        "identified": False,
    }
    fit = {"law": "sigmoid", "formula": "f", "source": "s", "label": "l", "points": 9, "runs": 1, "method": "bootstrap"}
    shown = card(fit | {"parameters": [parameter], "r2": 0.5, "held_out": None, "warnings": ["too short"]})
    assert shown["estimates"] == [["A", "0.9", "not identified", "asymptote"]]
    assert shown["lines"][-1] == "Warning: too short."


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(RunError, match="must be the folder of a run"):
        write_report([tmp_path], tmp_path / "x.html")
