"""Other weights, the same function: what may move and what must not."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import shaken
from torch import nn

from reappraisal.intervene.symmetry import (
    absorb_norm,
    attention_groups,
    balance,
    flip_signs,
    imbalance,
    in_precision,
    invariance_matrix,
    launder,
    mix_units,
    permute_hidden,
    rescale_layers,
    rescale_neurons,
    rotate_linear,
    same_function,
    scale_units,
)
from reappraisal.intervene.units import hidden_units
from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import generator


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1),
        nn.Dropout(0.5), nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
    )


IMAGE = torch.randn(3, 1, 8, 8, generator=generator(1)).double()
NETS = {
    "mlp": lambda: models.mlp([64, 6, 5, 3]),
    "residual": lambda: models.resnet([1, 4, 6], classes=3, norm=None),
    "group norm": lambda: models.resnet([1, 4, 8], classes=3),
    "batch norm": conv_bn,
    "layer norm": lambda: models.mlp(
        [64, 6, 6, 3], norm="layer", residual=True
    ),
}


def energy(net):
    return sum(p.detach().square().sum() for p in net.parameters()).item()


@pytest.mark.parametrize("name", NETS)
def test_same_function(name):
    net = shaken(NETS[name]())
    for change in (
        lambda: permute_hidden(net, IMAGE, 3),
        lambda: rescale_neurons(net, IMAGE, 1.0, 3),
        lambda: balance(net, IMAGE),
    ):
        twin = change()
        distance = same_function(net, twin, IMAGE, 1e-9)
        assert distance.same, distance
        moved = [
            not torch.equal(p, q)
            for p, q in zip(net.parameters(), twin.parameters(), strict=True)
        ]
        assert any(moved)


def test_left_as_it_was_and_deterministic():
    net = conv_bn().train()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    x = IMAGE.float()
    a, b = (rescale_neurons(net, x, 0.5, 7) for _ in range(2))
    c = rescale_neurons(net, x, 0.5, torch.Generator().manual_seed(1))
    d = rescale_neurons(net, x, 0.5, torch.Generator().manual_seed(1))
    for p, q in ((a, b), (c, d)):
        for s, t in zip(p.parameters(), q.parameters(), strict=True):
            assert torch.equal(s, t)
    assert not torch.equal(a[1].weight, c[1].weight)
    permute_hidden(net, x), balance(net, x), absorb_norm(net, x)
    assert net.training and a.training
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), sigma=st.floats(0, 2))
def test_factors_keep_products_and_balance_forgets_them(seed, sigma):
    net = shaken(models.mlp([3, 5, 4, 2]), seed)
    x = torch.randn(6, 3, generator=generator(seed)).double()
    twin = rescale_neurons(net, x, sigma, seed)
    # weights along a path multiply to the same
    paths = [m[5].weight.abs() @ m[3].weight.abs() @ m[1].weight.abs()
             for m in (net, twin)]
    assert torch.allclose(*paths, rtol=1e-9)
    a, b = balance(net, x), balance(twin, x)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert energy(a) <= min(energy(net), energy(twin)) + 1e-9
    assert all(v.abs().max() < 1e-8 for v in imbalance(a, x).values())


def test_balance_of_two_layers_in_closed_form():
    net = shaken(models.mlp([3, 4, 2], bias=False))
    x = torch.randn(4, 3).double()
    a = net[1].weight.norm(dim=1)
    b = net[3].weight.norm(dim=0)
    even = balance(net, x)
    assert torch.allclose(even[1].weight.norm(dim=1), (a * b).sqrt())
    assert math.isclose(energy(even), 2 * (a * b).sum().item())
    (off,) = imbalance(net, x).values()
    assert torch.allclose(off, (a / b).log())
    # biases that do not count still move along
    biased = shaken(models.mlp([3, 4, 2]))
    free = balance(biased, x, biases=False)
    assert torch.allclose(
        free[1].weight.norm(dim=1), free[3].weight.norm(dim=0)
    )
    assert same_function(biased, free, x, 1e-10).same


def test_dead_unit_is_left_alone():
    net = shaken(models.mlp([3, 4, 2]))
    with torch.no_grad():
        net[3].weight[:, 1] = 0
    x = torch.randn(4, 3).double()
    even = balance(net, x)
    assert torch.equal(even[1].weight[1], net[1].weight[1])
    assert imbalance(net, x)["1"][1] == math.inf


def test_layers_in_closed_form():
    net = shaken(models.mlp([3, 4, 4, 2]))
    x = torch.randn(4, 3).double()
    twin = rescale_layers(net, x, [4, 0.5, 0.5])
    assert torch.equal(twin[1].weight, 4 * net[1].weight)
    assert torch.equal(twin[1].bias, 4 * net[1].bias)
    assert torch.equal(twin[3].weight, net[3].weight / 2)
    assert torch.equal(twin[3].bias, 2 * net[3].bias)
    assert torch.equal(twin[5].weight, net[5].weight / 2)
    assert torch.equal(twin[5].bias, net[5].bias)
    # a residual stream is no chain, but its groups have names
    res = shaken(NETS["residual"]())
    with pytest.raises(ValueError, match="a mapping from the groups"):
        rescale_layers(res, IMAGE, [2, 0.5])
    twin = rescale_layers(res, IMAGE, {"0": 8.0, "4.body.0": 0.25})
    assert torch.equal(twin[0].weight, 8 * res[0].weight)
    assert same_function(res, twin, IMAGE, 1e-10).same


def test_rotation_keeps_spectra_and_any_basis_does_not():
    net = shaken(models.mlp([3, 5, 5, 2], "linear"))
    x = torch.randn(4, 3).double()
    turned = rotate_linear(net, x, seed=2)
    mixed = rotate_linear(net, x, "gl", seed=2)
    for twin, same in ((turned, True), (mixed, False)):
        assert same_function(net, twin, x, 1e-9).same
        for k in (1, 2, 3):
            a, b = (torch.linalg.svdvals(m[k].weight) for m in (net, twin))
            assert torch.allclose(a, b) == same


def test_attention_of_torch_and_of_the_lab():
    x = torch.randn(3, 4, 6, generator=generator(0)).double()
    ours = shaken(
        nn.Sequential(
            models.Attention(6, 2, False), nn.Flatten(), nn.Linear(24, 3)
        )
    )
    theirs = nn.Sequential(
        nn.TransformerEncoderLayer(6, 2, 5, batch_first=True, dropout=0.0),
        nn.Flatten(), nn.Linear(24, 3),
    )
    shaken(theirs)
    for net in (ours, theirs):
        groups = attention_groups(net)
        assert [g.size for g in groups] == [3, 3]
        for g in groups:
            G = torch.randn(3, 3, generator=generator(4)).double()
            twin = mix_units(net, g, G + 2 * torch.eye(3))
            assert same_function(net, twin, x, 1e-8).same
            lost = mix_units(net, without_first(g), G)
            assert not same_function(net, lost, x, 1e-3).same
        assert same_function(net, rotate_linear(net, x), x, 1e-8).same
        assert same_function(net, rescale_neurons(net, x, 1), x, 1e-8).same
        assert same_function(net, balance(net, x), x, 1e-8).same
    assert attention_groups(models.mlp([2, 3, 2])) == []


def without_first(group):
    powers = (0.0, *group.mixes[0][1:])
    return replace(group, mixes=(powers,))


def test_signs():
    net = shaken(models.mlp([3, 6, 6, 2], "tanh"))
    x = torch.randn(4, 3).double()
    twin = flip_signs(net, x, 1)
    assert torch.equal(twin[1].weight.abs(), net[1].weight.abs())
    assert not torch.equal(twin[1].weight, net[1].weight)
    assert same_function(net, twin, x, 1e-12).same


def test_absorbing_norms():
    net = shaken(conv_bn()).train()
    twin = absorb_norm(net, IMAGE)
    assert sum(isinstance(m, nn.Identity) for m in twin) == 2
    assert twin.training and twin[4].bias is not None
    assert same_function(net, twin, IMAGE, 1e-10).same
    many = Ensemble.of([shaken(conv_bn(), s) for s in range(3)])
    fewer = absorb_norm(many, IMAGE)
    assert same_function(many, fewer, IMAGE, 1e-10).same.all()
    assert "1.weight" not in fewer.params and not fewer.buffers


class Listened(nn.Module):
    """The batch normalisation is not the only one to hear the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        h = self.a(x)
        return self.bn(h) + h


def test_layer_that_is_used_elsewhere_cannot_absorb():
    net = shaken(Listened())
    with pytest.raises(ValueError, match="used elsewhere"):
        absorb_norm(net, torch.randn(4, 3).double())
    with pytest.raises(ValueError, match="no batch normalisation"):
        absorb_norm(models.mlp([3, 4, 2]), torch.randn(4, 3))


def test_ensemble_is_a_loop_over_members():
    nets = [shaken(models.mlp([3, 4, 4, 2]), s) for s in range(3)]
    many = Ensemble.of(nets)
    x = torch.randn(5, 3).double()
    group = hidden_units(many, x)[0]
    f = torch.rand(3, 4).double() + 0.5
    both = {
        "scale": (
            scale_units(many, group, f),
            [scale_units(n, group, g) for n, g in zip(nets, f, strict=True)],
        ),
        "balance": (balance(many, x), [balance(n, x) for n in nets]),
        "layers": (
            rescale_layers(many, x, [2, 1, 0.5]),
            [rescale_layers(n, x, [2, 1, 0.5]) for n in nets],
        ),
    }
    for stack, alone in both.values():
        for i, net in enumerate(alone):
            for k, p in net.named_parameters():
                assert torch.allclose(stack.params[k][i], p, atol=1e-8)
    distance = same_function(many, both["scale"][0], x, 1e-10)
    assert distance.same.shape == (3,) and distance.same.all()
    assert len(distance.to_frame()) == 3
    off = imbalance(many, x)["1"]
    for i, net in enumerate(nets):
        assert torch.allclose(off[i], imbalance(net, x)["1"])


def test_distance_tells_functions_apart():
    a, b = (shaken(models.mlp([3, 4, 2]), s) for s in range(2))
    x = torch.randn(20, 3).double()
    far = same_function(a, b, x)
    assert not far.same and far.kl > 0 and "not the same" in repr(far)
    assert 0 < far.label_flips <= 20
    none = same_function(a, a, x, 0.0)
    assert none.same and none.max_abs == none.kl == none.label_flips == 0
    scaled = with_last(a, 2.0)
    assert same_function(a, scaled, x).label_flips == 0
    assert not same_function(a, scaled, x).same


def with_last(net, c):
    net = copy.deepcopy(net)
    for p in net[-1].parameters():
        p.data *= c
    return net


def test_precision_runs_out():
    net = shaken(models.mlp([3, 4, 2]))
    x = torch.randn(20, 3).double()
    group = hidden_units(net, x)[0]
    huge = scale_units(net, group, 1e6)
    found = in_precision(net, huge, x)
    assert found[torch.float64].max_abs < 1e-9
    assert found[torch.float64].max_abs < found[torch.float32].max_abs
    assert found[torch.float32].max_abs < found[torch.bfloat16].max_abs
    assert found[torch.float16] is None
    assert net[1].weight.dtype is torch.float64


def test_launder_reaches_or_says_so():
    net = shaken(models.mlp([3, 6, 5, 2]))
    x = torch.randn(20, 3).double()

    def norm(m):
        return m[3].weight.detach().norm()

    wish = 1.3 * float(norm(net))
    found = launder(net, norm, wish, x, tolerance=1e-4, tries=40)
    assert found.reached and abs(float(norm(found.model)) - wish) < 2e-4
    assert found.distance.same and float(found.sigma) > 0
    again = launder(net, norm, wish, x, tolerance=1e-4, tries=40)
    assert torch.equal(again.model[3].weight, found.model[3].weight)

    def invariant(m):
        return (m[5].weight.abs() @ m[3].weight.abs() @ m[1].weight.abs()
                ).sum()

    stuck = launder(net, invariant, 0.0, x, tries=2)
    assert not stuck.reached
    assert torch.isclose(stuck.after, stuck.before, rtol=1e-9)
    here = launder(net, norm, float(norm(net)), x)
    assert here.reached and here.sigma == 0
    frame = found.to_frame()
    assert frame.loc[0, "reached"] and frame.loc[0, "label_flips"] == 0


def test_invariance_matrix_finds_planted_metrics():
    many = Ensemble.of([shaken(models.mlp([3, 5, 2]), s) for s in range(3)])
    x = torch.randn(10, 3).double()
    seen = invariance_matrix(
        many,
        {
            "sum": lambda m: m.params["1.weight"].abs().sum((1, 2)),
            "first": lambda m: m.params["1.weight"][:, 0, 0],
            "none": lambda m: torch.ones(3),
        },
        {
            "permute": lambda m: permute_hidden(m, x, 5),
            "scale": lambda m: rescale_neurons(m, x, 1.0, 5),
            "break": lambda m: Ensemble.of([m.member(0)] * 3),
        },
        x,
    )
    change = seen.change.amax(-1)
    assert change[0, 0] < 1e-12 < 1e-3 < change[0, 1]
    assert change[1].min() > 1e-3 and (change[2] == 0).all()
    assert [bool(d.same.all()) for d in seen.distances] == [True, True, False]
    frame = seen.to_frame()
    assert len(frame) == 27 and set(frame["transform"]) == {
        "permute", "scale", "break"
    }
    assert "permute" in repr(seen)


NET = shaken(models.mlp([3, 4, 4, 2]))
X = torch.randn(4, 3).double()
GROUP = hidden_units(NET, X)[0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: permute_hidden(models.mlp([3, 2]), X), "no hidden units"),
        (lambda: rescale_neurons(NET, X, -1.0), "sigma"),
        (lambda: rescale_neurons(NET, X, math.nan), "sigma"),
        (lambda: rescale_neurons(models.mlp([3, 4, 2], "gelu"), X, 1.0),
         "scalings"),
        (lambda: flip_signs(NET, X), "flips"),
        (lambda: rotate_linear(NET, X), "mixes"),
        (lambda: rotate_linear(NET, X, "O(n)"), "kind"),
        (lambda: scale_units(NET, GROUP, [1.0, 2.0]), "factor"),
        (lambda: scale_units(NET, GROUP, math.inf), "factor"),
        (lambda: scale_units(NET, GROUP, "two"), "factor"),
        (lambda: scale_units(NET, GROUP, -2.0), "signs"),
        (lambda: scale_units(NET, GROUP, [-1.0, 1, 1, 1]), "change sign"),
        (lambda: scale_units(NET, GROUP, 2.0, which=1), "choice 1 of 1"),
        (lambda: scale_units([NET], GROUP, 2.0), "nn.Module or an Ensemble"),
        (lambda: mix_units(NET, GROUP, torch.eye(4)), "be mixed"),
        (lambda: rescale_layers(NET, X, [1, 1]), "2 numbers"),
        (lambda: rescale_layers(NET, X, [2, 2, 2]), "product"),
        (lambda: rescale_layers(NET, X, [-1, -1, 1]), "positive"),
        (lambda: rescale_layers(NET, X, {"1": 0.0}), "positive"),
        (lambda: rescale_layers(NET, X, {"9": 1.0}), "no homogeneous group"),
        (lambda: balance(NET, X, sweeps=1), "sweeps"),
        (lambda: balance(broken(), X), "not finite"),
        (lambda: same_function(NET, NET, X, atol=-1), "atol"),
        (lambda: same_function(NET, models.mlp([3, 3]), X), "a, b"),
        (lambda: same_function(NET, NET, X[:0]), "empty"),
        (lambda: in_precision(NET, NET, X, [torch.int32]), "dtypes"),
        (lambda: invariance_matrix(NET, {}, {"a": id}, X), "metrics"),
        (lambda: invariance_matrix(NET, {"a": id}, [], X), "transforms"),
        (lambda: launder(NET, lambda m: math.nan, 1.0, X), "not finite"),
        (lambda: launder(NET, lambda m: 1.0, 1.0, X, tries=0), "tries"),
        (lambda: launder(NET, lambda m: [1.0, 2.0], 1.0, X), "one number"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def broken():
    net = copy.deepcopy(NET)
    net[1].weight.data[0, 0] = np.nan
    return net
