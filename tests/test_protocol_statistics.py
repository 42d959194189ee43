"""Statistics: oracles, invariances and edges of every estimator and test."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as sps

from reappraisal.protocol import statistics as S
from reappraisal.protocol.intervals import (
    acceleration,
    bootstrap_limits,
    resample_counts,
    weighted_mean,
)
from reappraisal.protocol.statistics import ESTIMATORS, TESTS, Survival

settings.register_profile("quick", deadline=None, max_examples=25)
settings.load_profile("quick")

numbers = st.floats(-1e3, 1e3, allow_subnormal=False).map(
    lambda v: round(v, 3)
)
grids = st.integers(0, 2**32 - 1)


def samples(least=2, most=20, elements=numbers):
    size = st.integers(least, most)
    return size.flatmap(lambda n: arrays(float, n, elements=elements))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def lifetimes(seed, n, mean=1.0, budget=1.5):
    r = np.random.default_rng(seed)
    return Survival.within(r.exponential(mean, n), budget)


MEANS = ("t", "bca", "percentile", "studentized")
SMALL = {"n_boot": 299}


def mean_of(x, method, **options):
    if method != "t":
        options = SMALL | options
    return S.mean_interval(x, method=method, **options)


# ---------------------------------------------------------------- intervals


@given(samples(), st.sampled_from(MEANS))
def test_means_are_ordered(x, method):
    i = mean_of(x, method)
    assert i.lo <= i.hi and 0 <= i.p <= 1
    assert i.estimate == pytest.approx(x.mean())
    if method == "t":
        assert i.lo <= i.estimate <= i.hi


@given(
    samples(3), st.sampled_from(MEANS), st.floats(-100, 100),
    st.floats(0.1, 10),
)
def test_means_follow_shift_and_scale(x, method, shift, scale):
    assume(np.ptp(x) > 0.1)
    one, two = mean_of(x, method), mean_of(shift + scale * x, method)
    for end in ("lo", "estimate", "hi"):
        got, want = getattr(two, end), shift + scale * getattr(one, end)
        assert got == pytest.approx(
            want, rel=1e-7, abs=1e-6 * (1 + scale * 1e3))


@given(samples(3), st.sampled_from(("t", "bca")))
def test_mirror_image_has_mirrored_p(x, method):
    assume(np.ptp(x) > 0.1)
    one, two = mean_of(x, method), mean_of(-x, method)
    assert one.p_above == pytest.approx(two.p_below)
    assert (one.lo, one.hi) == pytest.approx((-two.hi, -two.lo))


@given(samples(3), grids)
def test_order_of_replicates_is_irrelevant(x, seed):
    mixed = np.random.default_rng(seed).permutation(x)
    for f in (S.mean_interval, S.median_interval, S.quantile_interval):
        one, two = f(x), f(mixed)
        assert (one.estimate, one.lo, one.hi, one.p) == pytest.approx(
            (two.estimate, two.lo, two.hi, two.p)
        )


@given(samples(3), st.floats(-5, 5), st.sampled_from(("t", "bca")))
def test_p_and_interval_decide_alike(x, null, method):
    assume(np.ptp(x) > 0.1)
    i = mean_of(x, method, null=null, level=0.9)
    if abs(i.p - 0.1) > 0.01:  # draws are discrete
        assert (null in i) == (i.p > 0.1)


@pytest.mark.parametrize("x", [[1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]], ids=str)
def test_p_and_interval_of_few_replicates_decide_alike(x):
    null = min(x) - 1 if len(x) == 3 else max(x) + 1
    i = mean_of(np.array(x), "bca", null=null, level=0.9)
    assert (null in i) == (i.p > 0.1)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_limits_are_infinite_where_no_null_beyond_would_be_rejected(n):
    seen = set()
    for x in np.random.default_rng(n).normal(size=(40, n)):
        i = mean_of(x, "bca", null=x.min() - 9)
        seen.add(math.isinf(i.lo))
        assert math.isinf(i.lo) == (i.p > 0.05)
    assert seen == ({True} if n == 3 else {True, False})


def test_limits_end_at_the_support():
    x, y = [1.0, 2, 3, 4], [1.0, 3, 2, 4]
    assert S.correlation(x, y, "pearson").hi == 1
    open_ended = S.bootstrap(lambda w: w @ x / 4, 4, method="percentile")
    closed = S.bootstrap(
        lambda w: w @ x / 4, 4, method="percentile", support=(0, 5), n_boot=9
    )
    assert math.isfinite(open_ended.lo) and (closed.lo, closed.hi) == (0, 5)


def test_t_and_welch_agree_with_scipy():
    a, b = normal(0, 13), 3 * normal(1, 9) + 1
    want = sps.ttest_1samp(a, 0.3)
    got = S.mean_interval(a, 0.9, null=0.3)
    assert (got.lo, got.hi) == pytest.approx(want.confidence_interval(0.9))
    assert got.p == pytest.approx(want.pvalue)
    want, got = sps.ttest_ind(a, b, equal_var=False), S.welch(a, b)
    assert (got.lo, got.hi) == pytest.approx(want.confidence_interval())
    assert got.p == pytest.approx(want.pvalue)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_limits_agree_with_scipy_on_the_same_draws(method):
    x = np.random.default_rng(4).lognormal(size=17)
    want = sps.bootstrap(
        (x,), np.mean, n_resamples=2999, method=method, rng=0
    )
    a = None
    if method == "BCa":
        a = acceleration((x.sum() - x) / (x.size - 1))
    draws = want.bootstrap_distribution
    got = bootstrap_limits(draws, x.mean(), 0.95, a)
    assert got == pytest.approx(tuple(want.confidence_interval), rel=1e-9)


def test_two_sample_acceleration_agrees_with_scipy():
    r = np.random.default_rng(5)
    a, b = r.lognormal(size=9), r.lognormal(size=14)
    got = S.bootstrap(
        lambda w: w[:, :9] @ a / 9 - w[:, 9:] @ b / 14, 23,
        strata=[0] * 9 + [1] * 14, small_sample=False, n_boot=20000,
    )
    want = sps.bootstrap(
        (a, b), lambda u, v, axis: u.mean(axis) - v.mean(axis),
        n_resamples=20000, method="BCa", rng=1,
    )
    assert got.se == pytest.approx(want.standard_error, rel=0.03)
    assert (got.lo, got.hi) == pytest.approx(
        tuple(want.confidence_interval), abs=0.06 * got.se
    )


def test_same_seed_same_bits_and_chunks_do_not_matter():
    x = normal(2, 30)
    one, two = (S.mean_interval(x, method="bca", seed=3) for _ in range(2))
    assert one == two != S.mean_interval(x, method="bca", seed=4)
    big = np.concatenate(list(resample_counts(3000, 3000, 1)))
    assert big.shape == (3000, 3000) and (big.sum(1) == 3000).all()


def test_inputs_stay_untouched():
    x, y = normal(0, 12), normal(1, 12)
    kept = x.copy(), y.copy()
    for f in (S.paired, S.welch, S.kendall, S.spearman, S.slope):
        f(x, y)
    S.mean_interval(x, method="bca"), S.wilcoxon(x), S.tost(x, 1.0)
    assert (x == kept[0]).all() and (y == kept[1]).all()


@given(st.integers(1, 40), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_clopper_pearson_inverts_the_exact_tails(n, data, level):
    k = data.draw(st.integers(0, n))
    i = S.proportion_interval(k, n, level)
    tail = (1 - level) / 2
    assert 0 <= i.lo <= k / n <= i.hi <= 1
    if k:
        assert sps.binom.sf(k - 1, n, i.lo) == pytest.approx(tail)
    else:
        assert i.lo == 0
    if k < n:
        assert sps.binom.cdf(k, n, i.hi) == pytest.approx(tail)
    else:
        assert i.hi == 1


def test_clopper_pearson_and_order_statistics_never_undercover():
    for n, rate in itertools.product((5, 8, 24), (0.05, 0.3, 0.5, 0.9)):
        k = np.arange(n + 1)
        hit = [rate in S.proportion_interval(j, n) for j in k]
        assert sps.binom.pmf(k, n, rate) @ hit >= 0.95
        q = S.quantile_interval(np.arange(1.0, n + 1), rate)
        # true quantile just above the j-th value, j ~ Bin(n, rate)
        hit = [q.lo < j + 0.5 < q.hi for j in k]
        assert sps.binom.pmf(k, n, rate) @ hit >= 0.95


@given(samples(6, 30), st.floats(0.1, 0.9))
def test_quantiles_agree_with_scipy(x, q):
    got = S.quantile_interval(x, q)
    test = sps.quantile_test(x, p=q)
    lo, hi = test.confidence_interval(0.95)
    if not math.isnan(lo):
        assert got.lo == lo
    if not math.isnan(hi):
        assert got.hi == hi


def test_newcombe_matches_a_published_example():
    # Newcombe (1998), paired data 36, 12, 2, 0: 0.0569 to 0.3404 (method 10)
    a = np.repeat([1, 1, 0, 0], [36, 12, 2, 0])
    b = np.repeat([1, 0, 1, 0], [36, 12, 2, 0])
    i = S.proportion_difference(a, b)
    assert i.estimate == pytest.approx(0.2)
    assert (i.lo, i.hi) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_clusters_are_the_replicates():
    r = np.random.default_rng(8)
    clusters = np.repeat(np.arange(10), r.integers(1, 6, 10))
    values = r.normal(size=10)[clusters]
    i = S.cluster_bootstrap(values, clusters)
    assert i.n == 10
    # repeating every observation adds nothing
    twice = S.cluster_bootstrap(np.repeat(values, 2), np.repeat(clusters, 2))
    assert (twice.lo, twice.hi) == pytest.approx((i.lo, i.hi))
    # singletons are the plain bootstrap
    x = r.normal(size=12)
    alone = S.cluster_bootstrap(x, [f"s{j}" for j in range(12)])
    plain = S.mean_interval(x, method="bca")
    assert (alone.lo, alone.hi) == (plain.lo, plain.hi)
    black_box = S.cluster_bootstrap(
        values, clusters, S.opaque(np.mean), n_boot=199
    )
    white_box = S.cluster_bootstrap(values, clusters, n_boot=199)
    assert black_box.lo == pytest.approx(white_box.lo)


def test_within_adds_the_lower_level_of_spread():
    r = np.random.default_rng(9)
    clusters = np.repeat(np.arange(12), 3)
    values = r.normal(size=36)
    outer = S.cluster_bootstrap(values, clusters, n_boot=1999)
    both = S.cluster_bootstrap(values, clusters, n_boot=1999, within=True)
    assert both.se > 1.2 * outer.se


@given(grids)
def test_ratios_are_ratios(seed):
    r = np.random.default_rng(seed)
    a, b = r.gamma(5, size=(2, 12))
    for method in ("bca", "percentile", "fieller"):
        one = S.ratio_of_means(a, b, method=method, n_boot=299)
        two = S.ratio_of_means(3 * a, 2 * b, method=method, n_boot=299)
        assert one.estimate == pytest.approx(a.mean() / b.mean())
        assert two.lo == pytest.approx(1.5 * one.lo)
        assert two.hi == pytest.approx(1.5 * one.hi)
    one, two = S.geometric_mean_ratio(a, b), S.geometric_mean_ratio(b, a)
    assert (one.lo, one.p) == pytest.approx((1 / two.hi, two.p))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
@pytest.mark.parametrize("method", MEANS)
def test_constant_replicates_collapse(value, method):
    i = mean_of([value] * 6, method)
    assert i.lo == i.estimate == i.hi == pytest.approx(value)
    assert i.p == (1.0 if value == 0 else 2 / 2**6)


@pytest.mark.parametrize("method", MEANS)
def test_one_replicate_says_nothing(method):
    i = mean_of([0.7], method)
    assert (i.estimate, i.lo, i.hi, i.p) == (0.7, -math.inf, math.inf, 1.0)


BAD = [([], "empty"), ([1.0, math.nan], "nan"), ([[1.0]], "shape"),
       ([1.0, math.inf], "inf")]


@pytest.mark.parametrize("x, why", BAD)
@pytest.mark.parametrize("f", [
    S.mean_interval, S.median_interval, S.wilcoxon, S.sign_test, S.t_test,
    S.proportion_interval, lambda x: S.tost(x, 1.0),
])
def test_bad_replicates_are_refused_by_name(f, x, why):
    with pytest.raises(ValueError, match=f"^x: .*{why}"):
        f(x)


@pytest.mark.parametrize("f", [
    S.paired, S.log_ratio, S.ratio_of_means, S.mcnemar, S.kendall, S.slope,
    S.proportion_difference,
])
def test_unequal_pairs_are_refused(f):
    with pytest.raises(ValueError, match="3 and 2 replicates"):
        f([0, 1, 1], [1, 0])


@pytest.mark.parametrize("call, name", [
    (lambda: S.mean_interval([1, 2], level=95), "level"),
    (lambda: S.mean_interval([1, 2], method="z"), "method"),
    (lambda: S.mean_interval([1, 2], "bca"), "level"),
    (lambda: S.proportion_interval([0, 2]), "x"),
    (lambda: S.proportion_interval(5, 4), "x, total"),
    (lambda: S.ratio_of_means([1, 2], [-1, 1]), "b"),
    (lambda: S.log_ratio([1, 0], [1, 1]), "a"),
    (lambda: S.cluster_bootstrap([1, 2], [0]), "clusters"),
    (lambda: S.tost([1, 2], -1), "margin"),
    (lambda: S.noninferiority([1, 2], -1), "margin"),
    (lambda: S.kendall([1, 1, 1, 1], [1, 2, 3, 4]), "x"),
    (lambda: S.slope([1, 1], [1, 2]), "x"),
    (lambda: S.page_trend([[1, 2]]), "data"),
    (lambda: S.page_trend([[1, 2, math.nan]]), "data"),
    (lambda: S.holm([0.5, 1.2]), "p"),
    (lambda: S.power(1, 0, 5), "sd"),
    (lambda: S.replicates_needed(-1, 1), "effect"),
    (lambda: Survival([1.0, math.inf], [True, True]), "time"),
    (lambda: Survival([1.0], [True, False]), "event"),
    (lambda: Survival.within([1.0, math.nan], 5), "times"),
    (lambda: S.rmst(Survival([1.0, 2], [True, False]), 3), "tau"),
    (lambda: S.rmst_ratio(lifetimes(0, 4), lifetimes(0, 5), 1), "a, b"),
    (lambda: S.logrank([1, 2], lifetimes(0, 5)), "a"),
    (lambda: S.granulated_kendall([1, 2], [1, 2], [1, 2]), "axes"),
])
def test_errors_name_the_argument(call, name):
    with pytest.raises((ValueError, TypeError)) as info:
        call()
    if info.type is ValueError:
        assert str(info.value).startswith(f"{name}:")


# ------------------------------------------------------------- significance


@settings(max_examples=12)
@given(samples(2, 9, st.integers(-4, 4).map(float)))
def test_wilcoxon_with_ties_and_zeros_is_scipys(x):
    assume(x.any())
    found, moved = S.wilcoxon(x), x[x != 0]
    for p, side in ((found.p, "greater"), (found.p_reversed, "less")):
        oracle = sps.wilcoxon(moved, alternative=side)
        assert p == pytest.approx(oracle.pvalue, rel=1e-12)
        assert found.statistic == oracle.statistic


@settings(max_examples=12)
@given(samples(1, 12, st.integers(-4, 4).map(float)))
def test_tests_of_one_sample_are_mirror_images(x):
    for f in (S.t_test, S.wilcoxon, S.sign_test, S.sign_flip):
        one, two = f(x), f(-x)
        assert one.p == pytest.approx(two.p_reversed)
        assert one.p + one.p_reversed >= 1 - 1e-9
        assert 0 <= one.p <= 1


@given(samples(2, 8, st.integers(-3, 3).map(float)))
def test_sign_flip_is_brute_force(x):
    sums = [np.dot(x, s) for s in itertools.product((-1, 1), repeat=x.size)]
    assert S.sign_flip(x).p == pytest.approx(np.mean(sums >= x.sum()))


def test_directions():
    better, worse = normal(0, 20) + 2, normal(1, 20)
    for test in (S.welch_test, S.mann_whitney):
        assert test(better, worse).p < 0.001 < test(worse, better).p
    up = S.mcnemar([1] * 9 + [0], [0] * 9 + [1])
    assert up.p == pytest.approx(sps.binom.sf(8, 10, 0.5))
    assert up.p_two_sided == pytest.approx(2 * up.p)


@given(samples(3), st.floats(0.1, 50), st.sampled_from([0.01, 0.05, 0.1]))
def test_tost_is_inclusion_of_the_interval(x, margin, alpha):
    assume(np.ptp(x) > 0.1)
    t = S.tost(x, margin, alpha=alpha)
    inside = -margin < t.interval.lo and t.interval.hi < margin
    assert inside == (t.p < alpha)
    n = S.noninferiority(x, margin, alpha=alpha)
    assert (n.p < alpha) == (n.interval.lo > -margin)
    assert n.p <= t.p + 1e-12


def test_tost_agrees_with_statsmodels():
    from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

    a, b = normal(3, 20), normal(4, 25)
    want = CompareMeans(DescrStatsW(a), DescrStatsW(b)).ttost_ind(
        -0.8, 0.8, usevar="unequal"
    )[0]
    assert S.tost(a, 0.8, b).p == pytest.approx(want)


def test_constant_data_have_a_sensible_p():
    assert S.t_test([0.0] * 5).p == 0.5
    assert S.t_test([1.0] * 5).p == 2**-5
    assert S.tost([0.0] * 8, 1.0).p < 0.01
    assert S.mann_whitney([1, 1], [1, 1, 1]).p == 1


# -------------------------------------------------------------- association


@given(grids, st.sampled_from(["pearson", "spearman", "kendall"]))
def test_correlations_agree_with_scipy(seed, kind):
    r = np.random.default_rng(seed)
    x, y = r.integers(0, 6, (2, 12)).astype(float)
    assume(np.ptp(x) and np.ptp(y))
    oracle = {"pearson": sps.pearsonr, "spearman": sps.spearmanr,
              "kendall": sps.kendalltau}[kind]
    i = S.correlation(x, y, kind, n_boot=99)
    assert i.estimate == pytest.approx(oracle(x, y).statistic)
    assert -1 <= i.lo <= i.hi <= 1


@given(grids)
def test_ranks_ignore_monotone_maps(seed):
    x, y = normal(seed, 2, 10)
    for f in (S.spearman, S.kendall):
        one, two = f(x, y, n_boot=99), f(np.exp(x), y**3, n_boot=99)
        assert (one.lo, one.hi) == pytest.approx((two.lo, two.hi))


def test_partial_correlation_removes_a_common_cause():
    r = np.random.default_rng(1)
    z = r.normal(size=(80, 2))
    x, y = z @ [1, 2] + r.normal(size=80), z @ [2, 1] + r.normal(size=80)
    got = S.partial_correlation(x, y, z, "pearson", n_boot=299)
    design = np.column_stack([np.ones(80), z])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0]
            for v in (x, y)]
    assert got.estimate == pytest.approx(np.corrcoef(left)[0, 1])
    assert abs(got.estimate) < 0.3 < S.pearson(x, y).estimate


@given(grids)
def test_granulated_kendall_is_brute_force(seed):
    r = np.random.default_rng(seed)
    axes = np.array(list(itertools.product(range(3), range(2), range(2))))
    axes = axes[r.random(12) < 0.8]
    x, y = r.integers(0, 5, (2, len(axes))).astype(float)
    per_axis = []
    for i in range(3):
        cells = {}
        for j, key in enumerate(np.delete(axes, i, 1)):
            cells.setdefault(tuple(key), []).append(j)
        cells = [c for c in cells.values() if len(c) > 1]
        if cells:
            per_axis.append(np.mean([
                np.mean([np.sign((x[p] - x[q]) * (y[p] - y[q]))
                         for p, q in itertools.combinations(c, 2)])
                for c in cells
            ]))
    assume(per_axis)
    got = S.granulated_kendall(x, y, axes, np.zeros(len(axes)))
    assert got.estimate == pytest.approx(np.mean(per_axis))
    try:
        pooled = S.granulated_kendall(x, y, axes, n_boot=99)
    except ValueError as error:  # a handful of cells, said so
        assert "too few distinct replicates" in str(error) and len(axes) < 8
    else:
        assert pooled.estimate == pytest.approx(np.mean(per_axis))


def test_granulated_kendall_refuses_a_handful_of_cells():
    r = np.random.default_rng(1304)
    axes = np.array(list(itertools.product(range(3), range(2), range(2))))
    axes = axes[r.random(12) < 0.8]
    x, y = r.integers(0, 5, (2, len(axes))).astype(float)
    with pytest.raises(ValueError, match="too few distinct replicates"):
        S.granulated_kendall(x, y, axes, n_boot=99)


def test_within_groups_sees_through_simpson():
    r = np.random.default_rng(2)
    g = np.repeat(np.arange(9), 5)
    x = 10.0 * g + r.normal(size=45)
    y = 10.0 * g - (x - 10 * g)
    assert S.kendall(x, y).lo > 0.5
    for options in ({}, {"pooled": True}, {"kind": "spearman"}):
        assert S.kendall_within(x, y, g, **options).estimate == -1
    x[g == 0] = 1.0  # a group without variation says nothing
    assert S.kendall_within(x, y, g).n == 8


@given(grids, st.floats(-5, 5))
def test_slopes_recover_planted_lines(seed, b):
    r = np.random.default_rng(seed)
    x = r.permutation(12) + 0.1 * r.random(12)
    run = np.repeat(np.arange(3), 4)
    y = 2.0 + b * x
    for i in (S.slope(x, y), S.theil_sen(x, y), S.slope(x, y, run)):
        assert i.estimate == pytest.approx(b, abs=1e-9)
        assert i.lo == pytest.approx(b, abs=1e-6)
    i = S.slope(x, y, run, method="bca", n_boot=99)
    assert i.estimate == pytest.approx(b, abs=1e-9)
    rows = np.outer([1.0, -2.0], x)
    assert S.slopes(x, rows) == pytest.approx([1, -2])


def test_slopes_agree_with_scipy_and_statsmodels():
    import statsmodels.api as sm

    x, y = normal(0, 2, 15)
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    i = S.slope(x, y)
    assert (i.lo, i.hi) == pytest.approx(tuple(fit.conf_int()[1]))
    assert i.p == pytest.approx(fit.pvalues[1])
    want, i = sps.theilslopes(y, x), S.theil_sen(x, y)
    assert (i.lo, i.hi) == pytest.approx((want.low_slope, want.high_slope))


@given(grids, st.integers(1, 4), st.integers(3, 4))
def test_page_with_ties_is_a_permutation_test(seed, n, k):
    data = np.random.default_rng(seed).integers(0, 3, (n, k)).astype(float)
    assume(n * math.factorial(k) <= 72)
    ranks = sps.rankdata(data, axis=1)
    weights = np.arange(1, k + 1)
    seen = (ranks @ weights).sum()
    every = [
        [row @ np.array(p) for p in itertools.permutations(weights)]
        for row in ranks
    ]
    totals = np.array([sum(t) for t in itertools.product(*every)])
    got = S.page_trend(data)
    if "ties" in got.method:
        assert got.p == pytest.approx(np.mean(totals >= seen - 1e-9))
        assert got.p_reversed == pytest.approx(np.mean(totals <= seen + 1e-9))
    assert S.page_trend(-data, increasing=False).p == got.p


def test_page_finds_planted_orders():
    r = np.random.default_rng(6)
    rising = np.arange(5) + r.normal(size=(16, 5))
    assert S.page_trend(rising).p == sps.page_trend_test(rising).pvalue
    assert S.page_trend(rising).p < 1e-6
    assert S.page_trend(rising, increasing=False).p_reversed < 1e-6
    capped = np.minimum(np.exp(rising), 20.0)  # censored at the budget
    assert S.page_trend(capped).p < 1e-4
    never = np.where(capped == 20, np.inf, capped)
    assert S.page_trend(never) == S.page_trend(capped)
    wide = np.minimum(np.arange(8) + r.normal(size=(9, 8)), 6)
    assert S.page_trend(wide).method == "Page (normal, ties)"
    assert S.page_trend(wide).p < 1e-6
    flat = S.page_trend(np.zeros((6, 8)))
    assert flat.p == flat.p_reversed == 1


def test_trend_tests_hold_their_level():
    r = np.random.default_rng(7)
    alarms = [S.page_trend(r.integers(0, 4, (10, 3))).p < 0.05
              for _ in range(400)]
    assert np.mean(alarms) < 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5
    groups = r.normal(size=(400, 3, 8))
    alarms = [S.jonckheere(g).p < 0.05 for g in groups]
    assert np.mean(alarms) < 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5


def test_jonckheere_of_two_groups_is_mann_whitney():
    a, b = normal(0, 9), normal(1, 11)
    got = S.jonckheere([a, b])
    want = sps.mannwhitneyu(b, a, alternative="greater", method="asymptotic",
                            use_continuity=False)
    assert (got.statistic, got.p) == pytest.approx(tuple(want))


def test_permutation_tests_of_correlation():
    x, y = normal(0, 2, 6)
    for kind, f in (("pearson", sps.pearsonr), ("spearman", sps.spearmanr),
                    ("kendall", sps.kendalltau)):
        seen = f(x, y).statistic
        every = [f(x, np.array(p)).statistic
                 for p in itertools.permutations(y)]
        got = S.correlation_test(x, y, kind)
        assert got.p == pytest.approx(np.mean(np.array(every) >= seen - 1e-9))
    x = normal(2, 20)
    assert S.correlation_test(x, x, "kendall").p == 1 / 10000


# ----------------------------------------------------------------- survival


times = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(times, st.floats(0.5, 9))
def test_uncensored_restricted_mean_is_a_plain_mean(t, tau):
    s = Survival(t, [True] * len(t))
    want = np.minimum(t, tau).mean()
    assert S.rmst(s, tau, n_boot=9).estimate == pytest.approx(want)


@given(times, grids)
def test_restricted_mean_is_the_area_under_the_curve(t, seed):
    seen = np.random.default_rng(seed).random(len(t)) < 0.6
    s = Survival(t, seen)
    tau = float(max(t))
    when, alive = S.kaplan_meier(s)
    area = np.diff(np.append(when, tau)) @ alive
    assert S.rmst(s, tau, n_boot=9).estimate == pytest.approx(area)
    assert alive[0] == 1 and (np.diff(alive) < 0).all()


@given(grids, st.floats(0.1, 100))
def test_ratio_ignores_the_unit_of_time(seed, unit):
    a, b = lifetimes(seed, 10, 0.5), lifetimes(seed + 1, 10)
    assume(a.event.any() or b.event.any())
    scaled = [Survival(s.time * unit, s.event) for s in (a, b)]
    for paired in (True, False):
        one = S.rmst_ratio(a, b, 1.5, paired, n_boot=99)
        two = S.rmst_ratio(*scaled, 1.5 * unit, paired, n_boot=99)
        assert (one.lo, one.hi) == pytest.approx((two.lo, two.hi))
    saving = S.rmst_saving(a, b, 1.5, n_boot=99)
    ratio = S.rmst_ratio(a, b, 1.5, n_boot=99)
    assert saving.lo == 1 - ratio.hi and saving.p == pytest.approx(ratio.p)
    gap = S.rmst_difference(a, b, 1.5, n_boot=99)
    parts = [S.rmst(s, 1.5, n_boot=9).estimate for s in (a, b)]
    assert gap.estimate == pytest.approx(parts[0] - parts[1])


def test_all_censored_is_an_answer():
    never = Survival.within([np.inf] * 6, 100)
    i = S.rmst(never, 100)
    assert i.lo == i.estimate == i.hi == 100
    ratio = S.rmst_ratio(never, never, 100)
    assert ratio.estimate == 1 and ratio.p == 1
    test = S.logrank(never, never)
    assert test.p == test.p_reversed == 0.5
    assert S.kaplan_meier(never)[1].tolist() == [1.0]
    some = lifetimes(0, 6, budget=100)
    assert S.rmst_saving(some, never, 100).lo > 0


def test_logrank_agrees_with_scipy_and_sees_the_hazard():
    a, b = lifetimes(0, 60, 1 / 3), lifetimes(1, 50)
    got = S.logrank(a, b)
    arms = [sps.CensoredData.right_censored(s.time, ~s.event)
            for s in (a, b)]
    want = sps.logrank(*arms, alternative="greater")
    assert (got.statistic, got.p) == pytest.approx(
        (want.statistic, want.pvalue)
    )
    assert got.p < 1e-3 and S.logrank(b, a).p_reversed == pytest.approx(got.p)
    true = (1 - np.exp(-4.5)) / 3 / (1 - np.exp(-1.5))
    assert true in S.rmst_ratio(a, b, 1.5, paired=False)


# ------------------------------------------------------------- multiplicity


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1,
                max_size=12))
def test_corrections_agree_with_statsmodels(p):
    from statsmodels.stats.multitest import multipletests

    h, b = S.holm(p), S.benjamini_hochberg(p)
    np.testing.assert_allclose(h, multipletests(p, method="holm")[1])
    np.testing.assert_allclose(b, multipletests(p, method="fdr_bh")[1])
    assert (np.array(p) <= b + 1e-12).all() and (b <= h + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(h[order]) >= 0).all()
    assert (np.diff(b[order]) >= -1e-12).all()


def test_friedman_nemenyi():
    x = normal(0, 14, 5) + np.arange(5)
    got = S.friedman_nemenyi(x, larger_is_better=True)
    assert got.p == pytest.approx(sps.friedmanchisquare(*x.T).pvalue)
    assert got.ranks.argmin() == 4 and got.ranks.sum() == pytest.approx(15)
    gaps = np.abs(got.ranks[:, None] - got.ranks)
    apart = gaps > got.critical_difference
    assert (apart == (got.pairwise < 0.05)).all()
    tied = S.friedman_nemenyi(np.ones((4, 3)))
    assert tied.p == 1 and tied.concordance == 0
    same = S.friedman_nemenyi(np.tile([1.0, 2, 3], (6, 1)))
    assert same.concordance == pytest.approx(1)


@given(st.floats(0.2, 2), st.sampled_from([0.5, 0.8, 0.9]))
def test_replicates_needed_is_the_smallest(effect, wanted):
    n = S.replicates_needed(effect, 1.0, power_wanted=wanted)
    assert S.power(effect, 1.0, n) >= wanted
    assert n == 2 or S.power(effect, 1.0, n - 1) < wanted
    more = S.replicates_needed(effect / 2, 1.0, power_wanted=wanted)
    assert more > n


def test_replicates_to_settle():
    i = S.Interval(1.0, -1.0, 3.0, 0.95, 10, "t")
    assert S.replicates_to_settle(i, 0.0) == 40
    assert S.replicates_to_settle(i, [0.0, 2.5]) == 40
    assert S.replicates_to_settle(i, 1.0) is None
    assert S.replicates_to_settle(i, -2.0) == 10
    assert S.power_of_interval(i, 2.0) == pytest.approx(0.5)


# ---------------------------------------------------------------- the names


def example(inputs, name):
    r = np.random.default_rng(3)
    n = 12
    groups = np.repeat(np.arange(4), 3)
    if name.startswith(("rmst", "logrank")):
        arms = lifetimes(1, n, 0.4), lifetimes(2, n)
        return arms if len(inputs) == 2 else arms[0]
    if name in ("proportion", "proportion_difference", "mcnemar"):
        a, b = r.integers(0, 2, (2, n))
        return (a, b) if len(inputs) == 2 else a
    parts = {
        "x": r.gamma(4, size=n), "a": r.gamma(4, size=n),
        "b": r.gamma(6, size=n), "values": r.normal(size=n),
        "y": r.normal(size=n), "given": r.normal(size=n),
        "clusters": groups, "groups": groups,
        "axes": np.column_stack([np.tile([0, 1, 2], 4), groups]),
        "data": r.normal(size=(6, 4)), "scores": r.normal(size=(6, 4)),
    }
    if name == "jonckheere":
        parts["groups"] = list(r.normal(size=(3, 5)))
    if name == "granulated_kendall":
        inputs = ("x", "y", "axes")
    chosen = tuple(parts[i] for i in inputs)
    return chosen if len(chosen) > 1 else chosen[0]


OPTIONS = {
    **dict.fromkeys(("rmst", "rmst_ratio", "rmst_saving",
                     "rmst_difference"), {"tau": 1.5}),
    "tost": {"margin": 1.0}, "noninferiority": {"margin": 1.0},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_one_signature(name):
    f = ESTIMATORS[name]
    data = example(f.inputs, name)
    i = f(data, level=0.9, seed=1, **OPTIONS.get(name, {}))
    assert isinstance(i, S.Interval) and i.level == 0.9 and i.n >= 1
    assert i.lo <= i.hi and (i.p is None or 0 <= i.p <= 1)
    again = f(data, level=0.9, seed=1, **OPTIONS.get(name, {}))
    assert again == i
    wider = f(data, level=0.99, seed=1, **OPTIONS.get(name, {}))
    assert wider.lo <= i.lo and i.hi <= wider.hi
    with pytest.raises(ValueError, match="unknown .*colour"):
        f(data, colour="red", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", TESTS)
def test_every_test_has_one_signature(name):
    f = TESTS[name]
    t = f(example(f.inputs, name), **OPTIONS.get(name, {}))
    assert isinstance(t, S.TestResult) and t.n >= 1 and 0 <= t.p <= 1
    assert name == "friedman" or 0 <= t.p_reversed <= 1
    assert repr(t).startswith(t.method)


def test_the_names_that_registrations_need():
    assert {
        "mean", "mean_bca", "median", "proportion", "rmst_saving",
        "rmst_ratio", "rmst_difference", "spearman", "kendall",
        "kendall_within", "granulated_kendall", "slope", "theil_sen",
        "cluster_mean", "welch", "ratio_of_means",
    } <= set(ESTIMATORS)
    assert {"logrank", "page", "wilcoxon", "sign", "jonckheere", "welch"} <= (
        set(TESTS)
    )
    assert set(S.__all__) >= {"Interval", "ESTIMATORS", "TESTS", "rmst_ratio"}
    assert all(hasattr(S, name) for name in S.__all__)
    assert weighted_mean is S.weighted_mean


# -------------------------------------------------------- the promise itself


@pytest.mark.parametrize("method", ["t", "bca", "studentized"])
def test_nominal_95_covers_normal_data(method):
    x = normal(12, 600, 12)
    hits = np.mean([0.0 in mean_of(row, method, n_boot=399)
                    if method != "t" else 0.0 in mean_of(row, method)
                    for row in x])
    assert abs(hits - 0.95) < 4 * (0.95 * 0.05 / 600) ** 0.5


def test_nominal_95_covers_ratios_of_censored_times():
    truth = (1 - np.exp(-4.5)) / 3 / (1 - np.exp(-1.5))
    hits = np.mean([
        truth in S.rmst_ratio(
            lifetimes(2 * s, 16, 1 / 3), lifetimes(2 * s + 1, 16), 1.5,
            n_boot=399,
        )
        for s in range(400)
    ])
    assert abs(hits - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5
