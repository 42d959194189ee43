"""Curvature by products agrees with matrices written out."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.measure import curvature as mc

DOUBLE = {"dtype": torch.float64}


def exact(module, x, y, loss=F.cross_entropy):
    """By torch.autograd, whose second derivatives of layer norm are right."""
    module = copy.deepcopy(module).double().eval()
    named = dict(module.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def value(flat):
        views = [
            v.view(p.shape)
            for v, p in zip(flat.split(sizes), named.values(), strict=True)
        ]
        tensors = dict(zip(named, views, strict=True))
        return loss(functional_call(module, tensors, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    x = x.double() if x.is_floating_point() else x
    y = y.double() if y.is_floating_point() else y
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(value, flat)


class Conv(nn.Module):
    def __init__(self, classes=3, track=True):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, 2, bias=False)
        self.norm1 = nn.BatchNorm2d(2, track_running_stats=track)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(2, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2, classes)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(self.drop(F.max_pool2d(x, 2)).mean((2, 3)))


def batch(i, shape, classes, n):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(n, *shape, generator=g)
    return x, torch.randint(classes, (n,), generator=g)


def conv(i=0, **options):
    net = models.reset(Conv(**options), i)
    g = torch.Generator().manual_seed(i)
    net(torch.randn(16, 1, 8, 8, generator=g) * 2 + 1)
    return net


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def seeded(make):
    """For layers that only know the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


KINDS = {
    "mlp": (lambda: models.mlp([4, 5, 3], seed=1), (4,)),
    "layer norm": (lambda: models.mlp([4, 5, 3], norm="layer", seed=1), (4,)),
    "residual gelu": (
        lambda: models.mlp(
            [4, 4, 4, 3], residual=True, activation="gelu", seed=1
        ),
        (4,),
    ),
    "conv, batch norm, dropout": (conv, (1, 8, 8)),
    "group norm": (
        lambda: models.resnet((1, 2, 2), classes=3, seed=1), (1, 8, 8)
    ),
    "attention": (lambda: seeded(Attentive), (5, 4)),
    "lstm": (lambda: models.reset(Remembering(), 1), (5, 3)),
    "gru": (lambda: models.recurrent(3, 3, 3, seed=1), (5, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_any_module_and_left_as_it_was(kind, training):
    make, shape = KINDS[kind]
    net, (x, y) = make().train(training), batch(0, shape, 3, 7)
    F.cross_entropy(net(x), y).backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad for p in net.parameters()]
    state = torch.random.get_rng_state()
    H = mc.hessian(net, (x, y), **DOUBLE).dense()
    G = mc.gauss_newton(net, (x, y), **DOUBLE)
    t = mc.hessian_trace(net, (x, y), **DOUBLE)
    assert torch.equal(state, torch.random.get_rng_state())
    assert net.training == training
    now = [p.grad for p in net.parameters()]
    assert all(a is b for a, b in zip(grads, now, strict=True))
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)

    reference = exact(net, x, y)
    size = reference.abs().max()
    assert (H - reference).abs().max() < 1e-11 * size
    assert torch.linalg.eigvalsh(G.dense()).min() > -1e-11 * size
    piecewise = kind in ("mlp", "conv, batch norm, dropout")
    assert mc.linear_in_each(net, (x, y)) == piecewise
    if piecewise:
        assert torch.isclose(t.estimate, reference.trace(), rtol=1e-9)
    else:
        assert (t.estimate - reference.trace()).abs() < 6 * t.se


@pytest.mark.parametrize("norm", [None, "layer"])
def test_members_are_what_they_are_alone(norm):
    nets = [models.mlp([4, 5, 3], norm=norm, seed=s) for s in range(3)]
    many, data = Ensemble.of(nets), batch(1, (4,), 3, 9)
    together = mc.Objective(many, data, **DOUBLE)
    H = mc.hessian(together)
    for i, net in enumerate(nets):
        alone = mc.Objective(net, data, **DOUBLE)
        reference = exact(net, *data)
        assert (H.dense()[i] - reference).abs().max() < 1e-12
        A = mc.hessian(alone)
        for got, want in [
            (together.gradient()[i], alone.gradient()),
            (together()[i], alone()),
            (
                mc.top_eigenvalues(H, 2, tol=1e-9).values[i],
                mc.top_eigenvalues(A, 2, tol=1e-9).values,
            ),
            (mc.trace(H, 7).samples[i], mc.trace(A, 7).samples),
            (
                mc.spectral_density(H, 3, 5).nodes[i],
                mc.spectral_density(A, 3, 5).nodes,
            ),
            (
                mc.gauss_newton_diagonal(together)[i],
                mc.gauss_newton_diagonal(alone),
            ),
            (mc.sample_gradients(together)[i], mc.sample_gradients(alone)),
            (
                mc.empirical_fisher(together).dense()[i],
                mc.empirical_fisher(alone).dense(),
            ),
        ]:
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(["relu", "tanh", "gelu", "linear"]),
    st.booleans(),
    st.booleans(),
)
def test_products_against_the_matrix(i, n, sizes, act, squared, zero):
    net = models.mlp(sizes, activation=act, seed=i)
    if zero:
        for p in net.parameters():
            p.data.zero_()
    x, y = batch(i, sizes[:1], sizes[-1], n)
    plain = F.mse_loss if squared else F.cross_entropy
    y = F.one_hot(y, sizes[-1]).float() if squared else y
    H = exact(net, x, y, plain)
    own = "mse" if squared else "cross_entropy"
    A = mc.hessian(net, (x, y), own, **DOUBLE)
    size = H.abs().max() + 1e-9
    assert (A.dense() - H).abs().max() <= 1e-12 * size
    # the same loss as a function, and in single precision
    B = mc.hessian(net, (x, y), plain)
    assert (B.dense() - H).abs().max() <= 1e-4 * size + 1e-6
    if act in ("relu", "linear"):
        t = mc.hessian_trace(net, (x, y), own, method="exact", **DOUBLE)
        assert abs(float(t) - H.trace()) <= 1e-11 * (size + H.trace().abs())


@st.composite
def spectra(draw):
    size = draw(st.integers(1, 25))
    values = draw(
        st.lists(st.integers(-9, 9), min_size=size, max_size=size)
    )
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(noise).Q
    values = torch.tensor(values, dtype=torch.float64)
    return Q @ torch.diag(values) @ Q.T, values.sort().values


@settings(max_examples=200, deadline=None)
@given(spectra(), st.integers(1, 4), st.integers(0, 99))
def test_eigenvalues_with_all_their_copies(spectrum, k, seed):
    M, values = spectrum
    M, k = (M + M.T) / 2, min(k, len(values))
    A = mc.Operator.of(M)
    order = {
        "largest": values.flip(0),
        "smallest": values,
        "magnitude": values[values.abs().argsort(descending=True)],
    }
    for which, want in order.items():
        found = mc.top_eigenvalues(A, k, which=which, tol=1e-9, seed=seed)
        assert found.converged
        got, want = found.values, want[:k]
        if which == "magnitude":
            got, want = got.abs(), want.abs()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        u = found.vectors
        back = (A @ u - found.values[:, None] * u).norm(dim=-1)
        torch.testing.assert_close(back, found.residuals, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            u @ u.T, torch.eye(k, dtype=u.dtype), rtol=0, atol=1e-9
        )


@settings(max_examples=200, deadline=None)
@given(spectra(), st.integers(0, 99))
def test_traces_and_quadrature(spectrum, seed):
    M, values = spectrum
    A, p = mc.Operator.of((M + M.T) / 2), len(values)
    t = mc.trace(A, 3 * p + 3, method="hutch++", seed=seed)
    assert abs(float(t) - values.sum()) < 1e-9 * (1 + values.abs().sum())
    t = mc.trace(A, 40, seed=seed)
    off = M - torch.diag(M.diagonal())
    assert abs(float(t) - values.sum()) <= 8 * (
        (2 * off.square().sum() / 40).sqrt() + 1e-9
    )
    d = mc.spectral_density(A, 2, p, seed=seed)
    assert torch.allclose(d.weights.sum(-1), torch.ones(2).double())
    assert (d.nodes >= values[0] - 1e-7).all()
    assert (d.nodes <= values[-1] + 1e-7).all()
    mean = d.mean(lambda v: v)
    start = mc._normal(A, 2, seed, "density")[0]
    quotient = (start * (A @ start)).sum(-1) / start.square().sum(-1)
    torch.testing.assert_close(mean.samples, quotient, rtol=1e-7, atol=1e-7)


def test_eigenvalues_agree_with_scipy():
    from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

    net, data = models.mlp([8, 12, 12, 4], seed=3), batch(3, (8,), 4, 40)
    A = mc.hessian(net, data, **DOUBLE)
    B = LinearOperator(
        (A.size, A.size),
        matvec=lambda v: (A @ torch.as_tensor(v.ravel())).numpy(),
        matmat=lambda V: (A @ torch.as_tensor(V.T.copy())).numpy().T,
        dtype=np.float64,
    )
    top = mc.top_eigenvalues(A, 3, tol=1e-10).values.numpy()
    np.testing.assert_allclose(top, eigsh(B, 3, which="LA")[0][::-1], 1e-8)
    start = np.random.default_rng(0).normal(size=(A.size, 3))
    values = lobpcg(B, start, tol=1e-8, maxiter=500)[0]
    np.testing.assert_allclose(top, np.sort(values)[::-1], 1e-6)


def test_error_bars_cover():
    M = torch.diag(torch.tensor([50.0, 20.0] + [1.0] * 60).double())
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(62, 62, generator=g).double()).Q
    M = Q @ M @ Q.T
    A = mc.Operator.of((M + M.T) / 2)
    for method in ("hutchinson", "hutch++"):
        ts = [mc.trace(A, 36, method=method, seed=s) for s in range(300)]
        hits = np.mean([130.0 in t.interval() for t in ts])
        assert 0.9 <= hits <= 0.99, method
    assert ts[0].se < mc.trace(A, 36, seed=0).se / 3


def test_layers_add_up():
    net, data = conv(), batch(0, (1, 8, 8), 3, 6)
    H = exact(net, *data)
    A = mc.hessian(net, data, **DOUBLE)
    exactly = mc.hessian_trace(net, data, per_layer=True, **DOUBLE)
    sampled = mc.trace(A, 300, per_layer=True)
    plus = mc.trace(A, 300, method="hutch++", per_layer=True)
    assert set(exactly.layers) == set(dict(net.named_parameters()))
    for name, s in A.layout.items():
        want = H[s, s].trace()
        torch.testing.assert_close(exactly.layers[name].estimate, want)
        for t in (sampled, plus):
            own = t.layers[name]
            assert abs(own.estimate - want) <= 5 * own.se + 1e-9
    assert len(exactly.to_frame()) == 1 + len(A.layout)


def test_parts_of_the_parameters():
    net, data = models.mlp([4, 5, 3], seed=0), batch(0, (4,), 3, 9)
    whole = mc.Objective(net, data)
    H = exact(net, *data)
    for only in ("1", ["1.weight", "1.bias"], "3.bias"):
        A = mc.hessian(net, data, only=only, **DOUBLE)
        s = torch.cat([torch.arange(P.start, P.stop) for P in (
            whole.layout[k] for k in A.layout
        )])
        torch.testing.assert_close(A.dense(), H[s][:, s])
    with pytest.raises(ValueError, match="nearest"):
        mc.hessian(net, data, only="1.weigth")


@pytest.mark.parametrize("size", [4, 100])
def test_pieces_do_not_matter(size, monkeypatch):
    net, (x, y) = conv(), batch(0, (1, 8, 8), 3, 10)
    reference = exact(net, x, y)
    monkeypatch.setattr(mc, "_BUDGET", size * 200)
    loaders = [
        (x, y),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), 3, shuffle=True
        ),
        [(x[:4], y[:4]), (x[4:], y[4:])],
    ]
    for data in loaders:
        H = mc.hessian(net, data, **DOUBLE).dense()
        torch.testing.assert_close(H, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="none"),
        lambda out, y: F.nll_loss(out.log_softmax(-1), y),
        lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
        lambda out, y: F.binary_cross_entropy_with_logits(
            out, F.one_hot(y, 3).to(out)
        ),
        lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2),
    ],
)
def test_losses_of_the_users(loss):
    net, (x, y) = models.mlp([4, 5, 3], seed=0), batch(0, (4,), 3, 9)
    reference = exact(net, x, y, lambda out, y: loss(out, y).mean())
    A = mc.hessian(net, (x, y), loss, **DOUBLE)
    assert (A.dense() - reference).abs().max() < 1e-10
    G = mc.gauss_newton(net, (x, y), loss, **DOUBLE).dense()
    torch.testing.assert_close(
        G.diagonal(), mc.gauss_newton_diagonal(net, (x, y), loss, **DOUBLE)
    )
    torch.testing.assert_close(G.trace(), reference.trace())


def test_folding_changes_nothing():
    net = conv()
    forward, count = mc.folded(net)
    assert count == 2
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    x = batch(0, (1, 8, 8), 3, 5)[0]
    torch.testing.assert_close(forward(tensors, x), net.eval()(x))

    class Branching(Conv):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    branching = models.reset(Branching(), 0)
    branching.load_state_dict(net.state_dict())
    assert mc.folded(branching)[1] == 0
    data = batch(0, (1, 8, 8), 3, 5)
    assert (
        mc.hessian(net, data, **DOUBLE).dense() - exact(net, *data)
    ).abs().max() < 1e-12


class Deep(nn.Module):
    """What is met in residual networks, in one or two dimensions."""

    def __init__(self, dims=2, affine=True, track=True, rounds=1):
        super().__init__()
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        norm = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
        options = {"affine": affine, "track_running_stats": track}
        self.first = conv(2, 4, 3, 2, 1, bias=False)
        self.norm1 = norm(4, **options)
        self.body = nn.Sequential(
            conv(4, 4, 3, padding="same", groups=2), norm(4, **options),
            nn.ReLU(inplace=True), conv(4, 4, 3, 1, 2, 2, bias=False),
            norm(4, **options),
        )
        self.short = nn.Sequential(
            conv(4, 4, 1, groups=2), norm(4, **options)
        )
        self.early = norm(4, **options)
        self.head = nn.Linear(4, 3)
        self.rounds = rounds

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        for _ in range(self.rounds):
            x = torch.relu(self.body(x) + self.short(x))
        return self.head(F.relu(self.early(x)).flatten(2).mean(-1))


class Glued(Deep):
    """Reads images in the order of memory, and branches."""

    def forward(self, x):
        x = self.norm1(self.first(x))
        x = x.view(len(x), -1) if len(x) else x
        return self.head(x[:, :4])


def deep(kind=Deep, freeze=(), **options):
    net = models.reset(kind(**options), 1)
    g = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        if p.ndim == 1:
            p.data += torch.rand(p.shape, generator=g)
        p.requires_grad_(name not in freeze)
    shape = (2, 9, 7) if isinstance(net.first, nn.Conv2d) else (2, 9)
    net(torch.randn(16, *shape, generator=g) * 2 + 1)
    return net, batch(2, shape, 3, 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dims": 1},
        {"affine": False},
        {"track": False},
        {"dims": 1, "affine": False, "track": False},
        {"rounds": 2},
        {"freeze": ("first.weight", "norm1.bias", "body.3.weight")},
        {"kind": Glued},
    ],
    ids=str,
)
def test_kept_graphs_give_the_same_products(options):
    net, data = deep(**options)
    reference = exact(net, *data)
    v = torch.randn(3, len(reference), generator=torch.manual_seed(3))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        A = mc.hessian(net, data, dtype=dtype)
        plain = A.product.otherwise(v[:1, None].to(dtype))[0, 0]
        first, again = A @ v[0], A @ v[0]
        assert len(A.product.kept) == 1 and torch.equal(first, again)
        size = plain.abs().max()
        assert (first - plain).abs().max() <= tolerance * size
        want = (reference @ v[0].double()).to(dtype)
        assert (first - want).abs().max() <= tolerance * size
        taking_turns = A.product.products(v[None].to(dtype))[0]
        assert (taking_turns - A @ v).abs().max() <= tolerance * size


def test_products_of_some_layers():
    net, data = deep()
    for only in ("first", "norm1", "body.3", "short.0.bias", "head"):
        A = mc.hessian(net, data, only=only, **DOUBLE)
        v = torch.randn(A.size, generator=torch.manual_seed(0)).double()
        plain = A.product.otherwise(v[None, None])[0, 0]
        torch.testing.assert_close(A @ v, plain, rtol=1e-10, atol=1e-12)
        assert A.product.kept


class Tied(nn.Module):
    """Two layers with the same weights, each with its batch norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(2, 2, 3, bias=False) for _ in range(2))
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        x = torch.relu(self.norm_a(self.a(x)))
        return self.norm_b(self.b(x)).mean((2, 3))


def test_shared_and_derived_weights_are_not_folded():
    net, data = models.reset(Tied(), 0), batch(0, (2, 7, 7), 2, 9)
    derived = models.reset(Tied(), 0)
    derived.b.weight = nn.Parameter(derived.b.weight.data.clone())
    nn.utils.parametrize.register_parametrization(
        derived.a, "weight", nn.Tanh()
    )
    for module, count in ((net, 0), (derived, 1)):
        assert mc.folded(module)[1] == count
        reference = exact(module, *data)
        A = mc.hessian(module, data, **DOUBLE)
        assert (A.dense() - reference).abs().max() < 1e-12
        v = torch.arange(A.size).double()
        torch.testing.assert_close(A @ v, reference @ v)


def test_graphs_are_drawn_anew_where_they_must_be(monkeypatch):
    net, (x, y) = deep()
    reference = exact(net, x, y)
    v = torch.randn(len(reference), generator=torch.manual_seed(0)).double()
    objective = mc.Objective(net, (x, y), **DOUBLE)
    load = objective.load
    monkeypatch.setattr(mc, "_BUDGET", 2 * load)
    # room for two of five pieces
    monkeypatch.setattr(mc, "_KEPT", 4 * 8 * mc._SHARE * load)
    A = mc.hessian(objective)
    for _ in range(2):
        torch.testing.assert_close(A @ v, reference @ v)
        assert len(A.product.kept) == 2
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 2, shuffle=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        B = mc.hessian(net, shuffled, **DOUBLE)
        for _ in range(3):
            torch.testing.assert_close(B @ v, reference @ v)
        assert not B.product.kept
    # other parameters, in place of the old and in the same place
    other = mc.Objective(net, (x, y), **DOUBLE)
    for change in range(2):
        if change:
            objective.theta *= 1.1
        else:
            objective.theta = objective.theta * 1.1
        other.theta = objective.theta.clone()
        torch.testing.assert_close(
            A @ v, mc.hessian(other) @ v, rtol=1e-9, atol=1e-9
        )
    x *= 1.5
    C = mc.hessian(net, (x, y), **DOUBLE)
    objective = mc.Objective(net, (x, y))
    D = mc.hessian(objective)
    D @ v
    x[:5], x[5:] = x[5:].clone(), x[:5].clone()
    y[:5], y[5:] = y[5:].clone(), y[:5].clone()
    torch.testing.assert_close(
        (D @ v).double(), C @ v, rtol=1e-3, atol=1e-4
    )


class Once(torch.autograd.Function):
    """A square without a second derivative in reverse."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return OnceBack.apply(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


class OnceBack(torch.autograd.Function):
    @staticmethod
    def forward(g, x):
        return 2 * g * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, v):
        raise RuntimeError("not implemented")

    @staticmethod
    def jvp(ctx, dg, dx):
        g, x = ctx.saved_tensors
        return 2 * (dg * x + g * dx)


def test_the_other_order_where_there_is_no_graph():
    class Squared(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    net, data = models.reset(Squared(4, 3), 0), batch(0, (4,), 3, 9)

    class Same(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    same = Same(4, 3)
    same.load_state_dict(net.state_dict())
    A = mc.hessian(net, data, **DOUBLE)
    v = torch.arange(A.size).double()
    torch.testing.assert_close(A @ v, mc.hessian(same, data, **DOUBLE) @ v)
    assert A.product.objective.twice is None


def test_batch_statistics_are_kept_together(monkeypatch):
    net, data = conv(track=False), batch(0, (1, 8, 8), 3, 10)
    monkeypatch.setattr(mc, "_BUDGET", 200)
    A = mc.hessian(net, data, **DOUBLE)
    assert (A.dense() - exact(net, *data)).abs().max() < 1e-10
    for function in (mc.sample_gradients, mc.gauss_newton_diagonal):
        with pytest.raises(ValueError, match="running statistics"):
            function(net, data)


def test_same_seed_same_bits():
    net, data = models.mlp([4, 5, 3], seed=0), batch(0, (4,), 3, 9)
    A = mc.hessian(net, data)
    for f in (
        lambda s: mc.trace(A, 8, seed=s).estimate,
        lambda s: mc.trace(A, 8, method="hutch++", seed=s).estimate,
        lambda s: mc.spectral_density(A, 2, 4, seed=s).nodes,
        lambda s: mc.top_eigenvalues(A, seed=s).vectors,
    ):
        assert torch.equal(f(1), f(1)) and not torch.equal(f(1), f(2))


def test_a_start_saves_products():
    net, data = models.mlp([8, 16, 4], seed=0), batch(0, (8,), 4, 60)
    A = mc.hessian(net, data, **DOUBLE)
    cold = mc.top_eigenvalues(A, tol=1e-6)
    warm = mc.top_eigenvalues(A, tol=1e-6, start=cold.vectors[0])
    assert warm.products < cold.products
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)


def test_unfinished_says_so():
    A = mc.Operator.of(torch.diag(torch.linspace(0, 1, 400).double()))
    with pytest.warns(mc.NotConverged, match="max_products"):
        found = mc.top_eigenvalues(A, tol=1e-12, max_products=4)
    assert not found.converged and "NOT CONVERGED" in repr(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.top_eigenvalues(A, tol=1e-3, max_products=400)


net, data = models.mlp([4, 5, 3], seed=0), batch(0, (4,), 3, 9)


def broken(value):
    twin = copy.deepcopy(net)
    twin[1].weight.data[:] = value
    return twin


class Changing(torch.utils.data.Dataset):
    """Augmentation that differs from pass to pass."""

    count = 0

    def __len__(self):
        return 9

    def __getitem__(self, i):
        Changing.count += 1
        return data[0][i] + Changing.count, data[1][i]


BAD = {
    "empty data": (lambda: mc.hessian(net, []), "data: empty"),
    "no data": (lambda: mc.hessian(net), "data: missing"),
    "no targets": (lambda: mc.hessian(net, data[0]), "data: has no targets"),
    "no parameters": (lambda: mc.hessian(nn.ReLU(), data), "no parameters"),
    "no model": (lambda: mc.hessian(F.relu, data), "an nn.Module or an"),
    "labels": (
        lambda: mc.hessian(net, (data[0], data[1] + 1)).dense(),
        "0 to 2 are accepted",
    ),
    "loss name": (lambda: mc.hessian(net, data, "hinge"), "'hinge'"),
    "loss type": (lambda: mc.hessian(net, data, 3), "loss: got int"),
    "half": (lambda: mc.hessian(copy.deepcopy(net).half(), data), "float16"),
    "nan": (lambda: mc.hessian(broken(torch.nan), data), "'1.weight'"),
    "overflow": (
        lambda: mc.hessian(broken(3e38), data).dense(), "not finite",
    ),
    "once": (
        lambda: mc.hessian(net, iter([data])).dense(), "read to its end",
    ),
    "shape": (lambda: mc.hessian(net, data) @ torch.ones(4), "v: got shape"),
    "k": (lambda: mc.top_eigenvalues(mc.hessian(net, data), 0), "k: got 0"),
    "which": (
        lambda: mc.top_eigenvalues(mc.hessian(net, data), which="LA"), "which"
    ),
    "probes": (lambda: mc.trace(mc.hessian(net, data), 1), "at least 2"),
    "method": (
        lambda: mc.trace(mc.hessian(net, data), method="x"), "hutch"
    ),
    "exact": (
        lambda: mc.hessian_trace(
            models.mlp([4, 5, 3], activation="gelu", seed=0), data,
            method="exact",
        ),
        "piecewise linear",
    ),
    "symmetric": (
        lambda: mc.Operator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
        "symmetric",
    ),
    "vectors": (
        lambda: mc.spectral_density(mc.hessian(net, data), 1), "at least 2"
    ),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    act, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        act()


def test_changing_data_is_noticed():
    objective = mc.Objective(net, Changing())
    objective.gradient()
    with pytest.raises(ValueError, match="other samples"):
        objective.gradient()


def test_pyhessian_agrees():
    pyhessian = pytest.importorskip("pyhessian")
    net, data = conv().eval(), batch(0, (1, 8, 8), 3, 20)
    peer = pyhessian.hessian(
        copy.deepcopy(net), nn.CrossEntropyLoss(), data=data, cuda=False
    )
    values = peer.eigenvalues(maxIter=500, tol=1e-7)[0]
    assert values[0] == pytest.approx(
        mc.top_eigenvalue(net, data, tol=1e-7).item(), rel=1e-3
    )


@pytest.mark.parametrize("scale", [1, 100, 300, 1e3, 1e6])
def test_gauss_newton_diagonal_where_softmax_saturates(scale):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale**0.5)
    x, y = torch.randn(64, 20), torch.randint(0, 10, (64,))
    got = mc.gauss_newton_diagonal(net, (x, y), "cross_entropy")
    exact = net.double()
    probs = exact(x.double()).softmax(-1)
    want = 0.0
    for i in range(len(x)):
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(
                exact(x[i:i + 1].double())[0, c], exact.parameters()
            )]) for c in range(10)
        ]
        j = torch.stack(rows)
        centred = j - probs[i] @ j
        want = want + (probs[i][:, None] * centred**2).sum(0)
    torch.testing.assert_close(
        got.double(), (want / len(x)).detach(), rtol=1e-3,
        atol=1e-5 * float(want.detach().max()) / len(x),
    )


def test_threads_do_not_disturb_each_other():
    nets = Ensemble.of([models.mlp([6, 8, 3], seed=s) for s in range(3)])
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=g), torch.arange(40) % 3

    def both(_):
        A = mc.hessian(nets, data, "cross_entropy")
        return mc.top_eigenvalues(A, seed=0).values, mc.hessian_trace(
            nets, data, "cross_entropy", method="hutchinson", products=8
        ).estimate

    alone = both(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(both, range(12)):
            assert all(map(torch.equal, found, alone))
