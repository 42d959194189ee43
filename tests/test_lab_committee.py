"""The equations of motion against networks, closed forms and autograd."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from reappraisal.lab.committee import (
    Committee,
    Overlaps,
    i2,
    i3,
    i4,
    simulate,
    start_overlaps,
)

DOUBLE = torch.float64


def covariance(seed, d=4):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=g, dtype=DOUBLE)
    return root @ root.T / d


def pair(gamma=0.5, **options):
    T = torch.tensor([[1, gamma], [gamma, 1]], dtype=DOUBLE)
    return Committee(T, torch.eye(2, dtype=DOUBLE), **options)


def some(committee, seed=0, N=60, K=2):
    return start_overlaps(
        K, committee.T, max(committee.heads) + 1, N, [seed], width=0.7
    )


def test_integrals_by_quadrature():
    c = covariance(3, 2)
    root = np.linalg.cholesky(c.numpy())
    g = math.erf

    def slope(x):
        return math.sqrt(2 / math.pi) * math.exp(-x * x / 2)

    def average(f):
        def inner(b, a):
            x, y = root @ (a, b)
            return f(x, y) * math.exp(-(a * a + b * b) / 2) / (2 * math.pi)

        return integrate.dblquad(inner, -8, 8, -8, 8, epsabs=1e-7)[0]

    h = 2**0.5
    assert i2(c)[0, 1] == pytest.approx(
        average(lambda x, y: g(x / h) * g(y / h)), abs=1e-6
    )
    assert i3(c, 1)[0, 0, 1] == pytest.approx(
        average(lambda x, y: slope(x) * x * g(y / h)), abs=1e-6
    )
    assert i4(c, 2)[0, 1, 0, 1] == pytest.approx(
        average(lambda x, y: slope(x) * slope(y) * g(x / h) * g(y / h)),
        abs=1e-6,
    )


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_first_order_terms_are_the_gradient_of_the_loss(seed):
    """Stein's lemma: gradient flow moves overlaps by 2 dL/dQ and dL/dR."""
    c = pair(0.3, second_order=False)
    s = some(c, seed)
    leaf = Overlaps(*(
        t.clone().requires_grad_() for t in (s.Q, s.R, s.v)
    ))
    dQ, dR, dv = torch.autograd.grad(
        c.losses(leaf)[0, 1], (leaf.Q, leaf.R, leaf.v)
    )
    got = c.rates(s, torch.tensor([0.0, 1.0]))
    G = dQ + dQ.mT
    T = c.T.expand(1, 2, 2)
    torch.testing.assert_close(got.v, -dv)
    torch.testing.assert_close(got.R, -(G @ s.R + dR @ T))
    half = G @ s.Q + dR @ s.R.mT
    torch.testing.assert_close(got.Q, -(half + half.mT))


def test_one_step_of_networks_on_average():
    c = pair(0.5, rate=1.5)
    s, N, runs = some(c, 1, N=40), 40, 4000
    after = simulate(
        c, s, torch.zeros(1).long(), N, range(runs), every=1, dtype=DOUBLE
    ).states
    want = c.rates(s, torch.tensor([1.0, 0.0]))
    for name in "QRv":
        move = (getattr(after, name)[1] - getattr(after, name)[0]) * N
        error = move.std(0) / runs**0.5 + 3 / N * move.abs().mean(0)
        assert ((move.mean(0) - getattr(want, name)).abs() < 5 * error
                + 1e-9).all()


def test_units_may_be_renamed_and_batches_are_separate():
    c = pair(0.5)
    s, mix = some(c, 2), torch.tensor([[0.5, 0.5]]).repeat(10, 1)
    swap = Overlaps(s.Q.flip(-1, -2), s.R.flip(-2), s.v.flip(-1))
    both = Overlaps(*(
        torch.cat([getattr(s, n), getattr(swap, n)]) for n in "QRv"
    ))
    losses = c.integrate(both, mix).losses
    torch.testing.assert_close(losses[:, 0], losses[:, 1])
    torch.testing.assert_close(
        losses[:, :1], c.integrate(s, mix).losses
    )


def test_a_mixed_protocol_is_the_average_of_its_tasks():
    c = pair(0.2)
    s = some(c, 3)
    one, two = (c.rates(s, p) for p in torch.eye(2))
    mean = c.rates(s, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mean.Q, 0.25 * one.Q + 0.75 * two.Q)
    torch.testing.assert_close(mean.v, 0.25 * one.v + 0.75 * two.v)


def test_what_is_frozen_stays_and_private_heads_wait():
    c = pair(0.5, rate=0.0)
    s, mix = some(c, 4), torch.tensor([[0.0, 1.0]]).repeat(5, 1)
    end = c.integrate(s, mix).last
    assert torch.equal(end.Q, s.Q) and torch.equal(end.R, s.R)
    assert torch.equal(end.v[:, 0], s.v[:, 0])
    assert not torch.equal(end.v[:, 1], s.v[:, 1])
    net = simulate(c, s, torch.ones(30).long(), 60, [0, 1], dtype=DOUBLE)
    assert (net.last.Q - s.Q).abs().max() < 1e-12
    assert (net.last.v[:, :, 0] - s.v[:, 0]).abs().max() < 1e-12


def test_one_head_for_both_tasks():
    c = pair(0.5, heads=(0, 0))
    end = c.integrate(some(c, 5), torch.eye(2).repeat(3, 1)).last
    assert end.v.shape == (1, 1, 2)


def test_equations_follow_networks_and_dropping_terms_does_not():
    c = pair(0.5, rate=2.0)
    N, s = 300, start_overlaps(
        2, c.T, 2, 300, [0], width=0.5, readout=0.5
    )
    net = simulate(c, s, torch.zeros(6 * N).long(), N, range(6))
    mix = torch.tensor([[1.0, 0.0]]).repeat(60, 1)
    mean = net.losses[-1, :, 0, 0].mean()
    theory, flow = (
        x.integrate(s, mix).losses[-1, 0, 0]
        for x in (c, replace(c, second_order=False))
    )
    assert abs(mean / theory - 1) < 0.2 < 0.4 < abs(mean / flow - 1)


def test_same_seed_same_run_whatever_stands_beside_it():
    c = pair(0.5)
    s, order = some(c, 6), torch.tensor([0, 1] * 40)
    one = simulate(c, s, order, 60, [3, 4], every=20)
    two = simulate(c, s, order, 60, [3, 4], every=20)
    assert torch.equal(one.losses, two.losses)
    alone = simulate(c, s, order, 60, [4], every=20)
    torch.testing.assert_close(one.losses[:, 1:], alone.losses)
    assert one.losses.shape == (5, 2, 1, 2)


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda c, s: replace(c, u=torch.eye(3)), "u: got shape"),
    (lambda c, s: replace(c, T=torch.ones(2)), "T: got shape"),
    (lambda c, s: replace(c, T=torch.tensor([[1.0, 0], [1, 1]])), "symmet"),
    (lambda c, s: replace(c, heads=(0,)), "heads: got"),
    (lambda c, s: replace(c, rate=math.nan), "rate: got nan"),
    (lambda c, s: c.integrate(s, torch.ones(3, 1)), "mix: got shape"),
    (lambda c, s: c.integrate(s, torch.ones(3, 2), 0.0), "dt: got 0"),
    (lambda c, s: simulate(c, s, torch.tensor([2]), 60, [0]), "tasks: got"),
    (lambda c, s: simulate(c, s, torch.tensor([0]), 3, [0]), "N: got 3"),
    (lambda c, s: simulate(
        c, Overlaps(s.Q, s.R + 9, s.v), torch.tensor([0]), 60, [0]
    ), "no weights have them"),
])
def test_bad_input(wrong, says):
    c = pair()
    with pytest.raises(ValueError, match=says):
        wrong(c, some(c))
