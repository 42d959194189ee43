"""Attacks against closed forms, exact distances and brute force."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from reappraisal.intervene.attack import (
    ORDERS,
    Attack,
    adversarial_training,
    closest,
    deepfool,
    exact_distance,
    fgsm,
    fgsm_line,
    ibp_radius,
    interval_bounds,
    minimal,
    pgd,
    project,
    shorten,
    size_of,
    steepest,
    towards,
)
from reappraisal.lab import models
from reappraisal.lab.ensemble import SGD, Ensemble, train
from reappraisal.measure.robustness import adversarial_accuracy, margins

NORMS = list(ORDERS)
SHORTEST = {
    "fgsm_line": fgsm_line,
    "deepfool": lambda m, x, y, norm: shorten(
        m, x, y, deepfool(m, x, y, norm)
    ),
    "minimal": minimal,
}


def small(seed=0, sizes=(4, 5, 3)):
    """A network with kinks, and inputs."""
    net = models.mlp(list(sizes), seed=seed).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    g = torch.Generator().manual_seed(seed)
    return net, torch.randn(6, sizes[0], generator=g).double()


def several(n=3):
    return Ensemble.of(
        [models.mlp([4, 6, 3], seed=s).double() for s in range(n)]
    )


def points(n=10, d=4):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, d, generator=g), torch.randint(
        0, 3, (n,), generator=g
    )


# balls


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 5))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_nearest_point(norm, seed, eps):
    g = torch.Generator().manual_seed(seed)
    v = 2 * torch.randn(3, 5, generator=g).double()
    p = project(v, eps, norm)
    assert (size_of(p, norm) <= eps + 1e-9).all()
    assert torch.allclose(project(p, eps, norm), p, atol=1e-12)
    # variational inequality: <v - p, q - p> <= 0 for all q in the ball
    q = torch.randn(300, 3, 5, generator=g).double()
    q = eps * q / size_of(q, norm, 2)[..., None]
    assert (((v - p) * (q - p)).sum(-1) <= 1e-9 * (1 + eps)).all()
    wide = project(v, math.inf, norm)
    assert torch.equal(wide, v)
    per = project(v, torch.tensor([0.0, eps, 100.0]), norm)
    assert torch.equal(per[0], 0 * v[0]) and torch.equal(per[2], v[2])


@pytest.mark.parametrize("norm", NORMS)
def test_images_and_leading_dimensions(norm):
    v = torch.randn(2, 3, 1, 4, 4)
    flat = project(v.flatten(2), 0.7, norm, 2)
    assert torch.allclose(project(v, 0.7, norm, 2), flat.view_as(v))
    assert torch.allclose(
        steepest(v, norm, 2), steepest(v.flatten(2), norm, 2).view_as(v)
    )
    assert steepest(0 * v, norm, 2).abs().max() == 0


# a given radius


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_what_an_attack_promises(attack, norm):
    nets = several()
    x, y = points()
    before = copy.deepcopy(nets.params)
    state = torch.get_rng_state()
    found = attack(nets, x, y, 0.3, norm, clip=(0.0, 1.0))
    assert (found.size <= 0.3 * (1 + 1e-5)).all()
    assert 0 <= found.x_adv.min() and found.x_adv.max() <= 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in nets.params.items())
    for s in range(3):
        one = attack(nets.member(s), x, y, 0.3, norm, clip=(0.0, 1.0))
        assert torch.allclose(one.x_adv, found.x_adv[s], atol=1e-5)
        wrong = nets.member(s)(found.x_adv[s]).argmax(-1) != y
        assert torch.equal(wrong, found.success[s])


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_restarts_never_do_worse(norm):
    net, x = small(3)
    y = net(x).argmax(-1)

    def gap(a):
        z = net(a.x_adv).detach()
        rest = z.scatter(-1, y[:, None], -math.inf).amax(-1)
        return rest - z.gather(-1, y[:, None])[:, 0]

    one = pgd(net, x, y, 0.4, norm, restarts=1)
    two = pgd(net, x, y, 0.4, norm, restarts=3, seed=5)
    none = gap(Attack(x, x[:, 0], x[:, 0] > 0, norm))
    assert (gap(one) >= none - 1e-9).all()
    assert (gap(two) >= gap(one) - 1e-9).all()
    again = pgd(net, x, y, 0.4, norm, restarts=3, seed=5)
    assert torch.equal(two.x_adv, again.x_adv)


@pytest.mark.parametrize("norm", NORMS)
def test_optimal_on_a_linear_network(norm):
    net = models.mlp([5, 2], seed=0).double()
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)
                    ).double()
    m = margins(net, x, norm).input
    for eps in (0.1, 0.5, 1.0):
        for attack in (fgsm, pgd):
            found = attack(net, x, None, eps, norm)
            assert torch.equal(found.success, m < eps)


def test_a_saturated_softmax_does_not_hide():
    nets = several()
    x, _ = points(40)
    y = nets.member(0)(x.double()).argmax(-1)
    net = nets.member(0)
    with torch.no_grad():
        net[-1].weight.mul_(1e4)
        net[-1].bias.mul_(1e4)
    plain = pgd(nets.member(0), x, y, 0.5)
    hot = pgd(net, x, y, 0.5)
    masked = pgd(net, x, y, 0.5, loss="cross_entropy")
    assert torch.allclose(plain.rate, hot.rate, atol=0.05)
    assert masked.rate < hot.rate - 0.2


def test_targets():
    nets = several()
    x, y = points(20)
    goal = torch.stack([(y + s) % 3 for s in range(3)])  # own targets
    found = towards(nets, x, goal, 3.0, "l2", 30)
    assert (found.size <= 3.0 + 1e-5).all()
    for s in range(3):
        said = nets.member(s)(found.x_adv[s]).argmax(-1)
        assert torch.equal(said == goal[s], found.success[s])
    assert found.rate.mean() > 0.5
    step = fgsm(nets, x, goal, 0.01, targeted=True)
    assert (step.size > 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_captum_takes_the_same_step(norm):
    robust = pytest.importorskip("captum.robust")
    net = models.mlp([4, 6, 3], seed=2)
    x, y = points()
    loss = nn.CrossEntropyLoss(reduction="none")
    if norm == "linf":
        theirs = robust.FGSM(net, loss_func=loss).perturb(x, 0.1, y)
        ours = fgsm(net, x, y, 0.1, loss="cross_entropy").x_adv
        assert torch.allclose(ours, theirs, atol=1e-6)
    else:
        theirs = robust.PGD(net, loss_func=loss).perturb(
            x, 0.3, 0.05, 12, y, norm="L2"
        )
        ours = pgd(net, x, y, 0.3, "l2", step=0.05, steps=12)
        told = net(theirs).argmax(-1) != y
        assert ours.rate >= told.double().mean()


# the shortest


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", list(SHORTEST))
@pytest.mark.parametrize("seed", range(3))
def test_never_below_the_exact_distance(name, norm, seed):
    net, x = small(seed)
    found = SHORTEST[name](net, x, None, norm)
    truth = exact_distance(net, x, None, norm)
    assert (found.distance >= truth - 1e-6).all()
    radius = ibp_radius(net, x, net(x).argmax(-1))
    assert (radius <= truth + 1e-6).all()
    for attack in (fgsm, pgd):  # and nothing succeeds within it
        i = int(truth.argmin())
        inside = 0.99 * float(truth[i])
        assert not attack(net, x[i : i + 1], None, inside, norm).success


@pytest.mark.parametrize("norm", NORMS)
def test_minimal_is_close_to_exact(norm):
    ratios = []
    for seed in range(4):
        net, x = small(seed)
        best = closest(
            minimal(net, x, None, norm), fgsm_line(net, x, None, norm),
            shorten(net, x, None, deepfool(net, x, None, norm)),
        )
        truth = exact_distance(net, x, None, norm)
        both = best.distance.isfinite() & truth.isfinite()
        ratios.append((best.distance / truth)[both])
    ratio = torch.cat(ratios)
    assert ratio.median() < 1.02 and (ratio > 1 - 1e-6).all()


def test_the_two_exact_solvers_against_a_general_one():
    net, x = small(5, (2, 4, 2))
    y = net(x).argmax(-1)
    grid = torch.linspace(-6, 6, 1201).double()
    moves = torch.cartesian_prod(grid, grid)
    for i in range(3):
        bad = net(x[i] + moves).argmax(-1) != y[i]
        for norm, order in ORDERS.items():
            if not bad.any():
                continue
            near = torch.linalg.vector_norm(moves[bad], order, dim=1).min()
            truth = exact_distance(net, x[i : i + 1], None, norm)
            assert truth - 1e-9 <= near <= truth + 0.03


def test_an_equation_with_constraints_by_slsqp():
    net = models.mlp([3, 3], seed=0).double()
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)
                    ).double()
    W, b = (p.detach().numpy() for p in net[-1].parameters())
    z = W @ x[0].numpy() + b
    y = z.argmax()
    best = min(
        np.sqrt(minimize(
            lambda d: d @ d, np.ones(3), method="SLSQP",
            constraints={"type": "ineq", "fun": lambda d, j=j: (
                (W[j] - W[y]) @ d + z[j] - z[y])},
        ).fun)
        for j in range(3) if j != y
    )
    assert abs(exact_distance(net, x, None, "l2")[0] - best) < 1e-5


def test_wrong_answers_need_no_move():
    net, x = small(0)
    y = (net(x).argmax(-1) + 1) % 3
    for norm in NORMS:
        assert (exact_distance(net, x, y, norm) == 0).all()
        for attack in SHORTEST.values():
            found = attack(net, x, y, norm)
            assert found.success.all() and (found.size == 0).all()
    assert (ibp_radius(net, x, y) == 0).all()


def test_bounds_hold_and_members_are_a_loop():
    nets = several()
    x, y = points()
    low, high = x - 0.2, x + 0.2
    bounds = interval_bounds(nets, low, high)
    for s in range(3):
        net = nets.member(s)
        one = interval_bounds(net, low, high)
        for a, b in zip(bounds, one, strict=True):
            assert torch.allclose(a[0][s], b[0])
        inside = low + 0.4 * torch.rand(200, *x.shape)
        z = net(inside.flatten(0, 1).double()).view(200, len(x), -1).double()
        assert (z >= one[-1][0] - 1e-5).all()
        assert (z <= one[-1][1] + 1e-5).all()
        assert torch.allclose(
            ibp_radius(nets, x, y)[s], ibp_radius(net, x, y)
        )
        for norm, attack in itertools.product(NORMS, SHORTEST.values()):
            many, alone = (attack(m, x, y, norm) for m in (nets, net))
            assert torch.allclose(many.size[s], alone.size, atol=1e-3)


def test_shorten_and_closest():
    net, x = small(1)
    y = net(x).argmax(-1)
    wide = deepfool(net, x, y, overshoot=0.5)
    near = shorten(net, x, y, wide)
    assert (near.size <= wide.size).all() and near.success.all()
    best = closest(wide, near)
    assert torch.equal(best.size, near.size)
    miss = Attack(x, torch.zeros(6).double(), torch.zeros(6).bool(), "l2")
    assert torch.equal(closest(miss, near).size, near.size)
    assert torch.equal(shorten(net, x, y, miss).x_adv, x)
    assert len(best.to_frame()) == 6


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8),
                      nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)),
        models.resnet(seed=0),
        nn.Sequential(nn.Flatten(1, 2),
                      models.Attention(8, 2, causal=False),
                      nn.Flatten(), nn.Linear(64, 3)),
    ],
)
def test_any_architecture_is_left_untouched(net):
    net = net.train()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(4, 1, 8, 8)
    y = torch.zeros(4).long()
    for found in (
        fgsm(net, x, y, 0.1), pgd(net, x, y, 0.1, steps=2),
        deepfool(net, x, None, steps=3), minimal(net, x, steps=3),
        fgsm_line(net, x, None),
    ):
        assert found.x_adv.shape == x.shape
        assert not found.x_adv.requires_grad
    assert net.training
    assert all(
        p.requires_grad and (p.grad == 1).all() for p in net.parameters()
    )
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])


def test_training_against_it_helps_and_leaves_the_start():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = 0.3 * torch.randn(200, 20, generator=g)
    x[:, 0] = 2.0 * y - 1  # far apart
    x[:, 1:] += 0.15 * (2.0 * y - 1)[:, None]  # many weak cues
    start = train(
        models.mlp([20, 2]), (x, y), seeds=range(3), steps=100,
        optimiser=SGD(0.3),
    )
    before = copy.deepcopy(start.params)
    kwargs = {"rounds": 20, "steps": 10, "optimiser": SGD(0.3)}
    tough = adversarial_training(start, (x, y), 0.3, **kwargs)
    again = adversarial_training(start, (x, y), 0.3, **kwargs)
    left = [
        adversarial_accuracy(m, (x, y), pgd, [0.3]).accuracy[:, 0]
        for m in (start, tough)
    ]
    assert (left[1] > left[0]).all()
    for k, v in tough.params.items():
        assert torch.equal(v, again.params[k])
        assert torch.equal(before[k], start.params[k])
    assert tough.seeds == start.seeds


BAD = {
    "norm": (lambda m, x, y: pgd(m, x, y, 1, "l3"), "norm: got 'l3'"),
    "eps": (lambda m, x, y: fgsm(m, x, y, 0), "eps: got 0"),
    "nan": (lambda m, x, y: fgsm(m, x * math.nan, y, 1), "X: got"),
    "empty": (lambda m, x, y: fgsm(m, x[:0], y[:0], 1), "X: got"),
    "tokens": (lambda m, x, y: fgsm(m, x.long(), y, 1), "inputs are"),
    "half": (lambda m, x, y: fgsm(m.half(), x, y, 1), "float16"),
    "labels": (lambda m, x, y: fgsm(m, x, y + 5, 1), "y: labels"),
    "shape": (lambda m, x, y: fgsm(m, x, y[:3], 1), "y: got shape"),
    "loss": (lambda m, x, y: fgsm(m, x, y, 1, loss="x"), "loss: got"),
    "clip": (lambda m, x, y: fgsm(m, x, y, 1, clip=(0, 0.5)), "clip"),
    "steps": (lambda m, x, y: pgd(m, x, y, 1, steps=0), "steps: got 0"),
    "restarts": (lambda m, x, y: pgd(m, x, y, 1, restarts=0), "restarts"),
    "step": (lambda m, x, y: pgd(m, x, y, 1, step=-1), "eps: got -1"),
    "no target": (
        lambda m, x, y: towards(m, x, None, 1), "targets are needed"),
    "overshoot": (
        lambda m, x, y: deepfool(m, x, y, overshoot=-1), "overshoot"),
    "projection": (lambda m, x, y: project(x, -1, "l2"), "eps: neg"),
    "boxes": (lambda m, x, y: interval_bounds(m, x, x - 1), "low, high"),
    "architecture": (
        lambda m, x, y: ibp_radius(models.convnet(seed=0), x, y), "model:"),
    "tanh": (
        lambda m, x, y: exact_distance(
            models.mlp([4, 3, 3], activation="tanh", seed=0), x), "ReLU"),
    "large": (
        lambda m, x, y: exact_distance(
            models.mlp([4, 15, 3], seed=0), x, y, "l2"), "15 hidden"),
    "limit": (
        lambda m, x, y: exact_distance(m, x, y, limit=torch.ones(2)),
        "limit: got"),
    "nothing to choose": (lambda m, x, y: closest(), "attacks: 0"),
    "no ensemble": (
        lambda m, x, y: adversarial_training(
            m, (x, y), 1, rounds=1, steps=1, optimiser=SGD(0.1)),
        "an Ensemble"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(models.mlp([4, 5, 3], seed=0), *points())
