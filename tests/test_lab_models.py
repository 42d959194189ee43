"""Models come from a seed alone and can be stacked."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from reappraisal.lab.ensemble import SGD, AdamW, train
from reappraisal.lab.models import (
    ACTIVATIONS,
    INITIALISATIONS,
    convnet,
    generator,
    initialise,
    mlp,
    recurrent,
    reset,
    resnet,
    transformer,
)

torch.set_num_threads(1)


def image(n=4):
    return torch.randn(n, 1, 8, 8, generator=generator(0, "x"))


def tokens(n=4):
    return torch.randint(7, (n, 5), generator=generator(0, "x"))


def vectors(n=4):
    return torch.randn(n, 5, 3, generator=generator(0, "x"))


MODELS = {
    "linear": (lambda **k: mlp([64, 3], **k), image),
    "mlp": (lambda **k: mlp([64, 8, 8, 3], **k), image),
    "residual": (
        lambda **k: mlp([64, 8, 8, 3], residual=True, norm="layer", **k),
        image,
    ),
    "convnet": (lambda **k: convnet((1, 4, 6), 3, **k), image),
    "convnet-plain": (lambda **k: convnet((1, 4), 3, norm=None, **k), image),
    "resnet": (lambda **k: resnet((1, 4, 6), 1, 3, **k), image),
    "transformer": (lambda **k: transformer(7, 3, 5, 8, 2, 1, **k), tokens),
    "vectors": (
        lambda **k: transformer(3, 3, 5, 8, 2, 1, tokens=False, **k),
        vectors,
    ),
    "rnn": (lambda **k: recurrent(3, 6, 3, "rnn", **k), vectors),
    "gru": (lambda **k: recurrent(7, 6, 3, "gru", tokens=True, **k), tokens),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_answers_and_learns_as_its_members(name):
    make, inputs = MODELS[name]
    state = torch.random.get_rng_state()
    models = [make(seed=s).double() for s in (1, 2)]
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    assert torch.equal(state, torch.random.get_rng_state())
    params, buffers = stack_module_state(models)

    def call(p, b):
        return functional_call(models[0], (p, b), (x,))

    out = vmap(call)(params, buffers)
    for row, model in zip(out, models, strict=True):
        torch.testing.assert_close(row, model(x))
    y = torch.tensor([0, 1, 2, 0])
    stack = train(
        make(), (x, y), seeds=[1, 2], steps=3, optimiser=SGD(0.1),
        dtype=torch.float64,
    )  # fmt: skip
    model = reset(make(), 2).double()
    step = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        step.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(stack.params[key][1], value.detach())


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_all(name):
    make, _ = MODELS[name]
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    pairs = list(zip(*(m.parameters() for m in (a, b, c)), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert any(not torch.equal(p, r) for p, _, r in pairs)
    fresh = reset(copy.deepcopy(c), 1)
    assert all(
        torch.equal(p, q)
        for p, q in zip(a.parameters(), fresh.parameters(), strict=True)
    )


@pytest.mark.parametrize("how", INITIALISATIONS)
def test_initialisations_have_their_variance(how):
    net = initialise(mlp([600, 500, 400]), how, seed=3)
    first, last = (m.weight.detach() for m in net if hasattr(m, "weight"))
    variance = {
        "kaiming": 2 / 600,
        "kaiming_uniform": 2 / 600,
        "xavier": 2 / 1100,
        "xavier_uniform": 2 / 1100,
        "lecun": 1 / 600,
        "orthogonal": 1 / 600,
        "mup": 1 / 600,
    }[how]
    assert first.var().item() == pytest.approx(variance, rel=0.02)
    if how == "mup":
        assert last.var().item() == pytest.approx(1 / 500**2, rel=0.02)
    assert all(m.bias.eq(0).all() for m in net if hasattr(m, "bias"))
    twice = initialise(mlp([600, 500, 400]), how, seed=3, scale=2.0)
    torch.testing.assert_close(twice[1].weight, 2 * net[1].weight)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63), st.text(max_size=5), st.text(max_size=5))
def test_streams_of_a_seed(seed, one, other):
    a, b = (torch.rand(4, generator=generator(seed, s)) for s in (one, other))
    assert torch.equal(a, b) == (one == other)
    assert not torch.equal(a, torch.rand(4, generator=generator(seed + 1, one)))


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True, torch.ones(2)])
def test_seeds_are_non_negative_integers(seed):
    with pytest.raises(ValueError, match="seed"):
        generator(seed)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


BAD = {
    "sizes": lambda: mlp([3]),
    "activation: got 'step'": lambda: mlp([3, 3, 3], activation="step"),
    "norm: got 'batch'": lambda: convnet(norm="batch"),
    "cell": lambda: recurrent(3, 3, 3, cell="lstm"),
    "pool": lambda: transformer(3, 3, 3, pool="max"),
    "heads": lambda: transformer(3, 3, 3, width=8, heads=3),
    "how": lambda: initialise(mlp([3, 3]), "ones"),
    "no reset_parameters": lambda: reset(Bare(), 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    net = mlp([64, 8, 3], activation=activation)
    x = image()
    assert net(x).shape == (4, 3)
    if activation == "linear":
        torch.testing.assert_close(
            net(2 * x) - net(x), net(x) - net(0 * x), rtol=1e-4, atol=1e-5
        )


def test_every_kind_learns():
    """A few steps on something learnable lower every member's loss."""
    y = torch.tensor([0, 1, 2, 0])
    for name, (make, inputs) in MODELS.items():
        run = train(
            make(), (inputs(), y), seeds=[1, 2], steps=60,
            optimiser=AdamW(0.03),
        )  # fmt: skip
        loss = run.history["loss"].values
        assert (loss[:, -1] < 0.5 * loss[:, 0]).all(), name


def test_threads_draw_what_one_thread_draws():
    """Layers draw from a global generator, which threads have in common."""
    def draw(seed):
        return reset(mlp((40, 200, 200, 10), seed=seed), seed)

    seeds = list(range(64))
    alone = [draw(s) for s in seeds]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(draw, seeds))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
