"""Quantisation against PyTorch, brute force and what must not change."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.intervene.quantise import (
    Codebook,
    Integer,
    MiniFloat,
    bake,
    grid,
    outlier_ratio,
    place,
    plant_outlier,
    qat,
    quantise,
    quantise_activations,
    round_layer,
    sensitivity,
)
from reappraisal.lab.ensemble import SGD, Ensemble, train, untrained
from reappraisal.lab.models import convnet, mlp, reset, resnet, transformer
from reappraisal.measure.reading import read_outputs


def normal(*shape, seed=0, kind=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=kind)


def state(model):
    if isinstance(model, Ensemble):
        return {k: v.clone() for k, v in model.tensors().items()}
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def batch_norm_net():
    m = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(8, 3),
    )
    return reset(m, 0)


NETS = {
    "mlp": (lambda: mlp([6, 8, 3], seed=1), (20, 6)),
    "batch norm and dropout": (batch_norm_net, (20, 6)),
    "residual": (lambda: mlp([6, 8, 8, 3], residual=True, seed=1), (20, 6)),
    "convnet": (lambda: convnet((1, 4, 4), 3, seed=1), (9, 1, 6, 6)),
    "resnet": (lambda: resnet((2, 4, 8), classes=3, seed=1), (5, 2, 6, 6)),
    "attention": (
        lambda: transformer(
            4, 3, 5, width=8, heads=2, depth=1, tokens=False, seed=1
        ),
        (10, 5, 4),
    ),
}


# grids


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("binary", [1]),
        ("ternary", [0, 1]),
        ("pow2_3", [0, 0.25, 0.5, 1]),
        ("int3", [0, 1, 2, 3]),
    ],
)
def test_published_levels(name, expected):
    g = grid(name)
    levels = g.levels
    assert levels[levels >= 0].tolist() == expected
    assert torch.equal(levels, -levels.flip(0))
    assert len(levels) <= 2**g.bits


@pytest.mark.parametrize(
    ("name", "top"), [("e4m3", 448), ("e5m2", 57344), ("e3m2", 28),
                      ("e2m3", 7.5), ("float16", 65504)],
)
def test_published_ranges(name, top):
    assert grid(name).high == top == -grid(name).low


@pytest.mark.parametrize("exp", [2, 3, 5])
@pytest.mark.parametrize("man", [0, 1, 4])
def test_floats_round_to_the_nearest_of_all(exp, man):
    g = MiniFloat(exp, man, "none")
    x = normal(1, 500) * torch.exp2(3 * normal(1, 500, seed=1))
    q = place(g, x, scale="unit").nearest(x)
    gap = (x[..., None] - g.levels).abs().amin(-1)
    assert torch.allclose((q - x).abs(), gap, atol=0, rtol=1e-12)


def test_every_bfloat16_survives_and_midpoints_go_to_even():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].float()[None]
    r = place("bfloat16", x, scale="unit")
    assert torch.equal(r.nearest(x), x)
    up = torch.nextafter(x.to(torch.bfloat16), torch.tensor(torch.inf).bfloat16())
    middle = (x.double() + up.double()) / 2
    middle = middle[middle.isfinite() & (middle.abs() < 1e38)].float()[None]
    assert torch.equal(r.nearest(middle), middle.bfloat16().float())


def test_ties_of_integers_go_to_even():
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    q = place("int4", x, scale="unit").nearest(x)
    assert q.tolist() == [[-2, -2, 0, 0, 2, 2]]


# placing


@given(st.integers(0, 10**6), st.sampled_from(["int3", "affine3", "e2m1"]),
       st.sampled_from(["max", "mse", 0.9]),
       st.sampled_from(["tensor", "channel", 3]))
@settings(max_examples=60, deadline=None)
def test_scaling_and_order_do_not_matter(seed, name, scale, kind):
    w = normal(4, 7, seed=seed)
    q = place(name, w, kind, scale).nearest(w)
    # by a power of two, which is exact
    double = place(name, 4 * w, kind, scale).nearest(4 * w)
    assert torch.allclose(double, 4 * q, atol=1e-12)
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    shuffled = place(name, w[rows], kind, scale).nearest(w[rows])
    assert torch.allclose(shuffled, q[rows], atol=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_rounding_twice_is_rounding_once(seed, bits):
    w = normal(3, 9, seed=seed)
    r = place(bits, w, 4)
    q = r.nearest(w)
    assert torch.allclose(r.nearest(q), q, atol=1e-12)
    assert ((q - w).abs() <= r.scale.amax() / 2 + 1e-12).all()


@pytest.mark.parametrize("name", ["int2", "int4", "affine3", "e2m1"])
@pytest.mark.parametrize("kind", ["tensor", "channel", 4])
def test_mse_scale_beats_all_shrinkages(name, kind):
    w = normal(5, 12)
    loss = (w - place(name, w, kind, "mse").nearest(w)).square().sum()
    for scale in ("max", 0.99, 0.9, 0.8):
        other = (w - place(name, w, kind, scale).nearest(w)).square().sum()
        assert loss <= other + 1e-12


def test_mse_scale_of_signs_is_the_mean_magnitude():
    w = normal(6, 11)
    s = place("binary", w, "channel", "mse").scale[:, 0, 0]
    assert torch.allclose(s, w.abs().mean(1))


def test_quantile_scale_is_that_of_numpy():
    w = normal(1, 101)
    s = place("int4", w, "tensor", 0.9).scale.item()
    expected = np.quantile(np.abs(w.numpy()), 0.9, method="inverted_cdf")
    assert math.isclose(s * 7, expected)


def test_groups_are_blocks_and_the_last_may_be_smaller():
    w = normal(3, 10)
    q = place("int3", w, 4).nearest(w)
    parts = [place("int3", p, "channel").nearest(p) for p in w.split(4, 1)]
    assert torch.equal(q, torch.cat(parts, 1))
    q = place("lloyd1", w, 4).nearest(w)
    parts = [place("lloyd1", p).nearest(p) for p in w.split(4, 1)]
    assert torch.allclose(q, torch.cat(parts, 1))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_noise_theory(bits):
    w = 2 * torch.rand(1, 20000, dtype=torch.float64) - 1
    r = place(bits, w, "tensor")
    mse = (r.nearest(w) - w).square().mean()
    assert abs(mse / (r.scale.item() ** 2 / 12) - 1) < 0.05


def test_lloyd_published_gaussian_distortion():
    x = normal(1, 100_000)
    for bits, expected in (1, 0.3634), (2, 0.1175), (3, 0.03454):
        q = place(f"lloyd{bits}", x).nearest(x)
        assert abs((q - x).square().mean() / expected - 1) < 0.02


def test_zero_stays_zero():
    for name in "int3", "affine3", "e4m3", "ternary", "pow2_4", "lloyd2":
        assert not place(name, torch.zeros(2, 3)).nearest(torch.zeros(2, 3)).any()
        w = normal(4, 8).abs() + 0.3
        w[:, 0] = 0
        if name != "lloyd2":
            assert not place(name, w).nearest(w)[:, 0].any()


# rules


def test_stochastic_is_unbiased_and_stays_beside():
    w = normal(3, 5)
    step = place("int3", w).scale[:, 0]
    draws = torch.stack(
        [
            round_layer(w, None, 3, rounding="stochastic", seed=k).weight
            for k in range(400)
        ]
    )
    assert ((draws - w).abs() < step + 1e-9).all()
    p = (w / step) % 1
    se = step * (p * (1 - p) / 400).sqrt()
    assert ((draws.mean(0) - w).abs() <= 5 * se + 1e-9).all()
    book = round_layer(w, None, Codebook((-1, 0.2, 1)), rounding="stochastic")
    assert len(book.weight[0].unique()) <= 3


def test_rules_that_look_at_data_beat_nearest_on_average():
    errors = {}
    for rule in "nearest", "gpfq", "gptq":
        found = []
        for k in range(20):
            w = 2 * torch.rand(8, 40, dtype=torch.float64,
                               generator=torch.Generator().manual_seed(k)) - 1
            x = normal(16, 40, seed=k)
            found.append(round_layer(w, x, "ternary", rounding=rule).error)
        errors[rule] = float(torch.stack(found).mean())
    assert errors["gpfq"] < 0.7 * errors["nearest"]
    assert errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize("rule", ["gpfq", "gptq"])
def test_orthogonal_inputs_leave_nothing_to_gain(rule):
    q, _ = torch.linalg.qr(normal(30, 9))
    w = normal(4, 9)
    scaled = q * torch.linspace(0.5, 3, 9)
    got = round_layer(w, scaled, 3, rounding=rule).weight
    assert torch.equal(got, place(3, w).nearest(w))


@pytest.mark.parametrize("rule", ["gpfq", "gptq"])
def test_silent_inputs_do_no_harm(rule):
    w, x = normal(4, 6), normal(20, 6)
    x[:, 2] = 0
    got = round_layer(w, x, 3, rounding=rule).weight
    assert torch.equal(got[:, 2], place(3, w).nearest(w)[:, 2])
    rest = [0, 1, 3, 4, 5]
    ruler = place(3, w)
    assert ruler.count == 4
    assert got.isfinite().all()
    dead = round_layer(w, 0 * x, 3, rounding=rule)
    assert torch.equal(dead.weight, ruler.nearest(w)) and dead.error == 0
    assert rest


# networks


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("rule", ["nearest", "stochastic", "gpfq", "gptq"])
def test_networks_are_accepted_and_left_alone(kind, rule):
    build, shape = NETS[kind]
    m, x = build().train(), normal(*shape, kind=torch.float32)
    m.requires_grad_(False)
    before = state(m)
    how = {} if rule in ("nearest", "stochastic") else {"calibration": x}
    if kind == "attention" and how:
        how["calibration"] = x
    child = quantise(m, 4, rounding=rule, **how)
    again = quantise(m, 4, rounding=rule, **how)
    assert same(before, state(m)) and m.training and child is not m
    assert not m._forward_pre_hooks
    assert same(state(child), state(again))
    for name, p in child.named_parameters():
        old = m.get_parameter(name)
        assert p.ndim > 1 or torch.equal(p, old)
        if p.ndim > 1:
            rows = (p / old.flatten(1).abs().amax(1).view(
                -1, *[1] * (p.ndim - 1))) * 7
            assert torch.allclose(rows, rows.round(), atol=1e-4)


@pytest.mark.parametrize("kind", ["residual", "convnet", "attention"])
@pytest.mark.parametrize("rule", ["nearest", "stochastic", "gpfq", "gptq"])
def test_ensemble_is_a_loop_over_members(kind, rule):
    build, shape = NETS[kind]
    x = normal(*shape, kind=torch.float32)
    ensemble = untrained(build(), [3, 4])
    how = {} if rule in ("nearest", "stochastic") else {"calibration": x}
    before = state(ensemble)
    together = quantise(ensemble, "affine3", rounding=rule, seed=5, **how)
    assert same(before, state(ensemble))
    for i in range(2):
        alone = quantise(
            ensemble.member(i), "affine3", rounding=rule, seed=5 + i, **how
        )
        for k, p in alone.named_parameters():
            close = torch.isclose(p, together.params[k][i], atol=1e-5)
            assert close.double().mean() > 0.98  # ties may fall either way


def test_convolution_patches_are_what_the_layer_multiplies():
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 2), dilation=(1, 2),
                     groups=2, padding_mode="reflect")
    x = normal(3, 4, 9, 8, kind=torch.float32)
    from reappraisal.intervene.quantise import _patches

    rows = _patches(conv, x)
    w = conv.weight.flatten(1).unflatten(0, (2, 3))
    out = torch.einsum("mgd,god->mgo", rows, w).flatten(1) + conv.bias
    want = conv(x)
    assert torch.allclose(out.view(3, *want.shape[2:], 6).movedim(-1, 1), want,
                          atol=1e-5)


def test_first_layer_of_a_network_is_the_layer_alone():
    m = mlp([6, 8, 3], seed=2)
    x = normal(40, 6, kind=torch.float32)
    for rule in "gpfq", "gptq":
        child = quantise(m, 3, rounding=rule, calibration=x)
        one = round_layer(m[1].weight, x, 3, rounding=rule)
        assert torch.allclose(child[1].weight, one.weight, atol=1e-6)
        # the second sees what the first gives after it was rounded
        a = torch.relu(m[1](x)).detach()
        b = torch.relu(child[1](x)).detach()
        two = round_layer(
            m[3].weight, a, 3, rounding=rule, rounded_inputs=b
        )
        assert torch.allclose(child[3].weight, two.weight, atol=1e-5)


def test_mixed_precision_touches_only_what_is_named():
    m = mlp([6, 8, 3], seed=2)
    child = quantise(m, {"1.weight": 2, "3.weight": None})
    assert torch.equal(child[3].weight, m[3].weight)
    assert len(child[1].weight[0].unique()) <= 3


def test_tied_weights_stay_tied():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    m[1].weight = m[0].weight
    child = quantise(m, 3)
    assert child[0].weight is child[1].weight
    with pytest.raises(ValueError, match="shared"):
        qat(m, 3)


def test_half_precision_is_kept():
    m = mlp([6, 8, 3]).bfloat16()
    child = quantise(m, 4)
    assert child[1].weight.dtype == torch.bfloat16
    assert len(child[1].weight[0].unique()) <= 15


# activations


def test_static_scales_follow_the_calibration_data_only():
    m = mlp([6, 8, 3], seed=1)
    x = normal(30, 6, kind=torch.float32)
    child = quantise_activations(m, "int4", x)
    assert torch.allclose(child[1].input_rounding.scale, x.abs().max() / 7)
    assert "1.input_rounding.scale" in child.state_dict()
    assert torch.allclose(child(10 * x)[:5], child(10 * x[:5]), atol=1e-6)
    free = quantise_activations(m, "int4")
    assert torch.allclose(free(x)[:5], free(x[:5]), atol=1e-6)
    assert same(state(free), state(m))
    copied = copy.deepcopy(child)
    assert torch.equal(copied(x), child(x))


def test_activations_of_an_ensemble_are_a_loop_over_members():
    e = untrained(mlp([6, 8, 3]), [1, 2, 3])
    x = normal(30, 6, kind=torch.float32)
    for data in (x, None):
        child = quantise_activations(e, "affine4", data)
        together = child.predict(x)
        for i in range(3):
            alone = quantise_activations(e.member(i), "affine4", data)
            assert torch.allclose(alone(x), together[i], atol=1e-5)
            assert torch.allclose(child.member(i)(x), together[i], atol=1e-5)


# training


def test_straight_through_slope():
    w = torch.tensor([[0.2, -0.4, 3.0, -3.0]], requires_grad=True)
    r = place(3, torch.tensor([[1.0, 0.5, 0.2, 0.1]]))
    (r.nearest(w) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert w.grad.tolist() == [[1, 2, 0, 0]]


def test_training_through_rounding_and_baking():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g)).argmax(1)
    start = untrained(mlp([6, 16, 3]), range(3))
    start = train(start, (x, y), steps=100, optimiser=SGD(0.1, momentum=0.9))
    plain = quantise(start, 2).evaluate(x, y).accuracy
    for learned in (False, True):
        ready = qat(start, 2, scale="mse", learned=learned)
        done = train(ready, (x, y), steps=150, batch_size=50,
                     optimiser=SGD(0.05, momentum=0.9))
        child = bake(done)
        assert set(child.params) == set(start.params)
        assert torch.allclose(child.predict(x), done.predict(x), atol=1e-4)
        assert torch.allclose(bake(done.member(0))(x), child.predict(x)[0],
                              atol=1e-4)
        assert child.evaluate(x, y).accuracy.mean() > plain.mean() + 0.02
        assert all(len(r.unique()) <= 3 for r in child.params["1.weight"][0])
        if learned:
            steps = done.params["1.parametrizations.weight.0.step"]
            first = ready.params["1.parametrizations.weight.0.step"]
            assert not torch.allclose(steps, first)


def test_fresh_weights_are_not_taken_for_granted():
    with pytest.raises(ValueError, match="reset_parameters"):
        untrained(qat(mlp([6, 8, 3]), 4), [1, 2])


def test_baking_leaves_the_original_parametrised():
    m = qat(mlp([6, 8, 3]), 3, activations="affine4")
    x = normal(5, 6, kind=torch.float32)
    child = bake(m)
    assert type(child[1]) is nn.Linear
    assert torch.equal(child(x), m(x))
    assert [k for k, _ in child.named_parameters()] == [
        k for k, _ in mlp([6, 8, 3]).named_parameters()
    ]
    assert hasattr(m[1], "parametrizations")
    m(x).sum().backward()
    assert m[1].parametrizations.weight.original.grad.abs().sum() > 0


# sensitivity and outliers


def test_sensitivity_points_at_the_planted_weight():
    m = mlp([6, 8, 8, 3], seed=1)
    x, y = normal(60, 6, kind=torch.float32), torch.arange(60) % 3
    with torch.no_grad():
        m[5].weight *= 30  # steep where it reads, and coarse
    for how in "fisher", "kl", "norm", "hessian_trace":
        found = sensitivity(m, (x, y), 3, how)
        assert list(found) == ["1.weight", "3.weight", "5.weight"]
        assert all(v >= -1e-9 for v in found.values())
        exact = sensitivity(m, (x, y), 16, how)
        assert all(exact[k] < found[k] for k in found)
    assert max(found, key=lambda k: sensitivity(m, (x, y), 3, "norm")[k]) == (
        "5.weight"
    )


def test_outliers_planted_and_not():
    build, shape = NETS["attention"]
    m, x = build(), normal(*shape, kind=torch.float32)
    before = outlier_ratio(m, x)
    norm, reader = "blocks.0.body.0", "blocks.0.body.1.read"
    giant = plant_outlier(m, norm, reader, channel=2, factor=64)
    after = outlier_ratio(giant, x)
    assert torch.allclose(giant(x), m(x), atol=1e-4)
    assert after[reader] > 20 * before[reader]
    assert all(
        torch.isclose(after[k], before[k], rtol=1e-3)
        for k in before if k != reader
    )
    e = Ensemble.of([m, build()])
    twins = plant_outlier(e, norm, [reader], 2, 64)
    logits = read_outputs(twins, x).logits
    assert torch.allclose(logits[0], giant(x), atol=1e-5)
    assert torch.allclose(
        outlier_ratio(twins, x)[reader][0], after[reader], rtol=1e-4
    )


# what is refused


def bad(tensor=math.nan):
    m = mlp([6, 8, 3])
    m[1].weight.data[0, 0] = tensor
    return m


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: grid("float9"), "grid"),
        (lambda: grid(True), "bits"),
        (lambda: Integer(1), "bits"),
        (lambda: Integer(2.5), "bits"),
        (lambda: MiniFloat(1, 2), "exp"),
        (lambda: MiniFloat(4, 3, "nan"), "special"),
        (lambda: Codebook((0.0,)), "values"),
        (lambda: Codebook((0.0, math.inf)), "values"),
        (lambda: quantise(bad(), 4), "not finite"),
        (lambda: quantise(bad(math.inf), 4), "not finite"),
        (lambda: quantise(nn.Flatten(), 4), "nothing to round"),
        (lambda: quantise(3, 4), "model"),
        (lambda: quantise(mlp([6, 3]), {"x": 4}), "no weight"),
        (lambda: quantise(mlp([6, 3]), 4, rounding="gptq"), "calibration"),
        (lambda: quantise(mlp([6, 3]), 4, rounding="gptq",
                          calibration=torch.zeros(0, 6)), "empty"),
        (lambda: quantise(mlp([6, 3]), 4, damping=-1), "damping"),
        (lambda: quantise(mlp([6, 3]), 4, rounding="gptq", damping=0,
                          calibration=torch.ones(2, 6)), "singular"),
        (lambda: quantise(mlp([6, 3]), 4, seed=-1), "seed"),
        (lambda: quantise(nn.GRU(3, 4), 4, rounding="gpfq",
                          calibration=torch.ones(2, 5, 3)), "Linear"),
        (lambda: place(4, torch.zeros(3)), "weight"),
        (lambda: place(4, torch.zeros(2, 3), 0), "granularity"),
        (lambda: place(4, torch.zeros(2, 3), "row"), "granularity"),
        (lambda: place(4, torch.zeros(2, 3), scale="best"), "scale"),
        (lambda: round_layer(torch.zeros(2, 3), torch.zeros(4, 2)), "inputs"),
        (lambda: round_layer(torch.zeros(2, 3), rounding="gpfq"), "inputs"),
        (lambda: quantise_activations(mlp([6, 3]), "lloyd4"), "learned"),
        (lambda: quantise_activations(mlp([6, 3]), 4, scale=0.9), "missing"),
        (lambda: quantise_activations(mlp([6, 3]), layers=["5"]), "layers"),
        (lambda: quantise_activations(quantise_activations(mlp([6, 3]))),
         "already"),
        (lambda: qat(mlp([6, 3]), "lloyd4"), "learned"),
        (lambda: bake(mlp([6, 3])), "qat"),
        (lambda: sensitivity(mlp([6, 3]), torch.ones(2, 6), 4, "size"), "how"),
        (lambda: plant_outlier(mlp([6, 8, 3]), "2", ["3"]), "norm"),
        (lambda: plant_outlier(mlp([6, 8, 3], norm="layer"), "2", ["4"], 8),
         "channel"),
        (lambda: plant_outlier(mlp([6, 8, 3], norm="layer"), "2", ["4"],
                               factor=0), "factor"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
