"""Worlds keep gymnasium's promises, and need it only where it is asked for."""

import subprocess
import sys
import warnings

import pytest
import torch

from reappraisal.lab.environments import (
    Box,
    Discrete,
    VectorEnvironment,
    as_gymnasium,
)


class Walk(VectorEnvironment):
    """A point on a line (Box) or its cell (Discrete); ends at the edge."""

    single_action_space = Discrete(3)

    def __init__(self, num_envs, real):
        super().__init__(num_envs)
        self.real = real
        self.single_observation_space = (
            Box(-4.0, 4.0, (2,)) if real else Discrete(9))

    def _seen(self):
        if self.real:
            return torch.stack([self.x, -self.x], -1)
        return self.x.round().long() + 4

    def _start(self, options):
        self.x = torch.rand(self.num_envs, generator=self.rng)
        self.x = self.x + options.get("shift", 0)
        return self._seen(), {}

    def _move(self, actions):
        self.x = (self.x + actions - 1).clamp(-4, 4)
        done = self.x.abs() == 4
        return self._seen(), self.x.clone(), done, done & False, {}


@pytest.mark.parametrize("real", [True, False])
def test_gymnasium_accepts_a_copy(real):
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*having a spec")
        checker.check_env(as_gymnasium(Walk(1, real)))


def test_copies_are_independent_and_seeds_repeat():
    many = Walk(5, True)
    first, _ = many.reset(seed=3)
    assert len(first[:, 0].unique()) == 5
    again, _ = many.reset()
    assert not torch.equal(first, again)
    assert torch.equal(many.reset(seed=3)[0], first)
    assert torch.equal(many.reset()[0], again)
    assert torch.allclose(many.reset(seed=3, options={"shift": 1})[0][:, 0],
                          first[:, 0] + 1)
    moved = many.step(torch.tensor([0, 1, 2, 1, 0]))[0]
    assert torch.allclose(
        moved[:, 0], first[:, 0] + torch.tensor([0.0, 1, 2, 1, 0]))


def test_one_copy_through_the_door_is_the_same_world():
    pytest.importorskip("gymnasium")
    world = Walk(1, True)
    door = as_gymnasium(world)
    x, _ = door.reset(seed=5)
    y, reward, done, late, _ = door.step(2)
    assert y[0] == pytest.approx(x[0] + 1) and reward == pytest.approx(y[0])
    assert (done, late) == (False, False)
    for _ in range(4):
        done = door.step(2)[2]
    assert done


def test_importing_needs_no_gymnasium():
    code = (
        "import sys; sys.modules['gymnasium'] = None; "
        "import reappraisal.lab.environments"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: Walk(0, True), "num_envs: got 0"),
    (lambda: Discrete(0), "n: got 0"),
    (lambda: Box(1.0, 1.0, ()), "low, high: got 1.0"),
    (lambda: as_gymnasium(Walk(2, True)), "world: got 2 copies"),
    (lambda: Walk(2, True).step(torch.tensor([0])), "actions: got"),
    (lambda: Walk(1, True).step(torch.tensor([3])), "actions: got"),
    (lambda: Walk(1, True).step(torch.tensor([1.0])), "actions: got"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_spaces():
    assert torch.tensor(True) not in Discrete(2)
    assert torch.full((2, 3), 2.0) not in Box(-1.0, 1.0, (3,))
    assert torch.zeros(3) in Box(-1.0, 1.0, ())
