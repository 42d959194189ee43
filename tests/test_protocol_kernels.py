"""Warm kernels: like ordinary ones, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from tiny_book import CHECKOUT, TinyBook, alive

from reappraisal.protocol import execute as e
from reappraisal.protocol import kernels as k
from reappraisal.protocol.book import parameters_of, read_notebook
from reappraisal.protocol.cache import Scratch
from reappraisal.protocol.provenance import provenance

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")


@pytest.fixture(scope="module")
def servers():
    yield
    e.close_servers()


@pytest.fixture
def book(tmp_path, servers):
    return TinyBook(tmp_path)


def job(chapter, timeout=60, threads=1, **given):
    data = chapter.path.read_bytes()
    found = provenance(chapter, given)
    defaults = parameters_of(read_notebook(chapter.path))
    return e.make_job(chapter, found, data, defaults, threads, timeout)


def texts(result):
    cells = json.loads(result.notebook)["cells"]
    return ["".join(o.get("text", "")) for c in cells if "outputs" in c
            for o in c["outputs"]]


def wait_until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_threads_are_held_to_what_was_given(book):
    chapter = book.add("a/b", "import os, torch\n"
                       "print(torch.get_num_threads(),"
                       "os.environ['OPENBLAS_NUM_THREADS'])")
    for threads in (1, 2):
        result = e.execute(job(chapter, threads=threads))
        assert texts(result) == [f"{threads} {threads}\n"]


def test_a_changed_module_is_seen_by_the_next_kernel(book):
    for one in (1, 2):
        book.module("reappraisal.lab.near", f"one = {one}\n")
        chapter = book.add(
            "a/b", "from reappraisal.lab.near import one\nprint(one)")
        assert texts(e.execute(job(chapter))) == [f"{one}\n"]


def test_a_chapter_sees_only_the_modules_in_its_key(book):
    book.module("reappraisal.lab.near", "one = 1\n")
    hidden = "__import__('reappraisal.lab.' + 'near')"
    result = e.execute(job(book.add("a/b", hidden)))
    assert result.error["name"] == "ModuleNotFoundError"


def test_a_module_that_changes_during_the_run_does_not_matter(book):
    path = book.root / "reappraisal/lab/near.py"
    book.module("reappraisal.lab.near", "one = 1\n")
    chapter = book.add(
        "a/b", f"open({str(path)!r}, 'w').write('one = 2')",
        "from reappraisal.lab.near import one\nprint(one)")
    assert "1\n" in texts(e.execute(job(chapter)))


def test_parameters_are_set_and_leave_no_cell(book):
    chapter = book.add("a/b", "print(scale, width)")
    result = e.execute(job(chapter, scale="smoke", width=[1, 2]))
    assert texts(result) == ["smoke [1, 2]\n"]
    assert len(json.loads(result.notebook)["cells"]) == 3


def test_an_ordinary_kernel_gives_the_same_outputs(book, monkeypatch):
    chapter = book.add(
        "a/b", "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2]);",
        "import numpy, sys\nprint({'a', 'b', 'c'}, sys.path[0])\n"
        "numpy.arange(3)", "print(3); print(4)\nprint(5, file=sys.stderr)")
    warm = e.execute(job(chapter))
    monkeypatch.setattr(e, "warm_server", lambda *_: None)
    cold = e.execute(job(chapter))
    assert warm.status == cold.status == "ok"
    assert warm.notebook == cold.notebook
    assert b"image/png" in warm.notebook
    assert warm.machine["warm"] and not cold.machine["warm"]


def test_the_folder_of_a_run_is_gone_afterwards(book):
    chapter = book.add(
        "a/b", "import os, tempfile\nopen('left', 'w').close()\n"
        "tempfile.mkdtemp()\nprint(os.getcwd(), os.getpid())")
    (text,) = texts(e.execute(job(chapter)))
    folder, pid = text.split()
    assert not os.path.exists(folder) and not alive(int(pid))


def test_what_a_kernel_started_ends_with_it(book):
    chapter = book.add(
        "a/b", "import subprocess\n"
        "p = subprocess.Popen(['sleep', '600'])\nprint(p.pid)")
    (text,) = texts(e.execute(job(chapter)))
    wait_until(lambda: not alive(int(text)))


def test_an_endless_cell_is_killed_even_in_compiled_code(book):
    chapter = book.add("a/b", "print('here', flush=True)",
                       "import ctypes\nctypes.PyDLL(None).sleep(600)")
    began = time.monotonic()
    result = e.execute(job(chapter, timeout=1.5))
    assert result.status == "timeout" and result.error["cell"] == 4
    assert "1.5 s" in result.error["message"]
    assert texts(result) == ["here\n"]
    assert time.monotonic() - began < 30


def test_a_crash_leaves_its_last_words(book):
    chapter = book.add("a/b", "import os\nos.kill(os.getpid(), 11)")
    result = e.execute(job(chapter))
    assert result.status == "died" and "signal 11" in result.error["message"]
    assert "Segmentation fault" in result.error["words"]


def test_a_temporary_folder_with_a_long_name(book, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    e.close_servers()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    result = e.execute(job(book.add("a/b", "print(1)")))
    e.close_servers()
    assert texts(result) == ["1\n"] and not list(long.iterdir())


def test_a_job_for_other_versions_is_refused(book):
    from dataclasses import replace

    asked = replace(job(book.add("a/b", "1")), versions={"numpy": "1.0"})
    result = e.execute(asked)
    assert result.status == "refused"
    assert "1.0 wanted" in result.error["message"]


HOLDER = """
import os, sys, time
from reappraisal.protocol.kernels import ForkServer
server = ForkServer()
kernels = [server.spawn(["-f", sys.argv[1] + str(i)], dict(os.environ), ".")
           for i in range(2)]
print(server.process.pid, server.folder, *(k.pid for k in kernels), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["owner", "server"])
def test_kernels_end_when_their_owner_is_killed(tmp_path, victim):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "k")], text=True,
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        cwd=tmp_path,
    )
    with owner:
        server, folder, *kernels = owner.stdout.readline().split()
        pids = [int(server), *map(int, kernels)]
        assert all(map(alive, pids)) and len(kernels) == 2
        os.kill(owner.pid if victim == "owner" else pids[0], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, pids)))
        if victim == "owner":
            wait_until(lambda: not os.path.exists(folder))
        owner.kill()
    if victim == "server":
        Scratch.sweep("kernels")
        assert not os.path.exists(folder)


def test_a_server_that_has_gone_is_replaced(book):
    chapter = book.add("a/b", "print(1)")
    assert e.execute(job(chapter)).status == "ok"
    e._servers[1].process.kill()
    e._servers[1].process.wait()
    assert e.execute(job(chapter)).status == "ok"


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", None])
def test_threads_are_a_positive_whole_number(threads):
    with pytest.raises(ValueError, match="threads is .* a whole number"):
        k.thread_environment(threads)
