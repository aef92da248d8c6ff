"""Statistics of nested seeds: against scipy and statsmodels on fixed inputs, a literal bootstrap, and corner cases."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from backdoorbench_mcl.report import statistics as s

FIVE = {0: [2.0, 2.5, 1.5], 1: [3.0, 3.5, 3.1], 2: [0.5, 0.7, 0.2], 3: [4.0, 4.4, 4.2], 4: [2.2, 2.1, 2.9]}
OTHER = {0: [2.5, 2.6, 2.0], 1: [4.0, 3.9, 4.1], 2: [1.5, 1.1, 1.2], 3: [4.5, 4.4, 5.0], 4: [2.0, 2.4, 2.2]}


def test_a_victim_counts_once_however_often_it_was_repaired() -> None:
    found = s.summary({0: [1.0, 2.0, 3.0], 1: [10.0]})
    assert found is not None
    assert (found.mean, found.victims, found.runs) == (6.0, 2, 4)
    assert found.sd == pytest.approx(stdev([2.0, 10.0]))
    assert found.means == (2.0, 10.0)


def test_one_victim_has_the_spread_of_its_draws_and_no_interval() -> None:
    found = s.summary({3: [1.0, 2.0, 4.0]})
    assert found is not None
    assert found.sd == pytest.approx(stdev([1.0, 2.0, 4.0]))
    assert found.interval is None
    single = s.summary({3: [1.0]})
    assert single is not None
    assert single.sd is None


def test_what_is_not_finite_does_not_count() -> None:
    found = s.summary({0: [math.nan], 1: [5.0, math.inf], 2: [7.0]})
    assert found is not None
    assert (found.mean, found.victims, found.runs) == (6.0, 2, 2)
    assert s.summary({0: [math.nan], 1: []}) is None


def test_an_interval_needs_five_victims() -> None:
    four = s.summary({k: v for k, v in FIVE.items() if k < 4})
    five = s.summary(FIVE)
    assert four is not None
    assert five is not None
    assert four.interval is None
    assert five.interval is not None
    assert five.interval[0] < five.mean < five.interval[1]


def test_the_bootstrap_against_a_literal_one() -> None:
    uneven = {0: [2.0], 1: [3.0, 3.5, 9.0, 1.0], 2: [0.5, 0.7], 3: [4.0, 4.4, 4.2], 4: [2.2, 2.1, 2.9]}
    rng = np.random.default_rng(7)
    groups = list(uneven.values())
    means = []
    for _ in range(20_000):
        chosen = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        means.append(fmean(fmean(rng.choice(group, len(group))) for group in chosen))
    expected = np.quantile(means, [0.025, 0.975])
    assert s.bootstrap(uneven, 20_000) == pytest.approx(tuple(expected), abs=0.06)
    assert s.bootstrap(uneven) == s.bootstrap(uneven)


def test_a_paired_difference_is_the_t_test_of_the_victims_means() -> None:
    found = s.paired(FIVE, OTHER)
    assert found is not None
    a, b = ([fmean(group) for group in nested.values()] for nested in (FIVE, OTHER))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx((interval.low, interval.high))
    differences = np.array(a) - np.array(b)
    assert found.mean == pytest.approx(differences.mean())
    assert found.dz == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert found.significant == (expected.pvalue < 0.05)


def test_only_victims_that_both_faced_are_compared() -> None:
    found = s.paired({0: [1.0], 1: [2.0], 9: [50.0]}, {0: [2.0], 1: [3.5], 4: [7.0]})
    assert found is not None
    assert (found.victims, found.mean) == (2, -1.25)
    assert s.paired({0: [1.0]}, {1: [1.0]}) is None


def test_no_test_that_cannot_fire() -> None:
    one = s.of_differences([-30.0])
    assert (one.p, one.interval, one.significant) == (None, None, False)
    assert one.why == "fewer than 5 victims"
    four = s.of_differences([-30.0, -31.0, -29.0, -30.5])  # spec 12.2: below five the values and no interval
    assert (four.p, four.interval, four.significant) == (None, None, False)
    assert four.values == (-30.0, -31.0, -29.0, -30.5)
    flat = s.of_differences([-1.0] * 5)
    assert flat.p is None
    assert "no spread" in flat.why
    assert s.mcnemar(5, 0) is None  # the smallest p there is: 2/32
    assert s.mcnemar(6, 0) == pytest.approx(2 / 64)


@settings(max_examples=25)  # statsmodels takes a tenth of a second for each
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_against_statsmodels(p: list[float]) -> None:
    assert s.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_equivalence_is_two_one_sided_tests() -> None:
    changes = [-1.0, 0.2, -1.9, -0.4, -1.6, -0.9]
    lower = stats.ttest_1samp(changes, -2.0, alternative="greater").pvalue
    upper = stats.ttest_1samp(changes, 2.0, alternative="less").pvalue
    assert s.equivalent(changes, 2.0) == pytest.approx(max(lower, upper))
    assert s.equivalent([-value for value in changes], 2.0) == pytest.approx(max(lower, upper))
    assert s.equivalent(changes[:4], 2.0) is None
    assert s.equivalent([1.0] * 5, 2.0) is None


def test_holm_leaves_out_what_is_no_number() -> None:
    assert s.holm([math.nan, 0.001, 0.04]) == [None, 0.002, 0.04]


def test_holm_leaves_out_what_was_not_tested() -> None:
    assert s.holm([None, 0.01, None, 0.04]) == [None, 0.02, None, 0.04]
    assert s.holm([]) == []


@pytest.mark.parametrize("b, c", [(6, 0), (10, 3), (0, 25), (40, 41), (300, 200)])
def test_mcnemar_against_statsmodels(b: int, c: int) -> None:
    expected = reference_mcnemar([[100, b], [c, 100]], exact=True).pvalue
    assert s.mcnemar(b, c) == pytest.approx(expected)


def test_rank_correlation_of_one_group_is_spearmans() -> None:
    pairs = [(float(a), float(b)) for a, b in np.random.default_rng(3).normal(size=(12, 2))]
    pairs += [(0.5, 0.5), (0.5, 0.7), (0.6, 0.5)]  # ties
    found = s.rank_correlation([pairs])
    assert found is not None
    assert found.rho == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert found.p is None  # one victim


def test_ranks_are_shuffled_within_victims_only() -> None:
    """Victims differ by far more than what is drawn on each: p against every permutation there is."""
    rng = np.random.default_rng(6)
    groups = [[(v + 0.1 * i, 9.0 * v + float(x)) for i, x in enumerate(rng.normal(size=3))] for v in range(5)]
    found = s.rank_correlation(groups)
    ranks = [stats.rankdata([y for _, y in group]) for group in groups]
    orders = itertools.product(*(itertools.permutations(r) for r in ranks))
    every = np.array([sum((i - 1) * o for order in given for i, o in enumerate(order)) for given in orders])
    at = sum((i - 1) * o for order in ranks for i, o in enumerate(order))
    assert found is not None
    assert found.p is not None
    assert found.rho == pytest.approx(at / 10)
    assert 0.05 < found.p < 0.95
    assert found.p == pytest.approx(np.mean(np.abs(every) >= abs(at) - 1e-9), abs=0.02)


def test_a_rank_correlation_that_cannot_fire_has_no_p() -> None:
    two = [(1.0, 2.0), (2.0, 3.0)]  # on 5 victims 2 of 32 orders are as extreme, on 6 victims 2 of 64
    found = [s.rank_correlation([two] * n) for n in (5, 6)]
    assert [None if one is None else (one.rho, one.p is None) for one in found] == [(1.0, True), (1.0, False)]
    assert s.rank_correlation([[(1.0, 2.0), (1.0, 3.0)]] * 6) is None
    assert s.rank_correlation([]) is None


@pytest.mark.parametrize(
    "percent, n, low, high",
    [(82.19, 9000, 81.39, 82.97), (2.22, 9000, 1.94, 2.55), (2.12, 9000, 1.84, 2.44), (0.84, 950, 0.43, 1.65)],
)
def test_wilson_gives_the_intervals_of_the_printed_numbers(percent: float, n: int, low: float, high: float) -> None:
    k = round(percent / 100 * n)
    assert s.wilson(k, n) == pytest.approx((low, high), abs=0.011)  # spec 12.1
    assert s.wilson(k, n) == pytest.approx(tuple(100 * x for x in proportion_confint(k, n, method="wilson")))


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="expected 0 <= k <= n"):
        s.wilson(3, 2)


def test_a_prediction_interval_by_hand() -> None:
    values, printed, images = [82.0, 81.0, 83.0, 82.5, 81.5], 82.19, 9000
    found = s.predicted(values, printed, images)
    assert found is not None
    p = (printed / 100 * images + 0.5) / (images + 1)
    half = 2.7764451 * math.sqrt(np.var(values, ddof=1) * 1.2 + 1e4 * p * (1 - p) / images)
    assert (found.low, found.high) == pytest.approx((82.0 - half, 82.0 + half))
    assert found.half == pytest.approx(half)
    assert found.inside
    outside = s.predicted(values, 60.0, images)
    assert outside is not None
    assert not outside.inside


@pytest.mark.parametrize("edge", [0.0, 100.0])
def test_a_printed_0_or_100_agrees_with_the_same_number_five_times(edge: float) -> None:
    found = s.predicted([edge] * 5, edge, 9000, logit=True)
    assert found is not None
    assert found.inside
    assert found.half < 1
    other = s.predicted([abs(edge - 40.0 - v) for v in range(5)], edge, 9000, logit=True)
    assert other is not None
    assert not other.inside


def test_a_prediction_interval_on_the_logit_scale_stays_within_0_and_100() -> None:
    found = s.predicted([0.0, 0.1, 0.0, 0.3, 0.05], 2.22, 9000, logit=True)
    assert found is not None
    assert 0 < found.low < found.high < 100
    low, high = s.predicted([50.0, 51.0, 49.0], 50.0, 9000, logit=True), s.predicted([50.0, 51.0, 49.0], 50.0, 9000)
    assert low is not None
    assert high is not None
    assert low.half == pytest.approx(high.half, rel=0.01)  # in the middle the scales agree
    assert s.predicted([50.0], 50.0, 9000) is None
