"""The stacked trainer against PyTorch's own optimisers, one net at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import (
    SGD,
    Adam,
    AdamW,
    Batches,
    DivergenceWarning,
    Ensemble,
    Trace,
    cosine,
    first_step,
    fit,
    sweep,
    train,
    until,
)
from reappraisal.lab.models import generator, mlp, reset
from reappraisal.protocol.cache import Damaged

torch.set_num_threads(1)
D = torch.float64


def data(n=60, d=5, classes=3, seed=0):
    g = generator(seed, "test")
    x = torch.randn(n, d, generator=g, dtype=D)
    y = (x @ torch.randn(d, classes, generator=g, dtype=D)).argmax(1)
    return x, y


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def serial(seed, xy, steps, batch_size, make, clip=None, schedule=None):
    module = reset(net(), seed).to(D)
    optimiser = make(module.parameters())
    base = [g["lr"] for g in optimiser.param_groups]
    batches = Batches(*xy, [seed], batch_size)
    for t in range(steps):
        if schedule:
            for group, lr in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = lr * schedule(t)
        batch = batches(t, torch.zeros(1, dtype=torch.long))
        optimiser.zero_grad()
        F.cross_entropy(module(batch.x[0]), batch.y[0]).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimiser.step()
    return dict(module.named_parameters())


OPTIMISERS = {
    "sgd": (SGD(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "momentum": (
        SGD(0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        SGD(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (
        Adam(0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    ),
    "adamw": (
        AdamW(0.01, weight_decay=0.5, beta1=0.8, beta2=0.98),
        lambda p: torch.optim.AdamW(
            p, 0.01, betas=(0.8, 0.98), weight_decay=0.5
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_member_equals_the_same_run_alone(name, batch_size):
    ours, theirs = OPTIMISERS[name]
    xy = data()
    stack = train(
        net(), xy, seeds=[3, 4, 5], steps=30, batch_size=batch_size,
        optimiser=ours, dtype=D,
    )  # fmt: skip
    for i, seed in enumerate([3, 4, 5]):
        for key, value in serial(seed, xy, 30, batch_size, theirs).items():
            torch.testing.assert_close(
                stack.params[key][i], value.detach(), rtol=1e-9, atol=1e-11
            )


def run(seeds=(3, 4, 5), steps=20, **options):
    options = {
        "batch_size": 16,
        "optimiser": SGD(0.1, momentum=0.9),
        "dtype": D,
        **options,
    }
    model = options.pop("model", None) or net()
    return train(
        model, options.pop("xy", None) or data(), seeds=seeds, steps=steps,
        **options,
    )  # fmt: skip


def same(a, b, rows_a=slice(None), rows_b=slice(None), tight=True):
    tolerance = (1e-10, 1e-12) if tight else (0, 0)
    for key, value in a.params.items():
        torch.testing.assert_close(
            value[rows_a], b.params[key][rows_b],
            rtol=tolerance[0], atol=tolerance[1], equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["chain", "vmap"])
def test_clipping_and_schedule_equal_pytorch(engine):
    xy = data()
    stack = run(
        xy=xy, engine=engine, clip=0.05, schedule=cosine(20, 5),
        optimiser=AdamW(0.05, weight_decay=0.1),
    )  # fmt: skip
    alone = serial(
        4, xy, 20, 16,
        lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
        clip=0.05, schedule=cosine(20, 5),
    )  # fmt: skip
    for key, value in alone.items():
        torch.testing.assert_close(
            stack.params[key][1], value.detach(), rtol=1e-9, atol=1e-11
        )


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "deep": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU()),
        nn.Identity(),
        nn.Linear(4, 6),
        nn.Sigmoid(),
        nn.Linear(6, 3),
        nn.Tanh(),
    ),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": None},
        {"smoothing": 0.2},
        {"loss": lambda out, y: (out.exp().sum(-1) + y).sqrt()},
        {"trainable": "last"},
        {"decay": "first", "optimiser": AdamW(0.01, weight_decay=1.0)},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_the_fast_path_is_the_general_path(layers, options):
    model, options = LAYERS[layers](), dict(options)
    names = [n for n, _ in model.named_parameters()]
    for key, at in {"trainable": -2, "decay": 0}.items():
        if key in options:
            options[key] = [names[at]]
    a = run(model=model, engine="chain", **options)
    b = run(model=model, engine="vmap", **options)
    same(a, b)
    torch.testing.assert_close(
        a.history["loss"].values, b.history["loss"].values
    )


def test_long_batches_are_worked_through_in_blocks():
    xy = data(n=1300)
    a, b = (
        run(xy=xy, steps=3, batch_size=None, engine=e)
        for e in ("chain", "vmap")
    )
    same(a, b)


@pytest.mark.parametrize("kind", ["soft", "values"])
@pytest.mark.parametrize("own", [(), ("y",), ("x", "y")])
def test_targets_of_their_own(kind, own):
    x, _ = data()
    xs = torch.stack([x, x + 1, x * 2]) if "x" in own else x
    y = torch.rand(3, 60, 3, generator=generator(1), dtype=D).softmax(-1)
    y = y if own else y[0]
    loss = "mse" if kind == "values" else "cross_entropy"
    for engine in ("chain", "vmap"):
        stack = run(xy=(xs, y), per_member=own, loss=loss, engine=engine)
        for i, seed in enumerate((3, 4, 5)):
            alone = run(
                seeds=[seed],
                xy=(xs[i] if "x" in own else x, y[i] if own else y),
                loss=loss, engine=engine,
            )  # fmt: skip
            same(stack, alone, i, 0)


def test_rows_of_their_own():
    x, y = data()
    rows = torch.stack([torch.arange(40) + k for k in (0, 10, 20)])
    stack = run(rows=rows)
    for i, seed in enumerate((3, 4, 5)):
        same(stack, run(seeds=[seed], xy=(x[rows[i]], y[rows[i]])), i, 0)


def test_targets_may_be_a_dict():
    x, y = data()
    teacher = torch.rand(60, 3, generator=generator(1), dtype=D)

    def loss(out, targets):
        hard = F.one_hot(targets["label"], 3)
        mixed = 0.5 * hard + 0.5 * targets["teacher"]
        return -(mixed * out.log_softmax(-1)).sum(-1)

    mixed = 0.5 * F.one_hot(y, 3) + 0.5 * teacher
    for engine in ("chain", "vmap"):
        a = run(
            xy=(x, {"label": y, "teacher": teacher}), loss=loss, engine=engine
        )
        same(a, run(xy=(x, mixed), engine=engine))


@settings(max_examples=15, deadline=None)
@given(
    st.permutations([3, 4, 5, 6]),
    st.lists(st.floats(0.001, 0.3), min_size=4, max_size=4),
    st.sampled_from([SGD(0.1, momentum=0.9), AdamW(0.1, weight_decay=0.1)]),
)
def test_members_do_not_see_each_other(order, rates, optimiser):
    """Permuting members permutes results; leaving some out changes none."""
    rate = dict(zip([3, 4, 5, 6], rates, strict=True))
    make = {
        s: type(optimiser)(**{**vars(optimiser), "lr": [rate[k] for k in s]})
        for s in [(3, 4, 5, 6), tuple(order), tuple(order[:2])]
    }
    runs = {s: run(seeds=s, steps=8, optimiser=o) for s, o in make.items()}
    whole = runs[3, 4, 5, 6]
    for seeds, some in runs.items():
        same(whole, some, [s - 3 for s in seeds], slice(None))


def test_hyperparameter_vectors_equal_separate_runs():
    values = {
        "lr": [0.01, 0.05, 0.02],
        "weight_decay": [0.0, 0.5, 0.1],
        "beta1": [0.5, 0.9, 0.8],
        "beta2": [0.9, 0.99, 0.95],
        "eps": [1e-8, 1e-4, 1e-6],
    }
    for kind in (Adam, AdamW):
        stack = run(optimiser=kind(**values))
        for i, seed in enumerate((3, 4, 5)):
            own = kind(**{k: v[i] for k, v in values.items()})
            same(stack, run(seeds=[seed], optimiser=own), i, 0)
    stack = run(
        optimiser=SGD([0.1, 0.2, 0.3], momentum=[0.0, 0.9, 0.5]),
        clip=[0.1, 10.0, 1.0],
    )
    alone = run(seeds=[4], optimiser=SGD(0.2, momentum=0.9), clip=10.0)
    same(stack, alone, 1, 0)


@pytest.mark.parametrize("optimiser", [o for o, _ in OPTIMISERS.values()])
@pytest.mark.parametrize("engine", ["chain", "vmap"])
def test_masks_stay_zero(optimiser, engine):
    mask = torch.rand(3, 8, 5, generator=generator(0)) < 0.3
    stack = run(masks={"0.weight": mask}, optimiser=optimiser, engine=engine)
    assert stack.params["0.weight"][~mask].eq(0).all()
    assert stack.params["0.weight"][mask].ne(0).all()


def test_what_is_not_trainable_does_not_move():
    start = run(steps=0)
    stack = run(trainable=["2.weight"], optimiser=AdamW(0.1, weight_decay=1.0))
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(stack.params[name], start.params[name])
    assert not torch.equal(stack.params["2.weight"], start.params["2.weight"])


@pytest.mark.parametrize("optimiser", [o for o, _ in OPTIMISERS.values()])
def test_a_stopped_member_is_frozen_where_it_stopped(optimiser):
    at = {3: 4, 4: 9, 5: 100}

    def stop(state):
        seeds = state.members + 3
        state.stop(torch.tensor([at[int(s)] <= state.step for s in seeds]))

    stack = run(callbacks=stop, every=1, optimiser=optimiser, steps=15)
    assert stack.stopped_at.tolist() == [4, 9, 15]
    for i, (seed, steps) in enumerate(zip(at, (4, 9, 15), strict=True)):
        alone = run(seeds=[seed], steps=steps, optimiser=optimiser)
        same(stack, alone, i, 0)
    loss = stack.history["loss"].values
    assert loss.isnan().sum(1).tolist() == [11, 6, 0]


def test_stopping_takes_own_data_masks_and_rates_along():
    x, _ = data()
    y = torch.rand(3, 60, 3, generator=generator(1), dtype=D)
    mask = torch.rand(3, 8, 5, generator=generator(0)) < 0.5

    def first_leaves(state):
        state.stop((state.members == 0) & (state.step >= 5))

    options = {
        "xy": (x, y), "per_member": ["y"], "loss": "mse",
        "masks": {"0.weight": mask}, "every": 1,
        "optimiser": AdamW([0.1, 0.2, 0.3], weight_decay=[0.1, 0.2, 0.3]),
    }  # fmt: skip
    same(
        run(callbacks=first_leaves, **options), run(**options),
        slice(1, 3), slice(1, 3),
    )  # fmt: skip


def test_until_stops_when_it_has_held():
    stack = run(
        steps=200, every=5, watch={"test": data()},
        callbacks=until("test_accuracy", lambda a: a >= 0.9, hold=3),
    )  # fmt: skip
    when = stack.history["test_accuracy"].first(lambda a: a >= 0.9, hold=3)
    assert when.event.all()
    assert (when.time + 10 == stack.stopped_at.numpy()).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1),
    st.integers(1, 7),
)
def test_first_step_by_brute_force(rows, hold):
    values = torch.tensor(rows).float()
    found = first_step(
        Trace(torch.arange(6) * 10, values), lambda v: v > 0.5, hold
    )
    for row, time, event in zip(rows, found.time, found.event, strict=True):
        starts = [k for k in range(7 - hold) if all(row[k : k + hold])]
        assert event == bool(starts)
        assert time == (10 * starts[0] if starts else 50)


def test_one_divergence_is_reported_and_harms_nobody():
    with pytest.warns(DivergenceWarning, match=r"1 of 3 .* \[1\]"):
        stack = run(
            steps=60, loss="mse", xy=(data()[0], data()[0][:, :3]),
            model=nn.Linear(5, 3), optimiser=SGD([0.1, 1e4, 0.1]),
        )  # fmt: skip
    assert stack.diverged.tolist() == [False, True, False]
    assert 0 < stack.stopped_at[1] < 60
    for i in (0, 2):
        alone = run(
            seeds=[3 + i], steps=60, loss="mse", model=nn.Linear(5, 3),
            xy=(data()[0], data()[0][:, :3]), optimiser=SGD(0.1),
        )  # fmt: skip
        same(stack, alone, i, 0)


@pytest.mark.parametrize("engine", ["chain", "vmap"])
def test_same_seed_same_bits_and_nothing_else_touched(engine):
    model, xy = net().to(D), data()
    before = copy.deepcopy(model.state_dict())
    kept = [t.clone() for t in xy]
    state = torch.random.get_rng_state()
    a = run(model=model, xy=xy, engine=engine)
    b = run(model=model, xy=xy, engine=engine)
    same(a, b, tight=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(torch.equal(t, k) for t, k in zip(xy, kept, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_init_and_order_are_separate_streams():
    """Another architecture from the same seed sees the same batches."""
    rows = []

    def note(state):
        rows.append(state.batch.rows)

    run(steps=4, callbacks=note, every=1)
    run(steps=4, callbacks=note, every=1, model=nn.Linear(5, 3))
    for a, b in zip(rows[:5], rows[5:], strict=True):
        assert torch.equal(a, b)


def test_checkpoints_are_earlier_runs():
    stack = run(checkpoints=[0, 7])
    same(stack.at(7), run(steps=7))
    same(stack.at(0), run(steps=0))


def test_training_goes_on_from_an_ensemble():
    plain = {"batch_size": None, "optimiser": SGD(0.1)}
    once = run(steps=20, **plain)
    twice = run(model=run(steps=12, **plain), steps=8, **plain)
    same(once, twice)


def test_factories_and_functions_as_init():
    def make(seed):
        return reset(net(), seed)

    same(run(model=make), run())
    same(run(init=reset), run())
    start = run(init="same", steps=0).params["0.weight"]
    assert torch.equal(start[0], start[1])


def test_decay_by_a_function_of_the_stack():
    def shrink(params, rate):
        params["0.weight"].mul_((1 - rate)[:, None, None])

    optimiser = AdamW(0.01, weight_decay=[0.0, 0.5, 1.0])
    same(
        run(decay=shrink, optimiser=optimiser),
        run(decay=["0.weight"], optimiser=optimiser),
    )


def test_an_optimiser_of_ones_own():
    """Sharpness-aware minimisation fits into the two methods."""

    class SAM(SGD):
        def gradient(self, p, g, h, compute):
            value = compute()
            norm = g.flat.norm(dim=1, keepdim=True)
            step = g.flat * (0.05 / norm)
            p.flat.add_(step)
            compute()
            p.flat.sub_(step)
            return value

    xy = data()
    stack = run(xy=xy, optimiser=SAM(0.2), steps=5, batch_size=None)
    module = reset(net(), 4).to(D)
    for _ in range(5):
        params = list(module.parameters())
        loss = F.cross_entropy(module(xy[0]), xy[1])
        grads = torch.autograd.grad(loss, params)
        norm = torch.stack([g.norm() for g in grads]).norm()
        away = [p + 0.05 * g / norm for p, g in zip(params, grads, strict=True)]
        names = [n for n, _ in module.named_parameters()]
        out = torch.func.functional_call(
            module, dict(zip(names, away, strict=True)), (xy[0],)
        )
        grads = torch.autograd.grad(F.cross_entropy(out, xy[1]), away)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 0.2 * g
    for key, value in module.named_parameters():
        torch.testing.assert_close(stack.params[key][1], value.detach())


def test_callbacks_see_the_batch_they_are_told_of():
    """Looking at other data of the same size leaves `aux` alone."""
    x, y = data(n=16)

    def look(state):
        before = state.aux["outputs"].clone()
        other = state.outputs(x + 1)
        assert torch.equal(before, state.aux["outputs"])
        assert not torch.equal(before, other)
        losses = F.cross_entropy(
            before.flatten(0, 1), state.batch.y.flatten(), reduction="none"
        )
        torch.testing.assert_close(
            losses.view(before.shape[:2]).mean(1), state.loss
        )

    for engine in ("chain", "vmap"):
        run(steps=4, every=1, callbacks=look, engine=engine)


def test_the_low_level_takes_any_loss():
    start = torch.randn(4, 6, generator=generator(0), dtype=D)
    target = torch.randn(4, 6, generator=generator(1), dtype=D)
    seen = []

    def loss(params, batch):
        gap = params["x"] - batch["target"]
        return gap.square().sum(1), {"gap": gap}

    def look(state):
        assert not state.aux["gap"].requires_grad
        state.record("far", state.aux["gap"].abs().amax(1))
        seen.append((state.step, len(state.members)))
        state.stop(state.recorded("far") < 1e-3)

    out = fit(
        {"x": start}, loss, optimiser=SGD([0.1, 0.2, 0.3, 0.4]), steps=50,
        per_member={"target": target}, callbacks=look,
    )  # fmt: skip
    gap = (start - target).abs().amax(1)
    rate = 1 - 2 * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
    need = (math.log(1e-3) - gap.log()) / rate.log()
    assert out.stopped_at.tolist() == need.ceil().clamp(max=50).tolist()
    assert [s for s, _ in seen] == list(range(len(seen)))
    assert torch.equal(start, torch.randn(4, 6, generator=generator(0), dtype=D))


def test_ensembles_slice_predict_map_and_travel(tmp_path):
    stack = run(
        optimiser=SGD([0.1, 0.2, 0.3]), watch={"test": data(seed=1)},
        checkpoints=[5],
    )  # fmt: skip
    x, y = data(seed=2)
    out = stack.predict(x, batch_size=7)
    assert out.shape == (3, 60, 3) and len(stack) == 3
    for i in range(3):
        member = stack.member(i)
        torch.testing.assert_close(out[i], member(x).detach())
        score = stack.evaluate(x, y)
        torch.testing.assert_close(
            score.loss[i], F.cross_entropy(member(x), y).detach()
        )
        hits = (member(x).argmax(1) == y).double().mean()
        assert score.accuracy[i] == hits
    picked = stack[[2, 0]]
    assert picked.seeds == (5, 3) and picked.hyper["lr"].tolist() == [0.3, 0.1]
    assert torch.equal(picked.predict(x)[0], stack.predict(x)[2])
    assert stack.where(lr=0.2).seeds == (4,)
    norms = stack.map(lambda m: m[0].weight.norm().item())
    torch.testing.assert_close(
        norms.double(), stack.params["0.weight"].flatten(1).norm(dim=1),
        check_dtype=False, rtol=1e-6, atol=0,
    )  # fmt: skip
    stack.save(tmp_path / "e.safetensors")
    again = Ensemble.load(tmp_path / "e.safetensors", net())
    same(stack, again, tight=False)
    same(stack.at(5), again.at(5), tight=False)
    assert again.seeds == stack.seeds and repr(again) == repr(stack)
    for name, trace in stack.history.items():
        assert torch.equal(
            trace.values.nan_to_num(), again.history[name].values.nan_to_num()
        )
    with pytest.raises(ValueError, match="template"):
        Ensemble.load(tmp_path / "e.safetensors", nn.Linear(2, 2))
    whole = (tmp_path / "e.safetensors").read_bytes()
    for damage in (whole[:-9], whole[:20], b"", whole[:-1] + b"?"):
        (tmp_path / "bad").write_bytes(damage)
        with pytest.raises(Damaged):
            Ensemble.load(tmp_path / "bad", net())


def test_a_sweep_is_its_cells():
    grid = {"lr": [0.01, 0.1], "momentum": [0.0, 0.9]}
    options = {
        "grid": grid, "seeds": [3, 4, 5], "steps": 10, "batch_size": 16,
        "optimiser": SGD(0.1, nesterov=True), "dtype": D,
        "rows": torch.stack([torch.arange(40) + k for k in (0, 10, 20)]),
    }  # fmt: skip
    whole = sweep(net(), data(), **options)
    assert len(whole) == 12
    for chunk in (2, 5, 7):
        same(whole, sweep(net(), data(), chunk=chunk, **options), tight=False)
    tiny = sweep(net(), data(), memory=40_000, **options)
    same(whole, tiny)
    cell = whole.where(lr=0.1, momentum=0.9)
    assert cell.seeds == (3, 4, 5)
    alone = run(
        seeds=[3, 4, 5], steps=10, rows=options["rows"],
        optimiser=SGD(0.1, momentum=0.9, nesterov=True),
    )  # fmt: skip
    same(cell, alone)


X, Y = data()
BAD = {
    "seed: got 1.5": {"seeds": [1.5]},
    "seed: got -1": {"seeds": [-1]},
    "seeds: empty": {"seeds": []},
    "lr": {"optimiser": SGD([0.1, 0.2])},
    "momentum": {"optimiser": SGD(0.1, momentum=[0.9])},
    "weight_decay": {"optimiser": SGD(0.1, weight_decay=math.nan)},
    "batch_size": {"batch_size": 61},
    "batch_size: got 0": {"batch_size": 0},
    "data: x is empty": {"xy": (X[:0], Y[:0])},
    "data: x holds nan": {"xy": (X * math.nan, Y)},
    "60 rows and y has 59": {"xy": (X, Y[:59])},
    "labels 0..7": {"xy": (X, Y.clamp(max=1) * 7)},
    "labels -1": {"xy": (X, Y - 1)},
    "labels of shape": {"xy": (X, Y[:, None])},
    "probabilities of shape": {"xy": (X, Y.double())},
    "checkpoints": {"checkpoints": [21]},
    "schedule": {"schedule": lambda t: torch.ones(2)},
    "per_member": {"per_member": ["z"]},
    "x is per member": {"per_member": ["x"]},
    "rows": {"rows": torch.zeros(2, 5, dtype=torch.long)},
    "rows: outside": {"rows": torch.full((3, 16), 60)},
    "loss": {"loss": "hinge"},
    "one loss per sample": {"loss": lambda out, y: out.sum()},
    "masks": {"masks": {"0.weight": torch.ones(2, 2)}},
    "no parameter": {"masks": {"weight": torch.ones(2, 2)}},
    "trainable": {"trainable": ["first"]},
    "trainable: empty": {"trainable": []},
    "decay": {"decay": lambda p, r: None},
    "engine": {"engine": "fast"},
    "no plain chain": {
        "engine": "chain",
        "model": nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)),
    },
    "running statistics": {
        "model": nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    },
    "global random": {"model": nn.Sequential(nn.Linear(5, 3), nn.Dropout())},
    "init": {"init": "zeros"},
    "steps": {"steps": -1},
    "clip": {"clip": [1.0]},
    "smoothing": {"smoothing": 0.1, "loss": "mse"},
    "targets: shape": {"loss": "mse", "xy": (X, X)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        run(**BAD[message])


def test_bad_input_of_the_low_level():
    good = {"x": torch.zeros(3, 2)}

    def loss(params, batch):
        return params["x"].sum(1)

    for message, params in {
        "params: empty": {},
        "agree": {"a": torch.zeros(3, 2), "b": torch.zeros(2, 2)},
        "S >= 1": {"a": torch.zeros(0, 2)},
        "float": {"x": torch.zeros(3, 2, dtype=torch.long)},
    }.items():
        with pytest.raises(ValueError, match=message):
            fit(params, loss, optimiser=SGD(0.1), steps=1)
    with pytest.raises(ValueError, match="loss: gave shape"):
        fit(good, lambda p, b: p["x"].sum(), optimiser=SGD(0.1), steps=1)
    with pytest.raises(ValueError, match="per_member"):
        fit(
            good, loss, optimiser=SGD(0.1), steps=1,
            per_member={"y": torch.zeros(2)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="which"):
        fit(
            good, loss, optimiser=SGD(0.1), steps=1,
            callbacks=lambda s: s.stop(torch.tensor([1, 0, 0])),
        )  # fmt: skip


@pytest.mark.parametrize("shared", ["activation", "layer"])
def test_modules_that_occur_twice_are_computed_twice(shared):
    torch.manual_seed(0)
    act, layer = nn.ReLU(), nn.Linear(5, 5, dtype=D)
    other = layer if shared == "layer" else nn.Linear(5, 5, dtype=D)
    out = nn.Linear(5, 3, dtype=D)
    model = nn.Sequential(layer, act, other, act, out)
    x, y = data()
    ensemble = train(
        model, (x, y), seeds=[7], steps=3, optimiser=SGD(lr=0.1), init="same"
    )
    single = copy.deepcopy(model)
    optimiser = torch.optim.SGD(single.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(single(x), y).backward()
        optimiser.step()
    torch.testing.assert_close(
        ensemble.predict(x)[0], single(x).detach(), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    "optimiser", [SGD(0.05, momentum=0.9), AdamW(0.01, weight_decay=0.1)],
    ids=str,
)
def test_masks_set_in_the_middle_of_training_hold(optimiser):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=g), torch.arange(40) % 3
    keep = torch.rand(2, 5, 6, generator=g) < 0.5

    def prune(state):
        if state.step == 7:
            state.set_masks({"1.weight": keep})

    done = train(mlp([6, 5, 3]), data, seeds=[1, 2], steps=20, batch_size=8,
                 optimiser=optimiser, callbacks=prune, every=1)
    assert not done.params["1.weight"][~keep].any()
    assert done.params["1.weight"][keep].all()
