"""Datamodels on planted effects, without any, and with the mechanism off."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, Ridge
from sklearn.metrics import roc_auc_score

from reappraisal.dynamics import datamodels as d
from reappraisal.lab.data import load
from reappraisal.lab.ensemble import SGD
from reappraisal.lab.models import mlp
from reappraisal.measure.influence import lds, margin, subset_masks
from reappraisal.measure.reading import read_outputs
from reappraisal.protocol.claims import Claim

SEEDS = (1000, 1001)


def planted(targets=30, rows=80, subsets=400, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    effects = torch.randn(targets, rows, generator=g)
    effects = effects * (torch.rand(targets, rows, generator=g) < 0.2)
    masks = subset_masks(rows, subsets, seed=seed)
    said = masks.float() @ effects.T
    luck = noise * torch.randn(2, subsets, targets, generator=g)
    return effects, masks, said + luck[0], said + luck[1]


@pytest.fixture(scope="module")
def pool():
    return d.plant(load("digits"), 60, 20, leaks=6, wrong=6, seed=3)


def test_planted_effects_are_found_and_permuted_ones_are_not():
    effects, masks, one, two = planted()
    said, fit, new = (one + two) / 2, slice(0, 300), slice(300, None)
    model = d.fit_datamodels(masks[fit], said[fit])
    assert (model.weights - effects).abs().max() < 0.2
    score = lds(model.predict(masks[new]), said[new])
    bound = d.reliability(one[new], two[new]).sqrt()
    assert 0.95 < score.mean() / bound.mean() < 1.02
    g = torch.Generator().manual_seed(1)
    mixed = said[fit][torch.randperm(300, generator=g)]
    null = d.fit_datamodels(masks[fit], mixed)
    assert abs(lds(null.predict(masks[new]), said[new]).mean()) < 0.1
    rest = d.counterfactual(model, ~masks[new]) + model.predict(
        torch.ones_like(masks[:1]))
    torch.testing.assert_close(rest, model.predict(masks[new]), atol=1e-4,
                               rtol=1e-4)


def test_lasso_meets_its_conditions_and_scikit_learn():
    effects, masks, said, _ = planted(4, 30, 120)
    gram, cross, _, _ = d._centred(masks.double(), said.double())
    top = cross.abs().amax(1)
    penalties = torch.stack([top, top / 5, top / 50])
    path = d.lasso(gram, cross, penalties, iterations=400)
    assert (path[0] == 0).all()
    for w, p in zip(path, penalties, strict=True):
        pull = cross - w @ gram
        assert (pull.abs() <= p[:, None] + 1e-8).all()
        on = w != 0
        want = (p[:, None] * w.sign())[on]
        torch.testing.assert_close(pull[on], want, atol=1e-7, rtol=0)
    for t in range(4):
        known = Lasso(alpha=float(penalties[1, t]), tol=1e-10).fit(
            masks.numpy(), said[:, t].double().numpy())
        assert np.allclose(known.coef_, path[1, t], atol=1e-5)


def test_the_pool_is_planted_as_it_says(pool):
    gap = torch.cdist(pool.targets, pool.X)
    assert torch.equal(gap.argmin(1)[:6], pool.leaked)
    assert gap[range(6), range(6)].min() > 0
    digits = load("digits")
    for row in range(60):
        same = (digits.X.flatten(1) - pool.pixels(pool.X[row])).abs().amax(1)
        nearest = int(same.argmin())
        if row >= 6:
            assert same[nearest] < 1e-5
            right = pool.y[row] == digits.y[nearest]
            assert right != pool.mislabelled[row]
    again = d.plant(load("digits"), 60, 20, leaks=6, wrong=6, seed=3)
    assert torch.equal(again.X, pool.X) and torch.equal(again.y, pool.y)
    clean = d.plant(load("digits"), 60, 20, leaks=0, wrong=0, seed=3)
    assert not clean.mislabelled.any()
    assert torch.equal(clean.y[12:], pool.y[12:])


def test_networks_are_those_of_their_subset_and_seed(pool):
    net, masks = mlp([64, 8, 10]), subset_masks(60, 5, seed=1)
    masks[1, masks[1].nonzero()[:3, 0]] = False
    seeds = d.streams(7, 5, "test")
    assert min(seeds) >= 1000 and seeds == d.streams(7, 5, "test")
    assert seeds != d.streams(7, 5, "other")
    recipe = dict(steps=15, optimiser=SGD(0.2, momentum=0.9))
    stack = d.train_on(net, pool, masks, seeds, chunk=2, **recipe)
    for k in range(5):
        alone = d.train_on(net, pool, masks[[k]], seeds[k : k + 1], **recipe)
        for name, v in alone.params.items():
            torch.testing.assert_close(
                stack.params[name][k], v[0], atol=1e-4, rtol=1e-4)


def test_networks_that_learn_nothing_have_no_datamodel(pool):
    net, masks = mlp([64, 8, 10]), subset_masks(60, 160, seed=1)
    scores = {}
    for steps in (0, 60):
        nets = d.train_on(
            net, pool, masks, d.streams(5, 160, "net"), steps=steps,
            optimiser=SGD(0.2, momentum=0.9))
        z = read_outputs(nets, pool.targets).logits
        said = margin(z, pool.labels)
        model = d.fit_datamodels(masks[:120], said[:120])
        scores[steps] = lds(model.predict(masks[120:]), said[120:]).mean()
    assert abs(scores[0]) < 0.15 and scores[60] > 0.35


def test_ridge_margins_are_those_of_each_subset(pool):
    masks = subset_masks(60, 4, seed=2)
    got = d.ridge_margins(pool, masks, 2.0)
    x, t = (torch.cat([v, torch.ones(len(v), 1)], 1).double().numpy() / 8
            for v in (pool.X, pool.targets))
    for m, mine in zip(masks.numpy(), got, strict=True):
        ridge = Ridge(alpha=2.0, fit_intercept=False).fit(
            x[m], (np.eye(10)[pool.y] - 0.1)[m])
        want = margin(torch.as_tensor(ridge.predict(t)), pool.labels)
        torch.testing.assert_close(mine, want)


def test_rows_to_flip_against_brute_force():
    w = torch.tensor([[2.0, 1, -1, 0], [0.1, 0.1, 0.1, 0.1]])
    model = d.Datamodel(w, torch.zeros(2), torch.zeros(2))
    margins = torch.tensor([2.5, 5.0])
    for t, got in enumerate(d.rows_to_flip(model, margins).tolist()):
        sizes = [
            code.bit_count() for code in range(16)
            if margins[t] - sum(
                w[t, i] for i in range(4) if code >> i & 1) < 0
        ]
        assert got == min(sizes, default=5)
    assert d.rows_to_flip(model, torch.tensor([-1.0, 0])).tolist() == [0, 1]
    assert d.top_rows(w, 2)[0].tolist() == [True, True, False, False]


def test_areas_and_their_jackknife():
    g = torch.Generator().manual_seed(0)
    flags = torch.arange(60) < 12
    scores = (torch.randn(60, generator=g) + flags).round()  # with ties
    values = d.auc_values(scores, flags)
    assert np.isclose(values.mean(), roc_auc_score(flags, scores))
    for row in (0, 30):
        keep = np.arange(60) != row
        left = roc_auc_score(flags[keep], scores[keep])
        whole = roc_auc_score(flags, scores)
        assert np.isclose(values[row], 60 * whole - 59 * left)
    assert d.auc_values(flags.float(), flags).mean() == 1


def test_leakage_of_a_copy_that_is_needed():
    X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    copied = X[0]

    def trainer(masks):
        near = torch.cdist(torch.stack([copied, -copied]), X)
        reach = (-near.square()).exp()
        return masks.double() @ reach.T.double()

    model, trust = d.datamodel(trainer, 40, subsets=200)
    assert d.leakage(model)[0][:2] == (0, 0) and trust[0] > 0.99


def deletions(slope, noise, seed=0):
    g = np.random.default_rng(seed)
    x = -g.uniform(2, 8, (3, 40))
    y = slope * x + noise * g.normal(size=x.shape)
    return {"x": x.ravel(), "y": y.ravel(),
            "clusters": np.tile(np.arange(40), 3)}


@pytest.mark.parametrize("slope, effect, placebo, verdict", [
    (1.0, 4.0, 0.0, "reproduced"),
    (0.0, 0.4, 0.0, "not reproduced"),  # nothing happens
    (2.0, 8.0, 0.0, "not reproduced"),  # the scale is off
    (1.0, 0.6, 0.0, "inconclusive"),  # random rows do as much
    (1.0, 4.0, 0.8, "invalid"),  # any rows do
])
def test_verdicts_on_planted_deletions(slope, effect, placebo, verdict):
    claim = Claim.load("D110/counterfactuals-hold")
    real = deletions(slope, 0.5)
    rows = np.random.default_rng(1).uniform(0.9, 1.1, 40)
    found = claim.judge({
        "slope": real, "fit": real, "permuted": deletions(placebo, 0.5, 2),
        "random": {"a": 0.4 * rows, "b": effect * rows[::-1]},
        "slope_40": {k: v[:40] for k, v in real.items()},
    }, scale="book", seeds=SEEDS)
    assert found.verdict == verdict


@pytest.mark.parametrize("level, rivals, ridge, verdict", [
    (0.8, 0.6, 0.97, "reproduced"),
    (0.8, 0.75, 0.97, "not reproduced"),  # a rival is near
    (0.0, 0.0, 0.97, "not reproduced"),  # permuted masks
    (0.8, 0.6, 0.8, "invalid"),  # the fit itself is poor
])
def test_verdicts_on_planted_scores(level, rivals, ridge, verdict):
    claim = Claim.load("D110/linear-is-enough")
    g = np.random.default_rng(0)

    def around(value):
        return value + 0.03 * g.normal(size=100)

    own = around(level)
    gap = {k: own - around(rivals) for k in (
        "influence", "gradient", "similarity", "frequency", "one_network")}
    found = claim.judge({
        "scaled": {"a": own, "b": around(0.9)}, "raw": own, **gap,
        "permuted": around(0.0), "ridge": around(ridge),
    }, scale="book", seeds=SEEDS)
    assert found.verdict == verdict


@pytest.mark.parametrize("hits, lead, elsewhere, verdict", [
    (28, 1.0, 0.0, "reproduced"),
    (28, 0.0, 0.0, "inconclusive"),  # the plain loss does as well
    (10, 1.0, 0.0, "not reproduced"),
    (28, 1.0, 0.5, "invalid"),  # copies are on top everywhere
])
def test_verdicts_on_planted_leaks(hits, lead, elsewhere, verdict):
    claim = Claim.load("D110/finds-leaks-and-mislabels")
    g = torch.Generator().manual_seed(0)
    flags = torch.arange(300) < 20
    noise = torch.randn(300, generator=g)
    plain = d.auc_values(1.2 * flags + noise, flags)
    area = d.auc_values((1.2 + 2 * lead) * flags + noise, flags)
    found = claim.judge({
        "recall": np.arange(30) < hits, "area": area,
        "beats_loss": area - plain, "loss_leads": plain - area,
        "left_out_leads": plain - area,
        "elsewhere": -elsewhere + 0.02 * np.random.default_rng(0).normal(
            size=30),
    }, scale="book", seeds=SEEDS)
    assert found.verdict == verdict


@pytest.mark.parametrize("call, match", [
    (lambda: d.plant(load("iris"), 200, 20, leaks=1, wrong=1), "rows"),
    (lambda: d.plant(load("iris"), 20, 5, leaks=6, wrong=0), "leaks"),
    (lambda: d.plant(load("iris"), 20, 5, leaks=5, wrong=16), "wrong"),
    (lambda: d.fit_datamodels(torch.ones(5, 3) > 0, torch.ones(4, 2)),
     "outcomes"),
    (lambda: d.fit_datamodels(torch.ones(5, 3) > 0, torch.ones(5, 2)),
     "folds"),
    (lambda: d.auc_values(torch.ones(5), torch.ones(5) > 0), "positive"),
    (lambda: d.datamodel(lambda m: m, 4, subsets=5, share=1.0), "share"),
])
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
