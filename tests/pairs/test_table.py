"""Rows come back as they were given, from memory and from Arrow files; views share them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterase.pairs import table as tables
from fasterase.pairs.images import ImagesInMemory
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import JoinedTable, PairTable, Part, Parts, make_batch, pack

ROWS = st.lists(st.tuples(st.text(st.characters()), st.lists(st.text(st.characters()))), min_size=1)


def table(*rows):
    return PairTable("x", pack((*row, None) for row in rows), ImagesInMemory([b""] * len(rows)))


@given(ROWS)
@settings(deadline=None)
def test_ids_and_captions_come_back_without_blank_ones(rows):
    """Ids may hold undecodable bytes, as names of files do; half characters become "?"."""
    captions = [
        [text.strip().encode(errors="replace").decode() for text in texts if text.strip()]
        for _, texts in rows
    ]
    for pairs in (table(*rows), pickle.loads(pickle.dumps(table(*rows)))):
        assert list(pairs.every_id()) == [id for id, _ in rows]
        assert [pairs.id(row) for row in range(len(rows))] == [id for id, _ in rows]
        assert list(pairs.every_text()) == captions


def test_digests_see_borders():
    digests = [
        table(("ab", ["x"]), ("c", ["y"])).digest(),
        table(("a", ["x"]), ("bc", ["y"])).digest(),
        table(("ab", ["x", "y"]), ("c", [])).digest(),
        table(("ab", ["xy"]), ("c", [])).digest(),
        table(("ab", ["x"]), ("c", ["y"])).where(np.array([True, True])).digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert table(("ab", ["x"]), ("c", ["y"])).digest() == digests[0]


def test_rows_of_many_parts_and_of_a_file_are_those_of_one(monkeypatch, tmp_path):
    rows = [(f"id {n}", [f"caption {n}"] * (n % 3), {"n": n}) for n in range(10)]
    whole = PairTable("x", pack(rows), ImagesInMemory([b""] * 10))
    monkeypatch.setattr(tables, "_PART_ROWS", 4)
    split = PairTable("x", pack(rows), ImagesInMemory([b""] * 10))
    assert len(split.parts.every) == 3
    for row in (0, 3, 4, 9, -1):
        assert (split.id(row), split.meta(row)) == (whole.id(row), whole.meta(row))
    assert list(split.every_text()) == list(whole.every_text())
    batch = make_batch(
        [id for id, *_ in rows],
        [captions for _, captions, _ in rows],
        **{name: np.arange(10) for name in ("offset", "size", "json_offset", "json_size")},
    )
    kept = Part(batch, {"shard": "s.tar"}).save(tmp_path / "s.arrow")
    opened = PairTable("x", [kept], ImagesInMemory([b""] * 10))
    assert list(opened.every_id()) == list(whole.every_id())
    assert opened.texts(5) == whole.texts(5)
    assert Parts([kept]).column("size").tolist() == list(range(10))


def test_rows_end_where_the_table_does():
    pairs = table(("a", ["x"]), ("b", ["y"]))
    for row in (2, -3):
        with pytest.raises(IndexError):
            pairs.texts(row)
    assert len(list(pairs.every_id())) == len(pairs[:]) == 2


def test_joined_tables_are_one_and_their_parts_views_of_it():
    first, second = table(("a", ["x"]), ("b", ["y"])), table(("c", ["z"]), ("d", []))
    joined = JoinedTable("both", [first, second])
    assert list(joined.every_id()) == ["a", "b", "c", "d"]
    assert list(joined.every_text()) == [["x"], ["y"], ["z"], []]
    part = joined.select([2, 1], name="part")
    assert [part.texts(0), part.texts(1)] == [["z"], ["y"]]
    assert part.base.digest() == joined.digest() != part.digest()
    assert joined.digest() != JoinedTable("both", [second, first]).digest()
    assert joined.encoded_sizes().tolist() == [*first.encoded_sizes(), *second.encoded_sizes()]
    assert (joined.shards(), joined.stable) == (None, True)
    with pytest.raises(BrokenPair, match="d"):
        joined.texts(3)
