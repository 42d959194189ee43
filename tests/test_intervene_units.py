"""Units: found in code that the chapter does not have, and nothing broken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import shaken
from torch import nn

from reappraisal.intervene.factorise import svd_factorise
from reappraisal.intervene.units import (
    Axis,
    UnitGroup,
    hidden_units,
    permute_units,
    take_units,
    with_tensors,
)
from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import generator


def gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def changed(net, group, powers, factor):
    """Scale what belongs to unit u by factor[u] to its power."""
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    new = {}
    for axis, power in zip(group.axes, powers, strict=True):
        t = new.get(axis.name, tensors[axis.name]).detach().clone()
        index = axis.index(group.size)
        scale = torch.ones(t.shape[axis.dim], dtype=t.dtype)
        scale[index] = (factor**power)[None, :, None].expand(index.shape)
        shape = [1] * t.ndim
        shape[axis.dim] = -1
        new[axis.name] = t * scale.view(shape)
    return with_tensors(net, new)


class BasicBlock(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.down = None
        if fan_in != fan_out:
            self.down = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False),
                nn.BatchNorm2d(fan_out),
            )

    def forward(self, x):
        same = x if self.down is None else self.down(x)
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        h += same
        return self.relu(h)


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.blocks = nn.Sequential(
            BasicBlock(6, 6, 1), nn.Dropout(0.3), BasicBlock(6, 8, 2)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.fc(self.blocks(h).mean((-2, -1)))


class Heads(nn.Module):
    """Attention with separate projections and PyTorch's own kernel."""

    def __init__(self, fused=True):
        super().__init__()
        self.fused = fused
        self.q, self.k = nn.Linear(5, 6), nn.Linear(5, 6)
        self.v, self.o = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            f(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        if self.fused:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1) @ v
        return self.o(h.transpose(1, 2).flatten(2))


class Dense(nn.Module):
    """Concatenations of concatenations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(5, 4, 1)
        self.c = nn.Linear(9 * 4, 3)

    def forward(self, x):
        x = torch.cat([x, self.a(x).relu()], 1)
        x = torch.cat([x, self.b(x).relu()], 1)
        return self.c(F.avg_pool2d(x, 2).flatten(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(4, 10), nn.RMSNorm(4)
        self.down = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x).tanh()
        for _ in range(3):
            h = (self.b(h) + h).tanh()
        return self.c(h)


NETS = {
    "resnet": (Resnet, (2, 3, 8, 8)),
    "attention": (Heads, (2, 3, 5)),
    "einsum": (lambda: Heads(False), (2, 3, 5)),
    "dense": (Dense, (2, 2, 4, 4)),
    "gated": (Gated, (3, 4)),
    "tied": (Tied, (5, 3)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 6, batch_first=True),
        (2, 3, 8),
    ),
    "transformer": (
        lambda: models.transformer(
            4, 3, 5, width=8, heads=4, depth=1, causal=True, tokens=False
        ),
        (2, 5, 4),
    ),
    "deconv": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, groups=2), nn.ELU(),
            nn.ConvTranspose1d(4, 6, 2, groups=2), nn.LeakyReLU(),
            nn.Conv1d(6, 3, 1),
        ),
        (2, 2, 7),
    ),
    "factorised": (
        lambda: svd_factorise(models.mlp([4, 5, 3]), 2), (3, 4),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_reordering_and_factors_keep_the_function(name):
    build, shape = NETS[name]
    net, x = shaken(build()), torch.randn(shape, generator=generator(1))
    x = x.double()
    before, draws = net(x), generator(2)
    groups = hidden_units(net, x)
    assert groups
    for group in groups:
        perm = torch.randperm(group.size, generator=draws)
        assert gap(permute_units(net, group, perm)(x), before) < 1e-12
        for powers in group.scalings:
            factor = torch.randn(group.size, generator=draws).exp().double()
            assert gap(changed(net, group, powers, factor)(x), before) < 1e-9
        for powers in group.flips:
            signs = torch.randint(2, (group.size,), generator=draws) * 2 - 1
            flipped = changed(net, group, powers, signs.double())
            assert gap(flipped(x), before) < 1e-12
    found = {(g.name, g.size) for g in groups}
    expected = {
        "resnet": {("stem", 6), ("blocks.0.conv1", 6), ("blocks.2.conv1", 8),
                   ("blocks.2.conv2", 8)},
        "attention": {("q", 2), ("q/1", 3), ("v", 4)},
        "einsum": {("q", 2), ("q/1", 3), ("v", 4)},
        "dense": {("a", 3), ("b", 4)},
        "gated": {("up", 5)},
        "tied": {("a", 4)},
        "factorised": {
            ("1.parametrizations.weight", 5),
            ("1.parametrizations.weight/1", 2),
            ("3.parametrizations.weight", 2),
        },
    }
    assert found == expected.get(name, found)


def test_what_can_be_rescaled():
    def can(net, *shape):
        return [
            (g.homogeneous, bool(g.flips), bool(g.mixes), g.averaged)
            for g in hidden_units(net, torch.randn(shape))
        ]

    def two(*between):
        return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2))

    assert can(two(nn.ReLU()), 2, 3) == [(True, False, False, False)]
    assert can(two(nn.LeakyReLU()), 2, 3) == [(True, False, False, False)]
    assert can(two(nn.Tanh()), 2, 3) == [(False, True, False, False)]
    assert can(two(), 2, 3) == [(True, True, True, False)]
    for act in nn.GELU(), nn.Sigmoid(), nn.ReLU6(), nn.Softplus():
        assert can(two(act), 2, 3) == [(False, False, False, False)]
    assert can(two(nn.Softmax(-1)), 2, 3) == [(False, False, False, True)]
    normed = hidden_units(two(nn.LayerNorm(4), nn.ReLU()), torch.randn(2, 3))
    assert normed[0].averaged and normed[0].homogeneous
    plain = two(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU())
    assert not hidden_units(plain, torch.randn(2, 3))[0].homogeneous
    shifted = hidden_units(shift := Shift(), torch.randn(2, 3))
    assert not shifted[0].homogeneous and isinstance(shift, nn.Module)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b((self.a(x) + 1).relu())


def test_one_coordinate_of_queries_cancels_that_of_keys():
    groups = hidden_units(Heads().double(), torch.randn(2, 3, 5).double())
    inner = next(g for g in groups if g.size == 3)
    assert {a.name for a in inner.axes} == {
        "q.weight", "q.bias", "k.weight", "k.bias"
    }
    assert all(a.outer == 2 for a in inner.axes)
    (powers,) = inner.mixes
    by_name = dict(zip([a.name for a in inner.axes], powers, strict=True))
    assert by_name == {
        "q.weight": 1, "q.bias": 1, "k.weight": -1, "k.bias": -1
    }


def test_roles_of_factors():
    net = svd_factorise(models.mlp([4, 5, 3]), 2)
    hidden, rank, _ = hidden_units(net, torch.randn(2, 4))
    stem = "{}.parametrizations.weight.original{}"
    assert [a.name for a in hidden.by_role("output")] == [stem.format(1, 0)]
    assert [a.name for a in hidden.by_role("input")] == [stem.format(3, 2)]
    assert [a.name for a in rank.by_role("output")] == [stem.format(1, 2)]
    assert [a.name for a in rank.by_role("input")] == [stem.format(1, 0)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=3, max_size=5),
    act=st.sampled_from(sorted(models.ACTIVATIONS)),
    seed=st.integers(0, 10**6),
)
def test_mlp_has_one_group_per_hidden_layer(sizes, act, seed):
    net = shaken(models.mlp(sizes, act), seed)
    x = torch.randn(4, sizes[0], generator=generator(seed)).double()
    groups = hidden_units(net, x)
    assert [g.size for g in groups] == sizes[1:-1]
    assert all(len(g.axes) == 3 for g in groups)
    other = net
    for g in groups:
        perm = torch.randperm(g.size, generator=generator(seed, g.name))
        other = permute_units(other, g, perm)
    assert torch.allclose(other(x), net(x), atol=1e-10)
    back = other
    for g in groups:
        perm = torch.randperm(g.size, generator=generator(seed, g.name))
        back = permute_units(back, g, perm.argsort())
    for a, b in zip(back.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_taking_units_is_zeroing_them():
    net = shaken(Resnet())
    x = torch.randn(2, 3, 8, 8, generator=generator(0)).double()
    for group in hidden_units(net, x):
        keep = torch.randperm(group.size, generator=generator(3))[:3]
        small = take_units(net, group, keep)
        gone = [u for u in range(group.size) if u not in keep.tolist()]
        new = {}
        for axis in group.by_role("input"):
            t = new.get(axis.name, net.get_parameter(axis.name)).clone()
            rows = axis.index(group.size)[:, gone].flatten()
            new[axis.name] = t.index_fill(axis.dim, rows, 0.0)
        assert gap(small(x), with_tensors(net, new)(x)) < 1e-12
        assert sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in net.parameters()
        )
    conv1 = next(g for g in hidden_units(net, x) if "conv1" in g.name)
    small = take_units(net, conv1, conv1.size * [True])
    assert torch.equal(small(x), net(x))
    layer = take_units(net, conv1, [4, 1]).blocks[0]
    assert layer.conv1.out_channels == layer.conv2.in_channels == 2
    assert layer.bn1.num_features == 2


def test_depthwise_channels_go_together():
    net = shaken(
        nn.Sequential(
            nn.Conv2d(1, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Flatten(),
            nn.Linear(12 * 4, 2),
        )
    )
    x = torch.randn(2, 1, 4, 4).double()
    wide, inner = hidden_units(net, x)
    assert (wide.size, inner.size) == (6, 2)
    small = take_units(net, wide, [5, 0])
    assert small[1].groups == 2 and small[1].out_channels == 4
    assert small(x).shape == (2, 2)


def test_smaller_group_norm_keeps_its_groups():
    net = models.convnet([1, 8, 4])
    x = torch.randn(2, 1, 8, 8)
    group = hidden_units(net, x)[0]
    small = take_units(net, group, [0, 2, 4, 6])
    assert small[1].num_channels == 4 and small(x).shape == (2, 10)
    hidden_units(small, x)


def test_ensemble_is_a_loop_over_members():
    nets = [models.convnet([1, 8, 6], seed=s) for s in range(3)]
    nets[1].register_buffer("spare", torch.zeros(2))
    del nets[1]._buffers["spare"]
    many = Ensemble.of(nets, seeds=range(3))
    x = torch.randn(4, 1, 8, 8)
    group = hidden_units(many, x)[1]
    assert group.norm_groups == (2,)
    perms = torch.tensor([[3, 4, 5, 0, 1, 2], [0, 2, 1, 4, 3, 5], [*range(6)]])
    together = permute_units(many, group, perms)
    fewer = take_units(many, group, perms[:, [0, 1, 3, 4]])
    for i, net in enumerate(nets):
        one = permute_units(net, group, perms[i])
        few = take_units(net, group, perms[i, [0, 1, 3, 4]])
        for name, t in one.named_parameters():
            assert torch.equal(together.params[name][i], t)
        for name, t in few.named_parameters():
            assert torch.equal(fewer.params[name][i], t)
    assert fewer.member(0)(x).shape == (4, 10)
    assert len(many.params["4.weight"]) == 3 and len(many) == 3


def test_left_as_it_was():
    net = Resnet().train()
    x = torch.randn(8, 3, 8, 8)
    net(x).sum().backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    groups = hidden_units(net, x)
    twin = permute_units(net, groups[0], range(groups[0].size))
    take_units(net, groups[1], [0])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and twin.training
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    for p, g in zip(net.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)
    assert all(p.grad is None for p in twin.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.requires_grad for p in twin.parameters())
    again = hidden_units(net, x)
    assert [g.axes for g in again] == [g.axes for g in groups]


def test_shared_layer_stays_shared():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    # its inputs are the network's, so its units have an order
    assert hidden_units(net, x) == []
    tied = Tied()
    (group,) = hidden_units(tied, torch.randn(3, 3))
    other = permute_units(tied, group, [3, 2, 1, 0])
    assert torch.allclose(other(x[:, :3]), tied(x[:, :3]), atol=1e-6)


def test_half_precision_and_parts_of_a_tensor():
    net = models.mlp([3, 4, 2]).bfloat16()
    (group,) = hidden_units(net, torch.randn(2, 3))
    assert permute_units(net, group, [3, 2, 1, 0])[1].weight.dtype is (
        torch.bfloat16
    )


class Odd(nn.Module):
    """What `how` does to hidden numbers."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x):
        return self.b(self.how(self.a(x)))


def written(h):
    h = h.clone()
    h[:, :2] = 0
    return h


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (lambda h: h.sort(-1).values, "sort"),
        (lambda h: torch.linalg.qr(h.mT @ h)[0][:2], "qr"),
        (written, "writes into a part"),
        (lambda h: torch.fft.fft(h).abs(), "fft"),
    ],
)
def test_operation_that_is_not_understood(how, word):
    with pytest.raises(ValueError, match=word):
        hidden_units(Odd(how), torch.randn(2, 3))


@pytest.mark.parametrize(
    "how",
    [
        lambda h: h.flip(-1),
        lambda h: h.cumsum(-1),
        lambda h: h[:, [0, 0, 1, 2]],
        lambda h: h * torch.arange(4.0),
        lambda h: h.roll(1, -1),
        lambda h: torch.stack(h.unbind(1)[::-1], 1),
        lambda h: h.view(-1, 2, 2).mT.reshape(-1, 4),
    ],
)
def test_positions_are_not_units(how):
    net = Odd(how)
    x = torch.randn(2, 3)
    for group in hidden_units(net, x):
        perm = list(range(group.size))[::-1]
        other = permute_units(net, group, perm)
        assert torch.allclose(other(x), net(x), atol=1e-5)
        assert group.size < 4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda n, g: hidden_units(n, torch.zeros(0, 3)), "empty"),
        (lambda n, g: hidden_units(3, torch.zeros(1, 3)), "nn.Module"),
        (lambda n, g: permute_units(n, g, [0, 1]), "all 4 are needed"),
        (lambda n, g: permute_units(n, g, [0, 1, 2, 4]), "from 0 to 3"),
        (lambda n, g: permute_units(n, g, [0, 1, 1, 2]), "different units"),
        (lambda n, g: permute_units(n, g, [0.0, 1, 2, 3]), "unit numbers"),
        (lambda n, g: permute_units(n, g, "abcd"), "unit numbers"),
        (lambda n, g: permute_units(n, "1", [0, 1, 2, 3]), "UnitGroup"),
        (lambda n, g: permute_units({}, g, [0, 1, 2, 3]), "Ensemble"),
        (
            lambda n, g: permute_units(models.mlp([3, 2, 2]), g, [0, 1, 2, 3]),
            "does not have",
        ),
        (lambda n, g: take_units(n, g, []), "at least one|unit numbers"),
        (lambda n, g: take_units(n, g, [True, False]), "2 booleans"),
        (lambda n, g: take_units(n, g, [4 * [False]]), "unit numbers"),
        (lambda n, g: with_tensors(n, {"no": torch.ones(1)}), "no tensor"),
    ],
)
def test_bad_input(call, match):
    net = models.mlp([3, 4, 2])
    (group,) = hidden_units(net, torch.randn(2, 3))
    with pytest.raises(ValueError, match=match):
        call(net, group)


def test_repr_says_where_units_are():
    axis = Axis("w", 1, "input", block=4)
    assert repr(axis) == "w[1] input block 4"
    text = repr(UnitGroup("1", 3, (axis,), averaged=True, norm_groups=(2,)))
    assert "3 units, averaged, norm groups (2,)" in text
