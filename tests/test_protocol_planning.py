"""The queue against what is known of it; the fit against planted truth."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_book import TinyBook

from reappraisal.protocol import planning as p
from reappraisal.protocol.book import UnknownName, select
from reappraisal.protocol.provenance import digest
from reappraisal.protocol.records import (
    expected_seconds,
    hardware,
    records,
    without_times,
)
from reappraisal.protocol.runner import Run

times = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def best(seconds, machines):
    return min(
        max(sum(s for s, m in zip(seconds, where, strict=True) if m == k)
            for k in range(machines))
        for where in product(range(machines), repeat=len(seconds)))


@settings(max_examples=80, deadline=None)
@given(times, st.integers(1, 3))
def test_orders_keep_their_bounds(seconds, machines):
    optimum = best(seconds, machines)
    any_order = p.schedule(seconds, machines).makespan
    longest = p.schedule(seconds, machines, seconds).makespan
    assert p.least(seconds, machines) <= optimum + 1e-9
    assert optimum <= any_order <= (2 - 1 / machines) * optimum + 1e-9
    bound = (4 / 3 - 1 / (3 * machines)) * optimum
    assert optimum <= longest <= bound + 1e-9


@given(times, st.integers(1, 5))
def test_a_schedule_is_one(seconds, machines):
    plan = p.schedule(seconds, machines, seconds)
    assert plan.busy <= 1 + 1e-12 and max(plan.machine) < machines
    for m in range(machines):
        mine = sorted((b, e) for b, e, at in zip(
            plan.begin, plan.end, plan.machine, strict=True) if at == m)
        for (_, end), (begin, _) in zip(mine, mine[1:], strict=False):
            assert end <= begin
    lengths = [e - b for b, e in zip(plan.begin, plan.end, strict=True)]
    assert lengths == seconds


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_worst_cases_are_as_bad_as_proved(m):
    jobs = [s for s in range(2 * m - 1, m, -1) for _ in range(2)] + [m] * 3
    assert p.schedule(jobs, m, jobs).makespan == 4 * m - 1
    assert math.isclose((4 / 3 - 1 / (3 * m)) * 3 * m, 4 * m - 1)
    assert p.schedule([2.0] * 11, m).makespan == 2 * math.ceil(11 / m)


def test_pieces_and_mistakes():
    pieces = p.split([7.0, 1.0], 2.0)
    assert max(pieces) <= 2 and math.isclose(sum(pieces), 8)
    assert p.schedule([], 3).makespan == 0
    for bad in ({"machines": 0}, {"priority": [1.0]},
                {"seconds": [math.inf, 1.0]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            p.schedule(**({"seconds": [1.0, 2.0], "machines": 1} | bad))
    with pytest.raises(ValueError, match="limit is 0"):
        p.split([1.0], 0)


def test_planted_spreads_are_found_and_intervals_hold():
    rng = np.random.default_rng(7)
    within, hits = [], []
    for _ in range(200):
        level = 5 + 0.9 * rng.standard_normal(9)
        rows = [{"chapter": f"c{c}", "scale": "book",
                 "seconds": np.exp(level[c] + 0.3 * rng.standard_normal())}
                for c in range(8) for _ in range(3)]
        model = p.CostModel.fit(rows, "book")
        within.append(model.within**2)
        took = np.exp(level + 0.3 * rng.standard_normal(9))
        for name, value in (("c0", took[0]), (None, took[8])):
            _, lo, hi = model.interval(name)
            hits.append(lo <= value <= hi)
    assert abs(np.sqrt(np.mean(within)) - 0.3) < 0.02
    assert np.all(np.abs(np.reshape(hits, (-1, 2)).mean(0) - 0.95) < 0.05)


def test_one_run_each_says_nothing_about_the_next():
    rows = [{"chapter": c, "scale": "book", "seconds": s}
            for c, s in (("a", 10.0), ("b", 20.0))]
    model = p.CostModel.fit(rows, "book")
    assert model.within is None and math.isnan(model.interval("a")[1])
    with pytest.raises(ValueError, match="0 chapters .* smoke"):
        p.CostModel.fit(rows, "smoke")


def test_records_of_this_book(root):
    rows = p.timings(root)
    assert {r["scale"] for r in rows} == {"book"}
    assert all(r["seconds"] > 0 for r in rows)
    assert not any(r["chapter"].startswith("protocol/") for r in rows)
    written = {r["chapter"] for r in rows}
    assert written <= set(p.replicate_ratios(root))


# What a result remembers


def test_a_record_says_how_it_came_about_and_the_key_does_not(tmp_path):
    book = TinyBook(tmp_path)
    book.add("a/b", "width")
    (outcome,) = Run(book.store, write=True, threads=1)([book.chapter("a/b")])
    record = book.store.get(outcome.key).record
    assert record["started"] <= record["finished"]
    assert record["started"].endswith("Z") and record["threads"] == 1
    assert record["values"] == {"scale": "book", "width": 3}
    assert set(hardware()) <= set(record["machine"])
    assert record["wall"] >= record["seconds"] > 0 and record["cpu"] > 0
    assert record["claims"] == {} and outcome.cpu == record["cpu"]
    parts = {k: record[k] for k in (
        "chapter code modules registrations inputs versions parameters"
    ).split()}
    assert digest(parts) == outcome.key
    kept = p.stored(p.read_notebook(book.path("a/b")))
    for name in ("values", "started", "machine", "key", "code"):
        assert kept[name] == record[name]


def test_old_records_are_read_and_what_is_no_record_is_passed_over(tmp_path):
    book = TinyBook(tmp_path)
    for i, record in enumerate([
        {"chapter": "a/b", "scale": "smoke", "seconds": 3.0},
        {"chapter": "a/b", "scale": "smoke", "seconds": 5.0},
        {"chapter": "a/b", "scale": "book", "seconds": 50.0}, {"other": 1},
    ]):
        book.store.put(digest(i), record, b"{}")
    path = book.store.path(digest(9))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cut\nsh")
    found = list(records(book.store))
    assert len(found) == 3 and all(r["started"] is None for r in found)
    assert expected_seconds(found, "smoke") == {"a/b": 4.0}


def test_the_longest_goes_first_at_the_scale_that_runs(tmp_path):
    book = TinyBook(tmp_path)
    for name in "abcd":
        book.add(f"a/{name}", f"'{name}'")
    seconds = {"a/a": 1.0, "a/b": 9.0, "a/c": 3.0}
    for i, (name, took) in enumerate(seconds.items()):
        for scale, factor in (("smoke", 1), ("book", -1)):
            book.store.put(digest([i, scale]), {
                "chapter": name, "scale": scale,
                "seconds": 50 + factor * took}, b"{}")

    def order(**options):
        events = []
        Run(book.store, tell=events.append, **options)(select(book.root))
        return [e["chapter"][-1] for e in events if e["event"] == "start"]

    assert order(given={"scale": "smoke"}) == ["d", "b", "c", "a"]
    assert order() == ["d", "a", "c", "b"]
    with pytest.raises(UnknownName):
        order(given={"scale": "tiny"})


def test_times_in_a_text():
    assert without_times("in 3 s, 4.5 min of 7 seeds") == (
        "in # s, # min of 7 seeds")
