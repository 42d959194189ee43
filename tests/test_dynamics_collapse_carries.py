"""Episodes, the Gaussian formula, sub-networks, sessions; planted verdicts."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import RidgeClassifier

from reappraisal.dynamics import collapse_carries_to_new_classes as c
from reappraisal.protocol.claims import Claim

COLLAPSE = "D176/collapse-generalises-to-unseen-classes"
FORECAST = "D176/cdnv-forecasts-few-shot"
BALANCE = "D055/soft-masks-balance-old-and-new"
OPTIMUM = "D055/sparsity-has-an-optimum"
RNG = np.random.default_rng(0)


def clouds(gap, classes=6, n=30, dims=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(n)
    x = torch.randn(classes * n, dims, generator=g).double()
    return x + gap * torch.eye(classes, dims)[y] / math.sqrt(2), y


def test_two_classes_with_known_means():
    v = np.geomspace(0.01, 10, 9)
    want = stats.norm.cdf(-1 / (2 * np.sqrt(v)))
    assert np.allclose(c.nearest_mean_error(v, 7), want, atol=1e-3)
    assert np.allclose(c.nearest_mean_error(v, 7, 1e9), want, atol=1e-3)
    assert (c.nearest_mean_error(v, 7, 5) > want).all()
    assert (c.nearest_mean_error(v, 7, ways=5) > want).all()
    blind = c.nearest_mean_error(1e6, 7, ways=5)
    assert float(blind) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("kw", [
    {"v": 0.0}, {"v": -1.0}, {"v": 1.0, "shots": 0}, {"v": 1.0, "ways": 1},
])
def test_formula_refuses(kw):
    with pytest.raises(ValueError, match="accepted"):
        c.nearest_mean_error(dims=3, **kw)


@pytest.mark.parametrize("shots", [1, 5])
def test_formula_meets_few_shot_error_on_gaussian_clouds(shots):
    x, y = clouds(gap=4.0, n=120, dims=16)
    tasks = c.episodes(y, 2, shots, 300, 1)
    v = 1 / 16  # unit variance along a direction, distance 4
    want = float(c.nearest_mean_error(v, 16, shots))
    assert float(c.few_shot_error(x, tasks)) == pytest.approx(want, abs=0.02)


def test_episodes_hold_each_row_once_and_are_drawn_from_the_seed():
    y = torch.tensor([3, 1, 2] * 7)
    tasks = c.episodes(y, 2, 3, 40, 5)
    rows = torch.cat([tasks.support, tasks.query], 2)
    assert rows.shape == (40, 2, 7)
    assert all(len(r.unique()) == 14 for r in rows.flatten(1))
    assert (y[rows] == y[rows[..., :1]]).all()
    again = c.episodes(y, 2, 3, 40, 5)
    assert torch.equal(again.support, tasks.support)
    assert not torch.equal(c.episodes(y, 2, 3, 40, 6).support, tasks.support)


@pytest.mark.parametrize("args", [(4, 1), (2, 7), (2, 0), (1, 2)])
def test_episodes_refuse(args):
    with pytest.raises(ValueError, match="labels"):
        c.episodes(torch.tensor([0, 1, 2] * 7), *args, 3, 0)
    with pytest.raises(ValueError, match="labels"):
        c.episodes(torch.tensor([0, 0, 1]), 2, 1, 3, 0)


def test_few_shot_error_from_none_to_chance():
    for head in ("mean", "ridge"):
        far, y = clouds(gap=100.0)
        same, _ = clouds(gap=0.0)
        tasks = c.episodes(y, 5, 5, 60, 0)
        assert float(c.few_shot_error(far, tasks, head)) == 0
        lost = float(c.few_shot_error(same, tasks, head))
        assert lost == pytest.approx(0.8, abs=0.04)
        both = c.few_shot_error(torch.stack([far, same]), tasks, head, 1.0, 7)
        assert both.tolist() == pytest.approx([0.0, lost], abs=1e-6)
    with pytest.raises(ValueError, match="head"):
        c.few_shot_error(far, tasks, "median")


def test_ridge_head_is_scikit_learns():
    x, y = clouds(gap=2.0)
    tasks = c.episodes(y, 3, 4, 5, 2)
    wrong = []
    for s, q in zip(*tasks, strict=True):
        s, q = s.flatten(), q.flatten()
        size = (x[s] - x[s].mean(0)).square().sum(1).mean()
        head = RidgeClassifier(0.5 * float(size)).fit(x[s], y[s])
        wrong.append((head.predict(x[q]) != y[q].numpy()).mean())
    mine = c.few_shot_error(x, tasks, "ridge", ridge=0.5)
    assert float(mine) == pytest.approx(np.mean(wrong), abs=1e-6)


def test_dimension_within_classes_ignores_the_means():
    x, y = clouds(gap=0.0, n=3000)
    x[:, 5:] = 0
    found = c.within_dimension(torch.stack([x, x + 50.0 * y[:, None]]), y)
    assert found.tolist() == pytest.approx([5.0, 5.0], abs=0.02)


def test_top_share_counts():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 6, 10, generator=g)
    top = c.top_share(scores, torch.tensor([0.0, 0.25, 0.9, 1.0]))
    assert top.flatten(1).sum(1).tolist() == [0, 15, 54, 60]
    assert scores[1][top[1]].min() > scores[1][~top[1]].max()


@pytest.fixture(scope="module")
def small():
    """Three kinds of minor masks, a quarter of the weights major."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(3, 9, 1, 20, generator=g)
    images = centres + 0.5 * torch.randn(3, 9, 30, 20, generator=g)
    state = c.base_session(
        images[:, :4, :20], torch.full((3,), 0.25), c.MINOR, [1, 1, 2],
        hidden=(24, 12), steps=120, rate=0.01,
    )
    return state, images


def test_base_session_learns_and_masks_as_asked(small):
    state, images = small
    assert (c.accuracy(state, images[:, :4, 20:]) > 0.9).all()
    for k in c.LAYERS:
        share = state.major[k].float().mean((1, 2))
        assert share.tolist() == pytest.approx([0.25] * 3, abs=0.01)
        rest = [m[~t] for m, t in
                zip(state.masks[k], state.major[k], strict=True)]
        assert 0 < rest[0].min() and rest[0].max() < 1
        assert (rest[1] == 0).all() and (rest[2] == 1).all()
        assert (state.masks[k][state.major[k]] == 1).all()


def test_scores_are_learned_unless_shuffled(small):
    _, images = small
    args = (images[:1, :4, :20], torch.tensor([0.5]), ["one"], [4])
    kw = {"hidden": (24, 12), "rate": 0.05}
    drawn = c.base_session(*args, steps=1, learn_scores=False, **kw)
    fixed = c.base_session(*args, steps=60, learn_scores=False, **kw)
    moved = c.base_session(*args, steps=60, **kw)
    assert torch.equal(drawn.major["1"], fixed.major["1"])
    assert not torch.equal(drawn.major["1"], moved.major["1"])


def test_base_session_refuses(small):
    _, images = small
    x = images[:1, :4]
    with pytest.raises(ValueError, match="minor"):
        c.base_session(x, torch.tensor([0.5]), ["soft"], [0])
    with pytest.raises(ValueError, match="share"):
        c.base_session(x, torch.tensor([1.5]), ["one"], [0])
    with pytest.raises(ValueError, match="moves"):
        c.session(small[0], ["some"] * 3, images[:, 4:6, :5], 0.1)


@pytest.mark.parametrize("moves", ["minor", "major", "all", "none"])
def test_only_what_may_move_moves(small, moves):
    state, images = small
    done = c.session(state, [moves] * 3, images[:, 4:6, :5], 0.3, 5)
    assert done.prototypes.shape == (3, 6, 12)
    assert torch.equal(done.prototypes[:, :4], state.prototypes)
    for k in c.LAYERS:
        name = f"{k}.weight"
        moved = done.params[name] != state.params[name]
        top = state.major[k]
        may = {"minor": ~top, "major": top, "all": torch.ones_like(top),
               "none": torch.zeros_like(top)}[moves]
        assert not (moved & ~may).any()
        assert moved.any() == (moves != "none")
        shift = done.params[f"{k}.bias"] != state.params[f"{k}.bias"]
        assert shift.any() == (moves == "all")
    assert not (moved[1] & (state.masks[k][1] == 0)).any()  # no way to act


def test_all_weights_major_is_frozen_features_exactly(small):
    _, images = small
    state = c.base_session(
        images[:1, :4, :20], torch.ones(1), ["uniform"], [5], (24, 12), 40
    )
    args = (images[:1, 4:, :5], images[:1, :4, 20:], images[:1, 4:, 20:], 1)
    soft = c.fscil(state, ["minor"], *args, 1.0)
    frozen = c.fscil(state, ["none"], *args, 1.0)
    for a, b in zip(soft, frozen, strict=True):
        assert torch.equal(a, b)


def test_no_steps_tie_and_large_steps_forget(small):
    state, images = small
    three = state.take([0, 0, 0])
    x = images[[0, 0, 0]]
    args = (x[:, 4:, :5], x[:, :4, 20:], x[:, 4:, 20:], 1)
    moves = ["minor", "major", "all"]
    idle = c.fscil(three, moves, *args, 0.5, 0)
    assert (idle.harmonic == idle.harmonic[:1]).all()
    wild = c.fscil(three, moves, *args, 3.0, 20)
    assert wild.base[2, -1] < idle.base[2, -1] - 0.2
    want = stats.hmean([float(idle.base[0, -1]), float(idle.new[0, -1])])
    assert float(idle.harmonic[0, -1]) == pytest.approx(want, abs=1e-6)
    assert idle.cdnv.shape == (3, 6)


def test_known_classes_add_no_prototype(small):
    state, images = small
    again = c.session(state, ["minor"] * 3, images[:, :2, :5], 0.1,
                      known=torch.arange(2))
    assert torch.equal(again.prototypes, state.prototypes)


# --- what the registered rules make of planted evidence


def judged(slug, evidence):
    n = 24 if slug.startswith("D176") else 32
    return Claim.load(slug).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)
    )


def noisy(mean, n=24, sd=0.1):
    return mean + sd * RNG.standard_normal(n)


def curve(ratio, n=24):
    """Minus log CDNV of five class counts, the last over the first."""
    steps = np.linspace(0, -math.log(ratio), 5)
    page = steps + 0.05 * RNG.standard_normal((n, 5))
    return {"page": page, "ratio": page[:, -1] - page[:, 0]}


@pytest.mark.parametrize(("ratio", "random", "verdict"), [
    (0.4, 0.0, "reproduced"), (1.0, 0.0, "not reproduced"),
    (0.4, 0.5, "invalid"),
])
def test_collapse_verdicts(ratio, random, verdict):
    found = judged(COLLAPSE, curve(ratio) | {"random": noisy(random)})
    assert found.verdict == verdict


@pytest.mark.parametrize(("strength", "verdict"), [
    (3.0, "reproduced"), (0.0, "not reproduced"),
])
def test_forecast_verdicts(strength, verdict):
    x, given, z = RNG.standard_normal((3, 120))
    alphabets = np.arange(120) % 24
    shared = {"y": strength * x + RNG.standard_normal(120),
              "clusters": alphabets}
    found = judged(FORECAST, {
        "rho": {"x": x} | shared,
        "partial": {"x": x, "given": given} | shared,
        "mixed": {"x": z, "given": given} | shared,
        "mixed_reversed": {"x": -z, "given": given} | shared,
    })
    assert found.verdict == verdict


def balance(hard, tuned, tie=0.0):
    names = ("over_zero", "over_one", "over_frozen", "same_rate_hard",
             "same_rate_tuned")
    return {k: noisy(0.0, 32) for k in names} | {
        "over_hard": noisy(hard, 32), "over_tuned": noisy(tuned, 32),
        "tie": np.full(4, tie), "again": noisy(0.0, 32),
    }


@pytest.mark.parametrize(("evidence", "verdict"), [
    (balance(3, 8), "reproduced"), (balance(3, 0), "not reproduced"),
    (balance(0, 8), "not reproduced"), (balance(3, 8, 0.01), "invalid"),
])
def test_balance_verdicts(evidence, verdict):
    found = judged(BALANCE, evidence)
    assert found.verdict == verdict
    assert found.record["qualifier"] == "softness not the cause"


@pytest.mark.parametrize(("high", "shuffled", "verdict"), [
    (1.0, 0.5, "reproduced"), (-1.0, 0.5, "not reproduced"),
    (1.0, -0.5, "invalid"),
])
def test_optimum_verdicts(high, shuffled, verdict):
    found = judged(OPTIMUM, {
        "low_end": noisy(5.0, 16), "high_end": noisy(high, 16),
        "shuffled": noisy(shuffled, 16),
    })
    assert found.verdict == verdict
