"""Saliencies against autograd, dense Hessians, unfolded convolutions."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.intervene.saliency import (
    CRITERIA,
    Saliency,
    curvature_blocks,
    score,
    subject_of,
)
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import convnet, mlp, recurrent, resnet, transformer

DATA = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=DATA, dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=DATA)
OPTIONS = {
    "prospr": {"batch_size": 3, "steps": 2},
    "obs": {"block": 16, "damping": 0.1},
}


def net(seed=0, **how):
    return mlp([6, 5, 4, 3], seed=seed, **how).double()


def batch_norm_net():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1, groups=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Dropout(0.5), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Flatten(),
        nn.Linear(36, 3),
    ]
    module = nn.Sequential(*layers)
    module.train()
    module(torch.randn(16, 1, 8, 8))
    return module.double()


def images(n=6):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=g)


def flat(mapping):
    return torch.cat([v.flatten() for v in mapping.values()])


def dense_hessian(module, x, y, names):
    """By double backward, which is right for layer norm too."""
    params = dict(module.named_parameters())
    start = torch.cat([params[k].detach().flatten() for k in names])
    sizes = [params[k].numel() for k in names]

    def loss(theta):
        parts = theta.split(sizes)
        own = {
            k: p.view_as(params[k]) for k, p in zip(names, parts, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(module, own, x), y)

    return (
        start,
        torch.autograd.functional.jacobian(loss, start),
        torch.autograd.functional.hessian(loss, start),
    )


NETS = {
    "tanh": (lambda: net(activation="tanh"), (X, Y)),
    "relu": (net, (X, Y)),
    "layer norm": (lambda: net(norm="layer", activation="gelu"), (X, Y)),
    "residual": (
        lambda: mlp([6, 5, 5, 3], activation="tanh", residual=True).double(),
        (X, Y),
    ),
    "attention": (
        lambda: transformer(
            4, 3, 5, width=4, heads=2, depth=1, tokens=False
        ).double(),
        (
            torch.randn(5, 5, 4, generator=DATA, dtype=torch.float64),
            torch.tensor([0, 1, 2, 0, 1]),
        ),
    ),
    "batch norm": (batch_norm_net, images()),
}


@pytest.mark.parametrize("name", NETS)
def test_first_and_second_order_by_double_backward(name):
    build, (x, y) = NETS[name]
    module = build().eval()
    names = subject_of(module).names
    w, g, H = dense_hessian(module, x, y, names)
    near = dict(rtol=1e-7, atol=1e-10)
    product = (w * g).abs()
    for how, want in {
        "gradient": g.abs(),
        "taylor": product.square(),
        "snip": product / product.sum(),
        "grasp": w * (H @ g),
        "obd": w.square() * H.diagonal() / 2,
    }.items():
        got = flat(score(module, how, (x, y)))
        assert torch.allclose(got.double(), want, **near), how
    blocks = curvature_blocks(
        subject_of(module, (x, y)), None, 0.0, "hessian"
    )
    assert torch.allclose(blocks.matrix[0, 0], H, **near)
    one = torch.stack([
        dense_gradient(module, x[i : i + 1], y[i : i + 1], names)
        for i in range(len(x))
    ])
    want = w.square() * one.square().mean(0) / 2
    assert torch.allclose(flat(score(module, "fisher", (x, y))), want, **near)


def dense_gradient(module, x, y, names):
    params = dict(module.named_parameters())
    loss = F.cross_entropy(module(x), y)
    found = torch.autograd.grad(loss, [params[k] for k in names])
    return torch.cat([g.flatten() for g in found])


def test_random_probes_estimate_the_diagonal():
    module = net(activation="tanh")
    exact = flat(score(module, "obd", (X, Y)))
    rough = [
        flat(score(module, "obd", (X, Y), probes=p, seed=1)) for p in (20, 4000)
    ]
    errors = [(r - exact).norm() / exact.norm() for r in rough]
    assert errors[1] < 0.1 < errors[0]


@pytest.mark.parametrize("name", ["tanh", "layer norm", "attention"])
def test_prospr_by_differentiating_through_the_steps(name):
    build, (x, y) = NETS[name]
    module, lr = build(), 0.3
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    names = subject_of(module).names
    params = {k: v for k, v in module.named_parameters()}
    fixed = {k: v.detach() for k, v in params.items() if k not in names}
    gates = {k: torch.ones_like(params[k], requires_grad=True) for k in names}
    w = {k: gates[k] * params[k].detach() for k in names}

    def loss(w, x, y):
        out = torch.func.functional_call(module, {**fixed, **w}, x)
        return F.cross_entropy(out, y)

    for x_, y_ in batches[:2]:
        slopes = torch.autograd.grad(
            loss(w, x_, y_), list(w.values()), create_graph=True
        )
        w = {k: w[k] - lr * g for k, g in zip(names, slopes, strict=True)}
    last = [torch.cat(t) for t in zip(*batches[2:], strict=True)]
    want = torch.autograd.grad(loss(w, *last), list(gates.values()))
    got = score(module, "prospr", batches, steps=2, lr=lr)
    for g, k in zip(want, names, strict=True):
        assert torch.allclose(got[k], g.abs(), rtol=1e-7, atol=1e-12)


def test_lamp_is_the_published_definition():
    w = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    line = nn.Linear(2, 2)
    with torch.no_grad():
        line.weight.copy_(w)
    got = score(line, "lamp")["weight"]
    want = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]]).double()
    assert torch.allclose(got, want)


@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_lamp_does_not_see_the_scale_of_a_layer(seed, factor):
    module = net(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[1].weight.mul_(factor)
    a, b = score(module, "lamp"), score(other, "lamp")
    assert all(torch.allclose(a[k], b[k]) for k in a)
    before, after = score(module)["1.weight"], score(other)["1.weight"]
    assert torch.allclose(before * factor, after)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_what_a_relu_rescaling_changes_and_what_not(seed, factor):
    """w g and w^2 h stay when scale moves between layers; |w| does not."""
    module = net(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[1].weight.mul_(factor)
        other[1].bias.mul_(factor)
        other[3].weight.div_(factor)
    for how in "taylor", "snip", "fisher", "obd", "synflow":
        options = {"shape": (6,)} if how == "synflow" else {}
        a, b = (score(m, how, (X, Y), **options) for m in (module, other))
        assert torch.allclose(flat(a), flat(b), rtol=1e-6), how
    before, after = score(module), score(other)
    assert torch.allclose(before["1.weight"] * factor, after["1.weight"])


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_permuted_units_have_permuted_scores(seed):
    module = net(seed, activation="tanh")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[1].weight.copy_(module[1].weight[order])
        other[1].bias.copy_(module[1].bias[order])
        other[3].weight.copy_(module[3].weight[:, order])
    for how in sorted(set(CRITERIA) - {"random", "obs"}):
        options = OPTIONS.get(how, {})
        a, b = (score(m, how, (X, Y), **options) for m in (module, other))
        close = dict(rtol=1e-6, atol=1e-14)
        assert torch.allclose(a["1.weight"][order], b["1.weight"], **close)
        assert torch.allclose(
            a["3.weight"][:, order], b["3.weight"], **close
        ), how


def test_synflow_conserves_the_flow_and_passes_norms():
    module = convnet((1, 4, 5), 3, norm=None).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    total = score(module, "synflow", shape=(1, 8, 8)).total()
    total = torch.stack(list(total.values()))
    # zero padding loses none of it: every layer sees the same output
    assert torch.allclose(total, total[:1].expand_as(total))
    plain = score(net(3), "synflow", shape=(6,))
    normed = net(3, norm="layer")
    state = {
        k: v for k, v in zip(
            [k for k in normed.state_dict() if k not in (
                "2.weight", "2.bias", "5.weight", "5.bias")],
            net(3).state_dict().values(), strict=True,
        )
    }
    normed.load_state_dict({**normed.state_dict(), **state})
    found = score(normed, "synflow", shape=(6,))
    assert torch.allclose(flat(plain), flat(found))
    bn = score(batch_norm_net(), "synflow", images())
    assert all(torch.isfinite(v).all() and (v > 0).any() for v in bn.values())


def test_wanda_by_unfolding():
    module = batch_norm_net().eval()
    x, _ = images()
    found = score(module, "wanda", x)
    seen = F.unfold(x, 3, padding=1)
    norm = seen.square().sum((0, 2)).sqrt().view(1, 3, 3)
    want = module[0].weight.detach().abs() * norm
    assert torch.allclose(found["0.weight"], want)
    hidden = module[:3](x)
    for group in range(2):
        part = F.unfold(hidden[:, 2 * group : 2 * group + 2], 3, stride=2)
        norm = part.square().sum((0, 2)).sqrt().view(2, 3, 3)
        rows = slice(2 * group, 2 * group + 2)
        want = module[4].weight.detach()[rows].abs() * norm
        assert torch.allclose(found["4.weight"][rows], want)


def test_wanda_reads_embeddings_and_layers_called_again():
    module = recurrent(7, 4, 3, tokens=True).double()
    tokens = torch.randint(0, 7, (5, 6), generator=DATA)
    found = score(module, "wanda", tokens)
    count = torch.bincount(tokens.flatten(), minlength=7).double().sqrt()
    want = module.embed.weight.detach().abs() * count[:, None]
    assert torch.allclose(found["embed.weight"], want)
    assert "recur.weight" in found
    parts = [(t,) for t in tokens.split(2)]
    batches = score(module, "wanda", parts)
    assert torch.allclose(flat(found), flat(batches))


def test_obs_on_a_quadratic_is_exact():
    """Every single removal solved again, in closed form."""
    g = torch.Generator().manual_seed(3)
    A = torch.randn(30, 6, generator=g, dtype=torch.float64)
    w = torch.randn(6, generator=g, dtype=torch.float64)
    line = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(w)
    found = score(
        line, "obs", (A, (A @ w)[:, None]), loss="mse", block=None,
        damping=0.0, curvature="hessian",
    )["weight"][0]
    for q in range(6):
        left = [i for i in range(6) if i != q]
        fit = torch.linalg.lstsq(A[:, left], (A @ w)[:, None]).solution
        cost = (A[:, left] @ fit - (A @ w)[:, None]).square().mean()
        assert torch.isclose(found[q], cost)


def test_obs_order_is_a_permutation_and_streams_over_batches():
    module = net()
    places = score(module, "obs", (X, Y), block=7, greedy=True)
    n = sum(v.numel() for v in places.values())
    assert flat(places).sort().values.tolist() == list(range(n))
    for how in sorted(set(CRITERIA) - {"prospr", "random"}):
        options = OPTIONS.get(how, {})
        split = [(X[:5], Y[:5]), (X[5:6], Y[5:6]), (X[6:], Y[6:])]
        a, b = (score(module, how, d, **options) for d in ((X, Y), split))
        assert torch.allclose(flat(a), flat(b), rtol=1e-9, atol=1e-14), how


@pytest.mark.parametrize("how", sorted(CRITERIA))
def test_an_ensemble_is_its_members(how):
    nets = Ensemble.of([net(s, activation="tanh") for s in range(3)], [4, 5, 6])
    options = OPTIONS.get(how, {})
    found = score(nets, how, (X, Y), **options)
    assert found.members == 3
    again = score(nets, how, (X, Y), **options)
    for k in found:
        assert torch.equal(found[k], again[k])
    for s in range(3):
        if how == "random":  # a module has no seed of its own
            own = score(nets[s], how)
            assert all(torch.equal(found[k][s], own[k][0]) for k in found)
            continue
        one = score(nets.member(s), how, (X, Y), **options)
        for k in found:
            assert torch.allclose(found[k][s], one[k], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("how", sorted(CRITERIA))
def test_models_are_left_alone(how):
    module = batch_norm_net().train()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    options = {"block": 8} if how == "obs" else OPTIONS.get(how, {})
    if how == "prospr":
        options = {"batch_size": 2, "steps": 2}
    found = score(module, how, images(), **options)
    assert torch.equal(state, torch.get_rng_state())
    assert module.training and module[3].training
    assert (module[0].weight.grad == 1).all()
    assert module[4].weight.requires_grad
    for k, v in module.state_dict().items():
        assert torch.equal(v, before[k])
    assert all(not v.requires_grad for v in found.values())


@pytest.mark.parametrize(
    "module, x",
    [
        (resnet((1, 4, 6), classes=3), images()[0].float()),
        (transformer(5, 3, 6, width=8), torch.randint(0, 5, (6, 6))),
        (recurrent(5, 4, 3), torch.randn(6, 4, 5)),
    ],
)
def test_residual_attention_recurrence(module, x):
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for how in sorted(set(CRITERIA) - {"obd", "obs", "relevance"}):
        options = {"batch_size": 1} if how == "prospr" else {}
        only = "weights"
        if how == "wanda":  # a table that is sliced, not called
            only = [k for k in score(module) if not k.startswith("place")]
        found = score(module, how, (x, y), only=only, **options)
        assert len(found) > 2 and all(v.isfinite().all() for v in found.values())


def test_relevance_is_that_of_the_attribution_batch_by_batch():
    from reappraisal.measure.attribution import lrp

    module = resnet((1, 4, 6), classes=3, norm=None)
    x = images()[0].float()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    found = score(module, "relevance", (x, y), batch_size=4)
    want = lrp(module, x, y, rule="zplus", weights=True).weights
    for name, v in found.items():
        assert torch.allclose(v, want[name].abs(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no labels"):
        score(module, "relevance", x)


def test_a_planted_dead_weight_is_worth_nothing():
    module = net()
    with torch.no_grad():
        module[3].weight[:, 2] = 0.0  # unit 2 is read by nobody
    for how in "snip", "taylor", "fisher", "synflow", "obd", "relevance":
        found = score(module, how, (X, Y))
        assert found["1.weight"][2].abs().max() == 0, how
        assert found["1.weight"].abs().max() > 0
    assert score(module)["1.weight"][2].min() > 0  # magnitude is blind to it


def test_own_criterion_and_given_scores():
    def reversed_magnitude(subject, power=1.0):
        return {k: -(w.abs() ** power) for k, w in subject.weights.items()}

    found = score(net(), reversed_magnitude, power=2.0)
    assert found.how == "reversed_magnitude" and (flat(found) <= 0).all()
    again = score(net(), found)
    assert all(torch.equal(found[k], again[k]) for k in found)
    some = score(net(), {"3.weight": torch.ones(4, 5)})
    assert list(some) == ["3.weight"]


def test_only_and_units():
    assert list(score(net(), only="3")) == ["3.weight", "3.bias"]
    assert len(score(net(), only="all")) == 6
    rows = {k: torch.tensor([[3.0, -4.0], [1.0, 1.0]]) for k in ("w",)}
    units = {
        r: Saliency(rows).units(r)["w"].tolist()
        for r in ("mean", "sum", "l2", "gate")
    }
    assert units == {
        "mean": [-0.5, 1.0], "sum": [-1.0, 2.0],
        "l2": pytest.approx([5.0, 2**0.5]), "gate": [1.0, 2.0],
    }
    frame = score(net()).to_frame()
    assert len(frame) == 3 and frame["weights"].sum() == 62


def test_half_precision():
    module = net().to(torch.bfloat16)
    assert score(module)["1.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        score(module, "snip", (X, Y))
    found = score(module, "snip", (X, Y), dtype=torch.float64)
    assert np.isclose(float(flat(found).sum()), 1)


NAN = net()
with torch.no_grad():
    NAN[1].weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: score(net(), "best"), "how: got 'best'"),
        (lambda: score("net"), "model: got str"),
        (lambda: score(nn.ReLU()), "no parameters"),
        (lambda: score(nn.LazyLinear(3)), "no shape yet"),
        (lambda: score(NAN), "not finite"),
        (lambda: score(net(), only="9"), "only: no parameter"),
        (lambda: score(net(), only=[]), "leaves nothing"),
        (lambda: score(net(), {}), "how: empty"),
        (lambda: score(net(), {"8": torch.ones(1)}), "only: no parameter"),
        (lambda: score(net(), {"1.weight": torch.ones(2, 2)}), "how: 'given'"),
        (
            lambda: score(net(), {"1.weight": torch.full((5, 6), torch.nan)}),
            "holds NaN",
        ),
        (lambda: score(net(), "fisher"), "data: missing"),
        (lambda: score(net(), "fisher", X), "no targets"),
        (lambda: score(net(), "fisher", (X[:0], Y[:0])), "data: empty"),
        (lambda: score(net(), "snip", (X, Y + 3)), "labels from"),
        (lambda: score(net(), "snip", (X, Y), loss="hinge"), "loss: got"),
        (lambda: score(net(), "snip", (X, Y), sign=1), "options: of 'snip'"),
        (lambda: score(net(), "taylor", (X, Y), form="x"), "form: got"),
        (lambda: score(net(), "obd", (X, Y), probes=0), "probes: got"),
        (lambda: score(net(), "obs", (X, Y), block=0), "block: got"),
        (lambda: score(net(), "obs", (X, Y), damping=-1), "damping: got"),
        (lambda: score(net(), "obs", (X, Y), damping=0.0), "damping: too"),
        (lambda: score(net(), "obs", (X, Y), curvature="x"), "curvature: got"),
        (lambda: score(net(), "synflow"), "data, shape"),
        (lambda: score(net(), "prospr", (X, Y)), "data: 1 batches"),
        (lambda: score(net(), "prospr", (X, Y), steps=-1), "steps: got"),
        (lambda: score(net(), "wanda", X, only="all"), "only: '1.bias'"),
        (lambda: score(net(), only="all").units(), "no incoming weights"),
        (lambda: score(net()).units("median"), "reduce: got"),
        (lambda: Saliency({"w": torch.ones(2, 3)}, 3), r"\[3, ...\]"),
        (lambda: score(net(), seed=-1, how="random"), "seed: got"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
