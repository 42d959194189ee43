"""Schedules against brute force; verdicts on planted effects and nulls."""

import itertools
import math

import numpy as np
import pytest
import torch

from reappraisal.dynamics import optimal_replay_protocol as o
from reappraisal.lab import data, models
from reappraisal.lab.ensemble import untrained
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1020)


def setup(similarities=(0.0, 0.5, 1.0), **options):
    return o.two_tasks(similarities), o.mastered(similarities, **options)


def test_the_tree_equals_one_integration_a_schedule():
    pair, start = setup(seeds=[3, 4])
    u, losses = o.enumerate_protocols(pair, start, 4, 2.0)
    assert sorted(map(tuple, u.tolist())) == sorted(
        itertools.product((0, 1), repeat=4)
    )
    assert losses.shape == (16, 3, 2, 2) and u[-1].all()
    for row, want in zip(u, losses, strict=True):
        one = o.controlled(pair, start, row.double().expand(3, 2, 4), 2.0)
        torch.testing.assert_close(one.losses[-1], want)


def test_the_solver_meets_or_beats_every_schedule():
    pair, start = setup((0.3, 0.7))
    _, losses = o.enumerate_protocols(pair, start, 4, 3.0)
    share, cost = o.optimal_protocol(pair, start, 4, 3.0, iterations=25)
    assert (cost <= 1.01 * losses.sum(-1).amin(0)).all()
    assert ((share >= 0) & (share <= 1)).all()
    alone = o.controlled(pair, start, share, 3.0).losses[-1].sum(-1)
    torch.testing.assert_close(alone, cost)


def test_the_gradient_is_that_of_finite_differences():
    pair, start = setup((0.5,))
    share = torch.tensor([0.7, 0.4, 0.5]).double().expand(1, 1, 3)

    def cost(p):
        return o.controlled(pair, start, p, 2.0).losses[-1].sum()

    p = share.clone().requires_grad_()
    (got,) = torch.autograd.grad(cost(p), p)
    for b in range(3):
        step = torch.zeros_like(share)
        step[..., b] = 1e-5
        want = (cost(share + step) - cost(share - step)) / 2e-5
        assert got[0, 0, b].item() == pytest.approx(want.item(), rel=1e-4)


def test_weights_that_drop_a_task_drop_its_share():
    pair, start = setup((0.5,))
    share, _ = o.optimal_protocol(
        pair, start, 3, 3.0, weights=(0.0, 1.0), iterations=20
    )
    assert share.min() > 0.8
    share, _ = o.optimal_protocol(
        pair, start, 3, 3.0, weights=(1.0, 0.01), iterations=20
    )
    assert share[..., -1].max() < 0.5


def brute(u):
    runs = [(k, len(list(g))) for k, g in itertools.groupby(u)]
    opening = runs[0][1] if runs[0][0] else 0
    later = [n for k, n in runs[1:] if k]
    return opening, np.mean(later) if later else 0.0, u.count(0)


def test_stretches_by_brute_force():
    u = torch.tensor(list(itertools.product((0, 1), repeat=7)))
    for row, *got in zip(u.tolist(), *o.stretches(u), strict=True):
        assert [float(x) for x in got] == pytest.approx(brute(row))


@pytest.mark.parametrize("steps", [10, 37])
def test_order_keeps_the_share(steps):
    share = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    order = o.order_of(share.T, steps)
    assert order.shape == (4 * steps, 3) and set(order.unique().tolist()) <= {
        0, 1}
    sums = order.view(4, steps, 3).sum(1) / steps
    assert (sums - share).abs().max() <= 1 / steps


def test_rule_of_thumb_is_read_off():
    focus, replay = o.focus_then_interleave(torch.tensor([1, 0.95, 0.5, 0.7]))
    assert (focus, replay) == (0.5, pytest.approx(0.4))
    assert o.focus_then_interleave(torch.ones(3)) == (1.0, 0.0)


def test_mastered_students_do_not_move_on_task_one():
    pair, start = setup(seeds=range(4))
    assert pair.losses(start)[..., 0].max() < 1e-12
    end = o.controlled(
        pair, start, torch.zeros(3, 4, 2, dtype=torch.float64), 5.0
    ).last
    torch.testing.assert_close(end.Q, start.Q)
    one, two = (o.mastered([0.5], [s]) for s in (0, 1))
    assert not torch.equal(one.Q, two.Q)


def judged(slug, evidence, seeds=SEEDS):
    return Claim.load(f"B04/{slug}").judge(
        evidence, scale="book", seeds=seeds
    )


def ratios(rng, size):
    return {
        f"{h}_{g}": rng.normal(math.log(size), 0.02, 20)
        for h in ("none", "late", "interleaved") for g in (3, 5, 7)
    }


@pytest.mark.parametrize(("size", "solver", "same", "verdict"), [
    (1.2, 0.0, 0.0, "reproduced"),
    (1.0, 0.0, 0.0, "not reproduced"),
    (1.2, 0.05, 0.0, "invalid"),  # a solver that misses the optimum
    (1.2, 0.0, 0.01, "invalid"),  # an effect where none can be
])
def test_heuristics_planted(size, solver, same, verdict):
    rng = np.random.default_rng(0)
    found = judged("optimal-beats-heuristics", ratios(rng, size) | {
        "solver": solver, "same_task": same})
    assert found.verdict == verdict


@pytest.mark.parametrize(("gain", "leak", "verdict"), [
    (1.0, 0.0, "reproduced"), (0.0, 0.0, "not reproduced"),
    (1.0, 1.0, "invalid"),
])
def test_transfer_planted(gain, leak, verdict):
    rng = np.random.default_rng(1)
    found = judged("rule-of-thumb-transfers", {
        "transfer": rng.normal(gain, 0.5, 40),
        "same_task": rng.normal(leak, 0.3, 40),
    }, range(1000, 1040))
    assert found.verdict == verdict


def test_focus_with_the_mechanism_off():
    """Schedules chosen at random do not open as optima do."""
    g = torch.Generator().manual_seed(0)
    u = torch.randint(0, 2, (400, 10), generator=g)
    kept = o.opens(*o.stretches(u)).float().mean().item()
    found = judged("focus-then-interleave", {
        "opens": [max(0, 0.8 - kept)] * 4, "near": [max(0, 0.8 - kept)] * 4,
        "varies": [0] * 4, "rare": [0.3] * 4, "one_task": [0.0] * 4,
    }, range(1000, 1004))
    assert kept < 0.5 and found.verdict == "invalid"


def students(similarity, one_head=False, seeds=(0, 1, 2)):
    net = models.mlp([64, 32, 20], seed=0)
    tasks = o.TwoTasks(data.load("digits"), similarity, seeds, one_head)
    start = untrained(net, list(seeds), "fresh", None, "cpu").tensors()
    return tasks, net, start


def test_students_forget_and_replay_helps():
    tasks, net, start = students(0.0)
    kept = {k: v.clone() for k, v in start.items()}
    shares = torch.stack([torch.ones(80), torch.full((80,), 0.5)])
    got = o.rehearse(tasks, net, start, shares, 150)
    assert all(torch.equal(kept[k], start[k]) for k in kept)
    assert got.shape == (2, 3, 2)
    assert (got[1, :, 0] > got[0, :, 0]).all()  # task 1 by replay
    assert torch.equal(got, o.rehearse(tasks, net, start, shares, 150))


def test_identical_tasks_share_a_head():
    tasks, net, start = students(1.0, one_head=True)
    shares = torch.stack([torch.ones(20), torch.zeros(20)])
    got = o.rehearse(tasks, net, start, shares, 20)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[..., 0], got[..., 1])


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: o.two_tasks([1.5]), "similarities: got"),
    (lambda: o.enumerate_protocols(*setup(), 0, 1.0), "blocks: got 0"),
    (lambda: o.enumerate_protocols(*setup(), 20, 1.0), "blocks: got 20"),
    (lambda: o.TwoTasks(data.load("digits"), -1, [0]), "similarity: got"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
