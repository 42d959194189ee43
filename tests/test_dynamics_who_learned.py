"""The meter by hand, planted features, verdicts on planted effects."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from reappraisal.dynamics import who_learned_which_feature as w
from reappraisal.lab import data
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim


def answers(S=6, N=50, k=4, seed=1):
    g = generator(seed, "answers")
    return torch.randint(k, (S, N), generator=g), torch.randint(
        k, (N,), generator=g)


def test_disagreement_is_the_mean_over_pairs():
    said, _ = answers()
    pairs = [(a != b).double().mean()
             for a, b in itertools.combinations(said, 2)]
    want = torch.stack(pairs).mean()
    torch.testing.assert_close(w.pair_disagreement(said, 4), want)
    torch.testing.assert_close(
        w.pair_disagreement(torch.stack([said, said]), 4),
        want.expand(2))


def test_pseudo_values_by_leaving_one_out():
    said, y = answers()

    def gap(rows):
        return 100 * (w.pair_disagreement(rows, 4)
                      - (rows != y).double().mean())

    for i, value in enumerate(w.gde_gap(said, y, 4)):
        rest = torch.cat([said[:i], said[i + 1:]])
        torch.testing.assert_close(value, 6 * gap(said) - 5 * gap(rest))
    torch.testing.assert_close(w.gde_gap(said, y, 4).mean(), gap(said))


def test_calibrated_answers_have_no_gap_and_twins_have_all_of_it():
    p = torch.tensor([[0.6, 0.3, 0.1]]).expand(40_000, 3)
    g = generator(3, "draws")
    said = torch.multinomial(p, 8, True, generator=g).T
    y = torch.multinomial(p, 1, generator=g)[:, 0]
    assert abs(w.gde_gap(said, y, 3).mean()) < 0.6
    same = said[:1].expand(8, -1)
    error = 100 * (said[0] != y).double().mean()
    torch.testing.assert_close(w.gde_gap(same, y, 3),
                               -error.expand(8))


@pytest.mark.parametrize("k", [2, 7])
def test_framework_at_the_ends_and_by_simulation(k):
    acc, agree = w.framework(torch.tensor([1.0, 0.0]).double(), k)
    assert acc == agree == (1 + 1 / k) / 2  # known to all or to none
    a = torch.full((5,), 0.5).double()
    acc, agree = w.framework(a, k)
    assert (acc - agree).item() == pytest.approx((1 - 1 / k) / 4)
    said, y = w.simulate_framework(
        0.5, torch.ones(3000, dtype=torch.long), 30, k, 200, 2)
    assert (said == y).double().mean().item() == pytest.approx(
        acc.item(), abs=0.02)
    assert 1 - w.pair_disagreement(said, k).item() == pytest.approx(
        agree.item(), abs=0.02)


def planted(S=10, seed=5):
    g = generator(seed, "planted")
    owned = torch.rand(S, 4, generator=g) < 0.6
    owned[:, 0] = True
    source = torch.randn(4200, 4, generator=g)
    layers = []
    for s in range(S):
        axes = torch.linalg.qr(torch.randn(12, 12, generator=g))[0]
        size = torch.tensor([6.0, 4.5, 3.2, 2.2]) * owned[s]
        layers.append((source * size) @ axes[:4]
                      + 0.05 * torch.randn(4200, 12, generator=g))
    return owned, source, torch.stack(layers)


def test_tensor_finds_planted_features_and_where_they_are_strong():
    owned, source, layers = planted()
    found = w.interaction_tensor(layers[:, :4000], layers[:, 4000:],
                                 components=4, match=0.8, strong=1.0)
    for k in range(4):
        t = (found.has == owned[:, k, None]).all(0).nonzero()
        assert len(t), f"feature {k} is not found"
        s = int(owned[:, k].nonzero()[0])
        strong = source[4000:, k].abs() > source[:4000, k].std()
        assert max((found.omega[s, :, j] == strong).double().mean()
                   for j in t.flatten()) > 0.9
    assert not found.omega[~found.has[:, None].expand_as(found.omega)].any()
    # every candidate of every network is in one feature
    assert found.has.sum() == 10 * 4
    assert ((0 <= found.meeting) & (found.meeting <= 1)).all()


def test_tensor_does_not_depend_on_rotations():
    _, _, layers = planted()
    turn = torch.linalg.qr(torch.randn(
        10, 12, 12, generator=generator(1, "turn")))[0]
    one, two = (w.interaction_tensor(h[:, :4000], h[:, 4000:], components=3,
                                     match=0.8, strong=1.0)
                for h in (layers, layers @ turn))
    assert torch.equal(one.has, two.has)
    assert (one.omega == two.omega).double().mean() > 0.999


def test_unrelated_networks_share_nothing():
    noise = torch.randn(8, 500, 10, generator=generator(2, "noise"))
    found = w.interaction_tensor(noise[:, :300], noise[:, 300:],
                                 components=3, match=0.6, strong=1.0)
    assert found.has.sum(0).max() == 1 and found.has.shape[1] == 24


def test_shuffling_keeps_features_and_breaks_their_places():
    _, _, layers = planted()
    found = w.interaction_tensor(layers[:, :4000], layers[:, 4000:],
                                 components=4, match=0.8, strong=1.0)
    mixed = found.shuffled(3)
    assert torch.equal(mixed.omega.sum(1), found.omega.sum(1))
    assert not torch.equal(mixed.omega, found.omega)
    torch.testing.assert_close(mixed.overlap, found.overlap)
    assert torch.equal(mixed.omega, found.shuffled(3).omega)


def test_auc_against_sklearn_with_ties():
    g = generator(4, "scores")
    score = torch.randint(6, (80,), generator=g).double()
    right = torch.rand(3, 80, generator=g) < 0.4 + score / 15
    want = roc_auc_score(right.flatten().numpy(),
                         score.repeat(3).numpy())
    assert w.auc(score, right).item() == pytest.approx(want)


def test_meeting_tells_right_answers_of_the_simulator():
    g = generator(6, "framework")
    has = torch.rand(40, 25, generator=g) < 0.3
    shown = torch.rand(500, 25, generator=g) < 0.06
    omega = has[:, None] & shown[None]
    found = w.InteractionTensor(omega, has)
    right = omega.any(-1) | (torch.rand(40, 500, generator=g) < 0.1)
    assert w.auc(found.meeting, right) > 0.7
    assert abs(w.auc(found.shuffled(1).meeting, right) - 0.5) < 0.06


def test_broken_sets_break_and_strength_zero_does_not():
    sets = [w.optional_features(0.4, 6, 3), w.optional_features(0.0, 6, 3)]
    gap, error = w.broken_gaps(sets, [1, 2], steps=120)
    assert gap[0] > 0.1 and abs(gap[1]) < 0.02 and error[1] < 0.03
    assert sets[0].gap == pytest.approx(0.8 * 0.6 * 0.4)
    assert sets[1].gap == 0
    digits = data.load("digits")
    sets = [w.misleading_cue(digits, q, 4, 3) for q in (0.3, 0.0)]
    gap, error = w.broken_gaps(sets, [1, 2], steps=120)
    assert gap[0] < -0.2 and abs(gap[1]) < 0.01 and error[1] < 0.02


def test_networks_lack_their_own_features():
    b = w.optional_features(0.5, 30, 8, noise=0.0)
    seen = b.X.view(30, -1, 5, 12).amax(1) > 0
    assert seen.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert seen.any(-1).all()
    block = b.X_test.view(-1, 5, 12).sum(-1)
    assert torch.equal(block.argmax(1), b.y_test)
    again = w.optional_features(0.5, 30, 8, noise=0.0)
    assert torch.equal(b.X, again.X)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: w.pair_disagreement(torch.zeros(1, 3), 2), "predictions: got 1"),
    (lambda: w.gde_gap(torch.zeros(2, 3), torch.zeros(3), 2),
     "predictions: got 2"),
    (lambda: w.framework(torch.tensor([1.5]), 3), "a, k: got"),
    (lambda: w.interaction_tensor(torch.ones(2, 9, 3), torch.ones(2, 4, 3),
                                  components=4), "components: got 4"),
    (lambda: w.interaction_tensor(torch.ones(2, 9, 3), torch.ones(2, 4, 3),
                                  components=2, match=1.5), "match, strong"),
    (lambda: w.auc(torch.ones(3), torch.ones(2, 3) > 0), "right: all"),
    (lambda: w.optional_features(1.0, 3, 0), "strength: got 1.0"),
    (lambda: w.misleading_cue(data.load("digits"), 1.5, 3, 0),
     "strength: got 1.5"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def judged(claim, evidence, n):
    return Claim.load(claim).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


def settings(off=0, slope=1.0, convex=8.0, by=4.0):
    """Gaps of 24 settings, of which some are off by some points."""
    rng = np.random.default_rng(0)
    error = np.linspace(5, 50, 24)
    out = {f"config_{i:02d}": rng.normal(by if i < off else 0, 1, 32)
           for i in range(24)}
    for name in ("init_only", "order_only", "own_data"):
        out[name] = rng.normal(0, 1, 32)
    noise = rng.normal(0, 0.5, 24)
    return out | {"slope": {"x": error, "y": slope * error + noise},
                  "convex": rng.normal(convex, 1, 32)}


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"off": 4}, "reproduced"),
    ({"off": 6}, "inconclusive"),
    ({"off": 9, "by": -4.0}, "not reproduced"),
    ({"slope": 0.5}, "not reproduced"),
    ({"convex": 0.0}, "invalid"),
])
def test_equality_planted(change, verdict):
    found = judged("D064/disagreement-equals-error", settings(**change), 32)
    assert found == verdict


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"auc": 0.65}, "not reproduced"),
    ({"rho": 0.05}, "not reproduced"),
    ({"shuffled": 0.7}, "invalid"),
])
def test_overlap_planted(change, verdict):
    rng = np.random.default_rng(1)
    means = {"auc": 0.8, "rho": 0.5, "confidence": 0.9, "shuffled": 0.5}
    evidence = {k: rng.normal(v, 0.02, 12)
                for k, v in (means | change).items()}
    assert judged("D064/overlap-explains-agreement", evidence,
                  12) == verdict


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "reproduced"),
    ({"sign_misled": 19}, "inconclusive"),
    ({"sign_misled": 18}, "not reproduced"),
    ({"size_optional": 0.5}, "not reproduced"),
    ({"zero_optional": 5.0}, "invalid"),
])
def test_broken_planted(change, verdict):
    rng = np.random.default_rng(2)
    evidence = {}
    for kind in ("optional", "misled"):
        hits = change.get(f"sign_{kind}", 20)
        size = change.get(f"size_{kind}", 1.0)
        zero = change.get(f"zero_{kind}", 0.0)
        evidence |= {
            f"sign_{kind}": (np.arange(20) < hits).astype(int),
            f"size_{kind}": rng.normal(size, 0.1, 20),
            f"zero_{kind}": rng.normal(zero, 0.3, 20),
        }
    assert judged("D064/broken-on-purpose", evidence, 20) == verdict
