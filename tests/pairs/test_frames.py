"""DataFrames and Parquet files: paths, pictures and encoded images in columns."""

from __future__ import annotations

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.skips import BrokenPair


def captions(pairs):
    return [pairs.texts(i) for i in range(len(pairs))]


def shade(pairs, row):
    return pairs[row].image.getpixel((0, 0))[0]


def write(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_frame_of_paths(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    frame = pandas.DataFrame(
        {
            "filepath": ["0.png", str(pictures / "1.png"), "gone.png"],
            "title": ["zero", "one", "x"],
            "score": [1, 2, 3],
        }
    )
    pairs = open_pairs(frame[frame.score < 3].iloc[::-1], name="forget")
    monkeypatch.chdir("/")
    assert captions(pairs) == [["one"], ["zero"]]
    assert (shade(pairs, 0), shade(pairs, 1)) == (1, 0)
    assert pairs.id(1) == "0.png"
    assert pairs.meta(1) == {"score": 1}
    assert pairs.encoded_sizes().tolist() == [
        (pictures / name).stat().st_size for name in ("1.png", "0.png")
    ]


def test_keys_name_columns(pictures):
    frame = pandas.DataFrame({"photo": [str(pictures / "2.png")], "title": ["no"], "alt": [["a"]]})
    pairs = open_pairs(frame, name="x", image_key="photo", text_key="alt")
    assert (shade(pairs, 0), pairs[0].text) == (2, "a")
    with pytest.raises(InputError, match=r"`x`: `image_key`: no column 'i'.*\['photo', 'title'"):
        open_pairs(frame, name="x", image_key="i")
    with pytest.raises(InputError, match=r"`x`: no column named .*`image_key`"):
        open_pairs(frame, name="x")


def test_missing_cells_are_broken_pairs(pictures):
    frame = pandas.DataFrame(
        {
            "image": [str(pictures / "0.png"), None, str(pictures / "1.png")],
            "text": ["a", "b", None],
        }
    )
    pairs = open_pairs(frame, name="x")
    assert pairs[0].text == "a"
    for row, message in ((1, r"x\[1\]"), (2, "no readable caption")):
        with pytest.raises(BrokenPair, match=message):
            pairs[row]


def test_frame_of_pictures_arrays_and_token_ids(picture):
    images = [picture(1), np.full((2, 2, 3), 7, np.uint8)]
    frame = pandas.DataFrame(
        {"image": images, "caption": ["a", np.array(["b", "c"])], "text": [1, 2]}
    )
    pairs = open_pairs(frame, name="x", text_key="caption")
    assert [shade(pairs, row) for row in (0, 1)] == [1, 7]
    assert pairs[1].text == ["b", "c"]
    assert pairs.id(1) == "x[1]"
    tensors = {"pixel_values": list(torch.zeros(2, 3, 4, 4)), "input_ids": [[1, 2], [3, 4]]}
    ids = open_pairs(pandas.DataFrame(tensors), name="x")
    assert ids[1].text.tolist() == [3, 4]


@pytest.mark.parametrize("names", [["title", "title", "path"], ["text", "path", "path"]])
def test_two_columns_of_one_name_are_refused(names, tmp_path):
    repeated = max(names, key=names.count)
    found = rf"2 columns are named '{repeated}'; the columns found are .*Rename or remove"
    with pytest.raises(InputError, match=f"`x`: {found}"):
        open_pairs(pandas.DataFrame([["a", "b", "c"]], columns=names), name="x")
    table = pyarrow.table([["a"], ["b"], ["c"]], names=names)
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=rf"`x`: .*t\.parquet: {found}"):
        open_pairs(tmp_path / "t.parquet", name="x")


def test_empty_frame():
    with pytest.raises(InputError, match="`x` is empty"):
        open_pairs(pandas.DataFrame({"image": [], "text": []}), name="x")


def test_other_tables_say_what_to_pass():
    with pytest.raises(InputError, match=r"`x` is a pyarrow Table; pass its \.to_pandas\(\)"):
        open_pairs(pyarrow.table({"image": ["a"], "text": ["b"]}), name="x")


def test_parquet_of_paths(pictures):
    file = write(
        pictures / "t.parquet",
        filepath=["0.png", None, str(pictures / "2.png")],
        title=[["zero", "0"], ["one"], None],
        score=[1.5, None, 3],
    )
    pairs = open_pairs(str(file), name="forget")
    assert pairs[0].text == ["zero", "0"]
    assert pairs.meta(0) == {"score": 1.5}
    assert pairs.id(1) == "t.parquet[1]"
    for row in (1, 2):
        with pytest.raises(BrokenPair):
            pairs[row]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": "x.png"}])
def test_parquet_of_encoded_images(tmp_path, encoded, wrap):
    file = write(
        tmp_path / "t.parquet",
        image=[wrap(encoded(3)), None, wrap(b"damaged")],
        text=["a", "b", "c"],
    )
    pairs = open_pairs(file, name="forget")
    assert (shade(pairs, 0), pairs[0].text, pairs.id(0)) == (3, "a", "t.parquet[0]")
    assert pairs.encoded_sizes().tolist() == [len(encoded(3)), -1, 7]
    with pytest.raises(BrokenPair, match=r"t\.parquet\[1\]: no image"):
        pairs[1]
    with pytest.raises(BrokenPair, match="cannot be decoded"):
        pairs[2]


def test_files_of_one_name_do_not_overlap_but_by_content(tmp_path, encoded):
    sources = []
    for folder, shades in (("a", (1, 2)), ("b", (3, 2))):
        (tmp_path / folder).mkdir()
        images = [encoded(each) for each in shades]
        file = write(tmp_path / folder / "t.parquet", image=images, text=["x", "y"])
        sources.append(open_pairs(file, name=folder))
    assert remove_overlap(*sources)[1] == ["t.parquet[1]"]


def test_damaged_parquet_and_wrong_columns(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"`x`: .*t\.parquet: it cannot be read as Parquet"):
        open_pairs(tmp_path / "t.parquet", name="x")
    with pytest.raises(InputError, match=r"`x`: .*u\.parquet: no column named .*\['url', 'text'\]"):
        open_pairs(write(tmp_path / "u.parquet", url=["a"], text=["b"]), name="x")
