"""Parents are found by everything that made them, and by nothing else."""

import multiprocessing
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.lab import zoo
from reappraisal.lab.ensemble import SGD, AdamW, train
from reappraisal.lab.models import generator, mlp, transformer
from reappraisal.lab.zoo import ZooWarning, fingerprint, parents, recipe

torch.set_num_threads(1)


def table(n=40):
    x = torch.randn(n, 4, generator=generator(0, "test"))
    return x, (x.sum(1) > 0).long()


HOW = {"seeds": [1, 2], "steps": 5, "batch_size": 8, "optimiser": SGD(0.1)}


def equal(a, b):
    return all(torch.equal(a.params[k], v) for k, v in b.params.items())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REAPPRAISAL_CACHE", str(tmp_path))
    return tmp_path / "zoo"


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return train(*args, **kwargs)

    monkeypatch.setattr(zoo, "train", counting)
    return calls


def test_the_second_time_nobody_trains(folder, counted):
    net, how = mlp([4, 6, 2]), {**HOW, "checkpoints": [2]}
    first = parents(net, table(), **how, watch={"test": table(10)})
    second = parents(net, table(), **how, watch={"test": table(10)})
    assert len(counted) == 1 and len(list(folder.iterdir())) == 1
    assert equal(first, second) and equal(first.at(2), second.at(2))
    for one, two in ((first, second), (first.at(2), second.at(2))):
        assert list(one.params) == list(two.params)  # so directions are alike
    x, y = table(10)
    for a, b in zip(first.evaluate(x, y), second.evaluate(x, y), strict=True):
        assert torch.equal(a, b)
    assert second.history.keys() == first.history.keys()
    parents(net, table(), **how, watch={"test": table(10)}, refresh=True)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 6},
        {"seeds": [1, 3]},
        {"batch_size": None},
        {"optimiser": SGD(0.2)},
        {"optimiser": AdamW(0.1)},
        {"loss": lambda out, y: out.square().sum(-1)},
        {"smoothing": 0.1},
        {"dtype": torch.float64},
        {"init": "same"},
        {"masks": {"1.weight": torch.ones(6, 4)}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_any_change_is_another_key(change):
    key = recipe(mlp([4, 6, 2]), table(), HOW)
    assert recipe(mlp([4, 6, 2]), table(), {**HOW, **change}) != key


def test_data_and_architecture_are_in_the_key():
    key = recipe(mlp([4, 6, 2]), table(), HOW)
    x, y = table()
    assert recipe(mlp([4, 6, 2], seed=7), table(), HOW) == key
    assert recipe(mlp([4, 7, 2]), (x, y), HOW) != key
    assert recipe(mlp([4, 6, 2], activation="tanh"), (x, y), HOW) != key
    assert recipe(mlp([4, 6, 2]), (x, 1 - y), HOW) != key
    assert recipe(mlp([4, 6, 2]), (-x, y), HOW) != key
    pools = [transformer(5, 2, 3, pool=p) for p in ("mean", "last")]
    assert fingerprint(zoo.architecture(pools[0])) != fingerprint(
        zoo.architecture(pools[1])
    )


def test_same_weights_matter_when_training_starts_from_them():
    how = {**HOW, "init": "same"}
    keys = {recipe(mlp([4, 2], seed=s), table(), how) for s in (0, 0, 1)}
    assert len(keys) == 2


def by(factor):
    return lambda x: factor * x


def test_functions_are_what_they_do():
    assert fingerprint(by(2)) == fingerprint(by(2)) != fingerprint(by(3))
    pair = [lambda x: x + 1, lambda x: x + 2]
    assert fingerprint(pair[0]) != fingerprint(pair[1])
    with pytest.raises(ValueError, match="recipe: cannot tell"):
        fingerprint(object())
    with pytest.raises(ValueError, match="callbacks"):
        parents(mlp([4, 2]), table(), **HOW, callbacks=print)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
)
trees = st.recursive(
    leaves,
    lambda t: st.lists(t, max_size=3)
    | st.dictionaries(st.text(max_size=2), t, max_size=3),
    max_leaves=8,
)


def typed(v):
    """Equality that tells 1, 1.0 and True apart."""
    if isinstance(v, dict):
        return {k: typed(x) for k, x in v.items()}
    if isinstance(v, list):
        return [typed(x) for x in v]
    return (type(v), repr(v))


@settings(max_examples=300, deadline=None)
@given(trees, trees)
def test_fingerprints_are_equal_iff_values_are(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (typed(a) == typed(b))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "foreign"])
def test_damaged_files_are_made_again(folder, counted, damage):
    net = mlp([4, 6, 2])
    first = parents(net, table(), **HOW)
    (file,) = folder.iterdir()
    whole = bytearray(file.read_bytes())
    flipped = bytes(whole[:-1]) + bytes([whole[-1] ^ 1])
    file.write_bytes(
        {
            "cut": bytes(whole[:-7]),
            "empty": b"",
            "bit": flipped,
            "foreign": b"not a tensor in sight",
        }[damage]
    )
    with pytest.warns(ZooWarning, match="damaged"):
        again = parents(net, table(), **HOW)
    assert len(counted) == 2 and equal(first, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parents(net, table(), **HOW)
    assert len(counted) == 2


def test_a_full_disk_costs_only_the_copy(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(ZooWarning, match="not kept"):
        made = parents(mlp([4, 6, 2]), table(), **HOW)
    assert len(made) == 2 and not list(folder.iterdir())


def work(folder, queue):
    os.environ["REAPPRAISAL_CACHE"] = folder
    torch.set_num_threads(1)
    made = parents(nn.Sequential(nn.Linear(4, 2)), table(), **HOW)
    queue.put((recipe(nn.Sequential(nn.Linear(4, 2)), table(), HOW),
               made.params["0.weight"].tolist()))


def test_two_processes_at_once(tmp_path):
    """Both get the same networks, the same key, and one whole file."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    args = (str(tmp_path), queue)
    workers = [context.Process(target=work, args=args) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found[0] == found[1]
    files = list((tmp_path / "zoo").iterdir())
    assert [f.name for f in files] == [f"{found[0][0]}.safetensors"]
