"""Memory against constructions, bounds against exact tails, planted verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from reappraisal.dynamics import fits_anything_yet_generalises as m
from reappraisal.lab import data, models
from reappraisal.lab.ensemble import Adam, fit, train, untrained
from reappraisal.protocol.claims import Claim

DIGITS = data.load("digits")
FEW = DIGITS.subset(range(120))


@pytest.mark.parametrize("kind", m.KINDS)
def test_corruption_takes_what_it_says(kind):
    some = m.corrupt(FEW, kind, 0.5, 3)
    x = FEW.X.flatten(1)
    changed = (some.X != x).any(1)
    if kind == "labels":
        assert not changed.any()
        assert (some.y != FEW.y).sum() == round(0.45 * 120)
    else:
        assert torch.equal(some.y, FEW.y)
        assert 50 <= changed.sum() <= 60
    again = m.corrupt(FEW, kind, 0.5, 3)
    assert torch.equal(some.X, again.X) and torch.equal(some.y, again.y)
    other = m.corrupt(FEW, kind, 0.5, 4)
    assert not (torch.equal(some.X, other.X) and torch.equal(
        some.y, other.y))
    none = m.corrupt(FEW, kind, 0.0, 3)
    assert torch.equal(none.X, x) and torch.equal(none.y, FEW.y)


def test_one_order_for_all_or_one_for_each():
    x = torch.arange(30.0).repeat(5, 1)
    rows = data.Dataset(x, torch.arange(5), "rows", "classification",
                        classes=tuple("abcde"))
    one = m.corrupt(rows, "permuted", seed=1).X
    own = m.corrupt(rows, "shuffled", seed=1).X
    assert (one == one[0]).all() and not torch.equal(one[0], x[0])
    assert (own != own[0]).any() and torch.equal(own.sort(1).values, x)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_memoriser_fits_any_values(n):
    g = models.generator(n, "test")
    x = torch.randn(n, 7, generator=g)
    y = 100 * torch.randn(n, generator=g)
    net = m.explicit_relu_memoriser(x, y, seed=1)
    assert sum(p.numel() for p in net.parameters()) == 2 * n + 7
    torch.testing.assert_close(net(x).float(), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("n", [20, 500])
@pytest.mark.parametrize("K", [1, 64])
def test_bernstein_root_solves_its_inequality(n, K):
    v = torch.linspace(0, 0.9, 10, dtype=torch.float64)
    r = m.validation_bound(v, n, K)
    t, L = r - v, math.log(K / 0.05)
    tail = torch.exp(-n * t**2 / (2 * r * (1 - r) + 2 * t / 3))
    inside = r < 1
    torch.testing.assert_close(
        tail[inside], torch.full_like(tail[inside], 0.05 / K))
    assert (r > v).all() and (r.diff() >= 0).all() and L > 0


def test_exact_limit_inverts_the_binomial():
    for k, n in ((0, 30), (4, 30), (29, 30)):
        r = float(m.binomial_bound(k / n, n))
        assert stats.binom.cdf(k, n, r) == pytest.approx(0.05)
    assert float(m.binomial_bound(1.0, 30)) == 1


def picked(errors, n, limit, sets=400):
    """Coverage after picking the best of independent models."""
    rng = np.random.default_rng(0)
    seen = rng.binomial(n, errors, (sets, len(errors))) / n
    best = seen.argmin(1)
    return float((limit(torch.tensor(seen.min(1))).numpy()
                  >= errors[best]).mean())


def test_correction_is_needed_only_where_something_is_picked():
    equal = np.full(64, 0.9)
    assert picked(equal, 500, lambda v: m.validation_bound(v, 500, 64)) > 0.98
    assert picked(equal, 500, lambda v: m.binomial_bound(v, 500)) < 0.5
    alone = np.full(1, 0.9)
    assert picked(alone, 500, lambda v: m.binomial_bound(v, 500)) > 0.92


def test_margins_and_their_bound():
    scores = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 1.0, 5.0]]])
    y = torch.tensor([[0, 1]])
    assert m.output_margins(scores, y).tolist() == [[2.0, -4.0]]
    good = F.one_hot(torch.arange(100) % 3, 3).float()[None]
    label = (torch.arange(100) % 3)[None]
    size, slope = torch.tensor([2.0]), torch.tensor([0.01])
    value = m.margin_bound(good, label, size, slope)
    spread = 3 * math.sqrt(math.log(1600) / 200)
    assert value.item() == pytest.approx(0.02 + spread)
    # twice the scores at twice the norm are the same predictor
    torch.testing.assert_close(
        m.margin_bound(2 * good, label, 2 * size, slope), value)
    assert m.margin_bound(good, (label + 1) % 3, size, slope).isinf().all()


def test_norm_bounds_ignore_how_layers_share_scale():
    g = models.generator(0, "test")
    x = torch.randn(1, 40, 6, generator=g)
    net = train(models.mlp([6, 20, 3], bias=False), (x[0], torch.arange(
        40) % 3), steps=300, optimiser=Adam(0.03), seeds=[1])
    w, y = list(net.params.values()), (torch.arange(40) % 3)[None]
    for bound in (m.rademacher_margin, m.spectral_margin):
        value = bound(w, x, y)
        torch.testing.assert_close(bound([4 * w[0], w[1] / 4], x, y), value)
        assert 1 < value.item() < math.inf
    single = torch.linalg.matrix_norm(w[0], 2)
    assert single <= w[0].flatten(1).norm(dim=1)


def network(seed=0):
    net = models.mlp([64, 10, 10], bias=False, seed=seed)
    return net, [p.detach()[None] for p in net.parameters()]


def test_paths_begin_as_the_network_and_end_at_the_fit():
    net, w = network()
    x = FEW.X.flatten(1)
    own = net(x).detach()
    kept = m.refit_paths(w, x[None, :50], own[None, :50])
    assert kept.moved.item() < 1e-5  # nothing to refit
    torch.testing.assert_close(kept(x)[0].float(), own, atol=1e-5, rtol=1e-4)
    goal = F.one_hot(FEW.y, 10).float()[None, :50]
    fitted = m.refit_paths(w, x[None, :50], goal, ridge=0)
    torch.testing.assert_close(fitted.scores.float(), goal, atol=1e-3, rtol=0)
    stiff = m.refit_paths(w, x[None, :50], goal, ridge=1e6)
    torch.testing.assert_close(stiff(x)[0].float(), own, atol=1e-3, rtol=0)
    cold = m.refit_paths(w, x[None, :50], goal, warm=False)
    assert torch.equal(cold.moved, cold.length)


def test_linear_paths_are_least_squares():
    _, w = network(1)
    x = FEW.X.flatten(1)
    goal = F.one_hot(FEW.y, 10).float()
    got = m.refit_paths(w, x[None], goal[None], ridge=0, warm=False,
                        linear=True)(x)[0]
    best = np.linalg.lstsq(x.double().numpy(), goal.double().numpy(),
                           rcond=1e-9)[0]
    np.testing.assert_allclose(got, x.double().numpy() @ best, atol=1e-7)


def test_darc_is_the_largest_column():
    out = torch.randn(4, 30, 5, generator=models.generator(0, "o"))
    want = [max(np.abs(o[:, k]).mean() for k in range(5))
            for o in out.numpy()]
    np.testing.assert_allclose(m.darc1(out), want, rtol=1e-6)


def test_stopped_penalty_trains_as_none():
    x, y = FEW.X.flatten(1), FEW.y
    arms = [(0.0, 0.0), (0.5, 1.0), (0.5, 0.0)]
    t = {"y": y.expand(3, -1),
         "strength": torch.tensor([[a] for a, _ in arms]).expand(3, 120),
         "stopped": torch.tensor([[b] for _, b in arms]).expand(3, 120)}
    e = train(models.mlp([64, 12, 10], bias=False), (x.expand(3, -1, -1), t),
              steps=40, loss=m.darc_loss, optimiser=Adam(0.01),
              seeds=[1, 1, 1], per_member=("x", "y", "strength", "stopped"))
    for v in e.params.values():
        assert torch.equal(v[0], v[1]) and not torch.equal(v[0], v[2])


def test_dropout_slows_memory_and_rate_zero_is_plain():
    net = models.mlp([64, 24, 24, 10])
    start = untrained(net, [2, 2])
    noise = m.corrupt(FEW, "labels", seed=2)
    x, y = noise.X.flatten(1), noise.y
    loss = m.DropoutLoss.of(start, 0)
    run = fit(start.params, loss, optimiser=Adam(0.01), steps=150,
              per_member={"x": x.expand(2, -1, -1), "y": y.expand(2, -1),
                          "rate": torch.tensor([0.0, 0.8])})
    plain = train(net, (x, y), steps=150, optimiser=Adam(0.01), seeds=[2])
    out = loss.outputs(run.params, x.expand(2, -1, -1)).argmax(-1)
    right = (out == y).float().mean(1)
    assert right[0] > 0.99 and right[1] < 0.8
    for k, v in plain.params.items():
        torch.testing.assert_close(v[0], run.params[k][0], atol=2e-2, rtol=0)


def judged(slug, evidence, n=24):
    return Claim.load(slug).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"),
    ({"ratio": 1.0}, "inconclusive"),  # nothing delayed
    ({"ratio": 20.0}, "not reproduced"),
    ({"fitted": 10}, "not reproduced"),
    ({"fitted": 20}, "inconclusive"),
    ({"test": 0.6}, "invalid"),
    ({"narrow": 0.9}, "invalid"),
    ({"wrong": 0.01}, "invalid"),
])
def test_memory_planted(how, verdict):
    h = {"ratio": 2.0, "fitted": 24, "test": 0.94, "narrow": 0.2,
         "wrong": 0.0} | how
    rng = np.random.default_rng(0)

    def noisy(x):
        return rng.normal(x, 0.02, 24)

    found = {"learned": noisy(h["test"]), "narrow": 0.6 - noisy(h["narrow"]),
             "construction": h["wrong"],
             "delay_labels": noisy(math.log10(h["ratio"]))}
    for k in m.KINDS:
        found[f"fitted_{k}"] = np.arange(24) < (
            h["fitted"] if k == "labels" else 24)
        found[f"within_{k}"] = 1 - noisy(math.log10(h["ratio"]))
    assert judged("D010/random-labels-are-fitted", found) == verdict


@pytest.mark.parametrize(("decay", "dropout", "stronger", "verdict"), [
    (1.0, 0.99, 0.1, "reproduced"), (1.0, 0.8, 0.1, "not reproduced"),
    (1.0, 0.99, 0.9, "invalid")])
def test_regularisers_planted(decay, dropout, stronger, verdict):
    rng = np.random.default_rng(0)
    v = {k: rng.normal(x, 0.01, 24) for k, x in (
        ("decay", decay), ("dropout", dropout), ("weaker", 1.0),
        ("stronger", 0.8 - stronger))}
    assert judged("D010/regularisers-do-not-prevent-it", v) == verdict


@pytest.mark.parametrize(("cover", "slack", "miss", "verdict"), [
    (1.0, 0.05, 0.3, "reproduced"),
    (0.8, 0.05, 0.3, "not reproduced"),
    (1.0, 0.3, 0.3, "not reproduced"),
    (1.0, 0.05, 0.01, "invalid"),  # picking costs nothing
])
def test_certificates_planted(cover, slack, miss, verdict):
    rng = np.random.default_rng(0)
    at = np.arange(800) / 800
    found = {"below_one": 0.0, "coverage": at < cover,
             "slack": 0.1 - rng.normal(slack, 0.02, 800),
             "vacuous": np.ones(256), "undivided": at < miss,
             "hoeffding": at < 0.0}
    assert judged("D030/validation-bound-is-tight-and-honest", found,
                  4) == verdict


@pytest.mark.parametrize(("cost", "factor", "patterns", "verdict"), [
    (0.5, 30, 5, "reproduced"), (6, 30, 5, "not reproduced"),
    (0.5, 2, 5, "not reproduced"), (0.5, 30, 0, "invalid")])
def test_two_phases_planted(cost, factor, patterns, verdict):
    rng = np.random.default_rng(0)
    found = {k: rng.normal(x, 0.2, 24) for k, x in (
        ("accuracy", -cost), ("factor", math.log10(factor)),
        ("untrained", patterns), ("from_zero", 0), ("cold_accuracy", 0),
        ("cold_factor", 0), ("cold_patterns", 0))}
    found["linear"] = 0.0
    assert judged("D030/two-phase-path-bound", found) == verdict


@pytest.mark.parametrize(("gain", "large", "stopped", "verdict"), [
    (1.0, 0.0, 0.0, "reproduced"), (0.0, 0.0, 0.0, "not reproduced"),
    (1.0, 1.0, 0.0, "invalid"), (1.0, 0.5, 0.0, "inconclusive"),
    (1.0, 0.0, 0.1, "invalid")])
def test_darc_planted(gain, large, stopped, verdict):
    rng = np.random.default_rng(0)
    found = {k: rng.normal(x, 0.5, 48) for k, x in (
        ("none", gain), ("decay", gain), ("large", large))}
    assert judged("D030/darc-helps-small-data",
                  found | {"stopped": stopped}, 48) == verdict


W = [torch.ones(1, 4, 3), torch.ones(1, 2, 4)]


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: m.corrupt(FEW, "blur"), "kind: got 'blur'"),
    (lambda: m.corrupt(FEW, "labels", 2.0), "level: got 2.0"),
    (lambda: m.explicit_relu_memoriser(torch.ones(2, 3), torch.ones(2)),
     "X: two inputs"),
    (lambda: m.explicit_relu_memoriser(torch.ones(2, 3), torch.ones(3)),
     "y: got 3"),
    (lambda: m.validation_bound(0.1, 0), "n, n_candidates, delta: got 0"),
    (lambda: m.validation_bound(1.2, 10), "errors"),
    (lambda: m.rademacher_margin(W[:1], None, None), "weights: got shapes"),
    (lambda: m.refit_paths(W, None, None, ridge=-1), "ridge: got -1"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
