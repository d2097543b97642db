"""Item response theory: abilities and difficulties from passes, by maximum a posteriori.

P(pass) = sigmoid(a_i (theta - b_i)):  theta ability, b_i difficulty, a_i discrimination (1 in the Rasch model).

Passes are counted as k of n tries, so a 0/1 response is k of 1; a -1 for a wrong answer, as some code has it, is an
error. Priors keep estimates finite where all or no answers are right, where maximum likelihood diverges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from rlpost.errors import RunError

if TYPE_CHECKING:
    import numpy as np

TEXT_FEATURES = 64
MAX_SLOPE = 4.0
BLOCK = 10_000
"""Items at once, where all of them would take gigabytes."""


@dataclass(frozen=True)
class Fit:
    """What a response matrix `[models, items]` says, NaN where an item was never tried."""

    ability: np.ndarray
    difficulty: np.ndarray
    slope: np.ndarray
    precision: np.ndarray
    """Of each difficulty: the curvature of the log-posterior."""


def ability_map(
    difficulty: np.ndarray,
    passes: np.ndarray,
    tries: np.ndarray,
    *,
    slope: np.ndarray | None = None,
    start: float = 0.0,
    prior: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Ability theta and its standard error, by Newton's method; `prior` is its mean and standard deviation.

    g = sum a (k - n p) - (theta - m) / s^2,  H = sum a^2 n p (1 - p) + 1 / s^2,  theta <- theta + g / H

    >>> import numpy as np
    >>> theta, error = ability_map(np.zeros(4), np.array([1, 1, 0, 0]), np.ones(4))
    >>> round(theta, 6) + 0.0, round(error, 4)
    (0.0, 0.7071)
    """
    import numpy as np

    check_counts(passes, tries)
    mean, sd = prior
    a = np.ones_like(difficulty) if slope is None else slope
    theta, curvature = start, 1 / sd**2
    for _ in range(50):
        p = sigmoid(a * (theta - difficulty))
        gradient = float((a * (passes - tries * p)).sum()) - (theta - mean) / sd**2
        curvature = float((a**2 * tries * p * (1 - p)).sum()) + 1 / sd**2
        move = min(1.0, max(-1.0, gradient / curvature))  # from far away a whole step would overshoot
        theta += move
        if abs(move) < 1e-10:
            break
    return theta, curvature**-0.5


def fit(
    passes: np.ndarray,
    tries: np.ndarray,
    *,
    model: Literal["rasch", "2pl"] = "rasch",
    difficulty_sd: float = 2.0,
    slope_sd: float = 0.3,
) -> Fit:
    """Abilities, difficulties and slopes of a matrix of passes `[models, items]`, jointly, by scipy's L-BFGS.

    theta ~ N(0, 1), b ~ N(0, difficulty_sd^2), log a ~ N(0, slope_sd^2). With as few models as one usually has, slopes
    stay near their prior, and joint estimates of b are too wide by about M / (M - 1); their order is what counts.
    """
    import numpy as np
    from scipy.optimize import minimize

    check_counts(passes, tries)
    models, items = passes.shape
    sizes = [models, items, items if model == "2pl" else 0]
    cuts = np.cumsum(sizes)[:-1]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta, b, log_a = np.split(x, cuts)
        a = np.exp(log_a) if len(log_a) else np.ones(items)
        gap = theta[:, None] - b
        z = a * gap
        miss = tries * sigmoid(z) - passes
        value = float((tries * np.logaddexp(0, z) - passes * z).sum())
        value += float((theta**2).sum() / 2 + (b**2).sum() / 2 / difficulty_sd**2 + (log_a**2).sum() / 2 / slope_sd**2)
        slopes = (miss * z).sum(0) + log_a / slope_sd**2 if len(log_a) else log_a
        parts = [(miss * a).sum(1) + theta, -(miss * a).sum(0) + b / difficulty_sd**2, slopes]
        return value, np.concatenate(parts)

    found = minimize(loss, np.zeros(sum(sizes)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    theta, b, log_a = np.split(found.x, cuts)
    a = np.minimum(np.exp(log_a), MAX_SLOPE) if len(log_a) else np.ones(items)
    p = sigmoid(a * (theta[:, None] - b))
    return Fit(theta, b, a, (a**2 * tries * p * (1 - p)).sum(0) + 1 / difficulty_sd**2)


def check_counts(passes: np.ndarray, tries: np.ndarray) -> None:
    """Passes must be counts of tries: a wrong answer is 0, and neither -1 nor NaN."""
    import numpy as np

    if not (np.all(passes >= 0) and np.all(passes <= tries)):
        raise RunError("irt: passes must be from 0 to the number of tries (a wrong answer is 0, not -1)")


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow.

    >>> import numpy as np
    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    import numpy as np

    return (1 + np.tanh(x / 2)) / 2


def text_features(texts: Iterable[str], out: np.ndarray) -> None:
    """Fill `out` `[texts, TEXT_FEATURES + 3]`: hashed runs of one to three characters, and logarithms of counts."""
    import numpy as np
    from sklearn.feature_extraction.text import HashingVectorizer

    hasher = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=TEXT_FEATURES, dtype=np.float32)
    left = iter(texts)
    for start in range(0, len(out), BLOCK):
        part = list(islice(left, BLOCK))
        out[start : start + len(part), :TEXT_FEATURES] = hasher.transform(part).toarray()
        counts = [(len(t), len(t.split()), sum(c.isdigit() for c in t)) for t in part]
        out[start : start + len(part), TEXT_FEATURES:] = np.log1p(counts)


def amortised(features: np.ndarray, at: np.ndarray, difficulty: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Difficulty of every item, predicted from features by a ridge regression on the items `at`.

    Features are standardised, since counts and hashed runs have other units; the ridge's strength is chosen by
    leave-one-out. What lies far outside of what was seen is cut there: a line knows nothing of it.
    """
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ridge = RidgeCV(alphas=np.logspace(-1, 4, 11))
    line = make_pipeline(StandardScaler(), ridge)
    line.fit(features[at], difficulty, ridgecv__sample_weight=weight)
    low, high = difficulty.min() - 1, difficulty.max() + 1
    blocks = [features[start : start + BLOCK] for start in range(0, len(features), BLOCK)]
    return np.concatenate([np.clip(line.predict(block), low, high).astype(np.float32) for block in blocks])


def logit_difficulty(difficulty: np.ndarray) -> np.ndarray:
    """b of tasks whose difficulty is 1 - pass rate of a policy with theta = 0; else of a column, standardised to sd 1.

    >>> import numpy as np
    >>> logit_difficulty(np.array([0.0, 0.5, 1.0])).round(2).tolist()
    [-3.89, 0.0, 3.89]
    """
    import numpy as np

    if np.nanmin(difficulty) >= 0 and np.nanmax(difficulty) <= 1:
        clipped = np.clip(difficulty, 0.02, 0.98)
        return np.log(clipped / (1 - clipped))
    spread = float(np.nanstd(difficulty))
    return (difficulty - np.nanmean(difficulty)) / (spread if spread > 0 and math.isfinite(spread) else 1.0)
