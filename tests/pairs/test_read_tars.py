"""WebDataset shards: patterns, entries, random access, spooling, damage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.tar_reader import split_entry


def captions(pairs):
    return [pairs.texts(i)[0] for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("{}/s-{{0..2}}.tar", range(6)),
        ("{}/s-{{2,0}}.tar", [4, 5, 0, 1]),
        ("{0}/s-1.tar::{0}/s-0.tar", [2, 3, 0, 1]),
        ("{}/s-1.tar", [2, 3]),
        ("{}/s-*.tar", range(8)),
        ("{}", range(8)),
        ("file:{}/s-1.tar", [2, 3]),
        ("{0}/s-{{2..1}}.tar::{0}/s-{{0,0}}.tar", [4, 5, 2, 3, 0, 1, 0, 1]),
    ],
)
def test_patterns(shards, pattern, numbers):
    pairs = open_pairs(pattern.format(shards), name="retain")
    assert captions(pairs) == [f"n {n}" for n in numbers]
    for row, n in enumerate(numbers):
        assert pairs[row].image.getpixel((0, 0))[0] == n
        assert pairs[row].meta["group"] == f"g{n}"
        assert pairs.id(row) == f"s-{n // 2}.tar/key{n}"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{0..5}.tar", r"2 of 6 shards .* missing, such as .*s-4\.tar"),
        ("s-{0..4.tar", "bad shard pattern.*[Uu]nbalanced"),
        ("none-*.tar", "1 of 1 shards"),
    ],
)
def test_bad_patterns(shards, pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        open_pairs(f"{shards}/{pattern}", name="retain")
    assert "`retain`" in str(caught.value)


def test_keys_choose_entries_and_json_fields(shards, make_tar, encoded):
    path = f"{shards}/s-0.tar"
    for key in ("alt", "json:alt"):
        pairs = open_pairs(path, name="x", text_key=key)
        assert pairs[1].text == ["x1", "y1"]
    other = make_tar("o.tar", {"a.left.png": encoded(3), "a.right.png": encoded(4), "a.cap": "c"})
    pairs = open_pairs(other, name="x", image_key="right.png", text_key="cap")
    assert pairs[0].text == "c"
    assert pairs[0].image.getpixel((0, 0))[0] == 4


def test_wrong_entries_list_those_found(shards, make_tar, encoded):
    with pytest.raises(InputError, match=r"no captions.*json, png, txt.*`text_key`"):
        open_pairs(f"{shards}/s-0.tar", name="x", text_key="nothing")
    with pytest.raises(InputError, match=r"no images.*json, png, txt.*`image_key`"):
        open_pairs(f"{shards}/s-0.tar", name="x", image_key="tif")
    with pytest.raises(InputError, match="no samples"):
        open_pairs(make_tar("e.tar", {"README": "nothing here"}), name="x")


def test_incomplete_samples_are_broken_pairs_and_foreign_files_are_left_out(make_tar, encoded):
    path = make_tar(
        "t.tar",
        {
            "LICENSE.md": "text",
            "a.png": encoded(1),
            "a.txt": "a",
            "b.png": encoded(2),
            "c.txt": "c",
            "d.png": encoded(3)[:40],
            "d.txt": "d",
            "e.png": encoded(4),
            "e.txt": b"\xff\xff",
            "e.json": b"{",
            "dir/f.JPG": encoded(5, "JPEG"),
            "dir/f.txt": "f",
        },
    )
    pairs = open_pairs(path, name="x")
    good = {}
    broken = {}
    for i in range(len(pairs)):
        try:
            good[pairs.id(i)] = pairs[i].text
        except BrokenPair as error:
            broken[error.id] = error.reason
    assert good == {"t.tar/a": "a", "t.tar/dir/f": "f"}
    assert broken.keys() == {"t.tar/b", "t.tar/c", "t.tar/d", "t.tar/e"}
    assert broken["t.tar/b"] == "no readable caption"
    assert broken["t.tar/c"] == "the sample has no image"


@pytest.mark.parametrize("way", ["pipe", "compressed"])
def test_what_cannot_be_read_at_random_is_spooled(shards, make_tar, encoded, way):
    if way == "pipe":
        source = f"pipe:cat {shards}/s-{{0..1}}.tar"
    else:
        entries = {}
        for n in range(4):
            entries |= {
                f"key{n}.png": encoded(n),
                f"key{n}.txt": f"n {n}",
                f"key{n}.json": {"group": f"g{n}"},
            }
        source = make_tar("z.tar.gz", entries, "w:gz")
    with pytest.warns(UserWarning, match="kept in memory"):
        pairs = open_pairs(source, name="x")
    assert captions(pairs) == ["n 0", "n 1", "n 2", "n 3"]
    assert pairs[2].image.getpixel((0, 0))[0] == 2
    assert pairs[3].meta["group"] == "g3"
    assert len(pairs.digest()) == 32


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_a_failing_pipe_is_an_error():
    with pytest.raises(InputError, match="`x`"):
        open_pairs("pipe:false", name="x")


def test_manifest_follows_the_shards(shards, make_tar, encoded):
    first = open_pairs(f"{shards}/s-0.tar", name="x").digest()
    assert first == open_pairs(f"{shards}/s-0.tar", name="y").digest()
    assert first != open_pairs(f"{shards}/s-1.tar", name="x").digest()
    assert open_pairs(str(shards), name="x").digest() != first


@given(st.from_regex(r"([a-z]{1,3}/){0,2}[a-zA-Z0-9_-]{1,8}\.[a-zA-Z0-9.]{1,8}", fullmatch=True))
def test_entries_split_at_the_first_dot_of_the_file_name(path):
    if path.rpartition("/")[2].startswith("__"):
        assert split_entry(path) is None
        return
    key, ending = split_entry(path)
    assert f"{key}.{ending}" == path[: len(key)] + path[len(key) :].lower()
    assert "." not in key
    assert split_entry(path.replace(".", "_")) is None
