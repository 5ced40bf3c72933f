"""WebDataset shards: patterns, entries, sequential reading; their index, kept and remade."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest

from fasterase.errors import InputError
from fasterase.pairs import processes, read_tars
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.split import split
from fasterase.progress import speaking
from tests.pairs.reading import captions, contents, encoded, read_all, samples, shade


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
    assert captions(pairs) == [[f"n {n}"] for n in numbers]
    for row, n in enumerate(numbers):
        assert (shade(pairs, row), pairs[row].meta["group"]) == (n, f"g{n}")
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


def test_keys_choose_entries_and_json_fields(shards, make_tar):
    path = f"{shards}/s-0.tar"
    for key in ("alt", "json:alt"):
        pairs = open_pairs(path, name="x", text_key=key)
        assert pairs[1].text == ["x1", "y1"]
    other = make_tar("o.tar", {"a.left.png": encoded(3), "a.right.png": encoded(4), "a.cap": "c"})
    pairs = open_pairs(other, name="x", image_key="right.png", text_key="cap")
    assert (pairs[0].text, shade(pairs, 0)) == ("c", 4)


def test_wrong_entries_list_those_found(shards, make_tar):
    for key, what in (("text_key", "captions"), ("image_key", "images")):
        with pytest.raises(InputError, match=rf"no {what}.*json, png, txt.*`{key}`"):
            open_pairs(f"{shards}/s-0.tar", name="x", **{key: "tif"})
    with pytest.raises(InputError, match="no samples"):
        open_pairs(make_tar("e.tar", {"README": "nothing here"}), name="x")


def test_incomplete_samples_are_broken_pairs_and_foreign_files_are_left_out(make_tar):
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
    good, broken = read_all(open_pairs(path, name="x"))
    assert good == {"t.tar/a": "a", "t.tar/dir/f": "f"}
    assert broken.keys() == {"t.tar/b", "t.tar/c", "t.tar/d", "t.tar/e"}
    assert broken["t.tar/b"] == "no readable caption"
    assert broken["t.tar/c"] == "the sample has no image"


@pytest.mark.parametrize("way", ["pipe", "compressed"])
def test_what_cannot_be_read_at_random_is_spooled(shards, make_tar, way):
    if way == "pipe":
        source = f"pipe:cat {shards}/s-{{0..1}}.tar"
    else:
        metas = [{"group": f"g{n}"} for n in range(4)]
        entries = samples({n: f"n {n}" for n in range(4)}, metas=metas)
        source = make_tar("z.tar.gz", entries, "w:gz")
    with pytest.warns(UserWarning, match="kept in memory"):
        pairs, again = (open_pairs(source, name="x") for _ in range(2))
    assert captions(pairs) == [["n 0"], ["n 1"], ["n 2"], ["n 3"]]
    assert (shade(pairs, 2), pairs[3].meta["group"]) == (2, "g3")
    assert len(pairs.digest()) == 32
    # Equal by content, wherever it is read from.
    (shards.parent / "t.csv").write_text("image,text\n2.png,a\n")
    (shards.parent / "2.png").write_bytes(encoded(2))
    for other in (again.select([2]), open_pairs(shards.parent / "t.csv", name="y")):
        assert remove_overlap(pairs, other)[1] == [pairs.id(2)]
    workers = pickle.loads(pickle.dumps(pairs))
    assert workers.encoded_image(3) == pairs.encoded_image(3)


def test_manifest_follows_the_shards(shards, make_tar):
    first = open_pairs(f"{shards}/s-0.tar", name="x").digest()
    assert first == open_pairs(f"{shards}/s-0.tar", name="y").digest()
    assert first != open_pairs(f"{shards}/s-1.tar", name="x").digest()
    assert open_pairs(str(shards), name="x").digest() != first
    entries = samples({1: "a caption", 2: "another"})
    before = open_pairs(make_tar("a.tar", entries), name="x")
    after = open_pairs(make_tar("a.tar", entries | {"k2.png": encoded(3)}), name="x")
    assert before.encoded_sizes().tolist() == after.encoded_sizes().tolist()
    assert before.digest() != after.digest()


def blocks(folder):
    return sorted((folder / ".fasterase").iterdir())


@pytest.fixture
def kept(shards, monkeypatch):
    """A folder of shards whose index is kept."""
    monkeypatch.setattr(read_tars, "KEPT_BYTES", 0)
    return shards


@pytest.fixture
def read_shards(monkeypatch):
    """The names of the shards that are read from now on by this process."""
    read = []
    before = read_tars.read_rows

    def note(shard, *arguments, **options):
        read.append(os.path.basename(shard.place))
        return before(shard, *arguments, **options)

    monkeypatch.setattr(read_tars, "read_rows", note)
    monkeypatch.setattr(processes, "num_cpus", lambda: 1)
    return read


def test_indexing_that_takes_long_says_what_it_found(shards, monkeypatch, capsys):
    monkeypatch.setattr(read_tars, "SHORT_SECONDS", 1e9)
    open_pairs(str(shards), name="retain")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(read_tars, "SHORT_SECONDS", 0)
    open_pairs(str(shards), name="retain")
    assert "fasterase: retain indexed: 8 pairs in 4 shards (" in capsys.readouterr().err
    with speaking(False):
        open_pairs(str(shards), name="retain")
    assert capsys.readouterr().err == ""


def test_a_kept_index_is_that_in_memory(kept, monkeypatch):
    found = contents(kept)
    assert [path.name.split(".tar.")[0] for path in blocks(kept)] == [f"s-{n}" for n in range(4)]
    manifest = open_pairs(str(kept), name="retain").digest()
    monkeypatch.setattr(read_tars, "KEPT_BYTES", 1 << 40)
    assert contents(kept) == found
    assert [caption for _, (caption,), *_ in found] == [f"n {n}" for n in range(8)]
    assert open_pairs(str(kept), name="x").digest() == manifest


def test_what_has_changed_is_indexed_again_alone(kept, read_shards, make_tar, caplog):
    contents(kept)
    assert read_shards == [f"s-{n}.tar" for n in range(4)]
    read_shards.clear()
    before = contents(kept)
    assert read_shards == []

    make_tar("s-1.tar", {"other.png": encoded(9), "other.txt": "another caption"})
    after = contents(kept)
    assert read_shards == ["s-1.tar"]
    assert [id for id, *_ in after[2:4]] == ["s-1.tar/other", "s-2.tar/key4"]
    assert after[3:] == before[4:]

    read_shards.clear()
    block = blocks(kept)[2]
    data = block.read_bytes()
    facts = data.rindex(b'"torn"')
    counted = data.rindex(b'"images": 2') + len(b'"images": ')
    harms = [data[:at] + b"3" + data[at + 1 :] for at in (facts, counted, data.index(b"n 5"))]
    for damaged in (data[:-1], data[:100], *harms, b""):
        block.write_bytes(damaged)
        assert contents(kept) == after
        assert block.read_bytes() == data
    assert read_shards == ["s-2.tar"] * 6
    assert f"{block} is damaged" in caplog.text


def test_other_entries_have_an_index_of_their_own(kept):
    contents(kept)
    pairs = open_pairs(str(kept / "s-0.tar"), name="x", image_key="none;png")
    assert pairs.texts(1) == ["n 1"]
    assert len(blocks(kept)) == 5


@pytest.mark.parametrize("cached", [True, False])
def test_an_index_that_cannot_be_written_beside_the_shards(
    kept, read_shards, tmp_path_factory, monkeypatch, cached
):
    """It is kept in the user's cache, or in memory if that fails too."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache) if cached else "/dev/null")
    monkeypatch.setattr("fasterase.pairs.read_tars.os.access", lambda *_: False)
    for again in (False, True):
        read_shards.clear()
        assert len(contents(kept)) == 8
        assert len(read_shards) == (0 if cached and again else 4)
    assert len(list(cache.rglob("*.arrow"))) == (4 if cached else 0)
    assert not (kept / ".fasterase").exists()


def _open_often(folder, seen):
    try:
        seen.put([contents(folder) for _ in range(5)])
    except Exception as error:
        seen.put(repr(error))


def test_processes_that_open_the_same_shards_at_once(kept):
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_open_often, args=(kept, seen)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [seen.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[contents(kept)] * 5] * 3
    assert {path.suffix for path in blocks(kept)} == {".arrow"}


def test_an_unreadable_shard_is_named_by_the_process_that_asked(kept):
    (kept / "s-2.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=r"`retain`: shard .*s-2\.tar cannot be read"):
        contents(kept)


def test_workers_get_paths_rather_than_copies(kept):
    pairs = open_pairs(str(kept), name="x")
    pairs.texts(3)
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.texts(3) == ["n 3"]
    assert b"n 3" not in pickle.dumps(pairs)


def test_an_index_replaced_while_in_use_is_an_error(kept, make_tar):
    pairs = open_pairs(str(kept), name="x")
    make_tar("s-1.tar", {"other.png": encoded(9), "other.txt": "another caption"})
    contents(kept)
    assert pairs.texts(0) == ["n 0"]
    with pytest.raises(InputError, match=r"s-1\.tar was removed or replaced while in use"):
        pairs.texts(2)


def test_images_are_compared_with_the_json_entry_of_img2dataset(make_tar):
    said = {"status": "success", "width": 9, "height": 7, "original_width": 90}
    cases = {
        "fits": said,
        "turned": said | {"width": 7, "height": 9},
        "unknown": said | {"width": None},
        "failed": said | {"status": "failed_to_resize"},
        "other": said | {"width": 256, "height": 256},
        "foreign": {"width": 256, "height": 256, "status": "success"},
    }
    entries = {}
    for number, (key, meta) in enumerate(cases.items()):
        entries |= {f"{key}.png": encoded(number), f"{key}.txt": key, f"{key}.json": meta}
    good, broken = read_all(open_pairs(make_tar("s.tar", entries), name="x"))
    assert len(good) == 4
    assert broken == {
        "s.tar/failed": "its download failed: status 'failed_to_resize'",
        "s.tar/other": "the image has 9 x 7 pixels, its json entry says 256 x 256",
    }


def test_captions_are_searched_by_all_cores(kept, monkeypatch, make_tar):
    make_tar("s-2.tar", {"a.png": b"", "a.txt": "n 3", "b.png": b"x", "b.txt": b"\xff\xfe"})
    found = []
    for cpus in (1, 3):
        monkeypatch.setattr(processes, "num_cpus", lambda cpus=cpus: cpus)
        pairs = open_pairs(str(kept), name="retain")
        forget, retain = split(pairs, forget=r"N [37]")
        found.append((list(forget.every_id()), list(retain.every_id())))
    assert found[0] == found[1]
    assert found[0][0] == ["s-1.tar/key3", "s-2.tar/a", "s-3.tar/key7"]
