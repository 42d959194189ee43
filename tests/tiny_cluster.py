"""A Dask cluster of separate processes, or of separate hosts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_book import CHECKOUT, COMMAND

#: Seconds after which Dask gives a silent partner up.
TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s",
}


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


class Cluster:
    """A scheduler that lacks the package, and workers with a copy of it.

    Each process has a working folder of its own, and none has the checkout
    on its path.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.site, self.bare = folder / "site", folder / "bare"
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / "reappraisal", self.site / "reappraisal",
                        ignore=skip)
        self.bare.mkdir(parents=True)
        (self.bare / "reappraisal.py").write_text(
            "raise ModuleNotFoundError('the scheduler lacks the package')")
        self.workers: list[subprocess.Popen] = []
        self.scheduler = None

    def enter(self, host: str) -> list[str]:
        """Words that run a command on a host."""
        return []

    def address_for(self, host: str) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def _start(self, host, module, *words, path, env=()):
        cwd = self.folder / f"at-{host}"
        cwd.mkdir(exist_ok=True)
        tmp = cwd / "tmp"
        tmp.mkdir(exist_ok=True)
        command = [*self.enter(host), sys.executable, "-m", module, *words]
        own = {"PYTHONPATH": str(path), "TMPDIR": str(tmp)} | dict(env)
        with open(cwd / "log", "a") as log:
            return subprocess.Popen(
                command, cwd=cwd, stdout=log, stderr=log,
                env=os.environ | TIMEOUTS | own)

    def start_scheduler(self):
        said = self.folder / "at-s" / "scheduler.json"
        said.unlink(missing_ok=True)
        self.scheduler = self._start(
            "s", "distributed.cli.dask_scheduler", "--host", "0.0.0.0",
            "--port", "0", "--no-dashboard", "--scheduler-file", said.name,
            path=self.bare)
        wait_until(said.exists)
        self.port = json.loads(said.read_text())["address"].rpartition(":")[2]

    def start_worker(self, *words, env=()):
        host = f"w{len(self.workers)}"
        self.workers.append(self._start(
            host, "distributed.cli.dask_worker", self.address_for(host),
            "--nthreads", "1", "--no-dashboard", *words,
            path=self.site, env=env))

    def cut(self, host):
        """Cut a worker off; here it falls silent."""
        for process in self.tree(host):
            process.send_signal(signal.SIGSTOP)

    def heal(self, host):
        for process in self.tree(host):
            process.send_signal(signal.SIGCONT)

    def tree(self, host):
        import psutil

        try:
            first = psutil.Process(self.workers[int(host[1:])].pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def run(self, book, *words, **options):
        command = [*self.enter("r"), *COMMAND, "run", *map(str, words),
                   "--scheduler", self.address_for("r"), "--root",
                   str(book.root)]
        cwd = self.folder / "at-r"
        cwd.mkdir(exist_ok=True)
        return subprocess.Popen(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | TIMEOUTS
            | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}, **options)

    def close(self):
        """End every process, at once."""
        import psutil

        for process in [*self.workers, self.scheduler]:
            try:
                first = psutil.Process(process.pid)
                tree = [first, *first.children(recursive=True)]
            except psutil.NoSuchProcess:
                tree = []
            for each in tree:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    pass
            process.wait(10)


class Hosts(Cluster):
    """The same, each process in a network of its own, without the checkout.

    The scheduler's host has a cable to every other.
    """

    hosts = ("r", "w0", "w1")

    def __init__(self, folder: Path, hidden: list[Path]):
        super().__init__(folder)
        self.hidden, self.made = hidden, []
        mark = f"{os.getpid() % 10_000:04d}"
        self.net = {h: f"rs{mark}{h}" for h in ("s", *self.hosts)}
        for space in self.net.values():
            _ip("netns", "add", space)
            self.made.append(space)
            _ip("-n", space, "link", "set", "lo", "up")
        for number, host in enumerate(self.hosts):
            ends = f"c{mark}{host}", f"d{mark}{host}"
            _ip("link", "add", ends[0], "type", "veth", "peer", ends[1])
            for end, at, last in zip(ends, ("s", host), (1, 2), strict=True):
                space = self.net[at]
                _ip("link", "set", end, "netns", space)
                _ip("-n", space, "address", "add",
                    f"10.77.{number}.{last}/24", "dev", end)
                _ip("-n", space, "link", "set", end, "up")
        self.mark = mark

    def enter(self, host):
        words = ["ip", "netns", "exec", self.net[host]]
        if host == "r":
            return words
        hide = "".join(f"mount -t tmpfs none '{p}' && " for p in self.hidden)
        script = f'{hide} exec "$@"'
        return [*words, "unshare", "-m", "sh", "-c", script, "sh"]

    def address_for(self, host):
        return f"tcp://10.77.{self.hosts.index(host)}.1:{self.port}"

    def cut(self, host):
        self._cable(host, "down")

    def heal(self, host):
        self._cable(host, "up")

    def _cable(self, host, state):
        _ip("-n", self.net["s"], "link", "set", f"c{self.mark}{host}", state)

    def close(self):
        if self.scheduler is not None:
            super().close()
        for space in self.made:
            subprocess.run(["ip", "netns", "delete", space])


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
