"""BroRL's simulation: gradient and AdamW against torch, figures against those found before, and the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlpost.__main__ import FAILED, main
from rlpost.simulate.brorl import SGD, AdamW, Settings, draw, gradient, simulate, softmax, start

SMALL = ["--vocab", "300", "--correct", "30", "--steps", "20"]


@pytest.mark.parametrize("counts", [[3, 0, 2, 1, 0, 0, 2], [0, 4, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 0]])
def test_gradient_is_that_of_the_loss(counts: list[int]) -> None:
    # Seven tokens, of which 1 to 3 are correct; the loss as it is written, over each draw.
    z = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    drawn = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    reward = torch.where((drawn >= 1) & (drawn < 4), 1.0, -1.0).double()
    loss = -((reward - reward.mean()) * torch.softmax(z, 0)[drawn]).mean()
    (exact,) = torch.autograd.grad(loss, z)
    found = gradient(softmax(z.detach().numpy()), np.array(counts), slice(1, 4))
    np.testing.assert_allclose(found, exact.numpy(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_is_that_of_torch(weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    z, ours = rng.normal(size=5), AdamW(5, 1e-2, weight_decay)
    parameter = torch.nn.Parameter(torch.tensor(z))
    theirs = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=weight_decay)
    for _ in range(20):
        slope = rng.normal(size=5) * 1e-7  # so small that eps = 1e-8 matters
        ours.step(z, slope)
        parameter.grad = torch.tensor(slope)
        theirs.step()
    np.testing.assert_allclose(z, parameter.detach().numpy(), rtol=1e-12)


def test_sgd_steps_down() -> None:
    z = np.array([1.0, 2.0])
    SGD(lr=0.5).step(z, np.array([1.0, -4.0]))
    assert z.tolist() == [0.5, 4.0]


def test_draws_follow_the_probabilities() -> None:
    # 100,000 draws: a frequency has a standard error of at most 0.0016.
    p = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
    counts = draw(p, 100_000, np.random.default_rng(1))
    assert (counts.sum(), counts[1], counts[4]) == (100_000, 0, 0)
    assert np.abs(counts / 100_000 - p).max() < 4 * 0.0016


@pytest.mark.parametrize(("regime", "mass"), [("seeded", 0.62964), ("flat", 0.07803)])
def test_start_has_the_mass_of_the_paper(regime: str, mass: float) -> None:
    # 10000 e^3 / (10000 e^3 + 117999 + e^5), and 10000 / (127999 + e^5)
    settings = Settings(optimizer="adamw", width=4, regime=regime)  # type: ignore[arg-type]
    z, correct = start(settings)
    assert softmax(z)[correct].sum() == pytest.approx(mass, abs=1e-5)


def test_the_same_seed_gives_the_same_figures() -> None:
    runs = [Settings(optimizer="adamw", width=8, vocab=300, num_correct=30, steps=20, seed=s) for s in (0, 0, 1)]
    first, again, other = (simulate(settings) for settings in runs)
    assert first == again
    assert first.q_T != other.q_T
    assert len(first.q_T) == len(first.risen_T) == 21


def test_expected_figures_are_shown_for_the_settings_that_they_were_found_with() -> None:
    assert Settings(optimizer="adamw", width=512, weight_decay=0.01).expected_q == 0.6339
    assert Settings(optimizer="adamw", width=512, lr=1e-3, seed=5).expected_q == 0.6408
    for other in ({"width": 32}, {"steps": 10}, {"lr": 0.1}, {"regime": "flat"}, {"weight_decay": 0.5}):
        assert Settings(**{"optimizer": "adamw", "width": 4, **other}).expected_q is None


def test_plain_sgd_loses_no_mass_at_few_draws() -> None:
    trace = simulate(Settings(optimizer="sgd", width=4, steps=100))
    assert trace.q_T[-1] >= trace.q_T[0]
    assert min(trace.q_T) >= trace.q_T[0] - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("width", "risen"), [(4, 0.136), (512, 0.823)])
def test_adamw_loses_mass_at_few_draws_and_gains_at_many(width: int, risen: float) -> None:
    trace = simulate(Settings(optimizer="adamw", width=width))
    assert trace.settings.expected_q is not None
    assert trace.q_T[-1] == pytest.approx(trace.settings.expected_q, abs=0.001)
    assert trace.risen_T[-1] == pytest.approx(risen, abs=0.01)
    assert (trace.q_T[-1] > trace.q_T[0]) is (width == 512)


def test_command_prints_a_table_and_writes_its_files(tmp_path, capsys) -> None:
    folder = tmp_path / "deep" / "brorl"
    assert main(["simulate", "brorl", *SMALL, "--widths", "4", "64", "--seed", "3", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("adamw", "sgd", "64", "worst drop", "brorl.png"))
    runs = json.loads((folder / "brorl.json").read_text())
    assert [(run["optimizer"], run["width"]) for run in runs] == [("adamw", 4), ("adamw", 64), ("sgd", 4), ("sgd", 64)]
    assert (runs[0]["lr"], runs[2]["lr"], runs[0]["seed"], runs[0]["q_expected"]) == (1e-3, 100.0, 3, None)
    assert len(runs[0]["q_by_step"]) == len(runs[0]["risen_frac_by_step"]) == 21
    assert (folder / "brorl.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be >= 1 (got 0)"),
        (["--widths", "4", "0"], "--widths must be >= 1 (got 0)"),
        (["--vocab", "31"], "--vocab must be >= --correct + 2, the first token and a wrong one (got 31 and 30)"),
        (["--lr", "0"], "--lr must be > 0 and --weight-decay >= 0 (got 0.0, 0.0)"),
    ],
)
def test_command_says_what_is_wrong_with_its_options(options, message, tmp_path, capsys) -> None:
    assert main(["simulate", "brorl", *SMALL, *options, "--out", str(tmp_path / "none")]) == FAILED
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "none").exists()
