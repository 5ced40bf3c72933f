"""Damaged shards: what can be read is read, what is lost is counted, and the shard is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fasterase
from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from tests.small_models import open_clip_vit, simple_tokenizer

IMAGE_BYTES = 3 * 512


@pytest.fixture
def shard(make_tar):
    """Writes a shard of samples `k0`, `k1`, ...: a header and three blocks of image, a header and
    a block of caption each."""

    def make(name: str, samples: int = 6, mode: str = "w") -> Path:
        noise = np.random.default_rng(0)
        entries = {}
        for n in range(samples):
            entries[f"k{n}.png"] = noise.bytes(IMAGE_BYTES)
            entries[f"k{n}.txt"] = f"caption {n}"
        return Path(make_tar(name, entries, mode))

    return make


SAMPLE_BYTES = 512 + IMAGE_BYTES + 512 + 512


def read(path, match=r"damaged"):
    """Captions that can be read, and reasons of those that cannot, of a damaged shard."""
    with pytest.warns(UserWarning, match=match):
        pairs = open_pairs(str(path), name="retain")
    good, lost = [], {}
    for row in range(len(pairs)):
        try:
            caption = pairs.texts(row)[0]
            assert len(pairs.encoded_image(row)) == IMAGE_BYTES
            good.append(caption)
        except BrokenPair as error:
            lost[error.id] = error.reason
    return good, lost


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def captions(*numbers):
    return [f"caption {n}" for n in numbers]


def test_a_shard_cut_inside_an_image(shard):
    path = shard("s.tar")
    os.truncate(path, 2 * SAMPLE_BYTES + 1000)
    good, lost = read(path, rf"`retain`: shard {path} is damaged .*ends inside.*At least 1 of")
    assert good == captions(0, 1)
    assert lost == {"s.tar/k2": "the shard ends inside its png"}


@pytest.mark.parametrize("length", [2 * SAMPLE_BYTES, 2 * SAMPLE_BYTES + 100])
def test_a_shard_cut_between_samples_or_inside_a_header(shard, length):
    """tarfile reads such a shard without a word."""
    path = shard("s.tar")
    os.truncate(path, length)
    good, lost = read(path, "At least 1 of its samples cannot be used .* 2 can")
    assert good == captions(0, 1)
    assert list(lost) == ["s.tar/lost sample 1"]


def test_a_caption_is_never_cut_short(shard):
    path = shard("s.tar")
    os.truncate(path, 3 * SAMPLE_BYTES - 512 + 4)
    assert read(path)[0] == captions(0, 1)


def test_a_caption_lost_with_the_rest_is_no_lost_sample_more(shard):
    path = shard("s.tar")
    os.truncate(path, 3 * SAMPLE_BYTES - 1024)
    good, lost = read(path)
    assert good == captions(0, 1)
    assert lost == {"s.tar/k2": "no readable caption"}


def test_the_neighbours_tell_how_many_are_lost(shard):
    for n in range(3):
        path = shard(f"s-{n}.tar")
    os.truncate(path.with_name("s-1.tar"), 2 * SAMPLE_BYTES + 1000)
    good, lost = read(path.parent, "At least 4 of its samples")
    assert good == captions(*range(6), 0, 1, *range(6))
    assert list(lost) == ["s-1.tar/k2", *(f"s-1.tar/lost sample {n}" for n in (1, 2, 3))]


@pytest.mark.parametrize(
    ("name", "content"),
    [("s_stats.json", json.dumps({"successes": 6})), ("s.idx", "v1.2 6\npng 512 1\n")],
)
def test_the_index_tells_how_many_are_lost(shard, name, content):
    path = shard("s.tar")
    path.with_name(name).write_text(content)
    os.truncate(path, 2 * SAMPLE_BYTES)
    assert list(read(path)[1]) == [f"s.tar/lost sample {n}" for n in (1, 2, 3, 4)]


def test_samples_after_a_damaged_stretch_are_read(shard):
    path = shard("s.tar")
    overwrite(path, SAMPLE_BYTES, np.random.default_rng(1).bytes(3 * SAMPLE_BYTES))
    good, lost = read(path, "headers cannot be read")
    assert good == captions(0, 4, 5)
    assert list(lost) == [f"s.tar/lost sample {n}" for n in (1, 2, 3)]


def test_samples_after_a_hole_of_zeros_are_read(shard):
    path = shard("s.tar", samples=30)
    overwrite(path, 2 * SAMPLE_BYTES, bytes(10 * SAMPLE_BYTES))
    good, lost = read(path, "a hole of zeros")
    assert good == captions(0, 1, *range(12, 30))
    assert len(lost) == 10


def test_one_damaged_header_costs_one_sample(shard):
    path = shard("s.tar")
    overwrite(path, SAMPLE_BYTES, b"\xff" * 20)
    good, lost = read(path)
    assert good == captions(0, 2, 3, 4, 5)
    assert list(lost) == ["s.tar/k1"]


def test_joined_archives_are_read_to_the_end(shard):
    one, two = shard("a.tar", samples=2), shard("b.tar", samples=3)
    path = one.with_name("joined.tar")
    path.write_bytes(one.read_bytes() + two.read_bytes())
    pairs = open_pairs(str(path), name="retain")
    assert [pairs.texts(i)[0] for i in range(len(pairs))] == captions(0, 1, 0, 1, 2)


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_a_cut_compressed_shard(shard):
    path = shard("s.tar.gz", samples=200, mode="w:gz")
    os.truncate(path, path.stat().st_size // 2)
    good, lost = read(path, "compressed data is damaged")
    assert good == captions(*range(len(good)))
    assert 50 < len(good) < 101
    assert len(lost) == 1


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_a_cut_pipe(shard):
    path = shard("s.tar")
    os.truncate(path, 2 * SAMPLE_BYTES)
    assert read(f"pipe:cat {path}")[0] == captions(0, 1)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100])
def test_what_is_no_tar_is_refused(shard, content):
    path = shard("s-0.tar").with_name("s-1.tar")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"`retain`: shard .*s-1\.tar cannot be read: it is "):
        open_pairs(str(path.parent), name="retain")


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_zstd_names_the_way(tmp_path):
    (tmp_path / "s.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(InputError, match="pipe:zstd -dc"):
        open_pairs(str(tmp_path / "s.tar.zst"), name="retain")


def test_a_shard_that_shrinks_after_it_was_opened(shard):
    path = shard("s.tar")
    pairs = open_pairs(str(path), name="retain")
    os.truncate(path, SAMPLE_BYTES)
    with pytest.raises(BrokenPair, match="was cut off after it was opened"):
        pairs.encoded_image(3)


def test_lost_samples_count_against_max_skipped(make_tar, encoded):
    """They are drawn, skipped and named like any broken pair."""
    entries = {}
    for n in range(4):
        entries |= {f"k{n}.png": encoded(n), f"k{n}.txt": f"caption {n}"}
    path = make_tar("s.tar", entries)
    os.truncate(path, 3 * 4 * 512)
    named = r"more than .*`max_skipped`.*s\.tar/lost sample 1 \(lost from a damaged shard"
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(InputError, match=named):
        fasterase.unlearn(
            open_clip_vit(),
            path,
            [(torch.randn(3, 32, 32), f"picture {n}") for n in range(4)],
            tokenizer=simple_tokenizer(),
            progress=False,
            evaluation=None,
        )
