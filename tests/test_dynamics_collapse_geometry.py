"""Minimisers, flows and collapse terms; verdicts on planted evidence."""

import numpy as np
import pytest
import torch

from reappraisal.dynamics import neural_collapse_geometry as d
from reappraisal.lab import data
from reappraisal.lab.models import mlp
from reappraisal.measure.collapse import nc_metrics
from reappraisal.protocol.claims import Claim


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_minimiser_beats_its_neighbours_and_balances(depth):
    counts, lw, lh = np.array([30, 9, 3]), 0.004, 0.002
    geo = d.imbalanced_minimiser(counts, lw, lh, depth)
    np.testing.assert_allclose(
        lw * geo.rows**2, counts * lh * geo.features**2)
    np.testing.assert_allclose(
        geo.product, geo.rows**depth * geo.features)

    def cost(rows, features):
        z = rows**depth * features
        return (counts / 42 * (1 - z) ** 2 + depth * lw * rows**2
                + counts * lh * features**2)

    best = cost(geo.rows, geo.features)
    for a in np.linspace(0, 2, 41):
        for b in np.linspace(0, 2, 41):
            assert (cost(a * np.ones(3), b * np.ones(3)) > best - 1e-9).all()


@pytest.mark.parametrize(("n", "alive"), [(2, False), (3, True)])
def test_threshold_counts_the_class_itself(n, alive):
    product = 2.5 / 102.5**2
    geo = d.imbalanced_minimiser([100, n], product**0.5, product**0.5)
    assert (geo.rows[1] > 0) == alive


def test_descent_lands_on_it_whatever_the_two_decays():
    counts = torch.tensor([[8, 3], [8, 3], [6, 5]])
    decay = torch.tensor([[0.02, 0.05], [0.05, 0.02], [0.02, 0.02]])
    run = d.descend(counts, decay, [1, 2, 3], dims=4, steps=800, lr=0.3,
                    momentum=0.9)
    for k in range(3):
        lh, lw = decay[k].tolist()
        geo = d.imbalanced_minimiser(counts[k], lw, lh)
        lengths = torch.linalg.vector_norm(run.weight[k], dim=-1)
        np.testing.assert_allclose(lengths, geo.rows, rtol=1e-5)
    each = d.descend(counts[:1], decay[:1], [1], dims=4, steps=800, lr=0.3,
                     momentum=0.9, each=True)
    assert each.features.shape == (1, 4, 11)
    within = each.features[0, :, :8].std(1)
    assert within.max() < 1e-6
    assert d.row_cosines(each.weight).abs().max() < 1e-6


def test_a_dead_start_stays_dead_in_depth():
    labels = torch.arange(2)[None]
    own = {"many": torch.tensor([[20.0, 1.0]]).double(),
           "Y": torch.nn.functional.one_hot(labels).mT.double(),
           "weight_decay": torch.tensor([0.003]).double(),
           "feature_decay": torch.tensor([0.003]).double()}
    at = {"G": torch.tensor([[[1.0, 0], [0, 0.01]]]).double(),
          "W1": torch.tensor([[[1.0, 0], [0, 0.01]]]).double(),
          "W2": torch.tensor([[[1.0, 0], [0, 0.01]]]).double()}
    at = {k: v.requires_grad_() for k, v in at.items()}
    d.linear_loss(at, own).sum().backward()
    assert at["W2"].grad[0, 1, 1] > 0  # shrinks
    assert d.imbalanced_minimiser([20, 1], 0.003, 0.003, 2).rows[1] > 0


Y4 = torch.arange(4).repeat_interleave(6)


def test_flow_falls_without_a_force_and_not_with_one():
    H0 = d.normal_features([1, 2, 3], Y4, 8)
    free = d.central_path_flow(H0, Y4, 0.0, 0.05, 0.05, 8.0, 80)
    assert (free.nc1.diff() < 0).all()
    torch.testing.assert_close(
        free.nc1[:, -1], nc_metrics(free.features, Y4).nc1)
    tied = d.central_path_flow(H0, Y4, 0.1, 0.05, 0.05, 20.0, 100)
    assert (tied.nc1.diff() > 1e-8).any()
    assert (tied.nc1[:, -1] < tied.nc1[:, 0]).all()
    held = d.central_path_flow(H0, Y4, 1e4, 0.05, 0.05, 1e-3, 100)
    torch.testing.assert_close(held.features, H0, atol=1e-3, rtol=0)


def test_wrong_labels_do_not_collapse():
    H0 = d.normal_features(range(40), Y4, 8)
    free = d.central_path_flow(H0, Y4, 0.0, 0.05, 0.05, 8.0, 60)
    g = torch.Generator().manual_seed(0)
    mixed = torch.stack([Y4[torch.randperm(24, generator=g)]
                         for _ in range(40)])
    fell = nc_metrics(free.features, mixed).nc1 < nc_metrics(H0, mixed).nc1
    assert 0.2 < fell.double().mean() < 0.8


def test_elasticities_by_differences_of_the_minimiser():
    case = d.tied_instances([5, 6], Y4, 8)
    case["beta"] = case["beta"] + 0.2
    got = d.tied_elasticities(**case)
    assert got.residual.max() < 1e-10
    target = torch.nn.functional.one_hot(Y4).double()
    lw, lh = case["weight_decay"], case["feature_decay"]
    unit = ((1 - (lh * lw).sqrt()) * (lw / lh).sqrt()).sqrt()[:, None, None]
    H0 = unit * (case["frame"][:, Y4] + case["noise"])

    def solved(feature, weight):
        H = H0
        for _ in range(400):
            W = d.ridge_head(H, target, lw * weight)
            tie, decay = (case["beta"][:, None, None],
                          (lh * feature)[:, None, None])
            gram = W.mT @ W + (decay + tie) * torch.eye(8).double()
            H = torch.linalg.solve(gram, (target @ W + tie * H0).mT).mT
        return nc_metrics(H, Y4).nc1

    torch.testing.assert_close(solved(1, 1), got.nc1, rtol=1e-6, atol=0)
    e = 1.01
    for name, up, down in (("feature", (e, 1), (1 / e, 1)),
                           ("weight", (1, e), (1, 1 / e))):
        slope = (solved(*up) / solved(*down)).log() / (2 * np.log(e))
        torch.testing.assert_close(slope, getattr(got, name), atol=1e-3,
                                   rtol=0)


def test_first_order_law_and_its_limits():
    for pull, want in ((1e-3, 3.0), (1.0, 1.5), (9.0, 0.3)):
        h, w = d.first_order_elasticities(1e-4, 1e-4, pull * 1e-4, 20, 4)
        assert h / w == pytest.approx(want, rel=2e-2)


def test_collapse_terms_pull_and_spread():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 60, 6, generator=g).requires_grad_()
    y = torch.randint(3, (2, 60), generator=g)
    penalty, means = d.NC1Penalty(0.5)(h, y, 3)
    want = [nc_metrics(h[k], y[k]) for k in range(2)]
    member = torch.stack([h[0][y[0] == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means[0], member)
    assert penalty.shape == (2,) and want[0].nc1 > 0
    h.data -= 0.5 * torch.autograd.grad(penalty.sum(), h)[0] * 60
    assert nc_metrics(h[0], y[0]).nc1 < want[0].nc1
    pair = torch.tensor([[0.0, 0], [1, 0], [0.9, 0.1], [-1, 0]])
    assert d.NC2Penalty()(pair) > 1
    running = d.NC1Penalty(0.9)
    running(h.detach(), y, 3)
    late = running(10 + h.detach(), y, 3)[1]
    torch.testing.assert_close(late[0], member + 1, atol=0.3, rtol=0)


def test_absent_classes_keep_their_running_mean():
    run = d.NC1Penalty(0.5)
    run(torch.ones(1, 2, 3), torch.tensor([[0, 1]]), 3)
    _, means = run(3 * torch.ones(1, 2, 3), torch.tensor([[0, 0]]), 3)
    assert means[0, :, 0].tolist() == [2.0, 1.0, 0.0]


def test_long_tail_sizes_and_parts():
    y = data.digits().y
    part = d.long_tail(y, 10, 3, head=50, valid=5)
    size = torch.bincount(y[part.train], minlength=10)[part.order]
    assert size[0] == 50 and size[-1] == 5
    assert (size.diff() <= 0).all()
    assert len(torch.cat(part[:3]).unique()) == len(y)
    assert torch.equal(part.train, d.long_tail(y, 10, 3, 50, 5).train)
    assert not torch.equal(part.order, d.long_tail(y, 10, 4, 50, 5).order)


def test_rules_do_what_they_say_and_strength_zero_is_plain():
    digits = data.digits()
    X = digits.X.reshape(-1, 64).float() / 16
    parts = [d.long_tail(digits.y, 50, s) for s in (1, 2)]
    rows = torch.stack([p.train for p in parts])
    arms = [d.Arm(), d.Arm(permuted=True), d.Arm(resample=1.0),
            d.Arm(adjust=1.5), d.Arm(strength=8.0)]
    params = d.train_tails(arms, rows, X, digits.y, [1, 2], 150)
    for value in params.values():  # labels of terms that weigh nothing
        assert torch.equal(value[:2], value[2:4])
    got = d.score_tails(params, parts, X, digits.y)
    assert (got.tail[2:4] > got.tail[0]).all()
    assert (got.angles[4] < 0.75 * got.angles[0]).all()


def test_stacked_activations_are_those_of_the_module():
    net = mlp([5, 4, 3, 2], seed=1)
    x = torch.randn(6, 5)
    stacked = {k: v.detach()[None] for k, v in net.named_parameters()}
    found = d.activations(stacked, x[None])
    torch.testing.assert_close(found[-1][0], net(x))
    torch.testing.assert_close(found[-2][0], net[:-1](x))


@pytest.mark.parametrize(("call", "match"), [
    (lambda: d.imbalanced_minimiser([1, 0], 0.1, 0.1), "counts: got"),
    (lambda: d.imbalanced_minimiser([1], 0.1, 0.1, 0), "depth: got 0"),
    (lambda: d.central_path_flow(torch.ones(3, 2), torch.tensor([0, 0, 1]),
                                 0, 0.1, 0.1, 1.0), "labels: classes of"),
    (lambda: d.central_path_flow(torch.ones(2, 2), torch.tensor([0, 1]),
                                 -1, 0.1, 0.1, 1.0), "t, steps, beta"),
    (lambda: d.NC1Penalty(1.0), "momentum: got 1.0"),
    (lambda: d.long_tail(torch.arange(9) % 3, 0.5, 1), "ratio: got 0.5"),
    (lambda: d.long_tail(torch.arange(9) % 3, 2, 1), "head: got 120"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def judged(claim, evidence, n):
    return Claim.load(claim).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


def planted(claim, n, noise=0.05, **values):
    """Around the given values, 0 elsewhere; exact errors as they are."""
    rng, out = np.random.default_rng(0), {}
    for name, c in Claim.load(claim).criteria.items():
        mean = values.get(name, 0.0)
        if c.kind == "exact":
            out[name] = [mean]
        elif c.estimator == "proportion":
            out[name] = (np.arange(n) < mean * n).astype(int)
        elif c.estimator == "cluster_mean":
            share = (np.arange(3 * n) % 100 < 100 * mean).astype(int)
            out[name] = share, np.repeat(range(n), 3)
        elif c.estimator in ("pearson", "spearman"):
            x = rng.normal(size=4 * n)
            y = mean * x + (1 - mean**2) ** 0.5 * rng.normal(size=4 * n)
            out[name] = x, y, np.tile(range(n), 4)
        else:
            out[name] = rng.normal(mean, noise, n)
    return out


@pytest.mark.parametrize(("claim", "n", "values", "verdict"), [
    ("D100/lengths-follow-class-size", 20,
     {"slope": 1, "slope_near": 1, "simplex": 0.25}, "reproduced"),
    ("D100/lengths-follow-class-size", 20,
     {"slope": 1, "slope_near": 1, "simplex": 0.25, "lengths": 0.02},
     "not reproduced"),
    ("D100/lengths-follow-class-size", 20,
     {"slope": 0.5, "slope_near": 1, "simplex": 0.25}, "not reproduced"),
    ("D100/lengths-follow-class-size", 20,
     {"slope": 0.8, "slope_near": 1, "simplex": 0.25}, "inconclusive"),
    ("D100/lengths-follow-class-size", 20,
     {"slope": 1, "slope_near": 1, "simplex": 0.0}, "invalid"),
    ("D100/minority-vanishes-at-threshold", 5, {}, "reproduced"),
    ("D100/minority-vanishes-at-threshold", 5, {"change": 2},
     "not reproduced"),
    ("D100/minority-vanishes-at-threshold", 5, {"halved": 2}, "invalid"),
    ("D038/nc1-falls-along-flow", 200, {"depth": 1, "permuted": 0.5},
     "reproduced"),
    ("D038/nc1-falls-along-flow", 200,
     {"depth": 1, "permuted": 0.5, "free": 1e-3}, "not reproduced"),
    ("D038/nc1-falls-along-flow", 200, {"depth": 0.7, "permuted": 0.5},
     "not reproduced"),
    ("D038/nc1-falls-along-flow", 200, {"depth": 1, "permuted": 0.9},
     "invalid"),
    ("D038/feature-decay-dominates", 100,
     {"instances": 0.96, "networks": 1, "signs": 1}, "reproduced"),
    ("D038/feature-decay-dominates", 100,
     {"instances": 0.96, "networks": 1, "signs": 0.5}, "inconclusive"),
    ("D038/feature-decay-dominates", 100,
     {"instances": 0.96, "networks": -1, "signs": 1}, "not reproduced"),
    ("D038/feature-decay-dominates", 100,
     {"instances": 0.96, "networks": 1, "signs": 1, "product": 0.1},
     "invalid"),
    ("D095/collapse-terms-help-the-tail", 32,
     {"halved": 0.2, "over_resampling": 2, "over_adjustment": 2,
      "tail_resampling": 3, "tail_adjustment": 3}, "reproduced"),
    ("D095/collapse-terms-help-the-tail", 32,
     {"halved": 0.2, "over_resampling": 2, "over_adjustment": 1,
      "tail_resampling": 3, "tail_adjustment": 3}, "not reproduced"),
    ("D095/collapse-terms-help-the-tail", 32,
     {"halved": -0.2, "over_resampling": 2, "over_adjustment": 2,
      "tail_resampling": 3, "tail_adjustment": 3}, "invalid"),
    ("D095/collapse-terms-help-the-tail", 32,
     {"halved": 0.2, "over_resampling": 2, "over_adjustment": 2,
      "tail_resampling": 3, "tail_adjustment": 3, "permuted": 2}, "invalid"),
    ("D095/geometry-mediates", 32, {"mediated": 0.7}, "reproduced"),
    ("D095/geometry-mediates", 32, {"mediated": 0.0}, "not reproduced"),
    ("D095/geometry-mediates", 32, {"mediated": 0.7, "unpaired": 0.1},
     "invalid"),
])
def test_planted_evidence(claim, n, values, verdict):
    assert judged(claim, planted(claim, n, **values), n) == verdict
