"""Shares against regressions, losses by hand, verdicts on planted effects."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from reappraisal.dynamics import simple_features_crowd_out as s
from reappraisal.lab import data
from reappraisal.lab.ensemble import Batch, cross_entropy
from reappraisal.lab.models import generator, mlp
from reappraisal.protocol.claims import Claim


def test_features_are_parities_of_their_bits():
    X, Y = s.matched_features(7, [(3,), (0, 6), (1, 2, 4)])
    assert X.shape == (128, 7) and len(X.unique(dim=0)) == 128
    want = torch.stack([X[:, [3]].prod(1), X[:, [0, 6]].prod(1),
                        X[:, [1, 2, 4]].prod(1)], 1)
    assert torch.equal(1 - 2 * Y, want)
    R = s.random_features(X, [(0, 1, 2), (3, 4, 5)], 1)
    assert R.mean(0).tolist() == [0.5, 0.5]
    for f, places in zip(R.T, ([0, 1, 2], [3, 4, 5]), strict=True):
        rows = torch.cat([X[:, places], f[:, None]], 1).unique(dim=0)
        assert len(rows) == 8  # a function of those bits alone
    assert not torch.equal(R, s.random_features(X, [(0, 1, 2), (3, 4, 5)], 2))


def test_share_is_what_a_regression_explains():
    g = generator(1, "acts")
    f = torch.randint(2, (60_000, 2), generator=g).float()
    mix = torch.randn(2, 12, generator=g)
    h = f @ mix + torch.randn(60_000, 12, generator=g)
    share = s.feature_variance(h, f)
    for k in (0, 1):
        fit = LinearRegression().fit(f[:, [k]].numpy(), h.numpy())
        told = fit.predict(f[:, [k]].numpy()).var(0).sum()
        assert share[k].item() == pytest.approx(
            told / h.numpy().var(0).sum(), abs=0.003)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g))[0]
    assert torch.allclose(
        s.feature_variance(3 * h @ turn + 1, 5 - 2 * f), share, atol=1e-4)


def test_an_absent_feature_has_no_share_on_average():
    g = generator(2, "acts")
    h = torch.randn(500, 60, 8, generator=g)
    f = torch.randint(2, (500, 60, 1), generator=g).float()
    share = s.feature_variance(h, f)
    assert abs(share.mean()) < 3 * share.std() / 500**0.5
    assert share.mean() < 0.25 / 60  # a plain regression gives 1 / 60


def heads(supports, steps=250, starts=None, shuffle=False):
    X, Y = s.matched_features(8, supports)
    if shuffle:
        Y = Y[torch.randperm(len(Y), generator=generator(0, "rows"))]
    net = mlp([8, 32, len(supports)], seed=0)
    starts = None if starts is None else torch.tensor(starts).float()
    look = s.FeatureWatch(net, X, Y[None], torch.zeros(3, dtype=torch.long))
    done = s.train_heads(
        net, X[:192], Y[None, :192], [1, 2, 2], steps=steps, starts=starts,
        optimiser=s.Adam(lr=0.01), callbacks=[look], every=steps,
    )
    return done, {k: done.history[k].values[:, -1]
                  for k in ("correct", "share", "norm")}


def test_heads_learn_in_their_order_and_twins_agree():
    done, found = heads([(0,), (1, 2)])
    assert found["correct"].min() > 0.99 and found["share"].min() > 0.03
    assert all(torch.equal(v[1], v[2]) for v in found.values())
    assert all(torch.equal(p[1], p[2]) for p in done.params.values())
    _, late = heads([(0,), (1, 2)], starts=[[0, 250]] * 3)
    assert late["correct"][:, 0].min() > 0.99
    assert late["correct"][:, 1].max() < 0.7
    assert late["share"][:, 1].abs().max() < 0.02


def test_without_a_rule_nothing_is_represented():
    _, found = heads([(0,), (1, 2)], shuffle=True)
    _, real = heads([(0,), (1, 2)])
    assert found["share"].max() < 0.25 * real["share"].min()


def batch(step, x, y, **arm):
    own = {f.name: torch.tensor([float(getattr(s.Arm(**arm), f.name))])
           for f in s.fields(s.Arm)}
    return Batch(step, torch.zeros(1, dtype=torch.long), own, x,
                 {"label": y, "noise": (y + 1) % 3})


def test_sieve_by_hand():
    net = mlp([4, 5, 6, 3], seed=1)
    sieve = s.FeatureSieve(net, "2")
    x = torch.randn(1, 20, 4, generator=generator(3, "x"))
    y = torch.arange(20)[None] % 3
    p = sieve.start([7], x[0, :1])
    h, out = sieve.split(p, x)
    assert torch.allclose(h, (x @ p["1.weight"].mT + p["1.bias"]).relu())
    seen = h @ p["aux.weight"].mT + p["aux.bias"]
    assert torch.allclose(sieve.read(p, h), seen)
    main = cross_entropy(out, y).mean()
    flat = -seen.log_softmax(-1).mean()
    close = {"rtol": 1e-5, "atol": 1e-6}
    for arm, step, want in (
        ({}, 0, main),
        ({"aux": 2.0}, 0, main + 2 * cross_entropy(seen, y).mean()),
        ({"aux": 2.0, "random": 1.0}, 0,
         main + 2 * cross_entropy(seen, (y + 1) % 3).mean()),
        ({"strength": 3.0, "period": 4}, 3, main + 3 * flat),
        ({"strength": 3.0, "period": 4}, 2, main),
    ):
        got = sieve(p, batch(step, x, y, **arm))
        torch.testing.assert_close(got[0], want, **close)
    dropped = sieve(p, batch(0, x, y, dropout=0.5))
    assert not torch.allclose(dropped[0], main)
    torch.testing.assert_close(dropped, sieve(p, batch(0, x, y, dropout=0.5)))


def test_flow_reaches_the_layers_below():
    net, y = mlp([4, 5, 6, 3], seed=1), torch.arange(20)[None] % 3
    sieve = s.FeatureSieve(net, "2")
    x = torch.randn(1, 20, 4, generator=generator(3, "x"))

    def gradient(**arm):
        p = {k: v.clone().requires_grad_()
             for k, v in sieve.start([7], x[0, :1]).items()}
        value = sieve(p, batch(0, x, y, **arm)).sum()
        return torch.autograd.grad(value, p["1.weight"])[0]

    assert torch.equal(gradient(), gradient(aux=1.0))
    assert not torch.allclose(gradient(), gradient(aux=1.0, flow=1.0))


def test_group_dro_weighs_the_worse_group():
    net = mlp([2, 2], seed=0)
    p = {k: v[None] for k, v in net.named_parameters()}
    x = torch.tensor([[[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]]])
    y = torch.tensor([[0, 0, 1]])
    b = Batch(0, torch.zeros(1, dtype=torch.long), {}, x,
              {"label": y, "group": torch.tensor([[0, 0, 1]])})
    each = cross_entropy(net(x[0])[None], y)[0]
    means = torch.stack([each[:2].mean(), each[2]])
    still = s.GroupDRO(net, 1, rate=0.0)
    torch.testing.assert_close(still(p, b)[0], means.mean())
    moved = s.GroupDRO(net, 1, rate=0.5)
    q = (0.5 * means).exp() / (0.5 * means).exp().sum()
    torch.testing.assert_close(moved(p, b)[0], (q * means).sum())
    torch.testing.assert_close(moved.weights[0], q.detach())
    for _ in range(50):
        moved(p, b)
    assert moved.weights[0, means.argmax()] > 0.9


@pytest.fixture(scope="module")
def trained():
    images = s.CuedImages(data.load("digits"), [1, 2], sizes=(400, 100))
    net = mlp([64, 24, 24, 10], seed=0)
    arms = [s.Arm(), s.Arm(aux=1.0), s.Arm(strength=1.0, period=1000)]
    return images, net, arms, s.train_arms(images, net, "2", arms, steps=120)


def test_arms_that_do_nothing_are_plain_training(trained):
    images, net, _, (sieve, params) = trained
    scores = s.group_scores(images, sieve, params)
    for v in scores.values():
        assert v.shape == (3, 2)
        assert torch.equal(v[0], v[1]) and torch.equal(v[0], v[2])
    # the bias that the chapter starts from
    assert (scores["matched"] - scores["conflict"]).min() > 10
    x, y, cue = images.parts["test"]
    told = (cue == y).double().mean(1)
    mean = told * scores["matched"][0] + (1 - told) * scores["conflict"][0]
    torch.testing.assert_close(mean, scores["all"][0])


def test_decodability_of_pixels_and_of_noise(trained):
    images, net, _, (sieve, params) = trained
    found = s.decodability(images, net, params, ["", "2"])
    assert found["cue"].shape == (3, 2, 2)
    assert found["cue"][..., 0].min() > 70 < found["digit"][..., 0].min()
    x, y, cue = images.parts["test"]
    mixed = s.CuedImages(images.data, [1, 2], sizes=(400, 100))
    mixed.parts["test"] = (x, y[:, torch.randperm(
        y.shape[1], generator=generator(0, "labels"))], cue)
    off = s.decodability(mixed, net, params, ["2"])
    assert off["digit"].max() < 20 < found["digit"][..., 1].min()


def test_known_groups_help(trained):
    images, net, _, (sieve, params) = trained
    _, fair = s.train_arms(images, net, "2", [s.Arm()], steps=120, dro=True)
    plain = s.group_scores(images, sieve, params)["conflict"][0]
    assert (s.group_scores(images, sieve, fair)["conflict"][0]
            > plain + 3).all()


@pytest.mark.parametrize(("call", "match"), [
    (lambda: s.matched_features(4, [(0,), ()]), "supports: got"),
    (lambda: s.matched_features(4, [(0, 4)]), "supports: got"),
    (lambda: s.matched_features(4, [(1, 1)]), "supports: got"),
    (lambda: s.feature_variance(torch.ones(8, 2), torch.ones(7, 1)),
     "features: got 7 samples for 8"),
    (lambda: s.feature_variance(torch.ones(8, 2), torch.ones(8, 1)),
     "features: one of them is constant"),
    (lambda: s.FeatureSieve(mlp([2, 3, 2], seed=0), "3"), "layer: got '3'"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def judged(claim, n=32, **means):
    """Verdict on evidence around 0, or around a mean where one is given."""
    rng, evidence = np.random.default_rng(0), {}
    for name, c in Claim.load(claim).criteria.items():
        mean = means.get(name, c.null)
        if c.estimator == "proportion":
            share = means.get(name, 1.0)
            evidence[name] = (np.arange(n) < share * n).astype(int)
        else:
            spread = 0.05 if c.unit in ("CKA", "log ratio") else 1.0
            evidence[name] = mean + spread * rng.standard_normal(n) * 0.5
    return Claim.load(claim).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


BIG = dict.fromkeys(("relu_xor", "relu_parity", "tanh_xor", "tanh_parity"),
                    1.4)


@pytest.mark.parametrize(("means", "verdict"), [
    (BIG, "reproduced"),
    (BIG | {"tanh_xor": 0.2}, "not reproduced"),
    (BIG | {"enough_relu": 0.6}, "inconclusive"),
    (BIG | {"tanh_xor": 0.2, "enough_relu": 0.6}, "inconclusive"),
    (BIG | {"same_relu": 0.4}, "invalid"),
    ({}, "not reproduced"),
])
def test_easy_variance_planted(means, verdict):
    assert judged("D062/easy-takes-more-variance", **means) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"narrows": 0.8}, "reproduced"),
    ({"narrows": -0.8}, "not reproduced"),
    ({}, "not reproduced"),
    ({"narrows": 0.8, "symmetric": 0.3}, "invalid"),
    ({"narrows": 0.8, "learned": 0.2}, "invalid"),
])
def test_order_planted(means, verdict):
    assert judged("D062/order-matters", **means) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"easy_shared": 0.2}, "reproduced"),
    ({}, "not reproduced"),
    ({"easy_shared": 0.2, "neither": 0.2}, "invalid"),
])
def test_similarity_planted(means, verdict):
    claim = "D062/similarity-sees-the-easy-feature"
    assert judged(claim, **means) == verdict


LIFTS = {"biased": 30, "over_plain": 8, "over_aux": 6, "last_layer": 3}


@pytest.mark.parametrize(("means", "verdict"), [
    (LIFTS, "reproduced"),
    (LIFTS | {"over_plain": 0}, "not reproduced"),
    (LIFTS | {"over_aux": 0}, "not reproduced"),
    (LIFTS | {"biased": 2}, "invalid"),  # no bias to remove
    (LIFTS | {"no_cue": 3}, "invalid"),
    (LIFTS | {"last_layer": -3}, "invalid"),
])
def test_sieve_planted(means, verdict):
    assert judged("D160/sieve-lifts-worst-group", **means) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"cue": 20, "digit": 5}, "reproduced"),
    ({"cue": 20, "digit": 0}, "not reproduced"),
    ({"cue": 0, "digit": 5}, "not reproduced"),
    ({"cue": 20, "digit": 5, "opposite": 0.6}, "inconclusive"),
    ({"cue": 20, "digit": 5, "random_cue": 8}, "invalid"),
])
def test_layers_planted(means, verdict):
    assert judged("D160/differential-suppression", **means) == verdict

