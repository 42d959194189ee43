"""Entropies and information against closed forms, scipy and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import Ensemble, untrained
from reappraisal.lab.models import mlp, resnet, transformer
from reappraisal.measure.information import (
    Joint,
    binned_information,
    channel_bounds,
    channel_information,
    contingency,
    count_entropy,
    count_information,
    donsker_varadhan,
    ensemble_uncertainty,
    entropy,
    gaussian_entropy,
    gaussian_information,
    infonce,
    information_plane,
    knn_entropy,
    ksg_information,
    label_information,
    nwj,
    predictive_uncertainty,
    predictive_variance,
    symbols,
)

METHODS = "plugin", "miller_madow", "jackknife", "grassberger"


def rng(*key):
    return np.random.default_rng([77, *key])


def joint_of(seed, shape):
    p = rng(seed).dirichlet(np.full(math.prod(shape), 0.5))
    return p.reshape(shape)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_identities_of_a_joint(seed):
    j = Joint(joint_of(seed, (2, 3, 2, 2)), "WXYZ")

    def near(a, b):
        return abs(a - b) < 1e-12

    # the chain rule, for entropy and for information
    assert near(
        j.entropy("XYZ"),
        j.entropy("X") + j.entropy("Y", "X") + j.entropy("Z", "XY"),
    )
    assert near(
        j.information("WX", "Z"),
        j.information("X", "Z") + j.information("W", "Z", given="X"),
    )
    assert near(j.information("X", "Y"), j.information("Y", "X"))
    assert near(j.information("X", "X"), j.entropy("X"))
    assert near(j.information("X", "Y", given="XY"), 0)
    pairs = itertools.combinations("WXYZ", 2)
    assert all(j.information(*p, given="") > -1e-12 for p in pairs)
    total = sum(
        j.information(name, "WXYZ"[:k]) for k, name in enumerate("WXYZ") if k
    )
    assert near(j.total_correlation(), total)
    # interaction of four, by its recursion through a fourth variable
    three = Joint(j.p.sum(-1), "WXY").interaction()
    q = j.p.sum((0, 1, 2))
    given_z = sum(
        q[z] * Joint(j.p[..., z] / q[z], "WXY").interaction()
        for z in range(2)
        if q[z] > 0
    )
    assert near(j.interaction(), three - given_z)


def test_joint_of_many_tables():
    p = np.stack([joint_of(s, (2, 3, 2)) for s in range(5)])
    many = Joint(p, "XYZ")
    for k in range(5):
        one = Joint(p[k], "XYZ").quantities()
        for name, value in many.quantities().items():
            assert abs(value[k] - one[name]) < 1e-12
    assert many.to_frame().shape == (5, 15)
    assert "5 tables" in repr(many) and "Y of 3" in repr(many)
    words = Joint(p, ["cause", "effect", "noise"])
    assert torch.equal(
        words.information(["cause"], ["effect"]), many.information("X", "Y")
    )


def test_published_constants():
    # binary symmetric channel, 1/2 bit at an error rate of about 0.11
    e = 0.11002786
    p = np.array([[1 - e, e], [e, 1 - e]]) / 2
    bits = Joint(p, "XY").information("X", "Y") / math.log(2)
    assert abs(bits - 0.5) < 1e-6
    # first values of the sequence that replaces the logarithm
    g1 = -np.euler_gamma - math.log(2)
    assert abs(count_entropy([1], "grassberger") + g1) < 1e-12
    two = math.log(2) - (2 + g1)
    assert abs(count_entropy([2], "grassberger") - two) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_counts(method, seed):
    c = rng(seed).integers(0, 9, (3, 4))
    c[0, 0] += 1
    some = c[c.sum(1) > 0]
    flat = count_entropy(c.ravel(), method)
    # order and values that do not occur mean nothing
    shuffled = rng(seed, 1).permutation(c.ravel())
    assert abs(count_entropy(shuffled, method) - flat) < 1e-9
    padded = np.append(c.ravel(), [0, 0])
    assert abs(count_entropy(padded, method) - flat) < 1e-12
    rows = [count_entropy(row, method) for row in some]
    assert torch.allclose(count_entropy(some, method), torch.stack(rows))
    assert abs(
        count_information(c, method) - count_information(c.T, method)
    ) < 1e-9
    # the more samples, the less correction
    many = count_entropy(c.ravel() * 10**6, method)
    assert abs(many - scipy.stats.entropy(c.ravel())) < 1e-4


def test_bias_is_what_it_is_said_to_be():
    g = rng(1)
    seen = contingency(g.integers(0, 30, (400, 150)))
    off = {m: (count_entropy(seen, m) - math.log(30)).mean() for m in METHODS}
    assert abs(off["plugin"] + 29 / 300) < 0.01
    for m in METHODS[1:]:
        assert abs(off[m]) < 0.015
    x, y = g.integers(0, 5, (2, 400, 200))
    found = count_information(contingency(x, y)).mean()
    assert abs(found - 16 / 400) < 0.005
    better = count_information(contingency(x, y), "miller_madow").mean()
    assert abs(better) < 0.003


def test_contingency_of_members():
    a, b = rng(2).integers(0, 4, (2, 6, 50))
    table = contingency(a, b)
    for k in range(6):
        by_numpy = np.histogram2d(a[k], b[k], bins=(range(5), range(5)))[0]
        assert np.array_equal(table[k, :4, :4], by_numpy)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_symbols_are_bins(seed):
    t = torch.tensor(rng(seed).normal(size=(3, 20, 2)))
    found = symbols(t, 0.7)
    for k in range(3):
        bins = [tuple(r) for r in np.floor(t[k].numpy() / 0.7)]
        same = [[a == b for b in bins] for a in bins]
        assert (found[k][:, None] == found[k]).tolist() == same
        assert found[k].max() + 1 == len(set(bins))
    assert torch.equal(symbols(-0.0 * t, 1.0), 0 * found)
    # a finer bin never tells less, with edges kept
    y = rng(seed, 1).integers(0, 2, 20)
    coarse = binned_information(t, y, 1.0)
    assert (binned_information(t, y, 0.5) >= coarse - 1e-12).all()


def test_plane_of_modules_and_ensembles():
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    nets = untrained(mlp([6, 5, 4, 3], residual=True), range(4))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 7, shuffle=True
    )
    many = information_plane(nets, loader, width=0.25)
    for k in range(4):
        one = information_plane(nets.member(k), (x, y), width=0.25)
        assert torch.allclose(one.of_input, many.of_input[k])
        assert torch.allclose(one.of_label, many.of_label[k])
    assert many.of_input.max() <= many.ceiling + 1e-12
    assert (many.of_label <= many.of_input + 1e-12).all()
    assert many.to_frame().shape == (4 * len(many.layers), 4)
    assert "ceiling" in repr(many)
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    assert many.plot(ax) is ax
    plt.close(fig)


@pytest.mark.parametrize(
    "net, x",
    [
        (
            nn.Sequential(
                nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(),
                nn.Dropout(0.5), nn.Linear(5, 3),
            ),
            torch.randn(12, 4),
        ),
        (resnet((1, 4, 4), classes=3), torch.randn(12, 1, 6, 6)),
        (mlp([4, 6, 3], norm="layer"), torch.randn(12, 4)),
        (transformer(7, 3, 5, 8, 2, 1), torch.randint(7, (12, 5))),
    ],
)
def test_networks_are_left_as_they_were(net, x):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    found = information_plane(net, (x, torch.arange(12) % 3), width=0.5)
    assert net.training and torch.equal(torch.get_rng_state(), state)
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    assert torch.isfinite(found.of_input).all()
    pair = Ensemble.of([net, net])
    assert ensemble_uncertainty(pair, x).epistemic.max() < 1e-6


def test_gaussians():
    a = rng(3).normal(size=(5, 4, 6))
    cov = a @ a.transpose(0, 2, 1)
    for k in range(5):
        want = scipy.stats.multivariate_normal(cov=cov[k]).entropy()
        assert abs(gaussian_entropy(cov)[k] - want) < 1e-9
    found = gaussian_information(cov, (1, 3))
    # through canonical correlations
    for k in range(5):
        c = cov[k]
        r2 = c[0, 1:] @ np.linalg.solve(c[1:, 1:], c[1:, 0]) / c[0, 0]
        assert abs(found[k] + math.log(1 - r2) / 2) < 1e-9
    # units do not matter to information
    scale = np.diag([1, 10, 0.1, 3])
    assert torch.allclose(
        gaussian_information(scale @ cov @ scale, (1, 3)), found
    )
    copied = np.ones((2, 2))
    assert gaussian_information(copied, (1, 1)) == math.inf
    assert gaussian_entropy(copied) == -math.inf


def test_neighbours_find_planted_information():
    g = rng(4)
    x, e = g.normal(size=(2, 6, 1500, 1))
    for rho in (0.0, 0.5, 0.9):
        y = rho * x + (1 - rho**2) ** 0.5 * e
        truth = -math.log(1 - rho**2) / 2
        for variant in (1, 2):
            found = ksg_information(x, y, variant=variant)
            assert abs(found.mean() - truth) < 0.03
    h = knn_entropy(g.random((6, 1000, 2)))
    assert abs(h.mean()) < 0.08  # high at the edges of the square
    h = knn_entropy(g.exponential(size=(6, 1500, 1)))
    assert abs(h.mean() - 1) < 0.05
    # three variables with the same parent: total correlation
    z = np.concatenate([x, x, x], -1) + 0.5 * g.normal(size=(6, 1500, 3))
    cov = 0.25 * np.eye(3) + 1
    truth = gaussian_information(cov, (1, 1, 1))
    found = ksg_information(*(z[..., k, None] for k in range(3)))
    assert abs(found.mean() - truth) < 0.06


def test_scipy_estimates_the_same_entropy():
    x = rng(5).normal(size=4000)
    theirs = scipy.stats.differential_entropy(x, method="vasicek")
    assert abs(knn_entropy(x) - theirs) < 0.06


@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_what_neighbours_see(seed, k):
    g = rng(seed)
    x, y = g.normal(size=(2, 30, 2))
    found = ksg_information(x, y, k=k)
    order = g.permutation(30)
    assert abs(ksg_information(x[order], y[order], k=k) - found) < 1e-9
    assert abs(ksg_information(y, x, k=k) - found) < 1e-9
    # one unit for all, and where zero is, do not matter
    assert abs(ksg_information(8 * x + 1, 8 * y, k=k) - found) < 1e-9
    h = knn_entropy(x, k=k)
    assert abs(knn_entropy(3 * x, k=k) - h - 2 * math.log(3)) < 1e-9
    turn = np.linalg.qr(g.normal(size=(2, 2)))[0]
    assert abs(knn_entropy(x @ turn, k=k) - h) < 1e-9
    both = ksg_information(np.stack([x, y]), np.stack([y, y[order]]), k=k)
    assert abs(both[0] - found) < 1e-12


def test_labels_and_ties():
    g = rng(6)
    y = g.integers(0, 3, 900)
    far = y[:, None] * 50.0 + g.normal(size=(900, 2))
    assert abs(label_information(far, y) - math.log(3)) < 0.02
    assert abs(label_information(g.normal(size=(900, 2)), y)) < 0.04
    assert knn_entropy(np.zeros((10, 2))) == -math.inf
    lone = label_information([[0.0], [1.0], [2.0]], [0, 0, 1], k=2)
    assert torch.isfinite(lone)
    with pytest.raises(ValueError, match="y: no class has two"):
        label_information([[0.0], [1.0]], [0, 1], k=1)


def test_bounds_stay_below_and_pass_gradients():
    g = torch.Generator().manual_seed(0)
    for rho in (0.0, 0.7):
        x, e = torch.randn(2, 300, 128, generator=g, dtype=torch.float64)
        y = rho * x + (1 - rho**2) ** 0.5 * e
        gap = (y[:, None] - rho * x[..., None]) / (1 - rho**2) ** 0.5
        f = (y[:, None] ** 2 - gap**2 - math.log(1 - rho**2)) / 2
        truth = -math.log(1 - rho**2) / 2
        for bound in (infonce, nwj, donsker_varadhan):
            assert abs(bound(f).mean() - truth) < 0.02
            # a worse critic, a lower bound
            assert bound(f / 2).mean() <= bound(f).mean() + 1e-6
    f = torch.randn(8, 8, generator=g, requires_grad=True)
    for bound in (infonce, nwj, donsker_varadhan):
        (grad,) = torch.autograd.grad(bound(f), f)
        assert torch.isfinite(grad).all() and grad.diagonal().min() > 0
    with torch.no_grad():
        assert infonce(50 * torch.eye(16)) <= math.log(16) + 1e-6
        assert abs(nwj(torch.zeros(5, 5))) < 1e-6
        # rows may be shifted for InfoNCE only, all scores for two of three
        shift = torch.arange(8.0)[:, None]
        assert abs(infonce(f + shift) - infonce(f)) < 1e-5
        assert abs(donsker_varadhan(f + 3) - donsker_varadhan(f)) < 1e-5
        assert abs(nwj(f + 3) - nwj(f)) > 0.1


def test_channels():
    g = rng(8)
    # two codes far apart carry a bit, one code nothing
    bit = channel_information([[0.0], [100.0]], 1.0)
    assert abs(bit.value - math.log(2)) < 1e-9 and bit.error < 1e-9
    assert abs(channel_information([[3.0]], 1.0).value) < 1e-12
    codes = g.normal(size=(3, 200, 4))
    y = (codes[0, :, 0] > 0).astype(int)
    found = channel_information(codes, 0.5, y, n_mc=800)
    whole = channel_information(codes, 0.5, n_mc=800)
    within = channel_bounds(codes, 0.5)
    assert (found.value <= math.log(2) + 1e-9).all()
    # codes of the first member know the labels, the others do not
    assert found.value[0] > 0.3 > 0.2 > found.value[1:].max()
    assert (within.lower < whole.value).all()
    assert (whole.value < within.upper).all()
    # what counts is the distance in units of the noise
    scaled = channel_information(7 * codes, 3.5, n_mc=800)
    assert torch.allclose(scaled.value, whole.value)
    own = channel_information(
        codes * np.array([1, 2, 3])[:, None, None],
        torch.tensor([0.5, 1.0, 1.5]), n_mc=800,
    )
    assert torch.allclose(own.value, whole.value)
    again = channel_information(codes, 0.5, n_mc=800)
    assert torch.equal(again.value, whole.value)
    other = channel_information(codes, 0.5, n_mc=800, seed=1)
    assert not torch.equal(other.value, whole.value)
    assert "nats, mean of 3" in repr(whole) and "to" in repr(within)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_uncertainty(seed):
    g = rng(seed)
    p = torch.tensor(g.dirichlet(np.ones(4), (5, 6)))
    u = predictive_uncertainty(p)
    assert torch.allclose(u.total, u.aleatoric + u.epistemic)
    assert u.epistemic.min() >= 0
    assert u.epistemic.max() <= math.log(5) + 1e-12
    same = predictive_uncertainty(p[g.permutation(5)][..., g.permutation(4)])
    assert torch.allclose(same.epistemic, u.epistemic)
    twice = predictive_uncertainty(torch.cat([p, p]))
    assert torch.allclose(twice.total, u.total)
    logit = p.log().float()
    soft = predictive_uncertainty(logit.softmax(-1))
    assert torch.allclose(soft.epistemic, u.epistemic, atol=1e-5)
    one = predictive_uncertainty(p[:1])
    assert one.epistemic.abs().max() < 1e-12
    m, v = torch.tensor(g.normal(size=(2, 5, 6, 2)))
    parts = predictive_variance(m, v.square())
    draws = m + v.abs() * torch.tensor(g.normal(size=(4000, 5, 6, 2)))
    by_draws = draws.reshape(-1, 6, 2).var(0)
    assert torch.allclose(parts.total, by_draws, rtol=0.1)
    assert "squared units" in repr(parts)
    assert u.to_frame().shape == (6, 3)


GOOD = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: entropy([1.2, -0.2]), "p: smallest is -0.2"),
        (lambda: entropy([math.nan, 1]), "p: not finite"),
        (lambda: entropy(1.0), "p: got shape"),
        (lambda: Joint([1.0], ""), "names: got"),
        (lambda: Joint([[0.5, 0.5]], "XX"), "names: got"),
        (lambda: Joint([0.5, 0.5], "X").entropy("Y"), "no variable"),
        (lambda: contingency([0, 1], [0]), "labels: got shapes"),
        (lambda: contingency([0, -1]), "labels: not all whole"),
        (lambda: contingency([0, 10**9]), "without gaps"),
        (lambda: count_entropy([]), "counts: got shape"),
        (lambda: count_entropy([0, 0]), "counts: a row without"),
        (lambda: count_entropy([1, 2], "nsb"), "method: got 'nsb'"),
        (lambda: count_information([1, 2]), "counts: got shape"),
        (lambda: symbols(GOOD / 0, 1.0), "T: not finite"),
        (lambda: symbols(GOOD, -1.0), "width: got -1"),
        (lambda: binned_information(GOOD, [0], 1.0), "y: got shape"),
        (lambda: knn_entropy(GOOD[:1]), "X: got shape"),
        (lambda: knn_entropy(GOOD, 10), "k: got 10; 1 to 9"),
        (lambda: ksg_information(GOOD), "variables: got shapes"),
        (lambda: ksg_information(GOOD, GOOD, variant=3), "variant: got 3"),
        (lambda: label_information(GOOD, GOOD[:, 0]), "y: not all whole"),
        (lambda: gaussian_entropy(GOOD), "cov: of shape"),
        (lambda: gaussian_entropy([[1, 2], [0, 1]]), "cov: of shape"),
        (lambda: gaussian_information(np.eye(2), (2,)), "sizes: got"),
        (lambda: infonce(torch.ones(1, 1)), "scores: got shape"),
        (lambda: nwj(torch.full((2, 2), math.nan)), "scores: not finite"),
        (lambda: channel_information(GOOD, -1.0), "sigma: got -1"),
        (lambda: channel_information(GOOD, 1.0, n_mc=1), "n_mc: got 1"),
        (lambda: channel_bounds(GOOD / 0, 1.0), "codes: not finite"),
        (lambda: predictive_uncertainty(GOOD), "probs: "),
        (lambda: predictive_uncertainty([[0.5, 0.5]]), "members first"),
        (lambda: predictive_variance(GOOD, -GOOD**2), "variances: small"),
        (lambda: predictive_variance(GOOD, GOOD[:1]), "means, variances"),
        (lambda: ensemble_uncertainty(nn.Linear(2, 2), GOOD), "model: got"),
        (
            lambda: information_plane(nn.Linear(2, 2), GOOD, width=1.0),
            "data: has no labels",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
