"""The index of shards: kept, found again, remade where a shard or a block has changed, shared."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile

import pytest

from fasterase.errors import InputError
from fasterase.pairs import processes, read_tars
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import split
from fasterase.pairs.tar_reader import ShardReader


@pytest.fixture(autouse=True)
def kept_index(monkeypatch):
    """The index of any set is kept."""
    monkeypatch.setattr(read_tars, "KEPT_BYTES", 0)


def contents(folder):
    pairs = open_pairs(str(folder), name="retain")
    rows = range(len(pairs))
    return [(pairs.id(i), pairs.texts(i), pairs.meta(i), pairs.encoded_image(i)) for i in rows]


def blocks(folder):
    return sorted((folder / ".fasterase").iterdir())


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


def test_a_kept_index_is_that_in_memory(shards, monkeypatch):
    kept = contents(shards)
    assert [path.name.split(".tar.")[0] for path in blocks(shards)] == [f"s-{n}" for n in range(4)]
    manifest = open_pairs(str(shards), name="retain").digest()
    monkeypatch.setattr(read_tars, "KEPT_BYTES", 1 << 40)
    assert contents(shards) == kept
    assert [caption for _, (caption,), *_ in kept] == [f"n {n}" for n in range(8)]
    assert open_pairs(str(shards), name="x").digest() == manifest


def test_what_has_changed_is_indexed_again_alone(shards, read_shards, make_tar, encoded, caplog):
    contents(shards)
    assert read_shards == [f"s-{n}.tar" for n in range(4)]
    read_shards.clear()
    before = contents(shards)
    assert read_shards == []

    make_tar("s-1.tar", {"other.png": encoded(9), "other.txt": "another caption"})
    after = contents(shards)
    assert read_shards == ["s-1.tar"]
    assert [id for id, *_ in after[2:4]] == ["s-1.tar/other", "s-2.tar/key4"]
    assert after[3:] == before[4:]

    read_shards.clear()
    block = blocks(shards)[2]
    data = block.read_bytes()
    facts = data.rindex(b'"torn"')
    for damaged in (data[:-1], data[:100], data[:facts] + b"\0" + data[facts + 1 :], b""):
        block.write_bytes(damaged)
        assert contents(shards) == after
        assert block.read_bytes() == data
    assert read_shards == ["s-2.tar"] * 4
    assert f"{block} is damaged" in caplog.text


def test_other_entries_have_an_index_of_their_own(shards):
    contents(shards)
    pairs = open_pairs(str(shards / "s-0.tar"), name="x", image_key="none;png")
    assert pairs.texts(1) == ["n 1"]
    assert len(blocks(shards)) == 5


@pytest.mark.parametrize("kept", [True, False])
def test_an_index_that_cannot_be_written_beside_the_shards(
    shards, read_shards, tmp_path_factory, monkeypatch, kept
):
    """It is kept in the user's cache, or in memory if that fails too."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache) if kept else "/dev/null")
    monkeypatch.setattr("fasterase.pairs.read_tars.os.access", lambda *_: False)
    for again in (False, True):
        read_shards.clear()
        assert len(contents(shards)) == 8
        assert len(read_shards) == (0 if kept and again else 4)
    assert len(list(cache.rglob("*.arrow"))) == (4 if kept else 0)
    assert not (shards / ".fasterase").exists()


def _open_often(folder, seen):
    try:
        seen.put([contents(folder) for _ in range(5)])
    except Exception as error:
        seen.put(repr(error))


def test_processes_that_open_the_same_shards_at_once(shards):
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_open_often, args=(shards, seen)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [seen.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[contents(shards)] * 5] * 3
    assert {path.suffix for path in blocks(shards)} == {".arrow"}


def test_an_unreadable_shard_is_named_by_the_process_that_asked(shards):
    (shards / "s-2.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=r"`retain`: shard .*s-2\.tar cannot be read"):
        contents(shards)


def test_workers_get_paths_rather_than_copies(shards):
    pairs = open_pairs(str(shards), name="x")
    pairs.texts(3)
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.texts(3) == ["n 3"]
    assert b"n 3" not in pickle.dumps(pairs)


def test_an_index_replaced_while_in_use_is_an_error(shards, make_tar, encoded):
    pairs = open_pairs(str(shards), name="x")
    make_tar("s-1.tar", {"other.png": encoded(9), "other.txt": "another caption"})
    contents(shards)
    assert pairs.texts(0) == ["n 0"]
    with pytest.raises(InputError, match=r"s-1\.tar was removed or replaced while in use"):
        pairs.texts(2)


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
        found = [(e.name, e.offset_data, e.size, e.isfile()) for e in reader.entries()]
        assert reader.damage == []
    assert found == expected


def test_images_are_compared_with_the_json_entry_of_img2dataset(make_tar, encoded):
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
    pairs = open_pairs(make_tar("s.tar", entries), name="x")
    broken = {}
    for row, key in enumerate(cases):
        try:
            assert pairs[row].text == key
        except BrokenPair as error:
            broken[key] = error.reason
    assert broken == {
        "failed": "its download failed: status 'failed_to_resize'",
        "other": "the image has 9 x 7 pixels, its json entry says 256 x 256",
    }


def test_captions_are_searched_by_all_cores(shards, monkeypatch, make_tar):
    make_tar("s-2.tar", {"a.png": b"", "a.txt": "n 3", "b.png": b"x", "b.txt": b"\xff\xfe"})
    found = []
    for cpus in (1, 3):
        monkeypatch.setattr(processes, "num_cpus", lambda cpus=cpus: cpus)
        pairs = open_pairs(str(shards), name="retain")
        forget, retain = split(pairs, forget=r"N [37]")
        found.append((list(forget.every_id()), list(retain.every_id())))
    assert found[0] == found[1]
    assert found[0][0] == ["s-1.tar/key3", "s-2.tar/a", "s-3.tar/key7"]
