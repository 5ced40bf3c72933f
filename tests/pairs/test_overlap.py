"""Retain pairs that show a forget image."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils.data import Dataset

from fasterase.errors import InputError
from fasterase.pairs.open import open_pairs
from fasterase.pairs.split import without_overlap


def remaining(retain, forget):
    left, removed = without_overlap(
        open_pairs(retain, name="retain"), open_pairs(forget, name="forget")
    )
    return [left.id(i) for i in range(len(left))], removed


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


def test_tars_and_files_are_compared(pictures, make_tar, encoded, tmp_path):
    shard = make_tar(
        "r.tar",
        {
            f"k{n}{ending}": encoded(n) if ending == ".png" else f"text {n}"
            for n in range(3)
            for ending in (".png", ".txt")
        },
    )
    (pictures / "f.csv").write_text("image,text\n1.png,a\n")
    assert remaining(shard, pictures / "f.csv") == (["r.tar/k0", "r.tar/k2"], ["r.tar/k1"])
    with pytest.raises(InputError, match="all 3 pairs show images"):
        remaining(shard, shard)


def test_files_of_other_sizes_are_not_read(pictures, monkeypatch):
    (pictures / "f.csv").write_text("image,text\n1.png,a\n")
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes() + b"\0")
    (pictures / "r.csv").write_text("image,text\n0.png,a\n2.png,a\n")
    monkeypatch.setattr(
        "fasterase.pairs.source.ImageFiles.encoded_image",
        lambda *_: pytest.fail("read a file"),
    )
    assert remaining(pictures / "r.csv", pictures / "f.csv")[1] == []


def test_tensors_and_pictures_by_content(picture):
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


def test_decoded_pictures_are_found_among_files(pictures, picture, tmp_path):
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
    with pytest.warns(UserWarning, match="`retain` differs at every read"):
        assert remaining(Lazy(10, noise=1.0), forget)[1] == []
