"""Representational similarity against scipy, scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, spatial, stats
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import mlp
from reappraisal.measure import representation as rp
from reappraisal.measure.reading import read_activations

seeds = st.integers(0, 10_000)
EVERY = ["cka", *rp._SPLIT]


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def unbiased(K, L):
    n, one = len(K), np.ones(len(K))
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    total = np.trace(K @ L) - 2 / (n - 2) * (one @ K @ L @ one)
    total += (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return total / (n * (n - 3))


def biased(K, L):
    H = np.eye(len(K)) - 1 / len(K)
    return np.trace(K @ H @ L @ H) / (len(K) - 1) ** 2


def kernel_matrix(x, kernel, bandwidth=0.5):
    if kernel == "linear":  # shifts change nothing but the rounding
        return (x - x.mean(0)) @ (x - x.mean(0)).T
    d2 = spatial.distance.squareform(spatial.distance.pdist(x) ** 2)
    h2 = bandwidth**2 * np.median(d2[np.triu_indices(len(x), 1)])
    return np.exp(-d2 / (2 * h2))


def case_of(case):
    """Clouds of all kinds of shape, some degenerate."""
    rng = np.random.default_rng(case)
    n = int(rng.integers(5, 40))
    d, e = rng.integers(1, 50, 2).tolist()
    x, y = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3), rng.normal(
        size=(n, e)
    )
    y[:, : min(d, e)] += x[:, : min(d, e)]
    if case % 4 == 1:
        x[:, : d // 2] = 7  # constant features
    if case % 4 == 2:
        x[:, : d // 2] = x[:, -1:]  # not of full rank
    if case % 4 == 3:
        x[: n // 3] = x[0]  # the same sample again
    return x, y


@pytest.mark.parametrize("case", range(200))
def test_cka_against_traces(case):
    x, y = case_of(case)
    X, Y = map(torch.as_tensor, (x, y))
    for kernel in ("linear", "rbf"):
        K, L = (kernel_matrix(t, kernel) for t in (x, y))
        for debiased, hsic in ((False, biased), (True, unbiased)):
            options = dict(kernel=kernel, debiased=debiased)
            scale = (hsic(K, K) * hsic(L, L)) ** 0.5
            got = rp.hsic(X, Y, **options)
            assert abs(got - hsic(K, L)) < 1e-8 * scale + 1e-12
            want = hsic(K, L) / scale
            assert abs(rp.cka(X, Y, **options) - want) < 1e-8
            for ys in ([Y], None):
                table = rp.cka_matrix([X, Y], ys, **options).values
                assert abs(table[0, -1] - want) < 1e-8
    low = rp.cka(X.float(), Y.float())
    assert abs(low - rp.cka(X, Y)) < 1e-3


@pytest.mark.parametrize("case", range(200))
def test_the_others_against_scipy(case):
    x, y = case_of(case)
    X, Y = map(torch.as_tensor, (x, y))
    xc, yc = x - x.mean(0), y - y.mean(0)
    scale = np.linalg.norm(xc) + np.linalg.norm(yc)
    wide = max(x.shape[1], y.shape[1])
    a, b = (np.pad(t, ((0, 0), (0, wide - t.shape[1]))) for t in (xc, yc))
    Q, nuclear = linalg.orthogonal_procrustes(b, a)
    want = np.linalg.norm(a - b @ Q)
    assert abs(rp.procrustes(X, Y) - want) < 1e-6 * scale
    if np.linalg.norm(xc) > 1e-9:
        disparity = spatial.procrustes(a, b)[2]
        assert abs(rp.shape_distance(X, Y).sin() ** 2 - disparity) < 1e-8
        orth = [linalg.orth(t, 1e-10) for t in (xc, yc)]
        cosines = np.cos(linalg.subspace_angles(*orth))
        assert abs(rp.cca(X, Y) - cosines.mean()) < 1e-7
        want = cosines.sum() / (orth[0].shape[1] * orth[1].shape[1]) ** 0.5
        assert abs(rp.shape_distance(X, Y, alpha=0).cos() - want) < 1e-7
    far = [spatial.distance.pdist(t) for t in (x, y)]
    for compare, oracle in (
        ("spearman", stats.spearmanr), ("pearson", stats.pearsonr)
    ):
        got = rp.rsa(X, Y, kind="euclidean", compare=compare)
        if case % 4 != 3:  # ties among rounding errors
            assert abs(got - oracle(*far)[0]) < 1e-6


@pytest.mark.parametrize("case", range(40))
def test_svcca_and_pwcca_step_by_step(case):
    x, y = case_of(case)
    X, Y = map(torch.as_tensor, (x, y))
    xc, yc = x - x.mean(0), y - y.mean(0)
    parts = []
    for t in (xc, yc):
        u, s, _ = np.linalg.svd(t, full_matrices=False)
        keep = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
        parts.append(u[:, :keep])
    rho = np.linalg.svd(parts[0].T @ parts[1], compute_uv=False)
    assert abs(rp.svcca(X, Y, variance=0.9) - rho.mean()) < 1e-7
    one, two = (linalg.orth(t, 1e-10) for t in (xc, yc))
    p, rho, _ = np.linalg.svd(one.T @ two, full_matrices=False)
    weight = np.abs((one @ p).T @ xc).sum(1)
    # equal correlations leave the variates open, as in full subspaces
    if np.diff(rho).min(initial=0) == 0 or (np.abs(np.diff(rho)) > 1e-6).all():
        want = (weight * rho).sum() / weight.sum()
        assert abs(rp.pwcca(X, Y) - want) < 1e-6


@pytest.mark.parametrize("case", range(200))
def test_probe_against_scikit_learn(case):
    rng = np.random.default_rng(case)
    n, d = int(rng.integers(12, 60)), int(rng.integers(1, 60))
    classes = int(rng.integers(2, 5))
    z = rng.normal(size=(n, d))
    z[:, 0] = 3.0 if case % 5 == 0 else z[:, 0]
    label = rng.integers(0, classes, n)
    label[:classes] = np.arange(classes)
    ridge, half = float(rng.uniform(0.1, 5)), n // 2
    Z = torch.as_tensor(z)
    options = dict(ridge=ridge, test=(Z[half:], torch.as_tensor(label[half:])))
    model = make_pipeline(StandardScaler(), RidgeClassifier(ridge))
    model.fit(z[:half], label[:half])
    got = rp.linear_probe(Z[:half], torch.as_tensor(label[:half]), **options)
    assert np.isclose(got.score, model.score(z[half:], label[half:]))
    target = rng.normal(size=(n, 2)) + z[:, :1]
    model = make_pipeline(StandardScaler(), Ridge(ridge))
    model.fit(z[:half], target[:half])
    want = r2_score(target[half:], model.predict(z[half:]))
    T = torch.as_tensor(target)
    got = rp.linear_probe(
        Z[:half], T[:half], ridge=ridge, test=(Z[half:], T[half:])
    )
    assert got.kind == "R2" and np.isclose(got.score, want, atol=1e-7)


def test_probe_folds_are_balanced_disjoint_and_seeded():
    y = torch.arange(60) % 3
    part = rp._folds(y, 5, 0)
    for f in range(5):
        assert torch.equal(y[part == f].bincount(), torch.full((3,), 4))
    assert not torch.equal(part, rp._folds(y, 5, 1))
    z = torch.nn.functional.one_hot(y).double() + 0.1 * normal(60, 3)
    assert rp.linear_probe(z, y).score == 1
    many = rp.linear_probe(torch.stack([z, normal(60, 3)]), y)
    assert many.score.shape == (2,) and many.score[1] < 0.7


@pytest.mark.parametrize("case", range(200))
def test_neighbours_against_sets(case):
    rng = np.random.default_rng(case)
    n = int(rng.integers(4, 30))
    k = int(rng.integers(1, n - 1))
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 6))
    y[:, :3] += 2 * x
    X, Y = map(torch.as_tensor, (x, y))
    for metric in ("cosine", "euclidean"):
        near, rank = [], []
        for t in (x, y):
            far = spatial.distance.cdist(t, t, metric)
            np.fill_diagonal(far, np.inf)
            near.append(far.argsort(1)[:, :k])
            rank.append(stats.rankdata(far, axis=1))
        want = np.mean(
            [len(set(p) & set(q)) / k for p, q in zip(*near, strict=True)]
        )
        assert np.isclose(rp.mutual_knn(X, Y, k=k, metric=metric), want)
    ab, ba = rp.information_imbalance(X, Y, k=k)
    rows = np.arange(n)[:, None]
    assert np.isclose(ab, 2 / n * rank[1][rows, near[0]].mean())
    assert np.isclose(ba, 2 / n * rank[0][rows, near[1]].mean())


# with fewer samples some correlations are one, and PWCCA has a choice
@given(seeds, st.integers(14, 30), st.integers(2, 6), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_what_must_not_change_does_not(seed, n, d, scale):
    X, Y = normal(n, d, seed=seed), normal(n, 5, seed=seed + 1)
    moved = scale * X @ rotation(d, seed) + 3
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mapped = X @ (normal(d, d, seed=seed + 2) + 3 * torch.eye(d)) + 1
    for debiased in (False, True):
        for kernel in ("linear", "rbf"):
            options = dict(kernel=kernel, debiased=debiased)
            base = rp.cka(X, Y, **options)
            assert torch.isclose(rp.cka(moved, Y, **options), base)
            assert torch.isclose(rp.cka(Y, X, **options), base)
            same = rp.cka(X[order], Y[order], **options)
            assert torch.isclose(same, base)
            assert torch.isclose(
                rp.cka(X, moved, **options), torch.ones(()).double()
            )
    for measure in (rp.cca, rp.pwcca):
        assert torch.isclose(measure(Y, mapped), measure(Y, X), atol=1e-6)
    assert torch.isclose(
        rp.shape_distance(mapped, Y, alpha=0),
        rp.shape_distance(X, Y, alpha=0), atol=1e-5,
    )
    for alpha in (0.3, 1.0):
        assert torch.isclose(
            rp.shape_distance(moved, Y, alpha=alpha),
            rp.shape_distance(X, Y, alpha=alpha),
        )
    turned = X @ rotation(d, seed) - 2
    assert torch.isclose(rp.procrustes(turned, Y), rp.procrustes(X, Y))
    assert rp.procrustes(X, turned) < 1e-5


# not on drawn cases: two numbers may happen to agree
@pytest.mark.parametrize("seed", range(5))
def test_what_must_change_does(seed):
    X, Y = normal(20, 3, seed=seed), normal(20, 5, seed=seed + 100)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    mapped = X @ (normal(3, 3, seed=seed + 200) + 3 * torch.eye(3)) + 1
    assert not torch.isclose(rp.cka(X[order], Y), rp.cka(X, Y))
    assert not torch.isclose(
        rp.shape_distance(mapped, Y), rp.shape_distance(X, Y)
    )


@given(seeds, st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=30, deadline=None)
def test_shape_distances_are_metrics(seed, alpha):
    clouds = [normal(12, 2 + k % 4, seed=seed + k) for k in range(7)]
    clouds.append(clouds[0] + 0.01 * clouds[4][:, :2])
    angles = rp.all_pairs(clouds, measure="shape_distance", alpha=alpha)
    report = rp.check_metric(angles.values, rtol=1e-6)
    assert report.violations == 0 and report.self_distance < 1e-6
    lengths = rp.all_pairs(clouds, measure="procrustes").values
    assert rp.check_metric(lengths, rtol=1e-6).violations == 0


@pytest.mark.parametrize("kind", ["wasserstein", "energy"])
def test_stochastic_distances_are_metrics(kind):
    draws = normal(12, 6, 8, 2) * torch.linspace(0.2, 2, 12)[:, None, None, None]
    draws = draws + normal(12, 6, 1, 2, seed=1)
    d = rp.stochastic_distance(draws, kind=kind, n_init=8)
    report = rp.check_metric(d)
    assert report.violations == 0 and report.asymmetry == 0
    # nothing changes under a rotation and shift of one network
    turned = draws @ rotation(2) + 5
    again = rp.stochastic_distance(draws, turned, kind=kind, n_init=8)
    assert torch.allclose(again, d, atol=3e-3)
    assert again.diagonal().max() < 3e-3
    # one that is turned by hand is found by the first start
    swapped = rp.stochastic_distance(turned, draws, kind=kind, n_init=8)
    assert torch.allclose(swapped, d, atol=3e-3)


def bures2(a, b):
    root = linalg.sqrtm(a)
    return np.trace(a + b - 2 * linalg.sqrtm(root @ b @ root).real)


@pytest.mark.parametrize("case", range(20))
def test_gaussian_distance_against_a_search_over_rotations(case):
    rng = np.random.default_rng(case)
    mean = rng.normal(size=(2, 5, 2))
    mean -= mean.mean(1, keepdims=True)
    half = rng.normal(size=(2, 5, 2, 2))
    cov = half @ half.swapaxes(-1, -2)
    alpha = float(rng.uniform(0, 2))
    best = np.inf
    for flip in (1, -1):
        for t in np.linspace(0, 2 * np.pi, 721):
            q = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
            q = q @ np.diag([1, flip])
            value = alpha * ((mean[0] - mean[1] @ q.T) ** 2).sum()
            value += (2 - alpha) * sum(
                bures2(a, q @ b @ q.T) for a, b in zip(*cov, strict=True)
            )
            best = min(best, value / 5)
    got = rp.stochastic_distance(
        tuple(torch.as_tensor(t) for t in (mean, cov)),
        alpha=alpha, n_init=10, steps=400,
    )[0, 1]
    assert got <= best**0.5 + 1e-6
    assert got > best**0.5 - 5e-3


@pytest.mark.parametrize("case", range(20))
def test_energy_distance_on_a_line_against_scipy(case):
    draws = normal(2, 1, 40, 1, seed=case) ** 3
    draws = draws - draws.mean((1, 2), keepdim=True)
    a, b = draws[:, 0, :, 0].numpy()
    want = min(stats.energy_distance(a, s * b) for s in (1, -1)) / 2**0.5
    got = rp.stochastic_distance(draws, kind="energy")[0, 1]
    assert np.isclose(got, want)


def test_moments_and_draws_agree_and_widths_may_differ():
    draws = normal(3, 5, 4, 4)  # as many draws as features
    mean = draws.mean(2)
    off = draws - mean[:, :, None]
    cov = off.mT @ off / 4
    a = rp.stochastic_distance(draws)
    assert torch.allclose(a, rp.stochastic_distance((mean, cov)), atol=1e-8)
    for kind in ("wasserstein", "energy"):
        wide = torch.nn.functional.pad(draws, (0, 2))
        d = rp.stochastic_distance(draws, wide, kind=kind)
        assert d.diagonal().max() < 1e-3
        assert torch.allclose(d, rp.stochastic_distance(draws, kind=kind),
                              atol=2e-2)


@pytest.mark.parametrize("measure", EVERY)
def test_tables_equal_single_pairs(measure):
    single = getattr(rp, measure)
    Xs = {f"a{k}": normal(20, 3 + 4 * k, seed=k) + k for k in range(3)}
    Ys = [normal(20, 30 - 9 * k, seed=9 + k) for k in range(2)]
    for ys in (Ys, None):
        table = rp.all_pairs(Xs, ys, measure)
        other = Ys if ys is not None else list(Xs.values())
        want = [[single(x, y) for y in other] for x in Xs.values()]
        assert torch.allclose(
            table.values, torch.tensor(want), atol=1e-6
        ), measure
        assert table.rows == tuple(Xs)
    batch = torch.stack([normal(20, 4, seed=s) for s in range(5)])
    other = torch.stack([normal(20, 6, seed=20 + s) for s in range(5)])
    found = single(batch, other)
    for s in range(5):
        assert torch.isclose(found[s], single(batch[s], other[s]))
    table = rp.all_pairs(batch, other, measure).values
    assert torch.allclose(table.diagonal(), found.double())
    assert list(rp.all_pairs(Xs, None, measure).to_frame().index) == list(Xs)


def test_debiasing_does_what_it_says():
    base = normal(400, 6)
    X, Y = base @ normal(6, 200, seed=1), base @ normal(6, 150, seed=2)
    X, Y = X + 3 * normal(400, 200, seed=3), Y + 3 * normal(400, 150, seed=4)
    whole = rp.hsic(X, Y, debiased=True)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randperm(400, generator=g)[:20] for _ in range(400)]
    small = torch.stack([rp.hsic(X[p], Y[p], debiased=True) for p in parts])
    error = small.std() / 20
    assert abs(small.mean() - whole) < 4 * error
    crude = torch.stack([rp.hsic(X[p], Y[p]) for p in parts])
    assert crude.mean() - rp.hsic(X, Y) > 10 * error


def test_models_ensembles_and_streams():
    modules = [mlp([8, 12, 10, 4], seed=s) for s in range(4)]
    X = normal(90, 8, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, torch.zeros(90)), batch_size=32
    )
    state = {k: v.clone() for k, v in modules[0].state_dict().items()}
    table = rp.compare_layers(modules[0], loader, modules[1])
    acts = [read_activations(m, X) for m in modules[:2]]
    assert table.rows == tuple(acts[0])
    want = rp.cka(acts[0][table.rows[2]], acts[1][table.columns[3]])
    assert torch.isclose(table.values[2, 3], want.double(), atol=1e-5)
    pairs = rp.compare_layers(
        Ensemble.of(modules[:2]), X, Ensemble.of(modules[2:]), measure="cca"
    )
    one = rp.compare_layers(modules[1], X, modules[3], measure="cca")
    assert torch.allclose(pairs.values[1], one.values, atol=1e-4)
    assert torch.allclose(
        rp.compare_layers(Ensemble.of(modules), X).values[2],
        rp.compare_layers(modules[2], X).values, atol=1e-4,
    )
    stream = rp.stream_cka(modules[0], loader, modules[1])
    first = {k: v[:32].double() for k, v in acts[0].items()}
    sums = rp._HSIC("linear", 0.5, True)
    for at in (slice(0, 32), slice(32, 64), slice(64, 90)):
        a, b = ([v[at].double() for v in t.values()] for t in acts)
        sums.add(*([rp._cloud(v, "X") for v in t] for t in (a, b)))
    want = sums.similarity(stream.rows, stream.columns).values
    assert torch.allclose(stream.values, want, atol=1e-4)
    assert len(first) == len(stream.rows)
    for k, v in modules[0].state_dict().items():
        assert torch.equal(v, state[k])
    assert "CKA" in repr(stream)


def test_inputs_are_left_alone_and_results_repeat():
    X, Y = normal(20, 4), normal(20, 5, seed=1)
    kept = X.clone(), Y.clone()
    for measure in EVERY:
        a = getattr(rp, measure)(X, Y)
        assert torch.equal(a, getattr(rp, measure)(X, Y))
    assert torch.equal(X, kept[0]) and torch.equal(Y, kept[1])


def test_half_precision_and_integers_are_read():
    X, Y = normal(30, 5), normal(30, 4, seed=1)
    exact = rp.cka(X.bfloat16().double(), Y)
    assert torch.isclose(rp.cka(X.bfloat16(), Y), exact, atol=1e-5)
    whole = (X * 10).round()
    assert torch.isclose(rp.cka(whole.long(), Y), rp.cka(whole, Y), atol=1e-5)


def test_a_single_point_has_no_similarity():
    flat, Y = torch.ones(10, 3).double(), normal(10, 2)
    assert rp.cka(flat, Y).isnan() and rp.cca(flat, Y).isnan()
    assert rp.procrustes(flat, Y) > 0


X, Y = normal(10, 3), normal(10, 4, seed=1)
NAN = X.clone()
NAN[0, 0] = torch.nan
BAD = [
    (lambda: rp.cka(X, Y[:5]), "Y: got 5 samples"),
    (lambda: rp.cka(NAN, Y), "X: 1 of 30"),
    (lambda: rp.cka(X[0], Y), "X: got shape"),
    (lambda: rp.cka(X[:3], Y[:3], debiased=True), "X: got 3 samples"),
    (lambda: rp.cka(X, Y, kernel="poly"), "kernel"),
    (lambda: rp.cka(X, Y, kernel="rbf", bandwidth=0), "bandwidth"),
    (lambda: rp.cka_matrix([]), "Xs: empty"),
    (lambda: rp.cka_matrix([X], [Y[:5]]), "Ys: got 5"),
    (lambda: rp.cka_matrix([X, Y[:5]]), "Xs"),
    (lambda: rp.cka_matrix(X), "Xs: got shape"),
    (lambda: rp.cka_matrix([X], kernel="poly"), "kernel"),
    (lambda: rp.cka_matrix([X], minibatch=5), "minibatch"),
    (lambda: rp.svcca(X, Y, variance=2), "variance"),
    (lambda: rp.shape_distance(X, Y, alpha=-1), "alpha"),
    (lambda: rp.check_metric(X), "D: got shape"),
    (lambda: rp.stochastic_distance(X), "A: got shape"),
    (lambda: rp.stochastic_distance(normal(2, 3, 4, 2), kind="no"), "kind"),
    (lambda: rp.stochastic_distance((X, X), kind="energy"), "A: got 2"),
    (lambda: rp.rdm(X, "no"), "kind"),
    (lambda: rp.rsa(X, Y, compare="no"), "compare"),
    (lambda: rp.mutual_knn(X, Y, k=10), "k: got 10"),
    (lambda: rp.mutual_knn(X, Y, k=2, metric="no"), "metric"),
    (lambda: rp.information_imbalance(X, Y, k=0), "k: got 0"),
    (lambda: rp.linear_probe(X, torch.zeros(4).long()), "y: got shape"),
    (lambda: rp.linear_probe(X, torch.zeros(10).long(), folds=1), "folds"),
    (lambda: rp.linear_probe(X, torch.zeros(10).long(), ridge=0), "ridge"),
    (lambda: rp.all_pairs([X], measure="no"), "measure"),
    (lambda: rp.compare_layers(nn.Linear(3, 2), []), "data"),
    (lambda: rp.stream_cka(nn.Linear(3, 2), X[:2].float(), nn.Linear(3, 2)),
     "data: no batch"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
