"""Chains against closed forms, worlds against search, planted verdicts."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from reappraisal.decisions import td_learns_the_rough_part_first as t
from reappraisal.lab import models
from reappraisal.lab.ensemble import Ensemble, untrained, vmapped
from reappraisal.measure.ntk import empirical_ntk
from reappraisal.protocol.claims import Claim


@pytest.mark.parametrize("kind", ["ring", "grid", "graph"])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.95])
def test_solution_is_the_matrix_exponential(kind, gamma):
    P = t.random_walk(kind, 24, 3)
    rng = np.random.default_rng(0)
    r, start = rng.normal(size=(2, 24))
    A = np.eye(24) - gamma * P
    fixed = np.linalg.solve(A, r)
    times = [0.0, 0.4, 3.0]
    got = t.chain_td_solution(P, r, gamma, times, start)
    want = [fixed + expm(-x * A) @ (start - fixed) for x in times]
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(
        t.chain_td_solution(P, r, gamma, 0.0)[0], np.zeros(24), atol=1e-9)


def test_ring_has_its_known_spectrum():
    lam, basis, dual = t.eigenbasis(t.random_walk("ring", 12))
    want = np.sort(np.cos(2 * np.pi * np.arange(12) / 12))[::-1]
    np.testing.assert_allclose(lam, want, atol=1e-10)
    np.testing.assert_allclose(dual @ basis, np.eye(12), atol=1e-10)


def test_spectrum_separates_smooth_from_rough():
    P = t.random_walk("ring", 40)
    x = np.arange(40)
    lam, c = t.smoothness_spectrum(
        P, np.stack([np.cos(2 * np.pi * x / 40), (-1.0) ** x]))
    weight = c**2 / (c**2).sum(1, keepdims=True)
    mean = weight @ lam
    assert mean[0] == pytest.approx(math.cos(2 * math.pi / 40))
    assert mean[1] == pytest.approx(-1)


def learn(target, gamma, span, n=48, seeds=range(3)):
    chains = [t.random_walk(k, n, s) for s, k in zip(
        seeds, ("ring", "grid", "graph"), strict=True)]
    lam = np.stack([t.eigenbasis(P)[0] for P in chains])
    time, c = t.sampled_learning(
        chains, seeds, gamma, span=span, rate=0.004, target=target)
    return lam, *t.decay_rates(time, c)


def test_samples_follow_the_formula_and_returns_do_not():
    lam, rates, half = learn("td", 0.9, 12.0)
    slope = np.polyfit((1 - 0.9 * lam).ravel(), rates.ravel(), 1)[0]
    assert slope == pytest.approx(1, abs=0.06)
    assert (half[:, 0] > half[:, -1]).all()
    lam, rates, _ = learn("returns", 0.9, 1.5)
    assert abs(np.polyfit(lam.ravel(), rates.ravel(), 1)[0]) < 0.05
    _, again, _ = learn("returns", 0.9, 1.5)
    np.testing.assert_array_equal(rates, again)


def test_without_bootstrapping_all_rates_are_one():
    _, rates, _ = learn("td", 0.0, 1.5)
    assert np.abs(rates - 1).max() < 0.01


def test_goal_distances_by_search():
    world = t.two_rooms([5], 2, reward="sparse")
    v = world.optimal(0.5)[0].amax(-1)
    ends, step = world.done[0].bool(), world.step[0]
    distance = torch.where(ends.any(-1), 1.0, math.inf)
    for _ in range(100):
        distance = torch.minimum(
            distance, 1 + torch.where(ends, math.inf, distance[step]).amin(-1))
    torch.testing.assert_close(v, 0.5 ** (distance - 1))


def test_rooms_are_walled():
    world = t.two_rooms([0, 1], 3)
    m = world.obs.shape[1]
    assert m == 3 * (12 * 11 + 1)
    assert torch.equal(world.step // (m // 3),
                       (torch.arange(m) // (m // 3))[:, None].expand(2, m, 4))
    move = (world.obs[0][world.step[0]] - world.obs[0][:, None])[..., :2]
    assert (move.abs().sum(-1) < 2.1 / 11).all()
    other = t.two_rooms([0, 1], 3, stream="unseen")
    assert not torch.equal(world.obs, other.obs)


def test_the_hill_has_to_be_climbed():
    world = t.hill([0], reward="sparse")
    rest = int((world.obs[0] - torch.tensor([-0.2, 0.0])).norm(dim=-1)
               .argmin())
    ends = []
    for action in range(3):
        state, done = rest, False
        for _ in range(200):
            done = done or bool(world.done[0, state, action])
            state = int(world.step[0, state, action])
        ends.append(done)
    assert ends == [False, False, True]
    assert world.optimal(0.9).amax(-1).min() > 0  # from everywhere
    after = world.obs[0][world.step[0]]
    speed, stopped = after[..., 1], after[:, 0, 0] == -1
    assert (speed[:, 2] >= speed[:, 0])[~stopped].all()


def lesson(kinds, steps=400, reward="dense"):
    net = models.mlp([6, 24, 24, 4])
    world = t.two_rooms([3] * len(kinds), 1, reward=reward)
    start = untrained(net, [3] * len(kinds))
    end = t.teach(net, start, world, kinds, steps=steps)
    forward = vmapped(net)
    with torch.no_grad():
        said = [forward(e.tensors(), world.obs) for e in (start, end)]
    return net, world, start, end, said


def test_each_lesson_is_learned():
    _, world, _, _, (first, last) = lesson(list(t.LESSONS), 800)
    q = world.optimal(0.9)
    error = [(z - q).square().mean((1, 2)) for z in (first, last)]
    assert error[1][1] < 0.3 * error[0][1]  # returns
    greedy = [nn.functional.one_hot(z.argmax(-1), 4).float()
              for z in (first, last)]
    value = [world.value(p, 0.9).mean(1) for p in greedy]
    assert value[1][0] > value[0][0]  # td
    assert value[1][2] > value[0][2]  # policy
    assert last[3].std(0).mean() > 0


def test_arms_do_not_touch_each_other():
    *_, alone, _ = lesson(["td"], 60)
    *_, among, _ = lesson(["returns", "td", "policy"], 60)
    for k, v in alone.params.items():
        torch.testing.assert_close(v[0], among.params[k][1])


def test_td_at_gamma_zero_is_regression_on_rewards():
    net = models.mlp([6, 24, 24, 4])
    world = t.two_rooms([1, 1], 1)
    start = untrained(net, [1, 1])
    end = t.teach(net, start, world, ["td", "returns"], steps=50, gamma=0.0)
    for v in end.params.values():
        torch.testing.assert_close(v[0], v[1])


def test_interference_predicts_a_gradient_step():
    net = models.mlp([3, 16, 16, 1], seed=0).double()
    x = torch.randn(4, 3, generator=models.generator(0)).double()
    k = empirical_ntk(net, x)
    unit = k.diagonal().sqrt()
    torch.testing.assert_close(
        t.state_interference(net, x), k / unit[:, None] / unit)
    before = net(x).detach()[:, 0]
    grads = torch.autograd.grad(net(x[:1]).sum(), list(net.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), grads, strict=True):
            p += 1e-6 * g
    moved = (net(x).detach()[:, 0] - before) / 1e-6
    torch.testing.assert_close(moved, k[0], rtol=1e-3, atol=1e-5)


def test_kernel_ignores_output_scale_and_knows_rank():
    x = torch.randn(9, 4, generator=models.generator(1))
    net = nn.Linear(4, 2, bias=False)
    a = t.state_interference(net, x)
    with torch.no_grad():
        net.weight.mul_(7)
    torch.testing.assert_close(a, t.state_interference(net, x))
    assert t.update_rank(net, x) == 4
    many = Ensemble.of([net, net])
    assert t.spillover(many, x).shape == (2,)
    off = a[~torch.eye(9, dtype=bool)].mean()
    torch.testing.assert_close(t.spillover(net, x), off)


def test_copies_repeat_policy_or_values():
    _, world, _, end, _ = lesson(["returns", "returns"], 400)
    forward = vmapped(end.template)
    with torch.no_grad():
        want = forward(end.tensors(), world.obs)
        for how in (None, 0.1):
            copy = t.distilled(end, world.obs, [8, 9], steps=600,
                               temperature=how)
            got = forward(copy.tensors(), world.obs)
            if how is None:
                assert (got - want).square().mean() < 0.2 * want.var()
            else:
                gap = (got.softmax(-1) - (want / how).softmax(-1)).abs()
                assert gap.mean() < 0.07


def test_returns_of_an_agent_that_knows_the_table():
    world = t.two_rooms([3], 1)
    q = world.optimal(0.9)
    world = t.World(torch.eye(q.shape[1])[None], world.step, world.reward,
                    world.done)
    net = nn.Linear(q.shape[1], 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(q[0].T)
    agent = Ensemble.of([net])
    clean = t.returns(agent, world, 0.9)
    torch.testing.assert_close(clean, q.amax(-1).mean(1))
    slightly, badly = (
        t.returns(agent, world, 0.9, noise=x) for x in (1e-7, 1.0))
    torch.testing.assert_close(clean, slightly, atol=1e-4, rtol=0)
    random = world.value(torch.full_like(q, 0.25), 0.9).mean(1)
    assert random - 0.1 < badly < clean - 0.1


def judged(slug, evidence, n=24):
    return Claim.load(f"C14/{slug}").judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


@pytest.mark.parametrize(("gamma", "verdict"), [
    (0.9, "reproduced"), (0.0, "not reproduced")])
def test_rough_first_with_the_mechanism_off(gamma, verdict):
    """Rates that do not depend on the eigenvalue refute."""
    rng = np.random.default_rng(0)
    lam = np.linspace(-1, 1, 50)
    rates = 1 - gamma * lam + rng.normal(0, 0.02, (20, 50))
    x = 1 - 0.9 * lam
    found = judged("rough-first", {
        "slope": [np.polyfit(x, r, 1)[0] for r in rates],
        "explained": [np.corrcoef(x, r)[0, 1] ** 2 for r in rates],
        "order": [np.corrcoef(lam, 1 / r)[0, 1] if gamma == 0 else 0.98
                  + rng.normal(0, 0.01) for r in rates],
        "returns_flat": rng.normal(0, 0.01, 20),
        "no_bootstrap": 0.002,
    }, 20)
    assert found == verdict


def networks(rng, drop, policy, learned=0.3, smooth=0.0, sparse=0.02):
    def noisy(x):
        return rng.normal(x, 0.03, 24)

    out = {}
    for w in ("rooms", "hill"):
        out |= {f"untrained_{w}": noisy(drop), f"policy_{w}": noisy(policy),
                f"learned_{w}": noisy(learned), f"smooth_{w}": noisy(smooth),
                f"sparse_{w}": noisy(drop - sparse),
                f"half_{w}": noisy(drop / 2 - sparse)}
    return out


@pytest.mark.parametrize(("how", "verdict"), [
    (dict(drop=0.2, policy=0.2), "reproduced"),
    (dict(drop=0.0, policy=0.0), "not reproduced"),
    (dict(drop=0.2, policy=-0.2), "not reproduced"),
    (dict(drop=0.2, policy=0.2, learned=-0.3), "invalid"),
    (dict(drop=0.2, policy=0.2, smooth=-0.2), "invalid"),
    (dict(drop=0.2, policy=0.2, sparse=0.19), "inconclusive"),
])
def test_networks_planted(how, verdict):
    rng = np.random.default_rng(1)
    assert judged("td-nets-interfere-less", networks(rng, **how)) == verdict


@pytest.mark.parametrize(("gain", "more", "twice", "verdict"), [
    (0.08, 0.0, 0.0, "reproduced"),
    (0.0, 0.0, 0.0, "not reproduced"),
    (0.08, 0.08, 0.0, "inconclusive"),  # further training does as well
    (0.08, 0.0, 0.08, "invalid"),  # copying a copy still gains
])
def test_copies_planted(gain, more, twice, verdict):
    rng = np.random.default_rng(2)

    def noisy(x):
        return rng.normal(x, 0.02, 24)

    kept = noisy(0)
    found = {"kernel": noisy(0.1), "not_worse": kept, "not_better": -kept}
    for p in ("unseen", "noise"):
        found |= {p: noisy(gain), f"more_{p}": noisy(gain - more),
                  f"fresh_{p}": noisy(gain), f"twice_{p}": noisy(twice)}
    assert judged("distillation-recovers", found) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: t.random_walk("star", 9), "kind: got 'star'"),
    (lambda: t.random_walk("ring", 3), "n: got 3"),
    (lambda: t.eigenbasis(np.ones((2, 2))), "P: got shape"),
    (lambda: t.eigenbasis(np.roll(np.eye(3), 1, 1)), "P: not reversible"),
    (lambda: t.chain_td_solution(np.eye(2), np.zeros(2), 1.0, 1.0),
     "gamma: got 1.0"),
    (lambda: t.sampled_learning([np.eye(4)], [0], 0.9, span=1, rate=0.1,
                                target="sarsa"), "target: got 'sarsa'"),
    (lambda: t.two_rooms([0], 1, reward="none"), "reward: got 'none'"),
    (lambda: t.two_rooms([0], 1, size=4), "size: got 4"),
    (lambda: t.hill([0], reward="none"), "reward: got 'none'"),
    (lambda: lesson(["sarsa"], 1), "kinds: got"),
    (lambda: t.distilled(None, None, [0], steps=1, temperature=0.0),
     "temperature: got 0.0"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
