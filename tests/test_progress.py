import io

from rich.console import Console

from rlpost.progress import Progress, duration, step_line
from rlpost.recipe import Recipe

METRICS = {
    "reward/mean": 0.4321,
    "reward/solved_frac": 0.25,
    "policy/entropy": 1.5,
    "optim/grad_norm": 0.01234,
    "rollouts/length_mean": 21.6,
    "time/step_s": 4.0,
    "time/generate_s": 2.0,
    "time/train_s": 1.0,
}
LINE = "reward 0.432  solved 25.0%  entropy 1.500  grad 0.0123  length 22  4.0 s (generate 50%, train 25%)"
SUMMARY = {
    "steps": 3,
    "wall_s": 75.0,
    "eval": {"before": {"eval/pass@1": 0.25, "eval/[level] 2": None}, "after": {"eval/pass@1": 0.5}},
    "phase_s": {"generate": 6.0, "train": 3.0, "sync": 1.0, "setup": 9.0},
    "phase_frac": {"generate": 0.6, "train": 0.3, "sync": 0.1},
    "overhead_frac": 0.1,
    "memory": {"of": "device memory", "peak_gib": {"generate": 70.126, "setup": 1.0}},
}


class World:
    def __init__(self, is_main=True):
        self.is_main = is_main


def console(terminal=False, quiet=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, highlight=False, quiet=quiet)


def run(total_steps, console, start=0):
    with Progress(Recipe(name="run"), World(), total_steps, start, console=console) as progress:
        for step in range(start, total_steps):
            progress.update(step, METRICS)
    return console.file.getvalue()


def test_step_line_says_the_figures_that_matter_and_leaves_out_what_is_missing():
    assert step_line(METRICS) == LINE
    assert step_line({"reward/mean": 1.0}) == "reward 1.000"


def test_without_a_terminal_each_step_is_one_line():
    out = run(2, console()).splitlines()
    assert out == [f"step 1/2  {LINE}  left 0:00", f"step 2/2  {LINE}  left 0:00"]


def test_a_long_run_without_a_terminal_prints_about_a_hundred_lines_with_the_first_and_the_last():
    out = run(1001, console()).splitlines()
    assert 100 <= len(out) <= 103
    assert out[0].startswith("step 1/1001 ") and out[-1].startswith("step 1001/1001 ")


def test_a_resumed_run_prints_its_first_step():
    out = run(510, console(), start=300).splitlines()
    assert out[0].startswith("step 301/510 ")


def test_on_a_terminal_there_is_a_live_display_and_no_lines():
    out = run(3, console(terminal=True))
    assert "3/3" in out and "reward 0.432" in out
    assert "step 3/3" not in out


def test_other_ranks_are_silent(capsys):
    with Progress(Recipe(name="run"), World(is_main=False), 2) as progress:
        progress.update(0, METRICS)
        progress.message("hello")
        progress.final(SUMMARY)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_message_is_printed_as_it_is():
    silent = console()
    Progress(Recipe(name="run"), World(), 1, console=silent).message("[red]saved[/] to runs/[x]")
    assert silent.file.getvalue() == "[red]saved[/] to runs/[x]\n"


def test_final_shows_before_and_after_and_where_time_went():
    shown = console()
    Progress(Recipe(name="run"), World(), 3, console=shown).final(SUMMARY)
    rows = [line.replace("│", " ").split() for line in shown.file.getvalue().splitlines()]
    assert ["eval/pass@1", "0.250", "0.500", "+0.250"] in rows
    assert ["eval/[level]", "2", "-", "-"] in rows
    assert ["generate", "6.0", "s", "60.0%", "70.13"] in rows
    assert ["setup", "9.0", "s", "1.00"] in rows
    assert ["train", "3.0", "s", "30.0%"] in rows
    assert ["peak:", "device", "memory"] in rows
    assert ["overhead", "of", "a", "step", "10.0%"] in rows


def test_without_a_gauge_final_speaks_of_time_alone():
    shown = console()
    Progress(Recipe(name="run"), World(), 3, console=shown).final(SUMMARY | {"memory": None})
    assert "GiB" not in shown.file.getvalue() and "peak" not in shown.file.getvalue()


def test_duration_reads_as_a_clock():
    assert [duration(x) for x in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
