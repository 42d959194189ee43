"""Faults at random moments: nothing lost, doubled, wrong or half-written.

A *round* changes a module, so that every chapter has to run, starts the
command, does harm at a random moment, and then lets a second run finish. What
must hold afterwards is in `Scene.settle`.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import uuid
from contextlib import suppress

import pytest
from tiny_book import CHECKOUT, COMMAND, TinyBook
from tiny_cluster import Cluster, wait_until

from reappraisal.protocol import runner as r
from reappraisal.protocol.book import select
from reappraisal.protocol.cache import Damaged, Store, unpack
from reappraisal.protocol.provenance import provenance, read_module

psutil = pytest.importorskip("psutil")
pytest.importorskip("distributed")

CHAPTERS = 5
MARK = "REAPPRAISAL_FAULT"


class Missed(Exception):
    """The run was over before the fault could happen."""


class Scene:
    """A book of five chapters that print the number in a module."""

    def __init__(self, folder, seed, disk=None):
        self.folder, self.rng = folder, random.Random(seed)
        self.book = TinyBook(folder / "book")
        self.disk = disk
        self.book.store = Store((disk or self.book.root) / ".reappraisal")
        self.log, self.tmp = folder / "log", folder / "tmp"
        self.log.touch()
        self.tmp.mkdir()
        self.mark, self.number, self.numbers = uuid.uuid4().hex, 0, {}
        self.names = [f"a/c{i}" for i in range(CHAPTERS)]
        for name in self.names:
            self.book.add(
                name, "from reappraisal.lab.near import one",
                "import json, os, time\n"
                f"log = os.open({str(self.log)!r}, os.O_WRONLY | os.O_APPEND)"
                f"\nos.write(log, b'{name}\\n')\ntime.sleep(0.3)",
                f"print(json.dumps(['{name}', one]))")
        self.change()

    @property
    def module(self):
        return self.book.root / "reappraisal/lab/near.py"

    def change(self):
        """Another number in the module: every chapter is out of date."""
        self.number += 1
        self.book.module("reappraisal.lab.near", f"one = {self.number}\n")
        self.numbers[read_module(self.module).digest] = self.number

    def start(self, *words, **options):
        env = os.environ | {"PYTHONPATH": str(CHECKOUT), MARK: self.mark,
                            "COLUMNS": "200", "TMPDIR": str(self.tmp)}
        return subprocess.Popen(
            [*COMMAND, "run", "--write", "--root", str(self.book.root),
             "--cache", str(self.book.store.folder), *map(str, words)],
            cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, **options)

    def processes(self, what=""):
        """Those that the command started, by a word of their command."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get(MARK) == self.mark
                if mine and what in " ".join(process.cmdline()):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
            except psutil.Error:
                continue
        return found

    def pick(self, what, run, kernel=False):
        """One of its processes, at a random moment, while it runs."""
        time.sleep(self.rng.uniform(0, 1.5))
        while run.poll() is None:
            found = self.processes(what)
            if kernel:  # a fork of the server, which looks like it
                pids = {p.pid for p in found}
                found = [p for p in found if self.parent(p) in pids]
            if found:
                return self.rng.choice(found)
            time.sleep(0.02)
        raise Missed

    @staticmethod
    def parent(process):
        try:
            return process.ppid()
        except psutil.Error:
            return None

    def chapters(self):
        return select(self.book.root)

    def entries(self):
        found = {}
        for path in self.book.store.folder.rglob("*.result"):
            if "results" in path.parts:
                try:
                    found[path.stem] = unpack(path.read_bytes(), path.stem)
                except Damaged:
                    pass
        return found

    def verdict(self, notebook):
        cells = json.loads(notebook)["cells"]
        texts = ["".join(o["text"]) for c in cells
                 for o in c.get("outputs", [])]
        (text,) = texts
        return json.loads(text)

    def settle(self):
        """Let a run finish what is missing, and look at everything."""
        wait_until(lambda: not self.processes(), 20)
        before = self.entries()
        keys = {c.name: provenance(c).key for c in self.chapters()}
        missing = [n for n, key in keys.items() if key not in before]
        done = len(self.log.read_text().split())
        outcomes = r.Run(self.book.store, write=True)(self.chapters())
        # nothing lost, and only what was missing is done
        assert all(o.ok for o in outcomes), [o.why for o in outcomes]
        assert sorted(self.log.read_text().split()[done:]) == missing
        assert {o.chapter for o in outcomes if o.state == "ran"} == {*missing}
        # none doubled, and none from the wrong code
        entries = self.entries()
        assert {*keys.values()} <= {*entries}
        for entry in entries.values():
            (digest,) = [v for k, v in entry.record["modules"].items()
                         if k.endswith("near")]
            assert self.verdict(entry.notebook) == [
                entry.record["chapter"], self.numbers[digest]]
        # no notebook half-written, each with the result of its code
        for chapter in self.chapters():
            data = chapter.path.read_bytes()
            assert self.verdict(data) == [chapter.name, self.number]
            stored = json.loads(data)["metadata"]["reappraisal"]
            assert stored["key"] == keys[chapter.name]
            assert r.status(chapter, self.book.store).state == "fresh"
        # nothing left lying about
        for folder in (self.book.store.folder, self.book.root / "nbs"):
            assert not list(folder.rglob(".*.part"))
        assert not self.processes()


# The faults: each does harm to a run that is under way


def kill_kernel(scene, run):
    scene.pick("fork_server", run, kernel=True).kill()


def kill_server(scene, run):
    victim = scene.pick("fork_server", run)
    victim.kill()


def kill_worker(scene, run):
    scene.pick("fork_server", run, kernel=True)
    scene.pick("spawn_main", run).kill()


def kill_runner(scene, run):
    time.sleep(scene.rng.uniform(0.3, 3))
    if run.poll() is not None:
        raise Missed
    run.kill()


def interrupt(scene, run):
    scene.pick("fork_server", run)
    run.send_signal(scene.rng.choice([signal.SIGINT, signal.SIGTERM]))


def harm_entry(scene, run):
    """Alter, cut, empty or swap an entry that has just appeared."""
    def fresh():
        keys = [provenance(c).key for c in scene.chapters()]
        paths = map(scene.book.store.path, keys)
        return [p for p in paths if p.exists()]

    while not fresh():
        if run.poll() is not None:
            raise Missed
        time.sleep(0.02)
    victim = scene.rng.choice(fresh())
    data = bytearray(victim.read_bytes())
    kind = scene.rng.choice(["flip", "cut", "empty", "swap"])
    if kind == "flip":
        data[scene.rng.randrange(len(data) - 9, len(data))] ^= 1
    elif kind == "cut":
        del data[scene.rng.randrange(len(data)):]
    elif kind == "empty":
        data.clear()
    else:
        others = [p for p in victim.parents[1].rglob("*.result")
                  if p != victim]
        other = scene.rng.choice(others) if others else None
        data = other.read_bytes() if other else b""
    victim.write_bytes(data)


def change_module(scene, run):
    scene.pick("fork_server", run)
    scene.change()


def second_runner(scene, run):
    time.sleep(scene.rng.uniform(0, 1.5))
    other = scene.start("--workers", scene.rng.choice([1, 2]))
    out, _ = other.communicate(timeout=90)
    assert other.returncode == 0, out


def fill_disk(scene, run):
    scene.pick("fork_server", run)
    try:
        with open(scene.disk / "ballast", "wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
    except OSError:
        pass


LOCAL = [kill_kernel, kill_server, kill_worker, kill_runner, interrupt,
         harm_entry, change_module, second_runner, fill_disk]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small file system of its own for the store, where one may be had."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def play(scene, faults, workers):
    """One round with one fault or more; those that happened."""
    scene.change()
    options, happened = {"start_new_session": True}, []
    if fill_disk in faults and scene.disk is None:  # no room for any file
        options["preexec_fn"] = small_files
        happened.append(fill_disk)
    run = scene.start("--workers", workers, **options)
    for fault in faults:
        if fault not in happened:
            with suppress(Missed, psutil.Error):
                fault(scene, run)
                happened.append(fault)
    out, _ = run.communicate(timeout=90)
    assert run.returncode in (0, 1, 130, 143, -9), out
    assert "Traceback" not in out
    if scene.disk is not None:
        (scene.disk / "ballast").unlink(missing_ok=True)
    if kill_runner not in happened:
        wait_until(lambda: not list(scene.tmp.iterdir()), 5)
    scene.settle()
    return happened


def inject(scene, faults, workers):
    """Rounds until each fault has happened."""
    for _ in range(6):
        happened = play(scene, faults, workers)
        faults = [fault for fault in faults if fault not in happened]
        if not faults:
            return
    pytest.fail(f"never happened: {faults}")


@pytest.fixture(scope="module")
def scene(tmp_path_factory, disk):
    store = None
    if disk is not None:
        store = disk / uuid.uuid4().hex[:6]
        store.mkdir()
    scene = Scene(tmp_path_factory.mktemp("scene"), 2026, store)
    if disk is not None:
        scene.disk = disk
    yield scene
    play(scene, [], 1)
    assert not list(scene.tmp.iterdir())  # what was killed is cleaned up


@pytest.mark.parametrize("faults", [
    [kill_kernel, harm_entry], [change_module, kill_server],
    [second_runner, kill_runner], [fill_disk, interrupt], [kill_worker],
], ids=lambda faults: "-".join(fault.__name__ for fault in faults))
def test_faults(scene, faults):
    inject(scene, faults, 2 if kill_worker in faults else 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("turn", range(8))
def test_many_faults(tmp_path_factory, disk, turn):
    """Ten rounds a turn: each fault once, and one more."""
    store = None
    if disk is not None:
        store = disk / uuid.uuid4().hex[:6]
        store.mkdir()
    scene = Scene(tmp_path_factory.mktemp("many"), turn, store)
    scene.disk = disk
    faults = [*LOCAL, scene.rng.choice(LOCAL)]
    scene.rng.shuffle(faults)
    for fault in faults:
        two = fault is kill_worker or scene.rng.random() < 0.3
        inject(scene, [fault], 2 if two else 1)
    play(scene, [], 1)
    assert not list(scene.tmp.iterdir())
    if store is not None:
        shutil.rmtree(store)


# A cluster's faults


class Far(Scene):
    """The same on a cluster of separate processes."""

    def __init__(self, folder, seed):
        super().__init__(folder, seed)
        self.cluster = Cluster(folder / "cluster")
        self.begin()

    def begin(self):
        self.cluster.workers.clear()
        self.cluster.start_scheduler()
        for _ in range(2):
            self.cluster.start_worker()

    def start(self, *words, **options):
        return super().start(
            "--scheduler", self.cluster.address_for("r"), *words, **options)

    def at_work(self, run):
        """Wait until a chapter runs, and a little longer."""
        done = len(self.log.read_text())
        while len(self.log.read_text()) == done:
            if run.poll() is not None:
                raise Missed
            time.sleep(0.02)
        time.sleep(self.rng.uniform(0, 0.5))

    def settle(self):
        # what a lost worker still does is nobody's result
        quiet = time.monotonic()
        while time.monotonic() - quiet < 2.5:
            if self.kernels():
                quiet = time.monotonic()
            time.sleep(0.1)
        super().settle()

    def kernels(self):
        servers, found = set(), []
        for process in psutil.process_iter():
            try:
                if "fork_server" in " ".join(process.cmdline()) and str(
                    self.folder) in process.environ().get("TMPDIR", ""):
                    found.append(process)
            except psutil.Error:
                continue
        servers = {p.pid for p in found}
        return [p for p in found if self.parent(p) in servers]


def far_worker(scene, run):
    """Kill a worker's process; its nanny starts another."""
    scene.at_work(run)
    host = scene.rng.choice(["w0", "w1"])
    tree = scene.cluster.tree(host)[1:]
    victims = [p for p in tree if "spawn_main" in " ".join(p.cmdline())]
    if not victims:
        raise Missed
    victims[0].kill()


def far_scheduler(scene, run):
    scene.at_work(run)
    scene.cluster.scheduler.kill()
    run.wait(60)
    scene.cluster.close()
    scene.begin()


def far_runner(scene, run):
    scene.at_work(run)
    run.kill()


def far_silence(scene, run):
    """A worker falls silent for longer than the cluster waits."""
    scene.at_work(run)
    host = scene.rng.choice(["w0", "w1"])
    scene.cluster.cut(host)
    run.wait(90)
    scene.cluster.heal(host)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    far = Far(tmp_path_factory.mktemp("far"), 2026)
    yield far
    far.cluster.close()


def play_far(scene, fault):
    for _ in range(6):
        scene.change()
        run = scene.start(start_new_session=True)
        try:
            fault(scene, run)
            happened = True
        except (Missed, psutil.Error):
            happened = False
        out, _ = run.communicate(timeout=120)
        gone = fault is far_scheduler and run.returncode == 2
        assert gone or run.returncode in (0, 1, -9), out
        assert "Traceback" not in out, out
        if fault is far_scheduler and happened:
            assert "Dask scheduler" in out
        elif fault is not far_runner:
            assert run.returncode == 0, out
        scene.settle()
        if happened:
            return
    pytest.fail(f"{fault.__name__} never happened")


def test_a_fault_on_a_cluster(far):
    play_far(far, far_worker)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("turn", range(5))
def test_many_faults_on_a_cluster(tmp_path_factory, turn):
    """Five rounds a turn: each fault once, and one more."""
    scene = Far(tmp_path_factory.mktemp("far"), turn)
    faults = [far_worker, far_scheduler, far_runner, far_silence]
    faults.append(scene.rng.choice(faults[:3]))
    scene.rng.shuffle(faults)
    try:
        for fault in faults:
            play_far(scene, fault)
    finally:
        scene.cluster.close()
