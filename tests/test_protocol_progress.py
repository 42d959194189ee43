"""Time left, events, and the report: against schedules worked by hand."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_book import TinyBook

from reappraisal.protocol import progress as p
from reappraisal.protocol.book import select
from reappraisal.protocol.provenance import digest
from reappraisal.protocol.runner import Run


def test_time_left_by_hand():
    run = p.Forecast({"a": 10.0, "b": 6.0, "c": 5.0}, "abcd", 2)
    assert run.left(0) == 15
    run.start("a", 0)
    run.start("b", 0)
    assert run.left(4) == 11
    run.end("b", 12)
    assert run.pace == 2 and run.left(12) == 18
    run.end("a", 20)
    run.start("c", 20)
    assert run.left(1000) == 12  # c is late: only d is left, alone
    run.end("c", 1000)
    run.end("d", 1000)
    assert run.left(1000) == 0


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=8),
       st.integers(1, 4))
def test_a_run_as_expected_is_foretold(seconds, workers):
    """Walk through the schedule itself: the end does not move."""
    from reappraisal.protocol.planning import schedule

    names = [f"c{i}" for i in range(len(seconds))]
    plan = schedule(seconds, workers, seconds)
    run = p.Forecast(dict(zip(names, seconds, strict=True)), names, workers)
    events = [(t, 1, n) for n, t in zip(names, plan.begin, strict=True)]
    events += [(t, 0, n) for n, t in zip(names, plan.end, strict=True)]
    for now, begins, name in sorted(events):
        (run.start if begins else run.end)(name, now)
        assert run.pace == pytest.approx(1)
    assert run.left(plan.makespan) == 0
    fresh = p.Forecast(dict(zip(names, seconds, strict=True)), names, workers)
    assert fresh.left(0) == pytest.approx(plan.makespan)


def test_nothing_known_is_said_so_until_something_ends():
    run = p.Forecast({}, "ab", 1)
    run.start("a", 0)
    assert run.left(3) is None
    run.end("a", 4)
    assert run.left(4) == 4


def outcome(chapter, state, wall=None, cpu=None, attempts=0):
    return SimpleNamespace(chapter=chapter, state=state, wall=wall, cpu=cpu,
                           attempts=attempts)


def test_a_report_adds_up():
    found = p.report([
        outcome("a", "ran", 40.0, 36.0, 1), outcome("b", "ran", 90.0, 81.0, 3),
        outcome("c", "cached"), outcome("d", "failed", attempts=2)], 65)
    assert found == {
        "slowest": [["b", 90.0], ["a", 40.0]], "cached": 1, "retries": 3,
        "wall": 130.0, "cpu": 117.0, "speedup": 2.0}
    text = "\n".join(p.report_lines(found))
    assert "b 90 s" in text and "(90%), 2.0 at a time" in text
    nothing = p.report([outcome("c", "cached")], 1)
    assert p.report_lines(nothing) == [] and nothing["speedup"] is None
    unknown = p.report([outcome("a", "ran", 4.0, None, 1)], 4)
    assert unknown["cpu"] is None
    assert "processor" not in p.report_lines(unknown)[1]


def test_the_stream_of_a_run_on_two_workers(tmp_path):
    book = TinyBook(tmp_path)
    for name in "abc":
        book.add(f"a/{name}", f"'{name}'")
    book.add("a/bad", "1 / 0")
    book.store.put(digest(0), {"chapter": "a/a", "scale": "book",
                               "seconds": 2.0}, b"{}")
    process = book.start("run", "--workers", 2, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Exception ignored" not in err
    events = [json.loads(line) for line in out.splitlines()]
    for e in events:
        assert set(e) == {"event", "elapsed", "left", *p.EVENTS[e["event"]]}
    assert [e["elapsed"] for e in events] == sorted(
        e["elapsed"] for e in events)
    pool = events[1]
    assert pool["event"] == "pool" and pool["workers"] == 2
    assert pool["expected"] == {"a/a": 2.0} and len(pool["missing"]) == 4
    assert pool["dashboard"] is None or pool["dashboard"].startswith("http")
    assert pool["left"] > 0 and events[-1]["left"] == 0
    last = events[-1]
    assert last["states"] == {"failed": 1, "ran": 3} and last["exit"] == 1
    assert len(last["report"]["slowest"]) == 3
    assert last["report"]["speedup"] > 0


def test_no_event_loop_is_left_to_the_garbage_collector(
    tmp_path, monkeypatch
):
    """One that is complains on standard error, now and then."""
    loops, honest = [], asyncio.new_event_loop

    def kept():
        loops.append(honest())
        return loops[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", kept)
    book = TinyBook(tmp_path)
    book.add("a/b", "1 + 1")
    book.add("a/bad", "1 / 0")
    outcomes = Run(book.store, threads=1)(select(book.root))
    assert [o.state for o in outcomes] == ["ran", "failed"]
    assert loops and all(loop.is_closed() for loop in loops)
