"""Collapse measures against closed forms, invariances and loops."""

import numpy as np
import pytest
import torch
from torch import nn

from reappraisal.lab.data import load
from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import convnet, mlp
from reappraisal.measure import collapse as m


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def simplex(classes, dims):
    corners = torch.zeros(classes, dims).double()
    corners[:, :classes] = torch.eye(classes).double() - 1 / classes
    return corners


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_simplex_is_collapsed_in_every_sense(classes):
    corners = simplex(classes, 9) @ torch.linalg.qr(normal(9, 9))[0] + 3
    y = torch.arange(classes).repeat(4)
    got = m.nc_metrics(corners[y], y, 5 * (corners - 3))
    for name in ("nc1", "norm_spread", "angle_spread", "angle_error", "nc3"):
        assert getattr(got, name).abs() < 1e-12, name


@pytest.mark.parametrize(("name", "change"), [
    ("nc1", lambda h, y: h + 0.1 * normal(*h.shape)),
    ("norm_spread", lambda h, y: h * torch.where(y == 0, 2.0, 1.0)[:, None]),
    ("angle_spread", lambda h, y: h + h[:1] * (y == 1)[:, None]),
])
def test_each_measure_sees_its_own_defect(name, change):
    corners, y = simplex(4, 6), torch.arange(4).repeat(10)
    got = m.nc_metrics(change(corners[y], y), y)
    assert getattr(got, name) > 0.05
    if name != "nc1":
        assert got.nc1 < 1e-12


def test_classes_count_the_same_whatever_their_size():
    h, y = normal(30, 5), torch.arange(30) % 3
    more = torch.cat([h, h[y == 1], h[y == 1]])
    labels = torch.cat([y, *[torch.ones(10).long()] * 2])
    one, two = m.nc_metrics(h, y), m.nc_metrics(more, labels)
    torch.testing.assert_close(one.nc1, two.nc1)
    torch.testing.assert_close(one.cosines, two.cosines)
    torch.testing.assert_close(
        m.cdnv(h, y), m.cdnv(more, labels), equal_nan=True)


@pytest.mark.parametrize("case", range(5))
def test_invariances(case):
    h, y, w = normal(24, 5, seed=case), torch.arange(24) % 4, normal(4, 5)
    turn = torch.linalg.qr(normal(5, 5, seed=case + 9))[0]
    moved = 3 * h @ turn + 7
    a, b = m.nc_metrics(h, y, w), m.nc_metrics(moved, y, w @ turn / 5)
    for name in ("nc1", "norm_spread", "angle_spread", "angle_error", "nc3",
                 "cosines"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(
        m.cdnv(h, y), m.cdnv(moved, y), equal_nan=True)
    # names of classes do not matter, their order does for the weight
    same = m.nc_metrics(h, 10 * y - 3, w)
    torch.testing.assert_close(same.nc3, a.nc3)
    assert m.nc_metrics(h, 3 - y, w).nc3 != a.nc3


def test_leading_dimensions_are_members():
    h, w = normal(2, 3, 20, 6), normal(2, 3, 4, 6, seed=1)
    y = torch.stack([torch.randperm(20) % 4 for _ in range(6)])
    y = y.reshape(2, 3, 20)
    got, pairs = m.nc_metrics(h, y, w), m.cdnv(h, y)
    for i in range(2):
        for j in range(3):
            one = m.nc_metrics(h[i, j], y[i, j], w[i, j])
            torch.testing.assert_close(got.nc1[i, j], one.nc1)
            torch.testing.assert_close(got.nc3[i, j], one.nc3)
            torch.testing.assert_close(
                pairs[i, j], m.cdnv(h[i, j], y[i, j]), equal_nan=True)
    assert got.angle_spread.shape == (2, 3) and "(2, 3)" in repr(got)


@pytest.mark.parametrize("variance", [0.1, 1.0])
def test_cdnv_of_gaussian_clouds(variance):
    centres = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 4, 0]]).double()
    y = torch.arange(3).repeat(20_000)
    h = centres[y] + variance**0.5 * normal(60_000, 3)
    want = 3 * variance / torch.tensor([9.0, 16, 25]).double()
    got = m.cdnv(h, y)
    torch.testing.assert_close(
        torch.stack([got[0, 1], got[0, 2], got[1, 2]]), want,
        rtol=0.05, atol=0)


def test_degenerate_means_are_infinite_not_silent():
    h = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([0, 0, 1, 1])
    assert m.cdnv(h, y)[0, 1] == torch.inf
    assert m.nc_metrics(h, y).nc1 == torch.inf


def test_gradients_flow():
    h = normal(12, 3).requires_grad_()
    y = torch.arange(12) % 3
    torch.autograd.gradcheck(lambda h: m.nc_metrics(h, y).nc1, h)
    m.cdnv(h, y).nansum().backward()
    assert torch.isfinite(h.grad).all()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x):
        return self.one(self.one(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.aux = mlp([64, 8, 10]), nn.Linear(8, 2)

    def forward(self, x):
        return self.body(x)


def test_penultimate_reads_what_the_head_is_given():
    digits = load("digits").subset(range(90))
    net = mlp([64, 12, 10]).train()
    got = m.penultimate(net, digits, batch_size=40)
    torch.testing.assert_close(got.features, net[:-1](digits.X).detach())
    assert torch.equal(got.labels, digits.y)
    assert torch.equal(got.weight, net[-1].weight) and net.training
    assert not net[-1]._forward_pre_hooks
    mixed = m.penultimate(net, digits.loader(7, seed=3))
    torch.testing.assert_close(
        m.nc_metrics(*mixed).nc1, m.nc_metrics(*got).nc1)
    first = m.penultimate(net, digits, head="1")
    assert first.features.shape == (90, 64)
    conv = convnet()
    images = digits.X.reshape(-1, 1, 8, 8), digits.y
    assert m.penultimate(conv, images).features.shape[0] == 90
    with pytest.raises(ValueError, match="head: was called for 0 rows"):
        m.penultimate(Unused(), digits)
    assert m.penultimate(
        Unused(), digits, "body.3").features.shape == (90, 8)


def test_ensembles_are_their_members():
    digits = load("digits").subset(range(60))
    nets = [mlp([64, 12, 10], seed=s) for s in range(3)]
    many = m.nc_metrics(*m.penultimate(Ensemble.of(nets), digits))
    for k, net in enumerate(nets):
        one = m.nc_metrics(*m.penultimate(net, digits))
        torch.testing.assert_close(many.nc1[k], one.nc1)
        torch.testing.assert_close(many.nc3[k], one.nc3)


H, Y = torch.randn(6, 2), torch.arange(6) % 3


@pytest.mark.parametrize(("call", "match"), [
    (lambda: m.nc_metrics(H[:, 0], Y), "features: got"),
    (lambda: m.nc_metrics(H.long(), Y), "features: got torch.int64"),
    (lambda: m.nc_metrics(H * torch.nan, Y), "features: not finite"),
    (lambda: m.nc_metrics(H, Y[:4]), "labels: got"),
    (lambda: m.nc_metrics(H, Y.float()), "labels: got torch.float32"),
    (lambda: m.nc_metrics(H, Y * 0), "labels: one class"),
    (lambda: m.cdnv(H, Y * 0), "labels: one class"),
    (lambda: m.cdnv(H.expand(2, 6, 2), torch.stack([Y, Y + 1])),
     "labels: class 3 has no sample"),
    (lambda: m.nc_metrics(H, Y, H[:2]), "weight: got"),
    (lambda: m.penultimate(nn.ReLU(), (H, Y)), "head: got None"),
    (lambda: m.penultimate(mlp([2, 3]), (H, Y), "no"), "head: got 'no'"),
    (lambda: m.penultimate(lambda x: x, (H, Y)), "model: got function"),
    (lambda: m.penultimate(mlp([2, 3]), H), "data: has no labels"),
    (lambda: m.penultimate(Twice(), (torch.randn(6, 3), Y)),
     "head: was called for 12 rows"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_half_precision_is_widened():
    h = normal(12, 3)
    got = m.nc_metrics(h.half(), torch.arange(12) % 3)
    assert got.nc1.dtype == torch.float32
    want = m.nc_metrics(h, torch.arange(12) % 3).nc1
    assert np.isclose(got.nc1.item(), want.item(), rtol=1e-2)
