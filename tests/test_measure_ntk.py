"""Tangent kernels against autograd, closed forms and invariances."""

import numpy as np
import pytest
import torch
from torch import nn

from reappraisal.lab.ensemble import Ensemble, chain_of
from reappraisal.lab.models import convnet, mlp, resnet, transformer
from reappraisal.measure import ntk
from reappraisal.measure.representation import cka


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)


def by_autograd(module, x, y):
    rows = []
    for batch in (x, y):
        out = module(batch).flatten()
        grads = [
            torch.cat([
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(
                    module.parameters(),
                    torch.autograd.grad(
                        o, list(module.parameters()), retain_graph=True,
                        allow_unused=True,
                    ),
                    strict=True,
                )
            ])
            for o in out
        ]
        rows.append(torch.stack(grads).reshape(len(batch), -1, len(grads[0])))
    return torch.einsum("ncp,mdp->ncmd", *rows)


@pytest.mark.parametrize("case", range(200))
def test_perceptrons_against_autograd(case):
    rng = np.random.default_rng(case)
    d, c = rng.integers(1, 6, 2).tolist()
    widths = rng.integers(1, 12, rng.integers(0, 4)).tolist()
    module = mlp(
        [d, *widths, c], seed=case, bias=case % 3 > 0,
        activation=["relu", "tanh", "sigmoid", "gelu"][case % 4],
        norm="layer" if case % 5 == 0 else None, residual=case % 7 == 0,
    ).double()
    if case % 10 == 9:  # a dead network
        nn.init.zeros_(next(module.parameters()))
    n, m = rng.integers(1, 6, 2).tolist()
    x, y = normal(n, d, seed=case), normal(m, d, seed=case + 1)
    want = by_autograd(module, x, y)
    got = ntk.empirical_ntk(module, x, y, full=True, batch_size=2)
    torch.testing.assert_close(got, want)
    mean = torch.einsum("ncmc->nm", want) / c
    torch.testing.assert_close(ntk.empirical_ntk(module, x, y), mean)
    own = ntk.empirical_ntk(module, x, batch_size=2)
    torch.testing.assert_close(own, own.T)
    torch.testing.assert_close(own, ntk.empirical_ntk(module, x, x.clone()))


@pytest.mark.parametrize(
    "module, x", [
        (convnet(), normal(5, 1, 8, 8)),
        (resnet(), normal(3, 1, 8, 8)),
        (transformer(11, 4, 6), torch.arange(18).reshape(3, 6) % 11),
        (
            nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),
                nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 2),
            ),
            normal(4, 1, 8, 8),
        ),
    ],
)
def test_other_modules_against_autograd_and_are_left_alone(module, x):
    module = module.double().train()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    got = ntk.empirical_ntk(module, x, full=True, batch_size=2)
    assert all(m.training for m in module.modules())
    for k, v in module.state_dict().items():
        assert torch.equal(v, state[k])
    assert all(p.grad is None for p in module.parameters())
    want = by_autograd(module.eval(), x, x)
    torch.testing.assert_close(got, want.detach())


def test_the_formula_is_the_jacobian(monkeypatch):
    module = mlp([4, 9, 8, 3]).double()
    x, y = normal(5, 4), normal(6, 4, seed=1)
    assert chain_of(module)
    fast = [ntk.empirical_ntk(module, x, y, full=f) for f in (True, False)]
    monkeypatch.setattr(ntk, "chain_of", lambda m: None)
    slow = [ntk.empirical_ntk(module, x, y, full=f) for f in (True, False)]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whole", [True, False])
def test_tied_weights_take_the_long_way(whole):
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    module = nn.Sequential(
        layer, nn.ReLU(), layer if whole else other
    ).double()
    x = normal(5, 4)
    got = ntk.empirical_ntk(module, x, full=True)
    torch.testing.assert_close(got, by_autograd(module, x, x).detach())


@pytest.mark.parametrize("build", [
    lambda s: mlp([4, 9, 3], seed=s), lambda s: convnet(seed=s),
])
def test_ensembles_are_their_members(build):
    modules = [build(s).double() for s in range(3)]
    first = next(modules[0].parameters())
    x = normal(4, 4) if first.ndim == 2 else normal(4, 1, 8, 8)
    stacked = Ensemble.of(modules)
    for full in (True, False):
        many = ntk.empirical_ntk(stacked, x, full=full)
        for k, module in enumerate(modules):
            torch.testing.assert_close(
                many[k], ntk.empirical_ntk(module, x, full=full)
            )
    assert ntk.ntk_spectrum(many).shape == (3, 4)
    assert ntk.relative_change(many, many[:1]).shape == (3,)


def test_layers_add_up_and_units_may_be_permuted():
    module = mlp([4, 9, 8, 3]).double()
    x = normal(5, 4)
    whole = ntk.empirical_ntk(module, x)
    names = [k for k, _ in module.named_parameters()]
    parts = [ntk.empirical_ntk(module, x, params=[k]) for k in names]
    torch.testing.assert_close(sum(parts), whole)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    state = module.state_dict()
    one, two, three = (k for k, v in state.items() if v.ndim == 2)
    bias = one.replace("weight", "bias")
    state[one], state[bias] = state[one][order], state[bias][order]
    state[two] = state[two][:, order]
    other = mlp([4, 9, 8, 3]).double()
    other.load_state_dict(state)
    torch.testing.assert_close(ntk.empirical_ntk(other, x), whole)
    # moving a factor between layers keeps the function, not the kernel
    state[one], state[bias] = 3 * state[one], 3 * state[bias]
    state[two] = state[two] / 3
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), module(x))
    assert ntk.relative_change(ntk.empirical_ntk(other, x), whole) > 0.01


def test_a_step_moves_the_outputs_as_the_kernel_says():
    module = mlp([4, 30, 2], activation="tanh").double()
    x, y = normal(6, 4), normal(3, 4, seed=1)
    K = ntk.empirical_ntk(module, y, x, full=True)
    pull = normal(6, 2, seed=2)
    before = module(y).detach()
    (module(x) * pull).sum().backward()
    rate = 1e-7
    with torch.no_grad():
        for p in module.parameters():
            p -= rate * p.grad
    moved = (module(y) - before) / rate
    want = -torch.einsum("ncmd,md->nc", K, pull)
    torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", range(20))
def test_spectrum_change_and_alignment(case):
    f, y = normal(7, 5, seed=case), normal(7, 3, seed=case + 1)
    K = f @ f.T
    want = np.linalg.eigvalsh(K.numpy())[::-1]
    np.testing.assert_allclose(ntk.ntk_spectrum(K), want, atol=1e-9)
    np.testing.assert_allclose(
        ntk.relative_change(K + 1, K), 7 / np.linalg.norm(K)
    )
    got = ntk.kernel_alignment(K, y, centred=True)
    assert torch.isclose(got, cka(f, y))
    label = torch.arange(7) % 3
    onehot = nn.functional.one_hot(label).double()
    assert torch.isclose(
        ntk.kernel_alignment(K, label), ntk.kernel_alignment(K, onehot)
    )


X, NET = normal(4, 3, dtype=torch.float32), mlp([3, 2])
BAD = [
    (lambda: ntk.empirical_ntk(nn.ReLU(), X), "model: no parameters"),
    (lambda: ntk.empirical_ntk(lambda x: x, X), "model: got function"),
    (lambda: ntk.empirical_ntk(NET, X[:0]), "x1: got"),
    (lambda: ntk.empirical_ntk(NET, [1.0]), "x1: got"),
    (lambda: ntk.empirical_ntk(NET, X, X[:, :2]), "x2: got samples"),
    (lambda: ntk.empirical_ntk(NET, X, params=["no"]), "params: no"),
    (lambda: ntk.ntk_spectrum(X), "K: got shape"),
    (lambda: ntk.ntk_spectrum(torch.full((2, 2), torch.nan)), "K: not"),
    (lambda: ntk.relative_change(X @ X.T, torch.eye(3)), "K0: got"),
    (lambda: ntk.kernel_alignment(X @ X.T, X[:2]), "targets: got"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
