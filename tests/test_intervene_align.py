"""Alignment: planted orders found, best orders best, twins merged."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import shaken
from scipy.cluster.hierarchy import dendrogram
from torch import nn

from reappraisal.intervene.align import (
    MATCHINGS,
    _assigned,
    activation_matching,
    apply,
    feature_complexity,
    interpolate,
    merge,
    merge_tree,
    merge_units,
    plant_duplicates,
    straight_through_matching,
    weight_matching,
)
from reappraisal.intervene.symmetry import permute_hidden, same_function
from reappraisal.intervene.units import hidden_units
from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import generator
from reappraisal.measure.sharpness import barrier


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 4),
    )


IMAGE = torch.randn(20, 1, 8, 8, generator=generator(1)).double()
SERIES = torch.randn(12, 5, 3, generator=generator(2)).double()
TOKENS = torch.randint(0, 9, (12, 5), generator=generator(3))
NETS = {
    "mlp": (lambda: models.mlp([64, 16, 12, 8, 4]), IMAGE),
    "batch norm": (conv_bn, IMAGE),
    "group norm": (lambda: models.convnet([1, 8, 12], 4), IMAGE),
    "resnet": (lambda: models.resnet([1, 6, 8], 2, 4, None), IMAGE),
    "layer norm": (
        lambda: models.mlp([64, 9, 9, 4], norm="layer", residual=True), IMAGE
    ),
    "transformer": (
        lambda: models.transformer(9, 4, 5, width=8, heads=2, depth=2),
        TOKENS,
    ),
    "rnn": (lambda: models.recurrent(3, 7, 4, cell="rnn"), SERIES),
}


@pytest.mark.parametrize("name", NETS)
def test_planted_order_is_recovered_exactly(name):
    build, x = NETS[name]
    net = shaken(build())
    other = permute_hidden(net, x, 5)
    found = weight_matching(net, other, x)
    back = found.apply(other)
    for k, t in net.state_dict().items():
        assert torch.equal(back.state_dict()[k], t), k
    assert same_function(other, back, x, 1e-10).same
    square = sum(p.detach().square().sum() for p in net.parameters())
    assert torch.isclose(found.after, square)
    assert found.before < found.after and found.moved > 0.3


@pytest.mark.parametrize("name", ["mlp", "batch norm", "group norm", "resnet"])
def test_planted_order_is_seen_in_what_units_do(name):
    build, x = NETS[name]
    net = shaken(build())
    other = permute_hidden(net, x, 5)
    for how in "correlation", "product":
        back = apply(other, activation_matching(net, other, x, how=how))
        if how == "correlation":
            for k, t in net.state_dict().items():
                assert torch.equal(back.state_dict()[k], t), k
        assert same_function(other, back, x, 1e-10).same


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from([4, 6]), seed=st.integers(0, 10**6))
def test_blocks_are_assigned_best(n, seed):
    gain = np.random.default_rng(seed).normal(size=(n, n))

    def together(order, g):
        rows = np.reshape(order, (g, -1)) // (n // g)
        return (rows == rows[:, :1]).all()

    for g in (1, 2, n // 2):
        kinds = () if g == 1 else (g,)
        best = max(
            gain[range(n), o].sum()
            for o in itertools.permutations(range(n)) if together(o, g)
        )
        order = _assigned(gain, kinds)
        assert together(order, g)
        assert math.isclose(gain[range(n), order].sum(), best)


@settings(max_examples=15, deadline=None)
@given(
    depth=st.integers(1, 3), n=st.integers(2, 6), seed=st.integers(0, 10**6)
)
def test_matching_never_makes_it_worse(depth, n, seed):
    sizes = [3, *[n] * depth, 2]
    a, b = (shaken(models.mlp(sizes), seed + k) for k in range(2))
    x = torch.randn(5, 3).double()
    found = weight_matching(a, b, x, seed=seed)
    assert found.after >= found.before
    back = apply(b, found)
    inner = sum(
        (p * q).sum()
        for p, q in zip(a.parameters(), back.parameters(), strict=True)
    )
    assert torch.isclose(found.after, inner.detach())
    again = weight_matching(a, back, x)
    assert again.after > found.after - 1e-9
    # the order that b comes in does not matter for one group
    if depth == 1:
        other = weight_matching(a, permute_hidden(b, x, seed), x)
        assert torch.isclose(other.after, found.after)


def test_twins_have_no_barrier_after_alignment():
    net = shaken(models.mlp([64, 16, 12, 4]))
    other = permute_hidden(net, IMAGE, 1)
    y = net(IMAGE).argmax(1)
    data = (IMAGE, y)
    assert barrier(net, other, data).loss > 0.05
    for how, find in MATCHINGS.items():
        back = apply(other, find(net, other, data))
        assert barrier(net, back, data).loss < 1e-9, how
        twin = merge(net, other, data, how)
        assert same_function(net, twin, IMAGE, 1e-9).same


def test_straight_through_improves_the_middle():
    sizes, members = [64, 12, 12, 4], 3
    a, b = (
        Ensemble.of(
            [shaken(models.mlp(sizes), 10 * k + s) for s in range(members)]
        )
        for k in range(2)
    )
    y = torch.arange(20) % 4
    found = straight_through_matching(a, b, (IMAGE, y), steps=10)
    assert (found.after >= found.before).all()
    assert (found.after > found.before).any()
    single = straight_through_matching(
        a.member(1), b.member(1), (IMAGE, y), steps=10
    )
    assert single.after.ndim == 0
    batched = [(IMAGE[:7], y[:7]), (IMAGE[7:], y[7:])]
    same = straight_through_matching(a, b, batched, steps=10)
    assert torch.allclose(same.after, found.after, atol=1e-6)


def test_ensemble_is_a_loop_over_members():
    nets = [[shaken(conv_bn(), 10 * k + s) for s in range(3)]
            for k in range(2)]
    a, b = map(Ensemble.of, nets)
    for find in (
        lambda a, b: weight_matching(a, b, IMAGE, sweeps=1),
        lambda a, b: activation_matching(a, b, IMAGE),
    ):
        together = find(a, b)
        for s, (p, q) in enumerate(zip(*nets, strict=True)):
            alone = find(p, q)
            assert torch.allclose(alone.after, together.after[s])
            for k, perm in alone.perms.items():
                assert torch.equal(perm, together.perms[k][s])
    mixed = interpolate(a, b, 0.25)
    alone = interpolate(nets[0][2], nets[1][2], 0.25)
    for k, t in alone.state_dict().items():
        if t.is_floating_point():
            assert torch.allclose(mixed.tensors()[k][2], t)


def test_left_as_they_were():
    a, b = conv_bn().train(), conv_bn()
    before = copy.deepcopy((a.state_dict(), b.state_dict()))
    state = torch.get_rng_state()
    x, y = IMAGE.float(), torch.arange(20) % 4
    merge(a, b, x)
    merge(a, b, x, "activation")
    merge(a, b, (x, y), "straight through", steps=2)
    merge_units(a, x, 0.5)
    assert torch.equal(torch.get_rng_state(), state) and a.training
    for net, old in zip((a, b), before, strict=True):
        for k, v in net.state_dict().items():
            assert torch.equal(v, old[k])
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_planted_copies_are_merged(act):
    x = torch.randn(6, 5).double()
    net = shaken(models.mlp([5, 8, 7, 3], act))
    wide = plant_duplicates(net, x, "3", 5, seed=2)
    wide = plant_duplicates(wide, x, "1", 3, seed=2)
    assert [g.size for g in hidden_units(wide, x)] == [11, 12]
    assert same_function(net, wide, x, 1e-10).same
    assert feature_complexity(wide, x, 1e-9)["1"] == 8
    slim = merge_units(wide, x, 1e-9)
    assert slim.units == {"1": 8, "3": 7}
    assert slim.before == {"1": 11, "3": 12}
    assert same_function(net, slim.model, x, 1e-6).same
    assert len(slim.to_frame()) == 8
    assert "11 -> 8" in repr(slim)
    only = merge_units(wide, x, 1e-9, groups=["1"])
    assert only.units == {"1": 8} and only.model[3].out_features == 12
    nothing = merge_units(net, x, 1e-9)
    assert nothing.units == nothing.before


def test_scaled_copies_are_no_copies_for_tanh():
    x = torch.randn(6, 5).double()
    net = shaken(models.mlp([5, 4, 3], "tanh"))
    with torch.no_grad():
        net[1].weight[1] = 2 * net[1].weight[0]
        net[1].bias[1] = 2 * net[1].bias[0]
    assert feature_complexity(net, x, 1e-3)["1"] == 4
    relu = nn.Sequential(net[0], net[1], nn.ReLU(), net[3])
    assert feature_complexity(relu, x, 1e-9)["1"] == 3
    assert same_function(relu, merge_units(relu, x, 1e-9).model, x, 1e-9).same


def test_convolutions_merge_and_normalised_layers_do_not():
    net = shaken(conv_bn())
    wide = plant_duplicates(net, IMAGE, "0", 3, seed=1)
    assert wide[1].num_features == 9
    assert same_function(net, wide, IMAGE, 1e-10).same
    slim = merge_units(wide, IMAGE, 1e-9)
    assert slim.units == {"0": 6, "4": 5}
    assert same_function(net, slim.model, IMAGE, 1e-9).same
    grouped = models.convnet([1, 8, 4])
    assert "0" not in merge_units(grouped, IMAGE.float(), 1.0).units


def test_tree_is_a_dendrogram():
    x = torch.randn(6, 5).double()
    net = plant_duplicates(shaken(models.mlp([5, 6, 3])), x, "1", 2)
    tree = merge_tree(net, x, "1")
    assert tree.shape == (7, 4) and tree[-1, 3] == 8
    assert (tree[:2, 2] < 1e-12).all() and tree[2, 2] > 1e-3
    assert (np.diff(tree[:, 2]) >= 0).all()
    assert len(dendrogram(tree, no_plot=True)["leaves"]) == 8
    many = Ensemble.of([shaken(models.mlp([5, 6, 3]), s) for s in range(3)])
    left = feature_complexity(many, x, 0.1)["1"]
    assert left.shape == (3,) and (left <= 6).all()


A, B = (shaken(models.mlp([5, 4, 3]), s) for s in range(2))
X = torch.randn(6, 5).double()


def broken():
    net = copy.deepcopy(A)
    net[1].weight.data[0, 0] = math.nan
    return net


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: weight_matching(A, models.mlp([5, 3, 3]), X), "differ"),
        (lambda: weight_matching(A, Ensemble.of([B]), X), "differ"),
        (lambda: weight_matching(A, {}, X), "nn.Module or an Ensemble"),
        (lambda: weight_matching(A, broken(), X), "not finite"),
        (lambda: weight_matching(A, B, X, sweeps=0), "sweeps"),
        (lambda: weight_matching(A, B, X[:0]), "empty"),
        (lambda: activation_matching(A, B, X, how="cka"), "how"),
        (lambda: straight_through_matching(A, B, X), "no labels"),
        (
            lambda: straight_through_matching(
                A, B, (X, torch.full((6,), 7))
            ),
            "0 to 2 are accepted",
        ),
        (lambda: straight_through_matching(A, B, X, lr=0), "lr"),
        (lambda: interpolate(A, B, math.inf), "t: got"),
        (lambda: merge(A, B, X, "zip"), "how"),
        (lambda: apply(models.mlp([5, 6, 3]),
                       weight_matching(A, B, X)), "does not have"),
        (lambda: merge_units(Ensemble.of([A]), X, 0.1), "nn.Module"),
        (lambda: merge_units(A, X, math.nan), "tolerance"),
        (lambda: merge_units(A, X, 0.1, groups=["2"]), "groups"),
        (lambda: merge_tree(A, X, "2"), "group"),
        (lambda: feature_complexity(A, X, -1), "tolerance"),
        (lambda: plant_duplicates(A, X, "1", 0), "k: got"),
        (lambda: plant_duplicates(A, X, "2", 1), "group"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
