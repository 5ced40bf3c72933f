"""Feature blocks on disk: found again, and never believed when damaged."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest

from fasterase.encode import BATCH_SIZE, PairEncoder
from fasterase.errors import FaseraseError, InputError
from fasterase.original import features
from fasterase.original.features import OriginalFeatures
from fasterase.original.store import FeatureStore
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import caption_key
from fasterase.parallel.ranks import Ranks
from tests.tiny_model import TinyModel, pairs

N_PAIRS = 9 * BATCH_SIZE + 5
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.tiny_model"])


def filled(folder, *blocks):
    store = FeatureStore(folder, 3)
    for keys in blocks:
        keys = np.array(keys, dtype=np.int64)
        store.put(keys, np.stack([keys, keys * 2, keys * 3], axis=1).astype(np.float32))
    store.refresh()
    return store


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    filled(tmp_path, [5, -7, 2], [100], [3, 9])
    (tmp_path / "77-0.tmp").write_bytes(b"half, as a killed process leaves it")
    store = FeatureStore(tmp_path, 3)
    assert store.has(np.array([5, -7, 2, 100, 3, 9])).all()
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
    encoder = PairEncoder(TinyModel())
    folders = {
        OriginalFeatures(encoder, tmp_path, "model", is_half=x).images(source).folder
        for x in (True, False)
    }
    assert len(folders) == 2
    for dtype, error in (("fp32", 0), ("fp16", 1e-4), ("bf16", 1e-3)):
        store = FeatureStore(tmp_path / dtype, 512, dtype=dtype)
        store.put(keys, features)
        store = FeatureStore(store.folder, 512, dtype=dtype)
        found = store.get(keys)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, features, atol=error)
        sizes.append(sum(path.stat().st_size for path in store.folder.iterdir()))
    assert max(sizes[1:]) < 0.52 * sizes[0]


def test_no_temporary_folder_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    raises = pytest.raises(InputError, match="reference_cache: no temporary folder can be written")
    with raises, features.cache_folder(None, None):
        pass


def test_an_empty_store_has_nothing(tmp_path):
    store = FeatureStore(tmp_path, 3)
    store.put(np.empty(0, np.int64), np.empty((0, 3), np.float32))
    assert not store.has(np.array([0, 1])).any()
    assert store.get(np.empty(0, np.int64)).shape == (0, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "foreign", "width"])
def test_a_damaged_block_is_removed(tmp_path, harm, caplog):
    filled(tmp_path, [1, 2], [3, 4])
    block = next(tmp_path.glob("0000000000000001-*"))
    data = bytearray(block.read_bytes())
    if harm == "flip":
        data[data.index(np.int64([1, 2]).tobytes())] ^= 1  # a bit of a key
        block.write_bytes(data)
    elif harm == "cut":
        block.write_bytes(data[:-8])
    elif harm == "foreign":
        block.with_name("mine.safetensors").write_bytes(bytes(100))
        block.unlink()
    store = FeatureStore(tmp_path, 4 if harm == "width" else 3)
    assert "damaged or was not written by fasterase" in caplog.text
    expected = [0, 0, 0, 0] if harm == "width" else [0, 0, 1, 1]
    np.testing.assert_array_equal(store.has(np.array([1, 2, 3, 4])), expected)
    caplog.clear()
    FeatureStore(tmp_path, store.width)
    assert not caplog.text


@pytest.mark.parametrize("place", range(12))
def test_a_flipped_bit_is_found_before_its_feature_is_used(tmp_path, place):
    filled(tmp_path, [1, 2], [3, 4])
    block = next(tmp_path.glob("0000000000000003-*"))
    data = bytearray(block.read_bytes())
    feature = data.rindex(np.float32([4, 8, 12]).tobytes())
    data[feature + place] ^= 1 << place % 8
    block.write_bytes(data)
    store = FeatureStore(tmp_path, 3)
    np.testing.assert_array_equal(store.get(np.array([1, 3, 2]))[:, 0], [1, 3, 2])
    assert store.damaged_blocks(np.array([1, 2, 3])) == []
    assert store.damaged_blocks(np.array([4, 1])) == [block.name]
    with pytest.raises(FaseraseError, match=f"{block.name} was damaged.*Run again"):
        store.get(np.array([1, 4]))
    for same in (store, FeatureStore(tmp_path, 3)):
        np.testing.assert_array_equal(same.has(np.array([1, 2, 3, 4])), [1, 1, 0, 0])
    np.testing.assert_array_equal(store.get(np.array([2, 1]))[:, 2], [6, 3])


def test_every_flipped_bit_of_a_header_is_found_or_harmless(tmp_path, caplog):
    keys, features = np.array([3, 4]), np.arange(6, dtype=np.float32).reshape(2, 3)
    captions = np.array([[3, 30], [4, 40]])
    FeatureStore(tmp_path, 3).put(keys, features, captions)
    (block,) = tmp_path.iterdir()
    data = block.read_bytes()
    header = data[: data.index(b"}}") + 2]
    harmless = 0
    for place in range(len(header)):
        harmed = bytearray(data)
        harmed[place] ^= 1 << place % 8
        block.write_bytes(harmed)
        store = FeatureStore(tmp_path, 3)
        if store.has(keys).all() and not store.damaged_blocks(keys):
            np.testing.assert_array_equal(store.get(keys), features)
            np.testing.assert_array_equal(store.captions(keys), captions)
            harmless += 1
    assert harmless < 5, "such as a digit's case"
    caplog.clear()


@pytest.mark.parametrize(
    ("blocks", "rows"),
    [(200, 1), pytest.param(1000, 1000, marks=pytest.mark.slow)],
    ids=["200 blocks", "a million pairs"],
)
def test_many_blocks_need_few_open_files(tmp_path, blocks, rows):
    keys = np.arange(blocks * rows)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = len(os.listdir("/dev/fd")) + 32 if rows == 1 else 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        filled(tmp_path, *np.split(keys, blocks))
        store = FeatureStore(tmp_path, 3)
        np.testing.assert_array_equal(store.get(keys)[:, 1], 2 * keys)
        assert store.damaged_blocks(keys) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_others_may_read_what_they_may_of_the_folder(tmp_path):
    for mode in (0o755, 0o700):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir(mode=mode)
        filled(folder, [1])
        (block,) = folder.iterdir()
        assert block.stat().st_mode & 0o777 == mode & 0o666


def write_share(folder, rank, world_size, die_at=None):
    """Fill a cache as one of several processes, which dies when it has written so often."""
    features.BLOCK = BATCH_SIZE
    ranks = Ranks()
    ranks.rank, ranks.world_size = rank, world_size
    replace, left = os.replace, [die_at]

    def dying(*paths):
        if left[0] is not None:
            left[0] -= 1
            if left[0] <= 0:
                if left[0] == 0:
                    replace(*paths)
                os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = dying
    source = open_pairs(pairs(N_PAIRS, seed=0), name="retain")
    encoder = PairEncoder(TinyModel(), ranks=ranks)
    OriginalFeatures(encoder, folder, "model").encode(source, np.arange(N_PAIRS))


def read_all(folder):
    """Images and captions of a filled cache, and the number of blocks' rows on disk."""
    source = open_pairs(pairs(N_PAIRS, seed=0), name="retain")
    filled_cache = OriginalFeatures(PairEncoder(TinyModel()), folder, "model")
    images = filled_cache.images(source)
    keys = [caption_key(source.texts(row)) for row in range(N_PAIRS)]
    return images.get(np.arange(N_PAIRS)), filled_cache.texts(keys), len(images)


@pytest.mark.parametrize(
    "trials", [1, pytest.param(10, marks=pytest.mark.scale)], ids=["once", "ten times"]
)
def test_writers_that_are_killed_leave_no_row_twice(tmp_path, trials):
    """One dies before or after one of its blocks is there, then another at any moment."""
    started = time.monotonic()
    expected = run_writers(tmp_path / "whole", [(0, 1)])
    seconds = time.monotonic() - started
    numbers = np.random.default_rng()
    for trial in range(trials):
        folder = tmp_path / str(trial)
        # It writes the images of four batches; its captions may be there already.
        run_writers(folder, [(0, 3), (1, 3), (2, 3, int(numbers.integers(1, 5)))], dies=2)
        run_writers(folder, [(0, 3), (1, 3), (2, 3)], dies=1, after=numbers.uniform(0, seconds))
        for one, other in zip(run_writers(folder, [(0, 1)]), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def run_writers(folder, writers, dies=None, after=None):
    processes = [CONTEXT.Process(target=write_share, args=(folder, *each)) for each in writers]
    for process in processes:
        process.start()
    if after is not None:
        time.sleep(after)
        processes[dies].kill()
    for number, process in enumerate(processes):
        process.join(120)
        ended = {0} if number != dies else {-signal.SIGKILL} if after is None else {0, -9}
        assert process.exitcode in ended
    return read_all(folder) if dies is None else None
