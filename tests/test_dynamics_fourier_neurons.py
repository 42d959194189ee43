"""Spectra, margins and dips against oracles; verdicts on planted effects."""

import math

import numpy as np
import pytest
import torch

from reappraisal.dynamics import fourier_neurons as f
from reappraisal.lab.ensemble import Adam, AdamW, Batch, Trace, cosine, fit
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1016)


def test_ipr_of_waves_constants_and_spikes():
    x = 2 * math.pi * torch.arange(13)[:, None] / 13
    two = torch.cos(x) + torch.sin(4 * x)
    spike = torch.eye(13)[:, :1]
    got = f.ipr(torch.cat([torch.cos(2 * x + 0.3), two, spike], 1))
    torch.testing.assert_close(got, torch.tensor([1 / 2, 1 / 4, 1 / 13]))


def planted(p=11, corrupt=0.1, seeds=(5, 6)):
    """The Fourier network beside a spike for each false label."""
    own = f.pairs(p, 0.8, list(seeds), corrupt=corrupt)
    rule = f.fourier_network(p)
    nets = []
    for s in range(len(seeds)):
        rows = own["false"][s].nonzero().flatten()
        net = {n: torch.zeros(p, len(rows)).double() for n in "UVW"}
        at = torch.arange(len(rows))
        net["U"][rows // p, at] = net["V"][rows % p, at] = 3.0
        net["W"] -= 5.0 / p
        net["W"][own["label"][s, rows], at] += 10.0
        nets.append({n: torch.cat([rule[n][0], net[n]], 1) for n in "UVW"})
    return {n: torch.stack([net[n] for net in nets]) for n in "UVW"}, own


def pruned(net, own, score):
    _, answer = f.pruned_answers(net, score.argsort(1), own["train"])
    return f.separate(answer, own, [5, 6]), f.accuracies(answer, own)


def test_pruning_finds_planted_spikes_and_needs_the_ratio():
    net, own = planted()
    found, curves = pruned(net, own, f.neuron_ipr(net))
    assert (found["test_after"] == 1).all() and (found["false_after"] == 0).all()
    spikes = net["W"].shape[2] - 40
    assert (curves["test"][:, spikes] == 1).all()
    mixed = torch.randperm(net["W"].shape[2], generator=generator(0))
    _, curves = pruned(net, own, f.neuron_ipr(net)[:, mixed])
    assert (curves["test"][:, spikes] < 0.9).all()


def test_waves_are_no_waves_under_other_names_of_the_residues():
    names = torch.randperm(31, generator=generator(0))
    net = f.fourier_network(31)
    assert (f.neuron_ipr(net) > 0.49).all()
    blind = f.neuron_ipr({n: w[:, names] for n, w in net.items()})
    assert blind.mean() < 0.1


def test_answers_of_the_rest_by_brute_force():
    net = f.fresh(5, 6, [1, 2], 1.0)
    train = torch.ones(2, 25, dtype=torch.bool)
    order = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    removed, answer = f.pruned_answers(net, order, train, 2)
    assert removed.tolist() == [0, 2, 4]
    for s in range(2):
        for k, gone in enumerate(removed.tolist()):
            keep = order[s, gone:]
            z = net["U"][s][:, None] + net["V"][s][None]
            scores = z.square()[..., keep] @ net["W"][s][:, keep].T
            assert torch.equal(answer[s, k], scores.flatten(0, 1).argmax(1))


def test_halves_are_halves_of_what_is_marked():
    which = torch.rand(3, 101, generator=generator(1)) < 0.4
    half = f.halves(which, [1, 2, 3], "x")
    assert not (half & ~which).any()
    assert torch.equal(half.sum(1), which.sum(1) // 2)
    assert torch.equal(half, f.halves(which, [1, 2, 3], "x"))
    assert not torch.equal(half, f.halves(which, [4, 5, 6], "x"))


def test_first_fall():
    curve = torch.tensor([[1.0, 0.95, 0.9, 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert f.first_fall(curve, 0.1).tolist() == [2, 4]


def test_dip_by_linear_programming_and_known_values():
    rng = np.random.default_rng(1)
    for shift in (0, 2, 5):
        x = np.concatenate([rng.normal(size=5), rng.normal(shift, 1, 4)])
        assert f.dip(x) == pytest.approx(f.dip_by_programming(x), abs=1e-7)
    assert f.dip(np.arange(20)) == pytest.approx(1 / 40)
    far = np.r_[np.linspace(0, 1e-6, 50), 1 + np.linspace(0, 1e-6, 50)]
    assert f.dip(far) == pytest.approx(0.25, abs=1e-5)
    x = rng.normal(size=60)
    assert f.dip(3 - 7 * x) == pytest.approx(f.dip(x))  # up to scale and sign
    assert f.dip_p(x, 99, 0) > 0.2 > 0.02 > f.dip_p(far, 99, 0)


def test_scale_and_contrast():
    net = f.fresh(5, 4, [1], 1.0, normalised=True)
    train = torch.ones(1, 25, dtype=torch.bool)
    Z = (net["U"][0][:, None] + net["V"][0][None]).flatten(0, 1)
    want = (net["W"][0].norm(dim=0) / Z.std(0, correction=0)).log()
    torch.testing.assert_close(
        f.effective_scale(net, train)[0], want, atol=1e-4, rtol=0)
    group = torch.tensor([[True, False, False, True]])
    got = f.contrast(torch.tensor([[1.0, 2.0, 4.0, 3.0]]), group)
    assert got.item() == -1.0


@pytest.mark.parametrize("p", [3, 9, 15])
def test_the_fourier_network_attains_the_maximum_for_any_odd_p(p):
    net, label = f.fourier_network(p), f.table_of("cyclic", p)[None]
    assert f.margin(net, label).item() == pytest.approx(f.modular_optimum(p))
    scaled = {n: 1.7 * w for n, w in net.items()}
    torch.testing.assert_close(f.margin(scaled, label), f.margin(net, label))
    # a wrong phase costs margin, a wrong label all of it
    off = net | {"W": net["W"].roll(1, 1)}
    assert f.margin(off, label) < 0 < f.margin(off, (label + 1) % p)


def test_no_network_exceeds_the_maximum():
    for seed in range(3):
        net = {
            n: w + 0.05 * torch.randn(
                w.shape, generator=generator(seed, n), dtype=w.dtype)
            for n, w in f.fourier_network(7).items()
        }
        got = f.margin(net, f.table_of("cyclic", 7)[None]).item()
        assert 0 < got < f.modular_optimum(7)


def short(label, penalty=1.0, steps=500, seeds=(1, 2)):
    p = math.isqrt(len(label))
    own = {"label": label.expand(len(seeds), -1),
           "three": torch.full((len(seeds),), penalty),
           "two": torch.full((len(seeds),), 1 - penalty)}
    return fit(
        f.fresh(p, 8 * (p - 1), seeds), f.TableLoss(steps), steps=steps,
        optimiser=Adam(lr=0.02, beta2=0.98), schedule=cosine(steps),
        per_member=own,
    ).params


def test_training_finds_the_margin_and_its_waves():
    label = f.table_of("cyclic", 7)
    net = short(label)
    ratio = f.margin(net, label.expand(2, -1)) / f.modular_optimum(7)
    found = f.waves(net)
    assert (ratio > 0.97).all() and (ratio < 1 + 1e-6).all()
    assert (found.mean_share > 0.95).all()
    assert (found.residual.abs().median(1).values < 0.05).all()
    assert found.present().tolist() == [3, 3]
    again = short(label)
    assert all(torch.equal(net[n], again[n]) for n in "UVW")


def test_waves_of_known_phases():
    x = 2 * math.pi * torch.arange(11)[:, None] / 11
    net = {
        n: torch.cos(k * x + phase)[None]
        for n, k, phase in (("U", 3, 0.5), ("V", 3, 0.7), ("W", 3, 1.0))
    }
    found = f.waves(net)
    assert found.frequency.item() == 3
    assert found.residual.item() == pytest.approx(0.2, abs=1e-5)
    flat = {n: w + 1 for n, w in net.items()}  # half power per wave
    assert f.waves(flat).share.item() == pytest.approx(1 / 3, abs=1e-5)


def test_parts_of_a_group_are_complete_and_invariant():
    table = f.table_of("symmetric", 3)
    parts = f.isotypic(table)
    w = torch.randn(6, 4, generator=generator(2)).double()
    power = f.group_spectrum(w, parts)
    torch.testing.assert_close(power.sum(0), w.square().sum(0))
    for g in range(6):  # multiplication from either side keeps the parts
        left, right = table.view(6, 6)[g], table.view(6, 6)[:, g]
        for at in (left, right):
            torch.testing.assert_close(f.group_spectrum(w[at], parts), power)


def test_parity_bound_is_not_exceeded():
    X = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 6)
    y = X[:, :4].prod(1)[None]
    best = f.parity_network(range(4), 6)
    ratio = f.parity_margin(best, X, y, 4) / f.parity_optimum(4)
    assert ratio.item() == pytest.approx(1)
    other = f.parity_network(range(1, 5), 6)  # the wrong bits
    assert f.parity_margin(other, X, y, 4).item() < 0
    noisy = {n: w + 0.1 * torch.randn(
        w.shape, generator=generator(1, n), dtype=w.dtype)
        for n, w in best.items()}
    assert f.parity_margin(noisy, X, y, 4) < f.parity_optimum(4)


def test_false_labels_are_stored_and_decay_gives_them_up():
    own = f.pairs(23, 0.8, [1, 2], corrupt=0.15)
    ends = fit(
        f.fresh(23, 64, [1, 2] * 2), f.SquareLoss(), steps=250,
        optimiser=AdamW(
            lr=0.01, weight_decay=[0.0, 0.0, 10.0, 10.0], beta2=0.98),
        per_member={k: v.repeat(2, 1) for k, v in own.items()},
        callbacks=f.watch, every=250,
    ).history["false"].values[:, -1]
    assert (ends[:2] > 0.95).all() and (ends[2:] < 0.5).all()


def test_dropout_repeats_and_is_on_average_the_network():
    own = f.pairs(5, 0.8, [1])
    net = f.fresh(5, 8, [1], 0.5)
    batch = Batch(0, torch.arange(1), own)
    losses = [f.SquareLoss(0.5, s)(net, batch)[0].item() for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    H = [f.SquareLoss(0.5, s).pass_through(net, batch)[2]
         for s in range(400)]
    whole = f.SquareLoss().pass_through(net, batch)[2]
    spread = torch.stack(H).std(0) / 20
    assert ((torch.stack(H).mean(0) - whole).abs() <= 5 * spread + 1e-6).all()


def judged(paper, slug, evidence, seeds=SEEDS):
    return Claim.load(f"{paper}/{slug}").judge(
        evidence, scale="book", seeds=seeds)


def normal(mean, spread, seed=0):
    return np.random.default_rng(seed).normal(mean, spread, 16)


@pytest.mark.parametrize(("fall", "gain", "test", "random", "verdict"), [
    (90, 2, 0.95, 16, "reproduced"),
    (10, 2, 0.95, 16, "not reproduced"),
    (90, -5, 0.95, 16, "not reproduced"),
    (90, 2, 0.6, 16, "inconclusive"),  # never understood
    (90, 2, 0.95, 2, "invalid"),  # random pruning does as well
])
def test_coexistence_planted(fall, gain, test, random, verdict):
    ones = np.ones(16, int)
    found = judged("D035", "coexistence-and-separation", {
        "fall": normal(fall, 3), "kept": normal(gain, 1),
        "gain": normal(gain, 1), "memorised": normal(1, 1e-4),
        "understood": normal(test, 0.01),
        "random_order": (np.arange(16) < random).astype(int),
        "highest_first": ones,
    })
    assert found.verdict == verdict


@pytest.mark.parametrize(("decay", "dropout", "table", "verdict", "say"), [
    (16, 15, 16, "reproduced", None), (2, 0, 16, "not reproduced", None),
    (16, 3, 16, "inconclusive", "decay only"),
    (16, 16, 1, "invalid", None),
])
def test_inversion_planted(decay, dropout, table, verdict, say):
    def first(k):
        return (np.arange(16) < k).astype(int)

    found = judged("D035", "regularisers-force-inversion", {
        "decay": first(decay), "dropout": first(dropout),
        "table_decay": first(table), "table_dropout": first(16),
    })
    assert (found.verdict, found.record["qualifier"]) == (verdict, say)


@pytest.mark.parametrize(("ratio", "modes", "split", "verdict"), [
    (1.2, 16, 0, "reproduced"), (0.0, 16, 0, "not reproduced"),
    (1.2, 3, 0, "inconclusive"), (1.2, 16, 0.5, "invalid"),
])
def test_reweighting_planted(ratio, modes, split, verdict):
    found = judged("D035", "batchnorm-reweights", {
        "ratio": normal(ratio, 0.1), "whole": normal(ratio, 0.1),
        "modes": (np.arange(16) < modes).astype(int),
        "split": normal(split, 0.05), "start": normal(0, 0.05),
    })
    assert found.verdict == verdict


@pytest.mark.parametrize(("ratio", "excess", "table", "verdict"), [
    (0.999, 0.0, 0.3, "reproduced"), (0.9, 0.0, 0.3, "not reproduced"),
    (0.999, 1e-3, 0.3, "not reproduced"), (0.999, 0.0, -0.3, "invalid"),
])
def test_margin_planted(ratio, excess, table, verdict):
    found = judged("D052", "margin-reaches-closed-form", {
        f"{name}_{p}": normal(mean, 1e-3, p)
        for name, mean in (("ratio", ratio), ("table", table),
                           ("plain", 0.1))
        for p in (7, 11, 13, 17)
    } | {"ceiling": [excess]})
    assert found.verdict == verdict


@pytest.mark.parametrize(("share", "residual", "every", "verdict"), [
    (0.99, 0.01, 16, "reproduced"), (0.5, 0.01, 16, "not reproduced"),
    (0.99, 0.5, 16, "not reproduced"), (0.99, 0.01, 9, "inconclusive"),
])
def test_frequencies_planted(share, residual, every, verdict):
    found = judged("D052", "one-frequency-per-neuron", {
        f"{name}_{p}": value for p in (13, 17) for name, value in (
            ("share", normal(share, 1e-3)),
            ("phases", 0.05 - normal(residual, 1e-3)),
            ("all", (np.arange(16) < every).astype(int)),
            ("table", normal(0.3, 0.01)),
        )
    })
    assert found.verdict == verdict
    if verdict == "inconclusive":
        assert found.record["qualifier"] == "single frequencies, not all of them"


@pytest.mark.parametrize(("share", "random", "verdict"), [
    (0.995, 0.03, "reproduced"), (0.8, 0.03, "not reproduced"),
    (0.995, -0.2, "invalid"),
])
def test_parity_planted(share, random, verdict):
    found = judged("D052", "parity-support", {
        "share": normal(share, 1e-3), "margin": normal(0.99, 1e-3),
        "random": normal(random, 1e-3),
    })
    assert found.verdict == verdict


def test_order_of_events():
    t = torch.arange(5)
    test = Trace(t, torch.tensor([[0, 0, 1, 1, 1.0]]))
    for train, want in (
        ([0, 1, 1, 1, 0.8], True), ([0, 1, 0.8, 0.8, 0.8], False),
        ([0, 0.8, 0.8, 0.8, 0.8], False), ([0, 1, 1, 1, 0.9], False),
    ):
        got = f.inverts(Trace(t, torch.tensor([train])), test, 0.2)
        assert got.tolist() == [want], train


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: f.SquareLoss(1.0), "dropout: got"),
    (lambda: f.fourier_network(8), "p: got 8"),
    (lambda: f.table_of("dihedral", 4), "group: got"),
    (lambda: f.dip([1, 2]), "x: got 2"),
    (lambda: f.dip([1, 2, 2, 3, 4]), "x: got 5"),
    (lambda: f.pruned_answers(
        f.fresh(5, 3, [1]), torch.zeros(1, 3, dtype=torch.long),
        torch.ones(1, 25, dtype=torch.bool)), "order: got"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
