"""Masks, schedules and training under them, by hand and against torch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from reappraisal.intervene.prune import (
    RULES,
    SHAPES,
    Gradual,
    Masks,
    compensate,
    densities,
    imp,
    keep_schedule,
    mask,
    prune,
    shrink,
    twins,
)
from reappraisal.intervene.saliency import Saliency, score
from reappraisal.lab.ensemble import (
    SGD,
    Adam,
    AdamW,
    Ensemble,
    cosine,
    train,
    untrained,
)
from reappraisal.lab.models import convnet, mlp, resnet, transformer

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, generator=G)
Y = (X @ torch.randn(6, 3, generator=G)).argmax(1)
DATA = X, Y
SGD_ = dict(optimiser=SGD(0.1, momentum=0.9), batch_size=20)


def nets(n=3, **how):
    return Ensemble.of(
        [mlp([6, 8, 5, 3], seed=s, **how) for s in range(n)], range(n)
    )


def total(masks):
    return sum(m.flatten(1).sum(1) for m in masks.stacked().values()).tolist()


scores_of = st.builds(
    lambda seed, levels: Saliency(
        {
            k: torch.randint(
                0, levels, (2, *s),
                generator=torch.Generator().manual_seed(seed),
            ).double()
            for k, s in {"a": (5, 4), "b": (2, 5), "c": (3, 2, 3, 3)}.items()
        },
        2,
    ),
    st.integers(0, 10**6), st.sampled_from([1, 2, 5, 10**6]),
)
SIZE = 20 + 10 + 54


@given(scores_of, st.floats(0, 1), st.sampled_from(["global", "layer", *RULES]))
@settings(max_examples=80, deadline=None)
def test_exactly_the_asked_number(scores, keep, scope):
    try:
        found = mask(scores, keep, scope)
    except ValueError as error:
        assert scope == "erk_plus" and "last layer" in str(error)
        return
    want = math.floor(keep * SIZE + 0.5)
    assert total(found) == [want, want]
    again = mask(scores, keep, scope)
    assert all(torch.equal(found[k], again[k]) for k in found)
    # nothing kept in a layer (or anywhere) scores less than what is gone
    groups = [list(scores)] if scope == "global" else [[k] for k in scores]
    for names, s in itertools.product(groups, range(2)):
        v = torch.cat([scores[k][s].flatten() for k in names])
        m = torch.cat([found[k][s].flatten() for k in names])
        if m.any() and not m.all():
            assert v[m].min() >= v[~m].max()


@given(scores_of, st.floats(0.05, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_masks_are_nested(scores, keep, part):
    """Less kept is a part of more kept, and `within` holds by force."""
    large = mask(scores, keep)
    small = mask(scores, keep * part)
    assert not any((small[k] & ~large[k]).any() for k in small)
    other = Saliency({k: -v for k, v in scores.items()}, 2)
    held = mask(other, keep * part, within=large)
    assert not any((held[k] & ~large[k]).any() for k in held)
    assert total(held) == total(small)


@given(scores_of, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_monotone_scores_give_the_same_masks(scores, power):
    other = Saliency({k: (v + 1) ** power for k, v in scores.items()}, 2)
    a, b = mask(scores, 0.3), mask(other, 0.3)
    assert all(torch.equal(a[k], b[k]) for k in a)


@given(scores_of, st.floats(0.25, 1))
@settings(max_examples=30, deadline=None)
def test_units_go_as_a_whole_and_no_layer_is_cut(scores, keep):
    found = mask(scores, keep, unit="channel", reduce="sum")
    for k, m in found.items():
        rows = m.flatten(2)
        assert (rows.all(2) == rows.any(2)).all() and rows.any((1, 2)).all()
        assert torch.equal(found.units()[k], rows.any(2))
    kept = sum(u.sum(1) for u in found.units().values()).tolist()
    assert kept == [max(3, math.floor(keep * 10 + 0.5))] * 2


@given(scores_of, st.sampled_from(["weight", "channel", "1:2"]))
@settings(max_examples=30, deadline=None)
def test_shuffles_keep_sizes_and_structure(scores, unit):
    only = Saliency({k: scores[k] for k in ("a", "c")}, 2)
    found = mask(only, None if unit == "1:2" else 0.5, unit=unit)
    moved = found.shuffled_within_layer(3)
    for k in found:
        assert torch.equal(
            found[k].flatten(1).sum(1), moved[k].flatten(1).sum(1)
        )
    again = found.shuffled_within_layer(3)
    assert all(torch.equal(moved[k], again[k]) for k in moved)
    if unit == "channel":
        rows = moved["c"].flatten(2)
        assert (rows.all(2) == rows.any(2)).all()
    if unit == "1:2":
        pairs = moved["a"].view(2, 5, 2, 2).sum(3)
        assert (pairs == 1).all()


def test_a_shuffle_is_uniform():
    """Each place of a layer is kept equally often."""
    half = Masks({"w": torch.arange(8).repeat(4000, 1) < 2}, 4000)
    moved = half.shuffled_within_layer(0)["w"].double().mean(0)
    assert (moved - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_each_member_its_own_density():
    keep = torch.tensor([0.1, 0.5, 0.9])
    for scope in "global", "layer", "erk":
        found = mask(score(nets()), keep, scope)
        n = 48 + 40 + 15
        assert total(found) == [math.floor(k * n + 0.5) for k in keep.tolist()]
    child = prune(nets(), "magnitude", keep, rounds=3)
    assert total(child.masks) == total(mask(score(nets()), keep))


def test_torch_agrees_on_a_convolutional_network():
    module = resnet((1, 4, 6), classes=3)
    names = list(score(module))
    twin = copy.deepcopy(module)
    pairs = [
        (twin.get_submodule(k.rpartition(".")[0]), "weight") for k in names
    ]
    child = prune(module, "magnitude", 0.3)
    kept = int(sum(m.sum() for m in child.masks.values()))
    size = sum(m.numel() for m in child.masks.values())
    torch_prune.global_unstructured(
        pairs, torch_prune.L1Unstructured, amount=size - kept
    )
    for name, (layer, _) in zip(names, pairs, strict=True):
        assert torch.equal(child.masks[name], layer.weight_mask.bool())
    ours = dict(child.model.named_parameters())
    for name, (layer, _) in zip(names, pairs, strict=True):
        assert torch.equal(ours[name], layer.weight)
    channels = [k for k in names if module.get_parameter(k).ndim == 4]
    by_filter = mask(
        score(module, only=channels), scope=dict.fromkeys(channels, 0.5),
        unit="channel", reduce="l2",
    )
    for name in channels:
        layer = copy.deepcopy(module.get_submodule(name.rpartition(".")[0]))
        gone = int((~by_filter.units()[name]).sum())
        torch_prune.ln_structured(layer, "weight", gone, n=2, dim=0)
        assert torch.equal(by_filter[name], layer.weight_mask.bool())


def test_erk_on_lenet_as_published():
    shapes = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}
    found = densities(shapes, 0.1)
    # sparsity 1 - (n_in + n_out) / (n_in n_out), scaled; the last is full
    left = 0.1 * 266_200 - 1000
    raw = {"1": 1084, "2": 400}
    for k, sides in raw.items():
        want = left / sum(raw.values()) * sides / math.prod(shapes[k])
        assert math.isclose(found[k], want)
    conv = {"a": (8, 4, 3, 3), "b": (16, 8, 3, 3)}
    found = densities(conv, 0.1)
    ratio = (8 + 4 + 6) / (8 * 4 * 9) / ((16 + 8 + 6) / (16 * 8 * 9))
    assert math.isclose(found["a"] / found["b"], ratio)


@pytest.mark.parametrize("rule", RULES)
def test_equal_layers_share_equally(rule):
    shapes = dict.fromkeys("abc", (4, 4))
    found = densities(shapes, 0.5, rule)
    if rule == "pyramidal":
        p = found["a"]
        assert np.allclose(list(found.values()), [p, p**2, p**3])
    elif rule == "erk_plus":
        assert found == {"a": 0.25, "b": 0.25, "c": 1.0}
    else:
        assert set(found.values()) == {0.5}
    assert np.isclose(np.mean(list(found.values())), 0.5)
    assert densities(shapes, 1.0, rule) == dict.fromkeys("abc", 1.0)
    if rule != "erk_plus":
        assert densities(shapes, 0.0, rule) == dict.fromkeys("abc", 0.0)


def test_cosine_to_the_parent_is_largest_for_magnitude():
    """All masks of a small vector, by brute force."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(10, generator=g, dtype=torch.float64)
    for k in range(1, 10):
        found = mask({"w": w.abs()}, k / 10)["w"]
        cosine_ = torch.cosine_similarity(w * found, w, dim=0)
        energy = (w * found).square().sum() / w.square().sum()
        assert torch.isclose(cosine_, energy.sqrt())
        rivals = [
            torch.cosine_similarity(
                torch.where(
                    torch.isin(torch.arange(10), torch.tensor(c)), w, 0
                ), w, dim=0,
            )
            for c in itertools.combinations(range(10), k)
        ]
        assert max(rivals) <= cosine_ + 1e-12


@pytest.mark.parametrize("kind", SHAPES)
def test_schedules_fall_from_first_to_last(kind):
    share = keep_schedule(kind, 0.2, end=50, start=10, initial=0.8)
    values = [share(t) for t in range(80)]
    assert values[:11] == [pytest.approx(0.8)] * 11
    assert values[50:] == [pytest.approx(0.2)] * 30
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    middle = {
        "oneshot": 0.8, "linear": 0.5, "exponential": 0.4,
        "cubic": 0.2 + 0.6 / 8,
    }
    assert share(30) == pytest.approx(middle[kind])
    grows = keep_schedule(kind, 0.8, end=50, initial=0.2)
    assert grows(0) == pytest.approx(0.2) and grows(50) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "optimiser",
    [
        SGD(0.1, momentum=0.9, weight_decay=0.01),
        SGD(0.1, momentum=0.9, nesterov=True),
        Adam(0.01), AdamW(0.01, weight_decay=0.1),
    ],
)
def test_zeros_stay_in_training_and_through_a_schedule(optimiser):
    child = prune(nets(), "magnitude", 0.3)
    after = train(
        child.model, DATA, steps=12, optimiser=optimiser, masks=child.masks
    )
    for k, m in child.masks.items():
        assert (after.params[k][~m] == 0).all()
        assert (after.params[k][m] != child.model.params[k][m]).any()
    share = keep_schedule("linear", 0.2, end=10, start=2)
    gradual = Gradual(mlp([6, 8, 5, 3]), share)
    slim = train(
        mlp([6, 8, 5, 3]), DATA, steps=17, optimiser=optimiser,
        seeds=range(3), callbacks=gradual, every=2,
    )
    want = math.floor(0.2 * 103 + 0.5)
    left = sum((slim.params[k] != 0).flatten(1).sum(1) for k in gradual.masks)
    assert left.tolist() == [want] * 3
    for k, m in gradual.masks.items():
        assert torch.equal(slim.params[k] != 0, m)


def test_gradual_pruning_of_units_with_members_that_stop():
    def stop_first(state):
        if state.step == 6:
            state.stop(state.members == 0)

    gradual = Gradual(
        nets(), keep_schedule("linear", 0.5, end=10), how="taylor", data=DATA,
        unit="neuron", reduce="gate", only=["1.weight", "3.weight"],
        options={"form": "signed"},
    )
    slim = train(
        nets(), DATA, steps=14, callbacks=[gradual, stop_first], every=2,
        **SGD_,
    )
    assert slim.stopped_at.tolist() == [6, 14, 14]
    kept = sum(
        gradual.masks[k].flatten(2).any(2).sum(1)
        for k in ("1.weight", "3.weight")
    )
    assert kept[1:].tolist() == [7, 7] and kept[0] == round(0.7 * 13)
    for k, m in gradual.masks.items():
        assert (slim.params[k][~m] == 0).all()
    assert "1.bias" in gradual.masks


def test_gradual_refuses_to_grow():
    gradual = Gradual(nets(), lambda t: 0.5 + t / 100)
    with pytest.raises(ValueError, match="schedule: rose"):
        train(nets(), DATA, steps=4, callbacks=gradual, every=1, **SGD_)


def test_imp_is_the_serial_loop():
    """One network by hand: torch optimiser, torch masks, same batches."""
    rate, rounds, steps, rewind = 0.1, 2, 8, 3
    path = imp(
        nets(2), DATA, keep=0.25, rounds=rounds, steps=steps, rewind=rewind,
        optimiser=SGD(rate, momentum=0.9), schedule=cosine(steps),
    )
    multiplier = cosine(steps)

    def run(module, masks, first):
        optimiser = torch.optim.SGD(module.parameters(), rate, momentum=0.9)
        early = None
        for t in range(first, steps):
            if t == rewind:
                early = copy.deepcopy(module.state_dict())
            for group in optimiser.param_groups:
                group["lr"] = rate * multiplier(t)
            optimiser.zero_grad()
            F.cross_entropy(module(X), Y).backward()
            for k, p in module.named_parameters():
                if k in masks:
                    p.grad.mul_(masks[k])
            optimiser.step()
        return early

    module = nets(2).member(1).train()
    early, masks = run(module, {}, 0), {}
    for k in range(1, rounds + 1):
        names = [n for n, p in module.named_parameters() if p.ndim == 2]
        size = torch.cat([
            module.get_parameter(n).detach().abs().flatten() for n in names
        ])
        count = math.floor(0.25 ** (k / rounds) * len(size) + 0.5)
        edge = size.sort(descending=True).values[count - 1]
        masks = {
            n: (module.get_parameter(n).detach().abs() >= edge).float()
            for n in names
        }
        module.load_state_dict(early)
        with torch.no_grad():
            for n in names:
                module.get_parameter(n).mul_(masks[n])
        run(module, masks, rewind)
        for n in names:
            assert torch.equal(path[k].masks[n][1].float(), masks[n])
            assert torch.allclose(
                path[k].model.params[n][1], module.get_parameter(n), atol=1e-5
            )


def test_imp_inside_a_sparse_network():
    start = nets()
    sparse = prune(start, "random", 0.5, scope="erk").masks
    path = imp(
        start, DATA, keep=0.2, rounds=2, steps=5, within=sparse, **SGD_
    )
    shares = [p.masks.density.mean().item() for p in path]
    assert np.allclose(shares, [0.5, (0.5 * 0.2) ** 0.5, 0.2], atol=0.01)
    for p in path:
        for k, m in p.masks.items():
            assert not (m & ~sparse[k]).any()
            assert (p.model.params[k][~m] == 0).all()


def test_compensation_is_the_best_child_of_the_quadratic():
    nets_ = nets(2, activation="tanh")
    nets_ = Ensemble(
        nets_.template.double(), {k: v.double() for k, v in nets_.params.items()}
    )
    masks = prune(nets_, "random", 0.6, scope="layer").masks
    few = {k: masks[k] for k in ("3.weight",)}
    masks = Masks(few, 2)
    moved = compensate(
        nets_, masks, (X, Y), block=None, damping=0.1
    )
    from reappraisal.measure.curvature import sample_gradients

    G_ = sample_gradients(nets_, (X, Y), only="3.weight")
    for s in range(2):
        H = G_[s].T @ G_[s] / len(X)
        H += 0.1 * H.diagonal().mean() * torch.eye(len(H))
        w, m = nets_.params["3.weight"][s].flatten(), few["3.weight"][s]
        v = moved.params["3.weight"][s].flatten()
        assert (v[~m.flatten()] == 0).all()
        slope = (H @ (v - w))[m.flatten()]
        assert slope.abs().max() < 1e-10  # no direction is left to go
        cost = (v - w) @ H @ (v - w)
        cut = torch.where(m.flatten(), w, 0) - w
        assert cost < cut @ H @ cut
    assert torch.equal(moved.params["1.weight"], nets_.params["1.weight"])


def test_obs_order_and_compensation_agree():
    """Greedy removal of the first k is the mask that greedy ranks give."""
    g = torch.Generator().manual_seed(2)
    A = torch.randn(40, 5, generator=g, dtype=torch.float64)
    A[:, 1] = A[:, 0] + 0.1 * A[:, 1]  # one of them can stand for both
    w = torch.tensor([[1.0, 0.9, 0.5, -0.4, 2.0]], dtype=torch.float64)
    line = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(w)
    bowl = dict(loss="mse", block=None, damping=0.0, curvature="hessian")
    target = A @ w.T
    greedy = prune(line, "obs", 0.8, (A, target), greedy=True, **bowl)
    gone = (~greedy.masks["weight"][0]).nonzero().flatten().tolist()
    costs = []
    for q in range(5):
        left = [i for i in range(5) if i != q]
        fit = torch.linalg.lstsq(A[:, left], target).solution
        costs.append((A[:, left] @ fit - target).square().mean())
    assert gone == [int(np.argmin(costs))] and gone[0] in (0, 1)
    assert prune(line, "magnitude", 0.8).masks["weight"][0, 3] == 0


def test_synflow_in_rounds_does_not_lose_a_layer():
    module = mlp([20, 30, 30, 30, 4], seed=1, bias=False)
    one = prune(module, "synflow", 0.01, shape=(20,), rounds=1)
    many = prune(module, "synflow", 0.01, shape=(20,))
    assert one.masks.collapsed and not many.masks.collapsed
    assert total(one.masks) == total(many.masks)


def test_twins():
    parents = train(nets(), DATA, steps=30, **SGD_)
    child = prune(parents, "magnitude", 0.3)
    found = twins(parents, child.masks, seed=4)
    assert list(found) == ["shuffled", "reinit", "random"]
    fresh = untrained(parents.template, range(3)).params
    for name, twin in found.items():
        for k, m in child.masks.items():
            n = twin.masks[k]
            assert torch.equal(n.flatten(1).sum(1), m.flatten(1).sum(1))
            assert torch.equal(n, m) == (name == "reinit")
            p = twin.model.params[k]
            assert (p[~n] == 0).all()
            assert torch.equal(p[n], parents.params[k][n]) == (
                name == "shuffled"
            )
            assert not torch.equal(p[n], fresh[k][n])
    again = twins(parents, child.masks, seed=4)
    assert torch.equal(
        again["random"].model.params["1.weight"],
        found["random"].model.params["1.weight"],
    )
    module = parents.member(0)
    one = twins(module, child.masks.member(0), init=lambda m, s: m)
    assert torch.equal(
        one["reinit"].model[1].weight,
        child.masks.member(0).apply(module)[1].weight,
    )


def test_planted_weights_survive_and_nulls_do_not():
    """Only two inputs matter; a trained network's masks read those."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(400, 10, generator=g)
    y = (x[:, 0] + x[:, 1] > 0).long()
    parents = train(
        mlp([10, 16, 2]), (x, y), steps=300, seeds=range(4),
        optimiser=SGD(0.2, momentum=0.9, weight_decay=5e-3),
    )
    for how in "magnitude", "taylor", "fisher", "obd", "wanda", "lamp":
        found = prune(parents, how, 0.2, (x, y), only="1.weight").masks
        share = found["1.weight"].double().mean((0, 1))
        assert share[:2].min() > 2 * share[2:].max(), how
    chance = prune(parents, "random", 0.2, only="1.weight").masks["1.weight"]
    assert chance.double().mean((0, 1)).max() < 0.5


def test_enforce_survives_any_training_and_can_be_removed():
    module = convnet((1, 4, 6), 3)
    found = mask(score(module), 0.3)
    held = found.enforce(module)
    assert not any(hasattr(m, "weight_mask") for m in module.modules())
    optimiser = torch.optim.AdamW(held.parameters(), 0.1)
    x = torch.randn(8, 1, 8, 8)
    for _ in range(3):
        optimiser.zero_grad()
        held(x).square().mean().backward()
        optimiser.step()
    held(x)
    for name, m in found.items():
        layer = held.get_submodule(name.rpartition(".")[0])
        assert (layer.weight[~m] == 0).all()
        torch_prune.remove(layer, "weight")
    assert set(dict(held.named_parameters())) == set(
        dict(module.named_parameters())
    )


def test_models_are_left_alone_and_modules_match_members():
    parents = nets()
    before = {k: v.clone() for k, v in parents.params.items()}
    child = prune(parents, "snip", 0.3, DATA)
    for k, v in parents.params.items():
        assert torch.equal(v, before[k])
    for s in range(3):
        one = prune(parents.member(s), "snip", 0.3, DATA)
        for k in one.masks:
            assert torch.equal(one.masks[k], child.masks[k][s])
        assert isinstance(one.masks.density, float)
    module = transformer(4, 3, 5, width=8, tokens=False).train()
    x = torch.randn(6, 5, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    state = copy.deepcopy(module.state_dict())
    cut = prune(module, "fisher", 0.5, x)
    assert module.training and cut.model.training
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert cut.model(x[0]).isfinite().all()


def test_frames_plots_and_texts():
    found = mask(score(nets()), 0.2, unit="neuron", reduce="l2")
    frame = found.to_frame()
    assert len(frame) == 9 and frame["kept"].sum() == sum(total(found))
    assert "by neuron" in repr(found)
    axes = found.plot()
    assert "density" in axes.get_ylabel()
    import matplotlib.pyplot as plt

    plt.close("all")
    assert "magnitude" in repr(prune(nets(), "magnitude", 0.1))


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_shrunk_networks_compute_the_same(activation):
    dense = nets(activation=activation)
    some = ["1.weight", "3.weight"]
    if activation == "gelu":
        some = list(score(dense))[:2]
    child = prune(dense, "taylor", 0.4, DATA, unit="neuron", only=some)
    small = shrink(dense, child.masks, X)
    assert torch.allclose(small.predict(X), child.model.predict(X), atol=1e-6)
    widths = [u.sum(1).max().item() for u in child.masks.units().values()]
    assert [small.params[k].shape[1] for k in some] == widths
    one = shrink(dense.member(1), child.masks.member(1), X)
    assert torch.allclose(one(X), child.model.member(1)(X), atol=1e-6)
    units = [u.sum().item() for u in child.masks.member(1).units().values()]
    assert [one.get_parameter(k).shape[0] for k in some] == units


def test_shrink_channels_and_what_it_leaves():
    module = convnet((1, 6, 8), 3, norm=None)
    x = torch.randn(4, 1, 8, 8)
    names = [k for k in score(module) if module.get_parameter(k).ndim == 4]
    child = prune(
        module, "magnitude", 0.5, unit="channel", reduce="l2", only=names
    )
    small = shrink(module, child.masks, x)
    assert torch.allclose(small(x), child.model(x), atol=1e-6)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (module, small)]
    assert sizes[1] < 0.6 * sizes[0]
    # weights here and there empty no unit
    same = shrink(module, prune(module, "magnitude", 0.9).masks, x)
    assert sum(p.numel() for p in same.parameters()) == sizes[0]
    # a residual stream keeps what one of its writers keeps
    stream = mlp([6, 8, 8, 3], residual=True)
    gone = {
        k: torch.ones_like(p, dtype=torch.bool)
        for k, p in stream.named_parameters()
        if p.ndim == 2
    }
    first, second = list(gone)[:2]
    gone[first][:2] = False
    kept = shrink(stream, Masks(gone), X)
    assert kept.get_parameter(first).shape[0] == 8
    gone[second][1:3] = False
    kept = shrink(stream, Masks(gone), X)
    assert kept.get_parameter(first).shape[0] == 7


BASE = score(nets())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mask(BASE), "keep: missing"),
        (lambda: mask(BASE, -0.1), "keep: got"),
        (lambda: mask(BASE, float("nan")), "keep: got"),
        (lambda: mask(BASE, [0.1, 0.2]), "keep: 2 shares"),
        (lambda: mask(BASE, 0.5, "local"), "scope: got 'local'"),
        (lambda: mask(BASE, scope={"1.weight": 0.1}), "scope: densities"),
        (lambda: mask(BASE, scope=dict.fromkeys(BASE, 2.0)), "scope: got"),
        (lambda: mask(BASE, 0.5, unit="unit"), "unit: got"),
        (lambda: mask(BASE, unit="3:2"), "unit: got"),
        (lambda: mask(BASE, unit="2:4"), "unit: '1.weight' has shape"),
        (lambda: mask(BASE, 0.3, unit="1:2"), "keep, scope"),
        (lambda: mask(BASE, 0.1, unit="neuron"), "keep: 2 units"),
        (lambda: mask(BASE, 0.1, "layer", "neuron"), "lose all its units"),
        (lambda: mask(BASE, 0.5, unit="neuron", reduce="x"), "reduce: got"),
        (lambda: mask(BASE, 0.5, "row", "neuron"), "scope: rows"),
        (lambda: mask(BASE, 0.9, within=mask(BASE, 0.1)), "keep: .* there"),
        (
            lambda: mask(BASE, 0.9, "layer", within=mask(BASE, 0.1)),
            "keep: 93 weights",
        ),
        (
            lambda: mask(score(mlp([2, 2])), 0.1, within=mask(BASE, 0.1)),
            "within: masks of other",
        ),
        (lambda: mask({"w": torch.tensor([torch.nan])}, 0.5), "NaN"),
        (lambda: mask({}, 0.5), "empty"),
        (lambda: Masks({"w": torch.ones(3)}), "bool"),
        (lambda: Masks({}), "masks: empty"),
        (lambda: mask(BASE, 0.1).apply(mlp([6, 8, 5, 3])), "the mask has"),
        (lambda: mask(BASE, 0.1).apply("net"), "model: got str"),
        (lambda: mask(BASE, 0.1).enforce(nets().member(0)), "module: an nn"),
        (lambda: densities({}, 0.5), "shapes: empty"),
        (lambda: densities({"a": (2, 2)}, 0.5, "x"), "rule: got"),
        (lambda: densities({"a": (2,), "b": (9,)}, 0.5, "erk_plus"), "whole"),
        (lambda: keep_schedule("cosine", 0.1, end=5), "kind: got"),
        (lambda: keep_schedule("cubic", 1.1, end=5), "final: got"),
        (lambda: keep_schedule("cubic", 0.1, end=5, start=5), "start, end"),
        (lambda: prune(nets(), "magnitude"), "keep: missing"),
        (lambda: prune(nets(), "magnitude", 0.5, rounds=-1), "rounds: got"),
        (lambda: prune(nets(), "magnitude", 0.5, scope="row", rounds=2),
         "rounds: got"),
        (lambda: imp(nets(), DATA, keep=0.1, rounds=0, steps=3, **SGD_),
         "rounds, rewind"),
        (lambda: imp(nets(), DATA, keep=0.1, rounds=1, steps=3, rewind=3,
                     **SGD_), "rounds, rewind"),
        (lambda: imp(nets(), DATA, keep=0.1, rounds=1, steps=3, scope="row",
                     **SGD_), "scope: got"),
        (lambda: compensate(nets(), mask(BASE, 0.5), X), "no targets"),
        (lambda: compensate(mlp([2, 2]), mask(BASE, 0.5), DATA), "the mask"),
        (lambda: twins(mlp([2, 2]), mask(BASE, 0.5)), "the mask"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
