"""Folders of runs to fits, advice and pictures; through the command line as a person would ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scaling_runs import PROMPTS_A_STEP, power, rising, write_run

from rlpost.__main__ import main
from rlpost.errors import RunError
from rlpost.scaling.ask import ask, early_stop
from rlpost.scaling.fits import curvature, fit_curves, power_points, slopes, steps_to
from rlpost.scaling.largest import predict_largest
from rlpost.scaling.runs import alike, model_size, read_run, read_runs

SIZES = {64: 1.0, 96: 2.5, 160: 6.0, 256: 16.0}
"""Hidden size -> cost of a step against the smallest."""
K_MAX, N_0 = 0.4, 6e5


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """Four sizes on three seeds, on a power law in steps."""
    folder = tmp_path_factory.mktemp("family")
    for hidden, cost in SIZES.items():
        k = K_MAX / (1 + N_0 / 39 / hidden**2)
        for seed in range(3):
            slope = k * (1 + 0.05 * np.random.default_rng([hidden, seed]).standard_normal())
            shape = {"hidden": hidden, "seed": seed, "flops": 1e9 * cost, "noise": 0.002}
            write_run(folder / f"h{hidden}-{seed}", power(slope), **shape)
    return folder


def test_a_run_is_read_as_it_was_logged(tmp_path: Path):
    run = read_run(write_run(tmp_path / "one", rising(), steps=8, figures=lambda step: {"curriculum/epoch": step / 4}))
    assert run.size == model_size(run.recipe) == 39 * 64**2
    np.testing.assert_array_equal(run.step_e, [0, 4, 8])
    np.testing.assert_allclose(run.pass_e, [rising()(step) for step in (0, 4, 8)])
    np.testing.assert_array_equal(run.compute_e, [0, 4e9, 8e9])
    np.testing.assert_array_equal(run.prompts_e, [0, 4 * PROMPTS_A_STEP, 8 * PROMPTS_A_STEP])
    np.testing.assert_array_equal(run.seconds_e, [0, 8, 16])
    assert (run.trials, run.passes, run.planned, run.per_step("compute")) == (1600, 7 / 4, 8, 1e9)
    assert read_run(tmp_path / "one", "six_nt").compute_e[-1] == 4e9


def test_a_run_that_still_goes_is_read_up_to_its_last_whole_line(tmp_path: Path):
    folder = write_run(tmp_path / "one", rising(), steps=8)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "eval/pa')
    assert len(read_run(folder).step_e) == 3


def test_runs_are_alike_where_only_their_seed_and_name_differ(tmp_path: Path):
    one, two = (read_run(write_run(tmp_path / f"s{seed}", rising(), seed=seed)) for seed in (0, 1))
    other = read_run(write_run(tmp_path / "lr", rising(), recipe={"engine.lr": 5e-4}))
    wide = read_run(write_run(tmp_path / "wide", rising(), hidden=96))
    assert alike(one) == alike(two)
    assert len({alike(one), alike(other), alike(wide)}) == 3
    assert alike(one, ["engine.lr"]) == alike(other, ["engine.lr"])


def test_laws_of_a_family_are_found_in_its_folders(family: Path):
    fits = fit_curves(read_runs([family]), num=200)
    for x in ("compute", "rollouts"):
        [power_law] = fits.named("power law", x)
        assert power_law["K_max"].low < K_MAX < power_law["K_max"].high
        assert power_law["N_0"].low < N_0 < power_law["N_0"].high
    assert len(fits.named("sigmoid")) == 4
    text = "\n".join(fits.notes)
    assert "steps over batch size: needs runs alike but for prompts_per_step (all have 32)" in text
    assert "data reuse: needs a run that goes through its tasks 4 times or more" in text
    assert "four steps or more with policy/entropy" in text
    assert json.loads(json.dumps(fits.to_dict()))["runs"][0].endswith("h160-0")


def test_slopes_by_size_assume_no_law(family: Path):
    found = slopes(power_points(read_runs([family]), "compute"))
    assert [(size, num) for size, num, _ in found] == [(39 * hidden**2, 3) for hidden in SIZES]
    for hidden, (_, _, k) in zip(SIZES, found, strict=True):
        assert k.low < K_MAX / (1 + N_0 / 39 / hidden**2) < k.high


def test_a_curve_that_is_no_line_is_called_so(tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path / f"bent-{seed}", rising(0.3, 0.7, 4.0, 2.0), seed=seed, noise=0.002)
    [line] = fit_curves(read_runs([tmp_path]), num=50).named("power law, one size", "compute")
    assert any("not a straight line: it gets flatter" in text for text in line.warnings)
    assert any("K_max and N_0 need several sizes" in text for text in line.warnings)


def test_a_straight_line_is_not_called_bent(family: Path):
    bend = curvature(power_points(read_runs([family]), "compute"))
    assert bend is not None
    assert bend.low < 0 < bend.high


def test_the_largest_size_is_predicted_from_the_smaller_ones(family: Path):
    found = predict_largest(read_runs([family]), num=300)
    assert found.size == 39 * 256**2
    assert found.k.low < found.k_seen.value < found.k.high
    assert found.loss.low < found.loss_seen.value < found.loss.high
    assert abs(found.error) < abs(found.same_slope - found.loss_seen.value)
    with pytest.raises(RunError, match="two smaller ones"):
        predict_largest(read_runs([family / "h64-0", family / "h96-0"]))


def test_batch_sizes_give_the_trade_off(tmp_path: Path):
    for batch in (8, 16, 32, 64, 128):
        for seed in range(2):
            pace = 5 * (1 + 40 / batch)
            asked = {"prompts_per_step": batch}
            curve = rising(0.2, 0.9, 2 * pace, 1.0)
            write_run(tmp_path / f"b{batch}-{seed}", curve, steps=200, seed=seed, noise=0.003, recipe=asked)
    fits = fit_curves(read_runs([tmp_path]), num=200)
    [found] = fits.named("batch size")
    assert found["B_noise"].low < 40 < found["B_noise"].high
    answer = ask(fits, flops=1e12)
    assert any("twice the fewest steps" in text for text in answer.recommended)


def test_steps_to_a_target_lie_between_evaluations(tmp_path: Path):
    run = read_run(write_run(tmp_path / "line", lambda step: step / 100, steps=40, every=10))
    assert [steps_to(run, target) for target in (0.0, 0.15, 0.4)] == pytest.approx([0, 15, 40])
    assert np.isnan(steps_to(run, 0.5))


def test_data_reuse_and_entropy_are_fitted_where_runs_show_them(tmp_path: Path):
    def figures(step: int) -> dict[str, float]:
        entropy = 0.5 / (1 + step / 10)
        rate = float(0.9 - 0.5 * np.expm1(entropy) + 0.01 * np.sin(17 * step))
        return {"policy/entropy": entropy, "rollouts/pass@1": rate, "curriculum/epoch": (step + 1) / 2}

    worth = lambda step: min(step, 2) + 2 * 3 * (1 - np.exp(-max(step / 2 - 1, 0) / 3))  # noqa: E731
    for seed in range(3):
        curve = lambda step: 1 - 0.6 * max(worth(step), 1e-9) ** -0.3 if step else 0.1  # noqa: E731
        write_run(tmp_path / f"r{seed}", curve, steps=40, every=1, seed=seed, noise=0.002, figures=figures)
    fits = fit_curves(read_runs([tmp_path]), num=200)
    [reuse], [entropy] = fits.named("data reuse"), fits.named("entropy")
    assert reuse["R*"].low < 3 < reuse["R*"].high
    assert entropy["ceiling"].value == pytest.approx(0.9, abs=0.01)
    assert entropy["a"].value == pytest.approx(0.5, abs=0.02)


def test_advice_names_a_size_its_steps_and_what_is_not_known(family: Path):
    fits = fit_curves(read_runs([family]), num=200)
    little, much = (ask(fits, flops=flops) for flops in (2e10, 2e13))
    assert little.choices[0].name != much.choices[0].name == f"N = {39 * 256**2:.3g}"
    best = much.choices[0]
    assert best.steps == pytest.approx(2e13 / 16e9)
    assert best.passed.low < best.passed.value < best.passed.high
    text = str(much)
    assert "rollouts a prompt: all runs that are otherwise alike draw 16" in text
    assert "prompts a step: no runs that differ in prompts_per_step" in text
    assert "whether the line holds so far" in text
    assert "sizes that were not run" in text


def test_hours_and_flops_buy_the_same_steps_where_steps_cost_the_same(family: Path):
    fits = fit_curves(read_runs([family]), num=50)
    by_hours = {one.name: one.steps for one in ask(fits, hours=1.0).choices}
    assert set(by_hours.values()) == {1800.0}
    with pytest.raises(RunError, match="needs one budget"):
        ask(fits)
    with pytest.raises(RunError, match="must be above 0"):
        ask(fits, flops=-1.0)


def test_group_sizes_are_compared_at_the_same_budget(tmp_path: Path):
    for group, k in ((8, 0.1), (32, 0.4)):
        for seed in range(3):
            asked = {"sampling.group_size": group}
            write_run(tmp_path / f"g{group}-{seed}", power(k), seed=seed, noise=0.002, recipe=asked)
    answer = ask(fit_curves(read_runs([tmp_path]), num=100), flops=1e11)
    assert any(text.startswith("32 rollouts a prompt (") for text in answer.recommended)


def test_the_noise_scale_stands_in_for_batch_sizes_that_were_not_run(tmp_path: Path):
    write_run(tmp_path / "one", rising(), noise=0.004, figures=lambda step: {"noise/scale": 48.0})
    answer = ask(fit_curves(read_runs([tmp_path]), num=50), flops=1e11)
    assert any("about 48, the gradient noise scale" in text for text in answer.recommended)


@pytest.mark.parametrize(
    ("curve", "noise", "steps", "verdict"),
    [
        (rising(0.3, 0.8, 4.0, 3.0), 0.001, 40, "stop"),  # flat since step 10
        (power(0.4), 0.001, 20, "go on"),
        (rising(), 0.05, 12, "cannot tell"),
    ],
)
def test_a_run_is_stopped_only_where_both_laws_say_so(tmp_path: Path, curve, noise, steps, verdict):
    run = read_run(write_run(tmp_path / "run", curve, steps=steps, every=1, noise=noise))
    assert early_stop(run, planned=steps * 1.5, worth=0.02, num=200).verdict == verdict


def test_a_run_without_steps_left_is_one_message(tmp_path: Path):
    run = read_run(write_run(tmp_path / "done", rising()))
    with pytest.raises(RunError, match=r"done has no steps left \(it is at 40 of 40\)"):
        early_stop(run)


def test_fit_on_the_command_line_prints_and_draws(family: Path, tmp_path: Path, capsys):
    assert main(["scaling", "fit", str(family), "--draws", "50", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for text in ("K_max = ", "bootstrap over whole runs, 50 draws", "predicted from the first", "not fitted:"):
        assert text in said
    written = json.loads((tmp_path / "out/fits.json").read_text())
    pictures = list((tmp_path / "out").glob("*.png"))
    assert len(pictures) == len(written["fits"]) + 2  # k(N) has a picture of its own, by compute and by rollouts
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)


def test_ask_on_the_command_line_answers(family: Path, tmp_path: Path, capsys):
    assert main(["scaling", "ask", str(family), "--budget", "1e11", "--draws", "50"]) == 0
    assert "Recommended:" in capsys.readouterr().out
    run = write_run(tmp_path / "run", rising(0.3, 0.8, 4.0, 3.0), every=1, noise=0.001)
    assert main(["scaling", "ask", str(run), "--planned", "60", "--worth", "0.02", "--draws", "50"]) == 0
    assert "run: stop: 20 steps remain" in capsys.readouterr().out


def broken(folder: Path, text: str) -> None:
    (write_run(folder / "a", rising()) / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda folder: None, ["fit"], "must be the folder of a run"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), ["fit"], "recipe.yaml or summary.json"),
        (lambda folder: write_run(folder / "a", rising()), ["ask"], "needs one budget"),
        (lambda folder: write_run(folder / "a", rising()), ["ask", "--stop", "--budget", "1"], "one thing at a time"),
        (lambda folder: broken(folder, "{\n{}\n"), ["fit"], "metrics.jsonl:1 must be JSON"),
        (lambda folder: broken(folder, ""), ["fit"], "must hold held-out evaluations"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, capsys, make, arguments, message):
    make(tmp_path)
    assert main(["scaling", arguments[0], str(tmp_path), *arguments[1:]]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said
