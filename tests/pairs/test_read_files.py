"""CSV, TSV and JSONL: columns, separators, quoting, unicode, damage."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.read_files import SEPARATORS, detect_separator, open_file
from fasterase.pairs.skips import BrokenPair

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)


def table(folder: Path, content: str, name: str = "pairs.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt"])
def test_open_clip_columns_with_any_separator(pictures, separator, ending):
    lines = ["filepath,title,source", "0.png,zero,a", "1.png,one,b"]
    path = table(pictures, "\n".join(lines).replace(",", separator), f"t{ending}")
    pairs = open_pairs(path, name="forget")
    assert [pairs.texts(i) for i in range(len(pairs))] == [["zero"], ["one"]]
    assert pairs[1].image.getpixel((0, 0))[0] == 1
    assert pairs.id(1) == "1.png"
    assert pairs.meta(0) == {"source": "a"}


def test_relative_paths_are_resolved_against_the_table_and_absolute_ones_kept(pictures, tmp_path):
    path = table(tmp_path, f"image,caption\npictures/3.png,three\n{pictures / '4.png'},four\n")
    pairs = open_pairs(path, name="x")
    assert pairs[0].image.getpixel((0, 0))[0] == 3
    assert pairs[1].image.getpixel((0, 0))[0] == 4


def test_keys_choose_columns(pictures):
    path = table(pictures, "title;img;words\nno;2.png;yes\n")
    pairs = open_pairs(path, name="x", image_key="img", text_key="words")
    assert pairs[0].text == "yes"
    with pytest.raises(InputError, match=r"`text_key`: no column 'word'.*'title', 'img', 'words'"):
        open_pairs(path, name="x", image_key="img", text_key="word")


def test_wrong_columns_list_those_found(pictures):
    path = table(pictures, "url,alt\n0.png,a\n")
    with pytest.raises(InputError, match=r"`retain`.*found are \['url', 'alt'\].*`image_key`"):
        open_pairs(path, name="retain")


def test_jsonl_with_alternatives_and_meta(pictures):
    rows = [
        {"image": "0.png", "text": ["a", "b"], "score": 1.5},
        {"image": "1.png", "text": "c"},
        {"image": "2.png"},
    ]
    path = table(pictures, "\n\n".join(json.dumps(row) for row in rows), "t.jsonl")
    pairs = open_pairs(path, name="x")
    assert pairs[0].text == ["a", "b"]
    assert pairs[0].meta == {"score": 1.5}
    assert pairs[1].text == "c"
    with pytest.raises(BrokenPair, match=r"2\.png: no readable caption"):
        pairs[2]


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n \n"])
def test_json_array(pictures, mark):
    rows = [
        {"filepath": "0.png", "title": "zero", "score": 1.5},
        {"filepath": "1.png", "title": ["one", "1"]},
    ]
    path = table(pictures, mark + json.dumps(rows, indent=1), "t.json")
    pairs = open_pairs(path, name="x")
    assert [pairs.texts(i) for i in range(len(pairs))] == [["zero"], ["one", "1"]]
    assert pairs[0].image.getpixel((0, 0))[0] == 0
    assert pairs.meta(0) == {"score": 1.5}
    lines = table(pictures, "\n".join(map(json.dumps, rows)), "lines.json")
    assert open_pairs(lines, name="x").digest() == pairs.digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "no header line"),
        ("t.csv", "filepath,title\n", r"`x` is empty \(.*t.csv\)"),
        ("t.jsonl", "{oops}\n", "line 1 is not a JSON object"),
        ("t.jsonl", "[1]\n", "line 1 must hold one JSON object; found a list"),
        ("t.jsonl", "", "`x` is empty"),
        ("t.json", "[]", "`x` is empty"),
        ("t.json", '[{"image": "0.png", "text": "a"}, 3]', "entry 2 of the array must hold"),
        ("t.json", '[{"image":\n "0.png"', "line 2 is not valid JSON"),
        ("t.json", '{\n"images": []}', "line 1 is not a JSON object.*one array of objects"),
        ("t.csv", 'filepath,title\n0.png,"' + "a\n" * 70000, "line 2: .*not closed"),
        ("t.csv", 'filepath,title\n0.png,a\n1.png,"b\n2.png,c\n', "line 3: .*not closed"),
        ("t.csv", 'filepath,title\n0.png,"a', "line 2: .*not closed"),
        ("t.csv", 'filepath,title\n0.png,"a\n1.png,"b"\n2.png,c\n', "line 2: .*not closed"),
        ("t.csv", "filepath,title\n0.png,a\n1.png,b, c\n", "line 3 has 3 cells, .* has 2"),
        ("t.csv", 'filepath,title\n0.png,"a\nb"\n1.png\n', "line 4 has 1 cell, .* has 2"),
        ("t.tsv", "filepath\ttitle\n0.png\ta\tb\n", "hold a tab"),
        ("t.csv", "0.png,zero\n1.png,one\n", r"first line is a pair, .*'0\.png' is a file"),
        ("t.tsv", "zero\t0.png\n", r"such as: 'filepath\\ttitle'"),
        (
            "t.csv",
            "title,filepath,title\na,0.png,b\n",
            r"t\.csv: 2 columns are named 'title'.*Rename",
        ),
        ("t.tsv", "filepath\ttitle\tfilepath \n0.png\ta\t1.png\n", "2 .* named 'filepath'"),
        ("t.csv", "filepath,title,class,class\n0.png,a,b,c\n", "2 columns are named 'class'"),
    ],
)
def test_damaged_tables(pictures, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        open_pairs(table(pictures, content, name), name="x")
    assert "`x`" in str(caught.value)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        open_pairs(tmp_path / "t.csv", name="x")


def test_quotes_that_lose_nothing_are_read(pictures):
    path = table(pictures, 'filepath\ttitle\n0.png\ta "b" c\n1.png\t"d" e\n2.png\t"f\n""g"""\n')
    pairs = open_pairs(path, name="x")
    assert [pairs.texts(i) for i in range(3)] == [['a "b" c'], ["d e"], ['f\n"g"']]


def test_blank_cells_and_missing_images_are_broken_pairs(pictures):
    path = table(pictures, "filepath,title\n0.png,\n,only a caption\ngone.png,gone\n5.png,ok\n")
    pairs = open_pairs(path, name="x")
    assert len(pairs) == 4
    for row in range(3):
        with pytest.raises(BrokenPair):
            pairs[row]
    assert pairs.id(1) == "pairs.csv, row 2 without an image"
    assert pairs[3].text == "ok"


def test_manifest_follows_captions_and_sizes(pictures):
    path = table(pictures, "filepath,title\n0.png,a\n1.png,b\n")
    manifest = open_pairs(path, name="x").digest()
    assert manifest == open_pairs(path, name="y").digest()
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes() + b"\0")
    assert manifest != open_pairs(path, name="x").digest()
    table(pictures, "filepath,title\n0.png,a\n1.png,c\n")
    assert manifest != open_pairs(path, name="x").digest()


@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    separator=st.sampled_from(SEPARATORS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    names=st.sampled_from([("filepath", "title"), ("text", "image"), ("a", "caption", "path")]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_table_that_csv_writes_is_read_back(
    tmp_path, rows, separator, quoting, ending, mark, names
):
    """Quoted captions with separators and quotes in them, unicode, CRLF, byte-order mark."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, quoting=quoting, lineterminator=ending)
    writer.writerow(names)
    image_first = names[0] == "filepath"
    for image, text in rows:
        pair = [image, text] if image_first else [text, image]
        writer.writerow(["extra"] * (len(names) - 2) + pair)
    path = tmp_path / "pairs.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    pairs = open_file(path, name="x")
    assert [pairs.id(i) for i in range(len(pairs))] == [image for image, _ in rows]
    assert [pairs.texts(i) for i in range(len(pairs))] == [[text.strip()] for _, text in rows]


@given(st.lists(st.dictionaries(st.sampled_from(["image", "text", "x"]), TEXT), max_size=4))
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_json_lines_are_read_or_named(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    if rows and not {"image", "text"} <= set(rows[0]):
        with pytest.raises(InputError, match="columns found"):
            open_file(path, name="x")
        return
    pairs = open_file(path, name="x")
    assert len(pairs) == len(rows)
    broken = {i for i, texts in enumerate(pairs.every_text()) if not texts}
    for i, row in enumerate(rows):
        assert pairs.id(i) == row.get("image", f"t.jsonl, row {i + 1} without an image")
        assert ("text" in row) == (i not in broken)


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_text_file_makes_it_crash(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8", errors="replace", newline="")
    with contextlib.suppress(InputError):
        open_file(path, name="x")


def test_the_header_with_the_wanted_columns_wins():
    assert detect_separator("image, text\n", None, None) == ","
    assert detect_separator("filepath;title;a,b,c,d,e\n", None, None) == ";"
    assert detect_separator("one|two\n", "one", "two") == "|"
