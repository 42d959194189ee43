"""What makes a good prune: cosines, kurtoses and the rules built on them."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from reappraisal.compression.what_makes_a_good_prune import (
    CRITERIA,
    FAMILIES,
    GRID,
    DecoupledSGD,
    Setting,
    SoftThreshold,
    Sweep,
    collapse,
    copies,
    cosine,
    cosine_curve,
    criteria_masks,
    cut,
    drawn_from,
    energy_curve,
    exhaustive_excess,
    gap_at_equal,
    joined,
    kurtosis,
    kurtosis_of_kurtoses,
    largest_sparsity,
    largest_within,
    lenet,
    log_ratio_at_equal,
    lot_of,
    magnitude_masks,
    masks_at,
    most_removed,
    random_masks,
    rank_correlations,
    restored,
    retained_energy,
    safe_divisor,
    safe_prune,
    sizes_of,
    small_cnn,
    strangers,
    swap_excess,
    sweep_both,
    utopia,
    utopia_of,
    weights_of,
    window,
    with_flips,
    without_largest,
)
from reappraisal.intervene.prune import mask
from reappraisal.intervene.saliency import score
from reappraisal.intervene.symmetry import balance, rescale_layers
from reappraisal.lab.data import digits
from reappraisal.lab.ensemble import Ensemble, untrained
from reappraisal.lab.models import generator, mlp
from reappraisal.protocol.claims import Claim

vectors = st.lists(
    st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=8
).filter(lambda x: max(map(abs, x)) > 1e-3)


def layer(values):
    w = torch.as_tensor(values, dtype=torch.float64)
    net = nn.Linear(len(w), 1, bias=False).double().requires_grad_(False)
    net.weight.copy_(w[None])
    return net


@pytest.fixture(scope="module")
def small():
    train, _, test = digits().split(7, (0.3, 0.0, 0.2))
    return Setting(
        mlp((64, 16, 16, 10)), (train.X, train.y), (test.X, test.y),
        epochs=20,
    )


@pytest.fixture(scope="module")
def nets(small):
    return small.parents([1, 2, 3])


# the theorem


@settings(max_examples=40, deadline=None)
@given(vectors)
def test_no_subset_beats_the_largest(values):
    w = np.array(values)
    excess = exhaustive_excess(torch.tensor(w))
    assert excess.max() <= 1e-12
    for k in range(len(w)):
        best = max(
            math.sqrt(sum(w[list(c)] ** 2) / sum(w**2))
            for c in itertools.combinations(range(len(w)), len(w) - k)
        )
        own = np.sqrt(np.sort(w**2)[k:].sum() / sum(w**2))
        assert best == pytest.approx(own, abs=1e-12)


def test_the_search_finds_what_is_better():
    w = torch.randn(10, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(10, generator=generator(2), dtype=torch.float64)
    assert exhaustive_excess(w, w.abs() * noise.exp()).max() > 1e-3


def test_swaps_gain_only_on_a_noisy_choice(nets):
    assert swap_excess(nets, [0.3, 0.8], 2000).max() <= 0
    assert swap_excess(nets, [0.3, 0.8], 2000, noise=0.5).min() > 0


def test_cosine_is_the_root_of_what_is_kept(nets):
    for masks in (magnitude_masks(nets, 0.7), random_masks(nets, 0.7, 3)):
        child = masks.apply(nets)
        kept = [
            sum(float(v[i].double().square().sum()) for v in m.params.values())
            for m in (child, nets) for i in range(3)
        ]
        want = np.sqrt(np.array(kept[:3]) / kept[3:])
        np.testing.assert_allclose(cosine(nets, child), want, atol=1e-12)


def test_cosine_agrees_with_the_loop_over_members(nets):
    child = magnitude_masks(nets, 0.5).apply(nets)
    alone = [
        cosine(nets.member(i), child.member(i))[0].item() for i in range(3)
    ]
    assert alone == cosine(nets, child).tolist()


# closed forms


@pytest.mark.parametrize(
    "law, f", [("gaussian", stats.norm), ("laplace", stats.laplace),
               ("uniform", stats.uniform(-1, 2))],
)
@pytest.mark.parametrize("keep", [0.9, 0.37, 0.04])
def test_energy_against_quadrature(law, f, keep):
    t = f.isf(keep / 2)
    top = f.support()[1] if law == "uniform" else 60
    tail = integrate.quad(lambda x: x**2 * f.pdf(x), t, top)[0]
    assert retained_energy(law, keep) == pytest.approx(
        2 * tail / f.var(), abs=1e-7
    )


def test_energy_at_the_ends_and_by_order():
    for law in ("gaussian", "laplace", "uniform"):
        assert retained_energy(law, 0) == 0 and retained_energy(law, 1) == 1
    at = [retained_energy(k, 0.2) for k in ("uniform", "gaussian", "laplace")]
    assert at == sorted(at)


def test_utopia_of_known_laws():
    found = [utopia_of(k) for k in ("gaussian", "laplace", "uniform")]
    assert found == pytest.approx([0.801, 0.844, 0.745], abs=6e-4)


@settings(max_examples=30, deadline=None)
@given(vectors, st.floats(0.01, 100))
def test_curve_and_utopia_do_not_see_scale(values, factor):
    a, b = layer(values), layer(np.array(values) * factor)
    torch.testing.assert_close(cosine_curve(a), cosine_curve(b))
    best = utopia(a)
    by_hand = min(
        math.hypot(1 - p, 1 - c) for p, c in
        zip(GRID.tolist(), cosine_curve(a)[0].tolist(), strict=True)
    )
    assert float(best.distance) == pytest.approx(by_hand, abs=1e-12)


def test_the_rules_do_not_see_permutations_but_scales_of_layers(nets):
    x = torch.rand(2, 64)
    order = torch.randperm(16, generator=generator(3))
    p = dict(nets.params)
    p["1.weight"], p["1.bias"] = p["1.weight"][:, order], p["1.bias"][:, order]
    p["3.weight"] = p["3.weight"][:, :, order]
    moved, twin = replace(nets, params=p), rescale_layers(nets, x, (4, 1, .25))
    torch.testing.assert_close(moved.predict(x), nets.predict(x))
    assert (utopia(moved).sparsity == utopia(nets).sparsity).all()
    torch.testing.assert_close(kurtosis(moved), kurtosis(nets))
    assert ((kurtosis(twin) / kurtosis(nets)).log().abs() > 1e-3).all()
    torch.testing.assert_close(
        kurtosis_of_kurtoses(twin), kurtosis_of_kurtoses(nets)
    )


def test_largest_sparsity_is_where_the_curve_crosses(nets):
    p = largest_sparsity(nets, 0.95)
    for i in range(3):
        curve = cosine_curve(nets)[i]
        at = int(round(100 * float(p[i])))
        assert curve[at] >= 0.95 > curve[at + 1]
    assert (largest_sparsity(nets, 1.0) == 0).all()


def test_energy_curve_falls_from_one_to_zero(nets):
    curve = energy_curve(nets)
    assert (curve[:, 0] == 1).all() and (curve[:, -1].abs() < 1e-12).all()
    assert (curve.diff(dim=1) <= 0).all()


# kurtosis


def test_kurtosis_against_scipy():
    net = small_cnn(4, 6)
    flat = np.concatenate([p.detach().flatten() for p in net.parameters()])
    want = stats.kurtosis(flat.astype(float), fisher=False)
    assert kurtosis(net).item() == pytest.approx(want)
    each = [
        stats.kurtosis(p.detach().numpy().ravel().astype(float), fisher=False)
        for p in net.parameters()
    ]
    want = stats.kurtosis(each, fisher=False)
    assert kurtosis_of_kurtoses(net).item() == pytest.approx(want)


def test_published_arithmetic_and_the_jump():
    assert 83 / safe_divisor(2.485) > 63.17 > 83 / safe_divisor(2.495)
    below, above = safe_divisor([math.e - 1e-9, math.e])
    assert below == pytest.approx(1.4427, abs=1e-4) and above == 1
    assert safe_divisor(2.0) == 1 and safe_divisor(1.0) == 0


def test_safe_prune_says_where_it_removes_more():
    found = safe_prune(untrained(lenet(8), range(12)))
    more = found.sparsity > found.utopia + 1e-12
    assert (more == (found.k2 < 2)).all() and (found.valid == ~more).all()


def test_gaussian_tensors_have_the_law_of_chance():
    net = mlp((50, 40, 30), seed=1)
    for p in net.parameters():
        nn.init.normal_(p, generator=generator(5))
    assert kurtosis(net).item() == pytest.approx(3, abs=0.3)


# curves


def planted(damage):
    """Accuracy as a function of cosine, or of sparsity, for both kinds."""
    p = np.linspace(0, 0.98, 50)[:, None]
    rng = np.random.default_rng(0)
    lot = np.sqrt(1 - p) + np.zeros((1, 4))
    top = np.sqrt([retained_energy("laplace", 1 - x) for x in p.ravel()])
    top = top[:, None] + np.zeros((1, 4))
    noise = rng.normal(0, 0.1, (2, 50, 4))
    found = tuple(
        damage(c, p) + e for c, e in zip((lot, top), noise, strict=True)
    )
    return Sweep(p[:, 0], (lot, top), found,
                 tuple(np.exp(-f / 50) for f in found))


def test_collapse_finds_a_planted_one_and_no_other():
    c = collapse(planted(lambda c, p: 100 * c**4))
    assert (c["collapse"][0] / c["collapse"][1] < 0.05).all()
    assert (c["placebo"][0] / c["placebo"][1] > 0.75).all()
    worse = collapse(planted(lambda c, p: 100 * (1 - p**4) + 0 * c))
    assert (worse["collapse"][0] > 3 * worse["collapse"][1]).all()


def test_gap_needs_no_order():
    x = np.linspace(0, 1, 20)[:, None]
    a = gap_at_equal((x, x), (x, x + 2))
    b = gap_at_equal((x[::-1], x), (x[::-1], x + 2))
    np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(a, 2)


def test_log_ratio_finds_a_planted_factor_and_no_other():
    x = np.linspace(0.99, 0.4, 12)[:, None] + np.array([[0, -0.1]])
    y = (1 - x) ** 2
    np.testing.assert_allclose(log_ratio_at_equal(x, 4 * y, x, y), 2)
    np.testing.assert_allclose(log_ratio_at_equal(x, y, x, y), 0)


def test_rank_correlations_planted_and_null():
    rng = np.random.default_rng(0)
    cos = rng.random((12, 400))
    np.testing.assert_allclose(rank_correlations(cos, np.exp(-cos)), -1)
    null = rank_correlations(cos, rng.random((12, 400)))
    assert abs(null.mean()) < 0.05
    assert rank_correlations(cos, np.ones_like(cos)).tolist() == [0] * 400


# pruning trained networks


def test_nothing_removed_changes_nothing(small, nets):
    masks = magnitude_masks(nets, 0.0)
    assert cut(small, nets, [masks]).cosine[0] == pytest.approx([1, 1, 1])
    assert all((masks.apply(nets).params[k] == v).all()
               for k, v in nets.params.items())
    all_ = magnitude_masks(nets, 1.0)
    after = cut(small, nets, [all_]).after
    assert (small.accuracy(all_.apply(nets)) == after).all()
    assert (after < 20).all()


class OneByOne(Setting):
    def together(self, members=1):
        return 1


def one_by_one(setting):
    return OneByOne(**{f.name: getattr(setting, f.name)
                       for f in fields(setting)})


def test_cut_is_the_same_in_pieces_and_twice(small, nets):
    ms = [magnitude_masks(nets, p) for p in (0.3, 0.6, 0.9)]
    a, b = cut(small, nets, ms), cut(one_by_one(small), nets, ms)
    again = cut(small, nets, ms)
    for name in ("cosine", "after", "divergence"):
        assert (getattr(a, name) == getattr(again, name)).all()
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), atol=1e-5
        )


def test_parents_learn_and_shuffled_labels_do_not(small, nets):
    assert small.accuracy(nets).mean() > 75
    y = small.train[1][torch.randperm(len(small.train[1]),
                                      generator=generator(1))]
    lost = replace(small, train=(small.train[0], y))
    assert lost.accuracy(lost.parents([1, 2, 3])).mean() < 40


def test_members_have_their_own_rates_in_training_and_after(small):
    rates = {"lr": [0.05, 0.01, 0.05], "weight_decay": [0.0, 0.0, 0.01]}
    together = small.parents([1, 1, 1], hyper=rates)
    masks = magnitude_masks(together, 0.5)
    after = small.tuned(together, masks)
    pieces = one_by_one(small).parents([1, 1, 1], hyper=rates)
    for i in range(3):
        alone = replace(small, optimiser=replace(
            small.optimiser, **{k: v[i] for k, v in rates.items()}))
        parent = alone.parents([1])
        for k, v in parent.params.items():
            torch.testing.assert_close(together.params[k][i], v[0])
            torch.testing.assert_close(pieces.params[k][i], v[0])
        parent = replace(parent, params={
            k: v[[i]] for k, v in together.params.items()})
        own = alone.tuned(parent, magnitude_masks(parent, 0.5))
        for k, v in own.params.items():
            torch.testing.assert_close(after.params[k][i], v[0])
    assert (together.params["1.weight"][0] - together.params["1.weight"][2]
            ).abs().max() > 1e-3


def test_most_removed_asks_no_more_than_it_must(small, nets):
    rungs = [0.2, 0.5, 0.7, 0.8, 0.95]
    rows = [small.accuracy(small.tuned(nets, magnitude_masks(nets, p)))
            for p in rungs]
    for setting in (small, one_by_one(small)):
        for tolerance in (-100, 0.0, 1.0, 3.0, 100):
            want = largest_within(
                np.stack([small.accuracy(nets), *rows]), rungs, tolerance)
            got = most_removed(setting, nets, rungs, tolerance)
            assert got.tolist() == want.tolist()


def test_magnitude_beats_the_lot(small, nets):
    found = sweep_both(small, nets, [0.0, 0.3, 0.6])
    assert (found.cosine[1][1:] > found.cosine[0][1:]).all()
    assert found.accuracy[1].mean() > found.accuracy[0].mean() + 5
    np.testing.assert_allclose(
        found.cosine[1], cosine_curve(nets, found.sparsity).T, atol=1e-7
    )


def test_twelve_criteria_keep_the_same_number(small, nets):
    ms = criteria_masks(nets, tuple(t[:64] for t in small.train), [0.5, 0.9])
    assert len(ms) == 2 * len(CRITERIA)
    for m, keep in zip(ms, np.repeat([0.5, 0.1], len(CRITERIA)), strict=True):
        np.testing.assert_allclose(m.density, keep, atol=1e-3)
    best = ms[0].apply(nets)
    assert all(
        (cosine(nets, best) >= cosine(nets, m.apply(nets)) - 1e-9).all()
        for m in ms[: len(CRITERIA)]
    )


def test_strangers_by_loop(nets):
    ms = [magnitude_masks(nets, p) for p in (0.2, 0.5, 0.8, 0.9)]
    d = np.random.default_rng(0).random((4, 3))
    want = []
    for s in range(3):
        rho = [
            stats.spearmanr([
                cosine(nets[[t]], m.apply(nets)[[s]]).item() for m in ms
            ], d[:, s]).statistic
            for t in range(3) if t != s
        ]
        want.append(np.mean(rho))
    np.testing.assert_allclose(strangers(nets, ms, d), want)


def test_adversaries_reach_the_cosine(nets):
    other = with_flips(nets, 0.8, 1)
    assert (cosine(nets, other) - 0.8).abs().max() < 0.02
    for k, v in nets.params.items():
        assert (other.params[k].abs() == v.abs()).all()
    other, enough = without_largest(nets, 0.95, "3.weight")
    assert enough.all()
    assert (cosine(nets, other) - 0.95).abs().max() < 0.02
    assert (other.params["1.weight"] == nets.params["1.weight"]).all()


def test_gauge_moves_global_masks_and_no_others(nets):
    x = torch.rand(2, 64)
    twin = rescale_layers(nets, x, (8, 1, 1 / 8))
    one = rescale_layers(nets, x, (1, 1, 1))
    a, b, c = (magnitude_masks(m, 0.8) for m in (nets, twin, one))
    assert all((a[k] == c[k]).all() for k in a)
    assert any((a[k] != b[k]).any() for k in a)
    by_layer = [
        mask(score(m, "magnitude", only="all"), 0.2, "layer")
        for m in (nets, twin)
    ]
    assert all((by_layer[0][k] == by_layer[1][k]).all() for k in a)
    same = [balance(m, x) for m in (nets, twin)]
    d, e = (magnitude_masks(m, 0.8) for m in same)
    moved = sum(int((d[k] != e[k]).sum()) for k in d)
    assert moved <= 6  # rounding at the threshold


# recipes and initial weights


def test_largest_within_a_tolerance():
    rows = np.array([[95.0, 95], [94.5, 90], [93.9, 94.1], [94.0, 80]])
    assert largest_within(rows, [0.2, 0.5, 0.9]).tolist() == [0.9, 0.5]
    assert largest_within(rows, [0.2, 0.5, 0.9], 0.1).tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_window_holds_most(values):
    x = np.array(values)
    inside = window(x, 1.5)
    assert np.ptp(x[inside]) <= 1.5 + 1e-6
    most = max(((x >= a) & (x <= a + 1.5)).sum() for a in x)
    assert inside.sum() >= most


def test_families_have_one_variance_and_rising_tails():
    tails = []
    for family, law in FAMILIES.items():
        x = law(np.random.default_rng(3), 300_000)
        assert x.var() == pytest.approx(1, abs=0.03), family
        tails.append(stats.kurtosis(x))
    assert tails == sorted(tails)


def test_initial_weights_come_from_the_seed():
    model = mlp((64, 16, 10))
    a, b = (untrained(model, [4, 5], drawn_from("laplace")) for _ in "ab")
    for k in a.params:
        assert (a.params[k] == b.params[k]).all()
    w = a.params["1.weight"]
    assert (w[0] != w[1]).any() and (a.params["1.bias"] == 0).all()
    assert w.var().item() == pytest.approx(2 / 64, rel=0.15)


def test_restored_has_the_old_length(nets):
    cut_ = magnitude_masks(nets, 0.9, biases=False).apply(nets)
    back = restored(cut_, nets)
    for k, w in back.params.items():
        if w.ndim > 2:
            torch.testing.assert_close(
                w.flatten(1).norm(dim=1), nets.params[k].flatten(1).norm(dim=1)
            )
            assert ((w == 0) == (cut_.params[k] == 0)).all()


def test_soft_threshold_makes_zeros(small):
    strong = replace(
        small, optimiser=DecoupledSGD(lr=0.05, momentum=0.9,
                                      weight_decay=0.2),
        rest={"decay": SoftThreshold()}, epochs=2,
    )
    w = strong.parents([1]).params["1.weight"]
    assert (w == 0).double().mean() > 0.05


# what goes in


def test_models_are_left_as_they_were(nets):
    net = nets.member(0).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for read in (cosine_curve, utopia, kurtosis, safe_prune):
        read(net)
    assert net.training and all(p.grad is None for p in net.parameters())
    for k, v in net.state_dict().items():
        assert (v == before[k]).all()


def test_normalised_and_residual_models_are_read():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(),
        nn.Flatten(), nn.Linear(144, 10),
    )
    for p in net.parameters():
        nn.init.normal_(p, generator=generator(1))
    assert 0.5 < utopia(net).sparsity < 0.95
    assert safe_prune(net).k2 >= 1
    assert kurtosis(mlp((8, 8, 8, 2), residual=True)).shape == (1,)


def test_masks_at_are_those_of_a_sort(nets):
    ties = replace(nets, params={
        k: (10 * v).round() for k, v in nets.params.items()})
    shares = (0.0, 0.1, [0.2, 0.5, 0.9], 0.77, 1.0)
    for model in (nets, ties):
        for scores in (sizes_of(model), lot_of(model, 3),
                       sizes_of(model, biases=False)):
            for p, found in zip(shares, masks_at(scores, shares),
                                strict=True):
                want = mask(scores, 1 - torch.as_tensor(p).double())
                assert all((found[k] == want[k]).all() for k in want)


def test_copies_and_joined(nets):
    many = copies(nets, 2)
    assert many.seeds == (1, 2, 3, 1, 2, 3)
    assert (many.params["1.bias"][3:] == nets.params["1.bias"]).all()
    both = joined([magnitude_masks(nets, 0.2), magnitude_masks(nets, 0.9)])
    np.testing.assert_allclose(both.density, [0.8] * 3 + [0.1] * 3, atol=1e-3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: weights_of("net"), "model: got str"),
        (lambda: weights_of(nn.ReLU()), "no parameters"),
        (lambda: utopia(layer([1, math.nan])), "not finite"),
        (lambda: utopia(layer([0, 0])), "all zero"),
        (lambda: magnitude_masks(untrained(small_cnn(2, 2), [1]), 1.2),
         "sparsity: got 1.2"),
        (lambda: masks_at(sizes_of(untrained(small_cnn(2, 2), [1])),
                          [[0.1, 0.2]]), "one for each of 1 members"),
        (lambda: swap_excess(untrained(small_cnn(2, 2), [1]), [1.5], 9),
         "sparsity: got \\[1.5\\]"),
        (lambda: with_flips(untrained(small_cnn(2, 2), [1]), -3),
         "cosine: got -3"),
        (lambda: without_largest(untrained(small_cnn(2, 2), [1]), 2, "x"),
         "cosine: got 2"),
        (lambda: without_largest(untrained(small_cnn(2, 2), [1]), 0.9, "x"),
         "name: got 'x'"),
        (lambda: safe_prune(nn.Sequential(nn.BatchNorm1d(4),
                                          nn.Linear(4, 4))), "constant"),
        (lambda: cosine(layer([1, 2]), layer([1, 2, 3])), "child: other"),
        (lambda: retained_energy("cauchy", 0.5), "law: got 'cauchy'"),
        (lambda: retained_energy("laplace", 1.5), "keep: got 1.5"),
        (lambda: cosine_curve(layer([1, 2]), [2]), "sparsity: got"),
        (lambda: largest_sparsity(layer([1, 2]), 1.1), "at_least: got 1.1"),
        (lambda: safe_divisor(0.5), "k2: got 0.5"),
        (lambda: kurtosis_of_kurtoses(layer([1, 2])), "one tensor"),
        (lambda: kurtosis_of_kurtoses(
            drawn_from("gaussian")(mlp((4, 4, 2)), 1)), "constant"),
        (lambda: exhaustive_excess(torch.ones(17)), "shape"),
        (lambda: drawn_from("cauchy"), "family: got 'cauchy'"),
        (lambda: lenet(32), "side: got 32"),
        (lambda: largest_within(np.ones((2, 1)), [0.1, 0.2]), "2 rows"),
        (lambda: largest_within(np.ones((3, 1)), [0.2, 0.1]), "rising"),
        (lambda: log_ratio_at_equal(*np.zeros((4, 2, 1))), "positive"),
        (lambda: gap_at_equal((np.zeros((2, 1)), np.ones((2, 1))),
                              (np.ones((2, 1)),) * 2), "share no range"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_cut_needs_masks(small, nets):
    with pytest.raises(ValueError, match="masks: empty"):
        cut(small, nets, [])


# verdicts


def judged(slug, plant, n=24, scale="book"):
    """The verdict on evidence planted for each criterion, `plant(name)`."""
    claim = Claim.load(f"A08/{slug}")
    rng = np.random.default_rng(0)
    evidence = {
        name: plant(name, rng.normal(0, 0.05, n)) for name in claim.criteria
    }
    seeds = range(1000, 1000 + n)
    return claim.judge(evidence, scale=scale, seeds=seeds).record["verdict"]


@pytest.mark.parametrize("at_equal, want", [
    (3.0, "reproduced"), (30.0, "not reproduced"), (14.0, "inconclusive"),
])
def test_verdict_on_a_planted_collapse(at_equal, want):
    def plant(name, noise):
        if name.startswith("gap"):
            return 40 + noise
        if name.startswith("placebo"):
            return 40 + noise, 40 - noise
        return at_equal + noise, 40 - noise

    assert judged("curves-collapse-on-cosine", plant) == want


def test_verdict_without_anything_to_collapse():
    def plant(name, noise):
        if name.startswith("gap"):
            return 2 + noise
        return 1 + noise, 2 - noise

    found = judged("curves-collapse-on-cosine", plant)
    assert found == "invalid"


def test_verdict_if_the_gauge_made_no_difference():
    def plant(name, noise):
        if name in ("one", "layerwise", "outputs"):
            return [0.0]
        return noise

    found = judged("gauge-breaks-proxy", plant)
    assert found == "not reproduced"


def test_one_counter_example_refutes_the_theorem():
    def plant(name, noise):
        if name == "noisy":
            return noise > -9
        if name == "layered":
            return 0.1 + noise**2
        return np.r_[np.zeros(99), 1e-6 if name == "swaps" else 0]

    found = judged("magnitude-maximises-cosine", plant)
    assert found == "not reproduced"


def test_the_gauge_verdict_turns_with_the_gauge(small, nets):
    """Masks of twins that are rescaled, and of twins that are not."""
    x, grid = small.test[0][:2], (0.3, 0.5, 0.7, 0.8, 0.9)

    def swept(twin):
        masks = masks_at(sizes_of(twin), grid)
        found = cut(small, nets, masks)
        own = [cosine(twin, m.apply(twin)).numpy() for m in masks]
        return np.stack(own), found.divergence

    def verdict(*factors):
        theirs = [swept(rescale_layers(nets, x, (f, 1, 1 / f)))
                  for f in factors]
        found = [log_ratio_at_equal(*t, *swept(nets)) for t in theirs]

        def plant(name, noise):
            if name in ("one", "layerwise", "outputs"):
                return [0.0]
            at = {"factor4": 0, "factor8": 1}.get(name)
            return 0.0 * noise if at is None else found[at]

        return judged("gauge-breaks-proxy", plant, 3, "smoke")

    assert verdict(4, 8) == "reproduced"
    assert verdict(1, 1) == "not reproduced"


@pytest.mark.parametrize("tied, want", [
    (True, "reproduced"), (False, "not reproduced"),
])
def test_the_proxy_verdict_turns_with_the_tie(small, nets, tied, want):
    """Divergences that follow the cosines of real masks, or are drawn."""
    masks = criteria_masks(nets, tuple(t[:64] for t in small.train), [0.8])
    cos = np.stack([cosine(nets, m.apply(nets)).numpy() for m in masks])

    def plant(name, noise):
        if name.startswith("stranger"):
            return noise
        rng = np.random.default_rng(list(name.encode()))
        c = np.tile(cos, (1, 8))
        js = np.exp(-5 * c + rng.normal(0, 0.1, c.shape))
        return -rank_correlations(c, js if tied else rng.permuted(js, axis=0))

    assert judged("cosine-proxy-at-fixed-sparsity", plant) == want


@pytest.mark.parametrize("costs, at_08, want", [
    (0.1, 20, "reproduced"), (3.0, 20, "not reproduced"), (0.1, 1, "invalid"),
])
def test_verdict_on_a_planted_cost_at_099(costs, at_08, want):
    def plant(name, noise):
        return noise + (at_08 if name.startswith("costly") else -costs)

    assert judged("cosine-099-needs-no-finetuning", plant) == want


@pytest.mark.parametrize("costs, memory, want", [
    (0.2, 7, "reproduced"), (2.0, 7, "not reproduced"), (0.2, 0.2, "invalid"),
])
def test_verdict_on_a_planted_cost_of_utopia(costs, memory, want):
    def plant(name, noise):
        if name == "width":
            return {"x": np.tile([6, 7, 8.0], 8), "y": noise,
                    "clusters": np.repeat(range(8), 3)}
        if name == "untrained":
            return noise / 100
        return noise + {"beats_80": 0.2, "beats_09": 0.2,
                        "random_labels": memory}.get(name, -costs)

    assert judged("utopia-rule-is-safe", plant) == want


@pytest.mark.parametrize("sign, twin, want", [
    (1, 0.3, "reproduced"), (-1, 0.3, "not reproduced"), (1, -0.3, "invalid"),
])
def test_verdict_on_planted_tails(sign, twin, want):
    rng = np.random.default_rng(1)
    x = rng.random(40)
    y = sign * x + rng.normal(0, 0.1, 40)

    def plant(name, noise):
        if name == "partial":
            return {"x": x, "y": y, "given": rng.normal(size=(40, 2))}
        if name in ("rho", "within", "k2_layers"):
            return x, y
        if name in ("recipes", "dead"):
            return [0.0]
        return noise[:8] + (twin if name == "gauge" else 1)

    assert judged("kurtosis-predicts-prunability", plant) == want


@pytest.mark.parametrize("step, half, want", [
    (2.0, 3, "reproduced"), (0.0, 3, "not reproduced"), (2.0, -3, "invalid"),
])
def test_verdict_on_a_planted_trend_of_tails(step, half, want):
    rng = np.random.default_rng(2)

    def plant(name, noise):
        if name.startswith("trend"):
            return step * np.arange(5) + rng.normal(0, 1, (32, 5))
        if name.startswith("dense"):
            return noise
        return noise + (half if name == "shuffled" else 4 * step)

    found = judged("heavy-tails-unlock-early-pruning", plant, 32)
    assert found == want


@pytest.mark.parametrize("helps, k2, want", [
    (1.0, 1, "reproduced"), (-1.0, 1, "not reproduced"), (1.0, -1, "invalid"),
])
def test_verdict_on_a_planted_safe_prune(helps, k2, want):
    def plant(name, noise):
        if name.startswith("applies"):
            return noise > -9
        if name == "scale_blind":
            return [0.0]
        if name.startswith("planted"):
            return noise + k2
        return noise + (-0.2 if name.startswith("loss") else helps)

    assert judged("safe-prune-corrects-utopia", plant) == want


def test_ensembles_of_modules_and_of_training_agree(nets):
    again = Ensemble.of([nets.member(i) for i in range(3)])
    assert (utopia(again).sparsity == utopia(nets).sparsity).all()
