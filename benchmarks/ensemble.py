"""How fast is the stacked trainer? Against PyTorch alone, vmap and JAX.

Run by hand on a quiet machine:  python benchmarks/ensemble.py
Needs the extra `bench`. Writes benchmarks/results/ensemble.json, which the
chapter lab/how_fast shows.

Every contender trains the same 32 networks from the same weights on the same
minibatches; that they arrive at the same place is checked (but for single
members where rounding put a ReLU on the other side of zero). Repetitions are
interleaved, and one during which another process used the machine is thrown
away and repeated; ratios are taken within a repetition, and their median is
reported. Compilation,
initialisation and the drawing of minibatches are not counted against the
others; ours counts its minibatches.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import machine

from reappraisal.lab.data import load
from reappraisal.lab.ensemble import SGD, Batches, Ensemble, train
from reappraisal.lab.models import mlp

SIZES = [64, 64, 64, 10]
LR, MOMENTUM = 0.05, 0.9
FULL = 1437


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import jax

        found["jax"] = jax.__version__
    except ImportError:
        pass
    return found


def peak(repeat: int = 5) -> float:
    """GFLOP/s of the best large matrix product in float32."""
    best = 0.0
    for n in (1024, 2048):
        a = torch.randn(n, n)
        a @ a
        for _ in range(repeat):
            t0 = time.perf_counter()
            for _ in range(5):
                a @ a
            best = max(best, 5 * 2 * n**3 / (time.perf_counter() - t0))
    return best / 1e9


def flops(members: int, rows: int) -> float:
    """Multiplications and additions in the matrix products of a step."""
    weights = [a * b for a, b in pairwise(SIZES)]
    return members * rows * 2 * (3 * sum(weights) - weights[0])


def busy() -> float:
    """CPU seconds that all processes have used since the machine started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal, *_ = map(
        int, stat.read_text().splitlines()[0].split()[1:]
    )
    ticks = user + nice + system + irq + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def undisturbed(run, patience: float):
    """`run()` at a moment when nobody else used the processor.

    A run during which other processes took more than a twentieth of one core
    is thrown away and repeated, for at most `patience` seconds.
    """
    until = time.monotonic() + patience
    gc.collect()
    while True:
        before = busy()
        time.sleep(0.2)
        hopeless = time.monotonic() > until
        if busy() - before > 0.03 and not hopeless:
            continue
        before, own = busy(), sum(os.times()[:2])
        t0 = time.perf_counter()
        out = run()
        wall = time.perf_counter() - t0
        others = busy() - before - (sum(os.times()[:2]) - own)
        quiet = others < 0.03 + 0.05 * wall
        if quiet or hopeless:
            return out, quiet


def orders(seeds, x, y, rows, steps) -> torch.Tensor:
    """The minibatches that the stacked trainer will draw, `[T, S, B]`."""
    batches = Batches(x, y, seeds, rows)
    members = torch.arange(len(seeds))
    return torch.stack([batches(t, members).rows for t in range(steps)])


def serial(modules, x, y, order, steps):
    """One network after the other, in plain PyTorch."""
    modules = [copy.deepcopy(m).train() for m in modules]
    t0 = time.perf_counter()
    for s, module in enumerate(modules):
        optimiser = torch.optim.SGD(module.parameters(), LR, momentum=MOMENTUM)
        for t in range(steps):
            bx, by = x, y
            if order is not None:
                bx, by = x[order[t, s]], y[order[t, s]]
            loss = F.cross_entropy(module(bx), by)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return time.perf_counter() - t0, Ensemble.of(modules).params


def stacked(engine):
    def run(net, x, y, seeds, rows, steps):
        out = train(
            net,
            (x, y),
            seeds=seeds,
            steps=steps,
            batch_size=rows,
            optimiser=SGD(LR, momentum=MOMENTUM),
            engine=engine,
        )
        return out.seconds, out.params

    return run


def jax_runner(start, x, y, order, steps):
    """The same training in JAX: jit of vmap of scan."""
    import jax
    import jax.numpy as jnp

    def apply(p, x):
        *hidden, (w, b) = p
        for v, c in hidden:
            x = jax.nn.relu(x @ v + c)
        return x @ w + b

    def loss(p, x, y):
        logp = jax.nn.log_softmax(apply(p, x))
        return -jnp.take_along_axis(logp, y[:, None], 1).mean()

    def member(p, rows, x, y):
        def step(carry, i):
            p, v = carry
            bx, by = (x, y) if order is None else (x[i], y[i])
            value, g = jax.value_and_grad(loss)(p, bx, by)
            v = jax.tree.map(lambda v, g: MOMENTUM * v + g, v, g)
            p = jax.tree.map(lambda p, v: p - LR * v, p, v)
            return (p, v), value

        zero = jax.tree.map(jnp.zeros_like, p)
        return jax.lax.scan(step, (p, zero), rows)

    names = list(start)
    p = [
        (jnp.asarray(start[w].mT.numpy()), jnp.asarray(start[b].numpy()))
        for w, b in zip(names[::2], names[1::2], strict=True)
    ]
    if order is None:
        rows = jnp.zeros((len(p[0][0]), steps), jnp.int32)
    else:
        rows = jnp.asarray(order.transpose(0, 1).numpy().astype(np.int32))
    x, y = jnp.asarray(x.numpy()), jnp.asarray(y.numpy().astype(np.int32))
    compiled = jax.jit(jax.vmap(member, in_axes=(0, 0, None, None)))
    jax.block_until_ready(compiled(p, rows, x, y))

    def run():
        t0 = time.perf_counter()
        (q, _), _ = jax.block_until_ready(compiled(p, rows, x, y))
        seconds = time.perf_counter() - t0
        flat = [torch.tensor(np.asarray(a)) for pair in q for a in pair]
        found = {
            n: a.mT if n.endswith("weight") else a
            for n, a in zip(names, flat, strict=True)
        }
        return seconds, found

    return run


def compare(members, rows, steps, args, x, y, log) -> dict:
    """All contenders on one setting."""
    seeds = list(range(1000, 1000 + members))
    net = mlp(SIZES)
    begin = train(net, (x, y), seeds=seeds, steps=0, optimiser=SGD(LR))
    modules = [begin.member(i) for i in range(members)]
    order = None if rows is None else orders(seeds, x, y, rows, steps)
    contenders = {
        "stacked": lambda: stacked("auto")(net, x, y, seeds, rows, steps),
        "vmap": lambda: stacked("vmap")(net, x, y, seeds, rows, steps),
        "serial": lambda: serial(modules, x, y, order, steps),
    }
    if not args.no_jax:
        contenders["jax"] = jax_runner(begin.params, x, y, order, steps)
    seconds: dict[str, list] = {k: [] for k in contenders}
    reference, far, disturbed = None, torch.zeros(members), 0
    for r in range(args.repeat + 1):
        for name, run in contenders.items():
            patience = args.patience if r else 0
            (spent, params), quiet = undisturbed(run, patience)
            if r == 0:  # to warm up, and to see that all do the same
                reference = reference or params
                for k, v in reference.items():
                    apart = (params[k] - v).abs().flatten(1).amax(1)
                    far = torch.maximum(far, apart / v.abs().max())
            else:
                seconds[name].append(spent)
                disturbed += not quiet
    if far.median() > 1e-5:
        raise RuntimeError(f"contenders disagree: {far.tolist()}")
    ours = seconds["stacked"]
    work = flops(members, rows or FULL) * steps
    result = {
        "members": members,
        "batch": rows or FULL,
        "steps": steps,
        "seconds": seconds,
        "disturbed_timings": disturbed,
        "speedup_over": {
            k: statistics.median(
                b / a for a, b in zip(ours, v, strict=True)
            )
            for k, v in seconds.items()
            if k != "stacked"
        },
        "microseconds_per_step": {
            k: 1e6 * statistics.median(v) / steps for k, v in seconds.items()
        },
        "gflops": {
            k: work / statistics.median(v) / 1e9 for k, v in seconds.items()
        },
        "median_relative_difference": far.median().item(),
        "members_that_parted": int((far > 1e-3).sum()),
    }
    short = {k: round(v, 2) for k, v in result["speedup_over"].items()}
    log(f"batch {rows or FULL}: {short}")
    return result


def scaling(counts, rows, steps, args, x, y, log) -> list[dict]:
    """Networks trained per second as the stack grows."""
    net, out = mlp(SIZES), []
    for members in counts:
        times = []
        seeds = range(1000, 1000 + members)
        for _ in range(3):
            (spent, _), _ = undisturbed(
                partial(stacked("auto"), net, x, y, seeds, rows, steps),
                args.patience,
            )
            times.append(spent)
        seconds = statistics.median(times)
        out.append({"members": members, "seconds": seconds})
        log(f"{members} members: {1e6 * seconds / steps / members:.1f} us each")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--patience", type=float, default=30)
    parser.add_argument("--no-jax", action="store_true")
    here = Path(__file__).parent / "results" / "ensemble.json"
    parser.add_argument("--out", type=Path, default=here)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    digits = load("digits")
    x, y = digits.X[:FULL].contiguous(), digits.y[:FULL].contiguous()
    settings = [(32, 32, 200), (32, 128, 60), (32, None, 10)]
    peaks = [undisturbed(peak, args.patience)[0]]
    report = {
        "schema": "reappraisal.benchmark/1",
        "what": "training 32 MLPs 64-64-64-10 on 8x8 digits, "
        "SGD with momentum, float32",
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "comparisons": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        report["matmul_peak_gflops"] = best = max(peaks)
        for result in report["comparisons"]:
            result["fraction_of_peak"] = {
                k: v / best for k, v in result["gflops"].items()
            }
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    for members, rows, steps in settings:
        found = compare(members, rows, steps, args, x, y, print)
        report["comparisons"].append(found)
        peaks.append(undisturbed(peak, args.patience)[0])
        write()
    counts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    runs = scaling(counts, 32, 100, args, x, y, print)
    report["scaling"] = {"batch": 32, "steps": 100, "runs": runs}
    write()
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
