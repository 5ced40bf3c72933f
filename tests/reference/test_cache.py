"""Feature blocks on disk: found again, and never believed when damaged."""

from __future__ import annotations

import numpy as np
import pytest

from fasterase.pairs.open import open_pairs
from fasterase.reference.cache import FeatureCache, FeatureStore
from tests.tiny_model import pairs


def filled(folder, *blocks):
    store = FeatureStore(folder, 3)
    for keys in blocks:
        keys = np.array(keys, dtype=np.int64)
        store.put(keys, np.stack([keys, keys * 2, keys * 3], axis=1).astype(np.float32))
    store.refresh()
    return store


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    filled(tmp_path, [5, -7, 2], [100], [3, 9])
    store = FeatureStore(tmp_path, 3)
    assert store.has(np.array([5, -7, 2, 100, 3, 9])).all()
    assert not store.damaged
    keys = np.array([9, -7, 9, 100])
    np.testing.assert_array_equal(store.get(keys)[:, 1], keys * 2)
    np.testing.assert_array_equal(store.has(np.array([5, 6, -7, 10**12])), [1, 0, 1, 0])
    with pytest.raises(KeyError, match="6"):
        store.get(np.array([5, 6]))


def test_fp16_takes_half_the_disk_and_a_place_of_its_own(tmp_path):
    features = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    keys, sizes = np.arange(64), []
    source = open_pairs(pairs(2, seed=0), name="forget")
    folders = {
        FeatureCache(tmp_path, "model", 512, is_half=x).images(source).folder for x in (True, False)
    }
    assert len(folders) == 2
    for is_half in (False, True):
        store = FeatureStore(tmp_path / str(is_half), 512, is_half=is_half)
        store.put(keys, features)
        store = FeatureStore(store.folder, 512, is_half=is_half)
        assert not store.damaged
        found = store.get(keys)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, features, atol=1e-4 if is_half else 0)
        sizes.append(sum(path.stat().st_size for path in store.folder.iterdir()))
    assert sizes[1] < 0.52 * sizes[0]


def test_an_empty_store_has_nothing(tmp_path):
    store = FeatureStore(tmp_path, 3)
    store.put(np.empty(0, np.int64), np.empty((0, 3), np.float32))
    assert not store.has(np.array([0, 1])).any()
    assert store.get(np.empty(0, np.int64)).shape == (0, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "foreign", "width"])
def test_a_damaged_block_is_removed(tmp_path, harm, caplog):
    filled(tmp_path, [1, 2], [3, 4])
    block = next(tmp_path.glob("0000000000000001-*.npy"))
    data = bytearray(block.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        block.write_bytes(data)
    elif harm == "cut":
        block.write_bytes(data[:-8])
    elif harm == "foreign":
        np.save(tmp_path / "mine.npy", np.zeros(3))
        block.unlink()
    store = FeatureStore(tmp_path, 4 if harm == "width" else 3)
    assert store.damaged
    assert "damaged or was not written by fasterase" in caplog.text
    expected = [0, 0, 0, 0] if harm == "width" else [0, 0, 1, 1]
    np.testing.assert_array_equal(store.has(np.array([1, 2, 3, 4])), expected)
    assert not FeatureStore(tmp_path, store.width).damaged


def test_what_a_kill_left_half_written_is_ignored(tmp_path):
    filled(tmp_path, [1])
    (tmp_path / "77-0.tmp").write_bytes(b"\x93NUMPY half")
    store = FeatureStore(tmp_path, 3)
    assert store.has(np.array([1])).all()
    assert not store.damaged
