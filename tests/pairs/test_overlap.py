"""Retain pairs with forget images are removed: by row, by location, by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fasterase import split
from fasterase.errors import InputError
from fasterase.pairs import overlap
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from tests.pairs.reading import encoded, picture, samples


def remaining(retain, forget):
    opened = open_pairs(retain, name="retain"), open_pairs(forget, name="forget")
    left, removed = remove_overlap(*opened)
    return list(left.every_id()), removed


def test_same_file_by_another_path_and_copies_by_content(pictures, tmp_path):
    (tmp_path / "link").symlink_to(pictures)
    copies = tmp_path / "copies"
    copies.mkdir()
    for n in (0, 2, 4):
        shutil.copy(pictures / f"{n}.png", copies / f"copy{n}.png")
    (tmp_path / "f.csv").write_text("image,text\nlink/1.png,a\ncopies/copy2.png,b\n")
    (tmp_path / "r.csv").write_text(
        "image,text\n" + "".join(f"pictures/{n}.png,other\n" for n in range(5)) + "gone.png,x\n"
    )
    left, removed = remaining(tmp_path / "r.csv", tmp_path / "f.csv")
    assert removed == ["pictures/1.png", "pictures/2.png"]
    assert left == ["pictures/0.png", "pictures/3.png", "pictures/4.png", "gone.png"]


def test_tars_and_files_are_compared(pictures, make_tar, tmp_path):
    shard = make_tar("r.tar", samples({n: f"text {n}" for n in range(3)}))
    (pictures / "f.csv").write_text("image,text\n1.png,a\n")
    assert remaining(shard, pictures / "f.csv") == (["r.tar/k0", "r.tar/k2"], ["r.tar/k1"])
    with pytest.raises(InputError, match="all 3 pairs show images"):
        remaining(shard, shard)


@pytest.mark.parametrize("form", ["table", "list"])
def test_files_of_other_sizes_and_in_the_same_place_are_not_read(pictures, reads, form):
    def pairs_of(*numbers):
        if form == "list":
            return [(str(pictures / f"{n}.png"), "a") for n in numbers]
        table = pictures / f"{numbers[0]}.csv"
        table.write_text("image,text\n" + "".join(f"{n}.png,a\n" for n in numbers))
        return table

    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes() + b"\0")
    (pictures / "4.png").write_bytes((pictures / "1.png").read_bytes() + b"\0")
    _, removed = remaining(pairs_of(0, 1, 2), pairs_of(4, 1))
    assert [Path(id).name for id in removed] == ["1.png"]
    assert reads == []
    shutil.copy(pictures / "4.png", pictures / "5.png")
    _, removed = remaining(pairs_of(0, 1, 5), pairs_of(4, 1))
    assert [Path(id).name for id in removed] == ["1.png", "5.png"]
    assert sorted(Path(id).name for _, id in reads) == ["4.png", "5.png"]


def test_tensors_and_pictures_by_content():
    forget = [(torch.full((3, 2, 2), 1.0), "a"), (picture(1), "b"), (None, "broken")]
    retain = [
        (torch.full((3, 2, 2), 1.0), "c"),
        (torch.full((3, 2, 2), 2.0), "a"),
        (picture(1), "b"),
        (picture(2), "b"),
        (torch.ones(3, 2, 2, dtype=torch.uint8), "a"),
        (None, "broken"),
    ]
    left, removed = remaining(retain, forget)
    assert removed == ["retain[0]", "retain[2]"]
    assert left == ["retain[1]", "retain[3]", "retain[4]", "retain[5]"]


def test_decoded_pictures_are_found_among_files(pictures, tmp_path):
    (pictures / "r.csv").write_text("image,text\n0.png,a\n3.png,a\n")
    assert remaining(pictures / "r.csv", [(picture(3), "x")])[1] == ["3.png"]


class Lazy(Dataset):
    def __init__(self, n, noise=0.0):
        self.n, self.noise = n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.full((3, 2, 2), float(index)) + self.noise * torch.rand(()), "text"


def test_what_cannot_be_compared_is_said():
    forget = [(torch.zeros(3, 2, 2), "a")]
    assert remaining(Lazy(10), forget)[1] == ["retain[0]"]
    with pytest.warns(UserWarning, match="`retain` is too large to decode"):
        assert remaining(Lazy(20_001), forget)[1] == []
    with pytest.warns(UserWarning, match="`retain` differs on every read"):
        assert remaining(Lazy(10, noise=1.0), forget)[1] == []


@pytest.fixture
def shard(make_tar):
    """A shard of images 0 ... 4 and 2 again; captions `a`, `b`, `c`, `a`, `b`, `c`."""
    entries = {}
    for number, shade in enumerate((0, 1, 2, 3, 4, 2)):
        entries |= {f"k{number}.png": encoded(shade), f"k{number}.txt": "abc"[number % 3]}
    return make_tar("s.tar", entries)


def test_sets_over_one_index_are_compared_by_row_without_reading_an_image(shard, reads):
    forget, _ = split(shard, forget="c")
    _, retain = split(open_pairs(shard, name="x"), forget="b")
    assert remaining(retain, forget) == (["s.tar/k0", "s.tar/k3"], ["s.tar/k2", "s.tar/k5"])
    assert remaining(forget.base, forget)[1] == ["s.tar/k2", "s.tar/k5"]
    assert remaining(retain[:1], forget)[1] == []
    with pytest.raises(InputError, match="all 2 pairs show images"):
        remaining(forget, forget.base)
    assert reads == []


def test_a_shard_named_twice_has_equal_images_in_other_rows(shard, reads):
    pairs = open_pairs([shard, shard], name="x")
    forget, retain = pairs.select([1]), pairs.select([3, 7])
    assert remaining(retain, forget) == (["s.tar/k3"], ["s.tar/k1"])


def test_of_very_many_files_only_those_with_equal_captions_are_read(
    shard, reads, make_tar, monkeypatch
):
    shades = {"same": (2, "c"), "caption": (2, "other"), "image": (200, "c"), "none": (9, "x")}
    entries = {}
    for key, (shade, caption) in shades.items():
        entries |= {f"{key}.png": encoded(shade), f"{key}.txt": caption}
    retain = make_tar("r.tar", entries)
    assert remaining(retain, shard)[1] == ["r.tar/same", "r.tar/caption"]
    monkeypatch.setattr(overlap, "MOST_READ", 3)
    reads.clear()
    with pytest.warns(UserWarning, match=r"`retain`: 4 images have the size .* only the 2 of them"):
        assert remaining(retain, shard)[1] == ["r.tar/same"]
    assert len(reads) == 4
