"""Exact answers by other routes, learning rules by hand, planted verdicts."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from reappraisal.decisions import acting_on_your_own_uncertainty as a
from reappraisal.lab.ensemble import Adam, Batch, fit
from reappraisal.lab.environments import as_gymnasium
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim


def grid(**how):
    return a.HiddenGoalGrid(**({"size": 3, "horizon": 5} | how))


def best_path(world, cost):
    """Largest value over all open-loop paths."""
    T, prior = world.horizon, world.prior.double().numpy()
    best = -np.inf
    moves = world.moves.tolist()
    for path in itertools.product(range(5), repeat=T):
        cell, first = 0, {}
        for t, move in enumerate(path):
            cell = moves[cell][move]
            first.setdefault(cell, t)
        worth = 0.0
        for p, g in zip(prior, world.goals.tolist(), strict=True):
            t = first.get(g, T)
            worth += p * (T - t - cost * t)
        best = max(best, worth)
    return best


@pytest.mark.parametrize("prior", [
    None, [0.6, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.5, 0.5, 0.0]])
@pytest.mark.parametrize("cost", [0.1, 0.5])
def test_dynamic_programme_is_the_best_path(prior, cost):
    world = grid(prior=prior, step_cost=cost)
    assert a.solve_bamdp(world).value == pytest.approx(
        best_path(world, cost), abs=1e-6)


def test_optimum_over_episodes_is_what_its_policy_earns():
    world = grid(prior=[0.3, 0.1, 0.2, 0.3, 0.1])
    plan = a.solve_bamdp(world, 2)
    many, total = world.copies(5), 0
    on = torch.ones(5, 5) > 0
    for k in range(2):
        cell, _ = many.reset(options={"goal": world.goals})
        for t in range(5):
            cell, reward, *_ = many.step(plan.act(5 * k + t, on, cell))
            here = world.is_goal[cell] > 0
            on = torch.where((reward > 0)[:, None], here, on & ~here)
            total += (reward * world.prior).sum()
    assert plan.value == pytest.approx(float(total), abs=1e-5)
    assert plan.value > 2 * a.solve_bamdp(world).value  # memory pays


@pytest.mark.parametrize("resample", [False, True])
def test_thompson_by_simulation(resample):
    """20000 agents drawn step by step agree with the exact values."""
    world, n, rng = grid(horizon=6), 20000, np.random.default_rng(0)
    moves, goals = world.moves.numpy(), world.goals.numpy()
    row = rng.integers(5, size=n)
    on, seen = np.ones((n, 5), bool), []
    for _ in range(2):
        cell, paid = np.zeros(n, int), np.zeros(n)

        target = (rng.random((n, 5)) * on).argmax(1)
        for _ in range(6):
            far = np.abs(moves[cell] // 3 - goals[target, None] // 3) + (
                np.abs(moves[cell] % 3 - goals[target, None] % 3))
            act = (far - rng.random((n, 5)) / 2).argmin(1)
            there = cell == goals[target]
            act[there] = 4
            cell = moves[cell, act]
            hit = cell == goals[row]
            paid += np.where(hit, 1, -0.1)
            here = cell[:, None] == goals
            on = np.where(hit[:, None], here, on & ~here)
            if resample:
                fresh = (rng.random((n, 5)) * on).argmax(1)
                target = np.where(on[np.arange(n), target], target, fresh)
                target = np.where(hit, row, target)
        seen.append(paid)
    want = a.posterior_sampling_value(world, 2, resample=resample)
    error = np.std(seen, 1) / n**0.5
    assert (np.abs(np.mean(seen, 1) - want) < 4 * error).all()


def test_sampling_again_lies_between():
    world = grid(horizon=8)
    plain = a.posterior_sampling_value(world)[0]
    again = a.posterior_sampling_value(world, resample=True)[0]
    assert plain < again <= a.solve_bamdp(world).value
    walks, p = a.walk_values(world), world.prior.double().numpy()
    assert p @ walks @ p == pytest.approx(plain)
    assert p @ walks.diagonal() == pytest.approx(
        p @ a.solve_bamdp(world).known)


def test_nothing_to_explore_leaves_no_gap():
    for g in range(5):
        world = grid(prior=torch.eye(5)[g])
        best = a.solve_bamdp(world).value
        assert a.posterior_sampling_value(world)[0] == pytest.approx(best)


def test_gittins_indices_and_bandits():
    assert a.gittins(1, 1, 0.9) == pytest.approx(0.7029, abs=5e-5)
    assert a.gittins(1, 1, 0.5) == pytest.approx(0.5590, abs=5e-5)
    assert a.gittins(2, 1, 0.9) == pytest.approx(0.8001, abs=5e-5)
    many = a.gittins(np.array([[1], [4]]), np.array([1, 3]), 0.9)
    assert many.shape == (2, 2)
    assert (many > np.array([[1 / 2, 1 / 4], [4 / 5, 4 / 7]])).all()

    def value(state, left):  # plain recursion
        if not left:
            return 0.0
        worths = []
        for i, (s, f) in enumerate(state):
            p = s / (s + f)
            win = state[:i] + ((s + 1, f),) + state[i + 1:]
            lose = state[:i] + ((s, f + 1),) + state[i + 1:]
            worths.append(p * (1 + 0.8 * value(win, left - 1))
                          + 0.8 * (1 - p) * value(lose, left - 1))
        return max(worths)

    got = a.bandit_returns(2, 5, 0.8)
    assert got["bayes"] == pytest.approx(value(((1, 1), (1, 1)), 5))
    assert got["thompson"] < got["gittins"] <= got["bayes"] + 1e-12


def test_thompson_in_a_bandit_by_simulation():
    rng, n = np.random.default_rng(1), 40000
    p, counts = rng.random((n, 2)), np.ones((n, 2, 2))
    total = np.zeros(n)
    for t in range(4):
        arm = rng.beta(counts[..., 0], counts[..., 1]).argmax(1)
        win = rng.random(n) < p[np.arange(n), arm]
        counts[np.arange(n), arm, 1 - win.astype(int)] += 1
        total += 0.9**t * win
    want = a.bandit_returns(2, 4, 0.9)["thompson"]
    assert abs(total.mean() - want) < 4 * total.std() / n**0.5


def test_gymnasium_accepts_the_grid():
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*having a spec")
        checker.check_env(as_gymnasium(grid()))
    many = grid(num_envs=4000, prior=[0.5, 0.5, 0, 0, 0])
    many.reset(seed=1)
    share = (many.goal[:, None] == many.goals).float().mean(0)
    assert share[2:].sum() == 0 and abs(share[0] - 0.5) < 0.04
    for _ in range(4):
        assert not many.step(torch.full((4000,), 4))[3].any()
    assert many.step(torch.full((4000,), 4))[3].all()


def test_members_do_not_touch_each_other():
    model = a.VariBAD(grid())
    both = a.learn(model, {"x": a.Arm()}, [3, 4], 6, copies=8)
    for k, v in a.learn(model, {"x": a.Arm(), "y": a.Arm(hint="goal")},
                        [3, 4], 6, copies=8).params["x"].items():
        torch.testing.assert_close(v, both.params["x"][k])
    again = a.learn(model, {"x": a.Arm()}, [3, 4], 6, copies=8)
    assert torch.equal(again.returns["x"], both.returns["x"])


def gradients(arm, part):
    model = a.VariBAD(grid())
    p = {k: v.requires_grad_() for k, v in model.start([1]).items()}
    noise = torch.randn(1, 5, 5, 5, generator=generator(0))
    run = model.rollout(p, model.world.goals[None], [arm], noise)
    a.a2c_loss(run).sum().backward()
    g = p[part].grad
    return 0.0 if g is None else float(g.abs().sum())


def test_who_teaches_the_encoder():
    assert gradients(a.Arm(decoder=False), "gru_x") > 0
    assert gradients(a.Arm(), "gru_x") == 0
    assert gradients(a.Arm(decoder=False, hint="belief"), "gru_x") == 0
    for arm in a.ARMS.values():
        assert gradients(arm, "trunk_w") > 0


def test_the_hint_is_what_it_says():
    model = a.VariBAD(grid())
    p = model.start([1, 1, 1])
    arms = [a.Arm(), a.Arm(hint="belief"), a.Arm(hint="goal")]
    w = p["trunk_w"]
    w.zero_()
    at = 9 + 10  # cells and latent come first
    w[:, at, 0] = 1.0  # reads the first goal
    p["action_w"].zero_()
    p["action_b"].zero_()
    p["action_b"][:, 4] = 1
    p["value_w"].zero_()
    w[:, at, 32] = 1.0
    p["trunk_b"].zero_()
    p["value_w"][:, 0] = 1.0
    p["value_b"].zero_()
    run = model.rollout(p, model.world.goals.expand(3, 5), arms)
    said = run.value[:, :, 0].atanh()
    torch.testing.assert_close(said[0], torch.zeros(5))
    torch.testing.assert_close(said[1], torch.full((5,), 0.2))
    seen = model.rollout(
        p | {"value_w": p["value_w"] / 10}, model.world.goals.expand(3, 5),
        arms).value[2, :, 0] * 10
    assert seen[0] > 0.5 and seen[1:].abs().max() == 0


def test_decoder_learns_the_posterior_and_not_from_other_goals():
    """Along a fixed sweep the bound alone teaches the exact belief."""
    world = grid(horizon=8)
    model = a.VariBAD(world)
    way = torch.tensor([0, 1, 2, 5, 8, 7, 6, 7, 8])
    draw = generator(0, "test")

    def batches(step, members):
        g = world.goals[torch.randint(5, (2, 64), generator=draw)]
        z = torch.randn(2, 64, 9, 5, generator=draw)
        return Batch(step, members, x=(g, z))

    def loss(p, batch):
        g, z = batch.x
        target = torch.stack([g[0], g[1].roll(1)])
        return model.elbo_loss(p, way.expand(2, 64, 9), g, target, z,
                               torch.arange(9))

    p = fit(model.start([1, 1]), loss, optimiser=Adam(lr=0.02), steps=250,
            batches=batches).params
    cell = way.expand(2, 5, 9)
    hit = cell[:, :, 1:] == world.goals[:, None]
    h = torch.zeros(2, 5, 32)
    latent, on, beliefs = [], torch.ones(2, 5, 5), []
    for t in range(9):
        latent.append(a.affine(p, "posterior", h))
        beliefs.append(on / on.sum(-1, keepdim=True))
        if t < 8:
            x = torch.cat([model.eye[cell[:, :, t + 1]],
                           hit[:, :, t, None].float()], -1)
            h = a.gru_step(p, h, x)
            here = world.is_goal[cell[:, :, t + 1]]
            on = torch.where(hit[:, :, t, None], here, on * (1 - here))
    blank = torch.zeros(2, 5, 8)
    run = a.Episodes(cell, blank, blank, blank, blank,
                     torch.stack(latent, 2), torch.stack(beliefs, 2))
    error = a.belief_errors(world, run, a.decoded_belief(model, p, run))
    right, wrong = error["kl"].mean(1)
    assert right < 0.2 and error["visited"][0, -1] < 0.1
    assert wrong > error["prior_kl"][1].mean() - 0.05


def judged(slug, evidence):
    return Claim.load(f"C37/{slug}").judge(
        evidence, scale="book", seeds=range(1000, 1008)).verdict


def noisy(x, sd=0.02, seed=0):
    return np.random.default_rng(seed).normal(x, sd, 8)


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"),
    ({"fraction": noisy(0.7)}, "not reproduced"),
    ({"above_sampling": noisy(-0.2)}, "not reproduced"),
    ({"learned": noisy(0.8)}, "inconclusive"),  # too little training
    ({"room": 0.01}, "invalid"),
    ({"visible": noisy(-0.2)}, "invalid"),
])
def test_near_optimal_planted(how, verdict):
    found = {"fraction": noisy(0.97), "above_sampling": noisy(0.5),
             "learned": noisy(0.99, 0.002), "room": 0.0,
             "visible": noisy(-0.005, 0.002), "visible_sampling": 0.0}
    assert judged("near-bayes-optimal", found | how) == verdict


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"),
    ({"divergence": noisy(-0.3)}, "not reproduced"),
    ({"visited": noisy(-0.2)}, "not reproduced"),
    ({"divergence": noisy(0.0, 0.1)}, "inconclusive"),
    ({"shuffled": noisy(-0.5)}, "invalid"),
])
def test_belief_planted(how, verdict):
    found = {"divergence": noisy(0.1), "visited": noisy(0.04, 0.01),
             "shuffled": noisy(0.1)}
    assert judged("belief-is-right", found | how) == verdict


@pytest.mark.parametrize(("area", "given", "verdict"), [
    (0.2, 0.0, "reproduced"), (0.0, 0.0, "not reproduced"),
    (-0.2, 0.0, "not reproduced"), (0.2, 0.2, "invalid"),
])
def test_decoder_planted(area, given, verdict):
    found = {"area": noisy(area), "given_belief": noisy(given, 0.01)}
    assert judged("decoder-loss-matters", found) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: grid(size=2), "size, horizon: got 2"),
    (lambda: grid(horizon=0), "size, horizon: got 3, 0"),
    (lambda: grid(prior=[0.5, 0.5]), "prior: got shape"),
    (lambda: grid(prior=[0.5] * 5), "prior: got shape"),
    (lambda: a.solve_bamdp(grid(size=6)), "world: 32 possible goals"),
    (lambda: a.posterior_sampling_value(grid(size=6)), "world: 32"),
    (lambda: a.gittins(0, 1, 0.9), "alpha, beta, gamma: got 0"),
    (lambda: a.gittins(1, 1, 1.0), "alpha, beta, gamma: got 1"),
    (lambda: a.learn(a.VariBAD(grid()), {"x": a.Arm(hint="map")}, [0], 1),
     "arms: unknown hint"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
