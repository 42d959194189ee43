"""A cluster that is there already: workers with nothing but the package."""

import json
import os
import shutil

import pytest
from tiny_book import CHECKOUT, TinyBook, alive
from tiny_cluster import Cluster, Hosts, wait_until

pytest.importorskip("distributed")

WHERE = "import os\nprint(os.environ.get('WHO'))"


@pytest.fixture
def book(tmp_path):
    return TinyBook(tmp_path / "book")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.start_scheduler()
    cluster.start_worker(env={"WHO": "plain"})
    yield cluster
    cluster.close()


def said_by(book, name):
    """What the one stored result of a chapter printed."""
    found = []
    for path in book.results():
        entry = book.store.get(path.stem)
        if entry.record["chapter"] == name:
            cells = json.loads(entry.notebook)["cells"]
            found.append("".join(
                "".join(o.get("text", "")) for c in cells
                for o in c.get("outputs", [])))
    (text,) = found
    return text


def test_workers_need_the_package_and_no_common_files(book, cluster):
    book.module("reappraisal.lab.near", "one = 1\n")
    for name in "abc":
        book.add(f"a/{name}", "from reappraisal.lab.near import one",
                 f"print('{name}', one, os.environ['WHO'])".replace(
                     "print", "import os\nprint"))
    out, _ = (run := cluster.run(book)).communicate(timeout=60)
    assert run.returncode == 0, out
    assert "3 chapters: 3 ran" in out and "Traceback" not in out
    for name in "abc":
        assert said_by(book, f"a/{name}") == f"{name} 1 plain\n"


def test_a_chapter_for_a_gpu_waits_then_says_what_is_missing(book, cluster):
    book.add("a/gpu", WHERE, parameters='scale = "book"\ndevice = "cuda"')
    book.add("a/cpu", WHERE, parameters='scale = "book"\ndevice = "cpu"')
    out, _ = (run := cluster.run(book, "--patience", 1)).communicate(
        timeout=60)
    assert run.returncode == 1
    assert "waits for a worker with a GPU" in out
    assert "NoWorker: no worker with a GPU" in out
    assert "--resources GPU=1" in out and "1 failed, 1 ran" in out
    assert said_by(book, "a/cpu") == "plain\n"


def test_a_chapter_for_a_gpu_goes_to_a_worker_that_has_one(book, cluster):
    for n in range(3):
        book.add(f"a/gpu{n}", WHERE,
                 parameters='scale = "book"\ndevice = "cuda:0"')
    run = cluster.run(book, "--patience", 60)
    cluster.start_worker("--resources", "GPU=1", env={"WHO": "GPU"})
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0, out
    for n in range(3):
        assert said_by(book, f"a/gpu{n}") == "GPU\n"


def test_a_kernel_ends_with_the_runner_that_wanted_it(book, cluster):
    pid = book.root / "pid"
    book.add("a/b", "import os, time\n"
             f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
             "time.sleep(600)")
    run = cluster.run(book)
    wait_until(lambda: pid.exists() and pid.read_text())
    run.kill()
    run.communicate()
    wait_until(lambda: not alive(int(pid.read_text())), 15)


@pytest.fixture
def hosts(tmp_path, book):
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("separate hosts need root and the command `ip`")
    hidden = [book.root, CHECKOUT / "reappraisal", CHECKOUT / "nbs"]
    try:
        hosts = Hosts(tmp_path / "hosts", hidden)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        hosts.start_scheduler()
        hosts.start_worker()
        hosts.start_worker()
        yield hosts
    finally:
        hosts.close()


def test_separate_hosts_share_no_files(book, hosts):
    for name in "ab":
        book.add(f"a/{name}", "import os",
                 f"print(os.path.exists({str(CHECKOUT / 'nbs')!r} + "
                 "'/index.ipynb'), os.path.exists("
                 f"{str(book.root / 'settings.ini')!r}))")
    out, _ = (run := hosts.run(book)).communicate(timeout=90)
    assert run.returncode == 0, out
    for name in "ab":
        assert said_by(book, f"a/{name}") == "False False\n"


@pytest.mark.slow
def test_separate_hosts_and_a_cable_that_is_cut(book, hosts, tmp_path):
    """The chapter on the worker that is cut off goes to the other one."""
    log = tmp_path / "log"
    for name in "abcd":
        book.add(f"a/{name}", "import os, time\n"
                 f"open({str(log)!r}, 'a').write('{name}')\n"
                 f"time.sleep(2)\nprint('{name}', os.path.exists("
                 f"{str(CHECKOUT / 'nbs/index.ipynb')!r}))")
    run = hosts.run(book)
    wait_until(lambda: log.exists() and len(log.read_text()) > 1, 40)
    hosts.cut("w0")
    out, _ = run.communicate(timeout=90)
    assert run.returncode == 0, out
    assert len(book.results()) == 4
    for name in "abcd":
        assert said_by(book, f"a/{name}") == f"{name} False\n"
    before = log.read_text()
    hosts.heal("w0")
    again = hosts.run(book)
    out, _ = again.communicate(timeout=60)
    assert "4 cached" in out and log.read_text() == before
