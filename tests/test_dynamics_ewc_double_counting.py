"""Shares against closed forms and Bayes; verdicts on planted effects."""

import numpy as np
import pytest
import torch

from reappraisal.dynamics import ewc_double_counting as e
from reappraisal.lab import data, models
from reappraisal.lab.ensemble import SGD, Adam, untrained
from reappraisal.lab.models import generator
from reappraisal.measure.curvature import gauss_newton_diagonal
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1032)
DRAWS = range(1000, 1100)
DIGITS = data.load("digits")


def curvatures(tasks, d, seed=0):
    a = torch.randn(tasks, d, d, generator=generator(seed, "test"))
    return (a @ a.mT + torch.eye(d)).double()


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", ["separate", "latest"])
def test_equal_curvature(tasks, rule):
    F = curvatures(1, 4).expand(tasks, 4, 4)
    torch.testing.assert_close(
        e.task_shares(F, rule), e.equal_curvature_shares(tasks, rule)
    )


def test_brute_force_of_both_rules():
    """Minimise the sums of penalties, written out, by least squares."""
    F, own = curvatures(4, 3), torch.randn(4, 3, 1).double()
    for rule in ("separate", "latest"):
        path = []
        for t in range(4):
            if rule == "separate":
                terms = [(F[s], path[s]) for s in range(t)]
            else:
                terms = [(F[s], path[-1]) for s in range(t)]
            terms.append((F[t], own[t]))
            roots = [torch.linalg.cholesky(f).mT for f, _ in terms]
            rows = torch.cat(roots).numpy()
            right = torch.cat(
                [r @ a for r, (_, a) in zip(roots, terms, strict=True)]
            ).numpy()
            path.append(torch.from_numpy(np.linalg.lstsq(rows, right)[0]))
        torch.testing.assert_close(
            e.in_turn(F, own, rule), torch.stack(path)
        )


def test_latest_is_bayes_and_separate_is_not():
    x = torch.randn(5, 12, 3, generator=generator(1, "x")).double()
    y = torch.randn(5, 12, generator=generator(1, "y")).double()
    want = np.linalg.lstsq(
        x.flatten(0, 1).numpy(), y.flatten().numpy(), rcond=None
    )[0]
    right, precision = e.laplace_propagation(x, y)
    wrong, _ = e.laplace_propagation(x, y, "separate")
    np.testing.assert_allclose(right, want, atol=1e-10)
    assert np.abs(wrong.numpy() - want).max() > 1e-3
    torch.testing.assert_close(precision, (x.mT @ x).sum(0))


def test_online_without_fading_is_latest():
    F = curvatures(5, 3)
    torch.testing.assert_close(
        e.task_shares(F, "online", 1.0), e.task_shares(F, "latest")
    )
    even = torch.ones(4, 1, 1).double()
    got = e.task_shares(even, "online", 0.5)
    kept, want = [1, 1.5, 1.75], torch.tensor([1.0, 0, 0, 0])
    for t, p in enumerate(kept, 1):  # weights p / (p + 1) of what was there
        want = want * p / (p + 1)
        want[t] = 1 / (p + 1)
    torch.testing.assert_close(got, want.double())


def test_first_share_is_settled_after_two_tasks():
    F = torch.tensor([7.0, 1, 1, 1, 1]).double()[:, None, None]
    assert e.task_shares(F, "separate")[0].item() == pytest.approx(7 / 8)
    assert e.task_shares(F, "latest")[0].item() == pytest.approx(7 / 11)


def learner(rule, curvature, strength=1.0):
    d = curvature.shape[1]

    def learn(optima):
        n = len(optima)
        tasks = [
            (e.Quadratic(c.expand(n, d), o[:, None].expand(n, d)), None)
            for c, o in zip(curvature, optima.T, strict=True)
        ]
        return e.ewc(
            {"w": torch.zeros(n, d).double()}, tasks,
            lambda t, _: {"w": curvature[t].expand(n, d)}, rules=[rule] * n,
            strength=[strength] * n, optimiser=SGD(lr=0.1, momentum=0.8),
            steps=200, decay=0.3,
        )[-1]["w"]

    return learn


@pytest.mark.parametrize("rule", e.RULES)
def test_training_code_leaves_the_exact_shares(rule):
    curvature = torch.rand(4, 6, generator=generator(2, "c")).double() + 0.5
    torch.testing.assert_close(
        e.measured_shares(learner(rule, curvature), 4),
        e.task_shares(torch.diag_embed(curvature), rule, 0.3),
        atol=1e-6, rtol=0,
    )


def test_mechanism_off_forgets_everything():
    curvature = torch.ones(3, 2).double()
    got = e.measured_shares(learner("separate", curvature, 0.0), 3)
    torch.testing.assert_close(got, torch.tensor([0.0, 0, 1]).double(),
                               atol=1e-6, rtol=0)


def test_fisher_is_the_expectation_over_own_labels():
    net = models.mlp([5, 4, 3], activation="tanh", seed=0)
    start = untrained(net, [0, 1], "fresh")
    x = torch.randn(2, 6, 5, generator=generator(3, "x"))
    logits = torch.stack([start.predict(x[s])[s] for s in (0, 1)])
    n = 4000
    u = torch.rand(2, 6 * n, generator=generator(3, "u"))
    labels = e.own_labels(logits.repeat(1, n, 1), u)
    got = e.fisher_diag(net, start.tensors(), x.repeat(1, n, 1), labels)
    flat = torch.cat([v.flatten(1) for v in got.values()], 1)
    for s in (0, 1):
        zeros = torch.zeros(6, dtype=torch.long)
        want = gauss_newton_diagonal(start, (x[s], zeros), "cross_entropy")
        torch.testing.assert_close(flat[s], want[s], atol=5e-3, rtol=0.05)


def test_streams():
    stream = e.Stream(DIGITS, [3, 4], 3, (40, 20, 20))
    x, y = stream.images("train", 0)
    z, again = stream.images("train", 2)
    assert torch.equal(y, again) and not torch.equal(x, z)
    torch.testing.assert_close(x.sort(-1).values, z.sort(-1).values)
    assert not torch.equal(stream.order[0], stream.order[1])
    pairs = e.Pairs(DIGITS, [3, 4], (200, 50, 50))
    for t in range(5):
        x, y = pairs.images("train", t)
        part = DIGITS.split(3, (200, 50, 50))[0]
        rows = part.y // 2 == t
        want = part.X.flatten(1).float()[rows][: x.shape[1]]
        torch.testing.assert_close(x[0], want)
        assert torch.equal(y[0], part.y[rows][: x.shape[1]] % 2)


def networks(tasks, arms, **options):
    stream = e.Stream(DIGITS, [0, 1], tasks, (100, 20, 100))
    net = models.mlp([64, 32, 10], seed=0)
    start = untrained(net, [0, 1], "fresh").tensors()
    return e.ewc_on_images(
        stream, net, start, arms, optimiser=Adam(lr=0.01), steps=40, draws=3,
        **options,
    )


def test_networks():
    arms = [("separate", 10.0, 0), ("latest", 10.0, 0), ("latest", 10.0, 1),
            ("latest", 0.0, 0), ("latest", 300.0, 0)]
    got = networks(3, arms)
    assert got.shape == (5, 2, 3, 3)
    early = got[:2, :, :2, :2].nan_to_num()
    assert torch.equal(early[0], early[1])  # two tasks: one algorithm
    assert not torch.equal(got[0, :, 2], got[1, :, 2])
    assert not torch.equal(got[1, :, 2], got[2, :, 2])  # other labels drawn
    assert got[..., 0, 1:].isnan().all() and not got[..., 2, :].isnan().any()
    assert (got[4, :, 2, 0] > got[3, :, 2, 0]).all()  # a penalty protects
    assert (got[4, :, 2, 2] < got[3, :, 2, 2]).all()  # and costs
    assert torch.equal(got.nan_to_num(), networks(3, arms).nan_to_num())


def test_oldest_favour():
    matrix = torch.full((4, 4), torch.nan)
    matrix[-1] = torch.tensor([80.0, 50, 60, 99])
    assert e.oldest_favour(matrix) == 25
    with pytest.raises(ValueError, match="got 2 tasks"):
        e.oldest_favour(matrix[:2, :2])


def test_matched_strengths():
    got = e.matched_strengths({
        "separate": {1: 30, 5: 60}, "latest": {1: 55, 5: 50, 25: 10},
    })
    assert got["target"] == 55 and got["separate"] == 5
    assert got["latest"] == 1 and got["stiff"] == 5


def judged(slug, evidence, seeds):
    return Claim.load(f"E08/{slug}").judge(
        evidence, scale="book", seeds=seeds
    ).verdict


def shares_evidence(rule_of_separate, fault=0.0):
    x = torch.randn(100, 8, 60, 5, generator=generator(5, "w")).double()
    F = x.mT @ x
    separate = e.task_shares(F, rule_of_separate)[:, 0].numpy()
    latest = e.task_shares(F, "latest")[:, 0].numpy()
    return {
        "equal_separate": fault, "equal_latest": 0.0, "joint": 0.0,
        "two_tasks": 0.0, "separate": separate, "latest": 0.2 - latest,
        "separate_40": separate, "separate_21": separate,
    }


@pytest.mark.parametrize(("rule", "fault", "verdict"), [
    ("separate", 0.0, "reproduced"),
    ("latest", 0.0, "not reproduced"),  # the mechanism off
    ("separate", 0.1, "invalid"),  # code that is not the recursion
])
def test_shares_judged(rule, fault, verdict):
    found = shares_evidence(rule, fault)
    assert judged("first-task-keeps-half", found, DRAWS) == verdict


def bias_evidence(size, leak=0.0, gap=0.0, two=0.0):
    rng = np.random.default_rng(0)

    def around(centre, sd):
        noise = rng.normal(0, sd, 32)
        return centre + noise - noise.mean()

    bias = around(size, 2.0)
    return {
        "bias": bias, "harmless": bias, "at_best": bias, "stiff": bias,
        "matched": gap, "linear": 0.0, "two_tasks": two,
        "same_rule": around(leak, 2.0),
    }


@pytest.mark.parametrize(("planted", "verdict"), [
    (dict(size=5.0), "reproduced"),
    (dict(size=0.0), "not reproduced"),
    (dict(size=-5.0), "not reproduced"),
    (dict(size=1.5), "inconclusive"),
    (dict(size=5.0, gap=3.0), "invalid"),
    (dict(size=5.0, leak=4.0), "invalid"),
    (dict(size=5.0, two=0.5), "invalid"),
])
def test_bias_judged(planted, verdict):
    found = bias_evidence(**planted)
    assert judged("age-bias-in-networks", found, SEEDS) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: e.in_turn(curvatures(2, 2), torch.ones(2, 2, 1).double(), "x"),
     "rule: got 'x'"),
    (lambda: e.equal_curvature_shares(3, "online"), "rule: got 'online'"),
    (lambda: learner("nearest", torch.ones(2, 2).double())(torch.eye(2)),
     "rule: got 'nearest'"),
    (lambda: e.ewc({"w": torch.zeros(2, 1)}, [], None, rules=["latest"],
                   strength=[1, 1], optimiser=SGD(lr=1), steps=1),
     "rules: got 1"),
    (lambda: e.ewc({"w": torch.zeros(2, 1)}, [], None, rules=["latest"] * 2,
                   strength=[1], optimiser=SGD(lr=1), steps=1),
     "strength: got 1"),
    (lambda: e.fisher_diag(torch.nn.Conv2d(1, 1, 1), {}, None, None),
     "net: got Conv2d"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
