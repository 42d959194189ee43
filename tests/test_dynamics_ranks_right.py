"""Oracles of grammar, ranks, decisions, maps and beams; planted verdicts."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from reappraisal.dynamics import ranks_right_probabilities_wrong as r
from reappraisal.lab import models
from reappraisal.lab.ensemble import Adam, train, untrained, vmapped
from reappraisal.measure.functional import kendall_tau
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1032)


@pytest.mark.parametrize("entropy", [0.2, 1.5, 2.3])
def test_grammar_has_the_entropy_that_was_asked_for(entropy):
    x, p = r.ambiguous_grammar([3, 4], parts=(4, 3), entropy=entropy)
    assert x.shape == (12, 7) and p.shape == (2, 12, 12)
    found = torch.special.entr(p).sum(-1).mean(-1)
    assert found.tolist() == pytest.approx([entropy] * 2, abs=1e-6)
    again = r.ambiguous_grammar([4], parts=(4, 3), entropy=entropy).p
    assert torch.equal(p[1:], again) and not torch.equal(p[0], p[1])


def test_counts_follow_the_distribution():
    p = r.ambiguous_grammar([0], parts=(2, 2)).p
    counts = r.draw_counts(p, 100_000, [0], "a")
    assert (counts.sum(-1) == 100_000).all()
    assert stats.chisquare(
        counts[0, 0].numpy(), 100_000 * p[0, 0].numpy()
    ).pvalue > 1e-4
    assert not torch.equal(counts, r.draw_counts(p, 100_000, [0], "b"))


def test_kl_by_scipy():
    g = torch.Generator().manual_seed(2)
    p, z = torch.rand(5, 6, generator=g).double(), torch.randn(5, 6)
    p = p / p.sum(-1, keepdim=True)
    want = stats.entropy(p.numpy(), z.softmax(-1).numpy(), axis=-1)
    assert np.allclose(r.kl_to_truth(p, z), want)
    assert r.kl_to_truth(torch.eye(6)[:1], z[:1]).isfinite().all()


def test_identity_holds_and_notices_a_wrong_choice_rule(monkeypatch):
    net = models.mlp([5, 8, 4], seed=0).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=g).double()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert r.mle_gradient_identity(net, x, y).max() < 1e-12
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    honest = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda t, d: honest(1.1 * t, d)
    )
    assert r.mle_gradient_identity(net, x, y).max() > 1e-4


def test_mean_rank_by_sorting():
    g = torch.Generator().manual_seed(3)
    z, n = torch.randn(4, 6, generator=g), torch.randint(0, 5, (4, 6))
    want = (stats.rankdata(-z.numpy(), axis=1) * n.numpy()).sum() / n.sum()
    assert float(r.mean_rank(z, n)) == pytest.approx(float(want))


def test_rank_gain_is_the_step_of_torch_sgd():
    x, p = r.ambiguous_grammar([5], parts=(4, 3))
    counts = r.draw_counts(p, 6, [5], "t")
    net = models.mlp([7, 16, 12], seed=0)
    params = untrained(net, [5]).tensors()
    kept = {k: v.clone() for k, v in params.items()}
    got = r.rank_gain(vmapped(net), params, x, counts, counts, 2.0)
    assert all(torch.equal(kept[k], v) for k, v in params.items())
    net.load_state_dict({k: v[0] for k, v in kept.items()})
    before = r.mean_rank(net(x), counts[0])
    loss = -(counts[0] * net(x).log_softmax(-1)).sum() / counts.sum()
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=2.0).step()
    want = before - r.mean_rank(net(x), counts[0])
    assert float(got[0]) == pytest.approx(float(want)) and want > 0


def test_no_decision_beats_that_of_the_truth():
    p = r.ambiguous_grammar([1, 2], parts=(5, 4)).p
    cost = r.asymmetric_cost(12, [1, 2])
    assert (cost.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert (cost - cost.mT).abs().max() > 1
    best = r.least_risk(p, cost)
    risk = torch.einsum("sac,snc->sna", cost, p)
    assert torch.equal(best, risk.argmin(-1))
    assert r.cost_regret(best, p, cost).abs().max() < 1e-12
    g = torch.Generator().manual_seed(0)
    q = torch.rand(p.shape, generator=g).double()
    q = q / q.sum(-1, keepdim=True)
    for found in (
        r.cost_regret(r.least_risk(q, cost), p, cost),
        r.sampling_regret(q, p), r.abstention_regret(q, p, 0.6),
    ):
        assert found.min() >= -1e-12 and found.max() > 0


def test_sampling_regret_is_the_worst_bounded_cost():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    worst = max(
        float((torch.tensor(c) * (q - p)[0]).sum())
        for c in itertools.product((0.0, 1.0), repeat=3)
    )
    assert float(r.sampling_regret(q, p)) == pytest.approx(worst)


def test_abstention_by_hand():
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    q = torch.tensor([[0.9, 0.1], [0.55, 0.45]])
    got = r.abstention_regret(q, p, 0.3)
    # answers at risk 0.4 where 0.3 would do; abstains where 0.1 is enough
    assert got.tolist() == pytest.approx([0.1, 0.2], abs=1e-6)


def scores(scale=3.0, n=4000):
    p = r.ambiguous_grammar([7], parts=(6, 5)).p
    return scale * p[0].log(), r.draw_counts(p, n, [7], "c")[0], p[0]


@pytest.mark.parametrize("method", r.MAPS)
def test_maps_undo_a_planted_temperature(method):
    z, counts, p = scores()
    q = r.recalibrate(z, counts, method)(z)
    assert q.sum(-1).tolist() == pytest.approx([1.0] * 30)
    raw = r.sampling_regret(z.softmax(-1), p).mean()
    assert r.sampling_regret(q, p).mean() < 0.35 * raw
    assert torch.equal(q, r.recalibrate(z, counts, method)(z))


def test_isotonic_keeps_the_order():
    z, counts, _ = scores(n=5)
    q = r.recalibrate(z, counts, "isotonic")(z)
    i, j = torch.triu_indices(12, 12, 1)
    crossed = (z[:, i] - z[:, j]) * (q[:, i] - q[:, j])
    assert crossed.min() > -1e-12 and q.min() > 0


def test_beam_against_enumeration():
    logits = torch.randn(
        3, 2 * 9, 4, generator=torch.Generator().manual_seed(4)
    )
    joint = r.spell(logits, 2)
    table = logits.log_softmax(-1).view(3, 2, 9, 4)
    for a, b, c in itertools.product(range(4), repeat=3):
        want = table[..., 0, a] + table[..., 1 + a, b] + table[..., 5 + b, c]
        torch.testing.assert_close(joint[..., a, b, c], want)
    flat = joint.flatten(-3)
    assert torch.equal(r.beam(logits, 2, 16), flat.argmax(-1))
    values = [
        flat.gather(-1, r.beam(logits, 2, w)[..., None]).mean()
        for w in (1, 16)
    ]
    assert values[0] <= values[1]
    a = table[..., 0, :].argmax(-1)
    assert torch.equal(r.beam(logits, 2, 1) // 16, a)
    counts = torch.zeros(2, 4, 4, 4)
    counts[1, 2, 3, 0] = 5
    rows = r.unspell(counts).view(2, 9, 4)
    assert rows.sum() == 15 and rows[1, 0, 2] == rows[1, 3, 3] == 5
    assert rows[1, 8, 0] == 5


def judged(slug, evidence):
    return Claim.load(f"D144/{slug}").judge(
        evidence, scale="book", seeds=SEEDS
    )


@pytest.mark.parametrize(("tau", "kl", "ample", "noise", "verdict"), [
    (0.0, math.log(4), 0.5, 0.02, "reproduced"),
    (-0.05, math.log(4), 0.5, 0.02, "not reproduced"),
    (0.0, 0.1, 0.5, 0.02, "not reproduced"),
    (0.0, math.log(4), -0.5, 0.02, "invalid"),  # overfits ample data
    (0.0, math.log(4), 0.5, 0.2, "invalid"),  # order out of noise
])
def test_order_planted(tau, kl, ample, noise, verdict):
    g = np.random.default_rng(0)
    found = judged("order-outlives-probability", {
        "tau": g.normal(tau, 0.01, 32), "kl": g.normal(kl, 0.1, 32),
        "ample": g.normal(ample, 0.1, 32), "uniform": [noise],
    })
    assert found.verdict == verdict


@pytest.mark.parametrize(("share", "noise", "verdict"), [
    (0.95, 0.5, "reproduced"), (0.7, 0.5, "not reproduced"),
    (0.95, 0.9, "invalid"),  # any step raises ranks
])
def test_steps_planted(share, noise, verdict):
    g = np.random.default_rng(1)
    found = judged("mle-step-is-preference-learning", {
        "identity": [1e-12], "share": g.normal(share, 0.02, 32),
        "uniform": g.normal(noise, 0.05, 32),
    })
    assert found.verdict == verdict


def maps(saved, beyond, well=0.0):
    g = np.random.default_rng(2)
    rules = ("sampling", "cost")
    return judged("transform-helps-probability-rules", {
        **{f"{k}_raw": g.normal(saved, 0.02, 32) for k in rules},
        **{f"{k}_temperature": g.normal(beyond, 0.01, 32) for k in rules},
        **{f"same_{k}": g.normal(beyond, 0.01, 32) for k in rules},
        **{f"well_{m}_{k}": g.normal(well, 0.003, 32)
           for m in ("isotonic", "temperature") for k in rules},
    })


@pytest.mark.parametrize(("saved", "beyond", "well", "verdict"), [
    (0.3, 0.1, 0.0, "reproduced"), (0.02, 0.1, 0.0, "not reproduced"),
    (0.3, -0.1, 0.0, "inconclusive"), (0.3, 0.1, 0.05, "invalid"),
])
def test_maps_planted(saved, beyond, well, verdict):
    found = maps(saved, beyond, well)
    assert found.verdict == verdict and "partial" in found.label


def test_maps_that_equal_a_temperature_say_so():
    found = maps(0.3, 0.0)
    assert found.verdict == "inconclusive"
    assert "temperature is enough" in found.label


def test_identity_map_cannot_reproduce():
    """With the mechanism off nothing is saved."""
    found = maps(0.0, 0.0)
    assert found.verdict == "not reproduced"


def test_training_on_noise_orders_nothing():
    seeds = range(8)
    x, p = r.ambiguous_grammar(seeds)
    found = {}
    for name, source in (("real", p), ("noise", torch.full_like(p, 1 / 12))):
        y = r.draw_counts(source, 6, seeds, name) / 6
        net = train(
            models.mlp([19, 32, 12], seed=0), (x, y.float()), steps=150,
            optimiser=Adam(lr=0.005), seeds=seeds, per_member=["y"],
        )
        found[name] = float(kendall_tau(net.predict(x), p).mean())
    assert found["real"] > 0.4 > 0.1 > abs(found["noise"])


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: r.ambiguous_grammar([0], entropy=3.0), "entropy: got 3.0"),
    (lambda: r.ambiguous_grammar([0], entropy=0.0), "entropy: got 0.0"),
    (lambda: r.recalibrate(torch.zeros(3, 2), torch.ones(3, 2), "utility"),
     "method: got 'utility'"),
    (lambda: r.recalibrate(torch.zeros(3, 2), torch.zeros(3, 2), "isotonic"),
     "counts: got shape"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
