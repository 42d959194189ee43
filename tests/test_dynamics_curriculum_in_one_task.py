"""Schedules against brute force and simulation; planted effects and nulls."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from reappraisal.dynamics import curriculum_in_one_task as c
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1040)


def test_the_tree_equals_one_integration_an_order():
    learner = c.Learner(0.3, 0.8, (0.0, 2.0))
    orders, ends = c.every_order(learner, learner.start(), 2, 0.5)
    want = {o for o in itertools.permutations((0, 0, 1, 1))}
    assert sorted(map(tuple, orders.tolist())) == sorted(want)
    for order, end in zip(orders, ends, strict=True):
        mix = F.one_hot(order, 2).repeat_interleave(5, 0)
        torch.testing.assert_close(
            learner.follow(learner.start(), mix, 0.1)[-1], end)


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_rates_are_averages_over_trials(level):
    """The equations against plain Monte Carlo of a single step."""
    learner = c.Learner(0.4, 0.9, (level,))
    rel, irr, R = 0.8, 0.5, 0.6
    got = learner.rates(
        torch.tensor([rel, irr, R], dtype=torch.float64), torch.ones(1))
    g = torch.Generator().manual_seed(0)
    a, b, far = torch.randn(3, 2_000_000, generator=g, dtype=torch.float64)
    near = R * a + (rel - R**2) ** 0.5 * b  # teacher field a of variance 1
    far = far * (level * irr) ** 0.5
    field = near + far
    push = (torch.erf(field / 2**0.5) - a.sign()) * (
        2 / torch.pi) ** 0.5 * torch.exp(-field**2 / 2)
    square = 0.81 * push.square().mean()
    want = torch.stack([
        -1.8 * (push * near).mean() + 0.4 * square,
        -1.8 * (push * far).mean() + 0.6 * level * square,
        -0.9 * (push * a).mean(),
    ])
    torch.testing.assert_close(got, want, atol=4e-3, rtol=0)


def finite(blocks, N=300, seeds=range(6), rate=0.7):
    T = 6 * N
    level = torch.arange(3).repeat(T // 3).expand(len(seeds), T)
    index = c.arrange(level, blocks)
    return c.simulate(
        N, 0.25, (0, 1, 4), index[None], level.gather(1, index)[None],
        torch.tensor([rate]), seeds,
    )


def test_learners_follow_the_equations():
    learner = c.Learner(0.25, 0.7)
    for blocks in ([0, 1, 2], [2, 1, 0]):
        mix = F.one_hot(torch.tensor(blocks), 3).repeat_interleave(20, 0)
        want = c.accuracy(learner.follow(learner.start(), mix, 0.1)[-1], 4)
        got = c.accuracy(finite(blocks)[-1], 4).mean()
        assert got == pytest.approx(want.item(), abs=1.5)


def test_simulation_repeats_and_does_not_depend_on_company():
    one, two = finite([0, 1, 2], 60), finite([0, 1, 2], 60)
    assert torch.equal(one, two)
    alone = finite([0, 1, 2], 60, seeds=[3])
    torch.testing.assert_close(alone[:, :, 0], one[:, :, 3])


def test_order_is_nothing_without_irrelevant_inputs():
    """The mechanism off: in the equations exactly."""
    learner = c.Learner(1.0, 0.7)
    _, ends = c.every_order(learner, learner.start(), 1, 1.0)
    assert (ends - ends[0]).abs().max() < 1e-12
    some = c.Learner(0.5, 0.7)
    _, ends = c.every_order(some, some.start(), 1, 1.0)
    assert np.ptp(c.accuracy(ends, 4.0).numpy()) > 0.5


def test_arrange_permutes_and_sorts():
    g = torch.Generator().manual_seed(0)
    level = torch.stack([
        torch.arange(3).repeat(6)[torch.randperm(18, generator=g)]
        for _ in range(4)
    ])
    blocks = [2, 0, 1, 1, 2, 0]
    index = c.arrange(level, blocks)
    assert (index.sort(1).values == torch.arange(18)).all()
    want = torch.tensor(blocks).repeat_interleave(3)
    assert (level.gather(1, index) == want).all()


def test_fits_are_those_of_sklearn_and_forget():
    X, y, u = c.slices([5, 6], 20, 50, 0.5, (0.0, 1.0))
    zero, free = torch.zeros(2, 20).double(), torch.zeros(2).double()
    cold = c.fit_tied(X[:, 1], y[:, 1], zero, free, 0.1)
    first = c.fit_tied(X[:, 0], y[:, 0], zero, free, 0.1)
    warm = c.fit_tied(X[:, 1], y[:, 1], first, free, 0.1)
    torch.testing.assert_close(cold, warm)
    theirs = LogisticRegression(
        C=20 / (50 * 0.1), fit_intercept=False, tol=1e-10, max_iter=2000
    ).fit(X[1, 1] / 20**0.5, y[1, 1]).coef_[0]
    np.testing.assert_allclose(cold[1], theirs, atol=1e-4)
    tied = c.fit_tied(X[:, 1], y[:, 1], first, free + 1.0, 0.1)
    assert (tied - cold).abs().max() > 0.1  # a tie remembers
    assert (u[:, 10:] == 0).all() and (X[:, 0, :, 10:] == 0).all()


def judged(slug, evidence):
    return Claim.load(f"B02/{slug}").judge(
        evidence, scale="book", seeds=SEEDS
    ).verdict


def around(value, sd=0.8, seed=0):
    return np.random.default_rng(seed).normal(value, sd, 40)


@pytest.mark.parametrize(("random", "fixed", "placebo", "verdict"), [
    (2.0, 1.0, 0.0, "reproduced"),
    (0.0, 1.0, 0.0, "not reproduced"),
    (2.0, -1.0, 0.0, "not reproduced"),
    (2.0, 1.0, 2.0, "invalid"),  # any sorting would have done
])
def test_progressive_planted(random, fixed, placebo, verdict):
    assert judged("progressive-wins", {
        "random": around(random), "fixed": around(fixed, seed=1),
        "slow_random": around(0), "slow_fixed": around(0),
        "placebo": around(placebo, seed=2), "dense": around(0, 0.3, 3),
    }) == verdict


@pytest.mark.parametrize(("worst", "tau", "shuffled", "verdict"), [
    (3.0, 0.9, -0.27, "reproduced"),
    (0.0, 0.9, -0.27, "not reproduced"),
    (3.0, 0.1, -0.27, "not reproduced"),
    (3.0, 0.9, -3.0, "invalid"),
])
def test_adversary_planted(worst, tau, shuffled, verdict):
    assert judged("adversarial-order-hurts", {
        "worst": around(worst), "ranking": around(tau, 0.1, 1),
        "shuffled": around(shuffled, 0.5, 2),
    }) == verdict


@pytest.mark.parametrize(("tied", "leak", "gate", "verdict"), [
    (2.0, 0.0, 0.0, "reproduced"),
    (0.0, 0.0, 0.0, "not reproduced"),
    (2.0, 1.0, 0.0, "invalid"),
    (2.0, 0.0, 1e-3, "invalid"),  # fits that did not converge
])
def test_batch_planted(tied, leak, gate, verdict):
    assert judged("order-is-forgotten-by-convex-batch", {
        "tied": around(tied), "mixed": around(0), "same_last": around(0),
        "untied": around(leak, 0.2, 1), "online": around(2, seed=2),
        "cumulated": gate, "warm": 0.0,
    }) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: c.Learner(0.0, 1.0), "relevant: got"),
    (lambda: c.Learner(0.5, 0.0), "rate: got"),
    (lambda: c.Learner(0.5, 1.0, (-1.0,)), "levels: got"),
    (lambda: c.every_order(c.Learner(0.5, 1.0),
                           c.Learner(0.5, 1.0).start(), 4, 1.0), "repeats"),
    (lambda: c.arrange(torch.tensor([[0, 0, 1, 1]]), [0, 0]), "blocks: got"),
    (lambda: c.simulate(9, 0.5, (1,), torch.zeros(1, 2, 4).long(),
                        torch.zeros(1, 2, 4).long(), torch.ones(1), [0]),
     "index: got"),
    (lambda: c.fit_tied(torch.ones(1, 2, 2), torch.ones(1, 2),
                        torch.zeros(1, 2), torch.zeros(1), 0.0), "ridge"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
