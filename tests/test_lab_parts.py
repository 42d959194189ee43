"""The same bits whoever does the work, and what happens when it goes wrong."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from reappraisal.lab.ensemble import (
    SGD,
    Adam,
    DivergenceWarning,
    Ensemble,
    sweep,
    until,
)
from reappraisal.lab.models import generator
from reappraisal.lab.parts import (
    PartFailed,
    PartRefused,
    WorkersLost,
    limited_threads,
    run_parts,
)
from reappraisal.protocol.kernels import CLUSTER

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cluster():
    """Three workers in processes of their own; one says it has a GPU."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    def worker(**more):
        options = {"nthreads": 1, "memory_limit": 0, **more}
        return {"cls": Nanny, "options": options}

    workers = {
        "a": worker(),
        "b": worker(),
        "gpu": worker(nthreads=2, resources={"GPU": 1}),
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    with (
        SpecCluster(workers, scheduler, silence_logs=50) as running,
        Client(running) as client,
    ):
        client.wait_for_workers(3)
        yield client


def data(n=66, d=17):
    g = generator(0, "parts")
    x = torch.randn(n, d, generator=g)
    return x, (x @ torch.randn(d, 3, generator=g)).argmax(1)


def swept(steps=6, grid=None, **options):
    """A sweep in uneven parts, with all that could depend on the helpers."""
    noise = generator(5, "noise")
    model = nn.Sequential(nn.Linear(17, 13), nn.GELU(), nn.Linear(13, 3))

    def noisy(outputs, targets):
        jitter = torch.randn(outputs.shape[1], generator=noise)
        own = nn.functional.cross_entropy(
            outputs.mT, targets.expand(len(outputs), -1), reduction="none"
        )
        return own * (1 + 0.1 * jitter)

    def seen(state):
        state.record("draw", state.loss + torch.rand(1, generator=noise))

    options = {
        "seeds": [3, 4, 5],
        "optimiser": Adam(0.01),
        "loss": noisy,
        "callbacks": [seen, until("draw", lambda v: v < 1.3, hold=2)],
        "batch_size": 16,
        "every": 1,
        "rows": torch.stack([torch.arange(50) + k for k in (0, 5, 16)]),
        "checkpoints": [2],
        "watch": {"all": data()},
        "chunk": 3,
        **options,
    }
    grid = grid or {"lr": [0.003, 0.01, 0.1], "weight_decay": [0.0, 0.3]}
    return sweep(model, data(), grid=grid, steps=steps, **options)


def bits(ensemble: Ensemble) -> dict[str, torch.Tensor]:
    """Everything but the clock."""
    return {
        **ensemble.params,
        **{f"hyper {k}": v for k, v in ensemble.hyper.items()},
        **{f"at 2 {k}": v for k, v in ensemble.at(2).params.items()},
        **{f"of {k}": t.values for k, t in ensemble.history.items()},
        **{f"when {k}": t.steps for k, t in ensemble.history.items()},
        "stopped_at": ensemble.stopped_at,
        "diverged": ensemble.diverged,
        "seeds": torch.tensor(ensemble.seeds),
    }


def same(a: Ensemble, b: Ensemble) -> None:
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value.nan_to_num(), b[name].nan_to_num()), name


def only(client, count):
    """A client whose work goes to so many of the workers."""
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])[:count]

    class Fewer:
        scheduler = client.scheduler

        def submit(self, *args, **options):
            return client.submit(*args, workers=addresses, **options)

        def cancel(self, *args, **options):
            return client.cancel(*args, **options)

    return Fewer()


def test_a_sweep_is_the_same_whoever_does_it(cluster):
    before = torch.get_num_threads()
    alone = swept()
    assert len(alone) == 18 and torch.get_num_threads() == before
    assert 0 < int((alone.stopped_at < 6).sum()) < 18
    same(alone, swept())
    done = []
    same(alone, swept(workers=2, progress=lambda *n: done.append(n)))
    assert done == [(k, 6) for k in range(1, 7)]
    for count in (1, 2, 3):
        same(alone, swept(client=only(cluster, count)))
    with limited_threads(2):
        same(alone, swept())
        assert torch.get_num_threads() == 2


def test_other_cuts_are_another_calculation():
    """Or else the test above could not fail."""
    with pytest.raises(AssertionError):
        same(swept(), swept(chunk=18))


def test_default_parts_depend_on_the_sweep_alone(monkeypatch):
    import reappraisal.lab.ensemble as module

    seen = []

    def spy(work, parts, **options):
        seen.append([len(p) for p in parts])
        return run_parts(work, parts, **options)

    monkeypatch.setattr(module, "run_parts", spy)
    rates = [0.01 * k for k in range(1, 65)]
    for seeds in ([3], [3, 4, 5, 6]):
        swept(
            steps=2, seeds=seeds, grid={"lr": rates}, chunk=None, rows=None,
            callbacks=(), watch=None,
        )  # fmt: skip
    assert seen == [[16] * 4, [32] * 8]


def test_the_callers_loss_comes_back():
    def mine(outputs, targets):
        return (outputs**2).mean(-1)

    assert swept(loss=mine, workers=2).criterion is mine


def test_gpu_workers_get_what_asks_for_them(cluster):
    from distributed import get_worker

    def where(part):
        return get_worker().address, part

    gpu = [
        address
        for address, about in cluster.scheduler_info(n_workers=-1)[
            "workers"
        ].items()
        if about["resources"]
    ]
    found = run_parts(
        where, range(6), client=cluster, resources={"GPU": 1}
    )
    assert found == [(*gpu, part) for part in range(6)]
    assert {a for a, _ in run_parts(where, range(9), client=cluster)} - {*gpu}


def test_two_parts_in_one_process_do_not_disturb_each_other(cluster):
    """The third worker has two slots and one number of threads."""

    def count(part):
        time.sleep(0.05 * part)
        return torch.get_num_threads(), os.getpid()

    gpu = {"GPU": 0.5}
    found = run_parts(
        count, range(5), client=cluster, resources=gpu, threads=3
    )
    assert {n for n, _ in found} == {3} and len({p for _, p in found}) == 1


def failing(part):
    if part == 2:
        raise KeyError("no such thing")
    return part


@pytest.mark.parametrize("how", ["here", "processes", "cluster"])
def test_an_error_is_named_by_its_part(how, request):
    who = {
        "here": lambda: {},
        "processes": lambda: {"workers": 2},
        "cluster": lambda: {"client": request.getfixturevalue("cluster")},
    }[how]()
    with pytest.raises(PartFailed, match=r"part 3 of 4: KeyError") as caught:
        run_parts(failing, range(4), **who)
    assert "in failing" in str(caught.value.__cause__)
    assert not isinstance(caught.value, ValueError)
    wrong = r"part \d of 6 .*: lr 0\.\d+, .*seeds 3, 4, 5\): ValueError: batch_size"
    with pytest.raises(PartRefused, match=wrong):
        swept(batch_size=99, **who)
    # and they are still there for others
    assert run_parts(abs, range(3), **who) == [0, 1, 2]


def test_errors_that_cannot_travel_are_told_all_the_same():
    class Odd(Exception):
        def __init__(self, a, b):
            self.lock = threading.Lock()
            super().__init__(f"odd {a} {b}")

    def odd(part):
        raise Odd(1, 2)

    with pytest.raises(PartFailed, match=r"part \d of 2: Odd: odd 1 2"):
        run_parts(odd, range(2), workers=2)
    with pytest.raises(PartFailed, match="the result.*cannot be copied"):
        run_parts(lambda part: threading.Lock(), range(2), workers=2)


def dies(folder, times):
    """A function that kills its process as often as that, in part 1."""

    def work(part):
        if part == 1:
            tries = len(list(Path(folder).iterdir()))
            if tries < times:
                (Path(folder) / str(tries)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return part, float(torch.rand(1, generator=generator(part)))

    return work


@pytest.mark.parametrize("how", ["processes", "cluster"])
def test_a_killed_worker_costs_nothing_but_time(how, tmp_path, request):
    if how == "cluster":
        who = {"client": request.getfixturevalue("cluster")}
    else:
        who = {"workers": 2}
    found = run_parts(dies(tmp_path, 1), range(4), **who)
    assert len(list(tmp_path.iterdir())) == 1
    assert found == run_parts(dies(tmp_path, 1), range(4))


@pytest.mark.slow
def test_what_kills_every_process_is_given_up(tmp_path):
    with pytest.raises(WorkersLost, match="not done: .*part 2 of 2"):
        run_parts(dies(tmp_path, 99), range(2), workers=2)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_what_kills_every_worker_is_given_up(tmp_path, cluster):
    with pytest.raises(WorkersLost, match=r"part \d of 3"):
        run_parts(dies(tmp_path, 99), range(3), client=cluster)


def test_inside_a_task_the_slot_is_left_to_the_parts(cluster):
    """With one slot, and the outer task in it, nothing could ever begin."""

    def outer():
        from distributed import get_client, get_worker

        client, here = get_client(), get_worker().address

        class Mine:
            scheduler = client.scheduler

            def submit(self, *args, **options):
                return client.submit(*args, workers=[here], **options)

            cancel = staticmethod(client.cancel)

        return run_parts(lambda part: part**2, range(4), client=Mine())

    address = next(iter(cluster.scheduler_info(n_workers=-1)["workers"]))
    future = cluster.submit(outer, workers=[address], pure=False)
    assert future.result(timeout=60) == [0, 1, 4, 9]


def test_a_chapter_may_not_wait_for_its_own_cluster(cluster, monkeypatch):
    monkeypatch.setenv(CLUSTER, cluster.scheduler.address)
    with pytest.raises(ValueError, match="client: this chapter is itself"):
        run_parts(abs, range(2), client=cluster)
    monkeypatch.setenv(CLUSTER, "tcp://192.0.2.1:8786")
    assert run_parts(abs, range(2), client=cluster) == [0, 1]


def test_divergence_is_told_once_with_the_sweeps_own_numbers():
    rates = {"lr": [0.01, 1e30]}
    for who in ({}, {"workers": 2}):
        with pytest.warns(DivergenceWarning) as caught:
            found = swept(grid=rates, optimiser=SGD(0.1), callbacks=(), **who)
        [told] = [w for w in caught if w.category is DivergenceWarning]
        assert str(told.message) == "3 of 6 members diverged: [3, 4, 5]"
        assert told.filename == __file__
        assert found.diverged.tolist() == [False] * 3 + [True] * 3


def test_bad_input_is_named():
    def work(part):
        return part

    lock = threading.Lock()
    for message, options in {
        "workers, threads: got 0": {"workers": 0},
        "workers, threads: got 1, 0": {"threads": 0},
        "names: got 1 for 2": {"names": ["one"]},
        "client: got str": {"client": "tcp://127.0.0.1:1"},
        "resources: only": {"resources": {"GPU": 1}},
    }.items():
        with pytest.raises(ValueError, match=message):
            run_parts(work, range(2), **options)
    with pytest.raises(ValueError, match="work: holds something"):
        run_parts(lambda part: lock, range(2))
    assert run_parts(work, []) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_no_process_outlives_the_one_that_asked(tmp_path):
    """Not even one that was killed in the middle of a part."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from reappraisal.lab.parts import run_parts

        folder = sys.argv[1]
        run_parts(lambda part: (Path(folder) / f"pid{os.getpid()}").touch()
                  or time.sleep(600), range(2), workers=2)
        """)
    )
    asked = subprocess.Popen([sys.executable, script, tmp_path])
    try:
        until_ = time.monotonic() + 90
        while len(pids := list(tmp_path.glob("pid*"))) < 2:
            assert time.monotonic() < until_ and asked.poll() is None
            time.sleep(0.1)
    finally:
        asked.kill()
        asked.wait()

    def lives(pid):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:
            return False
        return state != "Z"

    until_ = time.monotonic() + 20
    while left := [p for p in pids if lives(p.name[3:])]:
        assert time.monotonic() < until_, left
        time.sleep(0.2)
