"""Limits of memory: kept, told, and nothing is left behind."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_book import CHECKOUT, COMMAND, TinyBook

from reappraisal.protocol import memory as m

psutil = pytest.importorskip("psutil")


@given(st.integers(1, 10**6), st.sampled_from(["", "B", "kB", "MiB", "g"]))
def test_sizes_are_read_as_written(number, unit):
    factor = {"": 1, "B": 1, "kB": 1000, "MiB": 2**20, "g": 10**9}[unit]
    assert m.parse_size(f"{number} {unit}") == number * factor


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 apples", "0", "nan",
                                  "1e3GB", "0.1B", "2GB2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="such as 2GB"):
        m.parse_size(text)


def test_children_count_and_shared_pages_count_once():
    code = ("import os, time\nx = bytearray(os.urandom(1) * 80_000_000)\n"
            "for _ in range(3):\n    if os.fork() == 0:\n        break\n"
            "print(1, flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code],
                               stdout=subprocess.PIPE, text=True)
    with process:
        for _ in range(4):
            process.stdout.readline()
        seen = m.memory_of(process.pid, over=10**12)
        taken = m.memory_of(process.pid)
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
    assert seen > 320e6
    if sys.platform == "linux":
        assert 80e6 < taken < 160e6


def test_a_chapter_over_its_limit_is_stopped_named_and_not_tried_again(
    tmp_path
):
    book = TinyBook(tmp_path)
    log = tmp_path / "log"
    book.add("a/greedy", f"open({str(log)!r}, 'a').write('x')\n"
             "import subprocess, sys\n"
             "subprocess.run([sys.executable, '-c',"
             " 'x = bytearray(400_000_000); import time; time.sleep(60)'])")
    book.add("a/modest", "x = bytearray(10_000_000)")
    code, text = book.command("run", "--workers", 1, "--memory", "300MB")
    assert code == 1 and "1 failed, 1 ran" in text
    assert "cell 3: MemoryLimit: a/greedy reached " in text
    assert "limit of 300 MB" in text and log.read_text() == "x"
    code, text = book.command("run", "--memory", "2 apples")
    assert code == 2 and "such as 2GB" in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_64_chapters_on_2_workers_stay_under_4_GB(tmp_path):
    book = TinyBook(tmp_path / "book")
    for i in range(64):
        book.add(f"a/c{i:02}", "import torch, numpy\n"
                 f"x = torch.rand(4_000_000, generator=torch.Generator()"
                 f".manual_seed({i}))\nprint(float(x.mean()))")
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    run = subprocess.Popen(
        [*COMMAND, "run", "--workers", "2"], cwd=book.root,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "TMPDIR": str(tmp)},
        stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch():
        nonlocal peak
        while run.poll() is None:
            peak = max(peak, m.memory_of(run.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = run.communicate()
    watcher.join()
    assert run.returncode == 0 and "64 chapters: 64 ran" in out
    print(f"peak: {m.show_size(peak)}")
    assert 10**8 < peak < 4 * 10**9
    assert not list(tmp.iterdir())
    values = {json.dumps(book.store.get(p.stem).record["chapter"])
              for p in book.results()}
    assert len(values) == 64
