"""Fields against sums over tuples; verdicts on planted effects and nulls."""

from itertools import product
from math import inf, prod

import numpy as np
import pytest
import torch

from reappraisal.dynamics import dense_hebbian_memories as d
from reappraisal.protocol.claims import Claim


def brute(stored, state, P, share):
    N = len(state)
    return torch.tensor([
        share * sum(
            float(e[i]) * prod(float(e[j] * state[j]) for j in js)
            for e in stored
            for js in product([j for j in range(N) if j != i], repeat=P - 1)
        ) / N ** (P - 1) for i in range(N)
    ])


@pytest.mark.parametrize("P", [2, 3, 4])
@pytest.mark.parametrize("mode", d.MODES)
def test_fields_are_sums_over_tuples_without_self_terms(P, mode):
    copies = d.examples(d.random_archetypes(3, 6, 0), 0.5, 2, 0)
    state = d.random_archetypes(1, 6, 9)[0]
    supervised = mode == "supervised"
    stored = copies.mean(0) if supervised else copies.reshape(-1, 6)
    want = brute(stored, state, P, 1 if supervised else 0.5)
    got = d.DenseHebbian(copies, P, mode).field(state[None])[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("P", [3, 4])
def test_tensor_equals_overlap_powers_and_ignores_the_first_index(P):
    xi = d.random_archetypes(4, 7, 1)
    tensor = d.TensorMemory(xi, P, 1)
    clean, _ = tensor.fields(xi)
    torch.testing.assert_close(clean, d.DenseHebbian(xi[None], P).field(xi),
                               atol=1e-5, rtol=1e-4)
    full = tensor.noise.reshape([7] * P)
    assert full[(2,) * P] == 0 and full[0, 0].abs().max() == 0
    assert full[(0, 1, *[2] * (P - 2))] != 0


def test_critical_storage_against_stored_networks():
    xi = d.random_archetypes(250, 20, 4)
    K = int(d.critical_storage(xi, 3, tested=8))

    def overlap(n):
        return d.step_overlap(d.DenseHebbian(xi[None, :n], 3), xi[:8])

    assert overlap(K) < 0.8 <= min(overlap(n) for n in range(8, K))
    assert d.critical_storage(xi[:12], 3) == inf


def test_critical_noise_by_hand():
    s, z = torch.ones(10), -torch.arange(1.0, 11.0)
    # neuron k flips at size 1/k; the mean overlap passes 0.8 at the first
    assert d.critical_noise(s, z) == pytest.approx(0.1, rel=1e-3)
    assert d.critical_noise(-s, z) == 0


def test_copies_have_their_quality_and_are_nested():
    xi = d.random_archetypes(50, 200, 2)
    copies = d.examples(xi, 0.6, 8, 5)
    assert (copies * xi).mean().item() == pytest.approx(0.6, abs=0.01)
    assert (copies[0] * copies[1]).mean().item() == pytest.approx(
        0.36, abs=0.03)
    assert torch.equal(copies, d.examples(xi, 0.6, 8, 5))
    assert not torch.equal(copies, d.examples(xi, 0.6, 8, 6))
    assert torch.equal(d.examples(xi, 1.0, 2, 0)[1], xi)


@pytest.mark.parametrize("P", [2, 3, 4, 5])
def test_moments_by_sampling_and_at_the_ends(P):
    c = prod(range(1, 2 * P - 2, 2))
    assert d.two_point_moment(P, 1.0) == pytest.approx(c)
    odd = (P - 1) % 2
    mean = 0 if odd else prod(range(1, P - 1, 2))
    assert d.two_point_moment(P, 0.0) == pytest.approx(mean**2)
    if P == 3:
        assert d.two_point_moment(3, 0.4) == pytest.approx(1 + 2 * 0.16)


@pytest.mark.parametrize(("mode", "close"), [
    ("supervised", True), ("unsupervised", True), ("independent", False)])
def test_theory_meets_networks_unless_correlations_are_dropped(mode, close):
    N, M, r, alpha = 120, 16, 0.5, 0.02
    xi = d.random_archetypes(round(alpha * N**2), N, 8)
    rule = "supervised" if mode == "supervised" else "unsupervised"
    got = d.step_overlap(
        d.DenseHebbian(d.examples(xi, r, M, 8), 3, rule), xi)
    want = d.snr_overlap(3, alpha, r, M, rule, mode == "independent")
    assert (abs(got - want) < 0.02) == close


@pytest.mark.parametrize("M", [1, 2])
def test_few_copies_are_counted_not_gaussian(M):
    xi = d.random_archetypes(288, 120, 8)
    got = d.step_overlap(d.DenseHebbian(d.examples(xi, 0.8, M, 8), 3), xi)
    args = 3, 0.02, 0.8, M, "supervised"
    assert abs(got - d.counted_overlap(*args)) < 0.02
    assert abs(got - d.snr_overlap(*args)) > 0.03


def test_more_copies_lift_the_overlap_only_to_the_limit():
    limit = d.snr_overlap(3, 0.02, 0.4, 10**9, "unsupervised")
    wrong = d.snr_overlap(3, 0.02, 0.4, 10**9, "unsupervised", True)
    assert limit < 0.8 < 0.99 < wrong


def test_fixed_points():
    assert d.retrieval_limit(2, 0.0) == pytest.approx(0.138, abs=0.003)
    assert d.rs_fixed_point(2, 0.2, 0.0)[0] < 0.1
    cold, hot = (d.rs_fixed_point(3, 0.02, 0.25, b)[0] for b in (50, 0.5))
    assert cold == pytest.approx(d.rs_fixed_point(3, 0.02, 0.25)[0], abs=0.01)
    assert hot < 0.1


def test_relaxation_retrieves_from_a_copy_and_not_when_hot():
    xi = d.random_archetypes(20, 100, 3)
    copies = d.examples(xi, 0.8, 10, 3)
    memory = d.DenseHebbian(copies, 3)
    cold = (memory.relax(copies[0]) * xi).mean()
    hot = (memory.relax(copies[0], beta=0.1, seed=1) * xi).mean()
    assert cold > 0.95 and abs(hot) < 0.1


def test_examples_needed_at_the_ends():
    xi = d.random_archetypes(10, 100, 3)
    assert d.examples_needed(xi, 1.0, 4, 3, "supervised", 0) == 1
    assert d.examples_needed(xi, 0.1, 4, 3, "supervised", 0) == inf


@pytest.mark.parametrize(("call", "match"), [
    (lambda: d.examples(torch.ones(1, 3), 1.2, 1, 0), "r: got 1.2"),
    (lambda: d.examples(torch.ones(1, 3), 0.5, 0, 0), "M: got 0"),
    (lambda: d.DenseHebbian(torch.ones(1, 1, 3), 1), "P: got 1"),
    (lambda: d.DenseHebbian(torch.ones(1, 1, 3), 3, "no"), "mode: got 'no'"),
    (lambda: d.counted_overlap(3, 0.0, 0.5, 1, "supervised"), "alpha: got"),
    (lambda: d.noise(3, 0.1, 0.0, 1, "supervised"), "r: got 0.0"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_loss_is_an_identity_in_the_own_overlap_only():
    xi = d.random_archetypes(2, 50, 0).double()
    s = d.random_archetypes(100, 50, 1).double() * 1
    s[:50, :40] = xi[0, :40]
    loss = d.reconstruction_loss(xi[0], s)
    own, other = ((1 - (s @ x / 50) ** 2) for x in xi)
    assert (loss - own).abs().max() < 1e-12
    assert (loss - other)[:50].abs().mean() > 0.1


def judged(claim, evidence, n):
    return Claim.load(claim).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


def planted(claim, rng, n, **means):
    """Evidence around 0, or around a mean for names that start so."""
    out = {}
    for name, c in Claim.load(claim).criteria.items():
        if c.kind == "exact":
            out[name] = 0.0
            continue
        mean = next((v for k, v in means.items() if name.startswith(k)), 0.0)
        out[name] = rng.normal(mean, 0.005, n)
    return out


@pytest.mark.parametrize(("means", "verdict"), [
    ({"same": 0.3}, "reproduced"),
    ({"same": 0.3, "spread": 0.1}, "not reproduced"),
    ({"same": 0.3, "cell": -0.1}, "not reproduced"),
    ({"same": 0.3, "cell_3_0": -0.1}, "reproduced"),  # 3 of 24 may miss
    ({"same": 0.3, "cell_3_0": -0.1, "cell_3_1": 0.1}, "inconclusive"),
    ({"same": 0.0}, "invalid"),  # any abscissa collapses
])
def test_supervised_collapse_planted(means, verdict):
    claim = "D036/supervised-collapse"
    evidence = planted(claim, np.random.default_rng(0), 10, **means)
    assert judged(claim, evidence, 10) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({}, "reproduced"),
    ({"b_4": 0.6}, "not reproduced"),
    ({"trade_3": 0.25}, "inconclusive"),
    ({"full": 1.0}, "invalid"),
])
def test_exponents_planted(means, verdict):
    claim = "D036/storage-detection-trade"
    evidence = planted(claim, np.random.default_rng(0), 10, **means)
    assert judged(claim, evidence, 10) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"deficit": 0.2, "halved": 0.08}, "reproduced"),
    ({"deficit": 0.2, "halved": -0.08}, "inconclusive"),
    ({"deficit": 0.0, "halved": 0.0}, "not reproduced"),
    ({"deficit": 0.2, "halved": 0.08, "shuffled_2": 0.2}, "invalid"),
])
def test_digits_planted(means, verdict):
    claim = "D036/digits-need-more"
    evidence = planted(claim, np.random.default_rng(0), 10, **means)
    assert judged(claim, evidence, 10) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"finite": 0.05}, "reproduced"),
    ({"finite": -0.05}, "not reproduced"),
    ({"finite": 0.05, "alone": -0.4}, "not reproduced"),
    ({"finite": 0.05, "low": 1.5}, "invalid"),
])
def test_examples_needed_planted(means, verdict):
    claim = "D090/unlabelled-needs-r-to-minus-2P"
    evidence = planted(claim, np.random.default_rng(0), 8, **means)
    assert judged(claim, evidence, 8) == verdict


@pytest.mark.parametrize(("means", "verdict"), [
    ({"equal_rho": 0.3}, "reproduced"),
    ({"equal_rho": 0.3, "group": 0.1}, "not reproduced"),
    ({"equal_rho": 0.0}, "invalid"),
])
def test_rho_P_planted(means, verdict):
    claim = "D090/rho-P-collapse"
    evidence = planted(claim, np.random.default_rng(0), 8, **means)
    assert judged(claim, evidence, 8) == verdict


@pytest.mark.parametrize(("error", "other", "verdict"), [
    (0.0, 0.4, "reproduced"), (1e-3, 0.4, "not reproduced"),
    (0.0, 0.0, "invalid")])
def test_identity_planted(error, other, verdict):
    rng = np.random.default_rng(0)
    assert judged("D090/overlap-is-loss", {
        "identity": error, "other": rng.normal(other, 0.01, 8)}, 8) == verdict
