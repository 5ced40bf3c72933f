"""Tables (CSV, JSON, Parquet, DataFrames) and folders: columns, quoting, unicode, damage."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fasterase.errors import InputError
from fasterase.pairs.items import Keys
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.read_files import SEPARATORS, detect_separator, open_file
from fasterase.pairs.skips import BrokenPair
from tests.pairs.reading import captions, encoded, picture, read_all, shade

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)


SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))


def table(folder: Path, content: str, name: str = "pairs.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    return path


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_folder(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt"])
def test_open_clip_columns_with_any_separator(pictures, separator, ending):
    lines = ["filepath,title,source", "0.png,zero,a", "1.png,one,b"]
    path = table(pictures, "\n".join(lines).replace(",", separator), f"t{ending}")
    pairs = open_pairs(path, name="forget")
    assert captions(pairs) == [["zero"], ["one"]]
    assert shade(pairs, 1) == 1  # relative to the table
    assert pairs.id(1) == "1.png"
    assert pairs.meta(0) == {"source": "a"}


@pytest.mark.parametrize("form", [Path, pandas.read_csv])
def test_keys_choose_columns(pictures, monkeypatch, form):
    monkeypatch.chdir(pictures)
    source = form(table(pictures, "title,photo,words\nno,2.png,yes\n"))
    pairs = open_pairs(source, name="x", image_key="photo", text_key="words")
    assert (pairs[0].text, shade(pairs, 0)) == ("yes", 2)
    with pytest.raises(InputError, match=r"`text_key`: no column 'word'.*'photo', 'words'"):
        open_pairs(source, name="x", image_key="photo", text_key="word")
    with pytest.raises(InputError, match=r"`x`.*found are \['title', .*'\].*`image_key`"):
        open_pairs(source, name="x")


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_text_holds_no_token_ids_or_pixels(pictures, ending):
    """Such columns of a text file are other data, whatever stands in them."""
    row = {"pixel_values": "x.jpg", "filepath": "0.png", "input_ids": "[1, 2]", "title": "zero"}
    lines = [",".join(row), ",".join(cell.replace(",", "") for cell in row.values())]
    content = json.dumps(row) if ending == ".jsonl" else "\n".join(lines)
    pairs = open_pairs(table(pictures, content, f"t{ending}"), name="x")
    assert captions(pairs) == [["zero"]]
    assert pairs.id(0) == "0.png"
    assert set(pairs.meta(0)) == {"pixel_values", "input_ids"}


@pytest.mark.parametrize(
    ("content", "texts", "meta"),
    [
        (f"filepath,title,page\n0.png,a,{'word ' * 40_000}\n", ["a"], {"page": "word " * 40_000}),
        # Spreadsheets write columns without a name where they are empty.
        ("filepath,title,,\n0.png,zero,,\n", ["zero"], {"": ""}),
        # Quotes that lose nothing.
        (
            'filepath\ttitle\n0.png\ta "b" c\n1.png\t"d" e\n2.png\t"f\n""g"""\n',
            ['a "b" c', "d e", 'f\n"g"'],
            {},
        ),
    ],
    ids=["long cell", "no name", "quotes"],
)
def test_unusual_tables_are_read(pictures, content, texts, meta):
    pairs = open_pairs(table(pictures, content), name="x")
    assert captions(pairs) == [[text] for text in texts]
    assert pairs.meta(0) == meta


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "array.json"])
def test_json_with_alternatives_and_meta(pictures, name, mark):
    rows = [
        {"filepath": "0.png", "title": ["a", "b"], "score": 1.5},
        {"filepath": "1.png", "title": "c"},
        {"filepath": "2.png"},
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    content = json.dumps(rows, indent=1) if name == "array.json" else lines
    pairs = open_pairs(table(pictures, mark + content, name), name="x")
    good, broken = read_all(pairs)
    assert good == {"0.png": ["a", "b"], "1.png": "c"}
    assert broken == {"2.png": "no readable caption"}
    assert shade(pairs, 0) == 0
    assert [pairs.meta(row) for row in range(2)] == [{"score": 1.5}, {}]
    same = open_pairs(table(pictures, lines, "same.jsonl"), name="x")
    assert pairs.digest() == same.digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "\udcff\udcfe\0\1", "not a UTF-8 text file"),
        ("t.csv", "", "no header line"),
        ("t.csv", "filepath,title\n", r"`x` is empty \(.*t.csv\)"),
        ("t.jsonl", "{oops}\n", "line 1 is not valid JSON"),
        (
            "t.jsonl",
            '{"image": "", "text": ""}\n' + "[" * 100_000,
            "line 2 of JSON is nested too deeply",
        ),
        ("t.jsonl", "[1]\n", "line 1 must hold one JSON object; found a list"),
        ("t.jsonl", "", "`x` is empty"),
        ("t.json", "[]", "`x` is empty"),
        ("t.json", '[{"image": "0.png", "text": "a"}, 3]', "entry 2 of the array must hold"),
        ("t.json", '[{"image":\n "0.png"', "line 2 is not valid JSON"),
        ("t.json", '{\n"images": []}', "line 1 is not valid JSON.*one array of objects"),
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


def test_blank_cells_and_missing_images_are_broken_pairs(pictures):
    path = table(pictures, "filepath,title\n0.png,\n,only a caption\ngone.png,gone\n5.png,ok\n")
    good, broken = read_all(open_pairs(path, name="x"))
    assert good == {"5.png": "ok"}
    assert list(broken) == ["0.png", "pairs.csv, row 2 without an image", "gone.png"]


def test_manifest_follows_captions_and_pictures_and_not_their_times(pictures):
    path, picture = table(pictures, "filepath,title\n0.png,a\n1.png,b\n"), pictures / "1.png"
    manifest, before = open_pairs(path, name="x").digest(), picture.read_bytes()
    assert manifest == open_pairs(path, name="y").digest()
    os.utime(picture, (1, 1))
    assert manifest == open_pairs(path, name="x").digest()
    assert len(before) == len(encoded(2))
    for data in (before + b"\0", encoded(2)):
        picture.write_bytes(data)
        assert manifest != open_pairs(path, name="x").digest()
    picture.write_bytes(before)
    assert manifest == open_pairs(path, name="x").digest()
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
@settings(SETTINGS, max_examples=60)
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
    assert list(pairs.every_id()) == [image for image, _ in rows]
    assert captions(pairs) == [[text.strip()] for _, text in rows]


@given(st.lists(st.dictionaries(st.sampled_from(["image", "text", "x"]), TEXT), max_size=4))
@settings(SETTINGS, max_examples=50)
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
@settings(SETTINGS, max_examples=100)
def test_no_text_file_makes_it_crash(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8", errors="replace", newline="")
    with contextlib.suppress(InputError):
        open_file(path, name="x")


def test_the_header_with_the_wanted_columns_wins():
    assert detect_separator("image, text\n", Keys()) == ","
    assert detect_separator("filepath;title;a,b,c,d,e\n", Keys()) == ";"
    assert detect_separator("one|two\n", Keys("one", "two")) == "|"


def test_frame_of_paths(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    paths = ["0.png", str(pictures / "1.png"), "gone.png"]
    columns = {"filepath": paths, "title": ["zero", "one", "x"], "score": [1, 2, 3]}
    frame = pandas.DataFrame(columns)
    pairs = open_pairs(frame[frame.score < 3].iloc[::-1], name="forget")
    monkeypatch.chdir("/")
    assert captions(pairs) == [["one"], ["zero"]]
    assert (shade(pairs, 0), shade(pairs, 1)) == (1, 0)
    assert (pairs.id(1), pairs.meta(1)) == ("0.png", {"score": 1})
    sizes = [os.path.getsize(pictures / name) for name in ("1.png", "0.png")]
    assert pairs.encoded_sizes().tolist() == sizes


@pytest.mark.parametrize("form", ["frame", "parquet"])
def test_missing_cells_are_broken_pairs(pictures, form):
    images = [str(pictures / "0.png"), None, str(pictures / "1.png")]
    texts = [["a"], ["b"], None]
    source, label = pandas.DataFrame({"image": images, "text": texts}), "x"
    if form == "parquet":
        label = "t.parquet"
        source = write_parquet(pictures / label, image=images, text=texts)
    pairs = open_pairs(source, name="x")
    broken = {f"{label}[1]": "no image", f"{label}[2]": "no caption"}
    assert read_all(pairs) == ({images[0]: "a"}, broken)


def test_frame_of_pictures_arrays_and_token_ids():
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


def test_empty_frames_and_other_tables_say_what_to_pass():
    with pytest.raises(InputError, match="`x` is empty"):
        open_pairs(pandas.DataFrame({"image": [], "text": []}), name="x")
    with pytest.raises(InputError, match=r"`x` is a pyarrow Table; pass its \.to_pandas\(\)"):
        open_pairs(pyarrow.table({"image": ["a"], "text": ["b"]}), name="x")


def test_parquet_of_paths(pictures):
    columns = {"filepath": ["0.png"], "title": [["zero", "0"]], "score": [1.5], "none": [None]}
    pairs = open_pairs(str(write_parquet(pictures / "t.parquet", **columns)), name="forget")
    assert read_all(pairs) == ({"0.png": ["zero", "0"]}, {})
    assert pairs.meta(0) == {"score": 1.5}


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": "x.png"}])
def test_parquet_of_encoded_images(tmp_path, wrap):
    file = write_parquet(
        tmp_path / "t.parquet",
        image=[wrap(encoded(3)), None, wrap(b"damaged")],
        text=["a", "b", "c"],
    )
    pairs = open_pairs(file, name="forget")
    good, broken = read_all(pairs)
    assert (good, shade(pairs, 0)) == ({"t.parquet[0]": "a"}, 3)
    assert pairs.encoded_sizes().tolist() == [len(encoded(3)), -1, 7]
    assert broken["t.parquet[1]"] == "no image"
    assert "cannot be decoded" in broken["t.parquet[2]"]


def test_files_of_one_name_do_not_overlap_but_by_content(tmp_path):
    sources = []
    for folder, shades in (("a", (1, 2)), ("b", (3, 2))):
        (tmp_path / folder).mkdir()
        images = list(map(encoded, shades))
        file = write_parquet(tmp_path / folder / "t.parquet", image=images, text=["x", "y"])
        sources.append(open_pairs(file, name=folder))
    assert remove_overlap(*sources)[1] == ["t.parquet[1]"]


def test_damaged_parquet_and_wrong_columns(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"`x`: .*t\.parquet: it cannot be read as Parquet"):
        open_pairs(tmp_path / "t.parquet", name="x")
    with pytest.raises(InputError, match=r"`x`: .*u\.parquet: no column named .*\['url', 'text'\]"):
        open_pairs(write_parquet(tmp_path / "u.parquet", url=["a"], text=["b"]), name="x")


def test_class_folders_caption_by_name(tmp_path):
    write_folder(
        tmp_path,
        {
            "sea_lion/b.PNG": encoded(1),
            "sea_lion/a.jpg": encoded(2, "JPEG"),
            "apple/deep/x.webp": encoded(3, "WEBP"),
            "apple/notes.md": "not an image",
            ".cache/x.png": encoded(4),
        },
    )
    pairs = open_pairs(tmp_path, name="forget")
    assert pairs.classes == ["apple", "sea lion"]
    assert {pairs.id(i): pairs[i].text for i in range(3)} == {
        "apple/deep/x.webp": "apple",
        "sea_lion/a.jpg": "sea lion",
        "sea_lion/b.PNG": "sea lion",
    }
    assert pairs.meta(0) == {"class": "apple"}


def test_captions_beside_images_at_any_depth(tmp_path):
    write_folder(
        tmp_path,
        {
            "x.jpg": encoded(1, "JPEG"),
            "x.txt": " a caption\n",
            "00001/y.png": encoded(2),
            "00001/y.txt": "größe",
            "z.png": encoded(3),
            "bad.png": encoded(4),
            "bad.txt": b"\xff\xfe\xfa",
        },
    )
    pairs = open_pairs(tmp_path, name="retain")
    good, broken = read_all(pairs)
    assert good == {"x.jpg": "a caption", "00001/y.png": "größe"}
    assert broken == dict.fromkeys(["z.png", "bad.png"], "no readable caption")
    assert pairs.classes is None


def test_links_that_lead_back_are_followed_once(tmp_path):
    """Two in one folder would list its pictures without end; one, 41 times."""
    root = tmp_path / "root"
    write_folder(root, {"cat/x.png": encoded(1), "dog/deep/y.png": encoded(2)})
    write_folder(tmp_path, {"more/z.png": encoded(3)})
    for link in ("cat/again", "cat/once_more"):
        (root / link).symlink_to(root / "cat")
    (root / "dog/deep/up").symlink_to(tmp_path)
    (root / "owl").symlink_to(tmp_path / "more")
    (tmp_path / "more/back").symlink_to(root / "dog")
    pairs = open_pairs(root, name="x")
    seen = list(pairs.every_id())
    assert {"cat/x.png", "dog/deep/y.png", "owl/z.png"} <= set(seen)
    assert len(seen) == len(set(seen)) < 20
    assert not [id for id in seen if id.startswith("cat/") and id != "cat/x.png"]


@pytest.mark.parametrize("kind", ["pipe", "caption", "device"])
def test_files_without_an_end_are_broken_pairs(tmp_path, kind):
    write_folder(tmp_path, {"cat/x.png": encoded(1), "cat/x.txt": "cat"})
    if kind == "device":
        rows = "/dev/zero,endless\nhole.png,a hole\ncat/x.png,cat\n"
        path = table(tmp_path, f"filepath,title\n{rows}")
        (tmp_path / "hole.png").touch()
        os.truncate(tmp_path / "hole.png", 1 << 40)
    else:
        path = tmp_path
        os.mkfifo(tmp_path / "cat" / f"y.{'png' if kind == 'pipe' else 'txt'}")
        os.mkfifo(tmp_path / "s.tar")
    if kind == "caption":
        (tmp_path / "cat/y.png").write_bytes(encoded(2))
    good, broken = read_all(open_pairs(str(path), name="x"))
    assert good == {"cat/x.png": "cat"}
    assert len(broken) == 1 + (kind == "device")


def test_folders_without_a_meaning_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"`forget`: folder .* holds neither images"):
        open_pairs(tmp_path, name="forget")
    write_folder(tmp_path, {"x.png": encoded(1), "cat/y.png": encoded(2)})
    with pytest.raises(InputError, match=r"such as x\.png"):
        open_pairs(tmp_path, name="forget")


@pytest.mark.parametrize(
    ("data", "limit", "reason"),
    [
        (encoded(1)[:40], 1000, "image cannot be decoded: "),
        (b"", 1000, "image cannot be decoded: unknown image format"),
        (b"hello", 1000, "image cannot be decoded: unknown image format"),
        (encoded(1), 40, "exceeds limit"),
    ],
    ids=["truncated", "empty", "not an image", "bomb"],
)
def test_damaged_images_are_broken_pairs(tmp_path, monkeypatch, data, limit, reason):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    write_folder(tmp_path, {"cat/x.png": data})
    with pytest.raises(BrokenPair, match=rf"^cat/x\.png: .*{reason}"):
        open_pairs(tmp_path, name="forget")[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.csv", "no file or folder 'nowhere.csv'"),
        ("no/such/folder", "no file or folder 'no/such/folder'"),
        ("", "the path is empty"),
        (["a.tar", "b.csv"], r"a list of paths must name tars; found 'b\.csv'"),
        (["x.jpg", "a caption"], r"pairs as \(image, text\)"),
    ],
)
def test_wrong_paths_say_what_to_give(source, message):
    with pytest.raises(InputError, match=f"`forget`: .*{message}"):
        open_pairs(source, name="forget")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_tars(make_tar, kind):
    shards = [make_tar(f"{n}.tar", {"k.png": encoded(n), "k.txt": f"text {n}"}) for n in range(3)]
    pairs = open_pairs(kind([Path(shards[2]), shards[0]]), name="retain")
    assert list(pairs.every_id()) == ["2.tar/k", "0.tar/k"]
    pattern = shards[0].replace("0.tar", "{0..1}.tar")
    assert len(open_pairs(kind([pattern, shards[2]]), name="retain")) == 3
    with pytest.raises(InputError, match=r"`retain`.*missing, such as .*9\.tar"):
        open_pairs(kind([shards[0], shards[1].replace("1.tar", "9.tar")]), name="retain")
