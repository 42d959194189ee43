"""Power, seeds and exaggeration against statsmodels, scipy and brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower

from reappraisal.protocol.power import (
    effect_for,
    exaggeration,
    sd_interval,
    seeds_for,
    seeds_needed,
    selected,
    t_power,
)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("d", "n"), [(0.3, 3), (-0.8, 5), (1.5, 8)])
def test_selected_against_simulation(d, n, paired):
    rng = np.random.default_rng(1)
    z = rng.normal(d, 1, (400_000 // n, n))
    if paired:
        effect, p = z.mean(1), stats.ttest_1samp(z, 0, axis=1).pvalue
    else:
        w = rng.normal(0, 1, z.shape)
        effect = z.mean(1) - w.mean(1)
        p = stats.ttest_ind(z, w, axis=1).pvalue
    hit = p < 0.05
    found = selected(d, n, paired=paired)
    up, down = hit & (effect > 0), hit & (effect < 0)
    assert abs(up.mean() - found.up) < 0.005
    assert abs(down.mean() - found.down) < 0.005
    side = up if d > 0 else down
    mean = found.mean_up if d > 0 else found.mean_down
    assert abs(effect[side].mean() / mean - 1) < 0.03
    made = exaggeration(d, n, paired=paired)
    size = np.abs(effect[hit]).mean() / abs(d)
    assert abs(made.type_m / size - 1) < 0.03


def test_null_selection_is_symmetric():
    s = selected(0.0, 4)
    assert math.isclose(s.up, 0.025, rel_tol=1e-3)
    assert math.isclose(s.up, s.down)
    assert math.isclose(s.mean_up, -s.mean_down)


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_closed_form_where_the_error_is_known(lam):
    # Gelman and Carlin's retrodesign by quadrature of a normal density
    z = stats.norm.isf(0.025)
    x = np.linspace(lam - 12, lam + 12, 2_000_001)
    density = stats.norm.pdf(x, lam)
    hit = np.abs(x) > z
    power = np.trapezoid(density * hit, x)
    size = np.trapezoid(np.abs(x) * density * hit, x) / power / lam
    wrong = np.trapezoid(density * (x < -z), x) / power
    found = exaggeration(lam / 1000, 10**6, paired=True)
    assert math.isclose(found.power, power, rel_tol=1e-3)
    assert math.isclose(found.type_m, size, rel_tol=1e-3)
    assert math.isclose(found.type_s, wrong, rel_tol=5e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.15, 3), st.sampled_from([0.5, 0.8, 0.95]),
       st.booleans())
def test_seeds_for_is_the_fewest(d, power, paired):
    n = int(seeds_for(d, power, paired=paired))
    assert t_power(d, n, paired=paired) >= power
    if n > 2:
        assert t_power(d, n - 1, paired=paired) < power
    law = TTestPower() if paired else TTestIndPower()
    assert abs(law.power(d, n, 0.05) - t_power(d, n, paired=paired)) < 1e-4


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 300), st.sampled_from([0.5, 0.8, 0.95]),
       st.booleans(), st.sampled_from([0.05, 0.005]))
def test_effect_for_is_the_inverse(n, power, paired, alpha):
    d = effect_for(n, power, paired=paired, alpha=alpha)
    found = t_power(d, n, paired=paired, alpha=alpha)
    assert math.isclose(found, power, abs_tol=1e-6)


def test_power_where_scipy_has_no_far_tail():
    # brute force: the chance given the estimated deviation, integrated
    for d, n, alpha, paired in (
        (8, 2, 0.005, False), (8, 2, 0.005, True), (1, 300, 0.05, False),
        (-16, 3, 0.005, False), (64, 2, 0.005, True),
    ):
        df = n - 1 if paired else 2 * n - 2
        shift = abs(d) * math.sqrt(n if paired else n / 2)
        c = stats.t.isf(alpha / 2, df)
        s = np.linspace(0, 1 + 12 / math.sqrt(df), 400_001)
        chance = stats.norm.cdf(shift - c * s) + stats.norm.cdf(-shift - c * s)
        density = stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)
        exact = np.trapezoid(chance * density, s)
        found = t_power(d, n, paired=paired, alpha=alpha)
        assert math.isclose(found, exact, rel_tol=1e-5)
    sure = exaggeration(1e3, 2)
    assert sure.power == pytest.approx(1) and sure.type_s == 0
    assert sure.type_m == pytest.approx(1, abs=1e-3)


def test_seeds_for_shapes_and_limits():
    assert seeds_for([[0.5, -0.5]]).tolist() == [[64, 64]]
    assert seeds_for(1e3).tolist() == 2
    with pytest.raises(ValueError, match="more than 100 seeds"):
        seeds_for(0.01, at_most=100)
    with pytest.raises(ValueError, match="power"):
        seeds_for(0.5, 1.0)


@pytest.mark.parametrize(("change", "message"), [
    ({"pilot_a": [1, 2]}, "pilot_a"),
    ({"pilot_b": [1, 2, math.nan, 3, 4]}, "pilot_b"),
    ({"pilot_a": [1, 2, 3]}, "one of each seed"),
    ({"sesoi": 0}, "sesoi"),
    ({"pilot_a": [1, 1, 1, 1, 1], "pilot_b": [0, 0, 0, 0, 0]}, "vary"),
    ({"pilot_b": None}, "paired design"),
])
def test_seeds_needed_refuses(change, message):
    given_ = {"pilot_a": [1, 2, 3, 4, 5], "pilot_b": [1, 3, 2, 5, 4],
              "sesoi": 1}
    with pytest.raises(ValueError, match=message):
        seeds_needed(**(given_ | change))


def test_pilot_difference_is_no_input():
    a, b = np.array([1.0, 3, 2, 5, 4]), np.array([1.0, 2, 3, 4, 5])
    near, far = (seeds_needed(a + x, b, sesoi=1) for x in (0, 100))
    assert near == far and near.cautious > near.n and near.df == 4


def test_one_arm_alone_is_pooled_with_itself():
    a = np.array([1.0, 3, 2, 5, 4])
    alone = seeds_needed(a, None, sesoi=1, paired=False)
    both = seeds_needed(a, a[::-1], sesoi=1, paired=False)
    assert (alone.n, alone.df) == (both.n, 4) and both.df == 8
    assert math.isclose(alone.sd, both.sd) and alone.cautious > both.cautious


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_sd_interval_covers_and_is_what_is_written(level):
    rng = np.random.default_rng(5)
    sds = rng.normal(0, 3, (4000, 4)).std(1, ddof=1)
    held = np.mean([3.0 in sd_interval(s, 3, level) for s in sds])
    assert abs(held - level) < 4 * math.sqrt(level * (1 - level) / 4000)
    found = sd_interval(2.0, 7, level)
    tail = (1 - level) / 2
    assert math.isclose(stats.chi2.cdf(7 * 4 / found.hi**2, 7), tail)
    assert math.isclose(stats.chi2.sf(7 * 4 / found.lo**2, 7), tail)


@pytest.mark.parametrize("call", [
    lambda: exaggeration(0, 3), lambda: exaggeration(1, 1),
    lambda: selected(1, 3, alpha=0), lambda: selected(math.inf, 3),
    lambda: effect_for(1), lambda: effect_for(5, 0.01),
    lambda: sd_interval(0, 3), lambda: sd_interval(1, 0),
    lambda: sd_interval(1, 3, 90),
])
def test_refusals(call):
    with pytest.raises(ValueError, match="accepted|expected"):
        call()
