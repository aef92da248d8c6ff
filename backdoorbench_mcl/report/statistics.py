"""Statistics of nested seeds: pure functions of numbers (spec 12.2). numpy and scipy.

The design is two-level: victims, and on each of them several draws of a defense (clean split, inversion, order). The
victim is the unit: draws on one victim are averaged first, and only victims count as n. Where there are too few victims
or there is no spread, no test is made and no interval given: `Difference.why` says in words what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

MIN_VICTIMS = 5  # for an interval or a test over victims; with fewer the values themselves are shown (spec 12.2)
DRAWS = 10_000  # of the bootstrap
LEVEL = 0.05
BA_MARGIN = 2.0  # points that count as equal, fixed beforehand (spec 12.2)
BA_WIDTH, ASR_WIDTH = 2.0, 3.0  # half a prediction interval may be this wide, in points, to call a number consistent

Nested = Mapping[int, Sequence[float]]  # victim seed -> a value per defense seed


@dataclass(frozen=True)
class Summary:
    """Of one cell: the mean over victims of their means (`means`, in the order of victims), sd, how many there are.

    sd: over victims, over the draws on it if there is one victim, None for a single number. interval: 95 % bootstrap,
    None with fewer than `MIN_VICTIMS` victims.
    """

    mean: float
    sd: float | None
    means: tuple[float, ...]
    victims: int
    runs: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """A paired difference over victims. values: one a victim; p: two-sided t test, p_holm: corrected within its family;
    dz: mean / sd.

    interval, p and dz are None where no test is made; `why` then says what is missing.
    """

    mean: float
    values: tuple[float, ...]
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    dz: float | None = None
    why: str = ""

    @property
    def victims(self) -> int:
        """How many differences there are."""
        return len(self.values)

    @property
    def significant(self) -> bool:
        """Whether zero is excluded after the correction, at the level of 5 %."""
        p = self.p if self.p_holm is None else self.p_holm
        return p is not None and p < LEVEL


def summary(values: Nested, draws: int = DRAWS) -> Summary | None:
    """Of the finite values; None if there are none. Example: `summary({0: [1.0, 2.0], 1: [3.0]}).mean` is 2.25."""
    kept = finite(values)
    if not kept:
        return None
    means = [fmean(group) for group in kept.values()]
    spread = means if len(means) > 1 else next(iter(kept.values()))
    return Summary(
        fmean(means), stdev(spread) if len(spread) > 1 else None, tuple(means), len(means),
        sum(map(len, kept.values())), bootstrap(kept, draws) if len(means) >= MIN_VICTIMS else None,
    )  # fmt: skip


def finite(values: Nested) -> dict[int, list[float]]:
    """`values` without NaN and infinities, and without victims that have nothing else."""
    kept = {victim: [float(v) for v in group if math.isfinite(v)] for victim, group in values.items()}
    return {victim: group for victim, group in kept.items() if group}


def bootstrap(values: Nested, draws: int = DRAWS, level: float = LEVEL) -> tuple[float, float]:
    """Two-level percentile interval of the mean: victims are drawn with replacement, and then draws within each.

    The generator is seeded with a constant: equal rows give equal intervals. Raises ValueError without values.
    """
    groups = [np.asarray(group, float) for group in values.values() if len(group)]
    if not groups:
        raise ValueError("bootstrap: no values were given, expected at least one victim")
    rng = np.random.Generator(np.random.PCG64(12))
    sizes = np.array([len(group) for group in groups])
    padded = np.zeros((len(groups), sizes.max()))
    for i, group in enumerate(groups):
        padded[i, : len(group)] = group
    victims = rng.integers(0, len(groups), (draws, len(groups)))  # (D, V)
    within = (rng.random((draws, len(groups), padded.shape[1])) * sizes[victims][:, :, None]).astype(int)
    drawn = np.take_along_axis(padded[victims], within, 2)  # (D, V, R); of the R columns the first size count
    counted = np.arange(padded.shape[1]) < sizes[victims][:, :, None]
    means = ((drawn * counted).sum(2) / sizes[victims]).mean(1)
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    return float(low), float(high)


def paired(first: Nested, second: Nested) -> Difference | None:
    """first - second over the victims that both have, averaged over what was drawn on each; None if there is none.

    Only draws that both have in equal number can be averaged fairly; the caller pairs defense seeds.
    """
    a, b = finite(first), finite(second)
    shared = [victim for victim in a if victim in b]
    if not shared:
        return None
    return of_differences([fmean(a[victim]) - fmean(b[victim]) for victim in shared])


def of_differences(values: Sequence[float]) -> Difference:
    """The t interval and test of finite differences, one a victim. Raises ValueError for none at all.

    With fewer than `MIN_VICTIMS`, or where all differences are equal, there is no test: `why` says so.
    """
    from scipy import stats

    n = len(values)
    if n == 0:
        raise ValueError("differences: no values were given, expected at least one victim")
    mean, each = fmean(values), tuple(values)
    if n < MIN_VICTIMS:
        return Difference(mean, each, why=f"fewer than {MIN_VICTIMS} victims")
    sd = stdev(values)
    if sd < 1e-12:
        return Difference(mean, each, why="no spread over victims: nothing to test against")
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)
    p = float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))
    return Difference(mean, each, (mean - half, mean + half), p, None, mean / sd)


def equivalent(values: Sequence[float], margin: float) -> float | None:
    """p of two one-sided t tests (TOST) that the mean lies within -margin to margin; None where no test is made.

    values: differences, one a victim. Source: spec 12.2; the margin has to be fixed beforehand.
    """
    from scipy import stats

    n = len(values)
    if n < MIN_VICTIMS or stdev(values) < 1e-12:
        return None
    error = stdev(values) / math.sqrt(n)
    return float(max(stats.t.sf((margin + side * fmean(values)) / error, n - 1) for side in (1, -1)))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of a family of p values; None and what is not finite take no part and come back as None.

    Example: `holm([0.01, 0.04])` -> [0.02, 0.04].
    """
    order = sorted((value, i) for i, value in enumerate(p) if value is not None and math.isfinite(value))
    out: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        out[i] = largest
    return out


def mcnemar(first_only: int, second_only: int) -> float | None:
    """Exact two-sided McNemar test of two models on the same images: p, for this pair of models only.

    first_only, second_only: images that just one of the two gets right. None where their sum is below 6: the smallest
    p there is, 2 / 2^n, would not be significant.
    """
    from scipy import stats

    n = first_only + second_only
    if 2.0 * 0.5**n >= LEVEL:
        return None
    return float(stats.binomtest(first_only, n, 0.5).pvalue)


@dataclass(frozen=True)
class Correlation:
    """Of ranks within victims. p: two-sided, by permutation within victims; None where it could not be significant."""

    rho: float
    p: float | None


def rank_correlation(groups: Sequence[Sequence[tuple[float, float]]], draws: int = DRAWS) -> Correlation | None:
    """Spearman's correlation of pairs, ranked within each victim and pooled; None where nothing varies.

    groups: one a victim. Victims differ for reasons of their own, so the second of the pairs are shuffled on each
    victim alone. No p below `MIN_VICTIMS`, or where the most extreme order is no rarer than 5 %.
    """
    from scipy import stats

    rng = np.random.Generator(np.random.PCG64(12))
    several = [group for group in groups if len(group) > 1]
    found, high, low, shuffled, xx, yy = 0.0, 0.0, 0.0, np.zeros(draws), 0.0, 0.0
    for group in several:
        x, y = (stats.rankdata(side) - (len(group) + 1) / 2 for side in np.asarray(group, float).T)
        found, xx, yy = found + float(x @ y), xx + float(x @ x), yy + float(y @ y)
        high, low = high + float(np.sort(x) @ np.sort(y)), low + float(np.sort(x) @ np.sort(y)[::-1])
        shuffled += rng.permuted(np.tile(y, (draws, 1)), axis=1) @ x
    if xx == 0 or yy == 0:
        return None

    def rarity(value: float) -> float:
        return float(1 + (np.abs(shuffled) >= value - 1e-9).sum()) / (1 + draws)

    fires = len(several) >= MIN_VICTIMS and rarity(max(high, -low)) < LEVEL
    return Correlation(found / math.sqrt(xx * yy), rarity(abs(found)) if fires else None)


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of k out of n in percent. Example: `wilson(7397, 9000)` is about (81.39, 82.97), spec 12.1."""
    from scipy import stats

    if not 0 <= k <= n or n == 0:
        raise ValueError(f"wilson: {k} of {n} was given, expected 0 <= k <= n and n > 0")
    found = stats.binomtest(k, n).proportion_ci(1 - level, "wilson")
    return 100 * float(found.low), 100 * float(found.high)


# ---------------------------------------------------------------- a printed number among ours


@dataclass(frozen=True)
class Prediction:
    """Where one more victim would lie, in points, with the sampling error of the printed number.

    inside: whether the printed number lies in it.
    """

    low: float
    high: float
    inside: bool

    @property
    def half(self) -> float:
        """Half the width, in points."""
        return (self.high - self.low) / 2


def predicted(values: Sequence[float], printed: float, images: int, *, logit: bool = False) -> Prediction | None:
    """The 95 % prediction interval of one more victim around `values` (percent, one a victim); None for fewer than two.

    printed: the published percentage, taken on `images` test images, whose binomial error is added in quadrature.
    logit: on the logit scale, for ASR near 0 or 100; 0 and 100 are moved in by half an image. Source: spec 12.2.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        return None
    p = _inner(printed, images)
    if logit:
        points = [_logit(_inner(value, images)) for value in values]
        noise = 1 / (images * p * (1 - p))
    else:
        points = list(values)
        noise = 100**2 * p * (1 - p) / images
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * math.sqrt(stdev(points) ** 2 * (1 + 1 / n) + noise)
    low, high = fmean(points) - half, fmean(points) + half
    inside = low <= (_logit(p) if logit else printed) <= high  # a printed 0 or 100 is moved in like ours
    if logit:
        low, high = _percent(low), _percent(high)
    return Prediction(low, high, inside)


def _inner(percent: float, images: int) -> float:
    return (percent / 100 * images + 0.5) / (images + 1)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _percent(logit: float) -> float:
    return 100 / (1 + math.exp(-logit))


__all__ = [
    "ASR_WIDTH", "BA_MARGIN", "BA_WIDTH", "DRAWS", "LEVEL", "MIN_VICTIMS", "Correlation", "Difference", "Nested",
    "Prediction", "Summary", "bootstrap", "equivalent", "finite", "holm", "mcnemar", "of_differences", "paired",
    "predicted", "rank_correlation", "summary", "wilson",
]  # fmt: skip
