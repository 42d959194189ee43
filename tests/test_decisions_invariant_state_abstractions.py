"""Known graphs, tests by hand, exact costs by simulation, planted verdicts."""

import warnings
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import solve_discrete_are

from reappraisal.decisions import invariant_state_abstractions as v
from reappraisal.lab.environments import as_gymnasium
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim


def made(seed, n=8, count=4, size=500, **how):
    rng = np.random.default_rng([seed, 77])
    system = v.LinearBlockMDP.random(rng, n, **how)
    worlds = [system.world(rng) for _ in range(count)]
    return system, worlds, system.sample(rng, worlds, size)


@pytest.mark.parametrize("seed", range(6))
def test_parents_screen_off_the_environment(seed):
    system = made(seed, 6 + seed % 5, size=5)[0]
    g = system.graph()
    assert nx.is_directed_acyclic_graph(g)
    parents = {f"y{j}" for j in np.flatnonzero(system.b)}
    assert nx.is_d_separator(g, {"E"}, {"r"}, parents)
    k = len(system.A)
    child = {f"y{k}"}
    assert not nx.is_d_separator(g, {"E"}, {"r"}, child)
    assert not nx.is_d_separator(g, {"E"}, {"r"}, parents | child)
    hidden = replace(system, confounded=True).graph()
    assert not nx.is_d_separator(hidden, {"E"}, {"r"}, parents)


def test_ancestors_by_powers_of_the_matrix():
    for seed in range(10):
        system = made(seed, 10, size=5)[0]
        reach = np.linalg.matrix_power(
            np.eye(5) + (system.A != 0), 5) != 0
        want = np.flatnonzero((system.b != 0) @ reach)
        assert system.ancestors() == set(want.tolist())


def plain(X, y, env, always=None):
    """p of each subset, residual by residual."""
    found = []
    n, d = X.shape
    for code in range(2**d):
        pick = [j for j in range(d) if code >> j & 1]
        Z = np.c_[np.ones(n), X[:, pick]]
        if always is not None:
            Z = np.c_[Z, always]
        res = y - Z @ np.linalg.lstsq(Z, y, rcond=None)[0]
        ps = []
        for e in np.unique(env):
            a, b = res[env == e], res[env != e]
            ps.append(stats.ttest_ind(a, b, equal_var=False).pvalue)
            low = stats.f.cdf(a.var(ddof=1) / b.var(ddof=1), len(a) - 1,
                              len(b) - 1)
            ps.append(2 * min(low, 1 - low))
        found.append(min(1, min(ps) * len(ps)))
    return np.array(found)


def test_moments_are_the_tests_on_residuals():
    rng = np.random.default_rng(0)
    env = rng.integers(0, 3, 300)
    X = rng.normal(size=(300, 3)) * (1 + env[:, None] / 4)
    y = X[:, 0] + 0.05 * env + rng.normal(size=300)
    action = rng.normal(size=(300, 1))
    y = y + action[:, 0]
    for always in (None, action):
        got = v.icp(X, y, env, always=always)
        np.testing.assert_allclose(
            got.p, plain(X, y, env, always), rtol=1e-5, atol=1e-8)
        kept = set(got.accepted)
        assert kept == {frozenset(j for j in range(3) if c >> j & 1)
                        for c in np.flatnonzero(got.p > 0.05)}


def three(n=1500, seed=0, same=False):
    rng = np.random.default_rng(seed)
    env = np.repeat([0, 1], n)
    e = env * (not same)
    cause = rng.normal(size=2 * n) * (1 + e) + e
    y = cause + rng.normal(size=2 * n)
    child = np.where(e, 0.2, 1) * y + rng.normal(size=2 * n)
    return np.c_[cause, child, rng.normal(size=2 * n)], y, env


@pytest.mark.parametrize("test", ["moments", "ks"])
def test_cause_child_bystander(test):
    assert v.icp(*three(), test=test).intersection == {0}
    calm = v.icp(*three(same=True), test=test)
    assert calm.intersection == frozenset() and frozenset() in calm.accepted


def test_the_true_set_is_rejected_at_most_at_the_level():
    bad = 0
    for s in range(400):
        X, y, env = three(60, s)
        bad += v.icp(X, y, env).p[1] <= 0.05
    assert bad <= stats.binom.ppf(0.999, 400, 0.05)


def test_mechanism_off_and_on():
    equal = empty = 0
    for s in range(12):
        system, worlds, data = made(s, 7)
        equal += v.reward_ancestors(data) == system.ancestors()
        rng = np.random.default_rng([s, 5])
        copies = system.sample(rng, worlds[:1] * 4, 500)
        empty += not v.reward_ancestors(copies)
        shuffled = data._replace(r=rng.permutation(data.r))
        assert not v.reward_ancestors(shuffled)
    assert equal >= 7 and empty >= 11


def test_a_confounder_is_noticed():
    nothing = sum(
        not v.icp(d.y, d.r, d.env, 0.01).accepted
        for s in range(10) for d in [made(s, 7, confounded=True)[2]])
    assert nothing >= 6


def test_exact_cost_is_what_simulation_costs():
    system, worlds, data = made(3, 8)
    policy = v.lqr_on(range(8), data)
    policy = policy._replace(gain=policy.gain * 0.3)
    e, rng, n = worlds[1], np.random.default_rng(0), 20000
    k, c = len(system.A), system.children
    dyn = e.mean + e.scale * rng.normal(size=(n, k))
    state, total = np.c_[dyn, np.zeros((n, 8 - k))], 0
    for _ in range(6):
        a = -np.c_[state, np.ones(n)] @ policy.gain
        dyn = state[:, :k] @ system.A.T + np.outer(a, system.B)
        dyn = dyn + system.noise * rng.normal(size=(n, k))
        r = dyn @ system.b + system.noise * rng.normal(size=n)
        cause = np.c_[np.repeat(r[:, None], c, 1), dyn[:, system.drivers]]
        rest = system.memory * state[:, k:] + e.gain * cause + e.shift
        rest = rest + e.spread * rng.normal(size=(n, 8 - k))
        state = np.c_[dyn, rest]
        total = total + r**2 + 0.1 * a**2
    want = v.closed_loop_cost(system, e, policy, steps=6)
    error = total.std() / 6 / n**0.5
    assert abs(total.mean() / 6 - want) < 4 * error


def test_gymnasium_accepts_a_world():
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    system, worlds, _ = made(3, 8, size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*having a spec")
        warnings.filterwarnings("ignore", message=".*normalized.* space")
        checker.check_env(as_gymnasium(v.BlockWorld(system, worlds[0])))
    many = v.BlockWorld(system, worlds[0], 3, num_envs=4000)
    x, _ = many.reset(seed=0)
    k = len(system.A)
    assert not x[:, k:].any()
    assert (x[:, :k].mean(0) - torch.tensor(worlds[0].mean)).abs().max() < 0.2
    a = torch.ones(4000, 1)
    y, reward, _, late, info = many.step(a)
    want = x[:, :k].double().numpy() @ system.A.T + system.B
    assert abs(y[:, :k].numpy() - want).mean() < system.noise
    torch.testing.assert_close(reward, -info["signal"] ** 2 - 0.1)
    assert not late.any()
    many.step(a)
    assert many.step(a)[3].all()


def test_regulator_is_riccatis():
    system, worlds, data = made(2, 6, size=100_000)
    k = len(system.A)
    got = v.lqr_on(range(k), data)
    F, G = 0.95**0.5 * system.A, 0.95**0.5 * system.B[:, None]
    P = solve_discrete_are(
        F, G, np.outer(system.b, system.b), np.array([[0.1]]))
    want = (G.T @ P @ F) / (0.1 + G.T @ P @ G)
    np.testing.assert_allclose(got.gain[:-1], want[0], atol=0.02)
    assert abs(got.gain[-1]) < 0.02
    best = v.closed_loop_cost(system, worlds[0], got)
    for factor in (0.7, 1.3):
        other = got._replace(gain=got.gain * factor)
        assert v.closed_loop_cost(system, worlds[0], other) > best
    wild = got._replace(gain=got.gain * -1e6)
    assert v.closed_loop_cost(system, worlds[0], wild) == np.inf
    assert v.lqr_on([], data).chosen == ()


def test_pictures_show_the_scene():
    scenes = v.draw_scenes([generator(s, "t") for s in (1, 2)], 50, [1, 3])
    assert set(scenes.env.unique().tolist()) == {1, 3}
    colours = v.palettes([1, 2], 4)
    seen = v.render(scenes, colours).view(2, 50, 6, 6, 3)
    for s in range(2):
        for i in range(50):
            mine = colours[s, scenes.env[s, i]]
            want = mine[0].repeat(6, 6, 1)
            for r, c in scenes.others[s, i].tolist():
                want[r, c] = mine[1]
            r, c = scenes.goal[s, i].tolist()
            want[r, c] = mine[2]
            r, c = scenes.agent[s, i].tolist()
            want[r, c] = mine[3]
            assert torch.equal(seen[s, i], want)
    far = (scenes.after - scenes.goal).abs().sum(-1) / 6
    assert torch.allclose(scenes.answers[..., 4], -far)
    assert torch.equal(scenes.answers[..., 2:4], scenes.latents[..., 2:])


def net(lesson, steps=150, seeds=(1, 2)):
    colours = v.palettes(seeds, 5)
    p = v.train_misa({"x": lesson}, seeds, steps, colours=colours)["x"]
    return p, colours


def test_encoders_learn_and_the_adversary_matters():
    seeds = (1, 2)
    p, colours = net(v.Lesson(truth=True), 400)
    error = v.rendering_error(p, v.Lesson(truth=True), seeds, colours, [4])
    assert error.max() < 0.1  # the upper line needs no rendering
    p, _ = net(v.Lesson(), 60)
    q, _ = net(v.Lesson(3.0), 60)
    same, _ = net(v.Lesson(0.0), 60)
    assert all(torch.equal(p[k], same[k]) for k in p)
    assert not torch.equal(p["see_w"], q["see_w"])


def test_decodability_of_planted_codes():
    p, colours = net(v.Lesson(), 1)
    dark = torch.zeros_like(colours)
    assert v.decodability(p, (1, 2), dark).max() < 0.35
    loud = colours.clone()
    loud[:, :, 0] = torch.arange(5.0)[:, None]
    assert v.decodability(p, (1, 2), loud).min() > 0.8


def judged(slug, evidence, n):
    return Claim.load(f"C32/{slug}").judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


@pytest.mark.parametrize(("covered", "equal", "copies", "verdict"), [
    (298, 260, 299, "reproduced"),
    (250, 260, 299, "not reproduced"),
    (300, 60, 299, "not reproduced"),  # covers trivially, finds little
    (285, 260, 299, "inconclusive"),
    (298, 260, 200, "invalid"),
])
def test_coverage_planted(covered, equal, copies, verdict):
    found = {k: np.arange(300) < n for k, n in (
        ("coverage", covered), ("equality", equal), ("copies", copies))}
    assert judged("coverage-and-power", found, 300) == verdict


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"),
    ({"invariant": -0.5}, "not reproduced"),
    ({"everything": -0.5}, "not reproduced"),
    ({"cost": -0.5}, "inconclusive"),
    ({"calm_lasso": 0.3}, "invalid"),
])
def test_transfer_planted(how, verdict):
    means = {"invariant": 0.18, "everything": 1.0, "lasso": 1.0,
             "cost": 0.09, "calm_invariant": 0.0, "calm_everything": 0.0,
             "calm_lasso": 0.0} | how
    rng = np.random.default_rng(0)
    found = {k: rng.normal(m, 0.04, 100) for k, m in means.items()}
    assert judged("abstraction-transfers", found, 100) == verdict


@pytest.mark.parametrize(("gain", "told", "same", "verdict"), [
    (0.4, 0.2, 0.0, "reproduced"), (0.0, 0.2, 0.0, "not reproduced"),
    (0.4, 0.0, 0.0, "inconclusive"), (0.4, 0.2, 0.4, "invalid"),
])
def test_pixels_planted(gain, told, same, verdict):
    rng = np.random.default_rng(0)
    found = {"reduction": rng.normal(gain, 0.1, 16),
             "decodability": rng.normal(told, 0.1, 16),
             "identical": rng.normal(same, 0.02, 16)}
    if told == 0:
        found["decodability"] -= found["decodability"].mean()
    assert judged("misa-on-pixels", found, 16) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: v.LinearBlockMDP.random(np.random.default_rng(0), 5),
     "variables: got 5"),
    (lambda: v.icp(np.zeros((4, 1)), np.zeros(4), np.zeros(4)),
     "X, y, env: got"),
    (lambda: v.icp(np.zeros((4, 1)), np.zeros(3), np.arange(4)),
     "X, y, env: got"),
    (lambda: v.icp(np.zeros((4, 17)), np.zeros(4), np.arange(4)),
     "at most 16 columns"),
    (lambda: v.icp(*three(5), test="hsic"), "test: got 'hsic'"),
    (lambda: v.train_misa({"x": v.Lesson()}, [0], 1, renderings=range(5),
                          colours=v.palettes([0], 5)), "renderings: got 5"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
