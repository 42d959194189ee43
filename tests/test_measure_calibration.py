"""Calibration against torchmetrics, scikit-learn, scipy and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import mlp, reset
from reappraisal.measure.calibration import (
    Tempered,
    ace,
    bin_forecasts,
    brier,
    brier_decomposition,
    calibration,
    classwise_ece,
    ece,
    mce,
    nll,
    raulc,
    reliability,
    retention_curve,
    risk_coverage,
    signed_gap,
    temperature_scale,
    tempered,
)
from reappraisal.measure.reading import Outputs, read_outputs

VICES = ("none", "one class", "ties", "certain", "uniform", "wild")


def case(i):
    """Probabilities [N, C], labels, bins; every sixth has the same vice."""
    g = np.random.default_rng([1000, i])
    n, c = int(g.choice([1, 2, 17, 200])), int(g.integers(2, 12))
    logits = g.normal(size=(n, c)) * 2
    y = g.integers(0, c, n)
    vice = VICES[i % 6]
    if vice == "one class":
        y[:] = 0
    elif vice == "ties":
        logits = logits.round()
    elif vice == "certain":
        logits = 1000.0 * np.eye(c)[g.integers(0, c, n)]
    elif vice == "uniform":
        logits[:] = 0
    elif vice == "wild":
        logits *= 20
    kind = torch.float64 if i % 2 else torch.float32
    probs = torch.tensor(logits).to(kind).softmax(-1)
    return probs, torch.tensor(y), int(g.choice([1, 2, 10, 15, 100]))


def test_torchmetrics_agrees_on_200_cases():
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    for i in range(200):
        p, y, bins = case(i)
        p = p.float()  # as it does itself
        for norm in "l1", "l2", "max":
            a = ece(p, y, bins, norm=norm, closed="left")
            b = theirs.multiclass_calibration_error(
                p, y, p.shape[1], bins, norm
            )
            assert abs(a - b) < 1e-5, (i, norm)


def test_sklearn_agrees_on_200_cases():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    for i in range(200):
        p, y, bins = case(i)
        p = p.double()
        c = p.shape[1]
        hit = (y == 0).numpy()
        # at these, where quantiles fall on data, its edges are rounded
        schemes = {"width": "uniform"}
        if i % 6 == 0 and math.gcd(len(y) - 1, bins) == 1:
            schemes["mass"] = "quantile"
        for scheme, strategy in schemes.items():
            freq, mean = calibration_curve(
                hit, p[:, 0].clamp(0, 1), n_bins=bins, strategy=strategy
            )
            ours = bin_forecasts(p[:, 0], y == 0, bins, scheme)
            full = ours.count > 0
            assert np.allclose(ours.frequency[full], freq, atol=1e-12), i
            assert np.allclose(ours.forecast[full], mean, atol=1e-12), i
        single = sum(
            brier_score_loss(y == k, p[:, k].clamp(0, 1), labels=[0, 1])
            for k in range(c)
        )
        assert abs(brier(p, y) - single) < 1e-9
        q = p.clamp(min=1e-9)
        q = q / q.sum(1, keepdim=True)
        expected = log_loss(y, q, labels=range(c))
        assert abs(nll(q.log(), y) - expected) < 1e-9


def groups(p, bins, scheme):
    """Bin of every forecast, one by one."""
    if scheme == "width":
        edges = [float(torch.tensor(k / bins, dtype=torch.float64).to(p.dtype))
                 for k in range(1, bins)]
        return [sum(float(q) > e for e in edges) for q in p]
    s, m = sorted(p.double().tolist()), len(p) - 1
    edges = []
    for k in range(1, bins):
        j, rest = divmod(k * m, bins)
        edges.append(s[j] + rest / bins * (s[min(j + 1, m)] - s[j]))
    return [sum(q > e for e in edges) for q in p.double().tolist()]


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_brute_force_agrees_on_200_cases(scheme):
    for i in range(200):
        p, y, bins = case(i)
        conf, pred = p.max(-1)
        gaps, sizes = [], []
        where = np.array(groups(conf, bins, scheme))
        for b in set(where.tolist()):
            rows = torch.tensor(where == b)
            mean = conf[rows].double().mean()
            gaps.append((mean - (pred == y)[rows].double().mean()).abs())
            sizes.append(int(rows.sum()))
        gaps, w = torch.stack(gaps), torch.tensor(sizes) / len(y)
        assert abs(ece(p, y, bins, scheme) - gaps @ w.double()) < 1e-7
        assert abs(mce(p, y, bins, scheme) - gaps.max()) < 1e-12
        square = ece(p, y, bins, scheme, "squared")
        assert abs(square - gaps.square() @ w.double()) < 1e-7
        assert abs(ece(p, y, bins, scheme, "l2") - square.sqrt()) < 1e-12


def test_every_class_by_hand():
    for i in range(60):
        p, y, bins = case(i)
        each, adaptive = [], []
        for c in range(p.shape[1]):
            b = bin_forecasts(p[:, c], y == c, bins)
            each.append((b.weight * b.gap.abs()).sum())
            b = bin_forecasts(p[:, c], y == c, bins, "mass")
            adaptive.append(b.gap[b.count > 0].abs().mean())
        assert abs(classwise_ece(p, y, bins) - torch.stack(each).mean()) < 1e-9
        assert abs(ace(p, y, bins) - torch.stack(adaptive).mean()) < 1e-9


MEASURES = {
    "ece": ece,
    "mass": lambda p, y: ece(p, y, scheme="mass"),
    "mce": mce,
    "debiased": lambda p, y: ece(p, y, 5, "mass", "squared", True),
    "classwise": classwise_ece,
    "ace": ace,
    "gap": signed_gap,
    "brier": brier,
    "nll": lambda p, y: nll(p.clamp(min=1e-30).log(), y),
    "aurc": lambda p, y: risk_coverage(p.argmax(-1) != y, -p.amax(-1)).aurc,
}


@pytest.mark.parametrize("name", list(MEASURES))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_invariances(name, seed):
    measure = MEASURES[name]
    p, y, _ = case(seed)
    p = p.double()
    g = torch.Generator().manual_seed(seed)
    value = measure(p, y)
    # order of the samples, also where forecasts tie
    rows = torch.randperm(len(y), generator=g)
    assert torch.allclose(measure(p[rows], y[rows]), value, atol=1e-9)
    # names of the classes, unless two classes tie for the first place
    classes = torch.randperm(p.shape[1], generator=g)
    top = p.topk(2).values
    if (top[:, 0] > top[:, 1]).all():
        swapped = measure(p[:, classes], classes.argsort()[y])
        assert torch.allclose(swapped, value, atol=1e-9)
    # every sample twice changes nothing but quantiles and the bias
    if name not in ("mass", "ace", "debiased", "aurc"):
        twice = measure(p.repeat(2, 1), y.repeat(2))
        assert torch.allclose(twice, value, atol=1e-9)
    # members are each alone, and inputs stay what they were
    before = p.clone()
    both = measure(torch.stack([p, p.flip(0)]), y)
    alone = torch.stack([value, measure(p.flip(0), y)])
    assert both.shape == (2,)
    assert torch.allclose(both, alone, atol=1e-9)
    assert torch.equal(p, before)


def test_many_members_in_parts_are_the_same(monkeypatch):
    import reappraisal.measure.calibration as module

    g = torch.Generator().manual_seed(0)
    p = torch.randn(7, 50, 4, generator=g).softmax(-1)
    y = torch.randint(4, (50,), generator=g)
    whole = ece(p, y)
    monkeypatch.setattr(module, "_CACHE", 300)
    assert torch.equal(ece(p, y), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("closed", ["left", "right"])
def test_edges_and_their_neighbours_find_their_bins(dtype, closed):
    for bins in (*range(1, 61), 97, 100):
        edges = (torch.arange(bins + 1).double() / bins).to(dtype)
        away = torch.tensor([-1.0, 2.0], dtype=torch.float64).to(dtype)
        near = [torch.nextafter(edges, a.expand_as(edges)) for a in away]
        p = torch.cat([edges, *near])
        inner = edges[1 : bins + (closed == "left")]
        want = torch.searchsorted(inner, p, right=closed == "left")
        found = bin_forecasts(
            p[:, None], torch.zeros(len(p), 1), bins, closed=closed
        )
        assert torch.equal(found.count.argmax(-1), want), bins
        assert (found.count.sum(-1) == 1).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
@pytest.mark.parametrize("closed", ["left", "right"])
def test_ties_are_won_by_the_first_class_for_every_member(classes, closed):
    g = torch.Generator().manual_seed(classes)
    grid = torch.randint(0, 3, (5, 300, classes), generator=g).float() + 1
    probs = grid / grid.sum(-1, keepdim=True)
    y = torch.randint(classes, (5, 300), generator=g)
    y[:, ::2] = probs.argmax(-1)[:, ::2]
    turned = probs.mT.contiguous().mT  # the same in another layout
    for labels in y, y[0]:
        right = probs.argmax(-1) == labels
        bins = bin_forecasts(probs.amax(-1), right, 12, closed=closed)
        want = (bins.weight * bins.gap.abs()).sum(-1)
        for p in probs, turned, probs.clone().requires_grad_():
            found = ece(p, labels, 12, closed=closed).detach()
            assert torch.allclose(found, want, rtol=0, atol=1e-7)
        gap = probs.amax(-1).double().mean(-1) - right.double().mean(-1)
        assert torch.allclose(signed_gap(probs, labels), gap, atol=1e-12)


def test_a_sum_of_one_does_not_hide_a_forecast_above_one():
    p = torch.full((3, 10), -9e-4)
    p[:, 0] = 1 + 81e-4
    for norm in "l1", "max":
        with pytest.raises(ValueError, match=r"p: from 1\.008"):
            ece(p, torch.zeros(3).long(), norm=norm)


def test_confident_by_ten_points():
    p = torch.full((1000, 2), 0.2)
    p[:, 0] = 0.8
    y = (torch.arange(1000) >= 700).long()
    for value in ece(p, y), mce(p, y), signed_gap(p, y), classwise_ece(p, y):
        assert abs(value - 0.1) < 1e-6
    y = (torch.arange(1000) >= 900).long()
    assert abs(signed_gap(p, y) + 0.1) < 1e-6


def test_debiased_square_is_unbiased():
    g = torch.Generator().manual_seed(1)
    truth = torch.rand(4000, 200, generator=g).double()
    hit = torch.rand(4000, 200, generator=g) < truth
    p = torch.stack([truth, 1 - truth], -1)
    y = (~hit).long()
    plain = ece(p, y, 10, "mass", "squared")
    fair = ece(p, y, 10, "mass", "squared", debias=True)
    assert plain.mean() > 0.004
    assert abs(fair.mean()) < 5 * fair.std() / 4000**0.5 + 1e-4
    root = ece(p, y, 10, "mass", "l2", debias=True)
    assert torch.allclose(root, fair.clamp(min=0).sqrt())


def test_decomposition_is_exact_for_forecasts_on_a_grid():
    g = np.random.default_rng(0)
    for _ in range(50):
        first = g.integers(0, 5, 80) / 4
        p = torch.tensor(np.stack([first, 1 - first], 1))
        y = torch.tensor(g.integers(0, 2, 80))
        d = brier_decomposition(p, y, 8)
        assert abs(d.within) < 1e-12
        assert d.reliability >= 0 and d.resolution >= 0
        assert abs(d.brier - brier(p, y)) < 1e-12
    rates = torch.bincount(y) / len(y)
    flat = brier_decomposition(rates.double().expand(80, 2), y)
    assert flat.reliability < 1e-12 and flat.resolution < 1e-12
    assert "resolution" in repr(flat)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_temperature_is_the_minimum(seed):
    p, y, _ = case(seed)
    logits = p.double().clamp(min=1e-30).log()
    fitted = temperature_scale(logits, y)
    assert 0.01 <= fitted.value <= 100
    for factor in (0.9, 0.999, 1.001, 1.1):
        t = (fitted.value * factor).clamp(0.01, 100)
        assert nll(logits / t, y) >= fitted.nll_after - 1e-10
    assert fitted.nll_after <= fitted.nll_before + 1e-12
    if fitted.at_bound:
        return
    # a second fit has nothing to do; scaling the logits scales T
    again = temperature_scale(fitted.apply(logits), y)
    if fitted.value != 1:
        assert abs(again.value - 1) < 1e-5
    tripled = temperature_scale(3 * logits, y, (0.01, 300))
    if not tripled.at_bound and (logits != logits[:, :1]).any():
        assert abs(tripled.value / fitted.value - 3) < 1e-4


def test_temperature_agrees_with_scipy():
    from scipy.optimize import minimize_scalar

    g = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(20, 100, 5, generator=g).double()
    y = logits[0].argmax(-1)
    y[::3] = 0
    fitted = temperature_scale(logits, y)
    for z, t in zip(logits, fitted.value, strict=True):
        best = minimize_scalar(
            lambda u, z=z: float(nll(z / math.exp(u), y)),
            bounds=(math.log(0.01), math.log(100)), method="bounded",
            options={"xatol": 1e-10},
        )
        if not 0.02 < math.exp(best.x) < 50:
            continue
        assert abs(math.exp(best.x) / t - 1) < 1e-6


def test_temperature_at_its_ends():
    right = temperature_scale(torch.eye(4), torch.arange(4))
    assert right.at_bound and right.value == 0.01
    wrong = temperature_scale(-torch.eye(4), torch.arange(4), (0.5, 9.0))
    assert wrong.at_bound and wrong.value == 9
    none = temperature_scale(torch.zeros(3, 4), torch.arange(3))
    assert not none.at_bound and none.value == 1
    huge = 1e6 * torch.eye(3)[[0, 1, 2, 0]]
    far = temperature_scale(huge, torch.tensor([0, 1, 2, 1]), (1e-3, 1e8))
    assert not far.at_bound and 1e4 < far.value < 1e8
    with pytest.raises(ValueError, match="bounds"):
        temperature_scale(torch.eye(4), torch.arange(4), (2.0, 1.0))
    with pytest.raises(ValueError, match="logits: got shape"):
        temperature_scale(torch.randn(3, 9, 2), torch.arange(9) % 2).apply(
            torch.zeros(2, 9, 2)
        )


def test_tempered_leaves_the_model_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    reset(net, 0)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = net.eval()(x).argmax(-1)
    y[::5] = 0
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    base = read_outputs(net, (x, y))
    scaled = tempered(net, (x, y))
    assert net.training and scaled.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    out = read_outputs(scaled, (x, y))
    assert torch.equal(out.predictions, base.predictions)
    assert torch.allclose(out.logits * scaled.temperature, base.logits)
    assert nll(out.logits, y) <= nll(base.logits, y) + 1e-9
    assert Tempered(net.half(), 2.0).temperature.dtype == torch.float16
    with pytest.raises(ValueError, match="best temperature is 0"):
        tempered(nn.Identity(), (10 * torch.eye(4), torch.arange(4)))
    with pytest.raises(ValueError, match="model: got Ensemble"):
        tempered(Ensemble.of([mlp([3, 2], seed=0)]), (x, y))
    with pytest.raises(ValueError, match="data: has no labels"):
        tempered(net.float(), x)


def test_reliability_intervals():
    from scipy.stats import binomtest

    p, y, _ = case(1002)
    found = reliability(p, y, 5)
    assert len(found.intervals) == 5
    for count, rate, interval in zip(
        found.bins.count.tolist(), found.bins.frequency, found.intervals,
        strict=True,
    ):
        if not count:
            assert interval is None
            continue
        exact = binomtest(round(count * float(rate)), count).proportion_ci()
        assert abs(interval.lo - exact.low) < 1e-9
        assert abs(interval.hi - exact.high) < 1e-9
    frame = found.to_frame()
    assert len(frame) == 5 and frame["count"].sum() == len(y)
    assert "bins off" in repr(found)
    with pytest.raises(ValueError, match="one network's"):
        reliability(p[None], y)


def test_risk_coverage_by_hand_on_200_cases():
    for i in range(200):
        p, y, _ = case(i)
        wrong = (p.argmax(-1) != y).double()
        doubt = -p.amax(-1).double()
        n = len(y)
        expected = torch.zeros(n, dtype=torch.float64)
        for k in range(1, n + 1):
            cut = doubt.sort().values[k - 1]
            sure, tie = doubt < cut, doubt == cut
            expected[k - 1] = (
                wrong[sure].sum() + (k - sure.sum()) * wrong[tie].mean()
            ) / k
        curve = risk_coverage(wrong, doubt)
        assert torch.allclose(curve.risk, expected, atol=1e-12)
        assert curve.e_aurc >= -1e-12
        assert risk_coverage(wrong, wrong).e_aurc.abs() < 1e-12
        # any monotone transformation is the same order
        same = risk_coverage(wrong, (3 * doubt).exp())
        assert torch.allclose(same.aurc, curve.aurc, atol=1e-6)


def test_risk_coverage_reads_off():
    curve = risk_coverage(
        torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 3.0])
    )
    assert curve.risk.tolist() == [0, 0, 1 / 3, 0.5]
    assert curve.at(0.5) == 0 and curve.at(0.75) == 1 / 3
    assert curve.at(1.0) == 0.5 and curve.at(1e-9) == 0
    assert list(curve.to_frame().columns) == ["coverage", "risk", "best"]
    with pytest.raises(ValueError, match="coverage"):
        curve.at(0)


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_retention(n, seed):
    g = torch.Generator().manual_seed(seed)
    error = torch.rand(n, generator=g).double()
    doubt = torch.rand(n, generator=g).double()
    curve = retention_curve(error, doubt, acceptable=0.5)
    assert torch.allclose(curve.random_auc, error.mean() / 2)
    best = retention_curve(error, error, acceptable=0.5)
    assert torch.allclose(best.r_auc, curve.oracle_auc)
    assert curve.oracle_auc <= curve.r_auc + 1e-12
    assert torch.allclose(curve.error[-1], error.mean())
    assert curve.error[0] == 0
    order = doubt.argsort()
    area = sum(
        (error[order[:k]].sum() + error[order[: k + 1]].sum()) / 2 / n / n
        for k in range(n)
    )
    assert torch.allclose(curve.r_auc, area)
    good = error <= 0.5
    for k in range(1, n + 1):
        kept = order[:k]
        hits = good[kept].sum()
        f1 = 2 * hits / (k + good.sum())
        assert abs(curve.f1[k] - f1) < 1e-6
    assert curve.f1_auc <= best.f1_auc + 1e-12


def test_raulc_closed_forms():
    correct = torch.arange(10) < 7
    assert abs(raulc(correct, -correct.double()) - 1) < 1e-12
    assert abs(raulc(correct, torch.zeros(10))) < 1e-12
    # best: (7 + sum of 7/k)/10/0.7 - 1; reversed: sum of (k-3)/k over 4..10
    best = (7 + sum(7 / k for k in (8, 9, 10))) / 7 - 1
    worst = sum((k - 3) / k for k in range(4, 11)) / 7 - 1
    assert abs(raulc(correct, correct.double()) - worst / best) < 1e-12
    assert raulc(torch.ones(4), torch.arange(4)).isnan()


def test_report_of_modules_and_ensembles():
    nets = [mlp([6, 3], seed=i) for i in range(3)]
    x, y = torch.randn(50, 6), torch.arange(50) % 3
    many = calibration(Ensemble.of(nets), (x, y), n_bins=5)
    for i, net in enumerate(nets):
        one = calibration(net, (x, y), n_bins=5)
        for name, value in one.values.items():
            assert abs(value - many[name][i]) < 1e-5, name
    again = calibration(many.outputs, None, n_bins=5)
    assert all(torch.equal(again[k], v) for k, v in many.values.items())
    assert many.to_frame().shape == (3, len(many.values))
    assert many.interval("ECE").n == 3
    assert "AURC" in repr(many) and "[" in repr(many)
    assert "AURC" in repr(calibration(nets[0], (x, y)))


P, Y = torch.tensor([[0.3, 0.7], [0.9, 0.1]]), torch.tensor([1, 0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ece(P, [1, 2]), "y: labels from 1 to 2"),
        (lambda: ece(P, [1]), "y: got shape"),
        (lambda: ece(2 * P, Y), "probs: a row sums to 2"),
        (lambda: ece(P * math.nan, Y), "probs: not finite in 2"),
        (lambda: ece(P[:0], Y[:0]), "at least one member, sample"),
        (lambda: ece(P, Y, 0), "n_bins: got 0"),
        (lambda: ece(P, Y, scheme="quantile"), "scheme: got 'quantile'"),
        (lambda: ece(P, Y, closed="both"), "closed: got 'both'"),
        (lambda: ece(P, Y, norm="l3"), "norm: got 'l3'"),
        (lambda: ece(P, Y, debias=True), "no unbiased estimate"),
        (lambda: nll(P / 0, Y), "logits: not finite"),
        (lambda: bin_forecasts(P, Y), "p, hit: shapes"),
        (lambda: bin_forecasts(P * 2, P > 0), "p: from 0.2 to 1.8"),
        (lambda: risk_coverage(P, Y), "error, uncertainty: shapes"),
        (lambda: risk_coverage(P / 0, P), "not finite"),
        (lambda: retention_curve(-P, P), "error: smallest"),
        (lambda: calibration(nn.Linear(2, 2), P), "data: has no labels"),
        (lambda: calibration(nn.Linear(2, 2), []), "data: empty"),
        (lambda: Outputs(P, [5, 5]), "y: labels from 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
