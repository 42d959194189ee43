"""Sharpness agrees with its definitions, and is invariant where it says."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.measure import sharpness as ms
from reappraisal.measure.curvature import Objective, sample_gradients

MEASURES = {
    "trace": lambda o: ms.hessian_trace(o).estimate,
    "top_eigenvalue": lambda o: ms.top_eigenvalue(o, tol=1e-9),
    "worst_case": lambda o: ms.worst_case(o, rho=0.1, steps=3),
    "adaptive_worst_case": lambda o: ms.worst_case(
        o, rho=0.5, steps=3, adaptive=True
    ),
    "average_case": lambda o: ms.average_case(o, rho=0.5).estimate,
    "adaptive_average_case": lambda o: ms.average_case(
        o, rho=0.5, adaptive=True
    ).estimate,
    "fisher_rao": ms.fisher_rao,
    "fisher_rao_published": ms.fisher_rao_published,
    "relative_flatness": ms.relative_flatness,
    "relative_flatness_published": ms.relative_flatness_published,
    "average_direction": ms.average_direction,
    "largest_rise": ms.largest_rise,
    "igs": ms.igs,
    "igs_published": lambda o: ms.igs(o, rank=3),
    "pac_bayes_sigma": lambda o: ms.pac_bayes_sigma(o, drop=0.2),
    "magnitude_aware_sigma": lambda o: ms.pac_bayes_sigma(
        o, drop=0.2, magnitude_aware=True
    ),
}


def batch(i, inputs, classes, n):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=g)


def rescaled(module, scales, one="3", two="5"):
    """The same ReLU network, hidden units scaled by positive numbers."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        a, b = twin.get_submodule(one), twin.get_submodule(two)
        a.weight *= scales[:, None]
        a.bias *= scales
        b.weight /= scales
    return twin


def permuted(module, order, one="3", two="5"):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        a, b = twin.get_submodule(one), twin.get_submodule(two)
        a.weight.copy_(a.weight[order])
        a.bias.copy_(a.bias[order])
        b.weight.copy_(b.weight[:, order])
    return twin


def net(i, sizes=(4, 6, 5, 3)):
    return models.mlp(list(sizes), seed=i).double()


def test_every_measure_is_declared():
    assert MEASURES.keys() == ms.INVARIANT.keys()


# directions are drawn per entry, so a permutation is another draw
SAMPLED = {
    "average_case", "adaptive_average_case", "average_direction",
    "largest_rise", "pac_bayes_sigma", "magnitude_aware_sigma",
}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["layers", "units"]),
    st.floats(0.05, 20.0),
    st.sampled_from([k for k, v in ms.INVARIANT.items() if v != "none"]),
)
def test_invariant_means_invariant(i, kind, factor, name):
    assume(not (kind == "units" and ms.INVARIANT[name] == "layers"))
    module, data = net(i), batch(i, 4, 3, 25)
    scales = torch.full((5,), factor, dtype=torch.float64)
    if kind == "units":
        scales = scales ** torch.linspace(-1, 1, 5, dtype=torch.float64)
    twin = rescaled(module, scales)
    torch.testing.assert_close(twin(data[0]), module(data[0]))
    f = MEASURES[name]
    one, two = f(Objective(module, data)), f(Objective(twin, data))
    rtol = 1e-4 if name.startswith(("igs", "magn")) else 1e-7
    torch.testing.assert_close(one, two, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize(
    "name", [k for k, v in ms.INVARIANT.items() if v != "units"]
)
def test_others_are_forged(name):
    module, data = net(3), batch(3, 4, 3, 60)
    optimiser = torch.optim.SGD(module.parameters(), 0.2, momentum=0.9)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(module(data[0]), data[1]).backward()
        optimiser.step()
    scales = torch.tensor([30.0, 30, 1, 1, 1 / 30], dtype=torch.float64)
    f, twin = MEASURES[name], rescaled(module, scales)
    one, two = f(Objective(module, data)), f(Objective(twin, data))
    assert abs(two / one - 1) > 0.02


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_permutations_change_nothing(i, order):
    module, data = net(i), batch(i, 4, 3, 25)
    one, two = Objective(module, data), Objective(
        permuted(module, list(order)), data
    )
    for name, f in MEASURES.items():
        if name not in SAMPLED:
            torch.testing.assert_close(
                f(one), f(two), rtol=1e-5, atol=1e-10, msg=name
            )


def test_members_are_what_they_are_alone():
    modules = [net(i) for i in range(3)]
    many, data = Ensemble.of(modules), batch(0, 4, 3, 30)
    together = Objective(many, data)
    for name, f in MEASURES.items():
        apart = torch.stack([f(Objective(m, data)) for m in modules])
        assert f(together).shape == (3,), name
        torch.testing.assert_close(
            f(together).double(), apart.double(), rtol=1e-6, atol=1e-9,
            msg=name,
        )
    line = ms.loss_slice(many, data, points=5).losses
    plane = ms.loss_slice(many, data, points=5, directions=2)
    ends = ms.barrier(many, many[[1, 2, 0]], data, points=5)
    for i, m in enumerate(modules):
        torch.testing.assert_close(
            line[i], ms.loss_slice(m, data, points=5).losses
        )
        torch.testing.assert_close(
            plane.losses[i],
            ms.loss_slice(m, data, points=5, directions=2).losses,
        )
        torch.testing.assert_close(
            ends.losses[i],
            ms.barrier(m, modules[(i + 1) % 3], data, points=5).losses,
        )
    frame = ms.panel(many, data).to_frame()
    assert frame.shape == (3, 6) and np.isfinite(frame.to_numpy()).all()


def moved(module, e):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(twin.parameters()) + e
        nn.utils.vector_to_parameters(vector, twin.parameters())
    return twin


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 9]),
    st.sampled_from(["relu", "tanh", "gelu"]),
    st.booleans(),
    st.booleans(),
)
def test_against_the_definitions(i, n, act, one_class, zero):
    module = models.mlp([3, 4, 3], activation=act, seed=i).double()
    if zero:
        for p in module.parameters():
            p.data.zero_()
    x, y = batch(i, 3, 1 if one_class else 3, n)
    objective = Objective(module, (x, y))
    value = F.cross_entropy(module(x), y)

    def rise(e):
        return F.cross_entropy(moved(module, e)(x), y) - value

    g = torch.cat(
        [
            v.flatten()
            for v in torch.autograd.grad(value, list(module.parameters()))
        ]
    )
    theta = objective.theta[0]
    if g.norm() > 1e-9:
        torch.testing.assert_close(
            ms.worst_case(objective, rho=0.1), rise(0.1 * g / g.norm()),
            rtol=1e-6, atol=1e-12,
        )
    own = theta.abs() * g
    if own.norm() > 1e-9:
        e = 0.5 * theta.abs() * own / own.norm()
        torch.testing.assert_close(
            ms.worst_case(objective, rho=0.5, adaptive=True), rise(e),
            rtol=1e-6, atol=1e-12,
        )
    f = module(x)
    inner = (f.softmax(-1) * f).sum(-1) - f[torch.arange(n), y]
    torch.testing.assert_close(
        ms.fisher_rao_published(objective),
        3 * inner.square().mean().sqrt(),
    )
    w, phi = module[-1].weight, module[:-1](x)
    p = f.softmax(-1)
    spread = (p * w.square().sum(-1)).sum(-1) - (p @ w).square().sum(-1)
    torch.testing.assert_close(
        ms.relative_flatness(objective),
        (phi.square().sum(-1) * spread).mean(),
    )
    assert (ms.fisher_rao(objective, labels="model") >= 0).all()
    rises = ms.random_rises(objective, draws=3, seed=i)
    assert ms.n_direction(objective, draws=3, seed=i) == rises.max()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_closed_form_of_homogeneous_networks(i, hidden):
    sizes = [4] + [5] * hidden + [3]
    module = models.mlp(sizes, bias=False, seed=i).double()
    data = batch(i, 4, 3, 12)
    layers = hidden + 1
    torch.testing.assert_close(
        ms.fisher_rao_published(module, data) * layers / (layers + 1),
        ms.fisher_rao(module, data),
    )
    torch.testing.assert_close(
        ms.fisher_rao_published(module, data, factor=layers),
        ms.fisher_rao(module, data),
    )


def test_more_steps_never_give_less():
    module, data = net(0), batch(0, 4, 3, 40)
    for adaptive in (False, True):
        values = [
            ms.worst_case(module, data, rho=1.0, steps=k, adaptive=adaptive)
            for k in (1, 2, 5, 20)
        ]
        assert values == sorted(values)
        assert values[-1] > values[0]
    many = ms.random_rises(module, data, rho=1.0, draws=200)
    assert many.max() < ms.worst_case(module, data, rho=1.0, steps=20)


def published_flatness(module, data, rows):
    """Layers changed in place, Hessians from autograd: the long way."""
    twin = copy.deepcopy(module)
    x, y = data
    one, two = twin[3], twin[5]
    with torch.no_grad():
        sd = twin[:5](x).std(0, correction=0)
        keep = sd != 0
        one.weight[keep] /= sd[keep, None]
        one.bias[keep] /= sd[keep]
        two.weight *= sd
    w, total = two.weight.detach(), 0.0
    for bx, by in zip(x.split(rows), y.split(rows), strict=True):
        phi = twin[:5](bx).detach()

        def head(v, phi=phi, by=by):
            return F.cross_entropy(phi @ v.T + two.bias, by)

        H = torch.autograd.functional.hessian(head, w)
        total += torch.einsum("ikjk,il,jl->", H, w, w)
    return total


@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
def test_relative_flatness_as_published(constant):
    module, data = net(1), batch(1, 4, 3, 50)
    if constant is not None:  # a dead unit, and one that is always on
        with torch.no_grad():
            module[3].weight[2] = 0
            module[3].bias[2] = constant
    torch.testing.assert_close(
        ms.relative_flatness_published(module, data, rows=16),
        published_flatness(module, data, 16),
    )


def test_fisher_norms_of_inverse():
    module, data = net(2, (3, 4, 3)), batch(2, 3, 3, 40)
    Fisher = ms.gauss_newton(module, data).dense()
    g = sample_gradients(module, data)
    inverse = torch.linalg.pinv(Fisher, rtol=1e-10, hermitian=True)
    want = torch.einsum("np,pq,nq->n", g, inverse, g).mean()
    torch.testing.assert_close(ms.igs(module, data), want)
    values, vectors = torch.linalg.eigh(Fisher)
    for rank in (1, 3):
        inner = (g @ vectors[:, -rank:]).square() / values[-rank:]
        torch.testing.assert_close(
            ms.igs(module, data, rank=rank), inner.sum(-1).mean()
        )
    halves = [ms.igs(module, (data[0][s], data[1][s]), rank=2)
              for s in (slice(16), slice(16, 32))]
    torch.testing.assert_close(
        ms.igs(module, data, rank=2, rows=16, batches=2),
        torch.stack(halves).mean(),
    )


def test_wide_networks_reduce_igs_to_probabilities():
    module, data = net(0, (6, 80, 3)), batch(0, 6, 3, 10)
    p = module(data[0]).softmax(-1)[torch.arange(10), data[1]]
    torch.testing.assert_close(ms.igs(module, data), ((1 - p) / p).sum())


def test_sigma_is_where_accuracy_drops():
    module = models.mlp([2, 2], bias=False, seed=0).double()
    with torch.no_grad():
        module[-1].weight.copy_(torch.eye(2))
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=g)
    x = F.one_hot(y, 2).double()
    # wrong when the noise of one class exceeds its margin of 1
    sigma = ms.pac_bayes_sigma(module, (x, y), drop=0.1, draws=4000)
    below = torch.distributions.Normal(0.0, 2**0.5).cdf
    assert below(-1 / sigma) == pytest.approx(0.1, abs=0.015)
    sure = ms.pac_bayes_sigma(module, (x, 0 * y), drop=0.9)
    assert sure == 10.0  # nothing to lose


def test_buffers_are_disturbed_only_on_request():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    models.reset(module, 0)
    module.train()(torch.randn(50, 3, generator=torch.Generator()) * 2)
    data = batch(0, 3, 3, 20)
    data = data[0].float(), data[1]
    before = copy.deepcopy(module.state_dict())
    one = ms.random_rises(module, data, draws=3)
    two = ms.random_rises(module, data, draws=3, buffers=True)
    assert not torch.equal(one, two)
    assert ms.average_direction(module, data) > 0
    after = module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert module.training


def test_filters_keep_their_size():
    module, data = net(0), batch(0, 4, 3, 20)
    objective = Objective(module, data)
    z = torch.randn(2, objective.size, generator=torch.Generator()).double()
    d = ms._filter_normalised(objective, z)
    for name, v in objective.named(d).items():
        w = objective.named(objective.theta)[name]
        if w.ndim == 3:
            torch.testing.assert_close(
                v.norm(dim=-1), w[:, None].norm(dim=-1).expand(1, 2, -1)
            )
        else:
            assert (v == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_barriers(i):
    a, b, data = net(i), net(i + 1), batch(i, 4, 3, 30)
    found = ms.barrier(a, b, data)
    back = ms.barrier(b, a, data)
    assert found.loss >= 0 and found.accuracy >= 0
    torch.testing.assert_close(found.losses, back.losses.flip(0))
    torch.testing.assert_close(found.loss, back.loss)
    assert ms.barrier(a, a, data).loss < 1e-12
    convex = models.mlp([4, 3], seed=i).double()
    other = models.mlp([4, 3], seed=i + 1).double()
    assert ms.barrier(convex, other, data).loss < 1e-12
    assert ms.barrier(a, b, (data[0], data[0][:, :3]), "mse").accuracy is None


def test_same_seed_same_bits():
    module, data = net(0), batch(0, 4, 3, 20)
    data = data[0], module(data[0]).argmax(-1)
    state = torch.random.get_rng_state()
    for f in (
        lambda s: ms.random_rises(module, data, seed=s),
        lambda s: ms.pac_bayes_sigma(module, data, seed=s),
        lambda s: ms.loss_slice(module, data, seed=s).losses,
    ):
        assert torch.equal(f(1), f(1)) and not torch.equal(f(1), f(2))
    assert torch.equal(state, torch.random.get_rng_state())


module, data = net(0), batch(0, 4, 3, 20)
BAD = {
    "rho": (lambda: ms.worst_case(module, data, rho=0.0), "rho: got 0"),
    "steps": (lambda: ms.worst_case(module, data, steps=0), "steps: got 0"),
    "draws": (lambda: ms.random_rises(module, data, draws=0), "draws: got 0"),
    "labels": (lambda: ms.fisher_rao(module, data, labels="x"), "'data' or"),
    "rank": (lambda: ms.igs(module, data, rank=0), "rank: got 0"),
    "drop": (lambda: ms.pac_bayes_sigma(module, data, drop=10), "drop"),
    "layer": (
        lambda: ms.relative_flatness(module, data, layer="3"), "last layer"
    ),
    "layer name": (
        lambda: ms.relative_flatness(module, data, layer="head"), "'head'"
    ),
    "no linear": (
        lambda: ms.relative_flatness(nn.Conv1d(1, 1, 1), data), "nn.Linear"
    ),
    "directions": (
        lambda: ms.loss_slice(module, data, directions=3), "1 or 2"
    ),
    "pair": (
        lambda: ms.barrier(module, net(0, (4, 6, 3)), data), "differ"
    ),
    "points": (
        lambda: ms.barrier(module, module, data, points=2), "points: got 2"
    ),
    "labels range": (
        lambda: ms.panel(module, (data[0], data[1] + 2)), "0 to 2"
    ),
    "empty": (lambda: ms.panel(module, []), "data: empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    act, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        act()


@pytest.mark.parametrize("shape", [(3, 20, 60), (2, 40, 30)])
def test_both_ways_to_singular_vectors_agree(shape):
    """Products of rows, as on a GPU, give what QR and SVD give."""
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(shape, generator=rng)
    A = A * torch.logspace(0, -3, shape[1])[:, None]
    (u, s), (v, t) = (ms._left_singular(A, gram) for gram in (False, True))
    k = min(shape[1:])
    torch.testing.assert_close(t[:, :k], s[:, :k], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        v[..., :10].square(), u[..., :10].square(), rtol=0, atol=1e-4
    )
    # double precision would lose half of its digits that way
    u, s = ms._left_singular(A.double(), True)
    assert torch.equal(s, ms._left_singular(A.double(), False)[1])
