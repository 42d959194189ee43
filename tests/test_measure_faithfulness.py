"""Tests of explanations: planted truths found, planted nulls not."""

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
    gradient,
    gradient_times_input,
    integrated_gradients,
    lrp,
    occlusion,
    random_attribution,
)
from reappraisal.measure.faithfulness import (
    agreement,
    average_precision,
    deletion_curve,
    diff_roar,
    infidelity,
    insertion_curve,
    iou,
    localisation_auc,
    localise,
    max_sensitivity,
    planted,
    pointing_game,
    randomise_parameters,
    relevance_mass,
    replacement,
    retained,
    subset_fidelity,
    topk_precision,
)


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g)


def pair(n=2):
    nets = [models.mlp([16, 8, 3], seed=k) for k in range(n)]
    return nets, Ensemble.of(nets)


def images(n=5):
    return normal(n, 1, 4, 4, seed=7)


def test_planted_truth_is_found_and_a_null_is_not():
    truth = torch.zeros(60, 20, dtype=torch.bool)
    truth[:, 4:9] = True
    x = normal(60, 20)
    net = planted(20, range(4, 9), hidden=(32, 32), seed=1)
    for method in (
        gradient, gradient_times_input, integrated_gradients, occlusion, lrp
    ):
        found = localise(method(net, x).values.abs(), truth, 0.25)
        assert found.auc.mean() > 0.999
        assert found.average_precision.mean() > 0.999
        assert found.mass.min() == 1 and found.pointing.min() == 1
    nets = Ensemble.of([net] * 20)
    chance = localise(random_attribution(nets, x), truth, 0.25)
    for name, at in (
        ("precision", 0.25), ("pointing", 0.25), ("auc", 0.5), ("mass", 0.25)
    ):
        assert at in chance.interval(name, 0.9999), name
    assert len(chance.to_frame()) == 1200
    # and by what the network does
    for kind in deletion_curve, insertion_curve:
        good = kind(net, x, gradient_times_input(net, x), random_orders=5)
        null = kind(net, x, random_attribution(net, x), random_orders=5)
        assert good.interval().lo > 0
        assert 0.0 in null.interval(0.9999)


def orders(v):
    """All orders of values from the largest that ties allow."""
    for order in itertools.permutations(range(len(v))):
        if all(v[a] >= v[b] for a, b in itertools.pairwise(order)):
            yield order


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=5
    ),
    st.floats(0.05, 1),
)
def test_ties_are_a_fair_coin(rows, frac):
    v, m = (torch.tensor(t)[None] for t in zip(*rows, strict=True))
    k = max(1, round(frac * v.shape[1]))
    hits = [m[0, list(o[:k])].float().mean() for o in orders(v[0])]
    want = float(torch.stack(hits).mean())
    assert abs(float(topk_precision(v, m, frac)) - want) < 1e-6
    # monotone transformations change no rank
    for measure in localisation_auc, average_precision, pointing_game, iou:
        a, b = measure(v, m), measure(v.double().exp() * 3, m)
        assert torch.allclose(a, b, equal_nan=True)
    # chance is symmetric: the mask and its complement
    auc = localisation_auc(v, m)
    assert torch.allclose(auc, 1 - localisation_auc(v, ~m), equal_nan=True)


def test_localisation_of_members_is_a_loop():
    v, m = normal(3, 5, 1, 4, 4), normal(5, 1, 4, 4, seed=1) > 0
    for measure in (
        topk_precision, pointing_game, iou, relevance_mass,
        localisation_auc, average_precision,
    ):
        found = measure(v, m)
        assert found.shape == (3, 5)
        for one, row in zip(v, found, strict=True):
            assert torch.allclose(measure(one, m), row)


def test_undefined_measures_are_nan():
    v = torch.ones(2, 4)
    m = torch.tensor([[False] * 4, [True] * 4])
    assert localisation_auc(v, m).isnan().all()
    assert average_precision(v, m).isnan().tolist() == [True, False]
    assert iou(v, m).isnan().tolist() == [True, False]
    assert relevance_mass(-v, m).isnan().all()


def test_curves_of_an_ensemble_are_a_loop():
    nets, both = pair()
    x, y = images(), torch.tensor([0, 1, 2, 0, 1])
    found = gradient_times_input(both, x, y)
    for kind in deletion_curve, insertion_curve:
        for fill in "mean", "zero", "sample", "blur", 0.3:
            curve = kind(both, x, found, replace=fill, steps=4)
            for k, net in enumerate(nets):
                one = kind(net, x, found.values[k], y, replace=fill, steps=4)
                assert torch.allclose(curve.scores[k], one.scores, atol=1e-5)
    # the whole image is what the network sees, and the filler the end
    with torch.no_grad():
        full = nets[0](x).gather(1, y[:, None])[:, 0]
        none = nets[0](replacement(x, "blur")).gather(1, y[:, None])[:, 0]
    curve = deletion_curve(nets[0], x, found.values[0], y, replace="blur")
    assert torch.allclose(curve.scores[:, 0], full, atol=1e-5)
    assert torch.allclose(curve.scores[:, -1], none, atol=1e-5)
    assert torch.allclose(curve.aopc(), (full[:, None] - curve.scores).mean(1))
    assert len(curve.to_frame()) == 17 and "deletion" in repr(curve)
    assert curve.plot().get_xlabel()


def test_opposite_orders_are_complements():
    """Deleting the last first is inserting the first first, backwards."""
    net, x = models.mlp([16, 8, 3], seed=0).double(), images().double()
    v = normal(5, 1, 4, 4, seed=2)
    down = deletion_curve(net, x, -v, 0, steps=16)
    up = insertion_curve(net, x, v, 0, steps=16)
    assert torch.allclose(down.scores.flip(-1), up.scores)
    assert torch.allclose(down.auc, up.auc)


def test_one_value_for_all_channels():
    net = nn.Sequential(nn.Flatten(), models.mlp([32, 3], seed=0))
    x = normal(4, 2, 4, 4)
    v = normal(4, 1, 4, 4, seed=1)
    joint = deletion_curve(net, x, v, 0, steps=16, replace="zero")
    order = (-v[0].flatten()).argsort()
    gone = x[0].flatten(1).clone()
    for k, j in enumerate(order, 1):
        gone[:, j] = 0
        with torch.no_grad():
            want = net(gone.view(1, 2, 4, 4))[0, 0]
        assert torch.allclose(joint.scores[0, k], want, atol=1e-5)


def test_ties_are_not_settled_by_position():
    line = nn.Linear(40, 1, bias=False)
    with torch.no_grad():
        line.weight.copy_(torch.linspace(1, 0, 40)[None])
    x = torch.ones(200, 40)
    flat = torch.zeros(200, 40)
    curve = deletion_curve(line, x, flat, steps=40, replace="zero")
    middle = curve.scores[:, 20].mean() / curve.scores[:, 0].mean()
    assert abs(middle - 0.5) < 0.02


def test_infidelity_in_closed_form():
    line, x = models.mlp([6, 2], seed=0).double(), normal(4, 6).double()
    w = line[1].weight.detach()[1]
    assert infidelity(line, x, w.expand(4, 6), 1).max() < 1e-20
    # a wrong scale is forgiven if asked for, a wrong direction is not
    wrong = 5 * w.expand(4, 6)
    assert infidelity(line, x, wrong, 1).min() > 1e-4
    assert infidelity(line, x, wrong, 1, optimal_scale=True).max() < 1e-20
    off = torch.zeros(6).double()
    off[0] = 1
    got = infidelity(
        line, x, (w + off).expand(4, 6), 1, perturbation=0.5, samples=4000
    )
    assert torch.allclose(got.mean(), torch.tensor(0.25).double(), rtol=0.05)

    def first_only(x, draws):
        step = torch.zeros_like(x)
        step[:, 0] = 2.0
        return step

    got = infidelity(
        line, x, (w + off).expand(4, 6), 1, perturbation=first_only, samples=1
    )
    assert torch.allclose(got, torch.full((4,), 4.0).double())


def test_captum_infidelity_and_sensitivity_agree():
    pytest.importorskip("captum")
    from captum.metrics import infidelity as theirs
    from captum.metrics import sensitivity_max

    net, x = models.mlp([16, 8, 3], seed=0).double(), images().double()
    v = gradient(net, x, 1)
    step = 0.1 * normal(5, 1, 4, 4, seed=3).double()
    want = theirs(
        net, lambda x: (step, x - step), x, v.values, target=1,
        n_perturb_samples=1,
    )
    got = infidelity(
        net, x, v, perturbation=lambda x, g: step, samples=1
    )
    assert torch.allclose(got, want)
    draws = models.generator(0, "sensitivity")
    steps = iter(2 * torch.rand(x.shape, generator=draws) - 1 for _ in "ab")

    def shift(inputs, radius=0.1):
        whole = inputs[0] if isinstance(inputs, tuple) else inputs
        return whole + radius * next(steps)

    def explain(inputs):
        whole = inputs[0] if isinstance(inputs, tuple) else inputs
        return (gradient_times_input(net, whole, 1).values,)

    want = torch.stack([
        sensitivity_max(explain, x, perturb_func=shift, perturb_radius=0.1,
                        n_perturb_samples=1)
        for _ in "ab"
    ]).amax(0)
    got = max_sensitivity(
        gradient_times_input, net, x, 1, radius=0.1, samples=2
    )
    assert got.min() > 0 and torch.allclose(want, got, atol=1e-6)


def test_subset_fidelity_members_and_null():
    nets, both = pair()
    x = images(30)
    found = occlusion(both, x, 0)
    scores = subset_fidelity(both, x, found, replace="zero")
    for k, net in enumerate(nets):
        one = subset_fidelity(net, x, found.values[k], 0, replace="zero")
        assert torch.allclose(scores[k], one)
    assert scores.mean() > 0.8
    null = subset_fidelity(both, x, random_attribution(both, x, 0))
    assert abs(null.mean()) < 0.15
    assert subset_fidelity(both, x, 0 * found.values, 0).isnan().all()


def test_sensitivity_grows_with_radius_and_settles_the_target():
    nets, both = pair()
    x = images()
    rows = [
        max_sensitivity(gradient_times_input, both, x, "predicted",
                        radius=r, samples=4)
        for r in (0.01, 0.1, 1.0)
    ]
    assert (rows[0] < rows[1]).all() and (rows[1] < rows[2]).all()
    again = max_sensitivity(
        gradient_times_input, both, x, "predicted", radius=0.1, samples=4
    )
    assert torch.equal(again, rows[1])
    constant = max_sensitivity(
        lambda m, x, t: torch.ones_like(x), nets[0], x, 0, radius=0.1
    )
    assert (constant == 0).all()
    line = models.mlp([16, 3], seed=0)
    sphere = max_sensitivity(
        lambda m, x, t: x, line, x, 0, radius=0.3, norm="2", relative=False
    )
    assert torch.allclose(sphere, torch.full((5,), 0.3))


def test_agreement():
    a, b = normal(3, 5, 8), normal(3, 5, 8, seed=1)
    rho = agreement(a, b, members=True)
    assert rho.shape == (3, 5)
    assert agreement(a, b).shape == (3,)
    assert torch.allclose(
        agreement(a, b[0], members=True)[0], rho[0]
    )
    assert torch.allclose(agreement(a, -a), -torch.ones(3).double())
    assert torch.allclose(
        agreement(a, -a, magnitude=True), torch.ones(3).double()
    )
    assert (agreement(a, torch.zeros_like(a)) == 0).all()
    assert (agreement(a, a, "topk", k=4) == 1).all()
    assert torch.allclose(agreement(a.exp(), b), agreement(a, b))


def test_randomised_parameters():
    nets, both = pair()
    x = images(20)
    before = {k: v.clone() for k, v in both.params.items()}
    state = torch.get_rng_state()
    for cascading in (True, False):
        found = randomise_parameters(
            gradient, both, x, "predicted", cascading=cascading, seed=3
        )
        assert found.layers == ("3", "1")
        assert found.agreement.shape == (2, 2, 20)
        again = randomise_parameters(
            gradient, both, x, "predicted", cascading=cascading, seed=3
        )
        assert torch.equal(found.agreement, again.agreement)
        assert len(found.to_frame()) == 4
    assert all(torch.equal(v, before[k]) for k, v in both.params.items())
    assert torch.equal(state, torch.get_rng_state())
    blind = randomise_parameters(lambda m, x, t: x, nets[0], x, 0)
    assert torch.allclose(blind.agreement, torch.ones(2, 20).double())
    convolutional = models.resnet((1, 4), classes=3)
    found = randomise_parameters(gradient, convolutional, x, 0)
    assert abs(found.agreement[-1].mean()) < 0.5


def test_retained_keeps_what_it_should():
    x, v = normal(6, 10), normal(6, 10, seed=1)
    top = retained(x, v, 0.3, replace=99.0)
    bottom = retained(x, v, 0.7, "bottom", replace=99.0)
    assert ((top == 99) != (bottom == 99)).all()
    assert ((top != 99).sum(1) == 3).all()
    assert torch.equal(retained(x, v, 1.0), x)
    assert torch.equal(retained(x, v, 0.0), x.mean(0).expand(6, 10))


def test_diff_roar_calls_fit_on_cleared_data():
    x, v = normal(50, 6), normal(50, 6, seed=1)
    y = torch.arange(50) % 2
    seen = []

    def fit(x, y):
        seen.append(x)
        return models.mlp([6, 2], seed=0)

    found = diff_roar(
        fit, lambda x, y: v[: len(x)], (x, y), (x[:20], y[:20]),
        fractions=(0.5, 1.0), replace="zero",
    )
    assert [int((s != 0).sum()) for s in seen] == [150, 150, 300, 300]
    assert torch.equal(seen[0] + seen[1], x)
    assert found.difference.shape == (2,) and found.difference[1] == 0
    assert len(found.to_frame()) == 2
    with pytest.raises(ValueError, match="Ensemble"):
        found.interval()


def test_replacements():
    x = images(40)
    drawn = replacement(x, "sample", seed=1)
    for j in range(16):
        column = x.flatten(1)[:, j]
        assert torch.isin(drawn.flatten(1)[:, j], column).all()
    assert torch.equal(drawn, replacement(x, "sample", seed=1))
    soft = replacement(x, "blur")
    assert soft.std() < x.std()
    flat = torch.full((2, 1, 4, 4), 3.0)
    assert torch.allclose(replacement(flat, "blur"), flat)
    other = replacement(x, "mean", reference=x[:3])
    assert torch.allclose(other[0], x[:3].mean(0))


def test_models_with_norms_dropout_and_attention_stay_as_they_are():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(12, 3),
    ).train()
    attention = models.transformer(4, 3, 4, width=8, heads=2, tokens=False)
    for model, x in ((net, images()), (attention.train(), images()[:, 0])):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        v = gradient(model, x, 0)
        deletion_curve(model, x, v, steps=3)
        infidelity(model, x, v, samples=2)
        subset_fidelity(model, x, v, samples=3)
        max_sensitivity(gradient, model, x, 0, radius=0.1, samples=1)
        assert model.training
        for k, t in model.state_dict().items():
            assert torch.equal(t, before[k])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, x, v: localise(v, x), "mask: got"),
        (lambda m, x, v: localise(v, x[:2] > 0), "mask: got"),
        (lambda m, x, v: localise(v[0, 0, 0, 0], x > 0), "attribution: got"),
        (lambda m, x, v: localise(v / 0, x > 0), "attribution: not finite"),
        (lambda m, x, v: localise(v * 1j, x > 0), "real numbers"),
        (lambda m, x, v: topk_precision(v, x > 0, 1.5), "frac"),
        (lambda m, x, v: localise(v, x > 0).interval("x"), "name: got"),
        (lambda m, x, v: deletion_curve(m, x, v[:2], 0), "attribution: got"),
        (lambda m, x, v: deletion_curve(m, x, v[0], 0), "attribution: got"),
        (lambda m, x, v: deletion_curve(m, x, v), "target: got None"),
        (lambda m, x, v: deletion_curve(m, x, v, 0, steps=0), "steps"),
        (
            lambda m, x, v: deletion_curve(m, x, v, 0, random_orders=-1),
            "random_orders",
        ),
        (
            lambda m, x, v: deletion_curve(m, x, v, 0, replace="x"),
            "replace: got 'x'",
        ),
        (
            lambda m, x, v: deletion_curve(m, x, v, 0, replace=x[:2]),
            "replace: got shape",
        ),
        (
            lambda m, x, v: deletion_curve(m, x, v, 0, reference=x[0]),
            "reference: got shape",
        ),
        (lambda m, x, v: deletion_curve(m, x, v, 0).gain, "random orders"),
        (lambda m, x, v: deletion_curve(m, x, v, 0).aopc(0), "upto"),
        (lambda m, x, v: replacement(x.flatten(1), "blur"), "'blur'"),
        (lambda m, x, v: infidelity(m, x, v, 0, samples=0), "samples"),
        (lambda m, x, v: infidelity(m, x, v, 0, perturbation=0), "positive"),
        (
            lambda m, x, v: infidelity(
                m, x, v, 0, perturbation=lambda x, g: x[0]),
            "perturbation: gave",
        ),
        (lambda m, x, v: subset_fidelity(m, x, v, 0, samples=1), "samples"),
        (lambda m, x, v: subset_fidelity(m, x, v, 0, frac=0), "frac"),
        (
            lambda m, x, v: max_sensitivity(gradient, m, x, 0, radius=0),
            "radius",
        ),
        (
            lambda m, x, v: max_sensitivity(
                gradient, m, x, 0, radius=1, norm="1"),
            "norm: got '1'",
        ),
        (
            lambda m, x, v: max_sensitivity(
                lambda m, x, t: x[0], m, x, 0, radius=1),
            "explain: gave",
        ),
        (lambda m, x, v: agreement(v, v[:2]), "a, b: shapes"),
        (lambda m, x, v: agreement(v, v, "x"), "kind: got"),
        (lambda m, x, v: agreement(v, v, "topk", k=99), "k: got"),
        (lambda m, x, v: agreement(v[:, 0, 0, :1], v[:, 0, 0, :1]), "two"),
        (lambda m, x, v: randomise_parameters(gradient, 3, x), "model: got"),
        (
            lambda m, x, v: randomise_parameters(
                gradient, m, x, 0).interval("9"),
            "layer: got '9'",
        ),
        (lambda m, x, v: retained(x, v, 2), "frac"),
        (lambda m, x, v: retained(x, v, 0.5, "best"), "which"),
        (lambda m, x, v: retained(x, v[:2], 0.5), "attribution: got"),
        (lambda m, x, v: diff_roar(None, lambda x, y: x, x, x), "no labels"),
        (
            lambda m, x, v: diff_roar(None, None, x, x, fractions=()),
            "fractions",
        ),
        (lambda m, x, v: planted(4, []), "relevant"),
        (lambda m, x, v: planted(4, [4]), "relevant"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call(models.mlp([16, 8, 3], seed=0), images(), normal(5, 1, 4, 4))


def test_curve_scores_with_a_link():
    net, x = models.mlp([16, 8, 3], seed=0), images()
    curve = deletion_curve(
        net, x, gradient(net, x, 1), link=lambda z: z.softmax(-1), steps=4
    )
    with torch.no_grad():
        want = net(x).softmax(-1)[:, 1]
    assert torch.allclose(curve.scores[:, 0], want)
    assert math.isfinite(curve.auc.sum()) and np.all(curve.scores.numpy() > 0)
