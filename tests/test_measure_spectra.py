"""Weight spectra against weightwatcher, powerlaw, numpy and closed forms."""

import contextlib
import io
import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import nn

from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import convnet, mlp, transformer
from reappraisal.measure import spectra as sp

seeds = st.integers(0, 10_000)
SHARED = [
    "num_evals", "norm", "log_norm", "spectral_norm", "log_spectral_norm",
    "alpha", "alpha_weighted", "log_alpha_norm", "stable_rank",
    "matrix_rank", "entropy", "D", "sigma", "xmin", "num_pl_spikes",
]
BULK = ["sigma_mp", "bulk_min", "bulk_max", "mp_softrank", "num_spikes"]


def normal(*shape, seed=0, **kind):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, **kind)


@pytest.fixture(scope="module")
def watcher():
    pytest.importorskip("weightwatcher")
    pytest.importorskip("powerlaw")
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher as ww

    def analyse(model, **options):
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                return ww.WeightWatcher(model=model).analyze(**options)
        finally:
            logging.disable(level)

    analyse.util = ww.RMT_Util
    return analyse


def test_two_hundred_layers_against_weightwatcher(watcher):
    rng = np.random.default_rng(0)
    state = {}
    for k in range(200):
        n, m = rng.integers(8, 70, 2).tolist()
        shape = (n, m)
        if k % 4 == 0:
            n, m = rng.integers(8, 24, 2).tolist()
            shape = (n, m, *rng.choice([1, 3], 2).tolist())
        w = normal(*shape, seed=k) * float(rng.choice([0.05, 1, 5]))
        if k % 3 == 0:  # heavy tails
            w = w * torch.exp(normal(*shape, seed=k + 1000))
        if k % 10 == 1:  # not of full rank, and with a spike
            w[: n // 2] = w[:1]
        if k % 10 == 2:
            w = w.double()
        state[f"layer{k}.weight"] = w
    theirs = watcher(state)
    ours = sp.analyse_weights(state)
    assert list(theirs["name"]) == list(ours.layers) and len(theirs) == 200
    for name in SHARED:
        a = theirs[name].to_numpy(float)
        b = ours[name].double().numpy()
        if name == "sigma":  # with fewer than eight values theirs is not set
            known = a > 0
            assert known.mean() > 0.9
            a, b = a[known], b[known]
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6, err_msg=name)


def test_bulk_fit_against_weightwatcher(watcher):
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv2d(20, 12, 5), nn.Linear(90, 60),
        nn.Linear(64, 64), nn.Linear(100, 12),
    )
    with torch.no_grad():
        for k, layer in enumerate(model):
            layer.weight.copy_(normal(*layer.weight.shape, seed=k))
        model[2].weight.add_(0.5)  # a spike
    theirs = watcher(model, mp_fit=True)
    ours = sp.analyse_weights(model, bulk=True)
    for name in BULK:
        np.testing.assert_allclose(
            ours[name].numpy(), theirs[name].to_numpy(float),
            rtol=1e-6, atol=1e-9, err_msg=name,
        )


def test_even_kernels_keep_their_shape(watcher):
    # the tool swaps N and M once a slice, so even kernels come out transposed
    w = normal(10, 20, 2, 2)
    theirs = watcher({"a.weight": w})
    assert theirs["N"][0] == 10
    a = sp.layer_metrics(w)
    assert np.isclose(a["alpha"], theirs["alpha"][0])


@pytest.mark.parametrize("case", range(12))
def test_randomised_distance_against_weightwatcher(watcher, case):
    w = normal(30, 20, seed=case)
    a, b = sp.spectrum(w), sp.spectrum(sp.shuffled(w, case))
    want = watcher.util.jensen_shannon_distance(a.numpy(), b.numpy())
    assert np.isclose(sp.spectral_distance(a, b), want)
    # their law under shuffling is the same: compare many draws of both
    if case == 0:
        ours = [
            sp.layer_metrics(w, randomise=True, seed=s)["max_rand_eval"]
            for s in range(100)
        ]
        rng = np.random.default_rng(0)
        flat = w.double().numpy().ravel()
        theirs = [
            np.linalg.norm(rng.permutation(flat).reshape(30, 20), 2) ** 2
            for _ in range(100)
        ]
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize("case", range(40))
def test_power_law_against_powerlaw(case):
    powerlaw = pytest.importorskip("powerlaw")
    rng = np.random.default_rng(case)
    x = 1 + rng.pareto(rng.uniform(0.7, 4), rng.integers(20, 120))
    x *= 10.0 ** rng.integers(-3, 3)
    if case % 4 == 0:  # ties
        x = np.repeat(x[:30], 2)
    if case % 4 == 1:  # a law with a knee
        x[: len(x) // 2] = rng.uniform(0, x.min(), len(x) // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(
            x, parameter_ranges={"alpha": [1, 1e3]}, verbose=0
        )
    ours = sp.fit_powerlaw(x)
    if case % 4 == 0:
        # among equal values only the first can begin a tail
        assert (x >= ours.xmin.item()).sum() == ours.n_tail
        return
    assert np.isclose(ours.xmin, theirs.xmin)
    assert np.isclose(ours.alpha, theirs.alpha, atol=1e-3)
    assert np.isclose(ours.D, theirs.D, atol=1e-3)


def every_tail(x, threshold=0.0):
    x = np.sort(x)
    x, best = x[x > threshold], (np.inf, np.nan, np.nan)
    for i in range(len(x) - 1):
        t = x[i:]
        if i and x[i - 1] == x[i]:
            continue
        s = np.log(t / t[0]).sum()
        if s <= 1e-12:
            continue
        a = 1 + len(t) / s
        gap = 1 - (t / t[0]) ** (1 - a) - np.arange(len(t)) / len(t)
        if np.abs(gap).max() < best[0]:
            best = np.abs(gap).max(), a, t[0]
    return best


@pytest.mark.parametrize("case", range(200))
def test_the_shortcut_finds_what_the_long_way_finds(case):
    rng = np.random.default_rng(case)
    n = int(rng.integers(1, 400))
    kind = case % 5
    x = [
        lambda: 1 + rng.pareto(rng.uniform(0.3, 6), n),
        lambda: rng.chisquare(3, n),
        lambda: np.linalg.svd(rng.standard_normal((n, n)))[1] ** 2,
        lambda: rng.integers(1, 6, n).astype(float),  # ties
        lambda: np.exp(rng.standard_normal(n) * 5),
    ][kind]()
    threshold = float(rng.choice([0, np.quantile(x, 0.4)]))
    fit = sp.fit_powerlaw(x, threshold=threshold)
    D, alpha, xmin = every_tail(x, threshold)
    np.testing.assert_allclose(fit.alpha, alpha, rtol=1e-8)
    np.testing.assert_allclose(fit.xmin, xmin, rtol=1e-12)
    if np.isfinite(alpha):
        assert abs(fit.D.item() - D) < 1e-10
        assert int(fit.n_tail) == (x >= xmin).sum()


def test_a_batch_is_its_members():
    x = torch.as_tensor(np.random.default_rng(0).pareto(2, (7, 3, 90)) + 1)
    for options in ({}, {"truncated": True}, {"threshold": 1.3},
                    {"corrected_below": 200}, {"xmin": 1.5}):
        fit = sp.fit_powerlaw(x, **options)
        assert fit.alpha.shape == (7, 3)
        for i in range(7):
            alone = sp.fit_powerlaw(x[i, 1], **options)
            for name, value in vars(alone).items():
                assert torch.equal(value, vars(fit)[name][i, 1]), options


@pytest.mark.parametrize("alpha", [1.5, 2.5, 4.0, 8.0])
def test_pareto_samples_give_their_exponent(alpha):
    rng = np.random.default_rng(int(alpha * 10))
    x = rng.pareto(alpha - 1, (200, 512)) + 1
    fit = sp.fit_powerlaw(x, xmin=1.0)
    # the maximum likelihood estimate of the rate is inverse gamma
    bias = (alpha - 1) * 512 / 511
    error = (alpha - 1) / 512**0.5 / 200**0.5
    assert abs(fit.alpha.mean() - 1 - bias) < 4 * error
    found = sp.fit_powerlaw(x).alpha
    assert abs(found.median() / alpha - 1) < 0.1


def test_truncated_against_the_likelihood():
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(0)
    for alpha in (1.3, 2.0, 3.5):
        u = rng.random(400)
        x = (1 - u * (1 - 8 ** (1 - alpha))) ** (1 / (1 - alpha))
        top = x.max()

        def loss(a, x=x, top=top):
            mass = 1 - top ** (1 - a)
            return -np.log((a - 1) * x**-a / mass).sum()

        want = minimize_scalar(loss, bounds=(1.0001, 20), method="bounded")
        fit = sp.fit_powerlaw(x, xmin=1.0, truncated=True)
        assert abs(fit.alpha - want.x) < 1e-3


@pytest.mark.parametrize("case", range(200))
def test_spectrum_and_ranks_against_numpy(case):
    rng = np.random.default_rng(case)
    shape = rng.integers(1, 40, 2).tolist()
    if case % 5 == 4:
        shape += rng.integers(1, 4, 2).tolist()
    kinds = torch.float32, torch.float64, torch.float16, torch.bfloat16
    w = normal(*shape, seed=case).to(kinds[case % 4])
    if case % 3 == 0:
        w[: shape[0] // 2] = 0
    if case % 50 == 0:
        w = torch.zeros_like(w)
    a = w.double().numpy().reshape(*shape[:2], -1)
    sv = [np.linalg.svd(a[..., k], compute_uv=False) for k in range(a.shape[2])]
    lam = np.sort(np.concatenate(sv) ** 2)
    got = sp.spectrum(w, conv_norm=False)
    np.testing.assert_allclose(got, lam, rtol=1e-6, atol=1e-12 * lam.max())
    np.testing.assert_allclose(got, sp.spectrum(w, conv_norm=False, exact=True),
                               rtol=1e-6, atol=1e-12 * lam.max())
    if lam.max() == 0:
        assert sp.stable_rank(got).isnan()
        assert sp.matrix_rank(got, max(shape[:2])) == 0
        return
    if len(shape) == 2:
        assert sp.matrix_rank(got, max(shape)) == np.linalg.matrix_rank(a[..., 0])
    np.testing.assert_allclose(sp.stable_rank(got), lam.sum() / lam.max())
    np.testing.assert_allclose(
        sp.participation_ratio(got), lam.sum() ** 2 / (lam**2).sum()
    )
    np.testing.assert_allclose(
        sp.effective_rank(got), np.exp(stats.entropy(np.sqrt(lam))), rtol=1e-5
    )
    other = np.linspace(0, 1, len(lam)) + 0.1
    np.testing.assert_allclose(
        sp.spectral_distance(got, torch.as_tensor(other)),
        jensenshannon(lam, other), rtol=1e-6, atol=1e-7,
    )


@given(
    st.floats(0.01, 100), st.floats(0.02, 10), st.integers(0, 10_000)
)
@settings(max_examples=100, deadline=None)
def test_marchenko_pastur(sigma2, aspect, seed):
    law = sp.MarchenkoPastur(sigma2, aspect)
    lo, hi = law.edges
    x = np.sort(np.random.default_rng(seed).uniform(lo, hi, 5))
    assert law.cdf(-1) == 0 and np.isclose(law.cdf(hi), 1)
    assert np.isclose(law.cdf(lo), law.atom, atol=1e-9)
    f = law.cdf(x)
    assert (np.diff(f) >= 0).all() and (f >= law.atom - 1e-12).all()
    # the derivative of the one is the other
    h = 1e-5 * (hi - lo)
    x = x[(x > lo + 100 * h) & (x < hi - 100 * h)]
    slope = (law.cdf(x + h) - law.cdf(x - h)) / (2 * h)
    np.testing.assert_allclose(slope, law.pdf(x), rtol=1e-3)


@pytest.mark.parametrize("shape", [(900, 300), (500, 500), (200, 600)])
def test_gaussian_matrices_follow_the_law(shape):
    n, m = shape
    w = normal(n, m, seed=n, dtype=torch.float64) * 1.7
    lam = torch.linalg.eigvalsh(w.T @ w).clamp(min=0) / n
    law = sp.MarchenkoPastur(1.7**2, m / n)
    lam[lam < 1e-9] = 0
    assert stats.kstest(lam[lam > 0], lambda x: (
        (law.cdf(x) - law.atom) / (1 - law.atom)
    )).statistic < 0.03


@given(seeds, st.integers(9, 30), st.integers(9, 30))
@settings(max_examples=40, deadline=None)
def test_invariances(seed, n, m):
    w = normal(n, m, seed=seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    base = sp.layer_metrics(w, threshold=0, exact=True)
    turned = torch.linalg.qr(normal(n, n, seed=seed + 1, dtype=w.dtype))[0] @ w
    permuted = w[torch.randperm(n, generator=g)][:, torch.randperm(m, generator=g)]
    for other in (turned, permuted, w.T):
        found = sp.layer_metrics(other, threshold=0, exact=True)
        for name, value in base.items():
            assert torch.allclose(
                found[name].double(), value.double(), rtol=1e-7
            ), name
    c = 3.0
    scaled = sp.layer_metrics(c * w, threshold=0, exact=True)
    shift = 2 * np.log10(c)
    for name in ("alpha", "stable_rank", "effective_rank", "entropy",
                 "matrix_rank", "D", "num_pl_spikes", "participation_ratio"):
        assert torch.allclose(
            scaled[name].double(), base[name].double(), rtol=1e-7
        ), name
    assert torch.isclose(scaled["log_norm"], base["log_norm"] + shift)
    assert torch.isclose(
        scaled["alpha_weighted"],
        base["alpha_weighted"] + base["alpha"] * shift,
    )
    # what must change does: a general change of basis moves the spectrum
    bent = sp.layer_metrics(w @ torch.diag(torch.linspace(0.1, 3, m).double()))
    assert not torch.isclose(bent["stable_rank"], base["stable_rank"])


def test_all_spectral_metrics_survive_new_singular_vectors():
    w = normal(48, 48, seed=3, dtype=torch.float64)
    u, s, v = torch.linalg.svd(w)
    q = torch.linalg.qr(normal(48, 48, seed=4, dtype=torch.float64))[0]
    a = sp.layer_metrics(w, bulk=True)
    b = sp.layer_metrics(q @ torch.diag(s) @ v, bulk=True)
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), atol=1e-8), name


@pytest.mark.parametrize(
    "build", [
        lambda s: mlp([20, 16, 12], seed=s),
        lambda s: convnet(seed=s),
        lambda s: transformer(11, 7, 8, seed=s),
    ],
)
def test_models_state_dicts_and_ensembles_agree(build):
    modules = [build(s) for s in range(3)]
    before = {k: v.clone() for k, v in modules[0].state_dict().items()}
    single = sp.analyse_weights(modules[0], bulk=True)
    again = sp.analyse_weights(dict(modules[0].named_parameters()), bulk=True)
    stacked = sp.analyse_weights(Ensemble.of(modules), bulk=True)
    assert single.layers == again.layers == stacked.layers
    for name, value in single.metrics.items():
        assert torch.equal(value.nan_to_num(), again[name].nan_to_num())
        assert torch.allclose(
            stacked[name][0].double(), value.double(), rtol=1e-6, equal_nan=True
        )
    for k, v in modules[0].state_dict().items():
        assert torch.equal(v, before[k])
    frame = stacked.to_frame()
    assert len(frame) == 3 * len(stacked.layers)
    assert stacked.summary()["alpha"].shape == (3,)
    assert f"{len(stacked.layers)} layers" in repr(stacked)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (40, 33), (64, 64)])
def test_many_matrices_together_by_lapack(shape):
    g = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(5, *shape, generator=g, dtype=torch.float64)
    w[1] = 0.0
    w[2, :, : shape[1] // 2] = 0.0
    w[3] = torch.eye(*shape)
    w[4] *= 1e-12
    before = w.clone()
    main, beside = sp._bidiagonal(w)
    found = sp._singular_values(main, beside)
    want = torch.linalg.svdvals(w).flip(-1)
    assert torch.equal(w, before)
    assert (found.diff(dim=-1) >= 0).all()
    assert ((found - want).abs() <= 2e-14 * want[:, -1:]).all()
    squares = sp.bidiagonal_spectrum(main, beside)
    close = (squares - want.square()).abs()
    assert (close <= 2e-14 * want[:, -1:].square()).all()


def test_wide_batches_are_cut_otherwise():
    g = torch.Generator().manual_seed(0)
    main = torch.rand(34_000, 4, generator=g, dtype=torch.float64)
    beside = torch.rand(34_000, 3, generator=g, dtype=torch.float64)
    assert main.numel() > 2**17
    many = sp._singular_values(main, beside)[:9]
    few = sp._singular_values(main[:9], beside[:9])
    torch.testing.assert_close(many, few, rtol=0, atol=1e-15)


def test_batched_layers_equal_single_ones():
    for shape in [(12, 20), (16, 9, 3, 3), (10, 12, 5)]:
        w = normal(4, *shape)
        many = sp.layer_metrics(w, batched=True, bulk=True, randomise=True)
        for k in range(4):
            one = sp.layer_metrics(w[k], bulk=True, randomise=True)
            for name, value in one.items():
                assert torch.allclose(
                    many[name][k].double(), value.double(), rtol=1e-6
                ), name


def test_shuffling_is_seeded_and_keeps_entries():
    w = normal(6, 5, 3, 3)
    a, b = sp.shuffled(w, 1), sp.shuffled(w, 1)
    assert torch.equal(a, b) and not torch.equal(a, sp.shuffled(w, 2))
    assert torch.equal(
        a.flatten(0, 1).sort(0).values, w.flatten(0, 1).sort(0).values
    )
    assert not torch.equal(a.flatten(0, 1)[:, 0, 0].argsort(),
                           w.flatten(0, 1)[:, 0, 0].argsort())


BAD = [
    (lambda: sp.spectrum(torch.ones(3)), "weight"),
    (lambda: sp.spectrum(torch.ones(3, 3).long()), "weight"),
    (lambda: sp.spectrum(torch.ones(3, 0)), "weight"),
    (lambda: sp.spectrum(np.ones((3, 3))), "weight"),
    (lambda: sp.spectrum(torch.full((3, 3), torch.nan)), "not finite"),
    (lambda: sp.fit_powerlaw(torch.tensor([-1.0, 2])), "evals"),
    (lambda: sp.fit_powerlaw(torch.tensor([torch.nan, 2])), "evals"),
    (lambda: sp.fit_powerlaw(torch.empty(0)), "evals"),
    (lambda: sp.fit_powerlaw(torch.ones(4), xmin=-1), "xmin"),
    (lambda: sp.fit_bulk(torch.zeros(4), 0.5), "evals"),
    (lambda: sp.fit_bulk(torch.ones(4), 1.5), "aspect"),
    (lambda: sp.MarchenkoPastur(-1, 1), "sigma2"),
    (lambda: sp.MarchenkoPastur(1, 0), "aspect"),
    (lambda: sp.spectral_distance(torch.ones(3), torch.ones(4)), "others"),
    (lambda: sp.analyse_weights(nn.ReLU()), "model"),
    (lambda: sp.analyse_weights([1]), "model"),
    (lambda: sp.analyse_weights(nn.Linear(3, 3)), "eigenvalues"),
    (lambda: sp.analyse_weights(mlp([9, 9, 9]), layers=["no"]), "layers"),
    (lambda: sp.analyse_weights(mlp([9, 9, 9]))["no"], "metric"),
]


@pytest.mark.parametrize("call, name", BAD)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_a_broken_layer_is_named():
    state = mlp([9, 9, 9]).state_dict()
    key = [k for k, v in state.items() if v.ndim == 2][1]
    state[key][0, 0] = torch.inf
    with pytest.raises(ValueError, match=key.removesuffix(".weight")):
        sp.analyse_weights(state)


def test_degenerate_layers_have_no_exponent():
    for w in (torch.zeros(9, 9), torch.eye(9), torch.ones(9, 9)):
        metrics = sp.layer_metrics(w)
        assert metrics["alpha"].isnan() and metrics["num_pl_spikes"] == 0
    assert sp.layer_metrics(torch.eye(9))["stable_rank"] == 9
