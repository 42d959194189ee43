"""Corruptions, margins and stability against closed forms and by hand."""

import copy
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab import models
from reappraisal.lab.data import load
from reappraisal.lab.ensemble import Ensemble
from reappraisal.measure.reading import read_outputs
from reappraisal.measure.robustness import (
    CORRUPTIONS,
    Units,
    adversarial_accuracy,
    corrupt,
    corrupted,
    corruption_curve,
    first_order,
    group_accuracy,
    input_jacobian,
    input_map,
    local_lipschitz,
    margins,
    natural,
    noise_stability,
    normalised_margins,
    value_and_jacobian,
)

KINDS = list(CORRUPTIONS)
IMAGE = natural((1, 8, 8))


def images(n=4, c=1, h=8, w=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, c, h, w, generator=g).double()


def ensemble(build=None, n=3):
    build = build or (lambda s: models.mlp([6, 8, 4], seed=s))
    return Ensemble.of([build(s) for s in range(n)])


def rows(n=12, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randint(
        0, 4, (n,), generator=g
    )


# corruptions


@pytest.mark.parametrize("kind", KINDS)
def test_severity_zero_is_the_identity_and_seeds_decide(kind):
    x = images()
    assert torch.equal(corrupt(x, kind, 0, 0), x)
    a, b = corrupt(x, kind, 3, 5), corrupt(x, kind, 3, 5)
    assert torch.equal(a, b)
    assert a.dtype == x.dtype and 0 <= a.min() and a.max() <= 1
    before = torch.get_rng_state()
    corrupt(x, kind, 5, 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_farther_from_the_clean_image_with_severity(kind):
    x = load("digits").X[:200].double()
    far = [
        (corrupt(x, kind, s, 0, item=(1, 8, 8)) - x).square().mean().item()
        for s in range(6)
    ]
    assert far[0] == 0
    assert all(b > a for a, b in zip(far[:-1], far[1:], strict=True)), far


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), low=st.floats(-5, 5), w=st.floats(0.1, 9))
@settings(max_examples=5, deadline=None)
def test_units_carry_through(kind, seed, low, w):
    x = images(2, seed=seed)
    plain = corrupt(x, kind, 2, seed)
    moved = corrupt(low + w * x, kind, 2, seed, units=Units(low, low + w))
    # JPEG rounds to grey levels, and a tie may fall on either side
    atol = 0.05 if kind == "jpeg" else 1e-9
    assert torch.allclose((moved - low) / w, plain, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_matter(kind):
    x = images(7)
    whole = corrupt(x, kind, 4, 2)
    for size in (1, 3, 7):
        parts = corrupted(x, kind, 4, 2, units=Units(), batch_size=size)
        for _ in range(2):  # and it can be read again
            assert torch.allclose(torch.cat(list(parts)), whole, atol=1e-12)


def test_moments_of_noises():
    n, level = 400_000, 0.4
    x = torch.full((1, 1, 1000, 400), level).double()
    free = Units(0.0, 1.0, bounded=False)
    a = CORRUPTIONS["gaussian_noise"].strength(3)
    noisy = corrupt(x, "gaussian_noise", 3, 0, units=free)
    assert abs(noisy.mean() - level) < 4 * a / n**0.5
    assert abs(noisy.var() / a**2 - 1) < 4 * (2 / n) ** 0.5
    a = CORRUPTIONS["shot_noise"].strength(1)
    shot = corrupt(x, "shot_noise", 1, 0)
    assert abs(shot.mean() - level) < 4 * (a * level / n) ** 0.5
    assert abs(shot.var() / (a * level) - 1) < 0.02
    a = CORRUPTIONS["impulse_noise"].strength(4)
    spots = corrupt(x, "impulse_noise", 4, 0)
    for value in (0.0, 1.0):
        share = (spots == value).double().mean()
        assert abs(share - a / 2) < 4 * (a / 2 / n) ** 0.5
    a = CORRUPTIONS["missing"].strength(4)
    share = (corrupt(x, "missing", 4, 0) == 0.5).double().mean()
    assert abs(share - a) < 4 * (a / n) ** 0.5


def test_noise_is_the_same_at_all_severities_but_for_scale():
    x, free = torch.zeros(3, 5).double(), Units(0.0, 1.0, bounded=False)
    one, two = (
        corrupt(x, "gaussian_noise", s, 9, units=free) for s in (1, 2)
    )
    assert torch.allclose(two, 2 * one)


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 16, 16), (2, 7, 4)])
def test_blurs_match_scipy(shape):
    x = images(2, *shape, seed=3)
    side = min(shape[1:])
    sd = CORRUPTIONS["gaussian_blur"].strength(2.5) * side
    want = scipy.ndimage.gaussian_filter(
        x.numpy(), (0, 0, sd, sd), mode="nearest"
    )
    assert np.allclose(corrupt(x, "gaussian_blur", 2.5, 0), want, atol=1e-12)
    flat = torch.full_like(x, 0.3)
    for kind in ("gaussian_blur", "defocus_blur", "motion_blur", "pixelate",
                 "shift", "rotation", "contrast"):
        assert torch.allclose(corrupt(flat, kind, 5, 0), flat, atol=1e-9)


def test_the_disk_has_its_area():
    from reappraisal.measure.robustness import _disk

    for radius in (0.3, 0.8, 1.7, 3.2):
        disk = _disk(radius)
        # the middle pixel is covered whole from a radius of 0.71
        if radius > 0.71:
            area = 1 / disk[len(disk) // 2, len(disk) // 2]
            assert abs(area / (math.pi * radius**2) - 1) < 0.01
        assert np.allclose(disk, disk.T) and np.allclose(disk, disk[::-1])


def test_a_whole_pixel_moves_a_signal_by_one():
    x = torch.arange(20.0).view(1, 1, 20).repeat(40, 1, 1)
    moved = corrupt(
        x, "shift", 1, 0, units=Units(0.0, 19.0)
    )  # 5% of 20 is one step
    left = torch.cat([x[0, 0, 1:], x[0, 0, -1:]])
    right = torch.cat([x[0, 0, :1], x[0, 0, :-1]])
    ways = [
        torch.allclose(m[0], left, atol=1e-4)
        - torch.allclose(m[0], right, atol=1e-4)
        for m in moved
    ]
    assert set(ways) == {1, -1}


def test_signals_and_tables():
    assert natural((30,)) == ("gaussian_noise", "impulse_noise", "missing")
    wave = torch.randn(5, 2, 40)
    for kind in natural((2, 40)):
        out = corrupt(wave, kind, 3, 0)
        assert out.shape == wave.shape and out.isfinite().all()
    flat = corrupt(wave.flatten(1), "gaussian_blur", 3, 0, item=(2, 40))
    assert torch.allclose(
        flat.view_as(wave), corrupt(wave, "gaussian_blur", 3, 0)
    )
    want = scipy.ndimage.gaussian_filter1d(
        wave.double().numpy(), 40 * 0.09, mode="nearest"
    )
    assert np.allclose(corrupt(wave.double(), "gaussian_blur", 3, 0), want)


@pytest.mark.parametrize("per_feature", [True, False])
def test_units_undo_the_standardisation_of_splits(per_feature):
    raw = load("digits").split(3, (0.6, 0.2, 0.2))
    parts = raw.standardised(per_feature=per_feature)
    units = Units.standardised(raw.train.X, per_feature=per_feature)
    for kind in ("gaussian_noise", "brightness", "shift", "occlusion"):
        want = corrupt(raw.test.X, kind, 3, 1, item=(1, 8, 8))
        got = corrupt(parts.test.X, kind, 3, 1, item=(1, 8, 8), units=units)
        low, width = units.of(got)
        assert torch.allclose((got - low) / width, want, atol=1e-4)
    with pytest.raises(ValueError, match="standardised"):
        corrupt(parts.test.X, "shift", 3, 1, item=(1, 8, 8))


def test_units_per_channel_and_of_data():
    x = images(3, 3)
    low = torch.tensor([0.0, 1.0, -2.0])
    units = Units(low, low + 2)
    got = corrupt(
        2 * x + low[:, None, None], "brightness", 2, 0, units=units
    )
    want = corrupt(x, "brightness", 2, 0)
    assert torch.allclose((got - low[:, None, None]) / 2, want)
    table = torch.randn(500, 2) * torch.tensor([1.0, 50.0])
    table = torch.cat([table, torch.ones(500, 1)], 1)
    units = Units.of_data(table)
    assert units.high[2] - units.low[2] == 1
    assert np.allclose(units.low, np.quantile(table.double(), 0.01, axis=0))


# curves


def test_a_curve_is_its_cells_and_members_are_a_loop():
    nets = ensemble(lambda s: models.mlp([64, 5], seed=s))
    x = images(20)
    y = torch.arange(20) % 5
    report = corruption_curve(nets, (x, y), severities=(1, 4), batch_size=6)
    assert report.accuracy.shape == (3, len(IMAGE), 2)
    for k, kind in enumerate(IMAGE):
        out = read_outputs(nets, corrupted((x, y), kind, 4, 0, units=Units()))
        assert torch.allclose(report.accuracy[:, k, 1], out.accuracy)
    one = corruption_curve(nets.member(1), (x, y), severities=(1, 4))
    assert torch.allclose(one.accuracy, report.accuracy[1])
    assert torch.allclose(one.hits, report.hits[1])
    assert torch.allclose(one.hits.mean(), one.mean)
    assert torch.isclose(one.interval().estimate * torch.ones(1).double(),
                         one.mean).all()
    assert one.interval("contrast", 4).method == "Clopper-Pearson"
    with pytest.raises(ValueError, match="single network"):
        one.interval("contrast")
    assert report.interval("contrast").n == 3
    frame = report.to_frame()
    assert len(frame) == 3 * len(IMAGE) * 2
    cell = frame[(frame.member == 2) & (frame.kind == "jpeg")]
    assert np.allclose(
        cell.accuracy, report.accuracy[2, IMAGE.index("jpeg")]
    )
    report.plot()
    with pytest.raises(ValueError, match="baseline"):
        report.mce(corruption_curve(nets, (x, y), ["contrast"]))


def test_mce_by_hand():
    from reappraisal.measure.robustness import CorruptionReport

    def made(clean, table):
        t = torch.tensor(table).double()
        return CorruptionReport(
            ("a", "b"), (1, 2), torch.tensor(clean).double(), t,
            torch.zeros(*t.shape[:-2], 4),
        )

    ours = made(0.9, [[0.8, 0.6], [0.9, 0.7]])
    base = made([0.8, 1.0], [[[0.5, 0.5], [0.7, 0.5]]] * 2)
    assert torch.isclose(
        ours.mce(base), torch.tensor((0.6 / 1.0 + 0.4 / 0.8) / 2).double()
    )
    assert torch.isclose(
        ours.mce(base, relative=True),
        torch.tensor((0.4 / 0.8 + 0.2 / 0.6) / 2).double(),
    )
    perfect = made(1.0, [[1.0, 1.0], [0.9, 0.9]])
    assert ours.mce(perfect).isnan()


def test_corrupted_goes_into_other_instruments():
    from reappraisal.measure.calibration import ece

    net = models.mlp([64, 5], seed=0)
    x, y = images(30).float(), torch.arange(30) % 5
    out = read_outputs(net, corrupted((x, y), "contrast", 3, 0,
                                      units=Units()))
    assert 0 <= float(torch.as_tensor(ece(out.probs, out.y))) <= 1


# derivatives, margins


def zoo():
    return {
        "batch norm": nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(8, 4),
        ),
        "residual": models.resnet(seed=0),
        "convnet": models.convnet((1, 4, 8), seed=0),
        "attention": nn.Sequential(
            nn.Flatten(1, 2), models.Attention(8, 2, causal=False),
            nn.Flatten(), nn.Linear(64, 4),
        ),
    }


@pytest.mark.parametrize("name", list(zoo()))
def test_other_architectures_and_left_untouched(name):
    net = zoo()[name].train()
    x = images(3).float()
    y = torch.tensor([0, 1, 2])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    J = input_jacobian(net, x)
    found = margins(net, (x, y))
    stable = noise_stability(net, x, [0.1], repeats=2)
    local = local_lipschitz(net, x)
    adversarial_accuracy(net, (x, y), lambda m, x, y, e: x + e, [0.1])
    report = corruption_curve(net, (x, y), ["shift"], (1,))
    assert net.training and torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and (p.grad == 1).all()
               for p in net.parameters())
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k])
    net.eval()
    for i in range(3):
        want = torch.autograd.functional.jacobian(net, x[i : i + 1])[0]
        assert torch.allclose(J[i], want.flatten(1), atol=1e-5)
    assert torch.allclose(local, torch.linalg.svdvals(J)[:, 0], atol=1e-5)
    assert found.input.shape == (3,) and stable.kept.shape == (1, 3)
    assert report.accuracy.shape == (1, 1)


def test_members_are_a_loop():
    nets = ensemble()
    x, y = rows()
    for measure in (
        lambda m: input_jacobian(m, x),
        lambda m: local_lipschitz(m, x),
        lambda m: margins(m, (x, y), "linf").input,
        lambda m: margins(m, x, "l1").output,
        lambda m: normalised_margins(m, (x, y)),
        lambda m: noise_stability(m, x, [0.2, 1.0]).kept,
        lambda m: noise_stability(m, x, [0.2, 1.0]).moved,
        lambda m: adversarial_accuracy(
            m, (x, y), lambda m, x, y, e: x + e, [0.3]
        ).broken,
    ):
        together = measure(nets)
        alone = torch.stack([measure(nets.member(i)) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_linear_margin_is_exact(norm, seed):
    """No move below the margin changes the answer; a bit more does."""
    g = torch.Generator().manual_seed(seed)
    net = models.mlp([5, 3], seed=seed % 1000).double()
    x = torch.randn(4, 5, generator=g).double()
    m = margins(net, x, norm)
    W = net[-1].weight.detach()
    y = net(x).argmax(-1)
    for i in range(4):
        d = W[y[i]] - W[m.nearest[i]]
        step = {"l2": d / d.norm(), "linf": d.sign(),
                "l1": torch.where(d.abs() == d.abs().max(), d.sign(), 0.0)}
        for scale, stays in ((0.999, True), (1.001, False)):
            moved = x[i] - scale * m.input[i] * step[norm]
            assert (net(moved[None]).argmax() == y[i]) == stays
    order = {"l2": 2, "linf": math.inf, "l1": 1}[norm]
    noise = torch.randn(500, 4, 5, generator=g).double()
    noise /= torch.linalg.vector_norm(noise, order, dim=-1, keepdim=True)
    moved = x + 0.999 * m.input[:, None] * noise
    assert (net(moved.flatten(0, 1)).view(500, 4, 3).argmax(-1) == y).all()


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_what_margins_see_and_do_not(scale, seed):
    net = models.mlp([6, 7, 4], seed=seed, bias=False).double()
    x, y = rows(seed=seed)
    x = x.double()
    hot, traded = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        hot[-1].weight *= scale
        traded[-1].weight *= scale
        traded[1].weight /= scale
    a, b, c = (margins(m, (x, y)) for m in (net, hot, traded))
    assert torch.allclose(b.output, scale * a.output)
    assert torch.allclose(b.input, a.input)
    assert torch.allclose(c.output, a.output)
    n = [normalised_margins(m, (x, y)) for m in (net, hot, traded)]
    assert torch.allclose(n[0], n[1]) and torch.allclose(n[0], n[2])
    order = torch.randperm(len(x))
    shuffled = margins(net, (x[order], y[order]))
    assert torch.allclose(shuffled.input, a.input[order])


def test_margins_that_cannot_change():
    net = models.mlp([3, 2], seed=0).double()
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(2, 3).double()
    found = margins(net, (x, torch.tensor([0, 1])))
    assert found.input.tolist() == [math.inf, -math.inf]
    assert local_lipschitz(net, x).tolist() == [0, 0]
    with pytest.raises(ValueError, match="all zero"):
        normalised_margins(net, x)


def test_first_order_shapes():
    z = torch.randn(2, 3, 4)
    J = torch.randn(2, 3, 4, 5)
    distance, slopes = first_order(z, J, z.argmax(-1), "l2")
    assert distance.shape == (2, 3, 4) and slopes.shape == J.shape
    assert (distance > 0).all()


def test_own_inputs_give_own_gradients():
    nets = ensemble()
    x, _ = rows()
    own = torch.stack([x, x + 1, x - 1])
    with input_map(nets) as call:
        z, J = value_and_jacobian(call, own)
    for s in range(3):
        with input_map(nets.member(s)) as call:
            z1, J1 = value_and_jacobian(call, own[s])
        assert torch.allclose(z[s], z1, atol=1e-6)
        assert torch.allclose(J[s], J1, atol=1e-6)
    with torch.no_grad(), input_map(nets) as call:
        assert value_and_jacobian(call, own)[1].abs().sum() > 0


def test_noise_against_closed_forms():
    net = models.mlp([4, 2], seed=1).double()
    W = net[-1].weight.detach()
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    found = noise_stability(net, x, [0.4], repeats=2000)
    normal = torch.distributions.Normal(0.0, 1.0)
    want = normal.cdf(margins(net, x).input / 0.4)
    assert (found.kept[0] - want).abs().max() < 5 * 0.5 / 2000**0.5
    assert torch.allclose(
        found.moved.mean(), 0.16 * W.square().sum(), rtol=0.05
    )
    still = noise_stability(net, x, [0.0])
    assert (still.kept == 1).all() and (still.moved == 0).all()
    assert found.interval(0.4).n == 30
    assert len(found.to_frame()) == 30


# attacks and groups


def test_the_books_of_an_attack():
    net = models.mlp([6, 4], seed=0)
    x, _ = rows(40)
    y = net(x).argmax(-1)
    y[:5] = (y[:5] + 1) % 4

    def weak(model, x, y, epsilon):
        """Breaks at the small radius only."""
        W = model[-1].weight.detach()
        far = W.mean(0) - W[y]
        return x + epsilon * far.sign() * (epsilon < 0.6)

    found = adversarial_accuracy(net, (x, y), weak, [1.0, 0.5], batch_size=7)
    assert found.epsilons == (0.5, 1.0)
    assert torch.equal(found.broken == 0, torch.arange(40) < 5)
    assert found.clean == 35 / 40
    assert found.accuracy[0] == found.accuracy[1] < found.clean
    nothing = adversarial_accuracy(
        net, (x, y), [lambda m, x, y, e: x, weak], [0.5, 1.0]
    )
    assert torch.equal(nothing.broken, found.broken)
    assert found.interval(0.5).method == "Clopper-Pearson"
    found.plot()
    assert len(found.to_frame()) == 2


@pytest.mark.parametrize(
    "norm, length", [("linf", 1.0), ("l2", 6**0.5), ("l1", 6.0)]
)
def test_a_budget_is_a_budget(norm, length):
    net, (x, y) = models.mlp([6, 4], seed=0), rows()

    def push(model, x, y, e):
        return x + e / length

    adversarial_accuracy(net, (x, y), push, [0.3], norm=norm)
    with pytest.raises(ValueError, match="attack: moved by"):
        adversarial_accuracy(
            net, (x, y), lambda m, x, y, e: push(m, x, y, 1.01 * e), [0.3],
            norm=norm,
        )


def test_groups():
    net, (x, y) = models.mlp([6, 4], seed=0), rows(20)
    out = read_outputs(net, (x, y))
    groups = np.array(["b", "a"])[np.arange(20) % 2]
    found = group_accuracy(out, groups)
    assert found.groups == ("a", "b") and found.counts == (10, 10)
    assert torch.isclose(found.accuracy.mean(), out.accuracy)
    order = torch.randperm(20)
    again = group_accuracy(
        read_outputs(net, (x[order], y[order])), groups[order]
    )
    assert torch.equal(again.accuracy, found.accuracy)
    alone = group_accuracy(out, torch.zeros(20))
    assert alone.worst == out.accuracy and alone.gap == 0
    assert found.interval().level == pytest.approx(0.975)
    assert found.interval("a").estimate == found.accuracy[0]
    many = group_accuracy(read_outputs(ensemble(), (x, y)), groups)
    assert many.interval().n == 3 and len(many.to_frame()) == 6


BAD = {
    "unknown kind": (lambda: corrupt(images(), "fog", 1, 0), "kind: got"),
    "kind not for rows": (
        lambda: corrupt(rows()[0], "shift", 1, 0), "kind: got 'shift'"),
    "negative severity": (
        lambda: corrupt(images(), "shift", -1, 0), "severity: got -1"),
    "severity of 6": (
        lambda: corrupt(images(), "shift", 6, 0), "severity: got 6"),
    "seed": (lambda: corrupt(images(), "shift", 1, -1), "seed: got -1"),
    "integers": (
        lambda: corrupt(images().long(), "shift", 1, 0), "x: got"),
    "nan": (
        lambda: corrupt(images() * math.nan, "shift", 1, 0), "not finite"),
    "empty": (lambda: corrupt(images()[:0], "shift", 1, 0), "x: got"),
    "item of four": (
        lambda: corrupt(images(), "shift", 1, 0, item=(1, 1, 8, 8)),
        "item: got"),
    "shot noise without a range": (
        lambda: corrupt(images(), "shot_noise", 1, 0,
                        units=Units(0, 1, bounded=False)), "shot noise"),
    "jpeg of two channels": (
        lambda: corrupt(images(2, 2), "jpeg", 1, 0), "2 channels"),
    "units": (lambda: Units(1, 1), "low, high"),
    "nan units": (lambda: Units(0, math.nan), "low, high"),
    "tail": (lambda: Units.of_data(rows()[0], tail=0.5), "tail: got"),
    "no severities": (
        lambda: corruption_curve(models.mlp([64, 4], seed=0), (
            images().float(), torch.zeros(4).long()), severities=()),
        "severities: empty"),
    "an empty loader": (
        lambda: margins(models.mlp([6, 4], seed=0), []), "data: empty"),
    "no model": (lambda: margins(len, rows()), "module: got"),
    "tokens": (
        lambda: margins(models.mlp([6, 4], seed=0), rows()[0].long()),
        "inputs are torch.int64"),
    "half": (
        lambda: local_lipschitz(models.mlp([6, 4], seed=0).half(), rows()),
        "float16"),
    "norm": (
        lambda: margins(models.mlp([6, 4], seed=0), rows(), "l0"),
        "norm: got 'l0'"),
    "by": (
        lambda: normalised_margins(models.mlp([6, 4], seed=0), rows(), "x"),
        "by: got 'x'"),
    "no weights": (
        lambda: normalised_margins(nn.Flatten(), rows()), "no parameter"),
    "outputs": (
        lambda: margins(nn.Flatten(0), rows()), "no logits"),
    "repeats": (
        lambda: noise_stability(nn.Flatten(), rows(), [1], repeats=0),
        "repeats: got 0"),
    "attack's shape": (
        lambda: adversarial_accuracy(
            models.mlp([6, 4], seed=0), rows(), lambda m, x, y, e: x[:1],
            [1]), "attack: gave shape"),
    "attack": (
        lambda: adversarial_accuracy(
            models.mlp([6, 4], seed=0), rows(), [], [1]), "attack: a func"),
    "radius": (
        lambda: adversarial_accuracy(
            models.mlp([6, 4], seed=0), rows(), lambda m, x, y, e: x, [0]),
        "epsilons: got"),
    "labels": (
        lambda: adversarial_accuracy(
            models.mlp([6, 4], seed=0), rows()[0], lambda m, x, y, e: x,
            [1]), "no labels"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
