"""Stress: numbers of seeds that statsmodels and brute force agree with."""

import json
import math

import numpy as np
import pytest
from statsmodels.stats.power import TTestIndPower, TTestPower

import reappraisal
from reappraisal.practice.stress import pilot_runs, stress
from reappraisal.protocol.power import exaggeration, seeds_for

BASE = np.array([90.0, 91.2, 89.5, 90.7, 90.1])
GAP = np.array([0.4, 1.1, 0.6, 0.2, 0.9])
RUNS = {"old": BASE, "new": BASE + GAP}


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.9])
def test_against_statsmodels(paired, power):
    d = stress(RUNS, sesoi=0.5, power=power, have=7)["new", paired]
    law = TTestPower() if paired else TTestIndPower()
    for sd, n in ((d.sd, d.n), (d.sd_lo, d.n_lo), (d.sd_hi, d.n_hi)):
        assert n == max(2, math.ceil(law.solve_power(0.5 / sd, None, 0.05,
                                                     power)))
    assert math.isclose(law.power(0.5 / d.sd, 7, 0.05), d.power, rel_tol=1e-4)
    assert math.isclose(law.power(d.detectable / d.sd, 7, 0.05), power,
                        rel_tol=1e-4)
    sd = GAP.std(ddof=1) if paired else math.sqrt(
        (BASE.var(ddof=1) + (BASE + GAP).var(ddof=1)) / 2)
    assert math.isclose(d.sd, sd)
    now = exaggeration(0.5 / sd, 7, paired=paired)
    assert math.isclose(d.type_m, now.type_m)
    assert math.isclose(d.type_s, now.type_s)
    assert d.n_lo <= d.n <= d.cautious <= d.n_hi


def test_limits_hold_over_many_pilots():
    rng = np.random.default_rng(4)
    right, times = int(seeds_for(0.8, paired=True)), 100
    inside = enough = 0
    for _ in range(times):
        base, gap = rng.normal(0, 3, 4), rng.normal(0.3, 1, 4)
        d = stress({"a": base, "b": base + gap}, sesoi=0.8)["b", True]
        inside += d.n_lo <= right <= d.n_hi
        enough += d.cautious >= right
    for held, level in ((inside, 0.9), (enough, 0.8)):
        slack = 4 * math.sqrt(level * (1 - level) / times)
        assert abs(held / times - level) < slack


def test_the_difference_of_the_pilots_is_no_input():
    near, far = (
        stress({"old": BASE, "new": BASE + GAP + x}, sesoi=0.5).designs
        for x in (0, 50)
    )
    assert [d.n for d in near] == [d.n for d in far]


def test_a_function_is_called_once_a_seed():
    seen = []

    def run(s):
        seen.append(s)
        return {"old": BASE[s], "new": BASE[s] + GAP[s]}

    found = stress(run, 5, sesoi=0.5)
    assert seen == [0, 1, 2, 3, 4] and found.seconds >= 0
    same = stress(RUNS, sesoi=0.5)
    assert found.designs == same.designs and same.seconds is None
    other = stress(run, [4, 2, 0], sesoi=0.5)
    assert other.scores["old"].tolist() == BASE[[4, 2, 0]].tolist()


def test_one_arm():
    found = stress(lambda s: BASE[s], 5, sesoi=0.5)
    (d,) = found.designs
    assert not d.paired and math.isclose(d.sd, BASE.std(ddof=1))
    assert "another arm" in repr(found)


def test_several_arms_share_alpha():
    runs = RUNS | {"third": BASE[::-1]}
    found = stress(runs, sesoi=0.5)
    assert [(d.arm, d.paired) for d in found.designs] == [
        ("new", True), ("new", False), ("third", True), ("third", False)]
    alone = stress(RUNS, sesoi=0.5, alpha=0.025)
    assert found["new", True] == alone["new", True]
    assert "2 comparisons" in repr(found)
    with pytest.raises(KeyError, match="new"):
        found["old", True]


def test_it_shows_itself():
    found = stress(RUNS, sesoi=0.5)
    d = found["new", True]
    for text in (repr(found), found._repr_html_()):
        assert str(d.n) in text and str(d.cautious) in text
    frame = found.to_frame()
    assert frame.n.tolist() == [x.n for x in found.designs]
    data = json.loads(found.to_json())
    assert data["designs"][0]["n"] == d.n and data["scores"]["old"]
    figure = found.plot()
    assert str(d.cautious) in figure.caption and str(d.n) in figure.alt
    assert figure.png[:4] == b"\x89PNG"
    one = stress({"a": BASE}, sesoi=2.0)
    assert one.plot().png
    assert "<script" not in stress(
        {"<script>": BASE, "b": BASE[::-1]}, sesoi=1)._repr_html_()


def test_from_the_top():
    assert reappraisal.stress is stress


@pytest.mark.parametrize(("call", "message"), [
    (lambda: stress(lambda s: math.nan, sesoi=1), "nan.*seed 0"),
    (lambda: stress(lambda s: "good", sesoi=1), "'good'"),
    (lambda: stress(lambda s: {}, sesoi=1), "arms"),
    (lambda: stress(lambda s: {"ab"[s % 2]: 1.0}, sesoi=1), "seed 1"),
    (lambda: stress(lambda s: 1.0, sesoi=1), "at every seed"),
    (lambda: stress({"a": BASE, "b": BASE + 1}, sesoi=1), "'b' less 'a'"),
    (lambda: stress(lambda s: 1.0, 2, sesoi=1), "n_seeds"),
    (lambda: stress(lambda s: 1.0, [1, 1, 2], sesoi=1), "different seeds"),
    (lambda: stress({"a": [1, 2]}, sesoi=1), "3 or more"),
    (lambda: stress({"a": [1, 2, math.inf]}, sesoi=1), "finite"),
    (lambda: stress({}, sesoi=1), "train_fn"),
    (lambda: stress(3, sesoi=1), "got int"),
    (lambda: stress(RUNS, sesoi=-1), "sesoi"),
    (lambda: stress(RUNS, sesoi="small"), "sesoi"),
    (lambda: stress(RUNS, sesoi=1, have=1), "have"),
    (lambda: stress(RUNS, sesoi=1, power=80), "power"),
    (lambda: stress(RUNS, sesoi=1, alpha=0), "alpha"),
    (lambda: pilot_runs(lambda s: 1.0, []), "no seeds"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
