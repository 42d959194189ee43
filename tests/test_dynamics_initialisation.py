"""Equations against networks and quadrature; verdicts on planted effects."""

import math

import numpy as np
import pytest
import torch

from reappraisal.dynamics import initialisation_decides_specialisation as o
from reappraisal.dynamics.optimal_replay_protocol import two_tasks
from reappraisal.lab import data, models
from reappraisal.lab.committee import Committee, Overlaps, i2
from reappraisal.lab.ensemble import untrained, vmapped
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim

EYE = torch.eye(2, dtype=torch.float64)
HEAD = torch.tensor([[[0.1, -0.05]], [[0.02, 0.1]]], dtype=torch.float64)


def some(width=(0.1, 0.42), angle=(0.2, 0.7), seeds=(1, 2), **options):
    return o.starts(
        torch.tensor(width), torch.tensor(angle), seeds, **options
    )


def test_starts_have_one_size_and_the_scales_asked_for():
    s = some((0.05, 0.2, 1.0), (0.1, 0.4, math.pi / 4), (1, 2, 3), size=0.3)
    out = (s.v @ i2(s.Q) @ s.v.mT).sqrt()
    torch.testing.assert_close(out, torch.full_like(out, 0.3))
    assert (o.imbalance(s).diff() < 0).all()
    assert (o.entropy(s).diff() > 0).all()
    assert o.entropy(s)[-1].item() == pytest.approx(1.0)
    one_unit = Overlaps(s.Q, s.R, torch.tensor([[[1.0, 0.0]]]).expand(3, 1, 2))
    assert o.entropy(one_unit).abs().max() == 0
    again = some((0.05, 0.2, 1.0), (0.1, 0.4, math.pi / 4), (1, 2, 3),
                 size=0.3)
    assert torch.equal(s.R, again.R)


def scored(R, units=2):
    s = Overlaps(EYE, torch.tensor(R).double(), torch.ones(1, 2).double())
    return o.specialisation(s, units).item()


def test_specialisation_by_hand():
    r = 0.5**0.5
    assert scored([[1, 0], [0, 1]]) == scored([[0, -1], [1, 0]]) == 1
    assert scored([[r, r], [r, -r]]) == pytest.approx(0)
    assert scored([[1, 0], [1, 0]]) == 0  # both on one teacher unit
    assert scored([[0, 0], [0, 0]]) == 0
    assert scored([[1, 0], [0, 0]], 1) == 1
    assert scored([[r, 0], [-r, 0]], 1) == pytest.approx(0)


def test_the_step_is_short_enough():
    task = Committee(EYE, torch.ones(1, 2, dtype=torch.float64))
    s = some((0.1, 0.25, 0.42), (0.15, 0.4, 0.75), (1, 2, 3))
    a, b = (
        o.specialisation(task.integrate(s, torch.ones(n, 1), 60 / n).last)
        for n in (120, 480)
    )
    assert (a - b).abs().max() < 0.01


def test_linear_loss_and_rates_are_those_of_the_weights():
    g = torch.Generator().manual_seed(0)
    W, Z = (torch.randn(2, 30, generator=g).double() for _ in range(2))
    v, u = torch.randn(2, generator=g).double(), torch.tensor([1.0, -0.5])
    u, N = u.double(), 30
    line = o.Linear(Z @ Z.T / N, u[None], second_order=False)
    s = Overlaps(W @ W.T / N, W @ Z.T / N, v[None])
    gap = v @ W - u @ Z
    torch.testing.assert_close(line.losses(s)[0], gap @ gap / N / 2)
    got = line.rates(s, torch.ones(1))
    dW = -v[:, None] * gap
    torch.testing.assert_close(got.R, dW @ Z.T / N)
    torch.testing.assert_close(got.Q, (dW @ W.T + W @ dW.T) / N)
    torch.testing.assert_close(got.v[0], -W @ gap / N)


def test_partial_slopes_are_least_squares():
    g = torch.Generator().manual_seed(0)
    a, e = torch.randn(2, 50, generator=g).double()
    b = 0.7 * a + e
    y = 2 * a - b + torch.randn(50, generator=g).double()
    z = torch.stack([(t - t.mean()) / t.std() for t in (a, b)], 1).numpy()
    for spread in (None, 3.0):
        size = y.std().item() if spread is None else spread
        want = np.linalg.lstsq(
            z, ((y - y.mean()) / size).numpy(), rcond=None)[0][0]
        d = o.partial(a, b, y, spread)
        assert d["x"] @ d["y"] / (d["x"] @ d["x"]) == pytest.approx(want)


def test_the_second_teacher_has_the_similarity():
    s = some()
    both = o.second_task(s, [0.0, 0.6, 1.0], HEAD)
    assert both.v.shape == (3, 2, 2, 2)
    want = 0.6 * s.R[..., 0] + 0.8 * s.R[..., 1]
    torch.testing.assert_close(both.R[1, ..., 1], want)
    torch.testing.assert_close(both.R[2, ..., 1], s.R[..., 0])


def test_networks_forget_as_the_equations_say():
    s, grid = o.until_loss(some()), [0.0, 0.5, 1.0]
    want, losses = o.forgetting(
        two_tasks(grid), o.second_task(s, grid, HEAD), span=5.0)
    nets = torch.stack([
        o.simulated_forgetting(s, grid, HEAD, 150, k, span=5.0)
        for k in range(2)
    ])
    assert nets.shape == (2, 3, 2) and losses.shape == (3, 2, 2)
    assert (nets.mean(0) - want).abs().max() < 0.03


def test_springs_equal_a_penalty_on_weights():
    """Online SGD with EWC's penalty on every weight, against the equations."""
    N, span, strength = 400, 4.0, 2.0
    s = o.until_loss(some())
    held, inside = o.anchored(
        two_tasks([0.5]), o.second_task(s, [0.5], HEAD),
        strength * o.fisher(s),
    )
    want, _ = o.forgetting(held, inside, span, dt=0.1)
    free, _ = o.forgetting(
        two_tasks([0.5]), o.second_task(s, [0.5], HEAD), span)
    b = o.second_task(s, [0.5], HEAD)
    T = two_tasks([0.5]).T[0, 0]
    for k in range(2):
        Q, R = b.Q[0, k], b.R[0, k]
        C = torch.cat([torch.cat([Q, R], -1), torch.cat([R.mT, T], -1)], -2)
        size, vectors = torch.linalg.eigh(C)
        root = vectors * size.clamp(min=0).sqrt()
        found = []
        for seed in range(2):
            g = generator(seed, "penalty")
            frame = torch.linalg.qr(torch.randn(
                N, 4, generator=g, dtype=torch.float64)).Q.T
            W, Z = (root @ frame * N**0.5).split(2)
            place, v = W.clone(), b.v[0, k, 1].clone()
            old = b.v[0, k, 0]
            F_ = o.fisher(s)[k][:, None]
            X = torch.randn(
                round(span * N), N, generator=g, dtype=torch.float64)
            for x in X:
                lam = W @ x / N**0.5
                out = torch.erf(lam / 2**0.5)
                delta = v @ out - torch.erf(Z[1] @ x / (2 * N) ** 0.5)
                slope = (2 / math.pi) ** 0.5 * torch.exp(-lam.square() / 2)
                step = (delta * v * slope)[:, None] * x / N**0.5
                # N times the Fisher information of one weight is F_
                W = W - step - strength * F_ * (W - place) / N
                v = v - delta * out / N
            end = Overlaps(W @ W.T / N, W @ Z.T / N, torch.stack([old, v]))
            one = Committee(T, EYE)
            before = Overlaps(Q, R, b.v[0, k])
            found.append((one.losses(end) - one.losses(before))[0])
        mean = torch.stack(found).mean()
        assert abs(mean - want[0, k]) < 0.25 * abs(want[0, k]) + 0.003
        assert abs(mean - want[0, k]) < abs(free[0, k] - want[0, k]) / 2


def test_springs_of_no_strength_and_of_great_strength():
    s = o.until_loss(some())
    plain, _ = o.forgetting(
        two_tasks([0.5]), o.second_task(s, [0.5], HEAD), dt=0.25)
    losses = o.consolidated(
        s, HEAD, 0.5, torch.tensor([[0.0], [0.5], [3.0]]))
    first = Committee(EYE, EYE[:1]).losses(s)[:, 0]
    torch.testing.assert_close(losses[0, :, 0] - first, plain[0])
    assert (losses[1:, :, 0] < losses[0, :, 0]).all()
    swapped = o.consolidated(
        s, HEAD, 0.5, torch.tensor([[0.0], [0.5]]), shuffled=True)
    torch.testing.assert_close(swapped[0], losses[0])
    assert (swapped[1] - losses[1]).abs().min() > 1e-6
    assert torch.equal(o.saved(losses)[0], torch.zeros(2).double())


def test_frozen_units_forget_nothing():
    s = o.second_task(o.until_loss(some()), [0.0, 0.5], HEAD)
    pair = two_tasks([0.0, 0.5])
    still = Committee(pair.T, pair.u, rate=0.0)
    lost, ends = o.forgetting(still, s)
    assert lost.abs().max() < 1e-12
    assert (ends[..., 1] < pair.losses(s)[..., 1]).all()


def students(seeds=(0, 1), similarity=0.5):
    net = models.mlp([64, 64, 4], seed=0)
    tasks = o.Labels(data.load("digits"), similarity, list(seeds))
    raw = untrained(net, list(seeds), "fresh", None, "cpu").tensors()
    return tasks, net, vmapped(net), raw


def test_rescaling_keeps_the_function():
    tasks, _, forward, raw = students()
    x = tasks.test[0][:, 0]
    for ratio in (0.3, 1.0, 4.0):
        p = o.rescaled(raw, ratio)
        torch.testing.assert_close(
            forward(p, x), forward(raw, x), atol=1e-5, rtol=1e-4)
        size = [p[n].flatten(1).norm(dim=1) for n in ("3.weight", "1.weight")]
        torch.testing.assert_close(
            size[0] / size[1], torch.full((2,), ratio**2))


def test_similarity_one_is_the_same_task():
    tasks, *_ = students(similarity=1.0)
    x, y = tasks.train
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(y[:, 0], y[:, 1])
    tasks, *_ = students(similarity=0.0)
    assert (tasks.train[1][:, 0] != tasks.train[1][:, 1]).float().mean() > 0.2


def test_digits_forget_and_ewc_protects():
    tasks, _, forward, raw = students()
    start = o.rescaled(raw, 1.0)
    kept = {k: v.clone() for k, v in start.items()}
    done = tasks.learn(start, forward, 0, 300, stop=0.3, rate=0.3)
    assert all(torch.equal(kept[k], start[k]) for k in kept)
    F_ = tasks.fisher(done, forward)
    assert all((v >= 0).all() for v in F_.values())
    ends = [
        tasks.losses(tasks.learn(
            done, forward, 1, 60, rate=0.3,
            penalty={k: s * v for k, v in F_.items()}), forward)
        for s in (0.0, 16.0)
    ]
    bare = tasks.learn(done, forward, 1, 60, rate=0.3)
    assert torch.equal(tasks.losses(bare, forward), ends[0])
    before = tasks.losses(done, forward)[:, 0]
    assert (ends[0][:, 0] > before).all()
    assert (ends[1][:, 0] < ends[0][:, 0]).all()
    # the head of task 1 is left alone
    assert torch.equal(bare["3.weight"][:, :2], done["3.weight"][:, :2])


def judged(slug, evidence, n):
    return Claim.load(f"B03/{slug}").judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)
    ).verdict


def planted(effect_b, effect_e, rng):
    b, e = torch.tensor(rng.normal(size=(2, 400)))
    y = effect_b * b + effect_e * e + torch.tensor(rng.normal(size=400))
    return {"imbalance": o.partial(b, e, y), "entropy": o.partial(e, b, y),
            "linear": o.partial(e, b, torch.tensor(
                rng.normal(0, 0.05, 400)), y.std().item())}


@pytest.mark.parametrize(("b", "e", "off", "moved", "verdict"), [
    (1.0, 1.0, 1, 0.0, "reproduced"),
    (-0.3, 1.0, 1, 0.0, "not reproduced"),
    (1.0, 1.0, 2, 0.0, "invalid"),  # networks differ from the equations
    (1.0, 1.0, 0, 0.01, "invalid"),  # numbering units matters
])
def test_regression_planted(b, e, off, moved, verdict):
    rng = np.random.default_rng(0)
    found = planted(b, e, rng) | {"matches": off, "relabelled": moved}
    assert judged("imbalance-and-entropy-specialise", found, 400) == verdict


def test_shuffled_starts_have_no_effect():
    """Which start led to which score is lost: nothing may be found."""
    rng = np.random.default_rng(2)
    b, e = torch.tensor(rng.normal(size=(2, 400)))
    y = (b + e)[torch.tensor(rng.permutation(400))]
    found = {"imbalance": o.partial(b, e, y), "entropy": o.partial(e, b, y),
             "linear": o.partial(e, b, 0.01 * y, 1.0), "matches": 0,
             "relabelled": 0.0}
    assert judged(
        "imbalance-and-entropy-specialise", found, 400) != "reproduced"


@pytest.mark.parametrize(("hump", "shared", "rank", "leak", "verdict"), [
    (0.1, -0.01, 1.0, 0.0, "reproduced"),
    (0.1, 0.1, 0.2, 0.0, "not reproduced"),  # the hump is everywhere
    (-0.1, -0.01, 1.0, 0.0, "not reproduced"),  # or the other way up
    (0.1, -0.01, 1.0, 0.01, "invalid"),  # frozen units forget
])
def test_hump_planted(hump, shared, rank, leak, verdict):
    rng = np.random.default_rng(1)
    found = {
        "over_unlike": rng.normal(hump, 0.01, 16),
        "over_same": rng.normal(hump, 0.01, 16),
        "monotone": np.clip(rng.normal(rank, 0.01, 32), 0, 1),
        "no_hump": {"a": rng.normal(0.1 * abs(hump), 0.001, 16),
                    "b": rng.normal(shared, 0.001, 16)},
        "sign_specialised": rng.normal(0.1, 0.01, 10),
        "sign_shared": rng.normal(0.1, 0.01, 10),
        "frozen": [leak], "continued": [0.0],
    }
    assert judged("hump-only-when-specialised", found, 64) == verdict


@pytest.mark.parametrize(("odes", "nets", "alike", "wrong", "verdict"), [
    (25.0, 25.0, 0.0, 0.0, "reproduced"),
    (0.0, 0.0, 0.0, 0.0, "not reproduced"),
    (25.0, 0.0, 0.0, 0.0, "inconclusive"),
    (25.0, 25.0, 0.5, 0.0, "invalid"),  # not equally trained
    (25.0, 25.0, 0.0, 40.0, "invalid"),  # any springs would do
])
def test_ewc_planted(odes, nets, alike, wrong, verdict):
    rng = np.random.default_rng(3)
    found = {
        "equations": rng.normal(odes, 5, 32), "digits": rng.normal(nets, 5, 32),
        "alike_equations": rng.normal(alike, 0.05, 32),
        "alike_digits": rng.normal(alike, 0.05, 32),
        "shuffled_equations": rng.normal(-wrong, 5, 32),
        "shuffled_digits": rng.normal(-wrong, 5, 32), "nothing": [0.0],
    }
    assert judged("ewc-likes-specialists", found, 32) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: o.until_loss(some(), loss=1e-9, span=1.0), "loss: got"),
    (lambda: o.Labels(data.load("digits"), 1.5, [0]), "similarity: got 1.5"),
    (lambda: o.rescaled({}, 0.0), "ratio: got 0.0"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
