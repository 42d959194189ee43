"""Resetting layers against plain loops, laws, and by hand."""

import copy
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Everything
from torch import nn

from reappraisal.intervene.reset import (
    criticality,
    displacement,
    haar_singular_vectors,
    layer_names,
    refresh_statistics,
    reinitialise,
    rerandomise,
    shuffle_elements,
)
from reappraisal.lab import models
from reappraisal.lab.ensemble import SGD, Ensemble, train, untrained
from reappraisal.measure.functional import js_divergence
from reappraisal.measure.reading import read_outputs

DATA = torch.Generator().manual_seed(0)
X = torch.randn(40, 6, generator=DATA)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SCRAMBLES = {
    "rerandomise": rerandomise,
    "haar": haar_singular_vectors,
    "shuffle": shuffle_elements,
}


@pytest.fixture(scope="module")
def pair():
    """Trained ensemble and its start."""
    net = models.mlp([6, 8, 8, 3])
    first = untrained(net, range(3))
    return train(
        net, (X, Y), seeds=range(3), steps=80, optimiser=SGD(0.3)
    ), first


def state(model):
    if isinstance(model, Ensemble):
        return {k: v.clone() for k, v in model.tensors().items()}
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def changed(a, b):
    return {k for k in a if not torch.equal(a[k], b[k])}


# what changes, and what does not


@pytest.mark.parametrize("name", SCRAMBLES)
def test_only_the_layer_changes_and_the_original_does_not(pair, name):
    nets, _ = pair
    before = state(nets)
    after = SCRAMBLES[name](nets, "3", 5)
    expected = {"3.weight"} | ({"3.bias"} if name == "rerandomise" else set())
    assert changed(before, state(after)) == expected
    assert same(before, state(nets))
    member = nets.member(0)
    before = state(member)
    assert changed(before, state(SCRAMBLES[name](member, "3", 5))) == expected
    assert same(before, state(member))


@pytest.mark.parametrize("name", SCRAMBLES)
def test_an_ensemble_is_a_loop_over_its_members(pair, name):
    nets, _ = pair
    own = [11, 12, 13]
    together = SCRAMBLES[name](nets, "1", own)
    for i, s in enumerate(own):
        alone = SCRAMBLES[name](nets.member(i), "1", s)
        for k, v in state(alone).items():
            assert torch.allclose(v, together.tensors()[k][i], atol=1e-6), k


@pytest.mark.parametrize("name", SCRAMBLES)
def test_draws_are_deterministic_and_members_differ(pair, name):
    nets, _ = pair
    twins = Ensemble.of([nets.member(0)] * 3, (0, 1, 2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (SCRAMBLES[name](twins, "3", s) for s in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert same(state(a), state(b)) and changed(state(a), state(c))
    w = a.params["3.weight"]
    assert (w[0] != w[1]).any() and (w[1] != w[2]).any()


@pytest.mark.parametrize("name", SCRAMBLES)
def test_layers_of_one_shape_get_different_draws(name):
    net = models.mlp([5, 5, 5, 5])
    with torch.no_grad():
        net[3].load_state_dict(net[1].state_dict())
    out = SCRAMBLES[name](net, ["1", "3"], 0)
    assert (out[1].weight != out[3].weight).any()
    alone = SCRAMBLES[name](net, "3", 0)
    assert torch.equal(alone[3].weight, out[3].weight)


def test_a_layer_goes_back_with_buffers_and_blocks():
    first = Everything()
    net = copy.deepcopy(first).train()
    for p in net.parameters():
        p.data += 1
    net(X)  # moves the running statistics
    back = reinitialise(net, first, "norm")
    assert torch.equal(back.norm.running_mean, first.norm.running_mean)
    assert torch.equal(back.norm.weight, first.norm.weight)
    assert torch.equal(back.first.weight, net.first.weight)
    block = reinitialise(net, first.state_dict(), "mix")
    assert torch.equal(block.mix.read.weight, first.mix.read.weight)
    assert torch.equal(block.mix.write.bias, first.mix.write.bias)
    assert block.training and net.training
    whole = reinitialise(net, first, "")
    assert same(state(whole), state(first))


def test_gradients_and_requires_grad():
    net = models.mlp([6, 4, 3])
    net(X).sum().backward()
    net[1].weight.requires_grad_(False)
    out = shuffle_elements(net, "3", 0)
    assert out[3].weight.grad is None and net[3].weight.grad is not None
    assert out[3].weight.requires_grad and not out[1].weight.requires_grad
    assert out[3].weight.is_leaf


def test_kinds_of_layers():
    assert layer_names(Everything()) == [
        "first", "mix.read", "mix.write", "head",
    ]
    assert layer_names(nn.Linear(2, 2)) == [""]
    split = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    assert layer_names(nn.Sequential(split)) == ["0"]
    net = models.transformer(5, 3, 4, width=8, heads=2, depth=1)
    out = rerandomise(net, "embed", 0)
    assert out.embed.weight.std() > 0.5  # embeddings start as N(0, 1)
    assert changed(state(net), state(out)) == {"embed.weight"}


# laws


def test_redrawn_weights_are_uniform():
    net = models.mlp([40, 300, 3])
    drawn = rerandomise(net, "1", 0)[1]
    for p in drawn.weight, drawn.bias:
        law = scipy.stats.uniform(-(40**-0.5), 2 * 40**-0.5)
        test = scipy.stats.kstest(p.detach().flatten().numpy(), law.cdf)
        assert test.pvalue > 1e-3
    start = models.mlp([40, 300, 3], seed=0)
    assert not torch.equal(drawn.weight, start[1].weight)


@pytest.mark.parametrize(
    "init, sd", [("kaiming", (2 / 60) ** 0.5), ("lecun", 60**-0.5)]
)
def test_redrawn_weights_follow_a_named_rule(init, sd):
    net = models.mlp([60, 60, 3])
    drawn = rerandomise(net, "1", 0, init)[1]
    w = drawn.weight.detach().flatten().numpy()
    assert scipy.stats.kstest(w / sd, "norm").pvalue > 1e-3
    assert (drawn.bias == 0).all()


def test_mup_scales_the_last_layer_only():
    net = models.mlp([50, 64, 64, 8])
    mid, last = (rerandomise(net, k, 1, "mup") for k in ("3", "5"))
    assert abs(mid[3].weight.std() * 8 - 1) < 0.1
    assert abs(last[5].weight.std() * 64 - 1) < 0.2


def test_a_law_of_ones_own():
    def twos(module, seed):
        for p in module.parameters():
            nn.init.constant_(p, 2 + seed)
        return module

    out = rerandomise(models.mlp([6, 4, 3]), "1", 5, twos)
    assert (out[1].weight == 7).all() and (out[3].weight != 7).all()


def test_singular_vectors_are_haar():
    """Moments of entries, trace and eigen-angles of O(n)."""
    n, many = 5, 3000
    eye = untrained(nn.Linear(n, n).double(), [0] * many)
    eye.params["weight"][:] = torch.eye(n)
    eye.params["bias"][:] = 0
    Q = haar_singular_vectors(eye, "", 0).params["weight"]
    assert (Q @ Q.mT - torch.eye(n)).abs().max() < 1e-12

    def trace(t):
        return t.diagonal(dim1=1, dim2=2).sum(1)

    for values, expected in (
        (Q[:, 0, 0], 0), (Q[:, 1, 2] ** 2, 1 / n),
        (Q[:, 2, 1] ** 4, 3 / (n * (n + 2))),
        (Q[:, 0, 0] * Q[:, 1, 1], 0),
        (trace(Q), 0), (trace(Q) ** 2, 1), (trace(Q) ** 4, 3),
        (trace(Q @ Q), 1), (torch.linalg.det(Q), 0),
    ):
        z = (values.mean() - expected) / (values.std() / many**0.5)
        assert abs(z) < 4, (expected, z)
    # an entry of a Haar matrix: (1 + q) / 2 is Beta((n-1)/2, (n-1)/2)
    law = scipy.stats.beta((n - 1) / 2, (n - 1) / 2)
    q = (1 + Q[:, 3, 3].numpy()) / 2
    assert scipy.stats.kstest(q, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 4), (4, 1), (1, 1)])
def test_singular_values_stay(shape):
    net = nn.Linear(*shape[::-1]).double()
    out = haar_singular_vectors(net, "", 3)
    a, b = (torch.linalg.svdvals(m.weight.detach()) for m in (net, out))
    assert (a - b).abs().max() < 1e-12
    assert torch.equal(net.bias, out.bias)


def test_known_factors_turn_alike(pair):
    nets = pair[0]
    name = next(k for k, v in nets.params.items() if v.ndim == 3)
    layer = name.removesuffix(".weight")
    known = torch.linalg.svd(nets.params[name].double(), full_matrices=False)
    for part in ((0.0, 1.0), (0.5, 1.0)):
        ours = haar_singular_vectors(nets, layer, 3, part, {name: known})
        alone = haar_singular_vectors(nets, layer, 3, part)
        assert torch.equal(ours.params[name], alone.params[name])
    other = haar_singular_vectors(
        nets, layer, 3, factors={name: (known[0], 2 * known[1], known[2])}
    )
    full = haar_singular_vectors(nets, layer, 3)
    torch.testing.assert_close(other.params[name], 2 * full.params[name])


def test_parts_of_the_spectrum():
    net = nn.Linear(8, 8, bias=False).double()
    W = net.weight.detach()
    U, s, V = torch.linalg.svd(W)
    for part, kept in (((0, 0.5), slice(4, 8)), ((0.5, 1), slice(0, 4))):
        new = haar_singular_vectors(net, "", 1, part).weight.detach()
        assert (torch.linalg.svdvals(new) - s).abs().max() < 1e-12
        own = (U[:, kept] * s[kept]) @ V[kept]
        assert torch.allclose(U[:, kept].T @ new, U[:, kept].T @ own)
        assert torch.allclose(new @ V[kept].T, own @ V[kept].T)
    # the null space of a tall matrix is free too
    tall = nn.Linear(2, 6, bias=False).double()
    new = haar_singular_vectors(tall, "", 1, (0.5, 1)).weight.detach()
    U = torch.linalg.svd(tall.weight.detach(), full_matrices=False)[0]
    assert (new.T @ U[:, :1]).norm() > 0
    u = torch.linalg.svd(new, full_matrices=False)[0][:, 1]
    assert abs(u @ U[:, 1]) < 0.999


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_shuffling_keeps_the_histogram(rows, columns, seed, dtype):
    net = nn.Linear(columns, rows).to(dtype)
    out = shuffle_elements(net, "", seed)
    a, b = (m.weight.detach().flatten().sort()[0] for m in (net, out))
    assert torch.equal(a, b) and torch.equal(net.bias, out.bias)


@given(
    st.floats(-5, 5), st.floats(0.1, 10), st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_displacement_invariances(shift, factor, seed):
    g = torch.Generator().manual_seed(seed)
    z, w = torch.randn(2, 2, 9, 4, generator=g, dtype=torch.float64)
    d = displacement(z, w)
    order = torch.randperm(9, generator=g)
    assert torch.allclose(d, displacement(z + shift, w - 2 * shift))
    assert torch.allclose(d, displacement(factor * z, factor * w))
    assert torch.allclose(d, displacement(z[:, order], w[:, order]))
    assert torch.allclose(d[0], displacement(z[0], w[0]))
    assert (displacement(z, z + shift) < 1e-9).all()


def test_displacement_without_margin():
    z = torch.zeros(3, 2)
    assert displacement(z, z + torch.tensor([0.0, 1])).isinf()
    assert displacement(z, z).isnan()


# batch norm


def test_statistics_are_those_of_the_data():
    net = Everything().eval()
    out = refresh_statistics(net, (X, Y), batch_size=40)
    hidden = net.first(X)
    assert torch.allclose(out.norm.running_mean, hidden.mean(0), atol=1e-6)
    assert torch.allclose(out.norm.running_var, hidden.var(0), atol=1e-6)
    assert out.norm.momentum == net.norm.momentum
    assert not out.training and (net.norm.running_mean == 0).all()
    training = refresh_statistics(net.train(), X)
    assert training.training and training.norm.training
    many = Ensemble.of([net.eval(), net])
    both = refresh_statistics(many, X, batch_size=40)
    for row in both.buffers["norm.running_mean"]:
        assert torch.allclose(row, out.norm.running_mean)


def test_update_bn_agrees():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    theirs = copy.deepcopy(net)
    torch.optim.swa_utils.update_bn([(b,) for b in X.split(16)], theirs)
    ours = refresh_statistics(net, X, batch_size=16)
    assert torch.allclose(ours[1].running_mean, theirs[1].running_mean)
    assert torch.allclose(ours[1].running_var, theirs[1].running_var)


def test_stale_statistics_are_planted_and_found():
    """A layer whose scale alone is lost is critical only without refresh."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net = refresh_statistics(net.eval(), X)
    small = copy.deepcopy(net)
    with torch.no_grad():
        small[0].weight *= 1e4
        small[0].bias *= 1e4
    for refresh, near in ((None, False), (X, True)):
        found = criticality(net, small, X, layers=["0"], refresh=refresh)
        assert (found.js_divergence.max() < 1e-3) == near


# criticality


@pytest.mark.parametrize(
    "how", ["reinitialise", "rerandomise", "haar", "shuffle"]
)
def test_criticality_is_a_plain_loop(pair, how):
    nets, first = pair
    found = criticality(
        nets, first, (X, Y), how, draws=2, seed=4, batch_size=7
    )
    undo = {
        **{k: partial(lambda f, n, m, s: f(n, m, s), f)
           for k, f in SCRAMBLES.items()},
        "reinitialise": lambda n, m, s: reinitialise(n, first, m),
    }[how]
    for d in range(found.disagreement.shape[2]):
        for j, layer in enumerate(found.layers):
            other = undo(nets, layer, found.seeds[d])
            for i in range(len(nets)):
                a, b = (read_outputs(e.member(i), (X, Y))
                        for e in (nets, other))
                at = i, j, d
                loss = nn.functional.cross_entropy(b.logits.double(), Y)
                assert torch.isclose(found.accuracy[at], b.accuracy)
                assert torch.isclose(found.drop[at], a.accuracy - b.accuracy)
                assert torch.isclose(found.loss[at], loss, atol=1e-6)
                assert torch.equal(found.correct[at], b.correct)
                js = js_divergence(a.probs, b.probs)
                assert torch.isclose(found.js_divergence[at], js, atol=1e-6)
                other_class = a.predictions != b.predictions
                assert torch.isclose(
                    found.disagreement[at], other_class.double().mean()
                )
                assert torch.isclose(
                    found.displacement[at],
                    displacement(a.logits, b.logits), rtol=1e-4,
                )


def test_null_and_planted_effects(pair):
    nets, _ = pair
    nothing = criticality(nets, nets, (X, Y))
    assert (nothing.drop == 0).all() and (nothing.js_divergence < 1e-9).all()
    assert set(nothing.kinds().values()) == {"robust"}
    # a head that always names one class
    def constant(model, layer, seed):
        out = rerandomise(model, layer, seed)
        out.params[layer + ".weight"].zero_()
        out.params[layer + ".bias"][:] = torch.eye(3)[2]
        return out

    planted = criticality(nets, None, (X, Y), constant, layers=["5"])
    wanted = nets.evaluate(X, Y).accuracy - (Y == 2).float().mean()
    assert torch.allclose(planted.drop[:, 0, 0].float(), wanted)
    assert planted.kinds() == {"5": "critical"} and planted.how == "constant"


@pytest.mark.parametrize("training", [False, True])
def test_module_with_everything_is_left_untouched(training):
    net = Everything().train(training)
    first = copy.deepcopy(net)
    net.head(torch.randn(2, 8)).sum().backward()
    grad, before = net.head.weight.grad.clone(), state(net)
    found = criticality(
        net, first, torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(X, Y), 16, shuffle=True
        ), "rerandomise", draws=2, refresh=X,
    )
    assert same(before, state(net)) and net.training == training
    assert torch.equal(net.head.weight.grad, grad)
    assert found.accuracy.shape == (1, 4, 2)
    assert found.correct.shape == (1, 4, 2, 40)
    frame = found.to_frame()
    assert len(frame) == 8 and set(frame.layer) == set(layer_names(net))
    assert frame.accuracy.to_list() == found.accuracy.flatten().tolist()


def test_intervals(pair):
    nets, first = pair
    found = criticality(nets, first, (X, Y), "rerandomise", draws=4)
    i = found.intervals("drop", 0.9)["1"]
    x = found.drop[:, 0].mean(-1).numpy()
    t = scipy.stats.t.interval(0.9, 2, x.mean(), scipy.stats.sem(x))
    assert np.allclose((i.lo, i.hi), t) and i.n == 3
    one = criticality(nets.member(0), None, (X, Y), "shuffle", draws=2)
    i = one.intervals()["1"]
    assert i.n == len(X) and np.isclose(i.estimate, one.drop[0, 0].mean())
    assert one.intervals("displacement")["1"].lo == -np.inf


def test_joint_layers_and_labels(pair):
    nets, first = pair
    found = criticality(
        nets, first, (X, Y), layers={"all": "", "two": ["1", "3"]}
    )
    assert found.layers == ("all", "two")
    start = first.evaluate(X, Y).accuracy.double()
    assert torch.allclose(found.accuracy[:, 0, 0], start)
    both = reinitialise(nets, first, ["1", "3"])
    hits = both.evaluate(X, Y).accuracy.double()
    assert torch.allclose(found.accuracy[:, 1, 0], hits)


def test_without_labels(pair):
    nets, first = pair
    found = criticality(nets, first, X)
    assert found.correct is None and "disagreement" in repr(found)
    assert "drop" not in found.to_frame()
    with pytest.raises(ValueError, match="had no labels"):
        found.kinds()


def test_plot(pair):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nets, first = pair
    found = criticality(nets, first, (X, Y))
    for measure in ("drop", "accuracy", "loss", "displacement"):
        fig, ax = plt.subplots()
        assert found.plot(ax, measure) is ax
        plt.close(fig)


# what is refused


def tied():
    net = models.mlp([4, 4, 4])
    net[3].weight = net[1].weight
    return net


def broken():
    net = models.mlp([6, 4, 3])
    net[1].weight.data[0, 0] = torch.nan
    return net


class Bare(nn.Module):
    """A weight that cannot reset itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 6))

    def forward(self, x):
        return x @ self.weight.T


NET = models.mlp([6, 4, 3])


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: rerandomise(NET, "nine", 0), "layer: got 'nine'"),
        (lambda: rerandomise(NET, [], 0), "layer: empty"),
        (lambda: rerandomise(NET, "2", 0), "holds no parameters"),
        (lambda: rerandomise(NET, "1", -3), "seed: got -3"),
        (lambda: rerandomise(NET, "1", 1.5), "seed: got 1.5"),
        (lambda: rerandomise(NET, "1", 0, "he"), "how: got 'he'"),
        (lambda: rerandomise("net", "1", 0), "model: got str"),
        (lambda: rerandomise(Bare(), "", 0), "no reset_parameters"),
        (lambda: shuffle_elements(tied(), "3", 0), "shares a weight"),
        (lambda: haar_singular_vectors(broken(), "1", 0), "not finite"),
        (lambda: reinitialise(NET, broken(), "1"), "not finite"),
        (lambda: reinitialise(NET, {}, "1"), "initial: nothing for"),
        (lambda: reinitialise(NET, 3, "1"), "initial: got int"),
        (
            lambda: reinitialise(NET, models.mlp([6, 5, 3]), "1"),
            r"initial: shape \(5, 6\)",
        ),
        (
            lambda: haar_singular_vectors(NET, "1", 0, (0.7, 0.2)),
            r"part: got \(0.7, 0.2\)",
        ),
        (lambda: haar_singular_vectors(NET, "1", 0, 0.5), "part: got 0.5"),
        (
            lambda: shuffle_elements(nn.LayerNorm(3), "", 0),
            "no matrix or filters",
        ),
        (lambda: criticality(NET, None, (X, Y)), "initial: got None"),
        (lambda: criticality(NET, NET, (X, Y), "cut"), "how: got 'cut'"),
        (lambda: criticality(NET, NET, (X[:0], Y[:0])), "data: empty"),
        (lambda: criticality(NET, NET, (X, Y + 1)), "y: labels from 1 to 3"),
        (
            lambda: criticality(NET, NET, (X, Y), "haar", draws=0),
            "draws: got 0",
        ),
        (lambda: criticality(nn.ReLU(), None, X, "haar"), "layers: none"),
        (lambda: criticality(broken(), NET, X), "outputs will not do"),
        (
            lambda: criticality(
                models.transformer(3, 3, 6, 8, 2, 1, pool=None), None,
                Y.view(8, 5), "shuffle",
            ),
            r"logits \[B, C\] are accepted",
        ),
        (lambda: criticality(NET, NET, (X, Y))["ece"], "measure: got 'ece'"),
        (
            lambda: criticality(NET, NET, (X, Y)).kinds(0.1, 0.05),
            "robust, critical: got",
        ),
        (lambda: refresh_statistics(NET, X[:0]), "data: empty"),
        (lambda: displacement(X, X[1:]), "shapes"),
    ],
)
def test_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_a_parametrised_layer_is_not_redrawn_in_silence():
    net = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.Linear(3, 2),
    )
    with pytest.raises(ValueError, match="parametrised"):
        rerandomise(net, "0", 0)
    assert changed(state(net), state(rerandomise(net, "1", 0))) == {
        "1.weight", "1.bias",
    }


def test_half_precision_and_float64():
    for dtype in (torch.bfloat16, torch.float64):
        net = models.mlp([6, 4, 3]).to(dtype)
        for scramble in SCRAMBLES.values():
            out = scramble(net, "1", 0)
            assert out[1].weight.dtype == dtype
            assert out[1].weight.isfinite().all()
