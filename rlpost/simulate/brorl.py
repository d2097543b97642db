"""BroRL's token-level simulation: do more draws a step keep correct tokens from losing mass? arXiv:2510.01180.

Shapes: `V` tokens, of which the first is an anchor and the next `num_correct` are correct; `T` figures, one at the
start and one after each step. The policy is a softmax over one token. A step draws N tokens, gives a reward r of 1 to
correct ones and -1 to others, takes off the mean b of the draws, and descends

    L = -(1 / N) sum_draws (r_j - b) p_j = -sum_v w_v p_v,   dL / dz_v = -p_v (w_v - sum_u w_u p_u)

with w_v the number of draws of v times its r - b, over N: linear in the probability, not in its logarithm. In the
seeded regime correct tokens begin with a logit of 3, in the flat one with 0 as all others; the anchor, which is wrong,
begins with 5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rlpost.errors import RunError

Vector = NDArray[np.float64]
OptimizerName = Literal["adamw", "sgd"]

ANCHOR_LOGIT, SEED_LOGIT = 5.0, 3.0
DEFAULT_LR: dict[OptimizerName, float] = {"adamw": 1e-3, "sgd": 100.0}
EXPECTED_Q: dict[tuple[OptimizerName, float], dict[int, float]] = {
    ("adamw", 0.0): {4: 0.6086, 8: 0.6098, 16: 0.6143, 512: 0.6408, 51_200: 0.6541},
    ("adamw", 0.01): {4: 0.6018, 16: 0.6074, 512: 0.6339, 51_200: 0.6473},
    ("sgd", 0.0): {4: 0.6297, 16: 0.6297, 512: 0.6297, 51_200: 0.6297},
}
"""Q at the end with the settings' defaults, by optimizer, weight decay and N; seeds differ by up to 0.0007."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. Weight decay is AdamW's, decoupled; plain SGD has none.

    >>> Settings(optimizer="adamw", width=8).expected_q
    0.6098
    """

    optimizer: OptimizerName
    width: int
    """N, the draws of a step."""
    steps: int = 1000
    vocab: int = 128_000
    num_correct: int = 10_000
    lr: float | None = None
    """None: that of the optimizer in DEFAULT_LR."""
    weight_decay: float = 0.0
    regime: Literal["seeded", "flat"] = "seeded"
    seed: int = 0

    @property
    def step_size(self) -> float:
        """The learning rate."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def expected_q(self) -> float | None:
        """Q at the end as it was found before, where these settings were tried."""
        standard = Settings(optimizer=self.optimizer, width=self.width)
        decay = 0.0 if self.optimizer == "sgd" else self.weight_decay
        same = ("steps", "vocab", "num_correct", "regime", "step_size")
        if any(getattr(self, name) != getattr(standard, name) for name in same):
            return None
        return EXPECTED_Q.get((self.optimizer, decay), {}).get(self.width)


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run did to the correct tokens."""

    settings: Settings
    q_T: list[float]
    """Their mass, before the first step and after each."""
    risen_T: list[float]
    """The share of them that are likelier than at the start."""
    worst_drop: float
    """The least change of probability of one of them over the run; above 0 where all rose."""

    def summary(self) -> dict[str, float | None]:
        """The figures of the table."""
        return {
            "q_start": self.q_T[0],
            "q_end": self.q_T[-1],
            "q_lowest": min(self.q_T),
            "risen_frac": self.risen_T[-1],
            "worst_drop": self.worst_drop,
            "q_expected": self.settings.expected_q,
        }


class AdamW:
    """Adam with decoupled weight decay and torch's defaults, arXiv:1711.05101; changes the logits in place."""

    BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, size: int, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.num_steps = 0
        self.mean_V, self.square_V = np.zeros(size), np.zeros(size)

    def step(self, z_V: Vector, grad_V: Vector) -> None:
        """One step down."""
        self.num_steps += 1
        self.mean_V += (1 - self.BETA_1) * (grad_V - self.mean_V)
        self.square_V += (1 - self.BETA_2) * (grad_V * grad_V - self.square_V)
        scale_V = np.sqrt(self.square_V / (1 - self.BETA_2**self.num_steps))
        scale_V += self.EPS
        if self.weight_decay:
            z_V *= 1 - self.lr * self.weight_decay
        z_V -= self.lr / (1 - self.BETA_1**self.num_steps) * self.mean_V / scale_V


class SGD:
    """Plain gradient descent; changes the logits in place."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def step(self, z_V: Vector, grad_V: Vector) -> None:
        """One step down."""
        z_V -= self.lr * grad_V


def simulate(settings: Settings) -> Trace:
    """One run; the same seed gives the same figures."""
    rng = np.random.default_rng(settings.seed)
    z_V, correct = start(settings)
    optimizer = make_optimizer(settings)
    p_V = softmax(z_V)
    start_V, q_T, risen_T = p_V[correct], [float(p_V[correct].sum())], [0.0]
    for _ in range(settings.steps):
        counts_V = draw(p_V, settings.width, rng)
        optimizer.step(z_V, gradient(p_V, counts_V, correct))
        p_V = softmax(z_V)
        q_T.append(float(p_V[correct].sum()))
        risen_T.append(float((p_V[correct] > start_V).mean()))
    return Trace(settings, q_T, risen_T, worst_drop=float((p_V[correct] - start_V).min()))


def start(settings: Settings) -> tuple[Vector, slice]:
    """The logits before the first step, and where the correct tokens stand."""
    correct = slice(1, 1 + settings.num_correct)
    z_V = np.zeros(settings.vocab)
    z_V[0] = ANCHOR_LOGIT
    if settings.regime == "seeded":
        z_V[correct] = SEED_LOGIT
    return z_V, correct


def make_optimizer(settings: Settings) -> AdamW | SGD:
    """The optimizer of a run."""
    if settings.optimizer == "sgd":
        return SGD(settings.step_size)
    return AdamW(settings.vocab, settings.step_size, settings.weight_decay)


def softmax(z_V: Vector) -> Vector:
    """Probabilities."""
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    return p_V


def draw(p_V: Vector, width: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each token is among `width` independent draws."""
    ends_V = np.cumsum(p_V)
    # Sorted points find their tokens in one pass through the memory; the last end is 1 only up to rounding.
    points = np.sort(rng.random(width)) * ends_V[-1]
    return np.bincount(np.searchsorted(ends_V, points, side="right"), minlength=len(p_V))


def gradient(p_V: Vector, counts_V: NDArray[np.int64], correct: slice) -> Vector:
    """dL / dz as in the head of this file: a sum over what was drawn, shared by all, and a part of each drawn token."""
    width, num_right = int(counts_V.sum()), int(counts_V[correct].sum())
    baseline = 2 * num_right / width - 1
    drawn = np.flatnonzero(counts_V)
    right = (drawn >= correct.start) & (drawn < correct.stop)
    weight = counts_V[drawn] * (np.where(right, 1.0, -1.0) - baseline) / width
    pull = weight * p_V[drawn]
    grad_V = p_V * pull.sum()
    grad_V[drawn] -= pull
    return grad_V


def run(settings: Sequence[Settings], folder: Path) -> None:
    """Simulate each, print the table, and write `brorl.json` and `brorl.png` into the folder."""
    for one in settings:
        check(one)
    console = Console()
    traces = []
    for one in settings:
        with console.status(f"{one.optimizer}, N = {one.width:,}"):
            traces.append(simulate(one))
    console.print(table(traces))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "brorl.json").write_text(json.dumps([as_json(trace) for trace in traces]) + "\n", encoding="utf-8")
    plot(traces, folder / "brorl.png")
    console.print(f"written: {folder / 'brorl.json'}, {folder / 'brorl.png'}", highlight=False, soft_wrap=True)


def check(settings: Settings) -> None:
    """What a simulation needs, or a RunError that says what is amiss."""
    for name, value in (("--widths", settings.width), ("--steps", settings.steps), ("--correct", settings.num_correct)):
        if value < 1:
            raise RunError(f"{name} must be >= 1 (got {value})")
    if settings.vocab < settings.num_correct + 2:
        raise RunError(
            f"--vocab must be >= --correct + 2, the first token and a wrong one (got {settings.vocab} and "
            f"{settings.num_correct})"
        )
    if settings.step_size <= 0 or settings.weight_decay < 0:
        raise RunError(f"--lr must be > 0 and --weight-decay >= 0 (got {settings.step_size}, {settings.weight_decay})")


def as_json(trace: Trace) -> dict[str, Any]:
    """A run's settings, summary and curves."""
    curves = {"q_by_step": trace.q_T, "risen_frac_by_step": trace.risen_T}
    rounded = {name: [round(value, 6) for value in curve] for name, curve in curves.items()}
    return {**asdict(trace.settings), "lr": trace.settings.step_size, **trace.summary(), **rounded}


def table(traces: Sequence[Trace]) -> Table:
    """A row a run; "rose" is the share of correct tokens that did."""
    rows = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    rows.add_column("optimizer", no_wrap=True)
    for heading in ("N", "Q start", "Q end", "expected", "lowest", "rose", "worst drop"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for trace in traces:
        figures, settings = trace.summary(), trace.settings
        q_start, q_end, q_lowest, expected = (
            "-" if figures[name] is None else f"{figures[name]:.4f}"
            for name in ("q_start", "q_end", "q_lowest", "q_expected")
        )
        drop = f"{trace.worst_drop:+.1e}"
        rows.add_row(
            settings.optimizer,
            f"{settings.width:,}",
            q_start,
            q_end,
            expected,
            q_lowest,
            f"{trace.risen_T[-1]:.1%}",
            drop,
        )
    return rows


def plot(traces: Sequence[Trace], file: Path) -> None:
    """A row an optimizer: the mass of the correct tokens over the steps, and the share of them that rose."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    optimizers = list(dict.fromkeys(trace.settings.optimizer for trace in traces))
    widths = sorted({trace.settings.width for trace in traces})
    colours = dict(zip(widths, mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(widths))), strict=True))
    size = (11, 0.6 + 3.6 * len(optimizers))
    figure, axes = plt.subplots(len(optimizers), 2, figsize=size, sharex=True, sharey="col", squeeze=False)
    for (mass, risen), optimizer in zip(axes, optimizers, strict=True):
        for trace in (trace for trace in traces if trace.settings.optimizer == optimizer):
            line = {"color": colours[trace.settings.width], "label": f"N = {trace.settings.width:,}", "linewidth": 1.6}
            mass.plot(trace.q_T, **line)
            risen.plot(range(1, len(trace.risen_T)), trace.risen_T[1:], **line)
        rate = next(trace.settings.step_size for trace in traces if trace.settings.optimizer == optimizer)
        mass.axhline(traces[0].q_T[0], color="grey", linewidth=0.8, linestyle=":")
        mass.set(title=f"{optimizer}, lr {rate:g}", ylabel="mass of the correct tokens, Q")
        risen.set(title=f"{optimizer}, lr {rate:g}", ylabel="share of correct tokens that rose", ylim=(-0.03, 1.03))
        mass.legend(frameon=False, fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
