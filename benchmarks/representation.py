"""How fast is a table of CKA? Against pairs of layers, one after the other.

Run by hand:  python benchmarks/representation.py
Needs the packages `ckatorch` and `torch_cka`. Writes
benchmarks/results/representation.json.

Twenty layers against twenty layers on 5000 samples, float32. Two networks
share nothing but the samples; in the second task the table is that of one
network's layers among themselves, in the third layers differ in width, and
in the fourth they are narrow. The contenders take one pair after the other:

- loop: what one writes from the definition, and not badly. Activations are
  centred once, and each pair takes the three products in features or in
  samples, whichever is smaller.
- ckatorch: its `cka_base`, which compares kernel matrices in float64.
- torch_cka: its debiased estimate averaged over batches of 250 samples, as
  it holds whole batches of kernel matrices, against our table of the same
  estimate. In the narrow task alone.

Pairs are independent of each other, so that of the loop and of ckatorch some
are timed, spread over the table, and their time is scaled to 400; torch_cka
does them all. Values must agree to 1e-4. Repetitions are interleaved and
ratios are taken within a repetition; their median is reported, beside the
number of floating-point operations and the share of the machine's best rate
(a large square product) at which they are done.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import ckatorch
import torch
import torch_cka
from machine import machine
from torch import nn

from reappraisal.measure.representation import cka_matrix

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
BATCH = 250


def network(widths, samples: int, seed: int) -> list[torch.Tensor]:
    """Activations that share a signal and add noise, layer by layer."""
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    signal = torch.randn(samples, 32, generator=shared)
    layers = []
    for width in widths:
        mixing = torch.randn(32, width, generator=own) / 32**0.5
        noise = torch.randn(samples, width, generator=own)
        layers.append(torch.relu(signal @ mixing + noise))
    return layers


def one_pair(x, y):
    def dot(a, b):
        if max(a.shape[1], b.shape[1]) <= len(a):
            return (a.T @ b).square().sum()
        return ((a @ a.T) * (b @ b.T)).sum()

    return dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()


def loop(xs, ys, pairs):
    xs, ys = ([t - t.mean(0) for t in ts] for ts in (xs, ys))
    return torch.tensor([one_pair(xs[i], ys[j]) for i, j in pairs])


def by_ckatorch(xs, ys, pairs):
    return torch.stack([ckatorch.cka_base(xs[i], ys[j]) for i, j in pairs])


class Recorded(nn.Module):
    """Answers with stored activations, layer by layer."""

    def __init__(self, layers):
        super().__init__()
        self.stored = layers
        self.layers = nn.ModuleList(nn.Identity() for _ in layers)

    def forward(self, rows):
        for layer, stored in zip(self.layers, self.stored, strict=True):
            layer(stored[rows])


def by_torch_cka(xs, ys):
    """Its whole table, [20, 20]."""
    rows = torch.arange(len(xs[0]))
    data = torch.utils.data.TensorDataset(rows)
    data = torch.utils.data.DataLoader(data, BATCH)
    names = [f"layers.{k}" for k in range(len(xs))]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        peer = torch_cka.CKA(
            Recorded(xs), Recorded(ys), "one", "two", names, names
        )
        peer.compare(data, data)
    return peer.export()["CKA"]


def peak(size: int = 2048) -> float:
    """Floating-point operations a second of a large product."""
    a = torch.ones(size, size)
    took = []
    for _ in range(5):
        t0 = clock()
        a @ a
        took.append(clock() - t0)
    return 2 * size**3 / min(took)


def operations(xs, ys, samples: int) -> dict[str, float]:
    """In the products of the loop, and the fewest in those of the table."""
    x, y = ([t.shape[1] for t in ts] for ts in (xs, ys))
    square = sum(d * d for d in x), sum(d * d for d in y)
    cross = sum(x) * sum(y)
    pairwise = cross + len(y) * square[0] + len(x) * square[1]
    if xs is ys:
        features, wide = (cross + square[0]) / 2, sum(x)
    else:
        features, wide = cross + sum(square) / 2, sum(x) + sum(y)
    by_samples = samples / 2 * (wide + len(x) * len(y))
    table = min(features, by_samples)
    return {"loop": 2 * samples * pairwise, "table": 2 * samples * table}


def timed(function, *args):
    t0 = clock()
    found = function(*args)
    return clock() - t0, found


def spread(count: int) -> list[tuple[int, int]]:
    """Different pairs of twenty, each layer about as often."""
    return [(k % 20, (3 * k + k // 20) % 20) for k in range(count)]


def compare(xs, ys, repeat, pairs, few, best) -> dict:
    ways = {"loop": (loop, spread(pairs)), "ckatorch": (by_ckatorch, spread(few))}
    seconds = {"table": [], **{k: [] for k in ways}}
    worst = dict.fromkeys(ways, 0.0)
    for _ in range(repeat):
        took, table = timed(cka_matrix, xs, None if ys is xs else ys)
        seconds["table"].append(took)
        for name, (way, chosen) in ways.items():
            took, values = timed(way, xs, ys, chosen)
            seconds[name].append(took * len(xs) * len(ys) / len(chosen))
            ours = torch.stack([table.values[i, j] for i, j in chosen])
            off = (ours - values).abs().max().item()
            worst[name] = max(worst[name], off)
    assert max(worst.values()) < 1e-4, worst
    flops = operations(xs, ys, len(xs[0]))
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    return {
        **{
            f"times_faster_than_{the}": ratio(seconds, name)
            for name, the in (("loop", "the_loop"), ("ckatorch", "ckatorch"))
        },
        "seconds": middle,
        "worst_difference": max(worst.values()),
        "gigaflop": {k: round(v / 1e9, 1) for k, v in flops.items()},
        "fewer_operations_than_the_loop": flops["loop"] / flops["table"],
        "share_of_peak": {k: f / middle[k] / best for k, f in flops.items()},
    }


def compare_batches(xs, ys, repeat) -> dict:
    seconds = {"table": [], "torch_cka": []}
    for _ in range(repeat):
        took, table = timed(
            lambda: cka_matrix(xs, ys, debiased=True, minibatch=BATCH).values
        )
        seconds["table"].append(took)
        took, values = timed(by_torch_cka, xs, ys)
        seconds["torch_cka"].append(took)
        worst = (table - values).abs().max().item()
        assert worst < 1e-4, worst
    return {
        "times_faster_than_torch_cka": ratio(seconds, "torch_cka"),
        "seconds": {k: statistics.median(v) for k, v in seconds.items()},
        "worst_difference": worst,
    }


def ratio(seconds, name: str) -> float:
    pairs = zip(seconds[name], seconds["table"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=400, help="of the loop")
    parser.add_argument("--few", type=int, default=4, help="of ckatorch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu, with one thread, is fair on a busy machine too",
    )
    parser.add_argument(
        "--out", type=Path,
        default=Path(__file__).parent / "results" / "representation.json",
    )
    a = parser.parse_args()
    global clock
    clock = CLOCKS[a.clock]
    torch.set_num_threads(a.threads)
    started, best, width = machine(torch.get_num_threads()), peak(), a.width
    flat, narrow = [width] * 20, [width // 4] * 20
    mixed = [width // 8, width // 4, width // 2, width] * 5
    first = network(flat, a.samples, 1)
    tasks = {
        f"two networks, width {width}": (first, network(flat, a.samples, 2)),
        f"one network, width {width}": (first, first),
        f"two networks, widths {min(mixed)} to {width}": (
            network(mixed, a.samples, 1), network(mixed, a.samples, 2)
        ),
        f"two networks, width {narrow[0]}": (
            network(narrow, a.samples, 1), network(narrow, a.samples, 2)
        ),
    }
    results = {}
    for name, (xs, ys) in tasks.items():
        results[name] = compare(xs, ys, a.repeat, a.pairs, a.few, best)
        print(name, json.dumps(results[name]), flush=True)
    name = f"debiased, batches of {BATCH}, width {narrow[0]}"
    batches = {name: compare_batches(xs, ys, a.repeat)}
    print(name, json.dumps(batches[name]))
    report = {
        "task": "linear CKA of 20 x 20 layers on "
        f"{a.samples} samples, float32",
        "results": results,
        "batches": batches,
        "matmul_peak_gflops": best / 1e9,
        "pairs_timed": {"loop": a.pairs, "ckatorch": a.few},
        "repetitions": a.repeat,
        "clock": a.clock,
        "machine": started,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ckatorch": version("ckatorch"),
            "torch_cka": version("torch_cka"),
        },
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
