"""Distances between functions against scipy, scikit-learn and by hand."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import mlp
from reappraisal.measure.functional import (
    DISTANCES,
    activation_distance,
    agreement_gain,
    churn,
    compare,
    compare_outputs,
    disagreement,
    error_consistency,
    js_divergence,
    kendall_tau,
    logit_cosine_distance,
    rank_correlation,
    rank_disagreement,
    relative_to_twins,
    topk_overlap,
    transfer_share,
    twin_distances,
)
from reappraisal.measure.reading import Outputs, read_outputs


def case(i):
    """Two sets of logits [N, C] and labels; every sixth of one vice."""
    g = np.random.default_rng([1000, i])
    n, c = int(g.choice([1, 2, 30])), int(g.integers(2, 9))
    z, w = g.normal(size=(2, n, c)) * g.choice([0.1, 1, 10])
    y = g.integers(0, c, n)
    vice = i % 6
    if vice == 1:
        z, w = z.round(), w.round()
    elif vice == 2:
        z = 500.0 * np.eye(c)[g.integers(0, c, n)]
    elif vice == 3:
        w[:] = 0
    elif vice == 4:
        y[:] = 0
    elif vice == 5:
        w = z.copy()
    return torch.tensor(z), torch.tensor(w), torch.tensor(y)


def soft(t):
    return t.softmax(-1)


def mean_of(function, z, w):
    """Mean of a correlation over samples, 0 where one ties all."""
    rows = [
        0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else function(a, b)[0]
        for a, b in zip(z.numpy(), w.numpy(), strict=True)
    ]
    return np.mean(rows)


def test_scipy_and_sklearn_agree_on_200_cases():
    from scipy.spatial.distance import cosine, jensenshannon
    from scipy.stats import kendalltau, spearmanr
    from sklearn.metrics import cohen_kappa_score

    for i in range(200):
        z, w, y = case(i)
        p, q = soft(z), soft(w)
        js = np.mean(jensenshannon(p, q, axis=1) ** 2)
        assert abs(js_divergence(p, q) - js) < 1e-12
        norms = [np.linalg.norm(a - b) for a, b in zip(p, q, strict=True)]
        assert abs(activation_distance(p, q) - np.mean(norms)) < 1e-12
        rho = mean_of(spearmanr, z, w)
        assert abs(rank_correlation(z, w) - rho) < 1e-9
        tau = mean_of(kendalltau, z, w)
        assert abs(rank_correlation(z, w, "kendall") - tau) < 1e-9
        if (z.norm(dim=1) > 0).all() and (w.norm(dim=1) > 0).all():
            far = np.mean([cosine(a, b) for a, b in zip(z, w, strict=True)])
            assert abs(logit_cosine_distance(z, w) - far) < 1e-9
        right = [t.argmax(-1) == y for t in (z, w)]
        kappa = error_consistency(z, w, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = cohen_kappa_score(*right, labels=[False, True])
        assert kappa.isnan() == np.isnan(theirs)
        if not np.isnan(theirs):
            assert abs(kappa - theirs) < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=2, max_size=9))
def test_tau_with_ties_by_scipy(pairs):
    x, y = np.array(pairs, dtype=float).T
    want = 0.0
    if np.ptp(x) and np.ptp(y):
        want = scipy.stats.kendalltau(x, y).statistic
    both = torch.tensor(np.array([x, -x])), torch.tensor(y)
    found = kendall_tau(*both)
    assert found.tolist() == pytest.approx([want, -want])


def test_brute_force_agrees_on_200_cases():
    for i in range(200):
        z, w, y = case(i)
        n, c = z.shape
        bad = table = 0.0
        counts = dict.fromkeys(
            ("kept", "broken", "fixed", "same_error", "other_error"), 0
        )
        rows = zip(z.tolist(), w.tolist(), y.tolist(), strict=True)
        for a, b, label in rows:
            for s, t in itertools.combinations(range(c), 2):
                bad += abs(np.sign(a[s] - a[t]) - np.sign(b[s] - b[t])) / 2
            first, second = np.argmax(a), np.argmax(b)
            if first == label:
                counts["kept" if second == label else "broken"] += 1
            elif second == label:
                counts["fixed"] += 1
            else:
                same = first == second
                counts["same_error" if same else "other_error"] += 1
            ranks = [
                sorted(range(c), key=lambda k, r=r: (-r[k], k))[:2]
                for r in (a, b)
            ]
            table += len(set(ranks[0]) & set(ranks[1])) / 2
        pairs = n * c * (c - 1) / 2
        assert abs(rank_disagreement(z, w) - bad / pairs) < 1e-12
        assert abs(topk_overlap(z, w, 2) - table / n) < 1e-12
        found = churn(z, w, y)
        for name, count in counts.items():
            assert abs(getattr(found, name) - count / n) < 1e-12
        assert abs(found.disagreement - disagreement(z, w)) < 1e-12


PAIRED = {
    "activation": lambda z, w: activation_distance(soft(z), soft(w)),
    "js": lambda z, w: js_divergence(soft(z), soft(w)),
    "disagreement": disagreement,
    "cosine": logit_cosine_distance,
    "ranks": rank_disagreement,
}


@pytest.mark.parametrize("name", list(PAIRED))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_what_distances_see_and_do_not(name, seed):
    d = PAIRED[name]
    z, w, _ = case(6 * seed)
    g = torch.Generator().manual_seed(seed)
    value = d(z, w)
    tops = {"activation": 2**0.5, "js": math.log(2), "cosine": 2}
    top = tops.get(name, 1)
    assert -1e-12 <= value <= top + 1e-12
    assert abs(d(z, z)) < 1e-9
    assert torch.allclose(d(w, z), value, atol=1e-12)
    rows = torch.randperm(len(z), generator=g)
    assert torch.allclose(d(z[rows], w[rows]), value, atol=1e-12)
    classes = torch.randperm(z.shape[1], generator=g)
    assert torch.allclose(d(z[:, classes], w[:, classes]), value, atol=1e-12)
    # adding a constant to a sample's logits leaves its function alone
    if name != "cosine":
        assert torch.allclose(d(z + 3, w), value, atol=1e-9)
    # a temperature is seen by probabilities only
    heated = d(2 * z, w)
    if name in ("activation", "js"):
        assert d(2 * z, z) > 0
    else:
        assert torch.allclose(heated, value, atol=1e-9)
    # pairs are each alone; one network may face many
    both = d(torch.stack([z, w]), torch.stack([w, w]))
    assert torch.allclose(both, torch.stack([value, d(w, w)]), atol=1e-12)
    assert torch.allclose(d(torch.stack([z, w]), w), both, atol=1e-12)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_bounds_by_accuracy(seed):
    z, w, y = case(seed)
    a, b = ((t.argmax(-1) != y).double().mean() for t in (z, w))
    d = disagreement(z, w)
    assert abs(a - b) - 1e-12 <= d
    if z.shape[1] == 2:
        assert d <= a + b + 1e-12
    found = churn(z, w, y)
    assert abs(sum(vars(found).values()) - 1) < 1e-12
    assert abs((found.fixed - found.broken) - (a - b)) < 1e-12


def test_small_js_keeps_its_digits():
    p = torch.tensor([[0.5, 0.5]]).double()
    e = 1e-7
    q = torch.tensor([[0.5 + e, 0.5 - e]], dtype=torch.float64)
    # to second order, sum of (p - q)^2 / 8p
    assert abs(js_divergence(p, q) / (e**2 / 2) - 1) < 1e-6


def test_blocks_do_not_matter(monkeypatch):
    z, w = torch.randn(3, 50, 6), torch.randn(50, 6)
    whole = rank_disagreement(z, w), rank_correlation(z, w)
    import reappraisal.measure.functional as module

    def one_by_one(p, q):
        p, q = torch.broadcast_tensors(p, q)
        return zip(p.split(1, -2), q.split(1, -2), strict=True)

    monkeypatch.setattr(module, "_blocks", one_by_one)
    assert torch.allclose(rank_disagreement(z, w), whole[0])
    assert torch.allclose(rank_correlation(z, w), whole[1])


def test_kappa_of_planted_errors():
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(20000, dtype=torch.long)
    a = torch.rand(20000, generator=g) < 0.3
    b = torch.rand(20000, generator=g) < 0.2

    def logits(wrong):
        return torch.stack([~wrong, wrong], -1).float()

    assert abs(error_consistency(logits(a), logits(b), y)) < 0.03
    assert error_consistency(logits(a), logits(a), y) == 1
    assert error_consistency(logits(a), logits(~a), y) < 0
    never = torch.zeros_like(a)
    assert error_consistency(logits(never), logits(never), y).isnan()
    assert error_consistency(logits(a), logits(never), y) == 0


X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3


def nets(n, start=0):
    return Ensemble.of([mlp([6, 8, 3], seed=start + i) for i in range(n)])


def test_compare_modules_ensembles_and_shuffled_loaders():
    a, b = nets(3), nets(3, 10)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), 7, shuffle=True
    )
    found = compare(a, b, loader)
    for i in range(3):
        one = compare(a.member(i), b.member(i), (X, Y))
        for name in DISTANCES:
            assert abs(one[name] - found[name][i]) < 1e-6
        assert abs(one.consistency - found.consistency[i]) < 1e-9
    against = compare(a.member(0), b, X)
    assert against["disagreement"].shape == (3,)
    assert against.churn is None and "broken" not in repr(against)
    assert "error consistency" in repr(found)
    assert found.to_frame().shape == (3, len(DISTANCES) + 6)
    for d in compare(a, a, (X, Y)).distances.values():
        assert d.abs().max() < 1e-9


def test_compare_needs_the_same_samples():
    net = mlp([6, 3], seed=0)
    a = read_outputs(net, (X, Y))
    b = read_outputs(net, (X, Y.roll(1)))
    with pytest.raises(ValueError, match="a, b: labels differ"):
        compare_outputs(a, b)
    with pytest.raises(ValueError, match="shapes"):
        compare(net, mlp([6, 4], seed=0), X)
    with pytest.raises(ValueError, match="shapes"):
        compare(nets(2), nets(3), X)


def test_twins_by_hand():
    out = read_outputs(nets(4), (X, Y))
    twins = twin_distances(out)
    assert set(twins) == set(DISTANCES)
    for name, table in twins.items():
        assert torch.equal(table, table.T)
        assert table.diagonal().abs().max() == 0
        for i, j in itertools.combinations(range(4), 2):
            d = DISTANCES[name](Outputs(out.logits[i]), Outputs(out.logits[j]))
            assert abs(table[i, j] - d) < 1e-9
    assert "Twins(4" in repr(twins)
    with pytest.raises(ValueError, match="outputs: logits of shape"):
        twin_distances(Outputs(out.logits[0]))
    relative = compare(nets(4), nets(4, 50), (X, Y)).relative_to(twins)
    assert set(relative) == set(DISTANCES)


@pytest.mark.parametrize("own", [True, False])
def test_ratio_to_twins(own):
    g = torch.Generator().manual_seed(0)
    t = torch.rand(6, 6, generator=g).double() + 1
    t = (t + t.T) / 2
    t.fill_diagonal_(0)
    d = torch.rand(6, generator=g).double()
    found = relative_to_twins(d, t, own=own)
    far = t.sum() / 30
    assert abs(found.estimate - d.mean() / far) < 1e-12
    assert found.lo < found.estimate < found.hi and found.null == 1
    # the same at any unit; the diagonal is not looked at
    scaled = relative_to_twins(10 * d, 10 * t + torch.eye(6), own=own)
    assert abs(scaled.lo - found.lo) < 1e-9
    nothing = relative_to_twins(0 * d, t, own=own)
    assert nothing.estimate == nothing.hi == 0
    again = relative_to_twins(d, t, own=own)
    assert again == found


def test_ratio_to_twins_covers():
    """Strangers among points in space: 1 is in nearly every interval."""
    g = np.random.default_rng(0)
    hits, runs = 0, 150
    for _ in range(runs):
        x = g.normal(size=(12, 5))
        child = g.normal(size=(12, 5))
        d = np.linalg.norm(x - child, axis=1)
        t = np.linalg.norm(x[:, None] - x, axis=-1)
        hits += 1.0 in relative_to_twins(
            torch.tensor(d), torch.tensor(t), n_boot=400
        )
    assert hits / runs > 0.88


def test_transfer_share():
    out = read_outputs(nets(9), (X, Y)).probs
    teacher, control = out[0], out[1:]
    far = activation_distance(control, teacher)
    for share in (0.0, 0.25, 0.5, 1.0):
        student = (1 - share) * control + share * teacher
        near = activation_distance(student, teacher)
        found = transfer_share(near, far)
        assert abs(found.estimate - share) < 1e-6
        assert found.null == 0
        assert found.lo - 1e-9 <= found.estimate <= found.hi + 1e-9
    assert transfer_share(2 * far, far).estimate == -1
    with pytest.raises(ValueError, match="control: all distances"):
        transfer_share(far, 0 * far)
    with pytest.raises(ValueError, match="negative"):
        transfer_share(-far, far)


def test_agreement_gain_planted():
    g = torch.Generator().manual_seed(0)
    n, s = 4000, 6
    y = torch.randint(4, (n,), generator=g)

    def noisy():
        z = torch.nn.functional.one_hot(y, 4) * 2.0
        return z + torch.randn(n, 4, generator=g)

    teacher = torch.stack([noisy() for _ in range(s)])
    control = torch.stack([noisy() for _ in range(s)])
    copied = torch.rand(s, n, 1, generator=g) < 0.2
    student = torch.where(copied, teacher, control)
    gain = agreement_gain(teacher, student, control, y)
    assert abs(gain.room_ratio().estimate - 1) < 0.1
    assert gain.ratio().estimate > 1.2
    assert (gain.wrong / gain.room_wrong - 0.2).abs().max() < 0.05
    assert gain.n_wrong == (teacher.argmax(-1) != y).sum()
    nothing = agreement_gain(teacher, control, control, y)
    assert nothing.right.abs().max() == 0 == nothing.wrong.abs().max()
    one = agreement_gain(teacher[0], student, control, y)
    assert one.n_wrong == s * (teacher[0].argmax(-1) != y).sum()
    perfect = torch.nn.functional.one_hot(y, 4).float()
    with pytest.raises(ValueError, match="teacher: one is always right"):
        agreement_gain(perfect, student, control, y)
    assert "errors)" in repr(gain)


P = torch.tensor([[0.3, 0.7], [0.9, 0.1]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: activation_distance(P, 2 * P), "q: a row sums to 2"),
        (lambda: js_divergence(P - 1, P), "p: smallest"),
        (lambda: disagreement(P, P[:1]), "p, q: shapes"),
        (lambda: disagreement(P, P / 0), "q: not finite"),
        (lambda: logit_cosine_distance(P[:, :1], P), "z: one column"),
        (lambda: rank_correlation(P, P, "pearson"), "method: got 'pearson'"),
        (lambda: topk_overlap(P, P, 3), "k: got 3; 1 to 2"),
        (lambda: churn(P, P, [0, 2]), "y: labels from 0 to 2"),
        (lambda: relative_to_twins(P[0], torch.zeros(2, 2)), "all distances"),
        (lambda: relative_to_twins(P[0], torch.ones(3, 3)), "n = T"),
        (lambda: relative_to_twins(-P[0], torch.ones(2, 2)), "distance: not"),
        (lambda: compare(nn.Linear(6, 3), 3, X), "model: got int"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
