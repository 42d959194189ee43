"""Synthetic tasks against brute force and closed forms."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reappraisal.lab import synthetic as ls

primes = st.sampled_from([2, 3, 5, 7, 11, 13, 23])
seeds = st.integers(0, 10_000)


@given(
    st.integers(2, 23), st.sampled_from(sorted(ls.OPERATIONS)),
    st.floats(0.1, 1.0), seeds, st.floats(0, 1), st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_modular(p, op, frac, seed, corrupt, random_table):
    prime = all(p % q for q in range(2, p))
    if op == "divide" and not prime:
        with pytest.raises(ValueError, match="prime"):
            ls.modular(p, op, frac, seed)
        return
    pairs = p * (p - 1) if op == "divide" else p * p
    options = dict(corrupt=corrupt, random_table=random_table)
    if round(frac * pairs) == 0:
        with pytest.raises(ValueError, match="frac"):
            ls.modular(p, op, frac, seed, **options)
        return
    t = ls.modular(p, op, frac, seed, **options)
    assert t.X.shape == (pairs, 4) and t.vocabulary == p + 2
    a, o, b, e = t.X.T
    assert (o == p).all() and (e == p + 1).all()
    want = [(i, j) for i, j in product(range(p), repeat=2)
            if op != "divide" or j]
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == want
    # exact counts, disjoint and complete rows
    assert t.train.sum() == round(frac * pairs)
    rows = torch.cat([t.train_rows, t.test_rows])
    assert torch.equal(rows.sort()[0], torch.arange(pairs))
    # corruption: exact, in training rows only, never right by accident
    assert t.corrupted.sum() == round(corrupt * int(t.train.sum()))
    assert torch.equal(t.y != t.clean, t.corrupted)
    assert not (t.corrupted & ~t.train).any()
    assert t.y.min() >= 0 and t.y.max() < p
    again = ls.modular(p, op, frac, seed, **options)
    assert torch.equal(t.y, again.y) and torch.equal(t.train, again.train)
    plain = ls.modular(p, op, frac, seed)
    assert torch.equal(plain.train, t.train)
    assert plain.onehot.shape == (pairs, 2 * p)
    assert torch.equal(plain.onehot[:, :p].argmax(1), a)
    assert torch.equal(plain.onehot[:, p:].argmax(1), b)


@given(primes)
def test_modular_rules_by_hand(p):
    rules = {
        "add": lambda a, b: (a + b) % p,
        "subtract": lambda a, b: (a - b) % p,
        "multiply": lambda a, b: a * b % p,
        "divide": lambda a, b: next(c for c in range(p) if c * b % p == a),
        "squares": lambda a, b: (a * a + b * b) % p,
        "squares_product": lambda a, b: (a * a + a * b + b * b) % p,
        "cubic": lambda a, b: (a**3 + a * b * b + b) % p,
    }
    assert set(rules) == set(ls.OPERATIONS)
    for op, rule in rules.items():
        t = ls.modular(p, op, 1.0)
        for (a, _, b, _), c in zip(t.X.tolist(), t.y.tolist(), strict=True):
            assert c == rule(a, b)


def test_random_table_has_no_rule():
    p, hits = 97, []
    for seed in range(20):
        t = ls.modular(p, seed=seed, random_table=True)
        hits.append((t.clean == (t.X[:, 0] + t.X[:, 2]) % p).sum().item())
    # matches with addition are binomial(p * p, 1 / p), mean p
    assert abs(np.mean(hits) - p) < 5 * math.sqrt(p / 20)
    counts = t.clean.bincount(minlength=p).double()
    chi2 = ((counts - p) ** 2 / p).sum()
    assert chi2 < (p - 1) + 5 * math.sqrt(2 * (p - 1))


def test_more_corruption_contains_less():
    less = ls.modular(23, seed=3, corrupt=0.1)
    more = ls.modular(23, seed=3, corrupt=0.4)
    assert (less.corrupted <= more.corrupted).all()
    assert torch.equal(less.y[less.corrupted], more.y[less.corrupted])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"p": 1}, "p: got 1"),
        ({"p": 2.5}, "p: got 2.5"),
        ({"op": "plus"}, "op: got 'plus'.*add"),
        ({"frac": 0}, "frac"),
        ({"frac": 1.1}, "frac"),
        ({"corrupt": -0.1}, "corrupt"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_modular_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        ls.modular(**({"p": 7} | bad))


@given(st.integers(1, 9), st.data(), seeds)
@settings(max_examples=40, deadline=None)
def test_sparse_parity_is_a_walsh_function(bits, data, seed):
    k = data.draw(st.integers(1, bits))
    task = ls.sparse_parity(bits, k, seed)
    full = task.every()
    assert len(full.X.unique(dim=0)) == 2**bits
    assert len(set(task.support)) == k
    sign = 1 - 2 * full.y.float()
    assert torch.equal(sign, full.X[:, list(task.support)].prod(1))
    other = data.draw(st.sets(st.integers(0, bits - 1)))
    walsh = (sign * full.X[:, sorted(other)].prod(1)).mean()
    assert walsh == float(other == set(task.support))
    drawn = task.sample(50, seed)
    assert torch.equal(drawn.y, task.label(drawn.X))
    assert set(drawn.X.unique().tolist()) <= {-1.0, 1.0}


def test_sparse_parity_bad_input():
    with pytest.raises(ValueError, match="k: got 9"):
        ls.sparse_parity(8, 9, 0)
    with pytest.raises(ValueError, match="bits: 30"):
        ls.sparse_parity(30, 2, 0).every()


@given(
    st.integers(2, 6), st.floats(0, 5), seeds, st.floats(0, 0.45),
)
@settings(max_examples=25, deadline=None)
def test_mixture_posterior_against_densities(C, gap, seed, flip):
    from scipy.stats import multivariate_normal

    weights = np.arange(1, C + 1)
    m = ls.gaussian_mixture(C, 6, gap, seed, weights=weights, flip=flip)
    assert torch.allclose(torch.pdist(m.means), torch.tensor(gap).double())
    data = m.sample(20, seed)
    dense = np.stack(
        [w * multivariate_normal(mu.numpy()).pdf(data.X.double().numpy())
         for w, mu in zip(weights, m.means, strict=True)], 1
    )
    pure = dense / dense.sum(1, keepdims=True)
    want = (1 - flip) * pure + flip * (1 - pure) / (C - 1)
    assert np.allclose(m.posterior(data.X), want, atol=1e-7)
    assert np.allclose(m.posterior(data.X).sum(1), 1)


@pytest.mark.parametrize("C, weights, flip", [
    (2, (1, 1), 0.0), (2, (9, 1), 0.0), (2, (2, 1), 0.3),
    (5, None, 0.0), (5, None, 0.4), (4, (4, 3, 2, 1), 0.1),
])
def test_bayes_error_against_draws(C, weights, flip):
    m = ls.gaussian_mixture(C, 6, 2.0, 1, weights=weights, flip=flip)
    error, se = m.bayes_error()
    assert (se == 0) == (C == 2 or weights is None)
    data = m.sample(60_000, 2)
    miss = (m.posterior(data.X).argmax(1) != data.y).double()
    noise = math.hypot(float(miss.std()) / 60_000**0.5, se)
    assert abs(miss.mean() - error) < 4.5 * noise
    flipped = (data.y != data.clean).double().mean()
    assert abs(flipped - flip) < 4.5 * 0.5 / 60_000**0.5


def test_bayes_error_limits():
    for C in 2, 3, 7:
        chance = ls.gaussian_mixture(C, 8, 0.0, 0).bayes_error()
        assert math.isclose(chance.error, 1 - 1 / C, abs_tol=1e-9)
        assert ls.gaussian_mixture(C, 8, 40.0, 0).bayes_error()[0] < 1e-9
        far = ls.gaussian_mixture(C, 8, 40.0, 0, flip=0.2).bayes_error()
        assert math.isclose(far.error, 0.2, abs_tol=1e-9)
    lop = ls.gaussian_mixture(2, 8, 0.0, 0, weights=(3, 1)).bayes_error()
    assert math.isclose(lop.error, 0.25)


@pytest.mark.parametrize("bad, message", [
    ({"classes": 9}, "classes: got 9"), ({"classes": 1}, "classes"),
    ({"separation": -1}, "separation"), ({"flip": 0.7}, "flip"),
    ({"weights": (1, 0, 1)}, "weights"), ({"weights": (1, 1)}, "weights"),
])
def test_mixture_bad_input(bad, message):
    good = {"classes": 3, "dims": 5, "separation": 1.0, "seed": 0}
    with pytest.raises(ValueError, match=message):
        ls.gaussian_mixture(**(good | bad))


@pytest.mark.parametrize("kind, hidden", [
    ("linear", 1), ("perceptron", 1), ("committee", 1), ("committee", 4),
])
def test_teacher_errors_against_draws(kind, hidden):
    t = ls.teacher(kind, 12, 5, hidden=hidden)
    assert torch.allclose(
        t.W @ t.W.T / 12, torch.eye(hidden, dtype=torch.float64)
    )
    assert t.error_of(t.W) < 1e-7
    rng = torch.Generator().manual_seed(0)
    K = 1 if kind == "perceptron" else 3
    W = torch.randn(4, K, 12, generator=rng, dtype=torch.float64)
    v = torch.randn(4, K, generator=rng, dtype=torch.float64)
    exact = t.error_of(W, v)
    assert exact.shape == (4,)
    X = torch.randn(60_000, 12, generator=rng)
    for w, u, e in zip(W, v, exact, strict=True):
        loss = (ls.Teacher(kind, w, u)(X) - t(X)).double() ** 2
        assert abs(loss.mean() - e) < 4.5 * loss.std() / 60_000**0.5
        assert torch.isclose(t.error_of(w, u), e)  # batched as alone


@given(seeds, st.floats(-1, 1))
@settings(max_examples=25, deadline=None)
def test_perceptron_error_is_the_angle(seed, cos):
    t = ls.teacher("perceptron", 5, seed)
    w = t.W[0] / t.W[0].norm()
    other = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    other = other.double() - other.double() @ w * w
    other = other / other.norm()
    student = cos * w + math.sqrt(1 - cos**2) * other
    error = t.error_of(3.0 * student[None])
    assert math.isclose(error, math.acos(cos) / math.pi, abs_tol=1e-6)


def test_teacher_noise_and_bad_input():
    t = ls.teacher("linear", 8, 1, noise=0.5)
    data = t.sample(20_000, 3)
    rest = data.y.double() - t(data.X)
    assert abs(rest.std() - 0.5) < 0.02 and abs(rest.mean()) < 0.02
    flips = ls.teacher("perceptron", 8, 1, noise=1.0).sample(20_000, 3)
    wrong = (flips.y != ls.teacher("perceptron", 8, 1)(flips.X)).double()
    assert abs(wrong.mean() - 0.25) < 0.02  # arctan(1) / pi
    for kind, extra, message in (
        ("quadratic", {}, "kind"), ("linear", {"hidden": 2}, "hidden"),
        ("committee", {"hidden": 9}, "hidden"),
        ("linear", {"noise": -1}, "noise"),
    ):
        with pytest.raises(ValueError, match=message):
            ls.teacher(kind, 8, 0, **extra)
    with pytest.raises(ValueError, match=r"\[..., units, 8\]"):
        t.error_of(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="one unit"):
        ls.teacher("perceptron", 8, 0).error_of(torch.ones(2, 8))


LANGUAGES = [
    ls.parity_language(), ls.parity_language(3), ls.random_dfa(4, 2, 1),
    ls.random_dfa(5, 3, 2), ls.Dyck(1), ls.Dyck(2), ls.Blocks(2),
    ls.Blocks(3),
]


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda x: repr(x)[:40])
def test_counts_and_draws_against_enumeration(language):
    for length in range(1, 9 if language.symbols < 4 else 7):
        words = torch.tensor(
            list(product(range(language.symbols), repeat=length))
        )
        members = words[language.accepts(words)]
        assert language.count(length) == len(members)
        if not len(members):
            with pytest.raises(ValueError, match="no word"):
                language.draw(length, 2, 0)
            continue
        drawn = language.draw(length, 60 * len(members), 4)
        assert language.accepts(drawn).all()
        seen, times = drawn.unique(dim=0, return_counts=True)
        assert torch.equal(seen, members)
        # a chi-square that exceeds this by chance once in 10^5
        chi2 = ((times - 60.0) ** 2 / 60).sum()
        free = len(members) - 1
        assert chi2 <= free + 5 * math.sqrt(2 * free) + 10
        assert torch.equal(drawn, language.draw(length, len(drawn), 4))


@given(st.lists(st.integers(0, 5), max_size=14))
def test_dyck_against_deleting_pairs(word):
    text, less = None, "".join("()[]{}"[s] for s in word)
    while text != less:
        text = less
        less = less.replace("()", "").replace("[]", "").replace("{}", "")
    got = ls.Dyck(3).accepts(torch.tensor([word]).reshape(1, -1))
    assert got.tolist() == [less == ""]


@given(st.integers(2, 6), st.integers(2, 4), seeds)
@settings(max_examples=30, deadline=None)
def test_random_dfa_states_are_reached(states, symbols, seed):
    d = ls.random_dfa(states, symbols, seed)
    reached = {d.start}
    for _ in range(states):
        reached |= {q for s in reached for q in d.table[s]}
    assert reached == set(range(states))
    assert len(d.accepting) == states // 2
    words = torch.randint(symbols, (5, 7),
                          generator=torch.Generator().manual_seed(seed))
    path = d.states(words)
    for w, states_seen in zip(words.tolist(), path.tolist(), strict=True):
        s = d.start
        for t, symbol in enumerate(w):
            assert states_seen[t] == s
            s = d.table[s][symbol]
        assert states_seen[-1] == s
    assert d == ls.random_dfa(states, symbols, seed)


def test_long_words_count_exactly():
    assert ls.parity_language().count(200) == 2**199
    assert ls.parity_language().draw(200, 3, 0).shape == (3, 200)
    catalan = math.comb(120, 60) // 61
    assert ls.Dyck(2).count(120) == catalan * 2**60
    assert ls.Dyck(2).accepts(ls.Dyck(2).draw(120, 20, 1)).all()


@pytest.mark.parametrize("language, length", [
    (ls.parity_language(), 12), (ls.Dyck(1), 10), (ls.Dyck(3), 16),
    (ls.Blocks(3), 9), (ls.random_dfa(5, 2, 3), 10),
])
def test_labelled_is_balanced_and_true(language, length):
    data = ls.labelled(language, length, 200, 9)
    assert data.y.sum() == 100
    assert torch.equal(language.accepts(data.X), data.y.bool())
    assert data.X.min() >= 0 and data.X.max() < language.symbols
    again = ls.labelled(language, length, 200, 9)
    assert torch.equal(data.X, again.X)
    train, _, test = data.split(1, (0.5, 0, 0.5))
    assert train.y.sum() == test.y.sum() == 50


def test_labelled_bad_input():
    for n in 0, 3:
        with pytest.raises(ValueError, match=f"n: got {n}"):
            ls.labelled(ls.Dyck(), 4, n, 0)
    with pytest.raises(ValueError, match="no word of 5"):
        ls.labelled(ls.Dyck(), 5, 10, 0)
    everything = ls.DFA(((0, 0),), (0,))
    with pytest.raises(ValueError, match="could not be spoiled"):
        ls.labelled(everything, 5, 10, 0, tries=5)


@given(st.integers(2, 300), seeds, st.integers(2, 5), st.floats(0.2, 2))
@settings(max_examples=30, deadline=None)
def test_spirals_unwind(n, seed, classes, turns):
    data = ls.spirals(n, seed, classes=classes, turns=turns)
    r = data.X.double().norm(dim=1)
    angle = torch.atan2(data.X[:, 1].double(), data.X[:, 0].double())
    arm = (angle / (2 * math.pi) - turns * r) * classes
    clear = r > 1e-3  # the arms meet in the origin
    assert torch.equal((arm.round().long() % classes)[clear], data.y[clear])
    assert data.y.bincount().max() - data.y.bincount().min() <= 1 or \
        n < classes


def test_moons_and_circles():
    c = ls.circles(101, 3, noise=0.0, factor=0.3)
    assert torch.allclose(c.X.norm(dim=1), torch.where(c.y == 1, 0.3, 1.0))
    m = ls.moons(100, 3, noise=0.0)
    centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[m.y]
    assert torch.allclose((m.X - centre).norm(dim=1), torch.ones(100))
    for make in ls.moons, ls.circles, ls.spirals:
        assert torch.equal(make(50, 1).X, make(50, 1).X)
        assert not torch.equal(make(50, 1).X, make(50, 2).X)
        with pytest.raises(ValueError, match="n, noise"):
            make(1, 0)
        with pytest.raises(ValueError, match="n, noise"):
            make(10, 0, noise=-1)
    with pytest.raises(ValueError, match="factor"):
        ls.circles(10, 0, factor=1)
    with pytest.raises(ValueError, match="classes"):
        ls.spirals(10, 0, classes=1)


@given(st.integers(1, 200), st.integers(1, 5), st.integers(2, 6), seeds)
def test_random_labels_are_balanced(n, dims, classes, seed):
    data = ls.random_labels(n, dims, classes, seed)
    counts = data.y.bincount(minlength=classes)
    assert counts.sum() == n and counts.max() - counts.min() <= 1
    assert data.X.shape == (n, dims) and data.n_classes == classes


def test_no_global_random_state_is_touched():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ls.modular(7)
    ls.gaussian_mixture(2, 3, 1.0, 0).sample(5, 0)
    ls.teacher("committee", 5, 0, hidden=2).sample(5, 0)
    ls.labelled(ls.Dyck(2), 6, 10, 0)
    ls.moons(10, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
