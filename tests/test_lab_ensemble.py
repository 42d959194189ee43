"""The stacked trainer against PyTorch's own optimisers, one net at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import (
    SGD,
    Adam,
    AdamW,
    Batches,
    DivergenceWarning,
    Ensemble,
    Trace,
    cosine,
    first_step,
    fit,
    train,
)
from reappraisal.lab.models import generator, reset

torch.set_num_threads(1)
D = torch.float64


def data(n=60, d=5, classes=3, seed=0):
    g = generator(seed, "test")
    x = torch.randn(n, d, generator=g, dtype=D)
    y = (x @ torch.randn(d, classes, generator=g, dtype=D)).argmax(1)
    return x, y


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def serial(seed, xy, steps, batch_size, make, clip=None, schedule=None):
    module = reset(net(), seed).to(D)
    optimiser = make(module.parameters())
    base = [g["lr"] for g in optimiser.param_groups]
    batches = Batches(*xy, [seed], batch_size)
    for t in range(steps):
        if schedule:
            for group, lr in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = lr * schedule(t)
        batch = batches(t, torch.zeros(1, dtype=torch.long))
        optimiser.zero_grad()
        F.cross_entropy(module(batch.x[0]), batch.y[0]).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimiser.step()
    return dict(module.named_parameters())


OPTIMISERS = {
    "sgd": (SGD(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "momentum": (
        SGD(0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        SGD(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (
        Adam(0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    ),
    "adamw": (
        AdamW(0.01, weight_decay=0.5, beta1=0.8, beta2=0.98),
        lambda p: torch.optim.AdamW(
            p, 0.01, betas=(0.8, 0.98), weight_decay=0.5
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_member_equals_the_same_run_alone(name, batch_size):
    ours, theirs = OPTIMISERS[name]
    xy = data()
    stack = train(
        net(), xy, seeds=[3, 4, 5], steps=30, batch_size=batch_size,
        optimiser=ours, dtype=D,
    )  # fmt: skip
    for i, seed in enumerate([3, 4, 5]):
        for key, value in serial(seed, xy, 30, batch_size, theirs).items():
            torch.testing.assert_close(
                stack.params[key][i], value.detach(), rtol=1e-9, atol=1e-11
            )
