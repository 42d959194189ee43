"""Reading: complete, right, and without a trace."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.data import load
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import mlp, reset
from reappraisal.measure.reading import (
    Outputs,
    as_batches,
    as_labels,
    as_logits,
    as_probs,
    read_activations,
    read_outputs,
    read_together,
    untouched,
)

X = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(23) % 3


def normed(seed=0):
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(8, 3),
    )
    return reset(net, seed)


def picture(module):
    return (
        [(m, m.training) for m in module.modules()],
        [(p, p.requires_grad, p.grad) for p in module.parameters()],
        {k: v.clone() for k, v in module.state_dict().items()},
    )


def same(a, b):
    layers = zip(a[0], b[0], strict=True)
    assert all(m is n and s == t for (m, s), (n, t) in layers)
    assert all(
        p is q and r == s and g is h
        for (p, r, g), (q, s, h) in zip(a[1], b[1], strict=True)
    )
    assert a[2].keys() == b[2].keys()
    for k, v in a[2].items():
        assert v.dtype == b[2][k].dtype
        assert torch.equal(v, b[2][k])


def spoil_values(m):
    with torch.no_grad():
        for t in m.state_dict().values():
            t.add_(1)


def spoil_parts(m):
    m[0].weight = nn.Parameter(torch.zeros(8, 6))
    m[0].register_parameter("more", nn.Parameter(torch.zeros(2)))
    del m[1].running_mean


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_values,
        spoil_parts,
        lambda m: m.double(),
        lambda m: m.half().requires_grad_(False),
        lambda m: m(X).sum().backward(),
        lambda m: m.train()(X),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_untouched(spoil, training):
    net = normed()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net(X).sum().backward()
    before = picture(net)
    with untouched(net, training):
        assert all(m.training == training for m in net.modules())
        assert all(p.grad is None for p in net.parameters())
        spoil(net)
    same(before, picture(net))
    with pytest.raises(KeyError), untouched(net, training):
        spoil(net)
        raise KeyError
    same(before, picture(net))


def test_untouched_keeps_nan_ties_and_pending_graphs():
    net = normed()
    net[4].weight.data[0, 0] = float("nan")
    with untouched(net):
        pass
    assert net[4].weight.isnan().sum() == 1

    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    with untouched(tied):
        tied.double()
    assert tied[1].weight is tied[0].weight
    assert tied[0].weight.dtype == torch.float32

    net = mlp([6, 3, 3], seed=0)
    loss = net(X).square().sum()
    with untouched(net), torch.no_grad():
        net[1].weight.data.mul_(3)
    loss.backward()


def test_untouched_refuses():
    with pytest.raises(ValueError, match="module: got int"):
        with untouched(3):
            pass
    with pytest.raises(ValueError, match="no shape yet"):
        with untouched(nn.LazyLinear(3)):
            pass


def sources():
    pairs = torch.utils.data.TensorDataset(X, Y)
    triple = [(X[:9], Y[:9], "extra"), (X[9:9], Y[9:9]), (X[9:], Y[9:])]
    return {
        "tensors": (X, Y),
        "arrays": [X.numpy(), Y.numpy()],
        "map-style": pairs,
        "loader": torch.utils.data.DataLoader(pairs, 4),
        "list": triple,
    }


@pytest.mark.parametrize("kind", list(sources()))
@pytest.mark.parametrize("size", [1, 5, 23, 100])
def test_batches_lose_nothing_and_can_be_read_again(kind, size):
    batches = as_batches(sources()[kind], size)
    for _ in range(2):
        xs, ys = zip(*batches, strict=True)
        assert torch.equal(torch.cat(xs), X)
        assert torch.equal(torch.cat(ys), Y)


def test_batches_of_inputs_alone():
    assert all(y is None for _, y in as_batches(X, 5))
    digits = load("digits")
    assert sum(len(x) for x, _ in as_batches(digits)) == len(digits)
    out = read_outputs(mlp([6, 3], seed=0), X)
    assert out.y is None
    with pytest.raises(ValueError, match="data: has no labels"):
        assert out.accuracy >= 0


def test_one_shot_iterables():
    batches = as_batches((X[i : i + 5], Y[i : i + 5]) for i in range(0, 23, 5))
    assert sum(len(x) for x, _ in batches) == 23
    with pytest.raises(ValueError, match="data: an iterator that has been"):
        next(iter(batches))


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "data: empty"),
        (iter([]), "data: empty"),
        ((X[:0], Y[:0]), "data: empty"),
        ([(X[:0], Y[:0])], "data: empty"),
        (torch.utils.data.TensorDataset(X[:0], Y[:0]), "data: empty"),
        ((X, Y[:3]), r"shape \(23, 6\) and \(3,\)"),
        ((X, Y, Y), "got 3 tensors"),
        ([{"x": X}], "batch of type dict"),
        (7, "data: got int"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        list(as_batches(data))
    with pytest.raises(ValueError, match=message):
        read_outputs(mlp([6, 3], seed=0), data)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match="batch_size"):
        as_batches(X, size)


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_checks_pass_what_is_right(n, c, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, c)) * 30
    probs = torch.as_tensor(logits).softmax(-1)
    assert torch.equal(as_logits(logits), torch.as_tensor(logits))
    assert torch.equal(as_probs(probs), probs)
    half = as_probs(probs.half())
    assert half.dtype == torch.float32
    y = rng.integers(0, c, n)
    assert torch.equal(as_labels(y, probs), torch.as_tensor(y))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: as_probs([[0.6, 0.6]]), "row sums to 1.2"),
        (lambda: as_probs([[1.5, -0.5]]), "smallest is -0.5"),
        (lambda: as_probs([0.5, 0.5]), r"shape \(2,\)"),
        (lambda: as_probs(torch.zeros(0, 3)), "at least one member, sample"),
        (lambda: as_logits([[1.0, float("inf")]]), "first at sample 0"),
        (lambda: as_logits([[1.0]]), "one column"),
        (lambda: as_labels([3], torch.ones(1, 3)), "0 to 2 are accepted"),
        (lambda: as_labels([-1], torch.ones(1, 3)), "labels from -1"),
        (lambda: as_labels([0.0], torch.ones(1, 3)), "class numbers"),
        (lambda: as_labels([0, 1], torch.ones(1, 3)), "each of 1 samples"),
        (lambda: as_labels([[0], [0]], torch.ones(1, 3)), "shape"),
    ],
)
def test_checks_stop_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_diverged_member_is_named():
    ensemble = Ensemble.of([mlp([6, 3], seed=i) for i in range(3)])
    ensemble.params["1.weight"][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model: .*sample\) \(1, 0\)"):
        read_outputs(ensemble, (X, Y))


@pytest.mark.parametrize("size", [1, 7, 512])
def test_reading_is_what_the_module_says(size):
    net = normed()
    before = picture(net)
    out = read_outputs(net, (X, Y), batch_size=size)
    same(before, picture(net))
    assert torch.allclose(out.logits, copy.deepcopy(net).eval()(X), atol=1e-6)
    assert not out.logits.requires_grad
    assert out.accuracy == (out.logits.argmax(1) == Y).double().mean()


def test_members_read_together_are_each_alone():
    nets = [mlp([6, 5, 3], seed=i) for i in range(4)]
    out = read_outputs(Ensemble.of(nets), (X, Y))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), 5, shuffle=True
    )
    together = read_together(nets, loader)
    for i, net in enumerate(nets):
        alone = read_outputs(net, (X, Y))
        assert torch.allclose(alone.logits, out.logits[i], atol=1e-6)
        assert torch.equal(together[i].y, together[0].y)
        assert alone.accuracy == together[i].accuracy


def test_precision_of_the_model_not_of_the_data():
    out = read_outputs(mlp([6, 3], seed=0).double(), (X.half(), Y))
    assert out.logits.dtype == torch.float64
    out = read_outputs(mlp([6, 3], seed=0).bfloat16(), (X, Y))
    assert out.logits.dtype == torch.float32


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda x: x, "model: got function"),
        (nn.LSTM(6, 3), "model: gave tuple"),
        (nn.Unflatten(1, (2, 3)), r"outputs of shape \(23, 2, 3\)"),
        (nn.Linear(6, 1), "one column"),
    ],
)
def test_models_that_cannot_be_read(model, message):
    with pytest.raises(ValueError, match=message):
        read_outputs(model, (X, Y))


def test_a_module_without_parameters_can_be_read():
    assert read_outputs(nn.Flatten(), (X, Y)).logits.shape == (23, 6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.ReLU()
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return self.act(self.linear(self.act(self.linear(x))))


def test_activations():
    net = Twice()
    acts = read_activations(net, (X, Y), batch_size=4)
    assert list(acts) == ["linear[0]", "act[0]", "linear[1]", "act[1]"]
    assert torch.allclose(acts["act[1]"], net(X).detach(), atol=1e-6)
    many = read_activations(Ensemble.of([net, Twice()]), X, ["linear", ""])
    assert list(many) == ["linear[0]", "linear[1]", ""]
    assert torch.allclose(many["linear[1]"][0], acts["linear[1]"], atol=1e-5)
    assert not net.act._forward_hooks
    with pytest.raises(ValueError, match="no layer 'lin'; .*'linear'"):
        read_activations(net, X, ["lin"])
    with pytest.raises(ValueError, match="'idle'.* not called"):
        read_activations(net, X, ["idle"])


def test_activations_of_images_and_attention():
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    images = torch.randn(5, 1, 6, 6)
    acts = read_activations(conv, images)
    assert acts["0"].shape == acts["2"].shape == (5, 48)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = picture(layer)
    acts = read_activations(layer, torch.randn(5, 4, 8), ["", "self_attn"])
    same(before, picture(layer))
    assert acts[""].shape == (5, 32)


def test_outputs_print_and_check():
    assert repr(Outputs(torch.eye(3), Y[:3])) == (
        "Outputs(3 samples, 3 classes, accuracy 1)"
    )
    many = Outputs(torch.eye(3).expand(2, 3, 3), Y[:3])
    assert "2 members" in repr(many)
    with pytest.raises(ValueError, match="y: labels"):
        Outputs(torch.eye(3), Y[:3] + 1)
