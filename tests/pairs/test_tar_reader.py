"""Damaged shards: what can be read is read, what is lost is counted, and the shard is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasterase
from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.tar_reader import ShardReader, split_entry
from tests.pairs.reading import read_all, samples
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

    def read_entries(pairs, row):
        caption = pairs.texts(row)[0]
        assert len(pairs.encoded_image(row)) == IMAGE_BYTES
        return caption

    good, lost = read_all(pairs, read_entries)
    return list(good.values()), lost


def numbered(*numbers):
    return [f"caption {n}" for n in numbers]


@pytest.mark.parametrize(
    ("length", "match", "key", "reason"),
    [
        (2 * SAMPLE_BYTES + 1000, "it ends inside", "k2", "the shard ends inside its png"),
        # tarfile reads these two without a word: cut between samples, and inside a header.
        (2 * SAMPLE_BYTES, "it ends without the end mark", "lost sample 1", "lost from"),
        (2 * SAMPLE_BYTES + 100, "it ends without the end mark", "lost sample 1", "lost from"),
        # A caption is never cut short.
        (3 * SAMPLE_BYTES - 512 + 4, "it ends inside", "k2", "the shard ends inside its txt"),
        # A caption lost with the rest is no lost sample more.
        (3 * SAMPLE_BYTES - 1024, "it ends without", "k2", "no readable caption"),
    ],
)
def test_cut_shards(shard, length, match, key, reason):
    path = shard("s.tar")
    os.truncate(path, length)
    warning = rf"`retain`: shard {path} is damaged .*{match}.*At least 1 of its samples cannot"
    good, lost = read(path, warning)
    assert good == numbered(0, 1)
    assert list(lost) == [f"s.tar/{key}"]
    assert lost[f"s.tar/{key}"].startswith(reason)


def test_the_neighbours_tell_how_many_are_lost(shard):
    for n in range(3):
        path = shard(f"s-{n}.tar")
    os.truncate(path.with_name("s-1.tar"), 2 * SAMPLE_BYTES + 1000)
    good, lost = read(path.parent, "At least 4 of its samples")
    assert good == numbered(*range(6), 0, 1, *range(6))
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


@pytest.mark.parametrize(
    ("start", "data", "match", "good", "lost"),
    [
        (1, np.random.default_rng(1).bytes(3 * SAMPLE_BYTES), "headers cannot", [0, 4, 5], 3),
        (2, bytes(10 * SAMPLE_BYTES), "a hole of zeros", [0, 1, *range(12, 30)], 10),
        (1, b"\xff" * 20, "headers cannot be read", [0, 2, 3, 4, 5], 1),
        (0, b"\xff", r"byte 0: headers cannot be read", [1, 2, 3, 4, 5], 1),
    ],
    ids=["stretch", "hole", "header", "first header"],
)
def test_samples_after_damage_are_read(shard, start, data, match, good, lost):
    path = shard("s.tar", samples=max(good) + 1)
    with path.open("r+b") as file:
        file.seek(start * SAMPLE_BYTES)
        file.write(data)
    found, missing = read(path, match)
    assert found == numbered(*good)
    assert len(missing) == lost


def test_joined_archives_are_read_to_the_end(shard):
    one, two = shard("a.tar", samples=2), shard("b.tar", samples=3)
    path = one.with_name("joined.tar")
    path.write_bytes(one.read_bytes() + two.read_bytes())
    pairs = open_pairs(str(path), name="retain")
    assert [text for (text,) in pairs.every_text()] == numbered(0, 1, 0, 1, 2)


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_a_cut_compressed_shard(shard):
    path = shard("s.tar.gz", samples=200, mode="w:gz")
    os.truncate(path, path.stat().st_size // 2)
    good, lost = read(path, "compressed data is damaged")
    assert good == numbered(*range(len(good)))
    assert 50 < len(good) < 101
    assert len(lost) == 1


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_a_cut_pipe(shard):
    path = shard("s.tar")
    os.truncate(path, 2 * SAMPLE_BYTES)
    assert read(f"pipe:cat {path}")[0] == numbered(0, 1)


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>not found</html>" * 100])
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


def test_lost_samples_count_against_max_skipped(make_tar):
    """They are drawn, skipped and named like any broken pair."""
    path = make_tar("s.tar", samples({n: f"caption {n}" for n in range(4)}))
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
            max_skipped=0,
        )


@given(st.from_regex(r"([a-z]{1,3}/){0,2}[a-zA-Z0-9_-]{1,8}\.[a-zA-Z0-9.]{1,8}", fullmatch=True))
def test_entries_split_at_the_first_dot_of_the_file_name(path):
    if path.rpartition("/")[2].startswith("__"):
        assert split_entry(path) is None
        return
    key, ending = split_entry(path)
    assert f"{key}.{ending}" == path[: len(key)] + path[len(key) :].lower()
    assert "." not in key
    assert split_entry(path.replace(".", "_")) is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form):
    """Long, foreign and nested names, times with fractions, folders and links."""
    names = ["a.txt", "dir/b.txt", "x" * 95 + ".txt", "f/" * 70 + "deep.txt", "k.", "d.d/e.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else ["ä" * 120 + ".txt", "é.txt"]
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 500 * number
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("other.txt")
            info.type, info.linkname = kind, "a.txt"
            tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size, m.isfile()) for m in tar]
    with path.open("rb") as file:
        reader = ShardReader(file)
        found = [(e.name, e.data_offset, e.size, e.is_file) for e in reader.entries()]
        assert reader.damage == []
    assert found == expected


def test_neighbours_of_one_key_are_two_samples(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        names = ["a.png", "a.txt", "a.png", "a.txt", "b.png", "b.png", "b.txt"]
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(str(number).encode()))
    pairs = open_pairs(str(tmp_path / "s.tar"), name="x")
    read = [(pairs.id(row)[-1], pairs.encoded_image(row)) for row in range(4)]
    assert read == [("a", b"0"), ("a", b"2"), ("b", b"4"), ("b", b"5")]
    assert list(pairs.every_text()) == [["1"], ["3"], [], ["6"]]


def test_json_nested_too_deeply_is_a_broken_pair(make_tar):
    deep = "[" * 100_000
    entries = samples({1: "cat", 2: "dog"}) | {"k2.json": deep}
    pairs = open_pairs(make_tar("a.tar", entries), name="x")
    assert list(read_all(pairs)[1]) == ["a.tar/k2"]
    named = {"k1.json": {"caption": "cat"}, "k1.png": b"", "k2.png": b"", "k2.json": deep}
    pairs = open_pairs(make_tar("b.tar", named), name="x", text_key="caption")
    assert list(pairs.every_text()) == [["cat"], []]
