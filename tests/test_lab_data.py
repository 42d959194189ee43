"""Sets are what their records say, and splits do not leak."""

import math
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reappraisal.lab import data as ld

OFFLINE = [n for n, r in ld.RECORDS.items() if "fetched" not in r.note]
FETCHED = [n for n in ld.RECORDS if n not in OFFLINE]


def toy(y, **extra):
    y = torch.as_tensor(y)
    classes = tuple(map(str, range(int(y.max()) + 1)))
    X = torch.arange(float(len(y)))[:, None]
    words = {"name": "toy", "task": "classification", "classes": classes}
    return ld.Dataset(X, y, **(words | extra))


labels = st.lists(st.integers(0, 4), min_size=1, max_size=120)


@pytest.mark.parametrize("name", OFFLINE)
def test_sets_match_their_records(name):
    record, s = ld.RECORDS[name], ld.load(name)
    assert (s.name, s.task) == (name, record.task)
    assert len(s) == record.rows or not record.rows
    assert s.n_classes == record.classes
    assert s.images.shape == (len(s), *s.item)
    assert math.prod(s.item) == math.prod(record.item)
    assert s.licence == record.licence != "" and s.source == record.source
    assert s.X.dtype == (torch.int64 if s.task == "text" else torch.float32)
    assert torch.isfinite(s.X).all() and torch.isfinite(s.y).all()
    if s.task == "classification":
        assert s.y.unique().tolist() == list(range(s.n_classes))
    again = ld.load(name)
    assert torch.equal(s.X, again.X) and torch.equal(s.y, again.y)
    if s.features and s.task in ("classification", "regression"):
        assert len(s.features) == s.X.shape[1]


def test_sklearn_values_arrive_unchanged():
    from sklearn import datasets

    for name in "iris", "wine", "breast_cancer":
        bunch = getattr(datasets, f"load_{name}")()
        s = ld.load(name)
        assert np.allclose(s.X, bunch.data, rtol=1e-6)
        assert np.array_equal(s.y, bunch.target)
    assert ld.load("digits").images.shape == (1797, 1, 8, 8)


@pytest.mark.parametrize("wrong, near", [("digit", "digits"),
                                         ("mnist_1d", "mnist1d"),
                                         ("cifar", "cifar10")])
def test_wrong_names_get_a_hint(wrong, near):
    with pytest.raises(ValueError, match=f"nearest: .*{near}"):
        ld.load(wrong)


@given(
    labels, st.integers(0, 2**31),
    st.tuples(*[st.floats(0.0, 1.0)] * 3).filter(lambda f: sum(f) > 0.1),
)
@settings(max_examples=60, deadline=None)
def test_split_is_disjoint_exact_and_stratified(y, seed, sizes):
    shares = [s / max(1, sum(sizes)) for s in sizes]
    s = toy(y)
    parts = s.split(seed, shares)
    rows = torch.cat([p.X.flatten() for p in parts]).long()
    assert len(rows.unique()) == len(rows)
    cuts = [0, *(round(c * len(y)) for c in np.cumsum(shares))]
    assert [len(p) for p in parts] == np.diff(cuts).tolist()
    counts = s.y.bincount()
    for p in parts:
        assert torch.equal(p.y, s.y[p.X.flatten().long()])
        ideal = counts * len(p) / len(s)
        got = p.y.bincount(minlength=len(counts))
        assert ((got - ideal).abs() < 1).all()
    again = s.split(seed, shares)
    for p, q in zip(parts, again, strict=True):
        assert torch.equal(p.X, q.X)


def test_split_by_counts_and_by_seed():
    s = ld.load("digits")
    a, b = s.split(1000, (1000, 0, 797)), s.split(1001, (1000, 0, 797))
    assert [len(p) for p in a] == [1000, 0, 797]
    assert not torch.equal(a.train.X, b.train.X)
    ideal = s.y.bincount() * 1000 / 1797
    assert ((a.train.y.bincount() - ideal).abs() < 1).all()
    # corrupting labels must not change who is in which part
    dirty = s.corrupt_labels(0.3, 7).split(1000, (1000, 0, 797))
    assert torch.equal(dirty.train.X, a.train.X)


@pytest.mark.parametrize(
    "sizes", [(0.5, 0.5), (0.5, 0.6, 0.2), (-0.1, 0.5, 0.5), (9, 1, 1)]
)
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="sizes"):
        toy([0, 1] * 5).split(0, sizes)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_groups_stay_together(classes, per_class, seed):
    y = torch.arange(classes).repeat_interleave(per_class * 3)
    groups = torch.arange(classes * per_class).repeat_interleave(3) + 5
    parts = toy(y, groups=groups).split(seed, (0.5, 0.25, 0.25))
    owners = [set(p.groups.tolist()) for p in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert sum(map(len, parts)) == len(y)
    assert all(len(p) == 3 * len(o) for p, o in zip(parts, owners,
                                                   strict=True))


@pytest.mark.parametrize("size, colour", [(16, False), (8, True), (32, False)])
def test_patches_of_different_parts_never_touch(size, colour):
    s = ld.photo_patches(size, colour=colour)
    assert (s.y.bincount() == s.y.bincount()[0]).all()
    assert (s.groups.bincount() == 9).all()
    # where every patch came from, found again in the photograph
    where = {}
    for label, name in enumerate(s.classes):
        picture = ld.photo(name, colour=colour).reshape(
            3 if colour else 1, *ld.photo(name).shape
        )
        corners = [
            (t + size * i, u + size * j)
            for t, u in ld._corners(*picture.shape[1:], size)
            for i in range(3) for j in range(3)
        ]
        mine = (s.y == label).nonzero().flatten().tolist()
        for row in mine[:: max(1, len(mine) // 20)]:
            hits = [
                (t, u) for t, u in corners
                if torch.equal(
                    picture[:, t:t + size, u:u + size], s.images[row]
                )
            ]
            assert hits
            if len(hits) == 1:  # blank patches occur in several places
                where[row] = label, hits[0]
    assert len(where) > 100 or size == 32
    for a, (la, (ta, ua)) in where.items():
        for b, (lb, (tb, ub)) in where.items():
            if la == lb and s.groups[a] != s.groups[b]:
                assert abs(ta - tb) >= 2 * size or abs(ua - ub) >= 2 * size


def test_patches_too_large():
    with pytest.raises(ValueError, match="blocks"):
        ld.photo_patches(200)
    with pytest.raises(ValueError, match="nearest.*camera"):
        ld.photo_patches(names=["camer"])


@pytest.mark.parametrize("name", ld.PHOTOS)
def test_photographs_are_in_the_wheel(name):
    record, grey = ld.PHOTOS[name], ld.photo(name)
    assert grey.shape == (record.height, record.width)
    assert grey.min() >= 0 and grey.max() <= 1 and grey.std() > 0.01


def test_standardised_uses_training_rows_only():
    s = ld.load("wine").split(0)
    z = s.standardised()
    mean = s.train.X.double().mean(0)
    std = s.train.X.double().std(0, correction=0)
    for raw, scaled in zip(s, z, strict=True):
        assert torch.allclose(
            scaled.X.double(), (raw.X.double() - mean) / std, atol=1e-4
        )
    one = s.standardised(per_feature=False).train.X
    assert abs(one.mean()) < 1e-5 and abs(one.std() - 1) < 1e-2
    flat = toy([0, 1] * 5)
    flat = ld.replace(flat, X=torch.ones(10, 2)).split(0).standardised()
    assert (flat.train.X == 0).all()  # constant: centred, not divided
    with pytest.raises(ValueError, match="int64"):
        ld.load("zen").split(0).standardised()


@given(labels.filter(lambda y: max(y) > 0), st.floats(0, 1),
       st.integers(0, 99))
def test_corruption_is_exact_and_never_right(y, frac, seed):
    s = toy(y)
    dirty = s.corrupt_labels(frac, seed)
    assert (dirty.y != s.y).sum() == round(frac * len(y))
    assert dirty.y.min() >= 0 and dirty.y.max() < s.n_classes
    assert torch.equal(dirty.clean, s.y)
    assert torch.equal(s.y, torch.tensor(y))  # input untouched
    half = s.corrupt_labels(frac / 2, seed)
    assert ((half.y != s.y) <= (dirty.y != s.y)).all()


def test_corruption_is_uniform_over_the_wrong_classes():
    s = toy(torch.zeros(30_000, dtype=torch.long).index_fill(
        0, torch.arange(4), 3
    ))
    wrong = s.corrupt_labels(1.0, 5).y[4:].bincount(minlength=4)
    assert wrong[0] == 0
    assert ((wrong[1:] - 9999).abs() < 5 * 82).all()  # five sigma


@given(labels, st.integers(0, 99))
def test_shuffled_labels_are_the_same_multiset(y, seed):
    dealt = toy(y).shuffle_labels(seed)
    assert sorted(dealt.y.tolist()) == sorted(y)


def test_corruption_needs_classes():
    with pytest.raises(ValueError, match="diabetes is regression"):
        ld.load("diabetes").corrupt_labels(0.1, 0)
    with pytest.raises(ValueError, match="frac"):
        toy([0, 1]).corrupt_labels(1.5, 0)


def test_subset_checks_rows():
    s = toy([0, 1, 2])
    assert s.subset([2, 0]).y.tolist() == [2, 0]
    assert s.subset(s.y > 0).y.tolist() == [1, 2]
    for bad in ([3], [-4], torch.tensor([True])):
        with pytest.raises(ValueError, match="rows"):
            s.subset(bad)


def test_a_dataset_must_fit_together():
    with pytest.raises(ValueError, match="y: expected 3 rows"):
        ld.Dataset(torch.zeros(3, 1), torch.zeros(2), "x", "regression")
    with pytest.raises(ValueError, match="task"):
        ld.Dataset(torch.zeros(3, 1), torch.zeros(3), "x", "guessing")


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_loader_visits_every_row_once(n, batch, seed):
    s = toy(torch.zeros(n, dtype=torch.long))
    first = [x for x, _ in s.loader(batch, seed)]
    again = [x for x, _ in s.loader(batch, seed)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.cat(first).sort(0)[0], s.X)
    assert torch.equal(torch.cat([x for x, _ in s.loader(batch)]), s.X)
    full = list(s.loader(batch, seed, drop_last=True))
    assert len(full) == n // batch and all(len(x) == batch for x, _ in full)


@given(st.integers(1, 30), st.integers(1, 10))
def test_windows_against_brute_force(length, horizon):
    s = ld.load("nile")
    w = ld.windows(s, length, horizon)
    assert len(w) == 100 - length - horizon + 1
    for i in 0, len(w) // 2, len(w) - 1:
        assert torch.equal(w.X[i], s.y[i:i + length])
        assert w.y[i] == s.y[i + length + horizon - 1]


def test_windows_of_many_series_and_of_text():
    s = ld.load("macrodata")
    w = ld.windows(s, 8, 2)
    assert w.X.shape == (203 - 9, 8, 12) and w.y.shape == (203 - 9, 12)
    assert torch.equal(w.X[3], s.y[3:11]) and torch.equal(w.y[3], s.y[12])
    t = ld.load("zen")
    v = ld.windows(t, 5)
    assert ld.decode(v.X[0]) == "The Z" and ld.decode(v.y[:1]) == "e"
    for bad in ({"length": 0}, {"length": 300}, {"length": 5, "horizon": 0}):
        with pytest.raises(ValueError, match="length, horizon"):
            ld.windows(ld.load("nile"), **bad)
    with pytest.raises(ValueError, match="digits is classification"):
        ld.windows(ld.load("digits"), 3)


@pytest.mark.parametrize("name", ["sunspots", "co2", "elnino", "zen"])
def test_ordered_sets_are_cut_in_blocks(name):
    s = ld.load(name)
    a, b, c = s.split(0, (0.5, 0.25, 0.25))
    assert torch.equal(torch.cat([a.X, b.X, c.X]), s.X)
    if s.task == "series":
        assert (s.X.diff(dim=0) > 0).all()  # time only goes forward


def test_text_alphabet_and_hash():
    t = ld.load("topics", limit=5000)
    assert len(t) == 4999 and t.n_classes == 96
    assert ld.decode(torch.arange(96)) == ld.ALPHABET
    assert "sha256" in t.note and t.note == ld.load("topics", limit=5000).note
    assert t.note != ld.load("stdlib", limit=5000).note
    with pytest.raises(ValueError, match="limit"):
        ld.load("topics", limit=1)


def test_docstrings_against_the_interpreter():
    import bisect
    import inspect

    found = {d.name: d.text for d in ld.docstrings(["bisect", "textwrap"])}
    assert found["bisect"] == inspect.getdoc(bisect)
    import textwrap

    for name in "wrap", "dedent", "TextWrapper", "TextWrapper.fill":
        thing = textwrap
        for part in name.split("."):
            thing = getattr(thing, part)
        assert found[f"textwrap.{name}"] == inspect.getdoc(thing)
    with pytest.raises(ValueError, match="no_such"):
        ld.docstrings(["no_such_module"])


def test_mnist1d_against_a_loop():
    """The vectorised transform equals one written point by point."""
    n, k, full = 20, 10, 72
    quiet = dict(correlated=0.0, white=0.0, shear=0.0, scaling=0.0)
    s = ld.mnist1d(n, 3, padding=(36, 60), shift=1, length=full, **quiet)
    curves = ld.mnist1d_templates().numpy()

    def stretched(curve, pad):
        padded = np.concatenate([curve, np.zeros(pad)])
        return np.interp(
            np.linspace(0, len(padded) - 1, full),
            np.arange(len(padded)), padded,
        )

    matched = []
    for x, label in zip(s.X.double().numpy(), s.y.tolist(), strict=True):
        candidates = [stretched(curves[label], p) for p in range(36, 61)]
        # undo the final affine map by least squares, then compare
        errors = []
        for c in candidates:
            A = np.stack([c, np.ones(full)], 1)
            fit = np.linalg.lstsq(A, x, rcond=None)[0]
            errors.append(np.abs(A @ fit - x).max())
        assert min(errors) < 1e-5
        matched.append(36 + int(np.argmin(errors)))
    assert k == len(curves) and len(set(matched)) > 5  # pads do vary


def test_mnist1d_shift_is_circular():
    quiet = dict(correlated=0.0, white=0.0, shear=0.0, scaling=0.0,
                 padding=(60, 60), length=72)
    still = ld.mnist1d(40, 5, shift=1, **quiet)
    moved = ld.mnist1d(40, 5, shift=48, **quiet)
    rolls = set()
    for x, label in zip(moved.X, moved.y, strict=True):
        at_rest = still.X[still.y == label][0]
        hits = [r for r in range(72)
                if torch.allclose(at_rest.roll(r), x, atol=1e-5)]
        assert hits and min(hits) < 48
        rolls.add(min(hits))
    assert len(rolls) > 15


@given(st.integers(1, 60), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_templates_are_tied_to_zero(k, seed):
    for curves in ld.random_templates(k, seed), ld.mnist1d_templates():
        assert torch.allclose(curves[:, [0, -1]], curves.new_zeros(()))
        assert torch.allclose(
            curves.std(1, correction=0), curves.new_tensor(1 / 6)
        )
    s = ld.mnist1d(2 * k, seed, templates=ld.random_templates(k, seed))
    assert (s.y.bincount() == 2).all() and s.n_classes == k


def test_mnist1d_sizes_are_checked():
    for bad in ({"n": 0}, {"shift": 0}, {"padding": (5, 3)}, {"length": 1}):
        with pytest.raises(ValueError, match="expected n >= 1"):
            ld.mnist1d(**({"n": 10} | bad))


@pytest.mark.filterwarnings("ignore:A network error occurred")
@pytest.mark.parametrize("name", FETCHED)
def test_without_a_network_the_error_says_what_to_do(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    gone = URLError("no network")
    with (
        mock.patch("sklearn.datasets._openml.urlopen", side_effect=gone),
        mock.patch("sklearn.datasets._openml.time.sleep"),
        pytest.raises(ld.DataUnavailable) as caught,
    ):
        ld.load(name)
    message = str(caught.value)
    assert f"load('{name}')" in message and "no network" in message
    assert str(tmp_path) in message and "SCIKIT_LEARN_DATA" in message


def test_fetched_sets_are_mapped(monkeypatch):
    class Bunch:
        data = np.zeros((70000, 784), dtype=np.uint8)
        target = np.array(["3"] * 70000)

    Bunch.data[0, 0] = 255
    asked = {}

    def fetch(**options):
        asked.update(options)
        return Bunch

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    s = ld.load("mnist")
    assert asked["data_id"] == 554 and asked["as_frame"] is False
    assert s.X.shape == (70000, 784) and s.X[0, 0] == 1
    assert s.item == (1, 28, 28) and (s.y == 3).all()
    Bunch.data = Bunch.data[:100]
    with pytest.raises(ld.DataUnavailable, match="delete it"):
        ld.load("mnist")


def test_shelf_lists_everything():
    text, page = repr(ld.shelf()), ld.shelf()._repr_html_()
    for name in ld.RECORDS:
        assert name in text and f">{name}</td>" in page
    assert text.count("\n") == len(ld.RECORDS)
