"""Telescopes and smoothers against closed forms; planted verdicts."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingRegressor

from reappraisal.dynamics import telescoping_lens as t
from reappraisal.lab.ensemble import SGD, Adam, AdamW, train, untrained
from reappraisal.lab.models import generator, mlp
from reappraisal.measure.ntk import empirical_ntk
from reappraisal.protocol.claims import Claim


@pytest.fixture(scope="module")
def task():
    g = generator(0, "task")
    x = torch.randn(2, 30, 4, generator=g)
    return x, torch.sin(2 * x[..., :1])


def test_a_linear_model_telescopes_exactly_either_way(task):
    x, y = (v.double() for v in task)
    start = untrained(mlp([4, 1]), [1, 2], dtype=torch.float64)
    lens = t.Telescope(start.template, start.params, x)
    train(start, (x, y), per_member=("x", "y"), seeds=[1, 2], steps=30,
          loss="mse", optimiser=Adam(0.05), callbacks=lens, every=1)
    for guess in (lens.total, lens.once()):
        assert t.relative_error(guess, lens.actual()).max() < 1e-12
    assert t.relative_error(lens.start, lens.actual()).max() > 0.1


@pytest.mark.parametrize("optimiser", [
    SGD(0.05, momentum=0.8), AdamW(0.003, weight_decay=0.1)])
def test_sums_beat_one_linearisation_and_halve_with_the_step(task, optimiser):
    x, y = task
    start = untrained(mlp([4, 16, 1], "tanh"), [1, 2])
    lens = t.Telescope(start.template, start.params, x)
    train(start, (x, y), per_member=("x", "y"), seeds=[1, 2], steps=100,
          loss="mse", optimiser=optimiser, callbacks=lens, every=1)
    summed = t.relative_error(lens.total, lens.actual())
    assert (summed < 0.2 * t.relative_error(
        lens.once(), lens.actual())).all()
    # skipping every second record makes the steps twice as long
    coarse = t.Telescope(start.template, start.params, x)

    def sometimes(state):
        if state.step and state.step % 4 == 0:
            coarse.record(state.params)

    train(start, (x, y), per_member=("x", "y"), seeds=[1, 2], steps=100,
          loss="mse", optimiser=optimiser, callbacks=sometimes, every=1)
    assert (t.relative_error(coarse.total, coarse.actual())
            > 2 * summed).all()


def test_gradients_are_those_of_the_tangent_kernel(task):
    x, _ = task
    nets = untrained(mlp([4, 8, 1], "gelu"), [1, 2])
    G = t.sample_gradients(nets.template, nets.params, x)
    assert G.shape == (2, 30, 4 * 8 + 8 + 8 + 1)
    for i in range(2):
        torch.testing.assert_close(
            G[i] @ G[i].T, empirical_ntk(nets[i], x[i])[0],
            atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimiser", [
    SGD(0.05), SGD(0.02, momentum=0.9, weight_decay=0.1),
    Adam(0.01, weight_decay=0.1), AdamW(0.01, weight_decay=0.1)])
@pytest.mark.parametrize("batch", [None, 8])
def test_linear_model_unrolls_exactly(task, optimiser, batch):
    x, y = (v.double() for v in task)
    start = untrained(mlp([4, 1]), [1, 2], dtype=torch.float64)
    smooth = t.Smoother(start.template, start.params, x, y[:, :20, 0],
                        optimiser)

    def follow(state):
        if state.step < 25:
            smooth.step(state.params, state.batch.rows)

    end = train(start, (x[:, :20], y[:, :20]), per_member=("x", "y"),
                seeds=[1, 2], steps=25, loss="mse", optimiser=optimiser,
                batch_size=batch, callbacks=follow, every=1)
    for i in range(2):
        want = end.member(i)(x[i])[:, 0].detach()
        torch.testing.assert_close(smooth.predict()[i], want)


def test_weights_are_the_response_to_other_labels(task):
    """For SGD on a linear model the weights hold for any labels."""
    x, y = (v.double() for v in task)
    start = untrained(mlp([4, 1]), [1, 2], dtype=torch.float64)
    rule = SGD(0.05, weight_decay=0.05)
    smooth = t.Smoother(start.template, start.params, x, y[:, :20, 0], rule,
                        refresh=50)
    for _ in range(40):
        smooth.step(start.params)
    other = torch.randn(2, 20, 1, generator=generator(1, "other")).double()
    end = train(start, (x[:, :20], other), per_member=("x", "y"),
                seeds=[1, 2], steps=40, loss="mse", optimiser=rule)
    for i in range(2):
        want = end.member(i)(x[i])[:, 0].detach()
        got = smooth.weights[i] @ other[i, :, 0] + smooth.f[i, :, -1]
        torch.testing.assert_close(got, want)


def test_network_smoother_and_the_forgotten_preconditioner(task):
    x, y = task
    start = untrained(mlp([4, 16, 1], "tanh"), [1, 2])
    errors = []
    for rule in (AdamW(0.003), SGD(0.03)):
        smooth = t.Smoother(start.template, start.params, x, y[:, :20, 0],
                            rule)

        def follow(state, smooth=smooth):
            if state.step < 80:
                smooth.step(state.params)

        end = train(start, (x[:, :20], y[:, :20]), per_member=("x", "y"),
                    seeds=[1, 2], steps=80, loss="mse",
                    optimiser=AdamW(0.003), callbacks=follow, every=1)
        actual = torch.stack([end.member(i)(x[i])[:, 0] for i in range(2)])
        errors.append(t.relative_error(smooth.predict(), actual.detach()))
    assert (errors[0] < 0.03).all() and (errors[1] > 0.1).all()


def test_effective_parameters_of_known_smoothers():
    x = torch.randn(40, 7, generator=generator(0, "x")).double()
    hat = x @ torch.linalg.inv(x.T @ x) @ x.T
    assert t.effective_parameters(hat).item() == pytest.approx(7)
    assert t.effective_parameters(torch.eye(9)).item() == 9
    assert t.effective_parameters(torch.full((5, 9), 1 / 9)
                                  ).item() == pytest.approx(1)


def test_boosting_kernel_rebuilds_predictions():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 3)), rng.normal(size=90)
    gbt = GradientBoostingRegressor(n_estimators=15, random_state=0)
    gbt.fit(X[:60], y[:60])
    K = t.boosting_kernel(gbt, X, X[:60])
    assert K.shape == (15, 90, 60) and np.allclose(K.sum(-1), 1)
    assert (np.linalg.norm(K, axis=-1) <= 1).all()
    f = np.full(90, y[:60].mean())
    for k in K:
        f = f + gbt.learning_rate * k @ (y[:60] - f[:60])
    assert np.abs(f - gbt.predict(X)).max() < 1e-10


def test_irregular_rows_lie_outside_and_never_in_training():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 4)) * [3, 1, 1, 1]
    parts = t.by_irregularity(X, 1)
    every = np.concatenate(list(parts.values()))
    assert len(every) == len(set(every)) >= 199
    far = {k: np.abs(X[v, 0]).mean() for k, v in parts.items()}
    assert far["0"] < far["1"] < far["2"] < far["3"]
    assert np.abs(X[parts["train"], 0]).max() < far["2"]
    assert len(parts["0"]) == len(parts["again"])
    assert np.array_equal(parts["0"], t.by_irregularity(X, 1)["0"])
    assert not np.array_equal(parts["0"], t.by_irregularity(X, 2)["0"])
    assert np.array_equal(parts["3"], t.by_irregularity(X, 2)["3"])


def test_bad_input_is_named(task):
    x, y = task
    start = untrained(mlp([4, 3, 1]), [1, 2])

    def smoother(rule, **options):
        return t.Smoother(start.template, start.params, x, y[:, :20, 0],
                          rule, **options)

    with pytest.raises(ValueError, match="optimiser: got SGD"):
        smoother(SGD(0.1, momentum=0.9, nesterov=True))
    with pytest.raises(ValueError, match="optimiser: got SGD"):
        smoother(SGD([0.1, 0.2]))
    with pytest.raises(ValueError, match="refresh: got 0"):
        smoother(SGD(0.1), refresh=0)
    gbt = GradientBoostingRegressor(subsample=0.5, n_estimators=2).fit(
        x[0].numpy(), y[0, :, 0].numpy())
    with pytest.raises(ValueError, match="subsample 0.5"):
        t.boosting_kernel(gbt, x[0].numpy(), x[0].numpy())


def judged(slug, evidence, n):
    return Claim.load("D042/" + slug).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"slope": 0.8}, "inconclusive"),
    ({"slope": 0.5}, "not reproduced"),
    ({"ratio": -0.3}, "not reproduced"),
    ({"moved": 0.2}, "invalid"),
    ({"coarse": 0.2}, "invalid"),  # a method that cannot fail
    ({"linear": 1e-3}, "invalid"),
])
def test_accuracy_planted(change, verdict):
    rng = np.random.default_rng(0)
    means = {"ratio": 1.5, "slope": 1.0, "moved": 0.7, "coarse": 2} | change
    evidence = {k: rng.normal(v, 0.02, 20) for k, v in means.items()}
    evidence["linear"] = np.full(4, change.get("linear", 1e-15))
    assert judged("telescoping-is-accurate", evidence, 20) == verdict


@pytest.mark.parametrize(("closing", "large", "delayed", "inside", "found"), [
    (18, 12, 20, 20, "reproduced"),
    (4, 12, 20, 20, "not reproduced"),
    (18, 4, 20, 20, "not reproduced"),
    (13, 12, 20, 20, "inconclusive"),
    (18, 12, 4, 20, "invalid"),  # nothing groks
    (18, 12, 20, 2, "invalid"),  # a gap without a delay
])
def test_grokking_planted(closing, large, delayed, inside, found):
    rng = np.random.default_rng(0)
    evidence = {
        "closes": np.arange(20) < closing,
        "peak": (rng.normal(large, 1, 20), rng.normal(4, 0.5, 20)),
        "delayed": np.arange(20) < delayed,
        "inside": np.arange(20) < inside,
        "faithful": rng.normal(1, 0.1, 20),
    }
    assert judged("grokking-is-complexity-divergence", evidence, 20) == found


@pytest.mark.parametrize(("slope", "shift", "verdict"), [
    (1.0, 0.0, "reproduced"), (-1.0, 0.0, "not reproduced"),
    (1.0, 0.5, "invalid")])
def test_boosting_planted(slope, shift, verdict):
    rng = np.random.default_rng(0)
    where = np.repeat(np.arange(8), 4)
    x = rng.normal(size=32)
    y = slope * x + 0.4 * rng.normal(size=32)
    evidence = {"pooled": (x, y, where), "within": (x, y, where),
                "gap_again": rng.normal(shift, 0.02, 8),
                "ratio_again": rng.normal(0, 0.02, 8)}
    assert judged("kernel-norms-predict-boosting", evidence, 8) == verdict
