"""Truncating trained weights: optimality, bounds, and the layers made of it."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reappraisal.intervene.truncate import (
    RULES,
    TensorTrain,
    TrainLinear,
    low_rank,
    matrix_train,
    plan,
    relative_error,
    second_moments,
    tensor_train,
    truncatable,
    truncate,
    tucker,
)
from reappraisal.lab.ensemble import SGD, Ensemble, train, untrained
from reappraisal.lab.models import mlp, resnet, transformer
from reappraisal.measure.reading import read_activations, read_outputs


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def product(W, k, G=None):
    return torch.matmul(*low_rank(W, k, G))


@pytest.mark.parametrize("seed", range(12))
def test_no_optimiser_finds_a_better_product(seed):
    rng = np.random.default_rng(seed)
    m, n, k = 4, 5, int(rng.integers(1, 3))
    W, X = normal(m, n, seed=seed), normal(n, 40, seed=seed + 100)
    X = X * torch.tensor(rng.uniform(0.05, 3, (n, 1)))
    if seed % 3 == 0:
        X = normal(n, 3, seed=7) @ X[:3]
    w, x = W.numpy(), X.numpy()

    def loss(z):
        A, B = z[: m * k].reshape(m, k), z[m * k :].reshape(k, n)
        gap = (A @ B - w) @ x
        left = gap @ x.T
        return (gap**2).sum(), 2 * np.concatenate(
            [(left @ B.T).ravel(), (A.T @ left).ravel()]
        )

    found = min(
        optimize.minimize(
            loss, rng.normal(size=k * (m + n)), jac=True, method="L-BFGS-B",
            options={"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10},
        ).fun
        for _ in range(4)
    )
    V = product(W, k, X @ X.T / 40)
    ours = float(((V - W) @ X).square().sum())
    assert ours <= found * (1 + 1e-6) + 1e-9
    assert ours >= found * (1 - 1e-3) - 1e-9


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 7), n=st.integers(1, 7), rank=st.integers(1, 8),
    r=st.integers(0, 7), seed=st.integers(0, 10**6),
)
def test_products_of_data_of_any_rank(m, n, rank, r, seed):
    W, X = normal(m, n, seed=seed), normal(n, r, seed=seed + 1)
    X = X @ normal(r, 20, seed=seed + 2)
    G = X @ X.T / 20
    A, B = low_rank(W, rank, G)
    k = min(rank, m, n)
    assert A.shape == (m, k) and B.shape == (k, n)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))
    best = torch.linalg.svdvals(W @ X)[k:].norm()
    assert abs(((A @ B - W) @ X).norm() - best) <= 1e-5 * (1 + W.norm())
    if k == min(m, n):
        torch.testing.assert_close(A @ B, W, rtol=1e-6, atol=1e-6)
    # the scale of the data does not matter
    torch.testing.assert_close(product(W, rank, 100 * G), A @ B,
                               rtol=1e-5, atol=1e-5)
    stack = low_rank(torch.stack([W, 2 * W]), rank, torch.stack([G, G]))
    torch.testing.assert_close(
        torch.matmul(*stack)[1], 2 * A @ B, rtol=1e-6, atol=1e-6
    )


def test_without_data_the_weight_counts():
    W = normal(5, 6)
    torch.testing.assert_close(
        product(W, 2, torch.zeros(6, 6)), product(W, 2)
    )
    torch.testing.assert_close(product(W, 2, torch.eye(6)), product(W, 2))
    assert product(W, 0.5).shape == W.shape
    half = low_rank(W.half(), 2)
    assert half[0].dtype == torch.float16


def test_relative_error_by_hand():
    W, X = normal(3, 4), normal(4, 9, seed=1)
    V = W + 0.1 * normal(3, 4, seed=2)
    want = (((V - W) @ X).norm() / (W @ X).norm())
    assert torch.isclose(relative_error(W, V, X @ X.T / 9), want)
    assert relative_error(0 * W, 0 * W) == 0
    assert relative_error(0 * W, W) == torch.inf


def nets():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 8, 8, generator=g)
    normed = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 9, 3, stride=2, dilation=2,
                                              padding=1),
        nn.Flatten(), nn.Linear(81, 3),
    )
    return {
        "norm and dropout": (normed, images),
        "residual": (resnet((1, 6, 6), classes=3), images),
        "attention": (transformer(8, 3, 8, 8, 2, 1, tokens=False),
                      images[:, 0]),
        "mlp": (mlp([64, 8, 3]), images),
        "one layer": (nn.Linear(8, 5), images),
    }


@pytest.mark.parametrize("method", ["matrix", "tucker"])
@pytest.mark.parametrize("name", nets())
def test_all_ranks_change_nothing(name, method):
    net, x = nets()[name]
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    twin = truncate(net, 1.0, method=method)
    assert twin.training and net.training
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    want, got = (copy.deepcopy(n).eval()(x) for n in (net, twin))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    small = truncate(net, 1, method=method)
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in net.parameters()
    )
    small.eval()(x).sum().backward()
    assert all(
        p.grad is not None for k, p in small.named_parameters()
    )


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("method", ["matrix", "tucker"])
def test_paddings_survive(mode, method):
    conv = nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode).double()
    x = normal(2, 3, 6, 5)
    torch.testing.assert_close(
        truncate(conv, 1.0, method=method)(x), conv(x)
    )
    G = second_moments(conv, x)[""]
    W = conv.weight.detach().flatten(1)
    outputs = conv(x) - conv.bias[:, None, None]
    rows = outputs.numel() / 5
    assert torch.isclose((W @ G @ W.T).trace(), outputs.square().sum() / rows)


def test_work_falls():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.zeros(1, 16, 10, 10)

    def work(module):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return counter.get_total_flops()

    per_pixel = 2 * 100
    assert work(conv) == per_pixel * 16 * 16 * 9
    assert work(truncate(conv, 4)) == per_pixel * (4 * 144 + 4 * 16)
    assert work(truncate(conv, (3, 4), method="tucker")) == per_pixel * (
        16 * 4 + 4 * 3 * 9 + 3 * 16
    )


def test_ensembles_are_their_members():
    nets = untrained(mlp([5, 7, 6, 3]).double(), [1, 2, 3])
    x = normal(40, 5)
    moments = second_moments(nets, (x, torch.zeros(40)), batch_size=11)
    small = truncate(nets, {"1": 2, "3": 0.5, "5": None}, moments=moments)
    assert isinstance(small, Ensemble) and small.seeds == (1, 2, 3)
    for s in range(3):
        one = nets.member(s)
        own = second_moments(one, x)
        for k, v in own.items():
            torch.testing.assert_close(moments[k][s], v)
        alone = truncate(one, {"1": 2, "3": 0.5}, moments=own)
        torch.testing.assert_close(small.member(s)(x), alone(x))
        torch.testing.assert_close(
            read_outputs(small, x).logits[s], alone(x).detach()
        )
    assert list(small.params) == [
        k for k, _ in small.template.named_parameters()
    ]
    again = train(small, (x, torch.zeros(40, dtype=torch.long)), steps=3,
                  optimiser=SGD(0.1))
    assert len(again) == 3
    kernels = untrained(
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(54, 2)),
        [1, 2],
    )
    images = normal(4, 2, 5, 5).float()
    for method in ("matrix", "tucker"):
        small = truncate(kernels, 2, method=method)
        for s in range(2):
            torch.testing.assert_close(
                small.member(s)(images),
                truncate(kernels.member(s), 2, method=method)(images),
                rtol=1e-4, atol=1e-5,
            )


def test_moments_are_those_of_activations():
    net, x = nets()["norm and dropout"]
    net.train()
    state = torch.get_rng_state()
    found = second_moments(net, x, ["6"], batch_size=4)["6"]
    inputs = read_activations(net, x, ["5"])["5"].double()
    torch.testing.assert_close(found, inputs.T @ inputs / len(x))
    assert net.training and not net[6]._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x):
            return self.inner(self.inner(x))

    net, x = Twice(), normal(7, 3)
    h = net.inner(x).detach()
    found = second_moments(net, x)["inner"]
    torch.testing.assert_close(found, (x.T @ x + h.T @ h) / 14)


def test_planted_rank_is_found_and_kept():
    net = mlp([20, 30, 30, 4]).double()
    for i, (name, r) in enumerate({"1": 3, "3": 2, "5": 1}.items()):
        layer = net.get_submodule(name)
        m, n = layer.weight.shape
        layer.weight.data = normal(m, r, seed=i) @ normal(r, n, seed=9 + i)
    cost = 3 * 50 + 2 * 60 + 1 * 34
    for rule in ("energy", "minimax", "greedy"):
        found = plan(net, cost, rule)
        assert found.ranks == {"1": 3, "3": 2, "5": 1}
        assert max(found.errors.values()) < 1e-6 and found.after == cost
    x = normal(8, 20)
    torch.testing.assert_close(truncate(net, found)(x), net(x))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), rule=st.sampled_from(sorted(RULES)),
    share=st.floats(0, 1),
)
def test_plans(seed, rule, share):
    net = mlp([9, 8, 7, 3], seed=seed % 1000).double()
    sizes = [w.shape for k, w in net.named_parameters() if "weight" in k]
    least = sum(min(m + n, m * n) for m, n in sizes)
    before = sum(m * n for m, n in sizes)
    budget = round(least + share * (before - least))
    found = plan(net, budget, rule)
    assert found.before == before and found.after <= budget
    small = truncate(net, found)
    count = sum(
        p.numel() for k, p in small.named_parameters() if "weight" in k
    )
    assert count == found.after
    # a larger budget takes nothing away
    for name, k in plan(net, before, rule).ranks.items():
        assert k is None and found.errors[name] >= 0
    more = plan(net, min(before, budget + 10), rule)
    for name, k in found.ranks.items():
        assert more.ranks[name] is None or more.ranks[name] >= k
    # the scale of a layer does not matter
    net[1].weight.data *= 7
    assert plan(net, budget, rule).ranks == found.ranks
    if rule == "energy":
        for name, k in found.ranks.items():
            W = net.get_submodule(name).weight.detach()
            if k is not None:
                torch.testing.assert_close(
                    relative_error(W, product(W, k)).item(),
                    found.errors[name],
                )


def test_plans_of_ensembles_and_outputs():
    nets = untrained(mlp([5, 7, 3]).double(), [1, 2])
    x = normal(30, 5) * torch.tensor([3.0, 1, 0.1, 0.1, 0.1])
    moments = second_moments(nets, x)
    found = plan(nets, 0.7, "energy", moments=moments)
    small = truncate(nets, found, moments=moments)
    for name in found.ranks:
        W = nets.params[f"{name}.weight"]
        lost = W - (
            small.params[f"{name}.1.weight"]
            @ small.params[f"{name}.0.weight"]
        )
        G = moments[name]
        parts = [
            torch.einsum("sij,sjk,sik->s", t, G, t).sum() for t in (lost, W)
        ]
        assert abs((parts[0] / parts[1]) ** 0.5 - found.errors[name]) < 1e-5
    assert "energy" in repr(found)
    assert list(found.to_frame()["rank"]) == list(found.ranks.values())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    data=st.data(), seed=st.integers(0, 10**6),
)
def test_tucker_bounds(shape, data, seed):
    T = normal(*shape, seed=seed)
    ranks = [
        data.draw(st.one_of(st.none(), st.integers(1, n + 1))) for n in shape
    ]
    start, found = (tucker(T, ranks, s) for s in (0, 8))
    tails = []
    for i, (n, U) in enumerate(zip(shape, found.factors, strict=True)):
        if U is None:
            assert found.core.shape[i] == n
            continue
        k = found.core.shape[i]
        torch.testing.assert_close(U.T @ U, torch.eye(k).to(U))
        s = torch.linalg.svdvals(T.movedim(i, 0).flatten(1))
        tails.append(float(s[k:].square().sum()))
    lost = [float((t.dense() - T).square().sum()) for t in (start, found)]
    slack = 1e-9 * (1 + float(T.square().sum()))
    assert lost[1] <= lost[0] + slack
    assert lost[0] <= sum(tails) + slack
    assert lost[1] >= max(tails, default=0) - slack
    assert len(found) == found.core.numel() + sum(
        U.numel() for U in found.factors if U is not None
    )
    if len(shape) > 1:
        again = tucker(torch.stack([T, 3 * T]), ranks, 8)
        torch.testing.assert_close(again.dense()[1], 3 * found.dense())


def test_tucker_of_planted_rank_is_exact():
    core = normal(2, 3, 3, 3)
    T = torch.einsum("abhw,oa,ib->oihw", core, normal(7, 2), normal(6, 3))
    found = tucker(T, (2, 3, None, None))
    torch.testing.assert_close(found.dense(), T)
    assert "core" in repr(found)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    cap=st.integers(1, 6), accuracy=st.floats(0, 0.9),
    seed=st.integers(0, 10**6),
)
def test_train_bounds(shape, cap, accuracy, seed):
    T = normal(*shape, seed=seed)
    found = tensor_train(T, cap)
    assert max(found.ranks) <= cap
    tails = [
        float(
            torch.linalg.svdvals(
                T.reshape(int(np.prod(shape[:i])), -1)
            )[k:].square().sum()
        )
        for i, k in enumerate(found.ranks, 1)
    ]
    lost = float((found.dense() - T).square().sum())
    slack = 1e-9 * (1 + float(T.square().sum()))
    assert max(tails) - slack <= lost <= sum(tails) + slack
    rough = tensor_train(T, accuracy=accuracy)
    assert (rough.dense() - T).norm() <= (accuracy + 1e-9) * T.norm() + 1e-9
    torch.testing.assert_close(tensor_train(T).dense(), T)
    assert len(found) == sum(c.numel() for c in found.cores)


def test_train_of_planted_rank_and_of_nothing():
    a, b, c = normal(1, 5, 2), normal(2, 6, 3, seed=1), normal(3, 4, 1)
    T = TensorTrain((a, b, c)).dense()
    assert tensor_train(T).ranks == (2, 3)
    assert tensor_train(torch.zeros(3, 4, 5)).ranks == (1, 1)
    assert tensor_train(torch.zeros(3, 4)).dense().shape == (3, 4)


def test_operators():
    W = normal(12, 18)
    found = matrix_train(W, (3, 2, 2), (3, 3, 2))
    torch.testing.assert_close(found.dense(), W)
    product_ = torch.kron(normal(3, 2), torch.kron(normal(2, 2), normal(2, 3)))
    assert matrix_train(product_, (3, 2, 2), (2, 2, 3)).ranks == (1, 1)
    p = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    errors = [
        relative_error(V, matrix_train(V, (3, 2, 2), (3, 3, 2), 2).dense())
        for V in (W, W[:, p])
    ]
    assert abs(errors[0] - errors[1]) > 1e-4
    torch.testing.assert_close(
        relative_error(W, product(W, 3)),
        relative_error(W[:, p], product(W[:, p], 3)),
    )


def test_train_layer():
    W, b = normal(12, 18), normal(12, seed=1)
    layer = TrainLinear(matrix_train(W, (3, 2, 2), (3, 3, 2), 3), b)
    x = normal(2, 5, 18, seed=2)
    dense = matrix_train(W, (3, 2, 2), (3, 3, 2), 3).dense()
    torch.testing.assert_close(layer(x), x @ dense.T + b)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    stack = Ensemble.of([layer, copy.deepcopy(layer)])
    torch.testing.assert_close(stack.predict(x[0])[1], layer(x[0]).detach())


def test_tensorly_agrees():
    tl = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker, tensor_train_matrix
    from tensorly.decomposition import tensor_train as theirs

    for seed in range(8):
        T = normal(6, 5, 3, 3, seed=seed)
        ours = tensor_train(T, (3, 4, 2)).dense().numpy()
        other = theirs(T.numpy(), (1, 3, 4, 2, 1)).to_tensor()
        np.testing.assert_allclose(ours, other, atol=1e-10)
        (core, parts), _ = partial_tucker(
            T.numpy(), rank=[3, 2], modes=[0, 1], n_iter_max=200, tol=1e-12
        )
        other = tl.tenalg.multi_mode_dot(core, parts, modes=[0, 1])
        ours = tucker(T, (3, 2, None, None), 200).dense().numpy()
        np.testing.assert_allclose(
            np.linalg.norm(ours - T.numpy()),
            np.linalg.norm(other - T.numpy()), rtol=1e-6,
        )
        W = T.reshape(18, 15)
        folded = W.reshape(3, 6, 5, 3)  # out, out, in, in
        other = tensor_train_matrix(folded.numpy(), (1, 4, 1)).to_matrix()
        ours = matrix_train(W, (3, 6), (5, 3), 4).dense().numpy()
        np.testing.assert_allclose(ours, other, atol=1e-10)


def test_names():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Conv2d(4, 4, 3, groups=2),
        nn.MultiheadAttention(4, 2), nn.Embedding(3, 3),
        nn.Sequential(nn.Conv2d(1, 1, 1)),
    )
    assert truncatable(net) == ["0", "4.0"]


def shared():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def poisoned():
    net = mlp([4, 4, 2])
    net[1].weight.data[0, 0] = torch.inf
    return net


W = normal(4, 6)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: low_rank(W, 0), "rank"),
        (lambda: low_rank(W, 1.5), "rank"),
        (lambda: low_rank(W, None), "rank"),
        (lambda: low_rank(W[0], 1), "weight"),
        (lambda: low_rank(W.long(), 1), "weight"),
        (lambda: low_rank(W * torch.nan, 1), "weight"),
        (lambda: low_rank(W, 1, torch.eye(4)), "moment"),
        (lambda: low_rank(W, 1, -torch.eye(6)), "moment"),
        (lambda: low_rank(W, 1, torch.ones(6, 6).triu()), "moment"),
        (lambda: relative_error(W, W[:3]), "approximation"),
        (lambda: tucker(W, (1, 1, 1)), "ranks"),
        (lambda: tucker(W, (1, 0)), "ranks"),
        (lambda: tucker(W, (1, 1), -1), "sweeps"),
        (lambda: tensor_train(W, (1, 2)), "ranks"),
        (lambda: tensor_train(W, 0), "ranks"),
        (lambda: tensor_train(W, accuracy=1.0), "accuracy"),
        (lambda: matrix_train(W, (2, 2), (3, 3)), "dims"),
        (lambda: matrix_train(W, (4,), (6,)), "dims"),
        (lambda: TrainLinear(tensor_train(W)), "train"),
        (lambda: second_moments(nn.ReLU(), W), "layers"),
        (lambda: second_moments(mlp([6, 2]), W[:0]), "empty"),
        (lambda: second_moments(mlp([6, 2]), W * torch.nan), "data"),
        (lambda: second_moments(mlp([6, 2]), W, ["2"]), "layers"),
        (lambda: plan(mlp([6, 9, 2]), 0.9, "best"), "rule"),
        (lambda: plan(mlp([6, 9, 2]), 3), "budget"),
        (lambda: plan(mlp([6, 9, 2]), 1.1), "budget"),
        (lambda: plan(mlp([6, 9, 2]), True), "budget"),
        (lambda: plan(mlp([6, 9, 2]), 0.9, moments={}), "moments"),
        (lambda: plan(W, 0.9), "model"),
        (lambda: plan(shared(), 1.0), "shared"),
        (lambda: plan(poisoned(), 1.0), "nan"),
        (lambda: truncate(poisoned(), 1), "'1'"),
        (lambda: truncate(shared(), 1), "shared"),
        (lambda: truncate(mlp([6, 2]), 1, method="svd"), "method"),
        (lambda: truncate(mlp([6, 2]), {"7": 1}), "layers"),
        (lambda: truncate(mlp([6, 2]), (1, 1)), "pairs"),
        (lambda: truncate(mlp([6, 2]), 1, moments={}), "moments"),
        (lambda: truncate(mlp([6, 2]), 1, moments={}, method="tucker"),
         "moments"),
        (lambda: truncate(mlp([6, 2]), -1), "rank"),
        (lambda: truncate(nn.Flatten(), 1), "layers"),
    ],
)
def test_refusals(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_what_is_not_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="idle"):
        second_moments(Idle(), W.float())
    assert list(second_moments(Idle(), W.float(), ["used"])) == ["used"]


def test_alternating_plans_differ_where_shapes_do():
    net = mlp([64, 32, 16, 10])
    plans = [plan(net, 0.5, rule).ranks for rule in RULES]
    assert any(a != b for a, b in itertools.combinations(plans, 2))
