"""Opening folders: class-per-folder directories, pictures with caption files, damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_class_folders_caption_by_name(tmp_path, encoded):
    write(
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


def test_captions_beside_images_at_any_depth(tmp_path, encoded):
    write(
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
    texts, reasons = {}, []
    for i in range(len(pairs)):
        try:
            texts[pairs.id(i)] = pairs[i].text
        except BrokenPair as broken:
            reasons.append(broken.reason)
    assert reasons == ["no readable caption"] * 2
    assert texts == {"x.jpg": "a caption", "00001/y.png": "größe"}
    assert pairs.classes is None


def test_folders_without_a_meaning_are_refused(tmp_path, encoded):
    with pytest.raises(InputError, match=r"`forget`: folder .* holds neither images"):
        open_pairs(tmp_path, name="forget")
    write(tmp_path, {"x.png": encoded(1), "cat/y.png": encoded(2)})
    with pytest.raises(InputError, match=r"such as x\.png"):
        open_pairs(tmp_path, name="forget")


@pytest.mark.parametrize("damage", ["truncated", "empty", "not an image"])
def test_damaged_images_are_broken_pairs(tmp_path, encoded, damage):
    data = encoded(1)
    content = {"truncated": data[: len(data) // 2], "empty": b"", "not an image": b"hello"}[damage]
    write(tmp_path, {"cat/x.png": content})
    with pytest.raises(BrokenPair, match="image cannot be decoded") as caught:
        open_pairs(tmp_path, name="forget")[0]
    assert caught.value.id == "cat/x.png"


def test_decompression_bombs_are_broken_pairs(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40)
    write(tmp_path, {"cat/x.png": encoded(1)})
    with pytest.raises(BrokenPair, match="exceeds limit"):
        open_pairs(tmp_path, name="forget")[0]


@pytest.mark.parametrize("path", ["nowhere.csv", "no/such/folder", ""])
def test_missing_paths_are_named(path):
    with pytest.raises(InputError, match="`forget`"):
        open_pairs(path, name="forget")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_tars(make_tar, encoded, kind):
    shards = [make_tar(f"{n}.tar", {"k.png": encoded(n), "k.txt": f"text {n}"}) for n in range(3)]
    pairs = open_pairs(kind([Path(shards[2]), shards[0]]), name="retain")
    assert [pairs.id(i) for i in range(len(pairs))] == ["2.tar/k", "0.tar/k"]
    pattern = shards[0].replace("0.tar", "{0..1}.tar")
    assert len(open_pairs(kind([pattern, shards[2]]), name="retain")) == 3
    with pytest.raises(InputError, match=r"`retain`.*missing, such as .*9\.tar"):
        open_pairs(kind([shards[0], shards[1].replace("1.tar", "9.tar")]), name="retain")


def test_a_list_of_other_paths_says_what_to_give():
    with pytest.raises(InputError, match=r"`x`: a list of paths must name tars; found 'b\.csv'"):
        open_pairs(["a.tar", "b.csv"], name="x")
    with pytest.raises(InputError, match=r"pairs as \(image, text\)"):
        open_pairs(["x.jpg", "a caption"], name="x")
