"""The chapter on functional compression: would its rules notice a stranger?"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from reappraisal.compression.compression_functional_perspective import (
    ALPHAS,
    BITS,
    BUDGETS,
    METRICS,
    SHARES,
    TUNED,
    Child,
    Frontier,
    attacks,
    away,
    bench,
    deviation,
    end_ratios,
    eta_squared,
    evidence_blind,
    evidence_deviation,
    evidence_fresh,
    evidence_home,
    evidence_landscape,
    evidence_published,
    evidence_shared,
    evidence_transfer,
    family,
    frontier,
    grow,
    landscape,
    lineage,
    low_rank,
    maps,
    matched_function,
    mixup,
    permute_first,
    pool,
    pruned,
    published,
    quantised,
    routes,
    same_accuracy,
    taught,
    views,
)
from reappraisal.lab.ensemble import Ensemble, untrained
from reappraisal.protocol.claims import Claim

N = 32
SEEDS = list(range(1000, 1000 + N))
TINY = [3, 4, 5]


@pytest.fixture(scope="module")
def setup():
    return bench("digits", epochs=1)


@pytest.fixture(scope="module")
def parents(setup):
    return grow(setup, TINY, TINY)


def planted(near, student, alone=1.0, fresh=0.4, matching=0.2, seed=0):
    """A frontier in which every ratio is known.

    `near` is that of mild rounding and pruning, `student` that of students
    from the parent's first weights.
    """
    rng = np.random.default_rng(seed)
    luck = np.exp(rng.normal(0, 0.1, N))

    def child(technique, setting, bits, ratio, gain=0.0):
        noise = np.exp(rng.normal(0, 0.1, N))
        gains = gain + rng.normal(0, 0.002, N)
        return Child(technique, setting, bits, gains, gains,
                     {m: ratio * 0.06 * luck * noise for m in METRICS})

    rows = [
        child("quantised", f"{b} bit, {g}", b * 10.0 + (g == "channel"),
              1e-4 if b == 16 else 1.3 if b == 3 else near,
              -0.05 if b == 3 else 0.0)
        for b in BITS for g in ("tensor", "channel")
    ]
    rows += [
        child("pruned", f"{100 * s:.0f} %", 320 * (1.03 - s),
              near if s < 0.6 else 6.0, -0.6 * (s > 0.5))
        for s in SHARES
    ]
    rows += [
        child("random", f"{100 * s:.0f} %", 320 * (1.03 - s), 8.0, -0.8)
        for s in SHARES
    ]
    rows += [
        child("pruned, one epoch", f"{100 * s:.0f} %", 320 * (1.03 - s),
              0.7 + 5 * s**8, -5 * s**30) for s in TUNED
    ]
    rows += [
        child("low rank", f"{100 * b:.0f} %", 320 * b, 0.1 / b**3, -0.01 / b)
        for b in BUDGETS
    ]
    rows += [
        child("student", f"alpha {a}", 320, student, -0.02) for a in ALPHAS
    ]
    rows += [
        child("fresh student", f"{w} T={t}", 320, fresh)
        for w in ("full", "half", "quarter") for t in (1, 4)
    ]
    rows += [
        child("function matching", k, 320, matching)
        for k in ("equal", "long")
    ]
    rows += [
        child("control", name, 320, ratio, gain)
        for name, ratio, gain in (
            ("2 bit", 2.0, -0.2), ("third", 1.0, 0.0), ("copy", 0.1, 0.0),
            ("no teacher", alone, 0.0), ("permuted", 1.0, 0.0),
            ("full alone", 1.0, 0.0), ("half alone", 1.0, 0.0),
            ("quarter alone", 1.0, 0.0), ("labels", 1.5, 0.0),
        )
    ]
    rows.append(replace(
        child("control", "nothing done", 320, 0.0), gain=np.zeros(N)
    ))
    far = {m: 0.06 * luck for m in METRICS}
    return Frontier(tuple(rows), far, 320.0, np.full(N, 0.95))


def verdict(slug, evidence, seeds=SEEDS):
    return Claim.load(f"A07/{slug}").judge(
        evidence, scale="book", seeds=seeds
    ).verdict


HOME = "prune-and-quantise-stay-home"
KD = "kd-student-is-a-stranger"
TRANSFER = "more-transfer-data-does-not-help"
SHARED = "shared-initialisation-confound"


def test_planted_effects_are_found():
    front = planted(near=0.1, student=1.0, alone=0.3, fresh=1.0, matching=0.9)
    assert verdict(HOME, evidence_home({
        "digits": front, "mnist1d": front})) == "reproduced"
    assert verdict(KD, evidence_published(front)) == "reproduced"
    assert verdict("fresh-" + KD, evidence_fresh(front)) == "reproduced"
    assert verdict(TRANSFER, evidence_transfer(front)) == "reproduced"
    near = replace(front, children=tuple(
        replace(c, distance={
            m: 0.28 * front.far[m] for m in METRICS
        }) if c.name == "student alpha 0.9" else c for c in front.children
    ))
    assert verdict(SHARED, evidence_shared(near)) == "reproduced"


def test_planted_nulls_are_not():
    front = planted(near=0.8, student=0.3)
    assert verdict(HOME, evidence_home({
        "digits": front, "mnist1d": front})) == "not reproduced"
    assert verdict(KD, evidence_published(front)) == "not reproduced"
    assert verdict("fresh-" + KD, evidence_fresh(front)) == "not reproduced"
    assert verdict(TRANSFER, evidence_transfer(front)) == "not reproduced"
    assert verdict(SHARED, evidence_shared(front)) == "not reproduced"


def test_one_bad_technique_on_one_set_is_enough():
    good, bad = planted(0.1, 1.0), planted(0.8, 1.0)
    mixed = evidence_home({"digits": good, "mnist1d": good})
    mixed |= {
        k: v for k, v in evidence_home({"digits": good, "mnist1d": bad})
        .items() if k.startswith("mnist1d_pruned")
    }
    assert verdict(HOME, mixed) == "not reproduced"


def test_a_copy_counted_as_stranger_spoils_the_verdict():
    front = planted(0.1, 1.0)
    found = evidence_published(front)
    found["copy"] = found["third"]
    assert verdict(KD, found) == "invalid"


def test_no_pruned_child_of_that_accuracy_no_verdict():
    front = planted(0.1, 1.0)
    shifted = replace(front, children=tuple(
        replace(c, check=c.check + 0.05)
        if c.technique == "function matching" else c
        for c in front.children
    ))
    found = evidence_transfer(shifted)
    assert found["matched"][0] > 0.5
    assert verdict(TRANSFER, found) == "invalid"


@pytest.mark.parametrize(
    "drop, expected", [(-0.5, "reproduced"), (-0.02, "not reproduced")]
)
def test_collapse_decides_accuracy(drop, expected):
    front = planted(0.1, 1.0)
    rng = np.random.default_rng(1)

    def change(c):
        gain = c.gain
        if c.name == "pruned 90 %":
            gain = drop + rng.normal(0, 0.01, N)
        if c.technique == "student":
            gain = np.full(N, -0.02) + rng.normal(0, 0.002, N)
        return replace(c, gain=gain)

    front = replace(front, children=tuple(map(change, front.children)))
    found = evidence_deviation({
        (d, k): front for d in ("digits", "mnist1d") for k in ("mlp", "cnn")
    })
    slug = "accuracy-deviation-by-technique"
    assert verdict(slug, found) == expected


@pytest.mark.parametrize(
    "student, expected", [(1.0, "reproduced"), (0.4, "not reproduced")]
)
def test_landscape_rule(student, expected):
    rng = np.random.default_rng(2)

    def luck(r):
        return r * np.exp(rng.normal(0, 0.1, 24))

    ratio = {k: luck(1.0) for k in ("stranger", "third")}
    ratio |= {f"alpha {a}": luck(student) for a in ALPHAS}
    ratio |= {"16 bit": luck(0.01), "8 bit": luck(0.02), "copy": luck(0.01)}
    ratio |= {"pruned 10 %": luck(0.1), "pruned 90 %": luck(9.0)}
    kept = {"pruned 10 %": np.ones(24), "pruned 90 %": np.full(24, 0.2)}
    found = evidence_landscape(ratio, kept)
    np.testing.assert_allclose(found["pruned"], 1 - ratio["pruned 10 %"])
    for slug in ("functional-landscape-clusters",
                 "functional-landscape-clusters-in-full-space"):
        assert verdict(slug, found, SEEDS[:24]) == expected


def test_seeds_without_a_map_do_not_count():
    ratio = {
        k: np.array([1.0, np.nan])
        for k in ("stranger", "third", "copy", "16 bit", "8 bit",
                  "pruned 10 %", *(f"alpha {a}" for a in ALPHAS))
    }
    found = evidence_landscape(ratio, {"pruned 10 %": np.ones(2)})
    assert all(v.shape == (1,) for v in found.values())


def test_the_pool_is_blind_only_where_planted():
    front = planted(0.1, 0.5)
    found = evidence_blind(front)
    x, y = found["all_children"]["x"], found["all_children"]["y"]
    everything = pool(front)
    assert len(x) == len(everything["js"])
    assert not {"control", "random"} & set(everything["technique"])
    rho = spearmanr(-everything["gain"], everything["js"]).statistic
    assert spearmanr(x, y).statistic == pytest.approx(rho)
    assert abs(found["permuted"][0]) < 0.02
    r = np.corrcoef(found["eta"]["x"], found["eta"]["y"])[0, 1]
    near = pool(front, 1.0)
    assert r**2 == pytest.approx(
        eta_squared(np.log(near["js"]), near["technique"])
    )


def test_eta_squared_against_anova():
    pd = pytest.importorskip("pandas")
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rng = np.random.default_rng(0)
    g = rng.integers(0, 5, 80).astype(str)
    y = rng.normal(size=80) + (g == "3")
    table = anova_lm(ols("y ~ C(g)", pd.DataFrame({"y": y, "g": g})).fit())
    share = table["sum_sq"].iloc[0] / table["sum_sq"].sum()
    assert eta_squared(y, g) == pytest.approx(share)


@settings(deadline=None, max_examples=60)
@given(st.lists(
    st.tuples(st.floats(0.5, 40.0), st.floats(0.0, 3.0)),
    min_size=1, max_size=6,
))
def test_area_is_the_integral_of_the_staircase(rows):
    one = np.ones(2)
    front = Frontier(
        tuple(
            Child("t", str(i), 100.0 / c, 0 * one, 0 * one,
                  {m: r * one for m in METRICS})
            for i, (c, r) in enumerate(rows)
        ),
        {m: one for m in METRICS}, 100.0, one,
    )
    x = np.linspace(0, np.log2(64), 20_001)
    best = np.full(len(x), np.inf)
    for c, r in rows:
        best = np.where(x <= np.log2(c), np.minimum(best, r), best)
    brute = np.maximum(0, 1 - best).sum() * (x[1] - x[0])
    assert front.area("t") == pytest.approx(brute, abs=0.01)


def test_matched_accuracy_takes_the_smallest_that_passes():
    front = planted(0.1, 1.0)
    best = front.matched_accuracy()
    assert best["pruned"].setting == "50 %"
    assert best["quantised"].setting.startswith("4 bit")
    assert "random" not in best
    assert same_accuracy(front, "function matching long").setting == "50 %"


def test_identity_in_place_of_compression(setup, parents):
    """The mechanism disabled: nothing is compressed, nobody moves."""
    front = frontier(
        parents,
        {"pruned": {"": pruned(0.0)},
         "low rank": {"": low_rank(1.0)},
         "taught": {"": taught(parents)}},
        setup.check, setup.test,
    )
    for name, bound in (("pruned", 0), ("low rank", 1e-4), ("taught", 0)):
        for m in METRICS:
            assert front.point(front[name], m) <= bound


def test_labels_without_meaning_part_strangers_but_not_rounding(setup):
    """With shuffled labels a network and its stranger differ by chance."""
    rng = torch.Generator().manual_seed(0)
    x, y = setup.train
    wild = replace(setup, train=(x, y[torch.randperm(len(y), generator=rng)]))
    nets = published(wild, TINY)
    front = frontier(
        nets["base"], {"quantised": {"8": quantised(8)}},
        wild.check, wild.test, nets["stranger"],
    )
    assert front.accuracy.mean() < 0.3
    assert front.far["disagreement"].mean() > 0.5
    assert front.point(front["quantised 8"]) < 0.2


def test_the_verdict_turns_when_nobody_teaches():
    """The mechanism disabled, with trained networks and the real rule."""
    short = bench("digits", epochs=3)
    nets = published(short, SEEDS, ("stranger", "third"))
    base = nets["base"]
    copy = grow(short, base, away(SEEDS, "student"), teacher=base,
                temperature=3.0)
    own = away([s + 100 for s in SEEDS], "fresh")
    alone = grow(short, own, own)

    def judged(students):
        front = frontier(
            base,
            {"student": {k: taught(v) for k, v in students.items()},
             "control": {"third": taught(nets["third"]),
                         "copy": taught(copy)}},
            short.check, short.test, nets["stranger"],
        )
        return verdict(KD, evidence_published(front))

    names = [f"alpha {a}" for a in ALPHAS]
    assert judged({k: nets[k] for k in names}) == "not reproduced"
    assert judged(dict.fromkeys(names, alone)) == "reproduced"
    # and a parent in its own place is no student at all
    assert judged(dict.fromkeys(names, base)) == "not reproduced"


def test_without_the_factor_a_share_is_a_smaller_share(setup, parents):
    order = away(TINY, "student")
    listening = dict(teacher=parents, temperature=3.0)
    bare = grow(setup, TINY, order, alpha=0.5, kind="cross_entropy",
                **listening)
    scaled = grow(setup, TINY, order, alpha=0.1, **listening)
    other = grow(setup, TINY, order, alpha=0.5, **listening)
    x = setup.test[0]
    same, different = (
        (bare.predict(x) - n.predict(x)).abs().max() for n in (scaled, other)
    )
    assert same < 0.2 * different


def test_an_epoch_moves_by_its_rate():
    found = bench("digits", epochs=3)
    parents = grow(found, TINY, TINY)
    recipes = routes(found, TINY)
    some = {k: recipes["control"][k]
            for k in ("one epoch more", "0 %, slow epoch")}
    front = frontier(parents, {"control": some}, found.check, found.test)
    fast, slow = (front.point(front[f"control {k}"]) for k in some)
    assert 0 < slow < fast


def test_frontier_leaves_parents_and_equals_a_loop(setup, parents):
    before = {k: v.clone() for k, v in parents.params.items()}
    recipes = {"quantised": {"4": quantised(4)}, "pruned": {"": pruned(0.5)}}
    front = frontier(parents, recipes, setup.check, setup.test)
    assert all(torch.equal(before[k], v) for k, v in parents.params.items())
    p = parents.predict(setup.test[0]).softmax(-1)
    child, _ = quantised(4)(parents)
    q = child.predict(setup.test[0]).softmax(-1)
    for i in range(len(TINY)):
        d = (p[i] - q[i]).norm(dim=-1).mean()
        assert front["quantised 4"].distance[METRICS[0]][i] == pytest.approx(
            d.item(), rel=1e-5
        )
    others = [(p[0] - p[j]).norm(dim=-1).mean().item() for j in (1, 2)]
    assert front.far[METRICS[0]][0] == pytest.approx(
        np.mean(others), rel=1e-5
    )
    table = front.to_frame()
    assert len(table) == 2 * len(TINY)
    assert "quantised" in repr(front) or "pruned" in repr(front)


def test_same_seed_same_bits(setup):
    a = published(setup, TINY[:2])
    b = published(setup, TINY[:2])
    for name in a:
        for k, v in a[name].params.items():
            assert torch.equal(v, b[name].params[k])


def test_first_weights_are_shared_and_order_is_not(setup, parents):
    start = untrained(setup.net, TINY)
    again = grow(setup, start, TINY)
    other = grow(setup, start, away(TINY, "student"))
    x = setup.test[0]
    torch.testing.assert_close(
        again.predict(x), parents.predict(x), atol=1e-5, rtol=0
    )
    assert (other.predict(x) - parents.predict(x)).abs().max() > 0.05


def test_permuting_is_a_permutation(setup):
    start = untrained(setup.net, TINY)
    torn = permute_first(start, 7)
    names = list(start.params)
    assert not torch.equal(torn.params[names[0]], start.params[names[0]])
    for k in names[:2]:
        a, b = (p.params[k].flatten(2) if k == names[0] else
                p.params[k][..., None] for p in (start, torn))
        assert torch.equal(a.sum((1, 2)).sort().values.round(decimals=4),
                           b.sum((1, 2)).sort().values.round(decimals=4))
    for k in names[2:]:
        assert torch.equal(start.params[k], torn.params[k])


def test_mixup_stays_between(setup):
    x, y = setup.train
    mixed, soft = mixup(x, y, 50, seed=3)
    assert mixed.min() >= x.min() and mixed.max() <= x.max()
    torch.testing.assert_close(soft.sum(1), torch.ones(50))
    assert ((soft > 0).sum(1) <= 2).all()
    again, _ = mixup(x, y, 50, seed=3)
    assert torch.equal(mixed, again)


def test_maps_are_deterministic_and_median_is_taken():
    rng = np.random.default_rng(0)
    runs = {k: np.cumsum(rng.normal(size=(1, 8, 20)), 1)
            for k in ("base", "stranger", "second")}
    ends = {"near": runs["base"][:, -1] + 0.01, "far": np.full((1, 20), 9.0)}
    found = maps(runs, ends, perplexities=(5,), starts=2, least=0.0)
    same = maps(runs, ends, perplexities=(5,), starts=2, least=0.0)
    for k, v in found.ratio.items():
        assert np.array_equal(v, same.ratio[k])
    assert found.full["near"][0] < 0.1 < 1 < found.full["far"][0]
    both = [
        end_ratios(landscape(np.concatenate(
            [r[0] for r in runs.values()] + list(ends.values())
        ), 5, s)[0][[7, 15, 23, 24, 25]], 0, [1, 2])
        for s in (0, 1)
    ]
    np.testing.assert_allclose(found.ratio["near"], np.mean(both, 0)[3],
                               rtol=1e-6)
    none = maps(runs, ends, perplexities=(5,), starts=1, least=1.0)
    assert np.isnan(none.ratio["near"]).all() and none.left_out == 1


def test_a_whole_lineage_names_what_the_rules_ask_for():
    tiny = bench("mnist1d", "cnn", rows=200, epochs=1)
    front = lineage(tiny, TINY, "accuracy")
    assert {"quantised 8 bit, tensor", "pruned 90 %", "random 90 %",
            "control nothing done", "student alpha 0.9"} <= {
        c.name for c in front.children}
    assert front["control nothing done"].distance[METRICS[0]].max() == 0
    assert front["quantised 16 bit, tensor"].bits < front.bits


def alike(a, b):
    for k, v in a.params.items():
        torch.testing.assert_close(v, b.params[k], rtol=1e-3, atol=1e-4)


def test_what_is_trained_together_is_what_would_be_trained_alone(
    setup, parents
):
    order = away(TINY, "student")
    nets = published(setup, TINY, ("second",))
    alike(nets["base"], parents)
    alike(nets["second"], grow(setup, away(TINY, "second"),
                               away(TINY, "second")))
    alike(nets["alpha 0.5"], grow(setup, TINY, order, teacher=parents,
                                  alpha=0.5, temperature=3.0))
    more = attacks(setup, TINY, parents)
    alike(more["no teacher"], grow(setup, TINY, order))
    alike(more["alpha 0.9, T=4"], grow(setup, TINY, order, teacher=parents,
                                       temperature=4.0))
    alike(more["copy"], grow(setup, parents, order, teacher=parents,
                             temperature=3.0))
    pairs = matched_function(setup, TINY, parents, 100)
    fresh = away(TINY, "fresh")
    x, _ = mixup(*setup.train, 100, seed=1000)
    alike(pairs["equal"], grow(setup, fresh, fresh, data=(x,), alpha=1.0,
                               teacher=parents, temperature=4.0))
    gap = pairs["long"].predict(x) - pairs["equal"].predict(x)
    assert gap.abs().max() > 0.05


def test_maps_and_frontier_show_the_same_networks():
    short = bench("digits", epochs=2)
    kin = family(short, TINY, mixed=100)
    runs, ends, kept = views(short, kin, 2)
    assert {v.shape[:2] for v in runs.values()} == {(2, 2)}
    front = lineage(short, TINY, "all", kin)
    for view, name in (("third", "control third"),
                       ("alpha 0.9", "student alpha 0.9")):
        p, q = (runs[k][:, -1].reshape(2, -1, 10) for k in ("base", view))
        far = np.linalg.norm(p - q, axis=-1).mean(-1)
        np.testing.assert_allclose(
            far, front[name].distance[METRICS[0]][:2], rtol=1e-4
        )
    assert kept["pruned 10 %"].min() > kept["pruned 90 %"].max()
    assert np.abs(ends["copy"] - runs["base"][:, -1]).max() < 1e-2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bench("cifar"), "data, kind"),
        (lambda: bench("digits", "vit"), "data, kind"),
        (lambda: away(TINY, "uncle"), "role.*'uncle'.*'stranger'"),
        (lambda: family(bench("digits"), TINY, "deep"), "depth.*'deep'"),
        (lambda: planted(0.1, 1.0)["pruned 99 %"], "name"),
        (lambda: planted(0.1, 1.0).area("folded"), "technique.*'folded'"),
        (lambda: deviation(0.5, 0.0), "base"),
        (lambda: eta_squared([1.0, 1.0], ["a", "b"]), "values, groups"),
        (lambda: eta_squared([1.0, 2.0], ["a"]), "values, groups"),
        (lambda: maps({"base": np.zeros((1, 2, 3))}, {}), "missing"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_as_many_strangers_as_parents(setup, parents):
    two = grow(setup, TINY[:2], TINY[:2])
    with pytest.raises(ValueError, match="strangers"):
        frontier(parents, {}, setup.check, setup.test, two)
    modules = [parents.member(i) for i in range(3)]
    with pytest.raises(ValueError, match="strangers: 1 for 3"):
        frontier(Ensemble.of(modules), {}, setup.check, setup.test,
                 Ensemble.of(modules[:1]))


def test_one_parent_needs_a_stranger(setup, parents):
    with pytest.raises(ValueError, match="strangers: none for one parent"):
        frontier(parents[:1], {}, setup.check, setup.test)


@pytest.mark.parametrize(
    "recipe",
    [lambda p: p, lambda p: (p, 0.0), lambda p: (p[:2], 1.0),
     lambda p: (p.member(0), 1.0)],
    ids=["no bits", "zero bits", "fewer children", "a module"],
)
def test_a_recipe_that_gives_something_else_is_named(setup, parents, recipe):
    with pytest.raises(ValueError, match="'mine'.* 3 children"):
        frontier(parents, {"mine": {"": recipe}}, setup.check, setup.test)


def test_chance_gives_the_published_collapse():
    assert deviation(0.01, 0.37) == pytest.approx(-97.3, abs=0.05)
    assert deviation(0.01, 0.2912) == pytest.approx(-96.57, abs=0.05)
