"""Sharpness-aware steps against the algorithm written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import SGD, fit, train
from reappraisal.lab.models import mlp, resnet
from reappraisal.lab.optimisers import SAM, SAMAdam, SAMAdamW


def problem(seed, n=20, d=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randint(3, (n,), generator=g)


def trained(optimiser, seeds=(1, 2), steps=5, model=None, data=None, **rest):
    return train(model or mlp([5, 7, 3]), data or problem(0), seeds=seeds,
                 steps=steps, batch_size=8, optimiser=optimiser, **rest)


@pytest.mark.parametrize("kind", [SAM, SAMAdam, SAMAdamW])
@pytest.mark.parametrize("adaptive", [False, True])
def test_members_are_trained_as_if_alone(kind, adaptive):
    radii = [0.0, 0.05, 0.3]
    more = dict(adaptive=adaptive, eta=0.02)
    stack = trained(kind(0.01, rho=radii, **more), seeds=(1, 2, 3))
    for i, rho in enumerate(radii):
        one = trained(kind(0.01, rho=rho, **more), seeds=(i + 1,))
        for name, w in stack.params.items():
            assert torch.allclose(w[i], one.params[name][0], atol=1e-6)


@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 1),
       scale=st.sampled_from([0.25, 4.0]))
@settings(max_examples=15, deadline=None)
def test_the_adaptive_ascent_does_not_see_a_rescaling(seed, rho, scale):
    """Loss at the worst point nearby, for two networks that are one."""
    x, y = (t.double() if t.is_floating_point() else t for t in problem(seed))
    net = mlp([5, 7, 3], seed=seed).double()
    twin = mlp([5, 7, 3], seed=seed).double()
    with torch.no_grad():
        twin[1].weight.mul_(scale)
        twin[1].bias.mul_(scale)
        twin[3].weight.div_(scale)
    seen = {}
    for adaptive in (False, True):
        for name, module in (("net", net), ("twin", twin)):
            optimiser = SAM(1.0, rho=rho, eta=0.0, adaptive=adaptive)
            losses = []

            def loss(params, batch, losses=losses, module=module):
                out = torch.func.functional_call(
                    module, {k: v[0] for k, v in params.items()}, (x,)
                )
                value = nn.functional.cross_entropy(out, y)
                losses.append(value.item())
                return value[None]

            params = {k: v.detach()[None] for k, v in
                      module.named_parameters()}
            fit(params, loss, optimiser=optimiser, steps=1)
            seen[adaptive, name] = losses[1]
    assert seen[True, "net"] == pytest.approx(seen[True, "twin"], rel=1e-9)
    assert seen[False, "net"] != pytest.approx(seen[False, "twin"], rel=1e-6)


def test_the_ascent_goes_up_and_comes_back():
    x, y = problem(3)
    seen = []

    def loss(params, batch):
        out = (x @ params["w"][0])
        seen.append(params["w"].detach().clone())
        return nn.functional.cross_entropy(out, y)[None]

    w = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    fit({"w": w}, loss, optimiser=SAM(0.0, rho=0.5), steps=2)
    assert torch.equal(seen[0], seen[2])  # rate zero: back where it was
    assert torch.isclose((seen[1] - seen[0]).norm(), torch.tensor(0.5))


def test_flat_members_and_masks_stay():
    x, y = problem(1)
    flat = nn.Sequential(nn.Linear(5, 3, bias=False))
    still = trained(SAM(0.1, rho=0.2), data=(torch.zeros_like(x), y),
                    model=flat)
    assert all(w.isfinite().all() for w in still.params.values())
    mask = {"1.weight": torch.zeros(1, 7, 5)}
    pruned = trained(SAM(0.1, rho=0.2), masks=mask)
    assert not pruned.params["1.weight"].any()


def test_images_and_repetition():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(12, 1, 8, 8, generator=g), torch.arange(12) % 10
    runs = [
        trained(SAM(0.05, rho=0.1, momentum=0.9), model=resnet((1, 4, 8)),
                data=data, steps=3)
        for _ in range(2)
    ]
    for name, w in runs[0].params.items():
        assert torch.equal(w, runs[1].params[name])
    plain = trained(SGD(0.05, momentum=0.9), model=resnet((1, 4, 8)),
                    data=data, steps=3)
    assert any(
        not torch.equal(w, plain.params[k]) for k, w in runs[0].params.items()
    )


@pytest.mark.parametrize("bad", [
    dict(rho=-1), dict(rho=float("inf")), dict(rho=[0.1, -0.1]),
    dict(eta=float("nan")),
])
def test_bad_radii_are_named(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
        SAM(0.1, **bad)
