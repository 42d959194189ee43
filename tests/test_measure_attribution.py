"""Attributions against closed forms, captum, and what must not change."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble
from reappraisal.measure.attribution import (
    METHODS,
    Attribution,
    gradient,
    gradient_times_input,
    integrated_gradients,
    lrp,
    occlusion,
    random_attribution,
    scored,
    shapley,
    smoothgrad,
    windows,
)

OPTIONS = {
    "SmoothGrad": {"sigma": 0.1, "samples": 3},
    "integrated gradients": {"steps": 7},
}


def batch_norm_net():
    body = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    )
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        models.Residual(body),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    models.reset(net, 3).train()
    net(images(20))
    return net


def images(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=g)


def group_norm_net():
    return models.resnet((1, 4, 4), classes=3, seed=1)


def attention_net():
    return nn.Sequential(
        nn.Flatten(1, 2),
        models.transformer(4, 3, 4, width=8, heads=2, tokens=False, seed=1),
    )


NETS = {
    "mlp": lambda: models.mlp([16, 8, 8, 3], seed=1),
    "batch norm": batch_norm_net,
    "group norm": group_norm_net,
    "attention": attention_net,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_every_model_and_leaves_it(net, name):
    if name == "LRP" and net == "attention":
        pytest.skip("has no relevance rule, tested below")
    model, x = NETS[net]().train(), images()
    if net == "attention":
        model, x = models.transformer(
            4, 3, 4, width=8, heads=2, tokens=False, seed=1
        ).train(), images()[:, 0]
    options = OPTIONS.get(name, {})
    if name == "Shapley value":
        options = {"samples": 2}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    kept = x.clone()
    state = torch.get_rng_state()
    found = METHODS[name](model, x, 1, **options)
    assert isinstance(found, Attribution)
    assert found.values.shape == x.shape and found.score.shape == (5,)
    assert found.values.isfinite().all()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all((p.grad == 1).all() for p in model.parameters())
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])
    assert torch.equal(x, kept) and torch.equal(state, torch.get_rng_state())
    again = METHODS[name](model, x, 1, **options, batch_size=2)
    assert torch.allclose(found.values, again.values, atol=1e-5)
    assert name in repr(found) or found.method in repr(found)
    assert len(found.to_frame()) == 5


@pytest.mark.parametrize("net", ["mlp", "batch norm", "group norm"])
@pytest.mark.parametrize("name", METHODS)
def test_ensemble_is_a_loop_over_members(net, name):
    if name == "random":
        pytest.skip("draws one stream for all members")
    nets = []
    for k in range(3):
        one = NETS[net]().double()
        with torch.no_grad():
            for p in one.parameters():
                p.add_(0.1 * k)
        nets.append(one.eval())
    both, x = Ensemble.of(nets), images().double()
    y = torch.tensor([0, 1, 2, 0, 1])
    options = OPTIONS.get(name, {})
    if name == "Shapley value":
        options = {"groups": windows((1, 4, 4), 2)}
    if name == "LRP":
        options = {
            "rule": "alphabeta", "layers": True, "weights": True,
        }
    found = METHODS[name](both, x, y, **options)
    assert found.many and found.values.shape == (3, *x.shape)
    for k, one in enumerate(nets):
        alone = METHODS[name](one, x, y, **options)
        assert torch.allclose(found.values[k], alone.values, atol=1e-9)
        assert torch.allclose(found.score[k], alone.score)
        if name == "LRP":
            assert set(found.layers) == set(alone.layers)
            for layer, r in alone.layers.items():
                assert torch.allclose(found.layers[layer][k], r, atol=1e-8)
            for w, r in alone.weights.items():
                assert r.shape == dict(one.named_parameters())[w].shape
                assert torch.allclose(found.weights[w][k], r, atol=1e-8)


def test_targets():
    net, x = models.mlp([16, 8, 3], seed=0).double(), images().double()
    out = net(x)
    y = out.argmax(-1)
    named = gradient(net, x, "predicted")
    assert torch.equal(named.target, y)
    for target in (
        y,
        y.numpy(),
        nn.functional.one_hot(y, 3).double(),
        lambda out: out.max(-1).values,
    ):
        assert torch.allclose(gradient(net, x, target).values, named.values)
    # what comes back can be given again
    again = gradient(net, x, named.target)
    assert torch.equal(again.values, named.values)
    # linear in the weights of the outputs
    t = torch.tensor([1.0, -2.0, 0.5]).double()
    mixed = sum(w * gradient(net, x, k).values for k, w in enumerate(t))
    assert torch.allclose(gradient(net, x, t).values, mixed)
    with scored(net, x, 1, link=lambda z: z.softmax(-1)) as f:
        assert torch.allclose(f.value, out.softmax(-1)[:, 1])
    one = models.mlp([16, 1], seed=0)
    assert gradient(one, images()).values.shape == images().shape
    # a class for every member
    both = Ensemble.of([net, models.mlp([16, 8, 3], seed=1).double()])
    own = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 1, 0]])
    found = lrp(both, x, own)
    for k in range(2):
        alone = lrp(both.member(k), x, own[k])
        assert torch.allclose(found.values[k], alone.values)


def exact_path(net, x, start):
    """Integrated gradients of one hidden ReLU layer, kink by kink."""
    w, b, v, _ = (p.detach().numpy() for p in net.parameters())
    step = x - start
    total = np.zeros_like(x)
    for j in range(len(w)):
        at, rise = w[j] @ start + b[j], w[j] @ step
        on = 1.0 if at > 0 else 0.0
        if rise:
            kink = np.clip(-at / rise, 0, 1)
            on = 1 - kink if rise > 0 else kink
        total += v[0, j] * w[j] * step * on
    return total


def test_integrated_gradients_of_a_relu_layer_between_kinks():
    for i in range(20):
        net = models.mlp([4, 6, 1], seed=i).double()
        g = np.random.default_rng(i)
        x, start = g.normal(size=(2, 4))
        want = exact_path(net, x, start)
        gaps = []
        for steps in (20, 2000):
            found = integrated_gradients(
                net, x[None], baseline=start, steps=steps, rule="midpoint"
            )
            gaps.append(np.abs(found.values[0].numpy() - want).max())
        assert gaps[1] < 2e-3


def test_implementation_invariance_of_the_integral_and_not_of_relevance():
    a = models.mlp([4, 6, 1], seed=2).double()
    w, b, v, c = (p.detach() for p in a.parameters())
    # every unit twice, and v h = 2 v h - v h; the first unit only once
    wide = models.mlp([4, 11, 1]).double()
    with torch.no_grad():
        for p, q in zip(
            wide.parameters(),
            (torch.cat([w, w[1:]]), torch.cat([b, b[1:]]),
             torch.cat([v[:, :1], 2 * v[:, 1:], -v[:, 1:]], 1), c),
            strict=True,
        ):
            p.copy_(q)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(a(x), wide(x))
    for method in gradient, integrated_gradients, shapley, occlusion, lrp:
        one, two = (method(m, x).values for m in (a, wide))
        assert torch.allclose(one, two, atol=1e-5)
    one, two = (lrp(m, x, rule="alphabeta").values for m in (a, wide))
    assert (one - two).norm() > 0.1 * one.norm()


@pytest.mark.parametrize("rule", ["gauss-legendre", "midpoint", "trapezoid"])
def test_quadratures_are_exact_where_they_should_be(rule):
    class Bilinear(nn.Module):
        def forward(self, x):
            return x[:, 0] * x[:, 1]

    x = torch.tensor([[2.0, 3.0]]).double()
    start = torch.tensor([1.0, -1.0]).double()
    found = integrated_gradients(Bilinear(), x, baseline=start, steps=3,
                                 rule=rule)
    # (2 - 1) int(-1 + 4t) = 1 and (3 + 1) int(1 + t) = 6
    assert torch.allclose(found.values, torch.tensor([[1.0, 6.0]]).double())
    assert found.gap.abs().max() < 1e-12


def test_baselines():
    net, x = models.mlp([16, 8, 3], seed=0).double(), images().double()
    g = torch.Generator().manual_seed(1)
    many = torch.rand(3, 1, 1, 4, 4, generator=g).double()
    own = torch.rand(5, 1, 4, 4, generator=g).double()
    for method in (
        integrated_gradients,
        occlusion,
        lambda *a, **k: shapley(*a, **k, groups=windows((1, 4, 4), 2)),
    ):
        alone = [method(net, x, 0, baseline=b[0]).values for b in many]
        found = method(net, x, 0, baseline=many)
        assert torch.allclose(found.values, torch.stack(alone).mean(0))
        by_row = [
            method(net, x[i : i + 1], 0, baseline=own[i]).values[0]
            for i in range(5)
        ]
        found = method(net, x, 0, baseline=own)
        assert torch.allclose(found.values, torch.stack(by_row))
        # a feature at its baseline gets nothing
        same = x.clone()
        same[:, 0, 0, 0] = 0.0
        if method is not occlusion:
            continue
        assert (method(net, same, 0).values[:, 0, 0, 0] == 0).all()


def test_shapley_axioms_and_sampling():
    class Game(nn.Module):
        def forward(self, x):
            return x[:, 0] * x[:, 1] * x[:, 2] + x[:, 3] + 0 * x[:, 4]

    x = torch.ones(2, 5).double()
    want = torch.tensor([1 / 3] * 3 + [1.0, 0.0]).double().expand(2, 5)
    assert torch.allclose(shapley(Game(), x).values, want)
    for estimator, samples in (("kernel", 29), ("kernel", 30)):
        found = shapley(Game(), x, samples=samples, estimator=estimator)
        assert found.gap.abs().max() < 1e-12
    assert torch.allclose(found.values, want)
    draws = [shapley(Game(), x, samples=5, seed=k) for k in range(60)]
    assert all(d.gap.abs().max() < 1e-12 for d in draws)
    values = torch.stack([d.values[0, :3] for d in draws])
    error = values.std(0) / 60**0.5
    assert ((values.mean(0) - 1 / 3).abs() < 4 * error).all()
    claimed = torch.stack([d.error[0, :3] for d in draws]).square().mean()
    assert 0.7 < float(claimed**0.5 / values.std(0).mean()) < 1.4
    assert torch.equal(draws[0].values, shapley(
        Game(), x, samples=5, seed=0).values)
    assert not torch.equal(draws[0].values, draws[1].values)
    grouped = shapley(Game(), x, groups=torch.tensor([0, 0, 1, 2, 2]))
    assert torch.allclose(
        grouped.values[0],
        torch.tensor([0.25, 0.25, 0.5, 0.5, 0.5]).double(),
    )
    alone = shapley(Game(), x, groups=torch.zeros(5, dtype=torch.long))
    sampled = shapley(
        Game(), x, groups=torch.zeros(5, dtype=torch.long), samples=1
    )
    assert torch.allclose(alone.values, sampled.values)
    assert torch.allclose(alone.total, torch.tensor(2.0).double())


def test_relevance_equals_gradient_times_input_without_biases():
    nets = {
        "mlp": models.mlp([16, 8, 8, 3], bias=False, seed=1),
        "conv": nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False, stride=1, padding=1), nn.ReLU(),
            models.Residual(nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU())),
            nn.MaxPool2d(2), nn.Conv2d(4, 4, 1, groups=2, bias=False),
            nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(4, 3, bias=False)),
    }
    x = images().double()
    for net in nets.values():
        net.double()
        found = lrp(net, x, 2, epsilon=0.0, layers=True)
        want = gradient_times_input(net, x, 2).values
        assert torch.allclose(found.values, want, atol=1e-12)
        assert found.gap.abs().max() < 1e-12
        for r in found.layers.values():
            if r.shape[-1] != 3 or r.ndim > 2:
                continue
            assert torch.allclose(r.sum(-1), found.score)


class Functional(nn.Module):
    """Activations, pooling and additions without layers of their own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.b = nn.Linear(16, 3)
        self.again = nn.Linear(3, 3)

    def forward(self, x):
        h = torch.relu(self.a(x) + 0.5)
        h = nn.functional.max_pool2d(h, 2)
        h = 2 * h.reshape(x.size(0), -1)
        z = self.b(h)
        z = self.again(torch.relu(self.again(torch.relu(z)))) + z
        return z


def test_functional_calls_and_layers_used_twice():
    torch.manual_seed(0)
    net, x = Functional().double(), images().double()
    found = lrp(net, x, 0, bias=False, epsilon=0.0, layers=True, weights=True)
    with torch.no_grad():
        for p in (net.a.bias, net.b.bias, net.again.bias):
            p.zero_()
    assert set(found.layers) == {"a", "b", "again[0]", "again[1]"}
    assert found.layers["again[1]"].shape == (5, 3)
    assert found.weights["again.weight"].shape == (3, 3)


def test_batch_norm_is_folded():
    net, x = batch_norm_net().eval().double(), images().double()
    assert isinstance(net[3].body[1], nn.BatchNorm2d)
    plain = batch_norm_net().eval().double()
    with torch.no_grad():
        for conv, norm in (
            (plain[0], plain[1]), (plain[3].body[0], plain[3].body[1])
        ):
            size = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight.mul_(size[:, None, None, None])
            conv.bias.copy_((conv.bias - norm.running_mean) * size
                            + norm.bias)
    plain[1], plain[3].body[1] = nn.Identity(), nn.Identity()
    assert torch.allclose(net(x), plain(x))
    for rule in ("epsilon", "zplus", "alphabeta"):
        one, two = (lrp(m, x, 1, rule=rule).values for m in (net, plain))
        assert torch.allclose(one, two, atol=1e-9)


def test_positive_rule_with_bounds_is_positive_and_conserves():
    net = models.mlp([16, 12, 8, 3], seed=4).double()
    with torch.no_grad():
        for layer in net:
            if hasattr(layer, "bias"):
                layer.bias.clamp_(max=0)
    x = images(50).double()
    found = lrp(net, x, "predicted", rule="zplus", bounds=(0, 1), epsilon=0.0)
    held = found.score > 0
    assert held.sum() > 10
    assert found.values[held].min() > -1e-12
    # conserved wherever some positive contribution reaches every unit
    assert (found.gap[held].abs() / found.score[held]).median() < 1e-9


def test_alpha_one_is_zplus_and_rules_by_layer():
    net, x = models.mlp([16, 8, 8, 3], seed=1).double(), images().double()
    one = lrp(net, x, 0, rule="alphabeta", alpha=1.0).values
    assert torch.allclose(one, lrp(net, x, 0, rule="zplus").values)
    mixed = lrp(net, x, 0, rule={"": "zplus", "5": "epsilon"}, layers=True)
    top = lrp(net, x, 0, layers=True)
    assert torch.allclose(mixed.layers["4"], top.layers["4"])
    assert not torch.allclose(mixed.layers["2"], top.layers["2"])


def test_tied_weights_in_an_ensemble():
    def tied(seed):
        net = models.mlp([4, 4, 4, 4, 2], seed=seed).double()
        net[3].weight = net[1].weight
        return net

    nets = [tied(0), tied(1)]
    x = torch.randn(3, 4).double()
    found = lrp(Ensemble.of(nets), x, 0)
    for k, net in enumerate(nets):
        assert torch.allclose(found.values[k], lrp(net, x, 0).values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_invariances(seed, scale):
    g = torch.Generator().manual_seed(seed)
    net = models.mlp([5, 6, 2], seed=seed).double()
    x = torch.randn(3, 5, generator=g).double()
    order = torch.randperm(5, generator=g)
    hidden = torch.randperm(6, generator=g)
    moved = models.mlp([5, 6, 2], seed=seed).double()
    with torch.no_grad():
        moved[1].weight.copy_(scale * net[1].weight[hidden][:, order])
        moved[1].bias.copy_(scale * net[1].bias[hidden])
        moved[3].weight.copy_(net[3].weight[:, hidden] / scale)
    for name, method in METHODS.items():
        if name in ("random", "SmoothGrad"):
            continue
        options = {"epsilon": 0.0} if name == "LRP" else {}
        a = method(net, x, 1, **options)
        b = method(moved, x[:, order], 1, **options)
        assert torch.allclose(a.values[:, order], b.values, atol=1e-9), name
        # samples do not see each other
        flipped = method(net, x.flip(0), 1, **options)
        assert torch.allclose(a.values.flip(0), flipped.values, atol=1e-9)
        if name in ("integrated gradients", "Shapley value"):
            with torch.no_grad():
                owed = net(x)[:, 1] - net(0 * x)[:, 1]
            assert torch.allclose(a.total - a.gap, owed)


def test_random_control():
    from scipy.stats import kstest

    net = Ensemble.of([models.mlp([16, 3], seed=k) for k in range(2)])
    found = random_attribution(net, images(200), 0, seed=3)
    assert kstest(found.values.flatten(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(found.values.flatten(1))[0, 1]) < 0.1
    assert torch.equal(
        found.values, random_attribution(net, images(200), 0, seed=3).values
    )


def test_windows():
    masks = windows((3, 4, 5), 2)
    assert masks.shape == (6, 3, 4, 5) and (masks.sum(0) == 1).all()
    assert windows((7,), 3).sum(1).tolist() == [3, 3, 1]
    assert windows((4, 4), (2, 2), 1).shape[0] == 9
    assert windows((2, 2), 5).all()


def test_captum_agrees():
    pytest.importorskip("captum")
    from captum.attr import (
        LRP,
        InputXGradient,
        IntegratedGradients,
        Occlusion,
        Saliency,
        ShapleyValues,
    )
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    x, y = images().double(), torch.tensor([0, 1, 2, 0, 1])
    net = models.convnet((1, 4, 4), 3, norm=None, seed=1).double().eval()
    close = dict(atol=1e-10)
    assert torch.allclose(
        Saliency(net).attribute(x, target=y, abs=False),
        gradient(net, x, y).values, **close,
    )
    assert torch.allclose(
        InputXGradient(net).attribute(x, target=y),
        gradient_times_input(net, x, y).values, **close,
    )
    for theirs, ours in (
        ("gausslegendre", "gauss-legendre"), ("riemann_middle", "midpoint")
    ):
        want = IntegratedGradients(net).attribute(
            x, 0.3 * torch.ones_like(x), target=y, n_steps=20, method=theirs
        )
        found = integrated_gradients(
            net, x, y, baseline=0.3, steps=20, rule=ours
        )
        assert torch.allclose(want, found.values, **close)
    want = Occlusion(net).attribute(
        x, (1, 2, 2), strides=(1, 1, 1), target=y
    )
    found = occlusion(net, x, y, groups=windows((1, 4, 4), 2, 1)).values
    assert torch.allclose(want.double(), found, atol=1e-6)  # theirs: float32
    mask = torch.arange(4).view(1, 1, 2, 2)
    mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    want = ShapleyValues(net).attribute(x, target=y, feature_mask=mask)
    found = shapley(net, x, y, groups=mask[0]).values
    assert torch.allclose(want.double() / 4, found, atol=1e-5)
    # captum keeps negative biases for z+: compare without, where x > 0
    for rule, ours in (
        (EpsilonRule(1e-4), {"rule": "epsilon", "epsilon": 1e-4}),
        (Alpha1_Beta0_Rule(), {"rule": "zplus", "epsilon": 1e-9}),
    ):
        plain = models.mlp([16, 8, 8, 3], bias=False, seed=1).double()
        for layer in plain:
            if isinstance(layer, nn.Linear):
                layer.rule = rule
        # theirs knows no Flatten
        want = LRP(plain[1:]).attribute(x.flatten(1), target=y).view_as(x)
        found = lrp(plain, x, y, **ours).values
        assert torch.allclose(want, found, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, x: gradient(m, x.long(), 0), "x: got torch.int64"),
        (lambda m, x: gradient(m, x[0, 0, 0], 0), "x: got shape"),
        (lambda m, x: gradient(m, x[:0], 0), "x: got shape"),
        (lambda m, x: gradient(m, x / 0, 0), "x: not finite"),
        (lambda m, x: gradient(m, x), "target: got None"),
        (lambda m, x: gradient(m, x, 3), "target: classes"),
        (lambda m, x: gradient(m, x, -1), "target: classes"),
        (lambda m, x: gradient(m, x, "best"), "target: got 'best'"),
        (lambda m, x: gradient(m, x, torch.zeros(4).long()), "target: got"),
        (lambda m, x: gradient(m, x, torch.zeros(4, 3)), "target: weights"),
        (lambda m, x: gradient(m, x, torch.zeros(5).bool()), "target: got"),
        (lambda m, x: gradient(m, x, lambda z: z), "target: the function"),
        (lambda m, x: gradient("net", x, 0), "model: got str"),
        (lambda m, x: gradient(m, x, 0, batch_size=0), "batch_size"),
        (lambda m, x: gradient(nn.LSTM(4, 2), x[:, 0], 0), "model: gave"),
        (lambda m, x: gradient(Detached(), x, 0), "no gradient"),
        (lambda m, x: gradient(Broken(), x, 0), "score is not finite"),
        (lambda m, x: smoothgrad(m, x, 0, sigma=-1), "sigma"),
        (lambda m, x: smoothgrad(m, x, 0, sigma=1, samples=0), "samples"),
        (lambda m, x: smoothgrad(m, x, 0, sigma=1, seed=-1), "seed"),
        (lambda m, x: integrated_gradients(m, x, 0, rule="x"), "rule"),
        (lambda m, x: integrated_gradients(m, x, 0, steps=0), "steps"),
        (
            lambda m, x: integrated_gradients(m, x, 0, baseline=x[:2]),
            "baseline: got shape",
        ),
        (
            lambda m, x: integrated_gradients(m, x, 0, baseline=math.nan),
            "baseline: empty",
        ),
        (
            lambda m, x: shapley(models.mlp([17, 1]), torch.ones(1, 17)),
            "samples: None for 17 players",
        ),
        (lambda m, x: shapley(m, x, 0, estimator="x"), "estimator"),
        (
            lambda m, x: shapley(m, x, 0, groups=windows((1, 4, 4), 2, 1)),
            "in several",
        ),
        (lambda m, x: shapley(m, x, 0, groups=torch.rand(4)), "groups: got"),
        (
            lambda m, x: occlusion(m, x, 0, groups=torch.arange(3)),
            "groups: got",
        ),
        (
            lambda m, x: shapley(m, x, 0, samples=3, estimator="kernel"),
            "do not determine",
        ),
        (lambda m, x: windows((4, 4), 0), "size: got 0"),
        (lambda m, x: windows((4, 4), (1, 2, 3)), "size: got"),
        (lambda m, x: lrp(m, x, 0, rule="x"), "rule: got"),
        (lambda m, x: lrp(m, x, 0, rule={"9": "zplus"}), "no layer '9'"),
        (lambda m, x: lrp(m, x, 0, epsilon=-1), "epsilon"),
        (lambda m, x: lrp(m, x, 0, alpha=0.5), "alpha"),
        (lambda m, x: lrp(m, x, 0, bounds=(0, 0.1)), "bounds"),
        (lambda m, x: lrp(m, x, lambda z: z[:, 0]), "target: a function"),
        (lambda m, x: lrp(m.bfloat16(), x, 0), "bfloat16"),
        (lambda m, x: lrp(nn.Sequential(m, nn.Softmax(-1)), x, 0), "Softmax"),
        (lambda m, x: lrp(attention_net(), x, 0), "symbolically"),
        (
            lambda m, x: lrp(
                nn.Sequential(
                    nn.Flatten(),
                    nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)),
                ), x, 0,
            ),
            "parametrised|no relevance rule",
        ),
        (
            lambda m, x: lrp(
                nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False),
                              m), x, 0,
            ),
            "statistics of the batch",
        ),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call(models.mlp([16, 8, 3], seed=0), images())


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


class Broken(nn.Module):
    def forward(self, x):
        return x.flatten(1).log() * math.nan


def test_brute_force_relevance_of_a_convolution():
    """A convolution written out as a matrix gets the same relevance."""
    conv = nn.Conv2d(1, 2, 3, padding=1, stride=2).double()
    head = nn.Linear(8, 2).double()
    x = images().double() - 0.5
    columns = []
    for k in itertools.product(range(4), range(4)):
        e = torch.zeros(1, 1, 4, 4).double()
        e[0, 0, k[0], k[1]] = 1
        with torch.no_grad():
            columns.append((conv(e) - conv(0 * e)).flatten())
    dense = nn.Linear(16, 8).double()
    with torch.no_grad():
        dense.weight.copy_(torch.stack(columns, 1))
        dense.bias.copy_(conv(torch.zeros(1, 1, 4, 4).double()).flatten())
    one = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)
    two = nn.Sequential(nn.Flatten(), dense, nn.ReLU(), head)
    for options in (
        {"rule": "epsilon"}, {"rule": "zplus"}, {"rule": "alphabeta"},
        {"bounds": (-0.5, 0.5)}, {"rule": "zplus", "bias": False},
    ):
        a, b = (lrp(m, x, 1, **options).values for m in (one, two))
        assert torch.allclose(a, b, atol=1e-9)
