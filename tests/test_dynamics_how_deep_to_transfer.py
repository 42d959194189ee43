"""Theory against closed forms and simulation; cuts; planted verdicts."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from reappraisal.dynamics import how_deep_to_transfer as h
from reappraisal.lab.ensemble import Adam, Ensemble, train, untrained
from reappraisal.lab.models import generator, mlp
from reappraisal.protocol.claims import Claim


def test_manifold_overlap_swap_and_determinism():
    for q in (-1.0, 0.0, 0.3, 1.0):
        source, target = h.hidden_manifold(20, 50, q, 0.2, 4)
        assert float(source.rule @ target.rule) == pytest.approx(q, abs=1e-5)
        assert int((source.F != target.F).any(0).sum()) == 4
    again, _ = h.hidden_manifold(20, 50, 0.9, 0.0, 4)
    assert torch.equal(again.F, source.F)
    assert torch.equal(again.rule, source.rule)
    x, y, c = source.sample(100, 5)
    assert torch.equal(x, source.sample(100, 5)[0])
    assert not torch.equal(x, source.sample(100, 6)[0])
    assert not torch.equal(x, source.sample(100, 5, "test")[0])
    torch.testing.assert_close(x, torch.tanh(c @ source.F.mT / 20**0.5))
    assert torch.equal(y, (c @ source.rule).sign())
    assert x.abs().max() < 1


@pytest.mark.parametrize("n", [10, 50, 400])
def test_effective_ridge_closed_form_and_equation(n):
    lam = np.array([1e-3, 1.0, 100.0])
    b = n - 50 - lam
    closed = (-b + np.sqrt(b**2 + 4 * n * lam)) / (2 * n)
    assert np.allclose(h.effective_ridge(np.ones(50), n, lam), closed)
    s = np.geomspace(0.01, 10, 50)
    k = h.effective_ridge(s, n, lam)
    assert np.allclose(k * (n - (s / (s + k[:, None])).sum(1)), lam)


def gaussian(P=60, D=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=(D, P)) / 2


def test_prediction_meets_gaussian_simulation_and_not_other_covariances():
    rng, mix = gaussian()
    P, D = 60, 8
    model = h.GaussianCovariate(mix.T @ mix + np.eye(P), mix.T, np.eye(D))
    blind = h.GaussianCovariate(np.eye(P), 0.2 * mix.T, np.eye(D))
    rules = 2 * np.eye(D)[:1]  # the length of the rule is no matter
    for n, lam in ((30, 1.0), (60, 5.0), (240, 5.0)):
        wrong, squared = [], []
        for _ in range(40):
            c = rng.normal(size=(n + 1000, D))
            v = c @ mix + rng.normal(size=(n + 1000, P))
            y = np.sign(c @ rules.T)
            out = v[n:] @ h.ridge_heads(v[:n], y[:n], np.array([lam]))
            wrong.append((np.sign(out) != y[n:]).mean())
            squared.append(((out - y[n:]) ** 2).mean())
        got = model.predict(rules, n, lam)
        assert got.wrong.item() == pytest.approx(np.mean(wrong), abs=0.012)
        assert got.squared.item() == pytest.approx(
            np.mean(squared), rel=0.04)
        assert abs(blind.predict(rules, n, lam).wrong.item()
                   - np.mean(wrong)) > 0.03


def test_nothing_to_see_is_chance():
    model = h.GaussianCovariate(np.eye(5), np.zeros((5, 3)), np.eye(3))
    assert model.predict(np.eye(3), 10, 1.0).wrong == pytest.approx(0.5)


def test_measured_covariances():
    rng = np.random.default_rng(0)
    v, c = rng.normal(size=(50, 4)), rng.normal(size=(50, 3))
    model = h.GaussianCovariate.measured(v, c)
    rebuilt = (model.axes * model.spectrum) @ model.axes.T
    assert np.allclose(rebuilt, v.T @ v / 50)
    assert np.allclose(model.Phi, v.T @ c / 50)
    assert np.allclose(model.Psi, c.T @ c / 50)


def test_ridge_heads_against_sklearn():
    rng = np.random.default_rng(0)
    for n in (5, 40):
        v, y = rng.normal(size=(n, 10)), rng.normal(size=(n, 2))
        got = h.ridge_heads(v, y, np.array([0.1, 3.0]))
        for t, lam in enumerate((0.1, 3.0)):
            want = Ridge(alpha=lam, fit_intercept=False).fit(v, y[:, t])
            assert np.allclose(got[:, t], want.coef_)


@pytest.fixture(scope="module")
def toy():
    g = generator(0, "toy")
    net = mlp([5, 6, 4, 2])
    x = torch.randn(3, 40, 5, generator=g)
    y = (x[..., 0] * x[..., 1] > 0).long()
    return net, untrained(net, [1, 2, 3]), x, y


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_only_what_is_above_the_cut_changes(toy, cut):
    net, start, x, y = toy
    new = h.defrost(start, x, y, cut, [5, 6, 7], steps=10)
    names = list(start.params)
    same = [torch.equal(start.params[k], new.params[k]) for k in names]
    assert same == [True] * 2 * cut + [False] * 2 * (3 - cut)
    assert list(new.params) == names
    again = h.defrost(start, x, y, cut, [5, 6, 7], steps=10)
    assert all(torch.equal(new.params[k], again.params[k]) for k in names)
    loose = h.defrost(start, x, y, cut, [5, 6, 7], steps=10, mode="init")
    assert not any(
        torch.equal(start.params[k], loose.params[k]) for k in names)
    for i in range(3):
        member = new.member(i)
        torch.testing.assert_close(member(x[i]).detach(),
                                   h.outputs(new, x)[i])
        at = [0, 3, 5][cut]
        below = start.member(i)[:at](x[i]).detach() if cut else x[i]
        torch.testing.assert_close(h.hidden(start, x, cut)[i], below)


def test_cut_zero_is_training_from_scratch(toy):
    net, start, x, y = toy
    scratch = train(net, (x, y), per_member=("x", "y"), seeds=[5, 6, 7],
                    steps=10, batch_size=16, optimiser=Adam(0.01))
    new = h.defrost(start, x, y, 0, [5, 6, 7], steps=10, batch_size=16)
    for k, v in scratch.params.items():
        torch.testing.assert_close(new.params[k], v)


def test_a_planted_good_source_is_kept_and_found(toy):
    """The target's own network wins at all cuts; a random one is lost."""
    net, start, x, y = toy
    g = generator(1, "many")
    many = torch.randn(3, 600, 5, generator=g)
    answer = (many[..., 0] * many[..., 1] > 0).long()
    good = train(net, (many, answer), per_member=("x", "y"),
                 seeds=[1, 2, 3], steps=800, batch_size=100,
                 optimiser=Adam(0.01))
    noise = train(net, (many, answer[:, torch.randperm(600, generator=g)]),
                  per_member=("x", "y"), seeds=[1, 2, 3], steps=800,
                  batch_size=100, optimiser=Adam(0.01))
    error = [h.wrong_share(h.defrost(s, x, y, 2, [5, 6, 7]), many,
                           answer).mean() for s in (good, noise)]
    assert error[0] < 0.12 < 0.2 < error[1]
    shelf = Ensemble.join([Ensemble(net, e.params, seeds=e.seeds)
                           for e in (noise, good)])
    other = train(net, (many, answer), per_member=("x", "y"),
                  seeds=[8, 9, 10], steps=800, batch_size=100,
                  optimiser=Adam(0.01))
    for measure in ("imbalance", "cka"):
        score = h.rank_sources(other, shelf, many[:, :100], measure)
        assert score.shape == (2, 3)
        assert score[1].mean() > score[0].mean() + 0.02


def test_digit_sources():
    g = generator(0, "images")
    images = torch.rand(40, 16, generator=g)
    digit = torch.arange(40) % 10
    tasks = h.digit_sources(images, digit, 1)
    assert torch.equal(tasks["prime"][1][:10],
                       torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0, 0]))
    assert torch.equal(tasks["loop"][1][:10],
                       torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 1, 1]))
    assert torch.equal(tasks["least5"][1][:10], (torch.arange(10) > 4).long())
    assert not torch.equal(tasks["random"][1], tasks["same"][1])
    assert torch.equal(h.digit_sources(images, digit, 1)["permuted"][0],
                       tasks["permuted"][0])
    assert not torch.equal(h.digit_sources(images, digit, 2)["permuted"][0],
                           tasks["permuted"][0])


@pytest.mark.parametrize(("call", "match"), [
    (lambda t: h.hidden_manifold(1, 5, 0, 0, 0), "D, N: got 1"),
    (lambda t: h.hidden_manifold(4, 5, 1.1, 0, 0), "q: got 1.1"),
    (lambda t: h.hidden_manifold(4, 5, 1, 2.0, 0), "swap: got 2.0"),
    (lambda t: h.effective_ridge(np.ones(3), 5, 0.0), "n, lam: got 5"),
    (lambda t: h.GaussianCovariate(np.eye(3), np.ones((2, 2)), np.eye(2)),
     "Omega, Phi, Psi: got"),
    (lambda t: h.defrost(t[1], t[2], t[3], 3, [1, 2, 3]), "cut: got 3"),
    (lambda t: h.defrost(t[1], t[2], t[3], 1, [1]), "seeds: got 1"),
    (lambda t: h.defrost(t[1], t[2], t[3], 1, [1, 2, 3], mode="no"),
     "mode: got 'no'"),
    (lambda t: h.rank_sources(t[1], t[1], t[2], "no"), "measure: got 'no'"),
    (lambda t: h.rank_sources(t[1], t[1][:2], t[2]), "scratch, candidates"),
])
def test_bad_input_is_named(toy, call, match):
    with pytest.raises(ValueError, match=match):
        call(toy)


def judged(slug, n, means, sd=0.01):
    """A verdict on evidence around the means whose names start so."""
    claim = Claim.load(slug)
    rng = np.random.default_rng(0)
    evidence = {}
    for name, c in claim.criteria.items():
        match = max((k for k in means if name.startswith(k)), key=len,
                    default=None)
        mean = means.get(match, 0.0)
        if c.test == "spearman" or c.estimator == "spearman":
            x = np.arange(18.0)
            evidence[name] = (x, mean * x + 6 * rng.normal(size=18))
        else:
            evidence[name] = rng.normal(mean, sd, n)
    return claim.judge(evidence, scale="book",
                       seeds=range(1000, 1000 + n)).verdict


WIN = {"frozen": 5, "more": 5, "scratch": 2, "closer": 2, "larger": 2,
       "untrained": 3}


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"scratch": 0.5}, "inconclusive"),
    ({"scratch": -1, "scratch_prime_100": 2}, "reproduced"),
    ({"frozen": 0.5, "more": 0.5}, "not reproduced"),
    ({"closer": -2}, "not reproduced"),
    ({"larger": 0}, "inconclusive"),
    ({"identical": -2}, "invalid"),
    ({"untrained": -1}, "invalid"),
])
def test_partial_transfer_planted(change, verdict):
    found = judged("B05/partial-transfer-wins", 12, WIN | change)
    assert found == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"wrong": 0.1}, "reproduced"),
    ({"wrong": 0.1, "cell_100": 0.05}, "inconclusive"),  # six cells miss
    ({"wrong": 0.1, "cell_100": 0.05, "cell_75": 0.05}, "not reproduced"),
    ({"wrong": 0.1, "crossing": 0.5}, "not reproduced"),
    ({"wrong": 0.0}, "invalid"),  # any covariances would do
])
def test_theory_planted(means, verdict):
    assert judged("B05/feature-transfer-theory", 20, means) == verdict


PICK = {"regret": 3, "tau": 0.7, "trained": 0.3}


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"regret_labels": 0}, "inconclusive"),
    ({"regret_labels": -1}, "not reproduced"),
    ({"tau": 0.2}, "not reproduced"),
    ({"trained": -0.2}, "invalid"),
])
def test_choice_of_source_planted(change, verdict):
    found = judged("B05/representation-picks-source", 30, PICK | change)
    assert found == verdict
