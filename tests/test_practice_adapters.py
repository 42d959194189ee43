"""Adapters: foreign models give through them what they give themselves."""

import copy
import pickle
import random
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import library
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
)

from reappraisal.lab.data import load
from reappraisal.lab.models import mlp
from reappraisal.measure.calibration import calibration
from reappraisal.measure.reading import read_activations, read_outputs
from reappraisal.practice.adapters import Adapter, adapt, unwrapped

N, L, CLASSES = 24, 10, 3
RNG = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=RNG)
Y = torch.arange(N) % CLASSES
IDS = torch.randint(5, 60, (N, L), generator=RNG)
LENGTH = torch.randint(3, L + 1, (N, 1), generator=RNG)
MASK = (torch.arange(L) < LENGTH).long()
IMAGES = torch.randn(N, 3, 32, 32, generator=RNG)
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": Y}


def picture(model):
    """All that must be found again."""
    return (
        [m.training for m in model.modules()],
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(k, v.dtype, v.device, v.clone())
         for k, v in model.state_dict().items()],
        torch.get_rng_state(), str(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
    )


def same(a, b):
    assert a[:2] == b[:2] and a[4:] == b[4:] and torch.equal(a[3], b[3])
    for (*one, v), (*two, w) in zip(a[2], b[2], strict=True):
        assert one == two and torch.equal(v, w)


def used(model):
    """A model in the middle of its training: modes, gradients, statistics."""
    model.train()
    for i, p in enumerate(model.parameters()):
        if p.is_floating_point():
            if i % 3 == 0:
                p.requires_grad_(False)  # frozen
            else:
                p.grad = torch.ones_like(p)
    return model


def check(model, data, direct, **options):
    """Adapted, it says what it says itself, and is left as it was."""
    before = picture(used(model))
    grads = [p.grad for p in model.parameters()]
    a = adapt(model, data, **options)
    out = read_outputs(a.model, a.batches)
    again = read_outputs(a.model, a.batches)
    same(before, picture(model))
    assert all(
        p.grad is g for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert torch.equal(out.logits, again.logits)
    mode = model.training
    with torch.no_grad():
        theirs = direct(model.eval())
    model.train(mode)
    torch.testing.assert_close(out.logits, theirs.to(out.logits.dtype))
    assert a.classes == out.logits.shape[1]
    assert repr(a)
    return a, out


# --- torchvision, timm ----------------------------------------------------


@pytest.mark.parametrize("name, options", [
    ("resnet18", {}), ("mobilenet_v3_small", {}), ("squeezenet1_1", {}),
    ("shufflenet_v2_x0_5", {}),
    ("googlenet", {"init_weights": False, "aux_logits": True}),
])
def test_torchvision(name, options):
    tv = library("torchvision")
    net = getattr(tv.models, name)(num_classes=CLASSES, **options)
    images = F.interpolate(IMAGES[:4], 64)
    a, _ = check(net, (images, Y[:4]), lambda m: m(images))
    assert a.model is net and a.input == "image" and "torchvision" in a.kind
    assert a.classes == CLASSES and a.shape == (3, 64, 64)


def test_torchvision_vit_and_a_segmenter():
    tv = library("torchvision")
    vit = tv.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)
    a, _ = check(vit, DataLoader(TensorDataset(IMAGES, Y), 5),
                 lambda m: m(IMAGES))
    assert a.model is vit
    dense = tv.models.segmentation.lraspp_mobilenet_v3_large(
        weights_backbone=None, num_classes=3)
    with pytest.raises(ValueError, match="one row of logits"):
        adapt(dense, (IMAGES, Y))
    a = adapt(dense, (IMAGES, Y), outputs=lambda o: o["out"].mean((2, 3)))
    assert read_outputs(a.model, a.batches).logits.shape == (N, 3)


@pytest.mark.parametrize("name, options", [
    ("resnet10t", {"in_chans": 1}), ("mobilenetv3_small_050", {}),
    ("convnext_atto", {}), ("vit_tiny_patch16_224", {"img_size": 32}),
    ("mixer_s32_224", {"img_size": 32}),
])
def test_timm(name, options):
    timm = library("timm")
    net = timm.create_model(name, pretrained=False, num_classes=CLASSES,
                            **options)
    images = IMAGES[:6, : options.get("in_chans", 3)]
    a, _ = check(net, (images, Y[:6]), lambda m: m(images))
    assert a.model is net and "timm" in a.kind and a.input == "image"


# --- transformers ---------------------------------------------------------


SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=32, num_labels=CLASSES)


def test_bert():
    tf = library("transformers")
    torch.manual_seed(0)
    net = tf.BertForSequenceClassification(tf.BertConfig(**SMALL))
    a, out = check(
        net, TEXT | {"token_type_ids": IDS % 2},
        lambda m: m(input_ids=IDS, attention_mask=MASK,
                    token_type_ids=IDS % 2).logits,
    )
    assert a.input == "tokens" and a.shape == (3, L) and a.labelled
    assert torch.equal(out.labels, Y)
    # the mask matters, and reached the model
    blind = adapt(net, TEXT, inputs="input_ids")
    theirs = read_outputs(blind.model, blind.batches).logits
    assert blind.shape == (L,) and not torch.allclose(theirs, out.logits)


def test_bert_learns_through_the_adapter():
    tf = library("transformers")
    torch.manual_seed(0)
    net = tf.BertForSequenceClassification(tf.BertConfig(
        **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    y = (IDS[:, 0] > 32).long()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        net(input_ids=IDS, attention_mask=MASK, labels=y).loss.backward()
        optimiser.step()
    batches = [UserDict(input_ids=IDS[i:i + 7], attention_mask=MASK[i:i + 7],
                        labels=y[i:i + 7], text=["t"] * 7)
               for i in range(0, N, 7)]
    a = adapt(net, batches)
    found = calibration(a.model, a.batches)
    assert found["accuracy"] == 1
    # the loss that the library computes itself
    loss = net(input_ids=IDS, attention_mask=MASK, labels=y).loss
    assert found["NLL (nats)"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["DistilBert", "Roberta", "Electra"])
def test_more_encoders(kind):
    tf = library("transformers")
    options = SMALL
    if kind == "DistilBert":
        options = dict(vocab_size=64, dim=16, n_layers=1, n_heads=2,
                       hidden_dim=32, num_labels=CLASSES)
    config = getattr(tf, f"{kind}Config")(**options)
    net = getattr(tf, f"{kind}ForSequenceClassification")(config)
    check(net, TEXT, lambda m: m(IDS, MASK).logits)


def test_vit():
    tf = library("transformers")
    net = tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, image_size=32, patch_size=8,
        num_labels=CLASSES))
    a, _ = check(net, {"pixel_values": IMAGES, "labels": Y},
                 lambda m: m(IMAGES).logits)
    assert a.input == "image" and a.shape == (3, 32, 32)
    assert isinstance(a.model, Adapter) and a.model.module is net
    headless = tf.ViTModel(net.config)
    with pytest.raises(ValueError, match="last_hidden_state.*pooler_output"):
        adapt(headless, {"pixel_values": IMAGES, "labels": Y})
    a = adapt(headless, (IMAGES, Y), outputs="pooler_output")
    assert a.classes == 16


def gpt2(tf, kind, **options):
    torch.manual_seed(0)
    return getattr(tf, kind)(tf.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=1, eos_token_id=2, **options))


def test_gpt2_as_classifier():
    tf = library("transformers")
    net = gpt2(tf, "GPT2ForSequenceClassification", num_labels=CLASSES,
               pad_token_id=0)
    ids = IDS * MASK
    check(net, TEXT | {"input_ids": ids}, lambda m: m(
        input_ids=ids, attention_mask=MASK).logits)
    refuses = gpt2(tf, "GPT2ForSequenceClassification", num_labels=CLASSES)
    with pytest.raises(ValueError, match="does not take the first batch"):
        adapt(refuses, TEXT)


@pytest.mark.parametrize("labels", ["none", "one", "all"])
def test_gpt2_next_token(labels):
    tf = library("transformers")
    net = gpt2(tf, "GPT2LMHeadModel")
    rows, last = torch.arange(N), LENGTH[:, 0] - 1
    data = {"input_ids": IDS, "attention_mask": MASK}
    if labels == "one":
        data["labels"] = Y
    elif labels == "all":
        data["labels"] = IDS.where(MASK > 0, -100)
    at = last if labels == "one" else last - 1
    a, out = check(net, data, lambda m: m(
        input_ids=IDS, attention_mask=MASK).logits[rows, at])
    truth = Y if labels == "one" else IDS[rows, last]
    assert torch.equal(out.labels, truth) and a.classes == 64
    # tied weights stay one
    assert a.model.module.lm_head.weight is net.transformer.wte.weight


def test_next_token_loss_is_that_of_the_library():
    tf = library("transformers")
    net = gpt2(tf, "GPT2LMHeadModel").eval()
    only = torch.full_like(IDS, -100)
    only[:, 6] = IDS[:, 6]
    theirs = net(input_ids=IDS, labels=only).loss.item()
    a = adapt(net, {"input_ids": IDS, "labels": only})
    ours = calibration(a.model, a.batches)["NLL (nats)"]
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_left_padding():
    tf = library("transformers")
    net = gpt2(tf, "GPT2LMHeadModel")
    a = adapt(net, {"input_ids": IDS, "attention_mask": MASK.flip(1)})
    x, y = next(iter(a.batches))
    assert torch.equal(y, IDS[:, -1])
    assert (a.model.call.at(x) == L - 2).all()


# --- Lightning ------------------------------------------------------------


def test_lightning(tmp_path):
    pl = library("pytorch_lightning")

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = mlp([6, 8, CLASSES], seed=0)

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    net = Net()
    loader = DataLoader(TensorDataset(X, Y), 8)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(net, loader)
    a, _ = check(net, loader, lambda m: m(X))
    assert a.kind == "Lightning Net" and a.model is net


# --- without any of them --------------------------------------------------


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


@pytest.mark.parametrize("wrap", [
    nn.DataParallel,
    lambda m: torch.compile(m, backend="eager"),
    lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
])
def test_wrapped(wrap):
    net = normed()
    a, _ = check(wrap(net), (X, Y), lambda m: net(X))
    assert a.model is net and any("out of" in n for n in a.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16,
                                   torch.float64])
def test_other_precisions(dtype):
    net = normed().to(dtype)
    a, out = check(net, (X, Y), lambda m: m(X.to(dtype)))
    assert a.dtype == dtype
    assert out.logits.dtype == torch.promote_types(dtype, torch.float32)


class Two(nn.Module):
    """An image and a number, a number answered."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(12, 4)
        self.age = nn.Embedding(100, 4)

    def forward(self, image, age, flip=None):
        h = self.image(image.flatten(1)) + self.age(age[:, 0])
        return SimpleNamespace(logits=h[:, :CLASSES])


def test_inputs_of_two_kinds():
    net, image = Two(), torch.randn(N, 3, 2, 2)
    age = torch.randint(0, 100, (N, 1))
    a, _ = check(net, [((image, age), Y)], lambda m: m(image, age).logits)
    assert a.shape == (13,) and a.inputs == (0, 1)
    b, _ = check(net, ({"age": age, "image": image}, Y),
                 lambda m: m(image, age).logits)
    assert b.inputs == ("age", "image")
    with pytest.raises(ValueError, match="'age' reaches 99999999"):
        adapt(net, ({"image": image, "age": age * 0 + 99_999_999}, Y))
    half = Two().bfloat16()  # exact to 256
    check(half, [((image, age), Y)],
          lambda m: m(image.bfloat16(), age).logits)


def test_gradients_reach_the_packed_inputs():
    net, image = Two(), torch.randn(N, 3, 2, 2)
    a = adapt(net, ({"image": image, "age": torch.ones(N, 1).long()}, Y))
    x, y = next(iter(a.batches))
    x.requires_grad_()
    F.cross_entropy(a.model(x), y).backward()
    assert x.grad[:, :12].abs().sum() > 0 and x.grad[:, 12:].abs().sum() == 0


def test_one_logit_and_probabilities():
    y = (Y > 0).float()
    torch.manual_seed(0)
    for net, p in (
        (nn.Linear(6, 1), lambda z: z.sigmoid()),
        (nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), lambda z: z),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), lambda z: z.sigmoid()),
    ):
        for labels in y, y[:, None], y.bool(), y.long():
            a = adapt(net, (X, labels))
            out = read_outputs(a.model, a.batches)
            assert torch.allclose(
                out.probs[:, 1], p(net(X)).reshape(-1), atol=1e-6)
            assert torch.equal(out.labels, y.long())
    soft = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1))
    a = adapt(soft, (X, F.one_hot(Y).float()))
    out = read_outputs(a.model, a.batches)
    assert torch.allclose(out.probs, soft(X), atol=1e-6)
    assert torch.equal(out.labels, Y)


class Rows(Dataset):
    """Single samples as dictionaries, augmented with all three dice."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        noise = torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002
        return {"input": X[i] + noise.float(), "label": int(Y[i]), "id": str(i)}


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize("data", [
    (X, Y), (X.numpy(), Y.numpy()), [X, Y], (X, Y.tolist()), {"x": X, "y": Y},
    TensorDataset(X, Y), Stream(), DataLoader(Stream(), 5),
    [(X[:5], Y[:5]), (X[:0], Y[:0]), (X[5:], Y[5:])],
    [{"input": X, "target": Y, "id": ["a"] * N}], ({"x": X}, Y),
    tuple((X[i:i + 8], Y[i:i + 8]) for i in range(0, N, 8)),
], ids=lambda d: type(d).__name__)
def test_data_of_every_kind(data):
    a, out = check(normed(), data, lambda m: m(X))
    assert a.labelled and torch.equal(out.labels, Y) and a.input == "table"


def test_no_labels_and_a_book_dataset():
    a = adapt(normed(), X)
    assert not a.labelled and next(iter(a.batches))[1] is None
    digits = load("digits")
    a = adapt(mlp([64, 16, 10]), digits)
    assert sum(len(x) for x, _ in a.batches) == len(digits.X)


def test_passes_are_the_same_though_the_loader_is_not():
    own = torch.Generator().manual_seed(3)
    for loader in (
        DataLoader(Rows(), 5, shuffle=True),
        DataLoader(Rows(), 5, shuffle=True, generator=own),
        DataLoader(Rows(), 5, sampler=torch.utils.data.RandomSampler(
            Rows(), generator=own)),
    ):
        net = normed()
        before = picture(net), own.get_state()
        a = adapt(net, loader)
        one = [x for x, _ in a.batches]
        torch.rand(3), own.seed()  # somebody else draws
        own.set_state(before[1])
        torch.set_rng_state(before[0][3])
        two = [x for x, _ in a.batches]
        assert torch.equal(torch.cat(one), torch.cat(two))
        assert not torch.equal(torch.cat(one), X)
        same(before[0], picture(net))
        assert torch.equal(before[1], own.get_state())
        assert any("id" in n for n in a.notes)


def test_a_pass_left_in_the_middle_disturbs_nothing():
    a = adapt(normed(), DataLoader(Rows(), 5, shuffle=True))
    whole = torch.cat([x for x, _ in a.batches])
    for _ in a.batches:
        torch.rand(7)
        break
    between = []
    for x, _ in a.batches:
        torch.rand(7)
        between.append(x)
    assert torch.equal(torch.cat(between), whole)


def test_a_function_for_inputs_and_outputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, CLASSES)

        def forward(self, graph, *, scale):
            return [None, {"z": self.f(graph) * scale}]

    batch = {"deep": {"x": X, "s": torch.full((N, 1), 2.0)}, "truth": Y}
    a, out = check(
        Odd(), [batch], lambda m: m.f(X) * 2,
        inputs=lambda b: (
            {"graph": b["deep"]["x"], "scale": b["deep"]["s"]}, b["truth"]),
        outputs=lambda said: said[1]["z"],
    )
    assert torch.equal(out.labels, Y) and a.shape == (7,)


def test_a_device_that_it_is_on_already():
    net = normed()
    assert adapt(net, (X, Y), device="cpu").model is net


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    net = normed().cuda()
    a, _ = check(net, (X, Y), lambda m: m(X.cuda()))
    assert a.device.type == "cuda"
    on_cpu = normed()
    b = adapt(on_cpu, (X, Y), device="cuda")
    assert on_cpu[0].weight.device.type == "cpu"
    torch.testing.assert_close(
        read_outputs(b.model, b.batches).logits,
        read_outputs(a.model, a.batches).logits)


def test_an_adapter_is_a_module_like_any_other():
    net = Two()
    a = adapt(net, ({"image": torch.randn(N, 12),
                     "age": torch.ones(N, 1).long()}, Y))
    assert [n for n, _ in a.model.named_parameters()] == [
        f"module.{n}" for n, _ in net.named_parameters()]
    acts = read_activations(a.model, a.batches, ["module.image"])
    assert acts["module.image"].shape == (N, 4)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(a.model)))
    x, _ = next(iter(a.batches))
    assert torch.equal(twin(x), a.model(x))
    values = dict(a.model.named_parameters())
    grown = torch.func.functional_call(
        a.model, {k: v * 2 for k, v in values.items()}, (x,))
    torch.testing.assert_close(grown, 2 * a.model(x))


class Says(nn.Module):
    """Says what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize("call, message", [
    (lambda: adapt({"w": X}, (X, Y)), "model: got dict.*weights"),
    (lambda: adapt(nn.Linear, (X, Y)), "class Linear.*build it"),
    (lambda: adapt("net.pt", (X, Y)), "model: got str"),
    (lambda: adapt(torch.jit.ScriptModule(), (X, Y)), "TorchScript"),
    (lambda: adapt(nn.LazyLinear(3), (X, Y)), "no shape yet"),
    (lambda: adapt(normed(), None), "data: got NoneType"),
    (lambda: adapt(normed(), "file.csv"), "data: got str"),
    (lambda: adapt(normed(), []), "data: empty"),
    (lambda: adapt(normed(), (X[:0], Y[:0])), "data"),
    (lambda: adapt(normed(), iter([(X, Y)])), "once only"),
    (lambda: adapt(normed(), (X, Y[:5])), "rows"),
    (lambda: adapt(normed(), [(X, Y[:5])]), "rows"),
    (lambda: adapt(normed(), (X, Y + 1)), "labels from 1 to 3"),
    (lambda: adapt(normed(), (X, X[:, 0])), "regression"),
    (lambda: adapt(normed(), (X, (X[:, :3] > 0).float())), "several classes"),
    (lambda: adapt(normed(), (X, ["a"] * N)), r"got \(Tensor, list\)"),
    (lambda: adapt(normed(), [(X, X, Y)]), r"inputs=\(0, 1\)"),
    (lambda: adapt(normed(), [{"a": X, "b": X}]), "forward takes"),
    (lambda: adapt(normed(), [{"a": "text"}]), "none of which is a tensor"),
    (lambda: adapt(normed(), [3]), "batch of type int"),
    (lambda: adapt(normed(), [(X, ["a"] * N)]), "labels of type list"),
    (lambda: adapt(normed(), (X[:, :2], Y)), r"\(24, 2\).*RuntimeError"),
    (lambda: adapt(normed(), (X, Y), inputs="z"), "inputs: 'z' is not in"),
    (lambda: adapt(normed(), (X, Y), inputs=lambda b: 3), "no pair"),
    (lambda: adapt(normed(), (X, Y), inputs=lambda b: ("a", None)),
     "something else than tensors"),
    (lambda: adapt(Says(lambda x: {"a": x, "b": x}), (X, Y)), "outputs='b'"),
    (lambda: adapt(Says(lambda x: {"a": x}), (X, Y), outputs="q"),
     "outputs: 'q'"),
    (lambda: adapt(Says(lambda x: "yes"), (X, Y)), "says str"),
    (lambda: adapt(Says(lambda x: x.mean()), (X, Y)), "says a tensor of"),
    (lambda: adapt(Says(lambda x: x[:3]), (X, Y)), "24 samples"),
    (lambda: adapt(Says(lambda x: x[:, :, None, None]), (X, Y)),
     "one row of logits"),
    (lambda: adapt(Says(lambda x: x.long()), (X, Y)), "says a tensor"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "accepted" in str(error.value) or "call the module" in str(
        error.value)


def test_refusals_leave_the_model_alone():
    net = used(normed())
    before = picture(net)
    for data in (X[:, :2], Y), (X, Y + 9), [(X, X, Y)]:
        with pytest.raises(ValueError):
            adapt(net, data)
        same(before, picture(net))


def test_batches_that_change_their_form():
    net = normed()
    a = adapt(net, [{"x": X, "y": Y}, {"z": X, "y": Y}])
    with pytest.raises(ValueError, match="without 'x'"):
        list(a.batches)


def test_unwrapping_an_unwrapped_one():
    net = normed()
    assert unwrapped(net) == (net, ())
