"""The chapter on sharp minima: statistics, planted effects and nulls."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reappraisal.landscape.sharp_minima_reappraisal import (
    CONTROLS,
    FACTORIAL,
    OUTCOMES,
    PUBLISHED,
    SIX,
    Circles,
    LossRegression,
    Panel,
    Regressions,
    at_equal_error,
    beside_equal_error,
    between_tau,
    circle_points,
    conflicts,
    digits_task,
    eta_squared,
    evidence_circles,
    evidence_confidence,
    evidence_disagree,
    evidence_flattest,
    evidence_picks,
    evidence_safer,
    evidence_sharper,
    flip_labels,
    group_evidence,
    jackknifed_disagreement,
    long_table,
    network,
    outcome_table,
    outside_ellipse,
    planted_panel,
    ranks_with,
    rolled,
    sharpness_table,
    shifted,
    sibling_disagreement,
    signals_task,
    split_signs,
    train_bank,
    train_circles,
    train_regressions,
    weighted_fit,
)
from reappraisal.measure.sharpness import average_direction
from reappraisal.protocol.claims import Claim
from reappraisal.protocol.statistics import cluster_bootstrap

SEEDS = list(range(1000, 1016))
MEASURES = (*SIX, "avg", "loss", "own_fr", "own_avg", "own_rf")


def panel(shift=0.0, better=0.0, seeds=16, noise=0.05, seed=0):
    """A made-up panel: controls' log readings and outcomes are shifted."""
    rng = np.random.default_rng(seed)
    size = len(CONTROLS), seeds
    move = np.array(
        [0, *[1] * 7, 0, 0], float
    )[:, None] * (1 + 0.1 * np.arange(len(CONTROLS)))[:, None]
    base = rng.normal(size=(1, seeds))
    sharp = {
        m: np.exp(base + shift * move + noise * rng.normal(size=size))
        for m in MEASURES
    }
    safe = {
        o: better * move + noise * rng.normal(size=size) for o in OUTCOMES
    }
    for v in safe.values():  # placebos do nothing on average
        v[-2:] = v[0] + 0.01 * (-1) ** np.arange(seeds)
    # a control is consistent to the degree that its seeds copy one row
    top = rng.integers(0, 10, (len(CONTROLS), seeds, 300))
    keep = 0.5 + better * move
    copy = rng.random(top.shape) < keep[..., None]
    top = np.where(copy, rng.integers(0, 10, (1, 1, 300)), top)
    safe["agreement"] = -sibling_disagreement(top)
    return Panel(tuple(CONTROLS), sharp, safe | {"top": top})


def judged(slug, evidence, seeds=SEEDS):
    claim = Claim.load(f"A03/{slug}")
    return claim.judge(evidence, scale="book", seeds=seeds).record


def test_planted_effect_is_found_and_a_planted_null_is_not():
    three = dict.fromkeys(("mlp", "ln", "conv"))
    up = {k: panel(1.0, 0.2, seed=i) for i, k in enumerate(three)}
    found = judged("baseline-is-flattest-and-never-best",
                   evidence_flattest(up))
    assert found["verdict"] == "reproduced"
    none = {k: panel(0.0, 0.0, seed=i) for i, k in enumerate(three)}
    found = judged("baseline-is-flattest-and-never-best",
                   evidence_flattest(none))
    assert found["verdict"] != "reproduced"
    down = {k: panel(-1.0, 0.2, seed=i) for i, k in enumerate(three)}
    found = judged("baseline-is-flattest-and-never-best",
                   evidence_flattest(down))
    assert found["verdict"] == "not reproduced"


def test_sharper_controls_are_judged_by_direction():
    slug = "regularised-minima-are-sharper"
    for shift, verdict in ((0.8, "reproduced"), (-0.8, "not reproduced"),
                           (0.0, "inconclusive")):
        both = panel(shift, noise=0.02), panel(shift, noise=0.02, seed=1)
        assert judged(slug, evidence_sharper(*both))["verdict"] == verdict


def test_a_loud_placebo_withholds_the_verdict():
    p = panel(0.8, noise=0.02)
    row = list(CONTROLS).index("placebo_wd")
    p.sharp["trace"][row] *= 2
    found = judged("regularised-minima-are-sharper",
                   evidence_sharper(panel(0.8, noise=0.02), p))
    assert found["verdict"] == "invalid"


def test_on_signals_the_same_rules_find_the_same_planted_effects():
    slug = "baseline-is-flattest-and-never-best-mnist1d"
    for shift, better, verdict in (
        (1.0, 0.2, {"reproduced"}), (-1.0, 0.2, {"not reproduced"}),
        (0.0, 0.0, {"inconclusive", "not reproduced"}),
    ):
        both = {
            k: panel(shift, better, seed=i) for i, k in enumerate(("mlp", "ln"))
        }
        assert judged(slug, evidence_flattest(both))["verdict"] in verdict
    # one architecture up and one down is no answer
    split = {"mlp": panel(1.0, 0.2), "ln": panel(-1.0, 0.2, seed=1)}
    assert judged(slug, evidence_flattest(split))["verdict"] == "inconclusive"
    slug = "regularised-minima-are-sharper-mnist1d"
    for shift, verdict in ((0.8, "reproduced"), (-0.8, "not reproduced"),
                           (0.0, "inconclusive")):
        both = panel(shift, noise=0.02), panel(shift, noise=0.02, seed=1)
        assert judged(slug, evidence_sharper(*both))["verdict"] == verdict


def test_on_signals_both_architectures_must_conflict():
    def one(conflict):
        p = panel(0.0)
        if conflict:
            row = list(CONTROLS).index("wd")
            p.sharp["trace"][row] *= 3
            p.sharp["rf"][row] /= 3
        return p

    moved = dict.fromkeys(
        ("rescale_logits", "rescale_trace", "rescale_invariant"), [0.0]
    )
    for a, b, verdict in ((1, 1, "reproduced"), (1, 0, "inconclusive"),
                          (0, 0, "not reproduced")):
        found = evidence_picks({"mlp": [one(0), one(a)], "ln": [one(b)]},
                               moved)
        got = judged("the-measure-picks-the-verdict-mnist1d", found)
        assert got["verdict"] == verdict


def test_on_signals_relations_that_dissolve_are_counted():
    slug = "within-and-between-disagree-mnist1d"
    for kind, verdict in (("dissolution", "reproduced"),
                          ("one latent", "not reproduced")):
        x, y = planted_panel(kind, 4)
        p = Panel(FACTORIAL, dict(zip(SIX, x, strict=True)),
                  dict(zip(OUTCOMES, y, strict=True)))
        found = judged(slug, evidence_disagree(p, planted=2))
        assert found["verdict"] == verdict


def test_sharper_and_safer_follows_the_planted_sign():
    rng = np.random.default_rng(3)

    def made(sign):
        p = panel(20.0, 0.3, noise=0.01, seed=int(rng.integers(99)))
        safe = {o: sign * v for o, v in p.safe.items() if o != "top"}
        return Panel(p.names, p.sharp, safe | {"top": p.safe["top"]})

    for sign, verdict in ((1, "reproduced"), (-1, "not reproduced")):
        panels = {k: made(sign) for k in ("mlp", "ln", "conv")}
        evidence = evidence_safer(panels)
        for key in evidence:
            if key.startswith("permuted"):
                # six cells: the intervals of permuted labels are wide
                assert abs(between_tau(
                    evidence[key]["values"], np.ones((1, 96)))[0]) < 1
        got = judged("sharper-and-safer", evidence)
        assert got["verdict"] in (verdict, "inconclusive")
        rows = {r["name"]: r["outcome"] for r in got["criteria"]}
        want = "supports" if sign > 0 else "refutes"
        assert rows["mlp_accuracy_fr"] == want


def test_within_and_between():
    for kind, low, high in (("one latent", 0, 0.05), ("reversal", 1, 1),
                            ("dissolution", 0.7, 1)):
        share = split_signs(*planted_panel(kind, 5)).share[0]
        assert low <= share <= high
    assert split_signs(*planted_panel("reversal", 5)).reversed.all()
    with pytest.raises(ValueError, match="kind"):
        planted_panel("none", 0)


def test_split_signs_takes_counts():
    x, y = planted_panel("dissolution", 2, 4, 6)
    counts = np.array([[2, 1, 0, 1, 1, 1]])
    rows = np.repeat(np.arange(6), counts[0])
    got, want = split_signs(x, y, counts), split_signs(x[..., rows],
                                                       y[..., rows])
    np.testing.assert_allclose(got.within, want.within, atol=1e-12)
    np.testing.assert_allclose(got.between, want.between, atol=1e-12)
    assert (got.dissolved == want.dissolved).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_between_tau_is_kendalls(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 5, 4))
    e = long_table(x, y)
    got = between_tau(e["values"], np.ones((1, 20)))[0]
    want = stats.kendalltau(x.mean(1), y.mean(1)).statistic
    assert abs(got - want) < 1e-12
    # no change under an increasing map of cell-constant values
    flat = long_table(np.repeat(x[:, :1], 4, 1), y)
    cubed = long_table(np.repeat(x[:, :1] ** 3, 4, 1), y)
    once = np.ones((1, 20))
    assert between_tau(flat["values"], once) == between_tau(
        cubed["values"], once)


def test_between_tau_of_one_cell_is_zero():
    e = long_table(*np.random.default_rng(0).normal(size=(2, 3, 4)))
    w = np.zeros((1, 12))
    w[0, :4] = 1
    assert between_tau(e["values"], w)[0] == 0


def test_the_share_is_bootstrapped_over_seeds():
    e = evidence_disagree(panel(0.5, 0.1), planted=2)
    i = cluster_bootstrap(**e["share"], method="percentile", n_boot=50)
    assert 0 <= i.lo <= i.estimate <= i.hi <= 1 and i.n == 16
    assert max(e["planted"]) < 0.05


def test_conflicts_need_both_families():
    p = panel(0.0)
    assert not conflicts(p)["conflict"].any()
    row = list(CONTROLS).index("wd")
    p.sharp["trace"][row] *= 3
    assert not conflicts(p)["conflict"].any()
    p.sharp["rf"][row] /= 3
    hit = conflicts(p)["conflict"]
    assert hit.sum() == 1 and hit[FACTORIAL[1:].index("wd")]


def test_regression_finds_what_was_planted():
    rng = np.random.default_rng(0)
    loss = np.exp(rng.normal(size=(8, 16)))
    sam = np.array([CONTROLS[k].sam for k in FACTORIAL])[:, None]
    trace = np.exp(0.9 * np.log(loss) - 0.4 * sam
                   + 0.01 * rng.normal(size=loss.shape))
    fit = LossRegression.of(trace, loss)
    once = np.ones((1, 128))
    np.testing.assert_allclose(
        fit.adjusted(fit.table, once)[0], [-0.4, 0, 0], atol=0.01)
    assert fit.r2(fit.table, once)[0] > 0.9
    shuffled = LossRegression.of(trace, rng.permuted(loss.ravel()).reshape(
        loss.shape))
    assert shuffled.r2(shuffled.table, once)[0] < 0.1


def test_weighted_fit_is_least_squares_on_repeats():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(12, 2)), rng.normal(size=12)
    w = rng.integers(0, 3, (5, 12)).astype(float) + 0
    coefficients, _ = weighted_fit(X, y, w)
    for row, got in zip(w, coefficients, strict=True):
        again = np.repeat(np.arange(12), row.astype(int))
        A = np.column_stack([np.ones(len(again)), X[again]])
        want = np.linalg.lstsq(A, y[again], rcond=None)[0][1:]
        np.testing.assert_allclose(got, want, atol=1e-8)


def test_disagreement_jackknife():
    top = np.random.default_rng(0).integers(0, 4, (6, 50))
    pseudo = jackknifed_disagreement(top)
    np.testing.assert_allclose(pseudo.mean(),
                               sibling_disagreement(top).mean())
    same = np.repeat(top[:1], 6, 0)
    assert not jackknifed_disagreement(same).any()
    order = [3, 1, 5, 0, 2, 4]
    np.testing.assert_allclose(jackknifed_disagreement(top[order]),
                               pseudo[order])


def test_the_best_control_is_chosen_on_other_seeds():
    p = panel(0.0, 0.0)
    p.safe["accuracy"][:] = 0.5
    sam, aug = p.rows(["sam", "aug"])
    p.safe["accuracy"][sam, :8] = 0.9  # lucky on the first half only
    p.safe["accuracy"][aug, 8:] = 0.9
    best, gain = p.best_gain("accuracy")
    assert best == "sam" and len(gain) == 8 and not gain.any()


def test_ellipse():
    p = panel(0.0, 0.0)
    row = list(CONTROLS).index("placebo_sam")
    p.sharp["fr"][row] = p.sharp["fr"][0]
    p.safe["ece"][row] = p.safe["ece"][0]
    assert outside_ellipse(p, "fr", "ece", "placebo_sam") == 0
    p.safe["ece"][row] += 1
    assert outside_ellipse(p, "fr", "ece", "placebo_sam") == 1


def test_eta_squared_and_equal_error():
    v = np.arange(3)[:, None] + np.zeros(4)
    e = group_evidence(v)
    assert eta_squared(e["values"], np.ones((1, 12)))[0] == 1
    noise = np.random.default_rng(0).normal(size=(7, 8))
    i = cluster_bootstrap(**group_evidence(noise), method="percentile",
                          n_boot=199)
    assert i.estimate < 0.5
    error = np.exp(-np.arange(4.0))[:, None, None] * np.ones((4, 2, 3))
    value = np.arange(4.0)[:, None, None] * np.ones((4, 2, 3))
    equal, common = at_equal_error(error, value)
    np.testing.assert_allclose(equal, 3)
    np.testing.assert_allclose(common, math.exp(-3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_equal_error_looks_at_few_snapshots(seed, snapshots):
    rng = np.random.default_rng(seed)
    error = rng.lognormal(size=(snapshots, 3, 4)).round(1) + 0.1
    value = rng.normal(size=error.shape)
    look = beside_equal_error(error)
    assert look[-1].all()
    some = np.where(look[..., None], value, np.nan)
    got, common = at_equal_error(error, some)
    want, same = at_equal_error(error, value)
    assert common == same
    np.testing.assert_array_equal(got, want)


def test_shifts_and_flips():
    x = torch.rand(5, 64)
    nine = shifted(x)
    assert nine.shape == (9, 5, 64) and (nine[0] == x).all()
    assert len({tuple(row[0].tolist()) for row in nine}) == 9
    with pytest.raises(ValueError, match="x: got shape"):
        shifted(torch.rand(5, 63))
    y = torch.arange(50) % 10
    assert (flip_labels(y, 0.2, 10, 1) != y).sum() == 10
    assert (flip_labels(y, 0.0, 10, 1) == y).all()
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            flip_labels(y, share, 10, 1)
    with pytest.raises(ValueError, match="kind"):
        network("vit")
    with pytest.raises(ValueError, match="top"):
        jackknifed_disagreement(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="top"):
        sibling_disagreement(np.zeros((1, 3), int))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("reappraisal.lab.zoo.cache_dir", lambda: folder)
        task = digits_task(0.1, rows=60)
        one, two = (
            train_bank("mlp", task, [1, 2], steps=20) for _ in range(2)
        )
    return one, two


def test_controls_share_their_start_and_placebos_their_course(bank):
    one, two = bank
    for k, v in one.nets.params.items():
        assert torch.equal(v, two.nets.params[k])
    table = sharpness_table(one, draws=3)
    assert table["trace"].shape == (len(CONTROLS), 2)
    row = one.names.index
    for m in SIX:
        np.testing.assert_allclose(
            table[m][row("placebo_sam")], table[m][row("base")], rtol=1e-2)
    assert (table["own_fr"][row("base")] == table["clean_fr"][0]).all()
    assert (table["own_fr"][row("aug")] != table["clean_fr"][row("aug")]
            ).all()


def test_without_shifts_augmentation_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("reappraisal.lab.zoo.cache_dir", lambda: tmp_path)
    task = signals_task(0.1, rows=60)
    x = torch.arange(40.0)[None]
    assert (rolled(x)[:, 0, 0] == torch.tensor(
        [0.0, 4, 3, 2, 1, 39, 38, 37, 36])).all()
    again = signals_task(0.1, rows=60)
    assert torch.equal(task.augmented, again.augmented)
    assert task.units.low < 0 < task.units.high
    moved = train_bank("mlp", task, [1, 2, 3], ("base", "aug"), steps=20)
    safe = outcome_table(moved, (1,))
    assert safe["corruption"].shape == (2, 3)
    assert (sharpness_table(moved, draws=2)["fr"][0]
            != sharpness_table(moved, draws=2)["fr"][1]).all()
    still = replace(task, table=task.table[:1].expand(9, -1, -1))
    bank = train_bank("mlp", still, [1, 2, 3], ("base", "aug"), steps=20)
    base, aug = sharpness_table(bank, draws=2)["fr"]
    assert (base == aug).all()


def test_a_bank_stops_at_its_loss():
    task = digits_task(0.0, rows=60)
    bank = train_bank("mlp", task, [1], ("base", "sam"), steps=200,
                      until=1.0)
    assert (bank.nets.stopped_at < 200).all()
    assert (bank.nets.stopped_at % 5 == 0).all()
    assert (sharpness_table(bank, draws=2)["loss"] <= 1).all()


def test_circles_and_their_evidence():
    c = train_circles([1, 2], [(r, 1.0) for r in (0.1, 0.3, 0.5, 0.7, 0.9)],
                      epochs=20)
    again = train_circles([1, 2], epochs=20)
    assert (c.fr == again.fr).all() and (c.rf_met == again.rf_met).all()
    e = evidence_circles(c)
    assert e["too_few"] == [16] or e["too_few"][0] < 16
    assert set(ranks_with((1, 2, 3), np.array([[1, 3], [2, 2], [3, 1]]))
               ) == {1.0, -1.0}
    x, y = circle_points(0.5)
    assert x.shape == (100, 2) and y.sum() == 50


def test_regressions_start_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("reappraisal.lab.zoo.cache_dir", lambda: tmp_path)
    r = train_regressions([1, 2], ("sphere", "Booth"), points=20,
                          steps=(0, 5))
    first = r.nets.at(0).params
    for v in first.values():
        assert torch.equal(v[:2], v[2:])
    assert r.sharpness(5, draws=3).shape == (2, 2)
    raw = train_regressions([1, 2], ("sphere", "Booth"), points=20,
                            steps=(0, 5), standardise=False)
    # errors are in units of the target's variance either way
    assert (np.abs(np.log(raw.error[0] / r.error[0])) < 2).all()


def test_published_and_registered_names_match():
    for slug in ("baseline-is-flattest-and-never-best", "sharper-and-safer"):
        assert Claim.load(f"A03/{slug}").entry["seeds"]["book"] == 16
    assert PUBLISHED == FACTORIAL[:6]


def eight(trace_of, seed=0):
    """A panel of log losses by control, and traces made from them."""
    rng = np.random.default_rng(seed)
    design = np.array([
        [CONTROLS[k].sam, CONTROLS[k].augment, CONTROLS[k].decay]
        for k in FACTORIAL
    ], float)
    loss = design @ [0.0, 1.0, 1.5] + rng.normal(size=(16, 8))
    loss, design = loss.T, design.T[..., None]
    trace = trace_of(loss, *design) + 0.02 * rng.normal(size=loss.shape)
    return Panel(FACTORIAL, {"loss": np.exp(loss), "trace": np.exp(trace)},
                 {})


def test_confidence_is_judged_by_what_makes_the_trace():
    slug = "confidence-carries-most-of-it"

    def by_loss(loss, sam, aug, decay):
        return 0.8 * loss - 0.3 * sam + 0.05 * aug

    def by_control(loss, sam, aug, decay):
        return aug + decay + 0.3 * sam + 0 * loss

    for made, verdict in ((by_loss, "reproduced"),
                          (by_control, "not reproduced")):
        p = eight(made)
        level = np.full((8, 16), 0.7)
        design = [[CONTROLS[k].sam, CONTROLS[k].augment, CONTROLS[k].decay]
                  for k in FACTORIAL]
        same = made(np.log(level), *np.array(design, float).T[..., None])
        noise = 0.02 * np.random.default_rng(1).normal(size=level.shape)
        stopped = np.exp(same + noise), level
        assert judged(slug, evidence_confidence(p, stopped)
                      )["verdict"] == verdict
    # nets at one loss that contradict the regression void the verdict
    p = eight(by_loss)
    up = np.exp(0.3 * np.array(design, float)[:, :1] + noise), level
    assert judged(slug, evidence_confidence(p, up))["verdict"] == "invalid"


def made_circles(slope, slope_met, seeds=32, seed=0, **rest):
    rng = np.random.default_rng(seed)
    shape = 5, seeds
    ratio = np.arange(5)[:, None]

    def rising(by):
        return np.exp(by * ratio + 0.1 * rng.normal(size=shape))

    return replace(
        Circles(
            loss=np.full(shape, 1e-3), accuracy=np.ones(shape),
            test=np.ones(shape), met=np.full(shape, 100.0),
            fr=rising(slope), rf=rising(slope), fr_met=rising(slope_met),
            rf_met=rising(slope_met),
        ), **rest,
    )


def test_circles_are_judged_by_their_trend():
    slug, who = "harder-function-sharper-minimum", list(range(1000, 1032))
    for slope, verdict in ((1.0, "reproduced"), (0.0, "not reproduced"),
                           (-1.0, "not reproduced")):
        found = judged(slug, evidence_circles(made_circles(slope, 1.0)), who)
        assert found["verdict"] == verdict
    gone = judged(slug, evidence_circles(made_circles(1.0, -1.0)), who)
    assert "gone" in gone["qualifier"]
    # nets that do not fit their training set are not counted
    accuracy = np.ones((5, 32))
    accuracy[4, 15:] = 0.98
    few = made_circles(1.0, 1.0, accuracy=accuracy)
    assert judged(slug, evidence_circles(few), who)["verdict"] != "reproduced"


def test_circles_that_never_met_the_loss_do_not_count_there():
    met = np.full((5, 32), 100.0)
    met[4, :10] = np.nan
    c = made_circles(1.0, 1.0, met=met)
    c.fr_met[4, :10] = 0.0  # whatever it is
    e = evidence_circles(c)
    assert len(e["rho_fr"]) == 32 and len(e["rho_fr_matched"]) == 22
    assert min(e["rho_fr_matched"]) > 0.5
    short = train_circles([1, 2], [(0.9, 1.0)], epochs=2)
    assert np.isnan(short.met).all() and (short.fr_met == short.fr).all()


def test_functions_are_judged_by_the_share_they_explain():
    slug, who = "one-objective-one-sharpness", SEEDS[:8]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(7, 8))
    twins = group_evidence(rng.normal(size=(2, 8)), chance=True)
    for gap, verdicts in ((0.0, ("not reproduced", "inconclusive")),
                          (3.0, ("reproduced",))):
        one = group_evidence(gap * np.arange(7)[:, None] + noise)
        found = judged(slug, {
            "eta2": one, "eta2_equal_error": one, "eta2_raw": one,
            "same_function": twins,
        }, who)
        assert found["verdict"] in verdicts
    # two samples of one function that differ withhold it
    apart = group_evidence(noise[:2] + 9 * np.arange(2)[:, None], chance=True)
    found = judged(slug, {
        "eta2": one, "eta2_equal_error": one, "eta2_raw": one,
        "same_function": apart,
    }, who)
    assert found["verdict"] == "inconclusive"


def test_functions_fitted_apart_are_those_fitted_together(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("reappraisal.lab.zoo.cache_dir", lambda: tmp_path)
    how = {"points": 20, "steps": (0, 5)}
    names = "sphere", "Booth"
    whole = train_regressions([1, 2], names, **how)
    apart = Regressions.join(
        [train_regressions([1, 2], (k,), **how) for k in names])
    assert apart.names == whole.names
    assert torch.equal(apart.targets, whole.targets)
    np.testing.assert_allclose(apart.error, whole.error, rtol=1e-5)
    np.testing.assert_allclose(
        apart.sharpness(5, draws=3), whole.sharpness(5, draws=3), atol=1e-5)
    one = whole.sharpness(5, draws=3, which=[1])
    assert np.isnan(one[0]).all() and np.isfinite(one[1]).all()
    # the network is read alone, and as `average_direction` reads the stack
    stack = average_direction(
        whole.nets.at(5)[[0, 1]], (whole.x, whole.targets[0]), "mse",
        n_draws=3, dtype=torch.float64)
    np.testing.assert_allclose(
        whole.sharpness(5, draws=3)[0], stack.log10(), atol=1e-9)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="names: got \\['dropout'\\]"):
        train_bank("mlp", digits_task(0.0, rows=20), [1], ("dropout",))
    with pytest.raises(ValueError, match="names: got \\['plane'\\]"):
        train_regressions([1], ("plane",))
    with pytest.raises(ValueError, match="inputs"):
        network("conv", 40)
