"""Memories against brute force; verdicts on planted effects and nulls."""

import numpy as np
import pytest
import torch

from reappraisal.dynamics import associative_memory_scaling as a
from reappraisal.lab.ensemble import SGD, Adam
from reappraisal.protocol.claims import Claim

ALPHAS = {"15": 1.5, "20": 2.0, "25": 2.5}


def test_zipf():
    p = a.zipf(50, 2.0)
    assert p.sum().item() == pytest.approx(1)
    assert (p[0] / p[4]).item() == pytest.approx(25)
    assert torch.equal(a.zipf(4, 0.0), torch.full((4,), 0.25).double())
    assert a.tail_mass(p, 50) == 0
    assert a.tail_mass(p, 10) == pytest.approx(1 - p[:10].sum().item())


def test_unseen_mass_is_the_mean_of_draws():
    p = a.zipf(40, 1.5)
    draws = torch.stack([a.unseen_draw(p, [3, 30], s) for s in range(600)])
    want = a.unseen_mass(p, [3, 30])
    se = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - want).abs() < 4 * se).all()
    assert (draws[:, 1] <= draws[:, 0]).all()


def test_slope():
    x = np.array([1.0, 3, 9, 40])
    y = np.stack([2 * x**-0.7, x**1.5])
    np.testing.assert_allclose(a.slope(x, y), [-0.7, 1.5])


def test_memory_by_brute_force():
    m = a.OuterProduct(60, 9, 16, 0, exact=60)
    q = a.zipf(60, 1.0)
    W = m.store(q)
    want = sum(
        q[x].float() * torch.outer(m.u[m.f[x]], m.e[x]) for x in range(60)
    )
    torch.testing.assert_close(W, want, atol=1e-3, rtol=1e-4)
    wrong = torch.tensor([
        int((m.u @ W @ m.e[x]).argmax()) != int(m.f[x]) for x in range(60)
    ])
    assert m.error(W, q) == pytest.approx(q[wrong].sum().item())


def test_a_sample_of_the_tail_stands_for_all():
    full = a.OuterProduct(3000, 50, 32, 1, exact=3000)
    some = a.OuterProduct(3000, 50, 32, 1, exact=300, tail=300)
    p = a.zipf(3000, 1.2)
    W = full.store((torch.arange(3000) < 32).double())
    assert len(some.asked) == 600 and len(some.edges) == 601
    assert some.error(W, p) == pytest.approx(full.error(W, p), abs=0.02)
    nothing = torch.zeros_like(W)
    assert some.error(nothing, p) > 0.5


def test_without_interference_there_is_no_error():
    m = a.OuterProduct(20, 20, 32, 0, orthogonal=True)
    p = a.zipf(20, 2.0)
    for q in (p, torch.ones(20)):
        assert m.error(m.store(q), p) == 0
    with pytest.raises(ValueError, match="width: got 8"):
        a.OuterProduct(20, 20, 8, 0, orthogonal=True)


def test_thresholding_beats_frequency():
    p = a.zipf(2000, 2.0)
    m = a.OuterProduct(2000, 100, 64, 3)
    first = (torch.arange(2000) < 64).double()
    assert m.error(m.store(first), p) < m.error(m.store(p), p)


def test_gradient_and_training():
    p = a.zipf(40, 1.0)
    look = a.Lookup(p, 6, 24, [0, 1, 0], batch=8, steps=150)
    batch = look.batches(0, torch.tensor([0, 1, 2]))
    W = torch.linspace(-1, 1, 3 * 576).sin().view(3, 24, 24)
    W = W.contiguous().requires_grad_()
    (want,) = torch.autograd.grad(look({"W": W}, batch).sum(), W)
    grads = {"W": torch.zeros(3, 24, 24)}
    with torch.no_grad():
        look.value_and_grad({"W": W}, batch, grads)
    torch.testing.assert_close(grads["W"], want)
    error, right = look.run(Adam(lr=[0.05, 0.05, 0.0]))
    again, _ = look.run(Adam(lr=[0.05, 0.05, 0.0]))
    assert torch.equal(error, again)
    assert error[0] < 0.3 and error[2] > 0.5  # the mechanism off
    torch.testing.assert_close(error, (~right).double() @ p)


def judged(slug, evidence, size):
    return Claim.load(f"D025/{slug}").judge(
        evidence, scale="book", seeds=range(1000, 1000 + size)
    ).verdict


def around(centre, sd, size, seed=0):
    noise = np.random.default_rng(seed).normal(0, sd, size)
    return centre + noise - noise.mean()


def width_evidence(factor=1.0, tail=0.05, leak=0.0):
    found = {"orthogonal": [leak] * 4}
    for tag, alpha in ALPHAS.items():
        often = factor * (alpha - 1) / (2 * alpha)
        found |= {
            f"frequency_{tag}": around(often, 0.1, 60),
            f"double_{tag}": around(alpha - 1 - 2 * often, 0.2, 60),
            f"tail_{tag}": [tail, 0.0],
        }
    return found


@pytest.mark.parametrize(("planted", "verdict"), [
    (dict(), "reproduced"),
    (dict(factor=3.0), "not reproduced"),
    (dict(tail=0.5), "inconclusive"),
    (dict(leak=0.1), "invalid"),
])
def test_width_judged(planted, verdict):
    found = judged("width-exponents", width_evidence(**planted), 60)
    assert found == verdict


@pytest.mark.parametrize(("shift", "p", "verdict"), [
    (0.0, 0.001, "reproduced"), (0.2, 0.001, "not reproduced"),
    (0.05, 0.001, "inconclusive"), (0.0, 0.5, "invalid"),
])
def test_data_judged(shift, p, verdict):
    found = {
        f"exponent_{tag}": around(1 - 1 / alpha + shift, 0.03, 20)
        for tag, alpha in ALPHAS.items()
    }
    assert judged("data-exponent", found | {"uniform": p}, 20) == verdict


@pytest.mark.parametrize(("small", "growth", "uniform", "verdict"), [
    (0.6, 0.3, 0.0, "reproduced"), (0.0, 0.3, 0.0, "not reproduced"),
    (0.6, 0.0, 0.0, "inconclusive"),
    (0.6, 0.3, 0.5, "invalid"),
])
def test_optimisers_judged(small, growth, uniform, verdict):
    found = judged("optimiser-buys-capacity", {
        "small": around(small, 0.1, 20), "growth": around(growth, 0.1, 20),
        "uniform": around(uniform, 0.05, 20),
    }, 20)
    assert found == verdict


def test_same_optimiser_twice_is_no_gain():
    p = a.zipf(60, 1.5)
    look = a.Lookup(p, 8, 16, list(range(1000, 1020)), batch=4, steps=30)
    one, two = (look.run(SGD(lr=10.0))[0].log().numpy() for _ in range(2))
    found = judged("optimiser-buys-capacity", {
        "small": one - two, "growth": one - two, "uniform": one - two,
    }, 20)
    assert found == "not reproduced"
