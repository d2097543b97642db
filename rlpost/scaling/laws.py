"""The laws that are fitted to runs, each as a formula over arrays; logarithms of what is positive are what is searched.

Shapes: `p` parameters, `n` points, `c` columns of a point; a leading `...` is any number of parameter sets at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a law.

    >>> Param("C_mid", "FLOPs", "compute at half of the gain").natural(np.log(100.0)).round()
    np.float64(100.0)
    """

    name: str
    unit: str
    meaning: str
    log: bool = True
    """Searched on a logarithmic scale."""

    def natural(self, value: Any) -> Any:
        """From the scale that is searched to the parameter itself."""
        return np.exp(value) if self.log else value


class Law(Protocol):
    """A formula with its parameters; `theta` holds them on the scale that is searched."""

    name: str
    formula: str
    source: str
    params: tuple[Param, ...]
    offset_by_run: bool
    """Every run has a constant of its own beside the parameters."""

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """The formula: `[..., p]` and `[n, c]` to `[..., n]`."""
        ...

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """The least and greatest values that are worth a thought, `[p]` each."""
        ...

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """Where a search begins, `[starts, p]`."""
        ...


class PowerLaw:
    """Loss over compute or data on several sizes of model: columns are N and log10 X; y is log10 L.

    log10 L(N, X) = -k(N) log10 X + E(run), k(N) = K_max / (1 + N_0 / N). arXiv:2509.25300, section 3.
    """

    name = "power law"
    formula = "log10 L = -k(N) log10 X + E,  k(N) = K_max / (1 + N_0 / N)"
    source = "arXiv:2509.25300"
    offset_by_run = True
    params: tuple[Param, ...] = (
        Param("K_max", "1", "slope of a model without bound"),
        Param("N_0", "parameters", "size at which the slope is half of K_max"),
    )

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """-k(N) log10 X; the run's constant E is added elsewhere."""
        return -learning_efficiency(np.exp(theta), x_nc[:, 0]) * x_nc[:, 1]

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """K_max from 1e-5 to 100; N_0 to a thousand times beyond the sizes that were run."""
        sizes = x_nc[:, 0]
        return np.log([1e-5, sizes.min() / 1e3]), np.log([100.0, sizes.max() * 1e3])

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """A grid."""
        sizes = np.log(x_nc[:, 0])
        return _grid(np.log([0.03, 0.3, 3.0]), np.linspace(sizes.min() - 1, sizes.max() + 3, 5))


def learning_efficiency(natural: Array, size_n: Any) -> Array:
    """k(N) = K_max / (1 + N_0 / N), for `[..., (K_max, N_0)]` and sizes `[n]`: arXiv:2509.25300.

    >>> learning_efficiency(np.array([0.1349, 13.09]), np.array([7.0, 72.0])).round(4).tolist()
    [0.047, 0.1141]
    """
    sizes = np.asarray(size_n, dtype=float)
    return natural[..., :1] / (1 + natural[..., 1:2] / sizes)


class Slope:
    """The power law of one size of model: columns are N and log10 X; y is log10 L."""

    name = "power law, one size"
    formula = "log10 L = -k log10 X + E"
    source = "arXiv:2509.25300"
    offset_by_run = True
    params: tuple[Param, ...] = (Param("k", "1", "slope of this size", log=False),)

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """-k log10 X."""
        return -theta[..., :1] * x_nc[:, 1]

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """A loss may also rise."""
        return np.array([-100.0]), np.array([100.0])

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """Linear: anywhere will do."""
        return np.zeros((1, 1))


class Sigmoid:
    """Pass rate over compute that levels off: the column is C, from 0 on; y is the pass rate R. arXiv:2510.13786.

    R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)
    """

    name = "sigmoid"
    formula = "R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)"
    source = "ScaleRL, arXiv:2510.13786"
    offset_by_run = False
    params: tuple[Param, ...] = (
        Param("R_0", "fraction", "pass rate before training", log=False),
        Param("A", "fraction", "pass rate that more of the same approaches", log=False),
        Param("C_mid", "x", "where half of the gain is made"),
        Param("B", "1", "how steep the rise is"),
    )

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """The formula; exactly R_0 at C = 0."""
        r_0, a, log_mid, log_b = (theta[..., i : i + 1] for i in range(4))
        with np.errstate(divide="ignore"):
            log_c = np.log(x_nc[:, 0])
        z = np.clip(np.exp(log_b) * (log_c - log_mid), -700.0, 700.0)
        return r_0 + (a - r_0) / (1 + np.exp(-z))

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """Rates from 0 to 1, C_mid to a hundred times the compute that was spent, B from 0.2 to 10."""
        c = x_nc[x_nc[:, 0] > 0, 0]
        return (
            np.array([0.0, 0.0, np.log(c.min() / 10), np.log(0.2)]),
            np.array([1.0, 1.0, np.log(c.max() * 100), np.log(10.0)]),
        )

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """R_0 where the data begin, A at and above where they end, C_mid over their range."""
        c = x_nc[x_nc[:, 0] > 0, 0]
        first, last = y_n[np.argmin(x_nc[:, 0])], y_n[np.argmax(x_nc[:, 0])]
        tops = np.clip([last, last + (last - first), 1.0], 0.0, 1.0)
        return _grid([first], tops, np.log(c.max()) + np.log([0.1, 0.3, 1.0, 3.0]), np.log([0.7, 1.5, 3.0]))


class BatchTradeOff:
    """Optimizer steps to a target over the batch: the column is B, in prompts; y is ln S. arXiv:1812.06162, eq. 2.11.

    (S / S_min - 1) (E / E_min - 1) = 1 with E = B S, which is S = S_min (1 + B_noise / B), B_noise = E_min / S_min
    """

    name = "batch size"
    formula = "S = S_min (1 + B_noise / B)"
    source = "arXiv:1812.06162"
    offset_by_run = False
    params: tuple[Param, ...] = (
        Param("S_min", "steps", "steps to the target with a batch without bound"),
        Param("B_noise", "prompts", "batch at which steps and prompts are both twice their least"),
    )

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """ln S."""
        return theta[..., :1] + np.log1p(np.exp(theta[..., 1:2]) / x_nc[:, 0])

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """B_noise to a thousand times beyond the batches that were run."""
        b = np.log(x_nc[:, 0])
        far = np.log(1e3)
        return np.array([y_n.min() - 2 * far, b.min() - far]), np.array([y_n.max() + far, b.max() + far])

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """A grid."""
        b = np.log(x_nc[:, 0])
        return _grid(y_n.min() - np.array([0.1, 1.0, 3.0]), np.linspace(b.min() - 2, b.max() + 3, 5))


class DataReuse:
    """What another pass over the same prompts is worth: columns are D and U; y is log10 L. arXiv:2305.16264, eq. 5.

    log10 L = -k log10 D' + E(run),  D' = U (1 + R* (1 - exp(-(D / U - 1) / R*))) for D > U, else D

    D prompts in all, U different ones. The first R* repetitions are worth 63 % of what as much new data would be.
    """

    name = "data reuse"
    formula = "log10 L = -k log10 D' + E,  D' = U (1 + R* (1 - exp(-(D/U - 1) / R*)))"
    source = "arXiv:2305.16264"
    offset_by_run = True
    params: tuple[Param, ...] = (
        Param("k", "1", "slope of fresh data"),
        Param("R*", "passes", "repetitions after which further ones are worth little"),
    )

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """-k log10 D'."""
        return -np.exp(theta[..., :1]) * np.log10(effective_data(x_nc[:, 0], x_nc[:, 1], np.exp(theta[..., 1:2])))

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """R* from a hundredth of a pass to a thousand times the passes that were made."""
        passes = max(1.0, float((x_nc[:, 0] / x_nc[:, 1]).max()))
        return np.log([1e-5, 1e-2]), np.log([100.0, passes * 1e3])

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """A grid."""
        return _grid(np.log([0.03, 0.3]), np.log([0.3, 3.0, 30.0]))


def effective_data(total: Any, unique: Any, limit: Any) -> Array:
    """D': how much fresh data `total` prompts are worth, of which `unique` are different.

    >>> effective_data(np.array([50.0, 100.0, 1e9]), 100.0, 15.0).round().tolist()
    [50.0, 100.0, 1600.0]
    """
    repeats = np.maximum(np.asarray(total) / unique - 1, 0.0)
    return np.minimum(total, unique) - unique * limit * np.expm1(-repeats / limit)


class EntropyLaw:
    """Pass rate bought with entropy: the column is H, in nats; y is the pass rate R. arXiv:2505.22617.

    R = -a exp(H) + b; what is left at H = 0 is b - a.
    """

    name = "entropy"
    formula = "R = -a exp(H) + b"
    source = "arXiv:2505.22617"
    offset_by_run = False
    params: tuple[Param, ...] = (
        Param("a", "fraction", "pass rate for a unit of exp(H)", log=False),
        Param("ceiling", "fraction", "b - a: pass rate when no entropy is left", log=False),
    )

    def predict(self, theta: Array, x_nc: Array) -> Array:
        """ceiling - a (exp(H) - 1)."""
        return theta[..., 1:2] - theta[..., :1] * np.expm1(x_nc[:, 0])

    def box(self, x_nc: Array, y_n: Array) -> tuple[Array, Array]:
        """Rates may leave [0, 1]: that says that the law does not hold."""
        return np.array([-1e3, -1e3]), np.array([1e3, 1e3])

    def starts(self, x_nc: Array, y_n: Array) -> Array:
        """Linear: anywhere will do."""
        return np.array([[0.0, float(y_n.mean())]])


def _grid(*axes: Sequence[float] | Array) -> Array:
    return np.array(list(product(*axes)), dtype=float)
