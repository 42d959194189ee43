"""Complexity measures against closed forms, brute force and each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn

from reappraisal.lab.ensemble import Ensemble, untrained
from reappraisal.lab.models import Residual, convnet, mlp, transformer
from reappraisal.lab.synthetic import sparse_parity
from reappraisal.measure.complexity import (
    band_energy,
    band_error,
    count_patterns,
    degree_weights,
    distance_to_boundary,
    expected_crossings,
    grid_values,
    influences,
    legendre_spectrum,
    lempel_ziv,
    local_complexity,
    noise_stability,
    path_variation,
    patterns,
    pieces_on_curve,
    pieces_on_segments,
    poly_order,
    regions_in_plane,
    sensitivity,
    spectral_centroid,
    truth_table,
    walsh_spectrum,
    zlib_length,
)


def net_of(seed, widths=(5, 4), inputs=3):
    """A random ReLU network with biases of the size of the rest."""
    net = mlp([inputs, *widths, 2], seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.bias.normal_(0, 1, generator=g)
    return net


def ends(seed, m=4, inputs=3):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, m, inputs, generator=g)


def circle(t):
    return torch.stack([2 * t.cos(), 2 * t.sin(), 0 * t], -1)


@given(seed=st.integers(0, 10**5))
@settings(max_examples=15, deadline=None)
def test_a_dense_grid_sees_the_same_pieces(seed):
    net = net_of(seed)
    a, b = ends(seed, 1)
    found = pieces_on_segments(net, a, b)
    t = torch.linspace(0, 1, 20001).double()[:, None]
    on = patterns(net, a.double() + t * (b - a).double())
    changed = (on[1:] != on[:-1]).any(1)
    # a grid never sees more, and what it sees is there
    assert changed.sum() <= found.count[0]
    gaps = found.t[0].diff()
    if not len(gaps) or gaps.min() > 1e-4:
        assert changed.sum() == found.count[0]
        mid = (t[1:, 0] + t[:-1, 0])[changed] / 2
        assert (mid - found.t[0]).abs().max() < 1e-4 if len(mid) else True
    assert found.pieces[0] == found.count[0] + 1


@given(seed=st.integers(0, 10**5))
@settings(max_examples=12, deadline=None)
def test_what_pieces_see(seed):
    net = net_of(seed)
    a, b = ends(seed)
    found = pieces_on_segments(net, a, b)
    back = pieces_on_segments(net, b, a)
    assert torch.equal(back.count, found.count)
    assert torch.allclose(back.total_variation, found.total_variation)
    assert torch.allclose(back.slope_change, found.slope_change, rtol=1e-5)
    # halves add up
    mid = (a + b) / 2
    halves = [pieces_on_segments(net, *p) for p in ((a, mid), (mid, b))]
    assert torch.equal(sum(h.count for h in halves), found.count)
    # scaling a unit up and what reads it down changes nothing
    scaled = net_of(seed)
    with torch.no_grad():
        scaled[1].weight *= 4
        scaled[1].bias *= 4
        scaled[3].weight /= 4
    same = pieces_on_segments(scaled, a, b)
    assert torch.equal(same.count, found.count)
    assert torch.allclose(same.slope_change, found.slope_change, rtol=1e-5)
    # the outputs' unit does matter to variation
    with torch.no_grad():
        net[5].weight *= 3
    more = pieces_on_segments(net, a, b)
    assert torch.allclose(more.total_variation, 3 * found.total_variation)
    # and a polygon is never longer than the way itself
    sampled = path_variation(net, a, b, points=50)
    norm = more.values.diff(dim=-2).norm(dim=-1).sum(-1)
    assert (sampled <= norm + 1e-4).all()


def test_members_are_each_alone():
    nets = untrained(lambda s: net_of(s, (6, 6)), range(5))
    a, b = ends(0, 3)
    many = pieces_on_segments(nets, a, b)
    curve = pieces_on_curve(nets, circle, 0, 6, starts=200)
    gap = distance_to_boundary(nets, a)
    near = local_complexity(nets, a, radius=1.0, directions=2)
    count = count_patterns(nets, a)
    planes = regions_in_plane(nets, a[0], b[0], b[1])
    for k in range(5):
        net = nets.member(k)
        one = pieces_on_segments(net, a, b)
        assert torch.equal(one.count, many.count[k])
        both = one.t.shape[-1]
        assert torch.allclose(one.t, many.t[k, :, :both], equal_nan=True)
        assert torch.allclose(
            one.total_variation, many.total_variation[k], rtol=1e-6
        )
        along = pieces_on_curve(net, circle, 0, 6, starts=200)
        assert along.count == curve.count[k]
        assert torch.allclose(distance_to_boundary(net, a), gap[k])
        assert torch.equal(
            local_complexity(net, a, radius=1.0, directions=2), near[k]
        )
        assert count_patterns(net, a) == count[k]
        again = regions_in_plane(net, a[0], b[0], b[1])
        assert again.count == planes[k].count
    assert many.to_frame().shape == (15, 3)
    assert "15 paths" in repr(many) and "regions" in repr(planes[0])


def test_a_plane_and_a_segment_agree():
    """Crossings on a line through a plane are borders of its polygons."""
    net = net_of(3, (8, 8), 2)
    plane = regions_in_plane(net, torch.zeros(2), *torch.eye(2))
    assert np.isclose(plane.areas.sum(), 4)
    assert len(plane.to_frame()) == plane.count
    line = pieces_on_segments(
        net, torch.tensor([[-1.0, 0.123]]), torch.tensor([[1.0, 0.123]])
    )
    met = 0
    for p in plane.polygons:
        low, high = p[:, 1].min(), p[:, 1].max()
        met += low < 0.123 < high
    assert met == line.pieces[0]
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    assert plane.plot(ax) is ax
    plt.close(fig)


def test_zaslavsky():
    for n in (1, 3, 7):
        net = net_of(n, (n,), 2)
        found = regions_in_plane(
            net, torch.zeros(2), *torch.eye(2), extent=1e4
        )
        assert found.count == 1 + n + math.comb(n, 2)


NETS = {
    "batch norm, dropout": lambda: nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.1),
        nn.Dropout(0.5), nn.Linear(6, 2),
    ),
    "residual": lambda: nn.Sequential(
        nn.Linear(3, 4),
        Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))),
        nn.Hardtanh(), nn.Linear(4, 1),
    ),
    "relu6": lambda: nn.Sequential(
        nn.Linear(3, 6), nn.ReLU6(), nn.Linear(6, 2)
    ),
    "function": lambda: Functional(),
}


class Functional(nn.Module):
    """Calls functions rather than modules."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x):
        h = self.one(x).abs().clamp(max=0.7)
        return self.two(torch.relu(h - 0.2))


@pytest.mark.parametrize("name", list(NETS))
def test_kinds_of_networks(name):
    torch.manual_seed(0)
    net = NETS[name]().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = 2 * ends(1, 6)
    state = torch.get_rng_state()
    found = pieces_on_segments(net, a, b)  # checks that it is linear
    gap = distance_to_boundary(net, a)
    plane = regions_in_plane(net, a[0], b[0], b[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and found.count.sum() > 0 and plane.count > 1
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]) and v.dtype == before[k].dtype
    first = (found.t[:, 0] * found.length).nan_to_num(math.inf)
    assert (first >= gap - 1e-9).all()
    pair = Ensemble.of([net, net])
    assert torch.equal(pieces_on_segments(pair, a, b).count[1], found.count)


def test_images_and_smooth_networks():
    x = torch.randn(3, 1, 6, 6)
    net = convnet((1, 3, 4), classes=2, norm=None)
    found = pieces_on_segments(net, x, -x)
    assert (found.count > 0).all()
    assert distance_to_boundary(net, x).shape == (3,)
    with pytest.raises(ValueError, match="not linear between switches"):
        pieces_on_segments(convnet((1, 3, 4), classes=2), x, -x)
    seq = transformer(7, 2, 5, 8, 2, 1)
    words = torch.randint(7, (9, 5))
    names = {type(m).__name__ for m in seq.modules()}
    if "ReLU" in names:
        assert patterns(seq, words).shape[0] == 9
    else:
        with pytest.raises(ValueError, match="no unit that switches"):
            patterns(seq, words)


def test_distance_is_the_nearest():
    net = net_of(5, (7, 7))
    x = ends(5, 6)[0]
    gap = distance_to_boundary(net, x)
    g = torch.Generator().manual_seed(0)
    way = torch.randn(300, 3, generator=g)
    way = way / way.norm(dim=1, keepdim=True)
    on = patterns(net, x)
    for k in range(6):
        ball = patterns(net, x[k].double() + 0.999 * gap[k] * way.double())
        assert (ball == on[k]).all()
    far = [
        patterns(net, x[k].double() + 1.5 * gap[k] * way.double())
        for k in range(6)
    ]
    assert all((f != on[k]).any() for k, f in enumerate(far))
    dead = net_of(5)
    with torch.no_grad():
        dead[1].weight.zero_()
    assert distance_to_boundary(dead, x).isinf().all()


def test_local_complexity_grows_with_the_radius():
    net = net_of(2, (20,))
    x = ends(2, 10)[0]
    rows = [
        local_complexity(net, x, radius=r, directions=3)
        for r in (1e-6, 1.0, 1e4)
    ]
    assert rows[0].sum() == 0
    assert (rows[1] <= rows[2]).all() and (rows[2] == 20).all()
    again = local_complexity(net, x, radius=1.0, directions=3)
    assert torch.equal(again, rows[1])


def test_rice_is_found_by_counting():
    def curve(t):
        return torch.stack([t, t**2, t.sin()], -1)

    rate = expected_crossings(curve, 0, 3, weight_var=1.0, bias_var=2.0)

    def random(s):
        net = mlp([3, 30, 1], seed=s)
        g = torch.Generator().manual_seed(s)
        with torch.no_grad():
            net[1].weight.normal_(0, 1, generator=g)
            net[1].bias.normal_(0, 2**0.5, generator=g)
        return net

    nets = untrained(random, range(200))
    found = pieces_on_curve(nets, curve, 0, 3, starts=300).count.double()
    error = found.std() / len(nets) ** 0.5
    assert abs(found.mean() - 30 * rate) < 4 * error
    straight = expected_crossings(
        lambda t: torch.stack([t, 0 * t], -1), 1, 2, weight_var=1, bias_var=0
    )
    assert straight == 0  # a ray through the origin crosses nothing


def slow_phrases(s):
    """Each phrase is the shortest not seen before where it may overlap."""
    at, count = 0, 0
    while at < len(s):
        size = 1
        while at + size <= len(s) and s[at : at + size] in s[: at + size - 1]:
            size += 1
        at, count = at + size, count + 1
    return count


@given(st.text("01", min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_lempel_ziv(text):
    bits = torch.tensor([int(c) for c in text])
    found = lempel_ziv(bits)
    assert found == slow_phrases(text) == lempel_ziv(text)
    assert lempel_ziv(1 - bits) == found  # names of symbols mean nothing
    assert found <= lempel_ziv(torch.cat([bits, bits])) <= found + 1
    assert lempel_ziv(torch.stack([bits, bits])).tolist() == [found] * 2


def test_published_strings():
    assert lempel_ziv("0001101001000101") == 6
    assert lempel_ziv("0" * 100) == 2 and lempel_ziv("01" * 50) == 3
    g = np.random.default_rng(0)
    coins = g.integers(0, 2, (10, 4096))
    ratio = lempel_ziv(coins).double() * 12 / 4096
    assert (ratio > 1).all() and (ratio < 1.2).all()
    assert zlib_length(coins).min() >= 512
    assert zlib_length(np.zeros(4096)) < 30


def signs(seed, n):
    return np.random.default_rng(seed).choice([-1.0, 1.0], 2**n)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_boolean_identities(seed, n):
    f = torch.tensor(signs(seed, n))
    c = walsh_spectrum(f)
    assert np.allclose(c, hadamard(2**n) @ f.numpy() / 2**n)
    assert torch.allclose(walsh_spectrum(c) * 2**n, f)
    w = degree_weights(f)
    assert abs(w.sum() - 1) < 1e-12
    total = influences(f).sum()
    assert abs(total - (w * torch.arange(n + 1)).sum()) < 1e-12
    assert abs(sensitivity(f).double().mean() - total) < 1e-12
    assert abs(noise_stability(f, 1.0) - 1) < 1e-12
    assert abs(noise_stability(f, 0.0) - f.mean() ** 2) < 1e-12
    flipped = influences(-f)
    assert torch.allclose(flipped, influences(f))
    both = degree_weights(torch.stack([f, -f]))
    assert torch.allclose(both[0], w) and torch.allclose(both[1], w)


def test_noise_stability_by_drawing():
    f = torch.tensor(signs(1, 6))
    g = np.random.default_rng(2)
    x = g.integers(0, 64, 200_000)
    flips = (g.random((200_000, 6)) < 0.2) @ (1 << np.arange(6))
    drawn = (f[x] * f[x ^ flips]).mean()
    assert abs(noise_stability(f, 0.6) - drawn) < 0.01


def test_a_network_that_computes_parity():
    task = sparse_parity(6, 2, 3)
    i, j = task.support
    net = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[:, [i, j]] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(-1.0)
    f = truth_table(net, 6)
    assert torch.equal(f, 1.0 - 2.0 * task.every().y.double())
    assert walsh_spectrum(f).argmax() == (1 << i) + (1 << j)
    assert degree_weights(f)[2] == 1
    logits = nn.Sequential(net, Both())
    assert torch.equal(truth_table(logits, 6), f)


class Both(nn.Module):
    def forward(self, z):
        return torch.cat([z, 0 * z], 1)


@given(seed=st.integers(0, 10**6), dims=st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_grid_measures(seed, dims):
    g = np.random.default_rng(seed)
    f = g.normal(size=(3, *[8] * dims))
    edges = [0, 0.4, 1.7, 20]
    for transform in ("dct", "fft"):
        energy = band_energy(f, edges, dims, transform)
        assert np.allclose(energy.sum(-1), (f**2).reshape(3, -1).sum(1))
        k = spectral_centroid(f, dims, transform)
        assert np.allclose(spectral_centroid(5 - 2 * f, dims, transform), k)
        back = np.flip(f, tuple(range(-dims, 0))).copy()
        assert np.allclose(spectral_centroid(back, dims, transform), k)
        assert (k > 0).all() and k.max() <= 4 * dims**0.5
    assert np.allclose(band_error(0 * f, f, edges, dims), 1)
    assert np.allclose(band_error(f, f[:1] * 0 + f, edges, dims), 0)
    whole = legendre_spectrum(f, 7, dims).sum(-1)
    assert np.allclose(whole, (f**2).reshape(3, -1).sum(1))
    order = poly_order(f, 4, dims)
    assert np.allclose(poly_order(3 - f, 4, dims), order)
    assert spectral_centroid(np.ones(9)) == 0 == poly_order(np.ones(9), 3)


def test_known_frequencies_and_degrees():
    at = (np.arange(32) + 0.5) / 32
    for k in (0.5, 1, 3.5, 9):
        assert np.isclose(spectral_centroid(np.cos(2 * np.pi * k * at)), k)
    wave = np.sin(2 * np.pi * (3 * at[:, None] + 4 * at))
    assert np.isclose(spectral_centroid(wave, 2, "fft"), 5)
    # frequencies are per side, however fine the grid is
    fine = (np.arange(128) + 0.5) / 128
    assert np.isclose(spectral_centroid(np.cos(6 * np.pi * fine)), 3)
    share = legendre_spectrum(at**3, 5)
    assert share[4:].max() < 1e-20 and share[3] > 0
    assert np.isclose(poly_order(7 * at, 5), 1)
    linear = nn.Linear(2, 1)
    assert np.isclose(poly_order(grid_values(linear, 8), 3, 2), 1)
    nets = untrained(mlp([2, 4, 3]), range(3))
    grids = grid_values(nets, 5)
    assert grids.shape == (3, 3, 5, 5)
    one = nets.member(1)(torch.tensor([[-0.8, 0.4]]))
    assert torch.allclose(grids[1, :, 0, 3], one[0], atol=1e-6)


A, B = ends(0, 2)
NET = net_of(0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patterns(nn.Linear(3, 2), A), "no unit that switches"),
        (lambda: patterns(3, A), "model: got int"),
        (lambda: patterns(NET, A[:0]), "data: empty"),
        (lambda: pieces_on_segments(NET, A, B[:1]), "a, b: shapes"),
        (lambda: pieces_on_segments(NET, A.long(), B), "a: got torch.int64"),
        (lambda: pieces_on_segments(NET, A / 0, B), "a: not finite"),
        (lambda: pieces_on_segments(NET, A, B, tol=2.0), "tol: got 2"),
        (lambda: pieces_on_curve(NET, circle, 0, math.inf), "t0, t1: got"),
        (
            lambda: pieces_on_curve(NET, circle, 0, 1, starts=0),
            "starts: got 0",
        ),
        (
            lambda: pieces_on_curve(NET, lambda t: circle(t)[:5], 0, 1),
            "curve: gives 5",
        ),
        (lambda: regions_in_plane(NET, A[0], B[0], 2 * B[0]), "parallel"),
        (lambda: regions_in_plane(NET, A[0], B[0], B[1, :2]), "origin, u, v"),
        (lambda: distance_to_boundary(mlp([3, 4, 1], norm="layer"), A), "not"),
        (lambda: local_complexity(NET, A, radius=0.0), "directions: got 25"),
        (
            lambda: local_complexity(NET, A, radius=0.0, directions=1),
            "radius: got 0",
        ),
        (
            lambda: expected_crossings(
                circle, 0, 1, weight_var=-1, bias_var=0
            ),
            "weight_var, bias_var",
        ),
        (
            lambda: expected_crossings(
                lambda t: t[:, None], -1, 1, weight_var=1, bias_var=0
            ),
            "through the origin",
        ),
        (lambda: lempel_ziv([]), "bits: got shape"),
        (lambda: lempel_ziv([300]), "bits: not all whole"),
        (lambda: zlib_length([0, 3]), "bits: largest is 3"),
        (lambda: walsh_spectrum([1.0]), "f: got shape"),
        (lambda: walsh_spectrum([1.0, math.nan]), "f: not finite"),
        (lambda: noise_stability([1, 1], -2), "rho: got -2"),
        (lambda: truth_table(NET, 0), "bits: got 0"),
        (lambda: truth_table(mlp([2, 3]), 2), "model: gave 3 outputs"),
        (lambda: grid_values(NET, 1), "points, dims, extent"),
        (lambda: spectral_centroid([1.0], 2), "f, dims: got shape"),
        (lambda: spectral_centroid([1.0, 2], 1, "dst"), "transform: got"),
        (lambda: band_energy([1.0, 2.0], [1.0]), "edges: got"),
        (lambda: band_error([1.0], [1.0, 2], [0, 1]), "pred, target"),
        (lambda: legendre_spectrum([1.0, 2.0], 2), "degree: got 2"),
        (lambda: path_variation(NET, A, B, points=1), "a, b, points"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_that_are_not_numbers():
    net = net_of(0)
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="model: weights are not finite"):
        pieces_on_segments(net, A, B)
