"""Effects of training rows against retraining, closed forms and autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from reappraisal.lab.ensemble import Ensemble
from reappraisal.lab.models import convnet, mlp
from reappraisal.measure import influence as inf


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def ridge(masks, X, y, Xt, penalty):
    A = torch.einsum("mn,ni,nj->mij", masks.double(), X, X) / len(X)
    A = A + penalty * torch.eye(X.shape[1]).double()
    b = torch.einsum("mn,ni,n->mi", masks.double(), X, y) / len(X)
    return torch.linalg.solve(A, b) @ Xt.T


def first(outputs, targets):
    return outputs[:, 0]


def halved(outputs, targets):
    return (outputs[:, 0] - targets[:, 0]).square() / 2


@pytest.fixture
def regression():
    X, Xt, y = normal(20, 4), normal(5, 4, seed=1), normal(20, seed=2)
    linear = nn.Linear(4, 1, bias=False).double()
    A = X.T @ X / 20 + 0.3 * torch.eye(4).double()
    linear.weight.data = torch.linalg.solve(A, X.T @ y / 20)[None]
    leverage = torch.einsum("ni,ij,nj->n", X, A.inverse(), X) / 20
    return X, y, Xt, linear, leverage


@pytest.fixture
def classes():
    x, xt = normal(7, 3), normal(4, 3, seed=1)
    return (x, torch.arange(7) % 3), (xt, torch.arange(4) % 3)


@pytest.mark.parametrize("solver", ["dense", "dual", "cg", "auto"])
def test_ridge_without_each_row(regression, solver):
    X, y, Xt, linear, leverage = regression
    truth = inf.leave_one_out(lambda m: ridge(m, X, y, Xt, 0.3), 20)
    got = inf.influence_functions(
        linear, (X, y[:, None]), (Xt, Xt[:, :1]), quantity=first,
        loss=halved, damping=0.3, solver=solver, tolerance=1e-12,
    )
    torch.testing.assert_close(got / (1 - leverage), truth)
    # a wrong penalty is noticed
    other = inf.leave_one_out(lambda m: ridge(m, X, y, Xt, 0.6), 20)
    assert not torch.allclose(got / (1 - leverage), other, rtol=1e-2)


@pytest.mark.parametrize("quantity", ["margin", "log_odds", "loss"])
def test_solvers_agree_on_networks(classes, quantity):
    net = mlp([3, 8, 3], activation="tanh").double()
    found = [
        inf.influence_functions(
            net, *classes, quantity=quantity, damping=0.1, solver=s,
            tolerance=1e-12,
        ) for s in ("dense", "dual", "cg")
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    hessian = inf.influence_functions(
        net, *classes, quantity=quantity, damping=1.0, curvature="hessian")
    assert not torch.allclose(hessian, found[0])


def test_margin_of_two_classes_is_the_loss_in_disguise(classes):
    (x, y), (xt, yt) = classes
    net = mlp([3, 8, 2]).double()
    sets = (x, y % 2), (xt, yt % 2)
    m, o, loss = (
        inf.influence_functions(net, *sets, quantity=q, damping=0.1)
        for q in ("margin", "log_odds", "loss")
    )
    torch.testing.assert_close(m, o)
    p = net(xt).softmax(-1)[range(4), yt % 2].detach()
    torch.testing.assert_close(loss, -(1 - p)[:, None] * o)


def test_convolutions_some_layers_and_loaders():
    net = convnet(seed=1).double()
    x, y = normal(6, 1, 8, 8), torch.arange(6) % 10
    last = [k for k, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    a, b = (
        inf.influence_functions(
            net, data, (x[:2], y[:2]), damping=0.1, only=[last], solver=s)
        for data, s in (((x, y), "dense"),
                        ([(x[:4], y[:4]), (x[4:], y[4:])], "dual"))
    )
    torch.testing.assert_close(a, b)
    whole = inf.influence_functions(
        net, (x, y), (x[:2], y[:2]), damping=0.1)
    assert not torch.allclose(whole, a)


def test_ensembles_are_their_members(classes):
    nets = [mlp([3, 5, 3], seed=s).double() for s in range(3)]
    stack = Ensemble.of(nets)
    for solver in ("dense", "dual", "cg"):
        many = inf.influence_functions(
            stack, *classes, damping=0.1, solver=solver)
        one = inf.influence_functions(
            nets[1], *classes, damping=0.1, solver=solver)
        torch.testing.assert_close(many[1], one, rtol=1e-4, atol=1e-6)
    single = inf.influence_functions(stack[:1], *classes, damping=0.1)
    assert single.shape == (1, 4, 7)
    traced = inf.tracin([stack], *classes, rates=[0.1])
    torch.testing.assert_close(
        traced[2], inf.tracin(nets[2:], *classes, rates=[0.1]))
    alike = torch.stack(
        [inf.representation_similarity(n, *classes) for n in nets])
    torch.testing.assert_close(
        inf.representation_similarity(stack, *classes), alike.mean(0))
    assert inf.trak(stack, *classes, damping=0.1).shape == (4, 7)


def test_the_model_is_left_alone(classes):
    net = mlp([3, 5, 3]).train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = classes[0]
    sets = (x.float(), y), (classes[1][0].float(), classes[1][1])
    inf.influence_functions(net, *sets)
    inf.tracin([net], *sets, rates=[1])
    inf.trak(net, *sets, damping=0.1)
    inf.representation_similarity(net, *sets)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_indefinite_curvature_is_refused_by_conjugate_gradients(classes):
    net = mlp([3, 16, 3], activation="tanh", seed=3).double()
    x, y = classes[0]
    with pytest.raises(ValueError, match="not positive"):
        inf.influence_functions(
            net, (x, (y + 1) % 3), classes[1], curvature="hessian",
            damping=1e-6, solver="cg")


def test_tracin_is_one_step(regression):
    X, y, Xt, linear, _ = regression
    start = linear.weight.data[0] + 1
    linear.weight.data = start[None]

    def step(masks):
        error = (X @ start - y) * masks
        return (start - 0.5 * error @ X / 20) @ Xt.T

    got = inf.tracin([linear], (X, y[:, None]), (Xt, Xt[:, :1]),
                     rates=[0.5 / 20], quantity=first, loss=halved)
    torch.testing.assert_close(got, inf.leave_one_out(step, 20))


def test_trak_projections_keep_the_order(classes):
    net = mlp([3, 64, 3]).double()
    plain = inf.trak(net, *classes, damping=0.1)
    near = inf.trak(net, *classes, damping=0.1, dimension=4000)
    assert torch.corrcoef(torch.stack(
        [plain.flatten(), near.flatten()]))[0, 1] > 0.95
    again = inf.trak(net, *classes, damping=0.1, dimension=4000)
    assert torch.equal(near, again)
    other = inf.trak(net, *classes, damping=0.1, dimension=4000, seed=1)
    assert not torch.equal(near, other)
    # fewer dimensions than rows, so that no damping is needed
    assert inf.trak(net, *classes, dimension=3).isfinite().all()


def test_planted_effects_are_found_and_noise_is_not():
    g = torch.Generator().manual_seed(0)
    effects = torch.randn(6, 40, generator=g).double()

    def trainer(masks):
        return masks.double() @ effects.T

    good = inf.honesty(effects, trainer, subsets=60)
    assert good.lo > 0.999
    none = inf.honesty(effects[:, torch.randperm(40, generator=g)], trainer,
                       subsets=60)
    assert none.lo < 0.2 and none.estimate < 0.3
    assert torch.allclose(inf.leave_one_out(trainer, 40), effects)


def test_lds_is_spearman_and_says_what_is_undefined():
    a, b = normal(12, 3).round(), normal(12, 3, seed=1)
    want = [spearmanr(a[:, j], b[:, j])[0] for j in range(3)]
    assert np.allclose(inf.lds(a, b), want)
    quiet = torch.zeros(12, 3)
    assert inf.lds(quiet, b).tolist() == [0, 0, 0]
    assert inf.lds(a, quiet).isnan().all()
    assert torch.allclose(inf.lds(a.exp(), b), inf.lds(a, b))


def test_shapley_values_share_out_the_worth(classes):
    (x, y), (xt, yt) = classes
    for k in (1, 3, 9):
        values = inf.knn_shapley(*classes, k)
        near = torch.cdist(xt, x).argsort(1)[:, :k]
        worth = (y[near] == yt[:, None]).double().sum(1) / k
        torch.testing.assert_close(values.sum(1), worth)
    # a row of the wrong label never helps
    assert (values[yt[:, None] != y] <= 1e-12).all()


def test_wrong_labels_have_low_margins():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 30, 3, generator=g)
    logits[..., 0] += 3
    y = torch.zeros(30, dtype=torch.long)
    y[:5] = 1
    aum = inf.area_under_margin(logits, y)
    assert aum[:5].max() < aum[5:].min()
    assert torch.allclose(aum, inf.margin(logits, y).mean(0))
    assert inf.area_under_margin(logits[:, None], y).shape == (1, 30)


def test_margins():
    z, y = torch.tensor([[1.0, 3.0, 2.0], [1, 0, -1]]), torch.tensor([2, 0])
    assert inf.margin(z, y).tolist() == [-1, 1]
    p = z.softmax(-1)[range(2), y]
    torch.testing.assert_close(inf.log_odds(z, y), (p / (1 - p)).log())
    torch.testing.assert_close(
        F.softplus(-inf.log_odds(z, y)),
        F.cross_entropy(z, y, reduction="none"))


def test_subsets():
    masks = inf.subset_masks(50, 400, share=0.3, seed=1)
    assert (masks.sum(1) == 15).all()
    assert (masks.double().mean(0) - 0.3).abs().max() < 0.1
    pairs = (masks.double().T @ masks.double() / 400).fill_diagonal_(0)
    assert abs(pairs.sum() / (50 * 49) - 0.3 * 14 / 49) < 1e-9
    assert torch.equal(masks, inf.subset_masks(50, 400, share=0.3, seed=1))
    assert not torch.equal(masks, inf.subset_masks(50, 400, share=0.3))


@pytest.mark.parametrize("call, match", [
    (lambda n, c: inf.influence_functions(n, *c, damping=0), "damping"),
    (lambda n, c: inf.influence_functions(n, *c, damping=-1), "damping"),
    (lambda n, c: inf.influence_functions(n, *c, solver="lissa"), "solver"),
    (lambda n, c: inf.influence_functions(n, *c, curvature="x"), "curvature"),
    (lambda n, c: inf.influence_functions(n, *c, quantity="x"), "quantity"),
    (lambda n, c: inf.influence_functions(
        n, *c, curvature="hessian", solver="dual"), "'dual'"),
    (lambda n, c: inf.influence_functions(
        n, *c, damping=1e-9, solver="cg", tolerance=0), "damping"),
    (lambda n, c: inf.influence_functions(n, c[0][0], c[1]), "targets"),
    (lambda n, c: inf.tracin([], *c, rates=[]), "rates"),
    (lambda n, c: inf.tracin([n], *c, rates=[1, 2]), "rates"),
    (lambda n, c: inf.trak(n, *c, damping=-1), "damping"),
    (lambda n, c: inf.trak(n, *c, dimension=0), "dimension"),
    (lambda n, c: inf.trak(
        n, (c[0][0].repeat(2, 1), c[0][1].repeat(2)), c[1]), "damping"),
    (lambda n, c: inf.knn_shapley(*c, 0), "k:"),
    (lambda n, c: inf.subset_masks(5, 0), "share"),
    (lambda n, c: inf.subset_masks(5, 2, share=0.99), "share"),
    (lambda n, c: inf.lds(torch.zeros(2, 1), torch.zeros(2, 1)), "shapes"),
    (lambda n, c: inf.lds(torch.zeros(5, 1), torch.zeros(5, 2)), "shapes"),
    (lambda n, c: inf.lds(torch.full((5, 1), torch.nan), torch.zeros(5, 1)),
     "finite"),
    (lambda n, c: inf.honesty(torch.zeros(3), lambda m: m), "scores"),
    (lambda n, c: inf.leave_one_out(lambda m: m.sum(1), 4), "trainer"),
    (lambda n, c: inf.margin(torch.zeros(3, 2), torch.zeros(2)), "labels"),
    (lambda n, c: inf.margin(torch.zeros(3, 1), torch.zeros(3)), "labels"),
])
def test_what_is_refused(classes, call, match):
    with pytest.raises(ValueError, match=match):
        call(mlp([3, 5, 3]).double(), classes)
