"""The store: whole entries or none, damage noticed, locks that die."""

import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_book import CHECKOUT

from reappraisal.protocol import cache

KEY = hashlib.sha256(b"key").hexdigest()
DATA = cache.pack({"key": KEY, "seconds": 1.5}, b'{"cells": []}')


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at, by):
    changed = bytearray(DATA)
    changed[at] ^= by
    try:
        entry = cache.unpack(bytes(changed), KEY)
    except cache.Damaged:
        return
    # only spelling of the first line may change and leave the entry whole
    assert entry == cache.unpack(DATA, KEY) and at < DATA.index(b"\n")


@given(st.integers(0, len(DATA) - 1))
def test_any_cut_is_noticed(length):
    with pytest.raises(cache.Damaged):
        cache.unpack(DATA[:length], KEY)


def test_an_entry_under_another_key_is_not_believed():
    with pytest.raises(cache.Damaged, match="belongs to key"):
        cache.unpack(DATA, KEY[::-1])


def test_damage_is_set_aside_and_said(tmp_path):
    store = cache.Store(tmp_path)
    store.put(KEY, {"seconds": 1}, b"{}")
    store.path(KEY).write_bytes(b"")
    with pytest.raises(cache.Damaged, match="moved to"):
        store.get(KEY)
    assert store.get(KEY) is None
    assert len(list((tmp_path / "damaged").iterdir())) == 1


@pytest.mark.parametrize("key", ["", "../x", KEY + "0", KEY.upper(), "a/b"])
def test_keys_cannot_lead_out_of_the_store(tmp_path, key):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        cache.Store(tmp_path).get(key)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    cache.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(cache.StorageFull, match="no room left.*a.txt"):
        cache.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    store = cache.Store(small_disk)
    store.put(KEY, {}, b"x" * 10_000)
    other = KEY[::-1]
    with pytest.raises(cache.StorageFull, match="no room left"):
        store.put(other, {}, b"x" * 100_000)
    assert store.get(other) is None and len(store.get(KEY).notebook) == 10_000
    assert not list(small_disk.rglob("*.part"))


def test_parts_of_dead_processes_are_swept_up(tmp_path):
    part, descriptor = cache._open_part(tmp_path / "x.result")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".0123.part").write_text("half")
    cache.Store(tmp_path)
    assert list(tmp_path.rglob(".*.part")) == [part]
    os.close(descriptor)  # as when its writer dies
    cache.Store(tmp_path)
    assert not list(tmp_path.rglob(".*.part"))


def test_a_lock_dies_with_its_holder(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from reappraisal.protocol.cache import Lock\n"
        "lock = Lock.take(Path(sys.argv[1]))\n"
        "print('taken' if lock else 'refused', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )
    with holder:
        assert holder.stdout.readline().strip() == "taken"
        assert cache.Lock.take(path) is None
        holder.send_signal(signal.SIGKILL)
    lock = cache.Lock.take(path)
    assert lock is not None
    lock.release()
    assert not path.exists()
