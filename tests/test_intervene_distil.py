"""Distilling: losses, teachers that know nothing, and stacks of students."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.intervene.distil import (
    TEACHERS,
    TRANSFERS,
    Teacher,
    born_again,
    distil,
    distillation_loss,
    match_features,
    transfer_loss,
)
from reappraisal.lab.ensemble import SGD, Adam, Ensemble, train, untrained
from reappraisal.lab.models import convnet, generator, mlp, resnet, transformer
from reappraisal.measure.reading import read_activations, read_outputs

C = 4


def data(n=24, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, torch.arange(n) % C


def net(**options):
    return mlp([5, 6, C], **options).double()


def logits(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=g, dtype=torch.float64)


def same(a, b):
    return all(torch.equal(a.params[k], v) for k, v in b.params.items())


HOW = dict(steps=7, optimiser=SGD(0.1, momentum=0.9), batch_size=5)


@pytest.mark.parametrize("kind", TRANSFERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), t=st.floats(0.3, 30))
def test_losses_under_what_must_not_matter(kind, seed, t):
    z, w = logits(2, 5, C, seed=seed), logits(5, C, seed=seed + 1)
    found = transfer_loss(z, w, t, kind)
    assert found.shape == (2, 5)
    order = torch.randperm(C, generator=generator(seed))
    torch.testing.assert_close(
        transfer_loss(z[..., order], w[..., order], t, kind), found
    )
    moved = transfer_loss(z + 3.0, w - 2.0, t, kind)
    if kind in ("mse", "cosine"):
        assert not torch.allclose(moved, found)
    else:
        torch.testing.assert_close(moved, found)
    scaled = transfer_loss(2 * z, w, t, kind)
    assert torch.allclose(scaled, found) == (kind == "cosine")
    per_member = torch.tensor([[t], [2 * t]], dtype=torch.float64)
    both = transfer_loss(z, w, per_member, kind)
    torch.testing.assert_close(both[0], transfer_loss(z[0], w, t, kind))
    torch.testing.assert_close(both[1], transfer_loss(z[1], w, 2 * t, kind))


@pytest.mark.parametrize("kind", TRANSFERS)
def test_the_teacher_is_the_minimum(kind):
    w = logits(6, C)
    z = w.clone().requires_grad_()
    loss = transfer_loss(z, w, 3.0, kind)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.abs().max() < 1e-12
    if kind not in ("cross_entropy", "hinton"):
        assert loss.abs().max() < 1e-12
    other = transfer_loss(logits(6, C, seed=5), w, 3.0, kind)
    assert (other > loss).all()


@pytest.mark.parametrize("kind", TRANSFERS)
def test_gradients_are_those_of_differences(kind):
    w = logits(2, C)
    z = logits(2, C, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: transfer_loss(z, w, 2.0, kind), (z,)
    )


def test_hot_distillation_is_matching_centred_logits():
    z, w = logits(8, C), logits(8, C, seed=2)
    torch.testing.assert_close(
        transfer_loss(z, w, 1e4, "kl"), transfer_loss(z, w, kind="centred"),
        rtol=1e-3, atol=1e-5,
    )


def test_the_mixture_against_torch():
    z, w = logits(9, C), logits(9, C, seed=2)
    y = torch.arange(9) % C
    target = 0.3 * F.one_hot(y, C) + 0.7 * w.softmax(-1)
    torch.testing.assert_close(
        distillation_loss(z, w, y, 0.7),
        F.cross_entropy(z, target, reduction="none"),
    )


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_is_fixed_and_its_own(kind):
    x, y = data()
    one = Teacher(kind, seed=5).logits(x, C)
    many = Teacher(kind, seed=[4, 5, 5]).logits((x, y), C)
    assert one.shape == (24, C) and many.shape == (3, 24, C)
    assert torch.equal(many[1], one) and torch.equal(many[2], one)
    assert not torch.equal(many[0], one)
    big = Teacher(kind, seed=1).logits(torch.zeros(20_000, 1), C).double()
    mean, var = (0.5, 1 / 12) if kind == "uniform" else (0.0, 1.0)
    assert abs(big.mean() - mean) < 0.02 and abs(big.var() - var) < 0.02
    if kind == "uniform":
        assert 0 <= big.min() and big.max() <= 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_dealing_out_keeps_the_classes(seed, n):
    rng = np.random.default_rng(seed)
    y = torch.tensor(rng.integers(0, C, n))
    w = logits(2, n, C, seed=seed)
    dealt = Teacher("class_shuffled", w, seed=[seed, 3]).logits((w[0], y))
    for s in range(2):
        for c in y.unique():
            before, after = (
                sorted(v[s, y == c].tolist()) for v in (w, dealt)
            )
            assert before == after
    means = Teacher("class_mean", w).logits((w[0], y)).softmax(-1)
    for c in y.unique():
        torch.testing.assert_close(
            means[:, y == c].mean(1), w.softmax(-1)[:, y == c].mean(1)
        )
        assert (means[:, y == c] - means[:, y == c][:, :1]).abs().max() < 1e-12


def test_dealing_out_is_uniform_within_the_class():
    y = torch.tensor([0, 0, 0, 1])
    w = torch.eye(4)
    where = Teacher("class_shuffled", w, seed=range(3000)).logits((w, y))
    share = where.mean(0)
    assert torch.equal(share[3], w[3])
    assert (share[:3, :3] - 1 / 3).abs().max() < 0.05


@pytest.mark.parametrize("kind", TRANSFERS)
def test_without_weight_the_teacher_is_nothing(kind):
    x, y = data()
    for teacher in (
        logits(24, C), logits(3, 24, C), Teacher("gaussian", fresh=True)
    ):
        found = distil(
            net(), teacher, (x, y), alpha=0.0, temperature=3.0, kind=kind,
            seeds=[1, 2, 3], **HOW,
        )
        plain = train(net(), (x, y), seeds=[1, 2, 3], engine="vmap", **HOW)
        assert same(found, plain)


def test_stack_is_the_loop_over_members():
    x, y = data()
    w, a, t = logits(3, 24, C), [0.0, 0.5, 1.0], [1.0, 4.0, 2.0]
    stack = distil(
        net(), w, (x, y), alpha=a, temperature=t, seeds=[4, 5, 6],
        init_seeds=[7, 7, 8], **HOW,
    )
    for s in range(3):
        alone = distil(
            net(), w[s], (x, y), alpha=a[s], temperature=t[s],
            seeds=[4 + s], init_seeds=[[7, 7, 8][s]], **HOW,
        )
        for k, v in stack.params.items():
            torch.testing.assert_close(alone.params[k][0], v[s])
    assert stack.seeds == (4, 5, 6)
    assert stack.hyper["alpha"].tolist() == a
    assert len(stack.where(temperature=4.0)) == 1


def test_minibatches_by_hand():
    """The documented order, the loss and two networks in plain PyTorch."""
    x, y = data(n=10)
    w = logits(10, C)
    found = distil(
        net(), w, (x, y), alpha=0.6, temperature=2.0, seeds=[3],
        init_seeds=[8], steps=4, batch_size=5, optimiser=SGD(0.2),
    )
    module = untrained(net(), [8]).member(0)
    stream = generator(3, "order")
    rows = torch.cat([torch.randperm(10, generator=stream) for _ in range(2)])
    sgd = torch.optim.SGD(module.parameters(), lr=0.2)
    for batch in rows.split(5):
        z = module(x[batch])
        q = (w[batch] / 2).softmax(-1)
        loss = 0.4 * F.cross_entropy(z, y[batch])
        loss = loss + 0.6 * 4 * F.cross_entropy(z / 2, q)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    for k, v in module.named_parameters():
        torch.testing.assert_close(found.params[k][0], v.detach())


def test_engines_agree():
    x, y = data()
    how = dict(HOW, seeds=[1, 2], alpha=[0.3, 0.9])
    a = distil(net(), logits(24, C), (x, y), **how)
    b = distil(net(), logits(24, C), (x, y), engine="chain", **how)
    for k, v in a.params.items():
        torch.testing.assert_close(b.params[k], v)


def test_same_start_other_order():
    x, y = data()
    teachers = train(net(), (x, y), seeds=[1, 2], engine="vmap", **HOW)
    twin = distil(
        net(), teachers, (x, y), alpha=0.0, seeds=[1, 2], **HOW
    )
    assert same(twin, teachers)
    other = distil(
        net(), teachers, (x, y), alpha=0.0, seeds=[8, 9], init_seeds=[1, 2],
        checkpoints=[0], **HOW,
    )
    assert not same(other, teachers)
    start = untrained(net(), [1, 2])
    assert same(other.at(0), start)
    given_start = distil(
        start, teachers, (x, y), alpha=0.0, seeds=[8, 9], **HOW
    )
    assert same(given_start, other)


def test_every_student_its_own_teacher():
    x, y = data()
    teachers = untrained(net(), [1, 2, 3])
    by_model = distil(net(), teachers, x, alpha=1.0, seeds=[4, 5, 6], **HOW)
    said = read_outputs(teachers, x).logits
    by_table = distil(net(), said, x, alpha=1.0, seeds=[4, 5, 6], **HOW)
    assert same(by_model, by_table)
    one = distil(net(), teachers.member(1), x, alpha=1.0, seeds=[5], **HOW)
    for k, v in one.params.items():
        torch.testing.assert_close(v[0], by_model.params[k][1])


def test_a_taught_student_arrives():
    """Without labels and with full weight the teacher is the optimum."""
    x, _ = data(n=40)
    linear = nn.Linear(5, C).double()
    found = distil(
        linear, untrained(linear, [9]), x, alpha=1.0, temperature=2.0,
        seeds=range(3), steps=900, optimiser=SGD(1.0, momentum=0.9),
    )
    teacher = untrained(linear, [9])
    apart = read_outputs(found, x).probs - read_outputs(teacher, x).probs
    assert apart.abs().max() < 1e-6


def test_a_copy_does_not_move():
    x, y = data()
    teachers = train(net(), (x, y), seeds=[1, 2], **HOW)
    for kind in TRANSFERS:
        stays = distil(
            teachers, teachers, (x, y), alpha=1.0, kind=kind, **HOW
        )
        for k, v in teachers.params.items():
            torch.testing.assert_close(stays.params[k], v, atol=1e-7, rtol=0)


def test_fresh_noise_is_drawn_anew_and_again_the_same():
    x, y = data()
    how = dict(HOW, seeds=[1, 2], alpha=1.0)

    def taught(**options):
        return distil(net(), Teacher("gaussian", **options), (x, y), **how)

    fixed, fresh = taught(seed=[3, 4]), taught(seed=[3, 4], fresh=True)
    assert not same(fixed, fresh)
    assert same(fresh, taught(seed=[3, 4], fresh=True))
    # a member's noise does not depend on its neighbours
    alone = distil(
        net(), Teacher("gaussian", seed=[4, 9], fresh=True), (x, y),
        **dict(how, seeds=[2, 7]),
    )
    for k, v in alone.params.items():
        torch.testing.assert_close(v[0], fresh.params[k][1])


def test_label_smoothing():
    x, y = data()
    flat = distil(
        net(), Teacher("smoothing"), (x, y), alpha=0.2, seeds=[1, 2], **HOW
    )
    smooth = train(net(), (x, y), smoothing=0.2, seeds=[1, 2], **HOW)
    for k, v in smooth.params.items():
        torch.testing.assert_close(flat.params[k], v)


def test_soft_labels_and_watching():
    x, y = data()
    hard = distil(
        net(), logits(24, C), (x, y), alpha=0.5, seeds=[1],
        watch={"test": (x, y)}, every=1, **HOW,
    )
    soft = distil(
        net(), logits(24, C), (x, F.one_hot(y, C).double()), alpha=0.5,
        seeds=[1], **HOW,
    )
    for k, v in hard.params.items():
        torch.testing.assert_close(soft.params[k], v)
    last = hard.history["test_loss"].values[0, -1]
    assert abs(hard.evaluate(x, y).loss[0] - last) < 1e-12


def test_members_that_diverge_do_not_disturb():
    x, y = data()
    how = dict(alpha=0.5, seeds=[1, 2, 3], steps=40, batch_size=5)
    w = logits(3, 24, C)
    with pytest.warns(RuntimeWarning, match="diverged"):
        found = distil(
            net(), w, (x, y), optimiser=SGD([0.05, 1e300, 0.05]),
            kind="mse", **how,
        )
    assert found.diverged.tolist() == [False, True, False]
    calm = distil(
        net(), w, (x, y), optimiser=SGD(0.05), kind="mse", **how
    )
    for k, v in calm.params.items():
        torch.testing.assert_close(found.params[k][[0, 2]], v[[0, 2]])


def images(n=6):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 3


@pytest.mark.parametrize(
    "student",
    [
        lambda: convnet((1, 4, 4), classes=3),
        lambda: resnet(classes=3),
        lambda: transformer(8, 3, 8, 8, 2, 1, tokens=False),
    ],
    ids=["convolution", "residual", "attention"],
)
def test_architectures_and_a_teacher_of_any_kind(student):
    x, y = images()
    teacher = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(144, 3),
    ).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = student()
    inputs = x if isinstance(model, nn.Sequential) else x[:, 0]
    said = read_outputs(teacher, x).logits
    found = distil(
        model, said, (inputs, y), seeds=[1, 2], steps=2, batch_size=3,
        optimiser=Adam(1e-3),
    )
    assert len(found) == 2 and teacher.training
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k])
    assert torch.equal(torch.get_rng_state(), state)


def test_loaders_and_single_precision():
    from torch.utils.data import DataLoader, TensorDataset

    x, y = data()
    x = x.float()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    small = mlp([5, 6, C])
    how = dict(HOW, seeds=[1])
    a = distil(small, logits(24, C), loader, **how)
    b = distil(small, logits(24, C).float(), (x, y), **how)
    assert same(a, b) and a.params["1.weight"].dtype == torch.float32


def test_generations():
    x, y = data()
    rows = [[1, 2], [3, 4], [5, 6]]
    line = born_again(net(), (x, y), seeds=rows, alpha=0.5, **HOW)
    assert [g.seeds for g in line] == [tuple(r) for r in rows]
    by_hand = train(net(), (x, y), seeds=rows[0], engine="vmap", **HOW)
    assert same(line[0], by_hand)
    for k in (1, 2):
        by_hand = distil(
            net(), by_hand, (x, y), seeds=rows[k], alpha=0.5, **HOW
        )
        assert same(line[k], by_hand)
    with pytest.raises(ValueError, match="seeds"):
        born_again(net(), (x, y), seeds=[[1, 2], [3]], **HOW)


@pytest.mark.parametrize("regressor", [None, True, False])
def test_hints_lower_the_distance_of_features(regressor):
    x, _ = data()
    teachers = untrained(mlp([5, 6, 6, C]).double(), [7, 8])
    found = match_features(
        net(), teachers, x, ("1", "3"), seeds=[1, 2], regressor=regressor,
        steps=60, optimiser=Adam(0.02), checkpoints=[0],
    )
    loss = found.history["loss"].values
    assert (loss[:, -1] < 0.5 * loss[:, 0]).all()
    start = untrained(net(), [1, 2])
    assert same(found.at(0), start)
    for k, v in start.params.items():
        assert torch.equal(found.params[k], v) == (k[0] == "3")
    if not regressor:
        mine = read_activations(found, x, ["1"])["1"]
        want = read_activations(teachers, x, ["3"])["3"]
        torch.testing.assert_close(
            (mine - want).square().mean((1, 2)), loss[:, -1]
        )
    again = distil(found, teachers, (x, data()[1]), **HOW)
    assert isinstance(again, Ensemble)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: Teacher("oracle"), "kind"),
        (lambda: Teacher("model"), "source"),
        (lambda: Teacher("uniform", net()), "source"),
        (lambda: Teacher("class_mean", net(), fresh=True), "fresh"),
        (lambda: Teacher("uniform", seed=-1), "seed"),
        (lambda: Teacher("uniform").logits(data()), "classes"),
        (lambda: Teacher("model", logits(3, C)).logits(data()), "source"),
        (lambda: Teacher("class_mean", logits(24, C)).logits(data()[0]),
         "data"),
        (lambda: Teacher("class_mean", logits(24, 2)).logits(data()), "y"),
        (lambda: Teacher("class_shuffled", logits(2, 24, C),
                         seed=[1, 2, 3]).logits(data()), "seed"),
        (lambda: transfer_loss(logits(2, 3), logits(3, 3)), "student"),
        (lambda: transfer_loss(logits(2, 3), logits(2, 3), -1), "temp"),
        (lambda: transfer_loss(logits(2, 3) * torch.nan, logits(2, 3)),
         "student"),
        (lambda: transfer_loss(logits(2, 3), logits(2, 3), kind="kld"),
         "kind"),
        (lambda: distillation_loss(logits(2, 3), logits(2, 3),
                                   torch.tensor([0, 3]), 0.5), "y"),
        (lambda: distillation_loss(logits(2, 3), logits(2, 3),
                                   torch.tensor([0, 1]), 1.5), "alpha"),
    ],
)
def test_refusals(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(alpha=[0.1, 0.2, 0.3]), "alpha"),
        (dict(alpha=-0.1), "alpha"),
        (dict(temperature=[1.0, 0.0]), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(kind="cosines"), "kind"),
        (dict(teacher=logits(3, 24, C)), "teacher"),
        (dict(teacher=logits(24, C + 1)), "teacher"),
        (dict(teacher=logits(23, C)), "source"),
        (dict(teacher=logits(24, C) * torch.inf), "source"),
        (dict(teacher="best"), "model"),
        (dict(data=data()[0]), "labels"),
        (dict(data=(data()[0], data()[1] + 1)), "y"),
        (dict(data=(data()[0], torch.zeros(24, C))), "y"),
        (dict(data=(data()[0][:0], data()[1][:0])), "empty"),
        (dict(seeds=None), "seeds"),
        (dict(init_seeds=[1, 2, 3]), "init_seeds"),
        (dict(students=untrained(net(), [1, 2]), init_seeds=[1, 2]),
         "init_seeds"),
        (dict(smoothing=0.1), "smoothing"),
        (dict(per_member=["y"]), "per_member"),
        (dict(students=nn.Sequential(nn.Linear(5, C), nn.BatchNorm1d(C))
              .double()), "statistics"),
    ],
)
def test_refusals_of_distil(changes, name):
    call = dict(
        students=net(), teacher=logits(24, C), data=data(), seeds=[1, 2],
        alpha=0.5, steps=1, optimiser=SGD(0.1),
    ) | changes
    with pytest.raises(ValueError, match=name):
        distil(**call)


@pytest.mark.parametrize(
    "layers, options, name",
    [
        (("9", "1"), {}, "layers"),
        (("1", "9"), {}, "layers"),
        (("1", "3"), dict(regressor=False), "regressor"),
        (("1", "1"), dict(teacher=untrained(net(), [1, 2, 3])), "teacher"),
    ],
)
def test_refusals_of_hints(layers, options, name):
    call = dict(teacher=net(), steps=1, optimiser=SGD(0.1)) | options
    with pytest.raises(ValueError, match=name):
        match_features(
            net(), data=data(), layers=layers, seeds=[1, 2], **call
        )


def test_every_teacher_shows_itself():
    for kind in TEACHERS:
        source = logits(24, C) if kind in (
            "model", "class_shuffled", "class_mean"
        ) else None
        assert kind in repr(Teacher(kind, source))
