"""Many chapters: none twice, none lost, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_book import CHECKOUT, TinyBook, alive, notebook

from reappraisal.protocol import runner as r
from reappraisal.protocol.book import UnknownName, select
from reappraisal.protocol.cache import StorageFull, Store
from reappraisal.protocol.execute import notebook_bytes

DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def book(tmp_path):
    return TinyBook(tmp_path)


def run(book, *names, **options):
    """Outcomes by chapter, and the events on the way."""
    events = []
    outcomes = r.Run(book.store, tell=events.append, **options)(
        select(book.root, names))
    return {o.chapter: o for o in outcomes}, events


def once(mark, deed):
    """Code that does something the first time only."""
    return (f"from pathlib import Path\nmark = Path({str(mark)!r})\n"
            f"if not mark.exists():\n    mark.touch()\n    {deed}\n")


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_an_unchanged_chapter_is_never_run_twice(book):
    log = book.root / "log"
    book.add("a/b", f"open({str(log)!r}, 'a').write('x')")
    assert run(book)[0]["a/b"].state == "ran"
    book.add("a/b", f"open({str(log)!r}, 'a').write('x')  # again",
             prose="Other words.")
    assert run(book)[0]["a/b"].state == "cached"
    assert run(book, given={"width": 3})[0]["a/b"].state == "cached"
    assert log.read_text() == "x"
    assert run(book, given={"width": 4})[0]["a/b"].state == "ran"
    assert run(book, force=True)[0]["a/b"].state == "ran"
    assert log.read_text() == "xxx"


def test_each_kind_of_failure_is_told_and_the_others_go_on(book):
    book.add("a/good", "1 + 1")
    book.add("a/raises", "print('so far')", "raise ValueError('width is 0')")
    book.add("a/endless", "while True: pass")
    book.add("a/dies", DIES)
    book.add("a/bare", "1", parameters=None)
    book.path("a/cut").write_bytes(book.path("a/good").read_bytes()[:200])
    found, events = run(book, timeout=1.5)
    assert {n: o.state for n, o in found.items()} == {
        "a/good": "ran", "a/raises": "failed", "a/endless": "failed",
        "a/dies": "failed", "a/bare": "failed", "a/cut": "failed"}
    assert found["a/raises"].why == "cell 4: ValueError: width is 0"
    assert "cell 3: Timeout: no end after 1.5 s" in found["a/endless"].why
    assert "killed by signal 9" in found["a/dies"].why
    assert found["a/dies"].attempts == 2 and len(found["a/dies"].notes) == 1
    assert "nbs/a/bare.ipynb" in found["a/bare"].why
    assert "'parameters'" in found["a/bare"].why
    assert "nbs/a/cut.ipynb is not JSON" in found["a/cut"].why
    kept = json.loads(open(found["a/raises"].kept, "rb").read())
    texts = json.dumps([c.get("outputs") for c in kept["cells"]])
    assert "so far" in texts and "width is 0" in texts
    states = {c.slug: r.status(c, book.store).state
              for c in select(book.root)}
    assert states == {"good": "never", "raises": "failed", "cut": "broken",
                      "endless": "failed", "dies": "failed", "bare": "broken"}
    assert len(book.results()) == 1
    assert sum(e["event"] == "end" for e in events) == 6
    book.add("a/raises", "print('mended')")
    run(book, "a/raises")
    assert r.status(book.chapter("a/raises"), book.store).state == "never"
    assert not book.store.failure_path("a/raises").exists()


def test_a_kernel_that_dies_once_costs_one_retry(book, tmp_path):
    book.add("a/b", once(tmp_path / "mark", DIES.replace("\n", "; ")))
    found, events = run(book)
    assert found["a/b"].ok and found["a/b"].attempts == 2
    assert "killed by signal 9; tried once more" in found["a/b"].notes[0]
    record = book.store.get(found["a/b"].key).record
    assert record["attempts"] == 2 and record["notes"]
    assert any(e["event"] == "note" for e in events)


def test_an_error_in_a_cell_is_not_tried_again(book, tmp_path):
    book.add("a/b", f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n1/0")
    assert run(book)[0]["a/b"].attempts == 1
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize("harm", [
    lambda data: data[:-20], lambda data: b"", lambda data: b"\0" * 500,
    lambda data: data.replace(b'"2"', b'"3"'),
], ids=["cut", "empty", "zeros", "altered"])
def test_a_damaged_result_is_told_and_computed_again(book, harm):
    book.add("a/b", "1 + 1")
    run(book)
    (path,) = book.results()
    whole = path.read_bytes()
    assert harm(whole) != whole
    path.write_bytes(harm(whole))
    found, _ = run(book)
    assert found["a/b"].state == "ran"
    assert "damaged" in found["a/b"].notes[0]
    assert run(book)[0]["a/b"].state == "cached"
    assert len(list((book.store.folder / "damaged").iterdir())) == 1


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(
    book, monkeypatch
):
    for name in "abc":
        book.add(f"a/{name}", f"'{name}'")
    honest = book.store.put

    def put(key, record, data):
        if record["chapter"] == "a/b":
            raise StorageFull(28, "no room left on the disk for it")
        honest(key, record, data)

    monkeypatch.setattr(book.store, "put", put)
    found, _ = run(book)
    assert [found[f"a/{n}"].state for n in "abc"] == [
        "ran", "failed", "skipped"]
    assert "no room left" in found["a/b"].why
    monkeypatch.undo()
    found, _ = run(book)
    assert [found[f"a/{n}"].state for n in "abc"] == ["cached", "ran", "ran"]


def test_unknown_parameters_stop_everything_before_it_starts(book):
    book.add("a/b", "1")
    book.add("a/c", "1", parameters='scale = "book"')
    with pytest.raises(UnknownName, match="parameter of nbs/a/c.ipynb 'width'"):
        run(book, given={"width": 5})
    assert not book.results()


# Back into the notebook


def test_only_outputs_and_one_entry_of_the_metadata_are_written(book):
    book.add("a/b", "# a remark", "print('x' * width)", "import os")
    before = json.loads(book.path("a/b").read_bytes())
    found, _ = run(book, write=True)
    assert found["a/b"].written
    after = json.loads(book.path("a/b").read_bytes())
    assert after["cells"][3]["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["xxx\n"]}]
    record = after["metadata"].pop("reappraisal")
    assert record["key"] == found["a/b"].key and record["scale"] == "book"
    assert record["seconds"] >= 0 and record["threads"] >= 1
    for cell in after["cells"]:
        if "outputs" in cell:
            cell["outputs"] = []
    assert after == before
    assert r.status(book.chapter("a/b"), book.store).state == "fresh"


def test_nbdev_clean_finds_nothing_to_clean(book):
    pytest.importorskip("nbdev")
    book.add("a/b", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
             "import numpy\nnumpy.eye(2)", "print('é')")
    run(book, write=True)
    before = book.path("a/b").read_bytes()
    assert b"image/png" in before
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean;"
         f"nbdev_clean(fname={str(book.path('a/b'))!r})"],
        cwd=book.root, check=True, capture_output=True)
    assert book.path("a/b").read_bytes() == before


def test_prose_may_change_during_a_run_and_code_may_not(book):
    for name, prose, code in (("prose", "New words.", "2 + 2"),
                              ("code", "Words.", "2 + 3")):
        changed = notebook(
            f"open({str(book.path('a/' + name))!r}, 'w').write(text)", code,
            prose=prose)
        changed["cells"][2]["source"] = ["'placeholder'"]
        text = json.dumps(changed)
        book.add(f"a/{name}", f"text = {text!r}\n"
                 f"open({str(book.path('a/' + name))!r}, 'w').write(text)",
                 "2 + 2")
    found, _ = run(book, write=True)
    for outcome in found.values():
        assert outcome.state == "failed"
        assert "edited while it ran" in outcome.why
    chapter = book.add("a/words", "2 + 2")
    entry = book.store.get(run(book, "a/words")[0]["a/words"].key)
    book.add("a/words", "# a remark", "2 + 2", prose="New words.")
    assert r.write_back(chapter, entry)
    assert "New words." in chapter.path.read_text()
    assert [len(o) for o in book.outputs("a/words")] == [0, 0, 1]
    book.add("a/words", "2 + 3")
    data = chapter.path.read_bytes()
    with pytest.raises(r.Changed):
        r.write_back(chapter, entry)
    assert chapter.path.read_bytes() == data


def test_a_full_disk_leaves_the_notebook_as_it_was(book, monkeypatch):
    book.add("a/b", "1 + 1")
    run(book)
    before = book.path("a/b").read_bytes()

    def full(path, data):
        raise StorageFull(28, f"no room left on the disk for {path}")

    monkeypatch.setattr(r, "write_whole", full)
    found, _ = run(book, write=True)
    assert "no room left" in found["a/b"].why and not found["a/b"].ok
    assert book.path("a/b").read_bytes() == before


def test_other_parameters_are_not_written(book):
    book.add("a/b", "width")
    before = book.path("a/b").read_bytes()
    found, _ = run(book, write=True, given={"width": 9})
    assert not found["a/b"].written and "not written" in found["a/b"].notes[0]
    assert book.path("a/b").read_bytes() == before


def test_a_chapter_that_reads_others_comes_after_them(book):
    book.add("a/reader", "#| inputs: nbs/b/*.ipynb\nfrom pathlib import Path\n"
             "print('x = 5' in Path('../b/read.ipynb').read_text(),"
             "'\"5\"' in Path('../b/read.ipynb').read_text())")
    book.add("b/read", "x = 5\nx")
    found, events = run(book, write=True)
    order = [e["chapter"] for e in events if e["event"] == "end"]
    assert order == ["b/read", "a/reader"]
    assert "True True" in json.dumps(book.outputs("a/reader"))
    assert all(r.status(c, book.store).state == "fresh"
               for c in select(book.root))


def test_a_chapter_edited_before_its_turn_is_run_as_it_is_then(book):
    edited = notebook_bytes(notebook("'new'"))
    book.add("a/first", f"open({str(book.path('a/second'))!r}, 'wb')"
             f".write({edited!r})")
    book.add("a/second", "'old'")
    found, _ = run(book)
    assert "changed since the run began" in found["a/second"].notes[0]
    entry = book.store.get(found["a/second"].key)
    assert b"'new'" in entry.notebook and b"'old'" not in entry.notebook


# Dask


def test_workers_give_what_one_process_gives(book, tmp_path):
    for name in "abc":
        book.add(f"a/{name}", f"print('{name}' * 3)",
                 "import os\nprint(os.environ['OMP_NUM_THREADS'])")
    found, events = run(book, workers=2, threads=1)
    assert all(o.state == "ran" for o in found.values())
    assert any(e["event"] == "cell" for e in events)
    alone = Store(tmp_path / "other")
    for o in r.Run(alone, threads=1)(select(book.root)):
        mine = book.store.get(o.key)
        assert alone.get(o.key).notebook == mine.notebook
        assert mine.record["threads"] == 1


def test_a_worker_that_dies_costs_one_retry(book, tmp_path):
    pytest.importorskip("psutil")
    deed = ("import os, psutil, time; "
            "runner = psutil.Process(os.getppid()).parent(); "
            "[p.kill() for p in runner.children(recursive=True)"
            " if 'spawn_main' in str(p.cmdline())]; time.sleep(60)")
    book.add("a/kills", once(tmp_path / "mark", deed), "'survived'")
    for name in "bc":
        book.add(f"a/{name}", f"'{name}'")
    found, _ = run(book, workers=2)
    assert all(o.ok for o in found.values())
    assert found["a/kills"].attempts == 2
    assert "worker was lost" in found["a/kills"].notes[0]
    assert len(book.results()) == 3


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, each a process of its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    address = folder / "scheduler.json"
    options = {"cwd": folder, "stdout": subprocess.DEVNULL,
               "stderr": subprocess.DEVNULL,
               "env": os.environ | {"PYTHONPATH": str(CHECKOUT)}}
    python = [sys.executable, "-m"]
    processes = [subprocess.Popen(
        [*python, "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
         "--port", "0", "--no-dashboard", "--scheduler-file", str(address)],
        **options)]
    processes += [subprocess.Popen(
        [*python, "distributed.cli.dask_worker", "--scheduler-file",
         str(address), "--nthreads", "1", "--no-dashboard"],
        **options) for _ in range(2)]
    wait_until(address.exists)
    yield json.loads(address.read_text())["address"]
    for process in reversed(processes):
        process.terminate()
        process.wait(20)


def test_a_cluster_that_is_already_there(book, cluster):
    for name in "abc":
        book.add(f"a/{name}", f"'{name}' * 3")
    found, _ = run(book, scheduler=cluster)
    assert all(o.state == "ran" for o in found.values())
    assert b"'aaa'" in book.store.get(found["a/a"].key).notebook


# The whole command, interrupted and doubled


def test_two_runs_at_once_share_the_work(book, tmp_path):
    log = tmp_path / "log"
    for i in range(4):
        book.add(f"a/c{i}", f"import time\ntime.sleep(0.7)\n"
                 f"open({str(log)!r}, 'a').write('{i}')")
    both = [book.start("run", "--workers", 1) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert "4 chapters" in out
    assert sorted(log.read_text()) == list("0123")
    assert len(book.results()) == 4


def interrupted(book, number, *options):
    """Start a run, wait for one result and one kernel at work, stop it."""
    pid = book.root / "pid"
    book.add("a/a", "'done'")
    deed = (f"open({str(pid)!r}, 'w').write(str(os.getpid())); "
            "time.sleep(600)")
    book.add("a/b", "import os, time", once(book.root / "mark", deed))
    process = book.start("run", *options, start_new_session=True)
    wait_until(lambda: book.results() and pid.exists() and pid.read_text())
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    wait_until(lambda: not alive(int(pid.read_text())))
    return process.returncode, out + err


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_kernels_and_keeps_what_is_finished(book, workers):
    code, said = interrupted(book, signal.SIGINT, "--workers", workers)
    assert code == 130
    assert "1 ran, 1 skipped" in said and "Traceback" not in said
    code, said = book.command("run", "--workers", 1)
    assert code == 0 and "1 cached, 1 ran" in said


def test_workers_leave_ctrl_c_to_the_run():
    dask = r.OnDask(1)
    try:
        (pid,) = dask.client.run(os.getpid).values()
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert dask.client.submit(os.getpid).result(timeout=20) == pid
    finally:
        dask.close()


def test_sigterm_does_the_same(book):
    code, said = interrupted(book, signal.SIGTERM, "--workers", 1)
    assert code == 143 and "1 ran, 1 skipped" in said


def test_a_runner_killed_outright_leaves_no_kernel_and_a_whole_store(book):
    code, _ = interrupted(book, signal.SIGKILL, "--workers", 1)
    assert code == -signal.SIGKILL
    code, said = book.command("run", "--workers", 1)
    assert code == 0 and "1 cached, 1 ran" in said
