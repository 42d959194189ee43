"""A world of blocks, curators, and what generations learn from them."""

import itertools
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reappraisal.decisions.iterative_deployment import (
    Blocksworld,
    BlocksworldEnvironment,
    Lessons,
    Planner,
    Written,
    alike,
    avoiding,
    deploy,
    every_plan,
    gradient,
    implicit_reward,
    keep_all,
    keep_as_many,
    keep_valid,
    plan_loss,
    write_plans,
)
from reappraisal.lab.ensemble import Adam, train, untrained
from reappraisal.lab.environments import as_gymnasium
from reappraisal.protocol.claims import Claim

WORLD = Blocksworld(3)


def naive(state, action):
    """Blocksworld with towers as lists: another implementation."""
    towers, hand = [list(t) for t in state[0]], state[1]
    kind, x, *y = action
    top = next((t for t in towers if t[-1] == x), None)
    if kind in ("pick-up", "unstack"):
        if hand is not None or top is None:
            return None
        below = top[-2] if len(top) > 1 else None
        if below != (y[0] if y else None):
            return None
        top.pop()
        hand = x
    else:
        if hand != x:
            return None
        if kind == "put-down":
            towers.append([x])
        else:
            place = next((t for t in towers if t[-1] == y[0]), None)
            if place is None:
                return None
            place.append(x)
        hand = None
    return tuple(sorted(tuple(t) for t in towers if t)), hand


def towers_of(on):
    hand = on.index(-2) if -2 in on else None
    towers = [[b] for b, under in enumerate(on) if under == -1]
    for tower in towers:
        while tower[-1] in on:
            tower.append(on.index(tower[-1]))
    return tuple(sorted(map(tuple, towers))), hand


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_moves_and_distances_agree_with_a_world_of_towers(blocks):
    world = Blocksworld(blocks)
    towers = [towers_of(on) for on in world.states]
    number = {state: i for i, state in enumerate(towers)}
    assert len(number) == len(towers)
    for i, state in enumerate(towers):
        for a, action in enumerate(world.actions):
            after = naive(state, action)
            expected = world.dead if after is None else number[after]
            assert world.table[i, a] == expected
    start = int(world.at_rest[-1])
    found, queue = {start: 0}, deque([start])
    while queue:
        i = queue.popleft()
        for j in world.table[i, :-1].tolist():
            if j != world.dead and j not in found:
                found[j] = found[i] + 1
                queue.append(j)
    assert [found[j] for j in range(world.dead)] == (
        world.distance[start].tolist())


def test_the_environment_is_one_of_gymnasium_and_pays_at_the_goal():
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    check_env(as_gymnasium(BlocksworldEnvironment(WORLD, 1, 8)),
              skip_render_check=True)
    assert gymnasium
    rng = torch.Generator().manual_seed(0)
    s, g = WORLD.at_rest[torch.randint(13, (2, 60), generator=rng)]
    plans = WORLD.shortest_plans(s, g, 10, rng)
    play = BlocksworldEnvironment(WORLD, 60, 10)
    play.reset(seed=0, options={"starts": s, "goals": g})
    paid = torch.zeros(60)
    for action in plans.unbind(1):
        live = action != WORLD.stop
        reward = play.step(action.clamp(max=WORLD.stop - 1))[1]
        paid = torch.where(live, reward, paid)
    apart = s != g
    assert apart.any() and (paid[apart] == 1).all()


def test_plans_are_drawn_with_their_probabilities():
    small = Blocksworld(2)
    stack = untrained(Planner(2, 6), [3])
    s, g = small.at_rest[[0]], small.at_rest[[1]]
    listed, log_p = every_plan(stack.member(0), small, int(s), int(g), 2)
    assert torch.isclose(log_p.exp().sum(), torch.tensor(1.0))
    drawn = write_plans(
        stack, small, s[None], g[None], samples=20000, length=2,
        rng=torch.Generator().manual_seed(0))[0, 0]
    same = (drawn[:, None] == listed).all(-1).float().mean(0)
    p = log_p.exp().detach()
    error = (same - p).abs() / (p * (1 - p) / 20000).sqrt()
    assert error.max() < 4.5


def test_gradients_on_all_plans_cancel():
    small = Blocksworld(2)
    torch.manual_seed(1)
    planner = Planner(2, 5).double()
    s, g = small.at_rest[:2].tolist()
    listed, log_p = every_plan(planner, small, s, g, 3)
    valid = small.after(torch.full((len(listed),), s), listed) == g
    p = log_p.detach().exp()
    assert 0 < p[valid].sum() < 1
    everything = gradient((p * log_p).sum(), planner)
    kept = gradient((p * valid * log_p).sum(), planner)
    others = gradient((p * ~valid * log_p).sum(), planner)
    exact = gradient((log_p.exp() * valid).sum(), planner)
    assert everything.norm() < 1e-10 * kept.norm().clamp(min=1)
    assert alike(exact, kept) > 1 - 1e-9 and alike(kept, others) < -1 + 1e-9
    # a reward for other plans is another direction
    wrong = gradient((p * valid.roll(7) * log_p).sum(), planner)
    assert alike(exact, wrong) < 0.99


def test_curators():
    rng = torch.Generator().manual_seed(0)
    valid = torch.rand(3, 40, 5, generator=rng) < 0.4
    plans = torch.randint(4, (3, 40, 5, 2), generator=rng)
    seen = Written(plans, valid, rng)
    assert torch.equal(keep_valid(seen), valid) and keep_all(seen).all()
    many = keep_as_many(seen).sum((1, 2))
    assert torch.equal(many, valid.any(-1).sum(-1))
    bad = torch.tensor([True, False, False, False])
    kept = avoiding(bad)(seen)
    assert torch.equal(kept, valid & (plans[..., 0] != 0))
    assert torch.equal(avoiding(bad, 1.0)(seen), valid)
    half = avoiding(bad, 0.5)(Written(
        torch.zeros(1, 4000, 1, 1).long(), torch.ones(1, 4000, 1).bool(),
        rng)).float().mean()
    assert abs(half - 0.5) < 0.04
    with pytest.raises(ValueError, match="weight: got 2"):
        avoiding(bad, 2)


def classroom(size=2):
    """Planners that have been taught a little, and tasks for them."""
    rng = torch.Generator().manual_seed(0)
    here, there = torch.cartesian_prod(WORLD.at_rest, WORLD.at_rest).T
    near = torch.nonzero(
        (WORLD.distance[here, there] > 0)
        & (WORLD.distance[here, there] <= 4))[:, 0]
    near = near[torch.randperm(len(near), generator=rng)][:30]
    plans = WORLD.shortest_plans(here[near], there[near], 10, rng)
    first = Lessons(*(t.expand(size, *t.shape) for t in (
        here[near], there[near], plans)))
    stack = train(
        Planner(3, 16), (first.inputs(WORLD), first.plans), steps=60,
        optimiser=Adam(lr=0.02), seeds=list(range(size)), batch_size=30,
        loss=plan_loss, per_member=("x", "y"))
    rest = torch.nonzero(here != there)[:, 0]
    return stack, first, (here[rest].expand(size, -1),
                          there[rest].expand(size, -1))


@pytest.fixture(scope="module")
def school():
    return classroom()


def skill(stack, tasks):
    plans = write_plans(stack, WORLD, *tasks, samples=4, length=10,
                        rng=torch.Generator().manual_seed(5))
    ends = WORLD.after(tasks[0][..., None].expand(plans.shape[:3]), plans)
    return (ends == tasks[1][..., None]).float().mean((1, 2))


def run(school, curator, steps=25, **more):
    stack, first, tasks = school
    return deploy(
        stack, WORLD, first, tasks, curator, generations=3, steps=steps,
        samples=4, rate=0.01, rng=torch.Generator().manual_seed(7), **more)


def test_validation_helps_and_its_absence_does_not(school):
    tasks = school[2]
    line = run(school, keep_valid)
    start = skill(line[0], tasks)
    assert (skill(line[-1], tasks) > 1.2 * start).all()
    everything = run(school, keep_all, shortest=False)
    assert (skill(everything[-1], tasks) < skill(line[-1], tasks)).all()
    # generation 0 is left as it was
    for name, value in school[0].params.items():
        assert torch.equal(value, line[0].params[name])


def test_a_planted_habit_is_learned_and_a_fair_curator_teaches_none(school):
    touch = torch.tensor([k in ("pick-up", "unstack") and x == 0
                          for k, x, *_ in WORLD.actions] + [False])
    tasks = school[2]

    def begins_with_a(stack):
        plans = write_plans(stack, WORLD, *tasks, samples=8, length=10,
                            rng=torch.Generator().manual_seed(3))
        ends = WORLD.after(tasks[0][..., None].expand(plans.shape[:3]), plans)
        good = ends == tasks[1][..., None]
        return float((touch[plans[..., 0]] & good).sum() / good.sum())

    before = begins_with_a(school[0])
    biased = begins_with_a(run(school, avoiding(touch), 60)[-1])
    fair = begins_with_a(run(school, avoiding(touch, 1.0), 60)[-1])
    assert biased < 0.85 * before
    assert abs(fair / before - 1) < abs(biased / before - 1)


def test_the_same_seed_gives_the_same_generations(school):
    a, b = (run(school, keep_as_many, shortest=False)[-1] for _ in range(2))
    for name, value in a.params.items():
        assert torch.equal(value, b.params[name])


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 1), st.floats(0.05, 1),
       st.integers(2, 8))
def test_selection_is_read_off_the_generations(share, a, b, n):
    shares = [share]
    for _ in range(n - 1):
        kept = shares[-1] * a, (1 - shares[-1]) * b
        shares.append(kept[0] / sum(kept))
    if 1e-9 < shares[-1] < 1 - 1e-9:
        found = implicit_reward(np.array(shares))
        assert np.isclose(found, np.log(a / b), atol=1e-5)


@pytest.mark.parametrize("shares", [[0.5], [0.0, 0.5], [0.5, 1.0], []])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="shares: got shape"):
        implicit_reward(np.array(shares))


def test_bad_input_is_refused(school):
    stack, first, tasks = school
    with pytest.raises(ValueError, match="blocks: got 1"):
        Blocksworld(1)
    with pytest.raises(ValueError, match="length: got 2"):
        WORLD.shortest_plans(tasks[0][0], tasks[1][0], 2,
                             torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="first, tasks: got"):
        deploy(stack, WORLD, first, (tasks[0][:1], tasks[1][:1]), keep_valid,
               generations=1, steps=1, samples=1, rate=0.1,
               rng=torch.Generator())


def runs(seed, effect=0.75, excess=2.0, fall=0.5, noise=0.1):
    """Made-up numbers of eight seeds."""
    rng = np.random.default_rng(seed)

    def around(x):
        return x + noise * rng.normal(size=8)

    rise = 0.1 * np.exp(np.linspace(0, effect, 6))
    return {
        "generations-double-skill": {
            "doubled": around(effect),
            "growth": rise + 0.005 * rng.normal(size=(8, 6)),
            "first": 0.1 + 0.01 * rng.normal(size=8),
            **{k: around(0.05) for k in ("uncurated", "at_random",
                                         "more_steps")},
        },
        "longer-plans-emerge": {
            "last_excess": np.full(8, excess), "first_excess": np.zeros(8),
            "more_steps_excess": np.zeros(8),
        },
        "unstated-preference-grows": {
            "fall": around(fall), "growing": around(fall),
            "unbiased": 0.02 * rng.normal(size=8),
        },
    }


def verdict(slug, numbers):
    return Claim.load(f"C06/{slug}").judge(
        numbers[slug], scale="book", seeds=range(1000, 1008)).verdict


def test_planted_effects_are_found_and_planted_nulls_are_not():
    strong, null = runs(0, effect=1.0), runs(1, 0.05, 0.0, 0.02)
    for slug in strong:
        assert verdict(slug, strong) == "reproduced"
        assert verdict(slug, null).startswith("not reproduced")


def test_an_effect_that_the_controls_have_too_is_invalid():
    numbers = runs(0, effect=1.0)
    numbers["generations-double-skill"]["more_steps"] -= 1.0
    assert verdict("generations-double-skill", numbers) == "invalid"


def test_a_first_generation_that_solves_too_much_is_no_evidence():
    numbers = runs(0, effect=1.0)
    numbers["generations-double-skill"]["first"] += 0.5
    assert verdict("generations-double-skill", numbers) == "invalid"


def test_every_first_move_of_a_shortest_plan_is_found():
    rest = WORLD.at_rest.tolist()
    for s, g in itertools.islice(itertools.permutations(rest, 2), 60):
        best = WORLD.best_actions(torch.tensor(s), torch.tensor(g))
        for a, good in enumerate(best.tolist()):
            t = int(WORLD.table[s, a])
            shorter = t != WORLD.dead and (
                WORLD.distance[t, g] < WORLD.distance[s, g])
            assert good == bool(shorter)
