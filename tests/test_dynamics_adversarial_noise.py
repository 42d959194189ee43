"""Closed forms, networks in the span, moved carriers; planted verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reappraisal.dynamics import adversarial_noise_teaches as a
from reappraisal.lab import models
from reappraisal.lab.ensemble import Adam, Ensemble, train, untrained, vmapped
from reappraisal.protocol.claims import Claim

COSINE = "D109/cosine-follows-closed-form"
NOISE = "D109/noise-carriers-generalise"
ORTHOGONAL = "D109/fails-when-orthogonality-fails"
N = 24
Y = torch.where(torch.arange(N) < N // 2, 1.0, -1.0)
SEEDS = [1, 2, 3, 4]


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g), dim=-1)


def test_closed_form_is_the_vector_sum():
    for n, d, eps in ((10, 50, 1.0), (40, 400, 2.5)):
        carriers = math.sqrt(d) * torch.eye(n + 1)[:n]
        u, t = torch.eye(n + 1)[n], torch.ones(n)
        t[::3] = -1
        total = t @ carriers + n * eps * u
        want = float(F.cosine_similarity(total, u, dim=0))
        assert a.predicted_cosine(n, d, eps) == pytest.approx(want)
        assert a.move_for(n, d, want) == pytest.approx(eps, rel=1e-4)


@pytest.mark.parametrize("args", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_closed_form_refuses(args):
    with pytest.raises(ValueError, match="positive"):
        a.predicted_cosine(*args)


def test_other_bad_input():
    for cosine in (0, 1, -0.5):
        with pytest.raises(ValueError, match="cosine"):
            a.move_for(1, 1, cosine)
    with pytest.raises(ValueError, match="steps"):
        a.own_carriers(1.0, 0)
    for y in ([1, 1, 1, -1], [1, 1, 0, 0], [1.0, 1.0, -1.0]):
        with pytest.raises(ValueError, match="y: got"):
            a.balanced_targets(torch.tensor(y), [0])


def test_targets_tell_nothing_of_classes():
    t = a.balanced_targets(Y, range(50))
    assert (t @ Y == 0).all() and (t.sum(1) == 0).all()
    assert t.mean(0).abs().max() < 0.6  # no sample is always on one side
    assert torch.equal(t[7:8], a.balanced_targets(Y, [7]))


def test_coordinates_keep_inner_products_and_nest():
    x = unit(2, 5, 30)
    flat = a.span_coordinates(x)
    assert flat.shape == (2, 5, 5)
    assert torch.allclose(flat @ flat.mT, x @ x.mT, atol=1e-5)
    assert (flat[:, :3, 3:] == 0).all()  # the first three span three
    assert a.span_coordinates(x.mT) is x.mT or torch.equal(
        a.span_coordinates(x.mT), x.mT
    )


def test_gradients_and_the_odd_part():
    w, x = unit(2, 6, 7, seed=1), unit(2, 5, 7, seed=2)
    y = torch.tensor([1.0, -1, 1, 1, -1]).expand(2, -1)
    loss, grads = a.SpanLoss(x, y), {"w": torch.empty_like(w)}
    value = loss.value_and_grad({"w": w}, None, grads)
    leaf = w.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss({"w": leaf}, None).sum(), leaf)
    assert torch.allclose(grads["w"], want, atol=1e-6)
    out = F.leaky_relu(x @ w.mT, a.SLOPE) @ a.output_weights(6, w)
    assert torch.allclose(value, F.softplus(-y * out).mean(1))
    back = F.leaky_relu(-x @ w.mT, a.SLOPE) @ a.output_weights(6, w)
    along = torch.einsum("snr,sr->sn", x, a.linear_part(w))
    assert torch.allclose((out - back) / (1 + a.SLOPE), along, atol=1e-5)
    wide = a.input_gradient(w, x, 1.0)  # a linear network: one gradient
    assert torch.allclose(wide, a.linear_part(w)[:, None].expand_as(wide))


def test_moves_have_a_length_a_sign_and_few_coordinates():
    x, lean = unit(1, 4, 9), unit(1, 4, 9, seed=3)
    t = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    for few in (None, 2):
        step = a.moved_along(x, lean, t, 0.4, few) - x
        assert torch.allclose(step.norm(dim=-1), torch.tensor(0.4))
        assert ((step.abs() > 1e-7).sum(-1) == (few or 9)).all()
        assert ((step * lean).sum(-1) * t > 0).all()


@pytest.mark.parametrize("c", [0.5, 1.5])
def test_linear_network_follows_the_recursion(c):
    t = a.balanced_targets(Y, SEEDS)
    u = F.normalize(Y, dim=0)
    moved = torch.eye(N) + c / N**0.5 * t[..., None] * u
    for steps in (1, 30, 200):
        w = a.span_network(moved, t, SEEDS, slope=1.0, steps=steps,
                           init=1e-4)
        found = F.cosine_similarity(a.linear_part(w), u[None])
        want = a.own_carriers(c, steps)[-1]
        assert found.numpy() == pytest.approx(want, abs=0.003)
    assert a.own_carriers(c, 1)[0] == pytest.approx(c / math.hypot(c, 1))


def test_recursion_ends_at_the_maximal_margin():
    slow = a.own_carriers(2.0, 20_000)
    assert slow[-1] == pytest.approx(a.margin_cosine(2.0), abs=0.05)
    assert a.margin_cosine(1.0) == a.margin_cosine(0.2) == 0
    assert a.own_carriers(0.5, 20_000)[-1] < 0.08


def agreement(x, carriers, direction=None, level=0.6):
    """Cosine of the second with the first network."""
    y, t = Y.expand(len(x), -1), a.balanced_targets(Y, SEEDS)
    first = a.span_network(x, y, SEEDS, steps=150)
    lean = a.input_gradient(first, carriers)
    moved = a.moved_along(carriers, lean if direction is None else direction,
                          t, a.move_for(N, 1.0, level))
    second = a.span_network(moved, t, [100 + s for s in SEEDS], steps=150)
    return F.cosine_similarity(a.linear_part(second), a.linear_part(first))


def test_mechanism_on_off_and_reversed():
    basis = torch.eye(2 * N).expand(len(SEEDS), -1, -1)
    own, new = basis[:, :N], basis[:, N:]
    assert agreement(own, new).numpy() == pytest.approx(0.6, abs=0.02)
    assert (agreement(own, own) < 0.45).all()  # own samples: unlearned
    nowhere = unit(len(SEEDS), N, 2 * N, seed=5)
    assert agreement(own, new, nowhere).abs().max() < 0.25
    back = -a.linear_part(a.span_network(
        own, Y.expand(len(SEEDS), -1), SEEDS, steps=150
    ))[:, None].expand(-1, N, -1)
    assert (agreement(own, new, back) < -0.55).all()


def test_class_means_break_it_and_shared_means_do_not():
    d, mean = 400, unit(len(SEEDS), 1, 400, seed=6)
    z = unit(len(SEEDS), 2 * N, d, seed=7)
    sign = torch.cat([Y, Y])[:, None]

    def share(direction):
        x = F.normalize(0.5**0.5 * direction + 0.5**0.5 * z, dim=-1)
        x = a.span_coordinates(x)
        return float(agreement(x[:, :N], x[:, N:], level=0.5).mean())

    assert share(sign * mean) < 0.2
    assert share(torch.ones_like(sign) * mean) > 0.5


@pytest.fixture(scope="module")
def blobs():
    g = torch.Generator().manual_seed(8)
    y = torch.arange(300) % 3
    x = torch.randn(300, 12, generator=g) + 3 * torch.eye(3, 12)[y]
    return x, y


@pytest.mark.parametrize("few", [None, 3])
def test_noise_moved_by_a_trained_network_teaches(blobs, few):
    x, y = blobs
    net = models.mlp([12, 32, 3], seed=0)
    how = {"steps": 150, "optimiser": Adam(3e-3)}
    source = train(net, (x, y), seeds=[1, 2], **how)
    g = torch.Generator().manual_seed(9)
    noise = torch.randn(2, 300, 12, generator=g)
    wish = torch.randint(3, (2, 300), generator=g)

    def score(mover):
        moved = a.teach(mover, noise, wish, 2.0, few, steps=5)
        step = moved - noise
        assert step.norm(dim=-1).max() <= 2.0 + 1e-4
        assert (step.abs() > 1e-6).sum(-1).max() <= (few or 12)
        run = train(net, (moved, wish), seeds=[8, 9], per_member=["x", "y"],
                    **how)
        out = vmapped(net)(run.params, x[None]).argmax(-1)
        return (out == y).float().mean(1)

    assert (score(source) > 0.75).all()
    assert score(untrained(net, [1, 2])).mean() < 0.6


def test_teach_leaves_the_model_alone(blobs):
    net = models.mlp([12, 8, 3], seed=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, wish = blobs[0][None, :20], blobs[1][None, :20]
    one = a.teach(Ensemble.of([net]), x, wish, 1.0, steps=3)
    two = a.teach(Ensemble.of([net]), x, wish, 1.0, steps=3)
    assert torch.equal(one, two)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


# --- what the registered rules make of planted evidence


def rows(value, n=20, sd=0.02, seed=0):
    return value + sd * np.random.default_rng(seed).standard_normal(n)


def judged(slug, evidence):
    return Claim.load(slug).judge(
        evidence, scale="book", seeds=range(1000, 1020)
    )


def names(slug, *starts):
    return [k for k in Claim.load(slug).criteria if k.startswith(starts)]


@pytest.mark.parametrize(("off", "random", "verdict"), [
    (0.0, 0.0, "reproduced"), (-0.2, 0.0, "not reproduced"),
    (0.0, 0.3, "inconclusive"),
])
def test_cosine_verdicts(off, random, verdict):
    cells = names(COSINE, "d")
    assert len(cells) == 30
    found = judged(COSINE, {
        **{k: rows(off, seed=i) for i, k in enumerate(cells)},
        "noise": rows(0.0), "new": rows(0.2),
        "random": rows(random, seed=50),
        "random_reversed": -rows(random, seed=50),
    })
    assert found.verdict == verdict
    assert found.record["qualifier"] is None


@pytest.mark.parametrize(("gain", "blank", "verdict"), [
    (30.0, 0.0, "reproduced"), (5.0, 0.0, "not reproduced"),
    (30.0, 8.0, "invalid"),
])
def test_noise_verdicts(gain, blank, verdict):
    evidence = {k: rows(gain, sd=3.0, seed=i) for i, k in
                enumerate(names(NOISE, "synthetic", "digits"))}
    evidence |= {k: rows(blank, sd=3.0, seed=10 + i)
                 for i, k in enumerate(names(NOISE, "blank"))}
    assert judged(NOISE, evidence).verdict == verdict


@pytest.mark.parametrize(("sign", "restored", "verdict"), [
    (1, 0.0, "reproduced"), (-1, 0.0, "not reproduced"),
    (1, -0.3, "invalid"),
])
def test_orthogonality_verdicts(sign, restored, verdict):
    settings = names(ORTHOGONAL, "class", "shared", "dims")
    high = [k for k in settings if not k.startswith("dims")
            and int(k.split("_")[1]) > 30]
    similar = np.linspace(0, 1, len(settings))
    found = judged(ORTHOGONAL, {
        "rho": {"x": similar, "y": sign * similar + rows(0, 26, 0.1)},
        **{k: rows(-0.3 if k in high else 0.0, seed=i)
           for i, k in enumerate(settings)},
        "restored": rows(restored),
    })
    assert found.verdict == verdict
