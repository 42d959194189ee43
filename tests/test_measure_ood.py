"""Novelty scores and their examination against scikit-learn, scipy, pairs."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Everything
from sklearn import covariance, metrics, neighbors
from torch import nn

from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.measure.ood import (
    DETECTORS,
    METRICS,
    DetectorReport,
    aupr,
    auroc,
    auroc_difference,
    delong,
    energy,
    ensemble_entropy,
    entropy,
    evaluate,
    feature_norm,
    fit_gaussians,
    fpr,
    kernel_surprise,
    knn_distance,
    margin,
    max_logit,
    max_softmax,
    mutual_information,
    ood_report,
    pixel_statistics,
    read_evidence,
)

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, generator=G)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
FAR = 4 * torch.randn(50, 6, generator=G) + 2


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


# metrics

numbers = st.integers(-4, 4).map(float)  # many ties


@given(
    st.lists(numbers, min_size=1, max_size=12),
    st.lists(numbers, min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_metrics_under_ties(a, b):
    truth, both = np.repeat([0, 1], [len(a), len(b)]), np.array(a + b)
    s, t = torch.tensor(a), torch.tensor(b)
    by_pairs = np.mean([(v > u) + (v == u) / 2 for u in a for v in b])
    assert abs(auroc(s, t) - by_pairs) < 1e-12
    ap = metrics.average_precision_score
    assert abs(aupr(s, t) - ap(truth, both)) < 1e-12
    assert abs(aupr(s, t, "in") - ap(1 - truth, -both)) < 1e-12
    for level in (0.5, 0.8, 0.95):
        x, y, _ = metrics.roc_curve(1 - truth, -both, drop_intermediate=False)
        assert abs(fpr(s, t, level) - x[y >= level - 1e-12].min()) < 1e-12
        x, y, _ = metrics.roc_curve(truth, both, drop_intermediate=False)
        other = fpr(s, t, level, "out")
        assert abs(other - x[y >= level - 1e-12].min()) < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_what_must_not_change_and_what_must(seed, n, m):
    a, b = rand(n, seed=seed), rand(m, seed=seed + 1)
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randperm(k, generator=g) for k in (n, m))
    for metric in METRICS:
        one = evaluate(a, b)[metric]
        # nor by the order of samples, nor by a rising function
        for c, d in ((a[p], b[q]), (a.exp() * 3, b.exp() * 3)):
            assert torch.allclose(one, evaluate(c, d)[metric], atol=1e-12)
    assert abs(auroc(a, b) + auroc(b, a) - 1) < 1e-12
    assert abs(auroc(a, b) + auroc(-a, -b) - 1) < 1e-12
    assert abs(auroc(a, a) - 0.5) < 1e-12
    assert aupr(a, a + 100) == 1 and fpr(a, a + 100) == 0


def test_prevalence():
    a, b = rand(300), rand(200, seed=1) + 1
    # as many unknown samples repeated: precision as at that share
    many = b.repeat(27)
    share = len(many) / (len(many) + len(a))
    assert abs(aupr(a, many) - aupr(a, b, prevalence=share)) < 1e-12
    assert abs(aupr(a, b, prevalence=0.4) - aupr(a, b)) < 1e-12
    chance = aupr(a, a, prevalence=0.1)
    assert 0.1 <= chance < 0.16  # the base rate, with a small-sample bias
    assert torch.allclose(auroc(a, b), auroc(a, many), atol=1e-12)


def test_members_are_a_loop():
    a, b = rand(4, 30), rand(4, 20, seed=1) + 0.5
    a[1], b[1] = a[1].round(), b[1].round()
    for f in (auroc, aupr, fpr):
        assert torch.equal(
            f(a, b), torch.stack([f(s, t) for s, t in zip(a, b, strict=True)])
        )


def test_infinite_scores_are_ranks_like_others():
    a = torch.tensor([-torch.inf, 0, 1])
    b = torch.tensor([1, torch.inf])
    assert abs(auroc(a, b) - 5.5 / 6) < 1e-12


# DeLong


def pairwise(a, b):
    heard = (b[:, None, :] > a[:, :, None]).double()
    return heard + (b[:, None, :] == a[:, :, None]) / 2


def test_delong_by_the_definition():
    for seed in range(40):
        k = 3
        a, b = rand(k, 9, seed=seed), rand(k, 7, seed=seed + 99) + 0.5
        if seed % 2:
            a, b = a.round(), b.round()
        areas, cov = delong(a, b)
        heard = pairwise(a, b)
        expected = np.cov(heard.mean(1)) / 7 + np.cov(heard.mean(2)) / 9
        assert np.allclose(areas, heard.mean((1, 2)))
        assert np.allclose(cov, expected, atol=1e-14)


def test_delong_variance_in_closed_form():
    """For exponential scores: Hanley and McNeil's Q1 and Q2 are exact."""
    g = np.random.default_rng(0)
    n = m = 4000
    a, b = g.exponential(1, n), g.exponential(3, m)
    areas, cov = delong(torch.tensor(a)[None], torch.tensor(b)[None])
    area = 3 / 4
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    var = (q1 - area**2) / m + (q2 - area**2) / n
    assert abs(areas[0] - area) < 0.02
    assert abs(math.sqrt(cov[0, 0] / var) - 1) < 0.05


def test_delong_is_the_bootstrap():
    a, b = rand(60), rand(50, seed=1) + 1
    g = torch.Generator().manual_seed(2)
    again = auroc(
        a[torch.randint(60, (4000, 60), generator=g)],
        b[torch.randint(50, (4000, 50), generator=g)],
    )
    se = evaluate(a, b).interval().se
    assert abs(again.std() / se - 1) < 0.06


def test_intervals_cover():
    truth = scipy.stats.norm.cdf(1 / 2**0.5)
    hits = [
        truth in evaluate(
            rand(50, seed=s), rand(40, seed=10**6 + s) + 1
        ).interval()
        for s in range(400)
    ]
    assert 0.92 < np.mean(hits) < 0.98


def test_perfect_order_leaves_room():
    i = evaluate(torch.arange(20.0), torch.arange(30.0, 60)).interval()
    assert i.estimate == 1 and abs(i.lo - 0.025 ** (1 / 20)) < 1e-12
    j = evaluate(torch.arange(30.0, 60), torch.arange(20.0)).interval()
    assert j.estimate == 0 and abs(j.hi - (1 - i.lo)) < 1e-12
    k = evaluate(torch.zeros(9), torch.zeros(9)).interval()
    assert (k.estimate, k.lo, k.hi, k.p) == (0.5, 0.5, 0.5, 1.0)
    one = evaluate(torch.zeros(1), torch.ones(9)).interval()
    assert one.lo == 0 and one.hi == 1


def test_pairing_makes_differences_sharp():
    a, b = rand(200), rand(200, seed=1) + 1
    c, d = a + 0.05 * rand(200, seed=2), b + 0.05 * rand(200, seed=3)
    gap = auroc_difference((a, b), (c, d))
    assert 0 in gap and gap.half_width < evaluate(a, b).interval().half_width
    same = auroc_difference((a, b), (2 * a, 2 * b))
    assert same.estimate == 0 and same.p == 1
    worse = auroc_difference((a, b), (a, b - 0.5))
    assert worse.lo > 0 and worse.p < 1e-6
    swapped = auroc_difference((a, b - 0.5), (a, b))
    assert np.isclose(swapped.lo, -worse.hi)


def test_null_difference_is_rejected_at_the_rate_it_says():
    rejected = []
    for s in range(300):
        base, far = rand(60, seed=s), rand(50, seed=s + 7000) + 1
        one, two = (
            (base + rand(60, seed=s + k), far + rand(50, seed=s + k + 500))
            for k in (10**5, 2 * 10**5)
        )
        rejected.append(auroc_difference(one, two).p < 0.05)
    assert 0.02 < np.mean(rejected) < 0.09


def test_members_alone_are_students_t():
    a, b = rand(5, 30), rand(5, 20, seed=1) + 0.5
    report = evaluate(a, b)
    x = report.auroc.numpy()
    lo, hi = scipy.stats.t.interval(0.9, 4, x.mean(), scipy.stats.sem(x))
    i = report.interval(level=0.9, samples=False)
    assert np.allclose((i.lo, i.hi), (lo, hi))
    other = evaluate(a + rand(5, 30, seed=3), b + rand(5, 20, seed=4))
    gap = report.minus(other, samples=False)
    d = (report.auroc - other.auroc).numpy()
    assert np.isclose(gap.se, scipy.stats.sem(d)) and gap.n == 5
    alone = evaluate(a[0], b[0])
    against = report.minus(alone, "fpr95", n_boot=50)
    assert np.isclose(
        against.estimate, (report.fpr95 - alone.fpr95).mean()
    )


def test_members_and_samples_add_up():
    a, b = rand(4, 30), rand(4, 25, seed=1) + 0.5
    a, b = a + 2 * rand(30, seed=2), b + 2 * rand(25, seed=3)
    one, other = evaluate(a, b), evaluate(a.round(), b.round())
    heard = pairwise(a, b) - pairwise(a.round(), b.round())
    cov = np.cov(heard.mean(1)) / 25 + np.cov(heard.mean(2)) / 30
    d = heard.mean((1, 2)).numpy()
    shared = (cov.sum() - np.trace(cov)) / 12
    gap = one.minus(other)
    assert np.isclose(gap.estimate, d.mean())
    assert np.isclose(
        gap.se**2, d.var(ddof=1) / 4 + max(shared, 0), atol=1e-12
    )
    assert one.interval().se > one.interval(samples=False).se
    assert np.isclose(
        auroc_difference((a, b), (a.round(), b.round())).lo, gap.lo
    )
    # members that are one: as sure as the samples allow
    twins = evaluate(a[:1].expand(4, 30), b[:1].expand(4, 25))
    single = evaluate(a[0], b[0]).interval()
    assert np.isclose(twins.interval().se, single.se)
    assert twins.interval(samples=False).se == 0
    # resampling says what DeLong says
    by_draws = DetectorReport._covariance([one], "aupr_out", 300, 0)
    assert by_draws.shape == (4, 4) and (by_draws.diagonal() > 0).all()


def test_members_and_samples_cover():
    """Members share their samples; the truth is one half."""
    hits = {True: [], False: []}
    for s in range(200):
        a = rand(6, 40, seed=s) + rand(40, seed=s + 10**5)
        b = rand(6, 30, seed=s + 10**6) + rand(30, seed=s + 10**7)
        report = evaluate(a, b)
        for samples in hits:
            hits[samples].append(0.5 in report.interval(samples=samples))
    assert np.mean(hits[True]) > 0.91
    assert np.mean(hits[False]) < 0.8


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_weights_are_repeats(metric):
    """A metric on counts is the metric on repeated samples."""
    g = np.random.default_rng(1)
    for vice in (False, True):
        a, b = rand(12), rand(9, seed=1) + 0.3
        if vice:
            a, b = a.round(), b.round()
        w, v = (torch.tensor(g.integers(0, 3, (6, n))) for n in (12, 9))
        w[:, 0] = v[:, 0] = 1
        found = METRICS[metric](a, b, w.double(), v.double())
        for k in range(6):
            again = evaluate(
                a.repeat_interleave(w[k]), b.repeat_interleave(v[k])
            )[metric]
            assert abs(found[k] - again[0]) < 1e-12


@pytest.mark.parametrize("metric", ["aupr_out", "aupr_in", "fpr95"])
def test_bootstrap_intervals(metric):
    a, b = rand(80), rand(70, seed=1) + 1
    report = evaluate(a, b)
    i = report.interval(metric, n_boot=400)
    assert i.lo < i.estimate < i.hi
    assert np.isclose(i.estimate, report[metric][0])
    assert i == report.interval(metric, n_boot=400)
    same = report.minus(report, metric, n_boot=50)
    assert same.lo == same.hi == 0


# scores from logits


@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6),
    st.sampled_from([0.0, 1.0, 40.0]),
)
@settings(max_examples=60, deadline=None)
def test_logit_scores(seed, n, c, scale):
    z = scale * rand(3, n, c, seed=seed)
    p = scipy.special.softmax(z.numpy(), axis=-1)
    assert np.allclose(max_softmax(z), 1 - p.max(-1), atol=1e-12)
    assert np.allclose(entropy(z), scipy.stats.entropy(p, axis=-1))
    assert np.allclose(energy(z), -scipy.special.logsumexp(z, axis=-1))
    assert np.allclose(max_logit(z), -z.numpy().max(-1))
    top = np.sort(z.numpy(), -1)
    assert np.allclose(margin(z), top[..., -2] - top[..., -1])
    information = mutual_information(z)
    assert (information >= 0).all()
    assert (information <= math.log(min(3, c)) + 1e-9).all()
    assert (ensemble_entropy(z) >= entropy(z).mean(0) - 1e-9).all()
    twins = z[:1].expand(4, n, c)
    assert (mutual_information(twins) < 1e-9).all()
    # classes have no order
    assert torch.allclose(entropy(z.flip(-1)), entropy(z))
    assert torch.allclose(energy(z, 1e-3), max_logit(z), atol=0.01)


def test_confident_answers_are_not_rounded_to_ties():
    z = torch.zeros(50, 3)
    z[:, 0] = torch.linspace(20, 80, 50)
    assert (max_softmax(z).diff() < 0).all()


# scores from features


def test_gaussians_against_scikit_learn():
    for seed in range(20):
        x = rand(40, 3, seed=seed) @ rand(3, 3, seed=seed + 1)
        fit = fit_gaussians(x, torch.zeros(40).long(), ridge=0)
        law = covariance.EmpiricalCovariance().fit(x)
        new = rand(6, 3, seed=seed + 2)
        assert np.allclose(fit.mahalanobis(new), law.mahalanobis(new))
        density = scipy.stats.multivariate_normal(
            law.location_, law.covariance_
        )
        assert np.allclose(fit.surprise(new), -density.logpdf(new))
        assert fit.relative_mahalanobis(new).abs().max() < 1e-9


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_gaussians_invariances(seed, shared):
    x, y = rand(30, 3, seed=seed), torch.arange(30) % 3
    x[y == 1] += 3
    new = rand(5, 3, seed=seed + 1)
    A, b = rand(3, 3, seed=seed + 2) + 3 * torch.eye(3), rand(3, seed=seed)
    fit = fit_gaussians(x, y, shared=shared, ridge=0)
    moved = fit_gaussians(x @ A + b, y, shared=shared, ridge=0)
    for name in ("mahalanobis", "relative_mahalanobis"):
        u, v = (getattr(*t) for t in ((fit, name), (moved, name)))
        assert torch.allclose(u(new), v(new @ A + b), rtol=1e-6, atol=1e-6)
    # a density changes by the volume
    volume = torch.linalg.det(A).abs().log()
    assert torch.allclose(
        fit.surprise(new) + volume, moved.surprise(new @ A + b), rtol=1e-6
    )
    # names of classes do not matter, nor does their order
    renamed = fit_gaussians(x, 7 - 2 * y, shared=shared, ridge=0)
    assert torch.allclose(fit.surprise(new), renamed.surprise(new))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    again = fit_gaussians(x[order], y[order], shared=shared, ridge=0)
    assert torch.allclose(fit.mahalanobis(new), again.mahalanobis(new))


def test_members_of_feature_scores_are_a_loop():
    x, new, y = rand(3, 20, 4), rand(3, 6, 4, seed=1), torch.arange(20) % 2
    for shared, what in itertools.product(
        (True, False), ("mahalanobis", "relative_mahalanobis", "surprise")
    ):
        many = getattr(fit_gaussians(x, y, shared=shared), what)(new)
        for i in range(3):
            one = fit_gaussians(x[i], y, shared=shared)
            assert torch.allclose(many[i], getattr(one, what)(new[i]))
    for f in (knn_distance, kernel_surprise):
        assert torch.allclose(
            f(x, new), torch.stack([f(x[i], new[i]) for i in range(3)])
        )
    assert torch.allclose(feature_norm(x)[1], -x[1].norm(dim=-1))


def test_a_dead_feature_costs_what_the_ridge_says():
    x = rand(50, 3)
    x[:, 2] = 0
    new = torch.tensor([[0.0, 0, 1]])
    y = torch.zeros(50).long()
    for ridge in (1e-2, 1e-4):
        far = fit_gaussians(x, y, ridge=ridge).mahalanobis(new)
        level = (x - x.mean(0)).square().mean()
        assert abs(far * ridge * level - 1) < 0.2
    with pytest.raises(ValueError, match="singular"):
        fit_gaussians(x, y, ridge=0)


def test_neighbours_and_kernels_against_scikit_learn():
    for k in (1, 4, 20):
        x, new = rand(20, 3, seed=k), rand(7, 3, seed=k + 1)
        tree = neighbors.NearestNeighbors(n_neighbors=k).fit(x)
        expected = tree.kneighbors(new)[0][:, -1]
        assert np.allclose(knn_distance(x, new, k, unit=False), expected)
        kde = neighbors.KernelDensity(bandwidth=k / 3).fit(x)
        assert np.allclose(
            kernel_surprise(x, new, k / 3), -kde.score_samples(new)
        )
    assert torch.allclose(knn_distance(x, new, 3), knn_distance(5 * x, new, 3))
    assert torch.isfinite(knn_distance(0 * x, 0 * new, 3)).all()


def test_pieces_do_not_matter(monkeypatch):
    from reappraisal.measure import ood

    x, new = rand(2, 30, 3), rand(2, 50, 3, seed=1)
    whole = kernel_surprise(x, new), knn_distance(x, new)

    before = ood._by_pieces
    monkeypatch.setattr(
        ood, "_by_pieces",
        lambda f, a, b: torch.cat(
            [before(f, a, part) for part in b.split(7, -2)], -1
        ),
    )
    assert torch.allclose(whole[0], kernel_surprise(x, new))
    assert torch.allclose(whole[1], knn_distance(x, new))


# networks


def ensemble():
    return Ensemble.of([models.mlp([6, 5, 3], seed=s) for s in range(3)])


@pytest.mark.parametrize("training", [False, True])
def test_a_module_is_left_untouched(training):
    net = Everything().train(training)
    net.head(torch.randn(2, 8)).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grad, hooks = net.head.weight.grad.clone(), len(net.head._forward_pre_hooks)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), 16, shuffle=True
    )
    report = ood_report(net, loader, {"far": FAR}, train=loader)
    assert net.training == training and net.drop.training == training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, grad)
    assert len(net.head._forward_pre_hooks) == hooks
    assert len(report.detectors) == len(DETECTORS) - 2
    assert report["pixel statistics", "far"].auroc[0] > 0.9


def test_evidence_by_hand():
    net = Everything().eval()
    seen = read_evidence(net, (X, Y), batch_size=7)
    with torch.no_grad():
        assert torch.allclose(seen.logits, net(X), atol=1e-6)
        logits = net.head(seen.features)
    assert torch.allclose(logits, seen.logits, atol=1e-6)
    assert torch.allclose(seen.statistics[:, 0], X.mean(1), atol=1e-6)
    assert torch.equal(seen.y, Y)
    inner = read_evidence(net, X, head="norm")
    assert torch.allclose(inner.features, net.first(X), atol=1e-6)
    tokens = models.transformer(5, 3, 4, width=8, heads=2, depth=1)
    assert read_evidence(tokens, Y.view(15, 4)).features.shape == (15, 8)
    assert read_evidence(models.mlp([6, 3]).bfloat16(), X).y is None


def test_an_ensemble_is_its_members():
    nets = ensemble()
    report = ood_report(nets, X, {"far": FAR}, train=(X, Y))
    alone = [
        ood_report(nets.member(i), X, {"far": FAR}, train=(X, Y))
        for i in range(3)
    ]
    assert set(report.detectors) == set(DETECTORS)
    for name in alone[0].detectors:
        found = report[name, "far"].auroc
        single = [r[name, "far"].auroc[0] for r in alone]
        if name == "pixel statistics":
            assert len(found) == 1
        assert torch.allclose(found, torch.stack(single)[: len(found)])
    assert report["mutual information", "far"].scores_in.shape == (1, 60)


def test_planted_and_null():
    nets = ensemble()
    other = torch.randn(4000, 6, generator=torch.Generator().manual_seed(5))
    report = ood_report(
        nets, torch.randn(4000, 6, generator=G), {"same": other},
        train=(X, Y),
    )
    for name in report.detectors:
        assert abs(report[name, "same"].auroc.mean() - 0.5) < 0.04, name
    # content alone: the same entries in another order
    order = X.flip(1)
    statistics = pixel_statistics(read_evidence(nets, X))
    seen = [statistics(read_evidence(nets, v)) for v in (X, order)]
    assert auroc(*seen) == 0.5 or abs(auroc(*seen) - 0.5) < 1e-3


def test_labels_of_unknown_classes_do_not_matter():
    nets = ensemble()
    a = ood_report(nets, (X, Y), {"far": (FAR, torch.full((50,), 99))})
    b = ood_report(nets, X, {"far": FAR})
    assert torch.equal(a["energy", "far"].auroc, b["energy", "far"].auroc)


def test_detectors_of_ones_own():
    def first_pixel(train):
        assert train is None
        return lambda seen: seen.features[..., 0]

    report = ood_report(ensemble(), X, {"far": FAR}, {"mine": first_pixel})
    assert report.detectors == ["mine"] and report.datasets == ["far"]


def test_beyond_and_frame_and_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = ood_report(
        ensemble(), X, {"far": FAR, "near": X + 0.1},
        ["energy", "pixel statistics"], train=(X, Y),
    )
    gap = report.beyond()["energy"]["far"]
    control = report["pixel statistics", "far"].auroc
    expected = (report["energy", "far"].auroc - control).mean()
    assert np.isclose(gap.estimate, expected)
    frame = report.to_frame()
    assert len(frame) == 2 * 3 + 2 * 1
    assert set(frame.data) == {"far", "near"}
    assert len(report.plot()) == 2
    report["energy", "far"].plot()
    plt.close("all")
    assert "energy" in repr(report) and "one network" not in repr(
        report["energy", "far"]
    )


NET = models.mlp([6, 4, 3])


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: auroc([], [1.0]), "scores_in: got"),
        (lambda: auroc([[[1.0]]], [[[1.0]]]), "scores_in: got"),
        (lambda: auroc([1.0], [torch.nan]), "scores_out: 1 of 1 are NaN"),
        (lambda: auroc([[1.0], [2.0]], [1.0]), "the same members"),
        (lambda: aupr([1.0], [2.0], "yes"), "positive: got 'yes'"),
        (lambda: aupr([1.0], [2.0], prevalence=0), "prevalence: got 0"),
        (lambda: fpr([1.0], [2.0], 1.5), "tpr: got 1.5"),
        (lambda: delong([1.0], [2.0]), r"\[K, N\]"),
        (
            lambda: auroc_difference(([1.0], [2.0]), ([1.0, 2], [2.0])),
            "the same samples",
        ),
        (lambda: evaluate([1.0], [2.0])["f1"], "metric: got 'f1'"),
        (lambda: evaluate([1.0], [2.0]).interval("f1"), "metric: got 'f1'"),
        (lambda: evaluate([1.0], [2.0]).interval(level=2), "level: got 2"),
        (
            lambda: evaluate([[1.0]] * 3, [[2.0]] * 3).minus(
                evaluate([[1.0]] * 2, [[2.0]] * 2)
            ),
            "other: 2 members",
        ),
        (lambda: max_softmax(torch.tensor([[1.0, torch.nan]])), "not finite"),
        (lambda: entropy(torch.ones(3, 1)), "one column"),
        (lambda: energy(torch.ones(3, 2), -1), "temperature: got -1"),
        (lambda: mutual_information(torch.ones(3, 2)), "members"),
        (lambda: fit_gaussians(X, Y[:3]), "y: got"),
        (lambda: fit_gaussians(X, Y.float()), "y: got"),
        (lambda: fit_gaussians(X, Y, ridge=-1), "ridge: got -1"),
        (lambda: fit_gaussians(X * torch.nan, Y), "not finite"),
        (lambda: fit_gaussians(torch.ones(3, 2), [0, 1, 1]), "none varies"),
        (
            lambda: fit_gaussians(X, Y).whole.relative_mahalanobis(X),
            "one Gaussian",
        ),
        (lambda: fit_gaussians(X, Y).mahalanobis(X[:, :2]), "width"),
        (lambda: knn_distance(X, X, 61), "k: got 61"),
        (lambda: knn_distance(X, X, 0), "k: got 0"),
        (lambda: kernel_surprise(X, X, 0), "bandwidth: got 0"),
        (lambda: kernel_surprise(0 * X, X), "give a bandwidth"),
        (lambda: feature_norm(X[0]), "real features"),
        (lambda: pixel_statistics(None), "train: missing"),
        (lambda: read_evidence(3, X), "model: got int"),
        (lambda: read_evidence(nn.ReLU(), X), "head: the model has no"),
        (lambda: read_evidence(NET, X, head="fc"), "head: no layer 'fc'"),
        (lambda: read_evidence(NET, X[:0]), "data: empty"),
        (lambda: ood_report(NET, X, {}), "data_out: got dict"),
        (lambda: ood_report(NET, X, {"a": X}, []), "scores: none"),
        (lambda: ood_report(NET, X, {"a": X}, "zeal"), "scores: got"),
        (
            lambda: ood_report(NET, X, {"a": X}, "Mahalanobis", train=X),
            "needs labelled",
        ),
        (
            lambda: ood_report(NET, X, {"a": X}, "mutual information"),
            "members",
        ),
        (lambda: ood_report(NET, X, {"a": X})["a", "b"], "key: got"),
        (lambda: ood_report(NET, X, {"a": X}).beyond("x"), "key: got"),
    ],
)
def test_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_broken_weights_are_refused():
    net = models.mlp([6, 4, 3])
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ood_report(net, X, {"far": FAR})
