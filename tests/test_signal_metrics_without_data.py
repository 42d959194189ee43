"""The chapter on scores without data: would its rules notice anything?"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from reappraisal.lab import data
from reappraisal.lab.ensemble import Adam, train
from reappraisal.lab.models import mlp
from reappraisal.measure.spectra import fit_powerlaw
from reappraisal.protocol.claims import Claim
from reappraisal.signal.metrics_without_data import (
    EIGHT,
    NINE,
    Laundry,
    Resets,
    comparators,
    contributions,
    cooled,
    double,
    evidence_blind,
    evidence_function,
    evidence_pairs,
    evidence_population,
    evidence_ranking,
    evidence_untrained,
    evidence_vectors,
    factors,
    find_pairs,
    first_members,
    fresh_spectra,
    grades,
    held_out,
    kaiming,
    laundry,
    passes,
    pooled,
    rebuilt,
    regraded,
    resets,
    residual,
    rho_table,
    swap,
    taus,
    verdicts_on_resets,
    weight_layers,
    within_net,
)

KINDS = ("reinit", "rerand")


def judge(slug, found, n):
    claim = Claim.load(f"A01/{slug}")
    seeds = range(1000, 1000 + n)
    return claim.judge(found, scale="book", seeds=seeds, seconds=0).verdict


def answers(rng, shape, accuracy, N=597):
    """Random right and wrong answers with given accuracies [...]."""
    p = np.broadcast_to(accuracy, shape)[..., None]
    return torch.as_tensor(rng.random((*shape, N)) < p)


def world(S=24, L=5, names=NINE, seed=0, sees=0.0, loss=0.85, ranks=False):
    """Resets without networks; `sees` SD of what the reset does."""
    rng = np.random.default_rng(seed)
    M = len(names)
    trained = rng.normal(size=(M, S, L))
    right = answers(rng, (S,), 0.97)
    base = right[:, None, None].expand(S, L, 1, -1)
    robust = base & answers(rng, (S, L, 1), 0.999)
    drops = rng.uniform(0.02, 0.4, (S, L, 1))
    if ranks:
        robust = base & answers(rng, (S, L, 1), 1 - drops)
        if sees:
            trained = trained * 1e-6 + drops[..., 0]
    fatal = base & answers(rng, (S, L, 1), 1 - loss)
    fatal = fatal.expand(S, L, 5, -1) if ranks else fatal
    size = {
        "reinit": 1 - robust.double().mean(-1),
        "rerand": 1 - fatal.double().mean(-1),
    }
    after = {k: rng.normal(size=(M, S, L)) for k in KINDS}
    after["rerand"] = after["rerand"] + sees
    return Resets(
        tuple(map(str, range(L))), tuple(names), torch.as_tensor(trained),
        {k: torch.as_tensor(v) for k, v in after.items()}, right,
        {"reinit": robust, "rerand": fatal},
        {k: v + 1e-3 * torch.rand(v.shape) for k, v in size.items()},
        {"reinit": torch.zeros(S, L), "rerand": 5 + torch.rand(S, L)},
    )


@pytest.mark.parametrize(
    ("sees", "loss", "verdict"),
    [(0.0, 0.85, "reproduced"), (1.0, 0.85, "not reproduced"),
     (0.0, 0.0, "invalid")],
)
def test_scores_that_see_the_reset_are_found(sees, loss, verdict):
    found = evidence_blind(world(100, 6, EIGHT, sees=sees, loss=loss))
    assert judge("eight-metrics-blind-to-reset", found, 100) == verdict


def test_contributions_average_to_the_table():
    r = world(20, 6, EIGHT)
    found, table = evidence_blind(r), rho_table(r)
    for m, name in enumerate(EIGHT):
        assert found[f"rho_{name}"].mean() == pytest.approx(table[m].mean())
    assert pooled(r, 0, 0)[0].shape == (40,)


def paretos(exponent, n=1000, seed=0):
    u = np.random.default_rng(seed).random((n, 128))
    return torch.as_tensor((1 - u) ** (-1 / (exponent - 1)))


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(3.5, "reproduced"), (12.0, "not reproduced")]
)
def test_share_of_layers_that_pass(exponent, verdict):
    same = {
        "uniform": paretos(exponent), "gaussian": paretos(exponent, seed=1)
    }
    known = {a: paretos(a, 50) for a in (2.8, 4.0, 9.0)}
    found = evidence_untrained(same, known)
    slug = "untrained-layers-pass-as-trained"
    assert judge(slug, found, 1000) == verdict


def test_gaussian_spectra_without_the_matrix():
    ours = fresh_spectra(300, 12, "gaussian", 0)
    W = np.random.default_rng(1).normal(0, (3 * 12) ** -0.5, (300, 12, 12))
    theirs = np.linalg.svd(W, compute_uv=False) ** 2
    for k in (0, 5, 11):
        p = stats.ks_2samp(ours[:, k], theirs[:, 11 - k]).pvalue
        assert p > 1e-3
    assert ours.sum(1).mean() == pytest.approx(4.0, rel=0.05)
    uniform = fresh_spectra(150, 12, "uniform", 0)
    assert uniform.shape == (150, 12)
    assert uniform.sum(1).mean() == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("law", ["uniform", "gaussian"])
def test_fresh_layers_in_parts(law):
    whole = fresh_spectra(7, 20, law, 3)
    rest = fresh_spectra(4, 20, law, 3, first=3)
    assert torch.equal(whole[3:], rest)
    assert not torch.equal(whole[:4], rest)


def test_alpha_of_fresh_layers_as_the_powerlaw_package_has_it():
    powerlaw = pytest.importorskip("powerlaw")
    for x in fresh_spectra(20, 64, "uniform", 3).numpy():
        theirs = powerlaw.Fit(
            x, parameter_ranges={"alpha": [1, 1e3]}, verbose=0
        )
        ours = fit_powerlaw(torch.as_tensor(x))
        assert float(ours.xmin) == pytest.approx(theirs.xmin, rel=1e-9)
        assert float(ours.alpha) == pytest.approx(theirs.alpha, rel=1e-6)


def test_range():
    found = passes([1.9, 2.0, 6.0, 6.1, np.nan])
    assert list(found) == [False, True, True, False, False]


def controls():
    return {"permutation": [0.0], "scalar": [0.0], "rotation": [0.0],
            "basis": np.random.default_rng(0).normal(0.5, 0.1, 24)}


@pytest.mark.parametrize(
    ("shift", "harmless", "verdict"),
    [(-3.0, True, "reproduced"), (-0.1, True, "not reproduced"),
     (-3.0, False, "not reproduced")],
)
def test_laundering_counts_large_and_harmless_moves(shift, harmless, verdict):
    before = np.linspace(4, 6, 24)
    ok = np.full((20, 24), harmless)
    w = Laundry(before, before + shift * np.ones((20, 1)), ok, 0.6, 0.0)
    found = evidence_function(w, w, controls())
    assert judge("same-function-different-metrics", found, 24) == verdict


def drops(values, L=5):
    v = torch.as_tensor(np.broadcast_to(values, (24, L, 3)).copy())
    noise = torch.as_tensor(np.random.default_rng(0).normal(0, 0.01, v.shape))
    return SimpleNamespace(drop=v + noise)


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.85, "reproduced"), (0.0, "not reproduced")]
)
def test_identity_in_place_of_turned_vectors(loss, verdict):
    same = SimpleNamespace(drop=torch.zeros(24, 5, 1))
    # a control that cannot hold without an effect is kept out of the way
    inner = drops(0.05 if loss else -0.5, 6)
    found = evidence_vectors(
        drops(loss), [1e-12], same, inner, drops(0.8), drops(0.1)
    )
    assert judge("same-metrics-different-function", found, 24) == verdict
    found["spectra"] = [1e-3]
    slug = "same-metrics-different-function"
    assert judge(slug, found, 24) == "not reproduced"


@pytest.mark.parametrize(
    ("sees", "verdict"), [(0.0, "reproduced"), (1.0, "not reproduced")]
)
def test_ranking_of_layers(sees, verdict):
    cases = [world(24, 5, seed=1, sees=sees, ranks=True),
             world(24, 6, seed=2, sees=sees, ranks=True)]
    found = evidence_ranking(cases)
    assert judge("criticality-not-ranked", found, 24) == verdict


def test_choosing_on_other_nets_does_not_flatter():
    T = np.random.default_rng(0).uniform(-1, 1, (9, 48))
    flattered = np.abs(T.mean(1)).max()
    assert held_out(T).mean() < flattered / 2
    assert np.allclose(held_out(np.full((2, 10), -0.4)), 0.4)


@pytest.mark.parametrize(
    ("sees", "verdict"), [(0.0, "reproduced"), (4.0, "not reproduced")]
)
def test_pairs_of_resets(sees, verdict):
    plain = find_pairs(world(48, 5, seed=3, sees=sees))
    other = find_pairs(world(48, 5, seed=4, sees=sees, loss=0.2))
    assert plain.robust_first.all() and len(plain.where) > 200
    found = evidence_pairs(plain, other, [0.01], np.zeros(48) + [1e-4, 0] * 24)
    slug = "robust-and-critical-resets-look-alike"
    assert judge(slug, found, 48) == verdict


def test_robust_and_critical_by_hand():
    r = world(3, 2)
    r.correct["rerand"][:] = r.right[:, None, None]
    robust, critical = verdicts_on_resets(r, "rerand")
    assert robust.all() and not critical.any()
    assert find_pairs(r).where.shape == (0, 2)


def population(trained, copies, seed=0, N=144):
    rng = np.random.default_rng(seed)
    accuracy = rng.uniform(0.3, 0.97, (N, 3))
    noise = rng.normal(0, 0.1, (9, N, 3))
    scores = 0.05 * rng.normal(size=(9, N, 3))
    scores[0] = noise[0] + accuracy * [trained, copies, copies]
    return evidence_population(scores, accuracy, accuracy + 0.01)


@pytest.mark.parametrize(
    ("trained", "copies", "verdict"),
    [(1.0, 0.0, "reproduced"), (1.0, 1.0, "not reproduced"),
     (0.0, 0.0, "inconclusive")],
)
def test_population(trained, copies, verdict):
    found = population(trained, copies)
    assert judge("correlation-lost-under-controls", found, 144) == verdict


finite = st.floats(-5, 5).map(lambda v: round(v, 1))


@settings(max_examples=50, deadline=None)
@given(arrays(float, (2, 9), elements=finite))
def test_rank_correlations_with_ties(xy):
    x, y = xy
    if np.ptp(x) and np.ptp(y):
        assert taus(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
        rho = stats.spearmanr(x, y).statistic
        assert contributions(x, y).mean() == pytest.approx(rho)
    else:
        assert taus(x, y) == 0


# with networks


def make():
    return mlp([64, 8, 8, 10])


@pytest.fixture(scope="module")
def digits():
    parts = data.digits().split(0, (300, 0, 200)).standardised(
        per_feature=False
    )
    return parts.train, parts.test


def trained(rows, y, n=3, steps=60, net=None):
    return train(
        make() if net is None else net, (rows.X.flatten(1), y),
        seeds=range(1000, 1000 + n), steps=steps, batch_size=32,
        optimiser=Adam(lr=0.01), schedule=cooled(steps, 10), init=kaiming,
        checkpoints=[0],
    )


@pytest.fixture(scope="module")
def nets(digits):
    return trained(digits[0], digits[0].y)


def measured(nets, digits, seed=5):
    rows, test = digits
    return resets(
        nets, nets.at(0), (test.X.flatten(1), test.y),
        rows.X.flatten(1)[:40], weight_layers(nets), law="kaiming",
        draws=2, seed=seed,
    )


def test_resets_are_what_they_say(nets, digits):
    r, again = measured(nets, digits), measured(nets, digits)
    layers = weight_layers(nets)
    assert r.accuracy("rerand").shape == (3, 3, 2)
    assert torch.equal(r.after["reinit"], grades(nets.at(0), layers))
    assert r.distance["reinit"].eq(0).all() and r.distance["rerand"].gt(0).all()
    for kind in KINDS:
        assert torch.equal(r.after[kind], again.after[kind])
        assert torch.equal(r.correct[kind], again.correct[kind])
        assert torch.equal(r.displacement[kind], again.displacement[kind])
    x, y = digits[1].X.flatten(1), digits[1].y
    for k in range(3):
        twin = swap(nets, nets.at(0), layers, [k] * 3)
        right = twin.predict(x).argmax(-1).eq(y)
        assert torch.equal(right, r.correct["reinit"][:, k, 0])
    short = first_members(r, 2)
    assert torch.equal(short.accuracy("rerand"), r.accuracy("rerand")[:2])
    other = measured(nets, digits, seed=6)
    assert not torch.equal(other.after["rerand"], r.after["rerand"])


def test_stack_is_a_loop_over_members(nets):
    layers = weight_layers(nets)
    stacked = grades(nets, layers, tuple(NINE))
    for s in range(3):
        torch.testing.assert_close(
            stacked[:, s], grades(nets.member(s), layers, tuple(NINE)),
            atol=1e-6, rtol=1e-6,
        )


@pytest.mark.parametrize(
    ("shuffled", "verdict"), [(False, "inconclusive"), (True, "invalid")]
)
def test_nothing_to_tell_apart_without_anything_learnt(
    digits, shuffled, verdict
):
    """Six-layer nets on shuffled labels do not pass the gate."""
    rows = digits[0].shuffle_labels(0) if shuffled else digits[0]
    net = mlp([64, *[32] * 5, 10])
    r = measured(trained(rows, rows.y, n=8, steps=200, net=net), digits)
    found = evidence_blind(r)
    # eight nets say nothing of correlations; this is about the gate
    found |= {f"rho_{k}": np.tile([0.3, -0.3], 4) for k in EIGHT}
    found |= {"comparators": [0.0], "permuted": np.tile([0.01, -0.01], 4)}
    assert judge("eight-metrics-blind-to-reset", found, 8) == verdict


def test_what_sees_a_reset():
    r = world(20, 6, EIGHT)
    found = comparators(r)
    assert all(np.abs(v).min() > 0.7 for v in found.values())
    blank = {k: torch.rand(20, 6) for k in KINDS}
    rho = comparators(replace(r, distance=blank))["distance to start"]
    assert np.abs(rho).max() < 0.6
    found = evidence_blind(replace(r, distance=blank))
    assert found["comparators"].max() > 0.1
    found = evidence_blind(world(100, 6, EIGHT))
    found["comparators"] = [0.1]
    assert judge("eight-metrics-blind-to-reset", found, 100) == "invalid"


def test_laundry_and_its_identity(nets, digits):
    wide, x = double(nets), digits[1].X.flatten(1).double()
    layers = weight_layers(nets)[:2]
    still = laundry(wide, x, layers, [0.0, 0.0])
    assert not still.moved(0.0).any() and still.logits < 1e-12
    w = laundry(wide, x, layers, [0.3, 0.7])
    assert w.harmless.all() and 0 < w.logits < 1e-9
    assert (np.abs(w.after - w.before) > 1e-3).all()


def test_rebuilt_is_the_same(nets):
    layer = weight_layers(nets)[0]
    wide, name = double(nets), f"{layer}.weight"
    known = factors(wide, [layer])
    twin = rebuilt(wide, layer, known)
    torch.testing.assert_close(twin.params[name], wide.params[name])
    U, s, Vh = known[name]
    doubled = {name: (U, 2 * s, Vh)}
    torch.testing.assert_close(
        rebuilt(wide, layer, doubled).params[name], 2 * wide.params[name]
    )


def test_one_layer_graded_again(nets):
    layers, which = weight_layers(nets), [2, 0, 1]
    start, names = nets.at(0), tuple(NINE)
    found = regraded(grades(nets, layers, names), start, layers, which)
    twin = swap(nets, start, layers, which)
    assert torch.equal(found, grades(twin, layers, names))


def test_residual_stack():
    net = residual(8, 6, 10)
    assert len(weight_layers(net)) == 7
    for p in net[0].parameters():
        p.data.zero_()
    x = torch.randn(3, 8)
    assert torch.equal(net[0](x), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: swap(n, n, ["1"], [0, 0]), "which: 2 layers for 3"),
        (lambda n: swap(n, n, ["1"], [0, 1, 0]), "which: from 0 to 1"),
        (lambda n: fresh_spectra(1, 4, "cauchy", 0), "law: got 'cauchy'"),
        (lambda n: within_net(world(2), "both"), "target: got 'both'"),
        (lambda n: grades(n, ["nowhere"]), "nowhere"),
        (lambda n: grades(n, weight_layers(n), ()), "names: none"),
        (lambda n: grades(n, weight_layers(n), ["beta"]), "got 'beta'"),
        (lambda n: fresh_spectra(0, 4, "uniform", 0), "n, width, first"),
        (lambda n: contributions([1, 1], [1, 2]), "x: constant"),
        (lambda n: contributions([1, 2], [1, np.inf]), "y: not finite"),
        (lambda n: taus([1, np.nan, 2], [1, 2, 3]), "x: not finite"),
        (lambda n: taus([1, 2], [1, 2, 3]), "x, y: "),
        (lambda n: cooled(10, 0), "last: got 0"),
        (lambda n: held_out(np.ones((2, 1))), "1 nets"),
    ],
)
def test_bad_input(nets, call, message):
    with pytest.raises(ValueError, match=message):
        call(nets)


def test_nothing_is_changed(nets):
    before = {k: v.clone() for k, v in nets.params.items()}
    swap(nets, nets.at(0), weight_layers(nets), [0, 1, 2])
    layers = weight_layers(nets)
    rebuilt(nets, layers[0], factors(nets, layers[:1]))
    scores = grades(nets, layers, tuple(NINE))
    same = scores.clone()
    regraded(scores, nets.at(0), layers, [0, 1, 2])
    assert torch.equal(scores, same)
    assert all(torch.equal(v, nets.params[k]) for k, v in before.items())
