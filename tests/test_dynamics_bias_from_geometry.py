"""Fixed points against libraries and samples; verdicts on plants and nulls."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression, Ridge

from reappraisal.dynamics import bias_from_geometry as b
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim

GENERAL = b.TeacherMixture(0.3, 0.6, (1.0, 0.5), (0.5, 0.3), (0.2, -0.1))
SEEDS = range(1000, 1080)


def fits(model, alpha, d, seeds, labels=None, **options):
    """Accuracies [seeds, 2] of ridge fits."""
    out = []
    for s in seeds:
        X, group = model.sample(round(alpha * d), d, s)
        y = model.labels(X, group)
        if labels:
            y = labels(y, s)
        w, c = b.ridge(X, y, group, 0.5, **options)
        out.append(b.rates(model, b.overlaps(model, w, c))["accuracy"])
    return np.stack(out)


def predicted(model, alpha, **options):
    found = b.saddle_point(model, alpha, 0.5, **options)
    return b.rates(model, found)["accuracy"]


def judged(slug, evidence, seeds):
    return Claim.load(f"B01/{slug}").judge(
        evidence, scale="book", seeds=seeds, seconds=1.0)


# oracles

@pytest.mark.parametrize("n", [20, 80])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 0.4)])
def test_ridge_is_the_library_s(n, weights):
    X, group = GENERAL.sample(n, 30, seed=1)
    y = GENERAL.labels(X, group)
    w, c = b.ridge(X, y, group, 0.2, weights)
    want = Ridge(alpha=6.0).fit(X, y, sample_weight=np.array(weights)[group])
    np.testing.assert_allclose(w[0], want.coef_, atol=1e-9)
    np.testing.assert_allclose(c, want.intercept_, atol=1e-9)
    w, c = b.ridge(X, y, group, 0.2, weights, own_intercepts=True)
    Z = np.column_stack([X, 1e4 * (group == 0)])  # a nearly free intercept
    want = Ridge(alpha=6.0).fit(Z, y, sample_weight=np.array(weights)[group])
    np.testing.assert_allclose(w[0], want.coef_[:-1], atol=1e-5)


def test_many_labellings_are_fitted_as_one_by_one():
    model = b.TeacherMixture(0.3, [0.1, 0.9])
    X, group = b.TeacherMixture(0.3).sample(60, 20, seed=2)
    y = model.labels(X, group)
    for fit in (
        lambda t: b.ridge(X, t, group, 0.5),
        lambda t: b.coupled_ridge(X, t, group, 0.5, [0.0, 1.0]),
    ):
        both = fit(y)
        for i in (0, 1):
            one = fit(y[i])
            axis = both[0].ndim - 3
            torch.testing.assert_close(both[0].select(axis, i), one[0])
            torch.testing.assert_close(both[1].select(axis, i), one[1])


def test_coupled_students_solve_their_problem():
    X, group = GENERAL.sample(70, 15, seed=3)
    y = GENERAL.labels(X, group)
    w, c = b.coupled_ridge(X, y, group, 0.4, [0.7])
    w, c = w[0].clone().requires_grad_(), c[0].clone().requires_grad_()
    out = (X * w[group]).sum(1) + c[group]
    loss = ((y - out) ** 2).sum() / 2 + 15 * (
        0.1 * (w**2).sum() + 0.35 * ((w[0] - w[1]) ** 2).sum())
    for g in torch.autograd.grad(loss, (w, c)):
        assert g.abs().max() < 1e-8


def test_orthants_and_rates_are_probabilities():
    rng = np.random.default_rng(0)
    for a, k, r in rng.uniform(-1, 1, (5, 3)) * [2, 2, 0.98]:
        law = multivariate_normal([0, 0], [[1, r], [r, 1]])
        assert b.orthant(a, k, r) == pytest.approx(law.cdf([a, k]), abs=1e-7)
    X, group = GENERAL.sample(200_000, 5, seed=4)
    w = torch.randn(2, 5, generator=generator(4), dtype=torch.float64)
    c = torch.tensor([0.3, -0.4], dtype=torch.float64)
    counted = b.audit((X * w[group]).sum(1) + c[group],
                      GENERAL.labels(X, group), group)
    for name, want in b.rates(GENERAL, b.overlaps(GENERAL, w, c)).items():
        np.testing.assert_allclose(counted[name], want, atol=0.008)


# theory against simulation

@pytest.mark.parametrize("options", [
    {}, {"weights": (3.0, 0.5)}, {"own_intercepts": True},
])
def test_the_fixed_point_meets_the_mean_of_fits(options):
    found = fits(GENERAL, 2.0, 300, range(24), **options)
    off = found.mean(0) - predicted(GENERAL, 2.0, **options)
    assert (np.abs(off) < 0.008).all()
    other = b.TeacherMixture(0.3, 0.3, (1.0, 0.5), (0.5, 0.3), (0.2, -0.1))
    assert np.abs(found.mean(0) - predicted(other, 2.0, **options)
                  ).max() > 0.015  # a wrong overlap is noticed


def test_the_coupled_fixed_point_meets_the_mean_of_fits():
    ties = np.array([0.0, 0.3, 3.0])
    want = b.rates(GENERAL, b.saddle_point_coupled(GENERAL, 2.0, 0.5, ties))
    found = []
    for s in range(16):
        X, group = GENERAL.sample(500, 250, s)
        w, c = b.coupled_ridge(X, GENERAL.labels(X, group), group, 0.5, ties)
        found.append(b.rates(GENERAL, b.overlaps(GENERAL, w, c))["accuracy"])
    np.testing.assert_allclose(
        np.mean(found, 0), want["accuracy"], atol=0.012)


def test_the_logistic_fixed_point_meets_the_library():
    want = b.rates(GENERAL, b.saddle_point_logistic(GENERAL, 3.0, 0.1))
    found = []
    for s in range(10):
        X, group = GENERAL.sample(600, 200, s)
        fit = LogisticRegression(C=1 / 20).fit(X, GENERAL.labels(X, group))
        found.append(b.rates(GENERAL, b.overlaps(
            GENERAL, torch.from_numpy(fit.coef_),
            torch.from_numpy(np.repeat(fit.intercept_, 2))))["accuracy"])
    np.testing.assert_allclose(
        np.mean(found, 0), want["accuracy"], atol=0.012)
    with pytest.raises(RuntimeError, match="steps"):
        b.saddle_point_logistic(GENERAL, 3.0, 0.1, steps=2)


def test_exchanging_the_groups_exchanges_the_fixed_point():
    turned = b.TeacherMixture(0.7, 0.6, (0.5, 1.0), (0.3, 0.5), (0.1, -0.2))
    np.testing.assert_allclose(
        predicted(GENERAL, 1.5), predicted(turned, 1.5)[::-1])


def test_a_batch_is_solved_as_one_by_one():
    q, alpha = np.array([0.2, 0.5, 0.9]), np.array([[0.5], [3.0]])
    many = predicted(b.TeacherMixture(0.2, q), alpha)
    assert many.shape == (2, 3, 2)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(many[i, j], predicted(
                b.TeacherMixture(0.2, q[j]), alpha[i, 0]))


# mechanism off

def test_no_alignment_no_bias_and_no_rule_no_accuracy():
    plain = b.TeacherMixture(0.1, align=(0.0, 0.0))
    biased = b.TeacherMixture(0.1)
    assert np.ptp(predicted(plain, 0.5)) < 1e-12
    assert np.ptp(predicted(biased, 0.5)) > 0.2
    found = fits(
        biased, 2.0, 100, range(10),
        labels=lambda y, s: y[torch.randperm(len(y), generator=generator(s))])
    # without a rule each group gets its share of the majority's answer
    assert found.mean(0)[0] < 0.5
    assert found.mean() == pytest.approx(0.5, abs=0.1)


def test_an_intercept_for_each_group_ends_the_harm_under_one_rule():
    model, only = b.TeacherMixture(0.1), b.TeacherMixture(1.0)
    alone = predicted(only, 0.05)[0]
    assert predicted(model, 0.5)[0] < alone - 0.1
    assert predicted(model, 0.5, own_intercepts=True)[0] > alone


def test_the_critical_overlap_is_where_pooling_changes_sign():
    q = b.critical_overlap(b.TeacherMixture(0.1), 4.0, 0.5)
    signs = b.majority_effect(
        b.TeacherMixture(0.1, [q - 0.05, q, q + 0.05]), 4.0, 0.5)
    assert signs[0] < 0 < signs[2] and abs(signs[1]) < 1e-8
    assert np.isnan(b.critical_overlap(b.TeacherMixture(0.05), 0.5, 0.5))


def test_area_and_gaps_by_hand():
    assert b.dominated_area([[2, 1], [1, 2], [1, 1]], [0, 0]) == 3
    assert b.dominated_area([[2, 1], [2, 1]], [1, 0]) == 1
    assert b.dominated_area([[0.5, 5]], [1, 0]) == 0
    counted = b.audit([1, 1, -1, 1, -1, -1], [1, -1, -1, 1, 1, -1],
                      [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(counted["accuracy"], [2 / 3, 2 / 3])
    np.testing.assert_allclose(counted["precision"], [1 / 2, 1])
    found = b.gaps(counted)
    assert found["accuracy ratio"] == 0
    assert found["parity ratio"] == pytest.approx(0.5)
    assert found["equal opportunity"] == found["calibration"] == 0.5


def test_a_planted_geometry_is_found_again():
    X, group = GENERAL.sample(20_000, 4, seed=5)
    mix = torch.randn(4, 4, generator=generator(5), dtype=torch.float64)
    y = GENERAL.labels(X, group)
    found, Z = b.estimate_geometry(3 + X @ mix, y, group)
    for name in ("overlap", "align", "delta"):
        want = getattr(GENERAL, name)
        if name == "delta":  # fixed up to the scale of whitening
            want, got = want / want[1], found.delta / found.delta[1]
        else:
            got = getattr(found, name)
        np.testing.assert_allclose(got, want, atol=0.08)
    assert np.linalg.norm(Z[group == 0].mean(0)) == pytest.approx(1)


def test_bad_input_is_named():
    for options, name in (
        ({"share": 0.0}, "share"), ({"overlap": -0.9}, "overlap"),
        ({"delta": (0.0, 1.0)}, "delta"), ({"align": 0.5}, "align"),
    ):
        with pytest.raises(ValueError, match=name):
            b.TeacherMixture(**options)
    with pytest.raises(ValueError, match="alpha"):
        b.saddle_point(GENERAL, 0.0, 0.5)
    with pytest.raises(ValueError, match="sample"):
        GENERAL.sample(10, 2, 0)
    with pytest.raises(ValueError, match="group 1"):
        b.estimate_geometry(np.ones((4, 2)), [1, -1, 1, 1], [0, 0, 1, 1])
    with pytest.raises(ValueError, match="lengths"):
        b.audit([1], [1, 1], [0, 1])


# verdicts

def names(slug):
    return list(Claim.load(f"B01/{slug}").criteria)


def overlay(shift, cells=24, size=80):
    """Deviations with a shift in some cells; a decay of power -1/2."""
    rng = np.random.default_rng(1)
    evidence = {
        n: rng.normal(shift * (i // 2 < cells), 0.02, size)
        for i, n in enumerate(names("theory-overlays-simulation")[:48])
    }
    x = np.repeat(np.log([100, 200, 400, 800]), 20)
    return evidence | {"wrong": [0], "decay": {
        "x": x, "y": 0.5 * x + rng.normal(0, 0.2, 80),
        "clusters": np.tile(np.arange(20), 4)}}


@pytest.mark.parametrize("change,verdict", [
    (overlay(0.0), "reproduced"), (overlay(0.04, 2), "reproduced"),
    (overlay(0.04, 3), "not reproduced"),
    (overlay(0.013), "inconclusive"),
    (overlay(0.0) | {"wrong": [3]}, "invalid"),
])
def test_the_overlay_is_judged_by_its_cells(change, verdict):
    assert judged("theory-overlays-simulation", change, SEEDS
                  ).verdict == verdict


@pytest.mark.parametrize("gap,skew,verdict", [
    (0.15, 0.0, "reproduced"), (0.0, 0.0, "not reproduced"),
    (0.15, 0.1, "invalid")])
def test_bias_planted_and_absent(gap, skew, verdict):
    rng = np.random.default_rng(2)
    shares = np.repeat([0.05, 0.1, 0.2, 0.3, 0.4, 0.5], 20)
    evidence = {}
    for n in names("bias-without-conflicting-rules"):
        base = rng.normal(0.8, 0.01, 20)
        if n.startswith("rise"):
            evidence[n] = {"x": shares, "y": gap * shares + rng.normal(
                0, 0.01, 120), "clusters": np.tile(np.arange(20), 6)}
        elif n.startswith(("even", "plain")):
            evidence[n] = {"a": base - skew + rng.normal(0, 0.01, 20),
                           "b": base}
        elif n == "symmetry":
            evidence[n] = [0.0]
        else:
            evidence[n] = {"a": base - gap + rng.normal(0, 0.01, 20),
                           "b": base}
    slug = "bias-without-conflicting-rules"
    assert judged(slug, evidence, SEEDS[:20]).verdict == verdict


@pytest.mark.parametrize("miss,sign,lost,verdict", [
    (0.0, 1, 0.1, "reproduced"), (0.2, 1, 0.1, "not reproduced"),
    (0.0, -1, 0.1, "not reproduced"), (0.1, 1, 0.1, "inconclusive"),
    (0.0, 1, -0.1, "invalid"),
])
def test_the_crossing_is_judged(miss, sign, lost, verdict):
    rng = np.random.default_rng(3)
    evidence = {n: rng.normal(lost, 0.01, 30)
                for n in names("majority-helps-or-hurts")}
    evidence["crossing"] = rng.normal(miss, 0.05, 30)
    for n in ("below", "above"):
        evidence[n] = rng.normal(0.05 * sign, 0.02, 30)
    assert judged("majority-helps-or-hurts", evidence, range(1000, 1030)
                  ).verdict == verdict


@pytest.mark.parametrize("lead,conflict,inside,verdict,says", [
    (0.01, 0.0, 0.01, "reproduced", "through coupling"),
    (0.01, 0.0, -0.01, "reproduced", "through separation"),
    (0.01, 0.2, 0.01, "inconclusive", "through coupling"),
    (-0.01, 0.0, 0.01, "not reproduced", None),
])
def test_the_repairs_are_judged(lead, conflict, inside, verdict, says):
    rng = np.random.default_rng(4)
    evidence = {n: rng.normal(lead, 0.004, 20)
                for n in names("coupled-beats-reweighted")}
    evidence |= {"conflict": [conflict, 0.0],
                 "interior": rng.normal(inside, 0.004, 20),
                 "same_rule": rng.normal(0, 0.002, 20)}
    found = judged("coupled-beats-reweighted", evidence, range(1000, 1020))
    assert (found.verdict, found.record["qualifier"]) == (verdict, says)
