"""Datasets of class numbers: torchvision's, subsets of them, Hugging Face `ClassLabel` columns."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset
from torchvision.datasets import DatasetFolder, FakeData, ImageFolder

from fasterase.errors import InputError
from fasterase.pairs.items import normalize_class_name
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import split
from tests.pairs.reading import captions, encoded, picture, shade


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["apple", "sea_lion"]):
        (tmp_path / name).mkdir()
        for n in range(2):
            (tmp_path / name / f"{n}.png").write_bytes(encoded(10 * number + n))
    return tmp_path


class Numbered(Dataset):
    """Images with class numbers, as torchvision's datasets keep them."""

    def __init__(self, numbers, classes=("apple", "pear"), **attributes) -> None:
        self.numbers, self.classes = numbers, list(classes)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        return torch.full((3, 2, 2), float(index)), self.numbers[index]


@pytest.mark.parametrize(
    "open_folder", [ImageFolder, lambda path: DatasetFolder(path, lambda file: file, (".png",))]
)
def test_torchvision_folders_have_class_names_as_captions(folder, open_folder):
    pairs = open_pairs(open_folder(str(folder)), name="forget")
    assert pairs.classes == ["apple", "sea lion"]
    forget = split(open_folder(str(folder)), forget=["Sea Lion"])[0]
    assert repr(forget).startswith("forget pairs: 2 of 4 of a")
    assert pairs[2].text == "sea lion"
    assert pairs[2].meta == pairs.meta(2) == {"class": "sea lion"}
    assert shade(pairs, 2) == 10
    assert captions(pairs) == [["apple"], ["apple"], ["sea lion"], ["sea lion"]]


@pytest.mark.parametrize("first", [None, b"damaged"])
def test_captions_are_found_without_reading_an_image(folder, first):
    """Also if the first item is broken, which does not hide the classes."""
    if first is not None:
        (folder / "apple" / "0.png").write_bytes(first)
    pairs = open_pairs(ImageFolder(str(folder)), name="x")
    for file in folder.rglob("*.png"):
        file.unlink()
    assert captions(pairs) == [["apple"], ["apple"], ["sea lion"], ["sea lion"]]
    assert pairs.meta(0) == {"class": "apple"}


def test_subsets_keep_their_classes(folder):
    inner = Subset(ImageFolder(str(folder)), [3, 0, 2])
    pairs = open_pairs(Subset(inner, [0, 1]), name="x")
    assert pairs.classes == ["apple", "sea lion"]
    assert captions(pairs) == [["sea lion"], ["apple"]]
    assert [record.text for record in pairs] == ["sea lion", "apple"]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"targets": [1, 0, 1]},
        {"targets": torch.tensor([1, 0, 1])},
        {"labels": np.array([1, 0, 1])},
        {"targets": [0, 0, 0]},  # not what the items hold
        {"targets": [1]},
    ],
)
@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_class_numbers_in_any_form(attributes, kind):
    pairs = open_pairs(Numbered([kind(1), kind(0), kind(1)], **attributes), name="x")
    assert captions(pairs) == [["pear"], ["apple"], ["pear"]]
    assert pairs[1].text == "apple"


def test_several_names_of_a_class_and_unlabelled_items():
    names = [("tench", "Tinca tinca"), ("sea_lion",)]
    pairs = open_pairs(Numbered([0, 1, -1], names), name="x")
    assert (pairs[0].text, pairs[1].text) == ("tench", "sea lion")
    with pytest.raises(BrokenPair, match="no caption"):
        pairs[2]


def test_numbers_that_name_no_class_are_errors():
    with pytest.raises(InputError, match="`x`: the class number 7 is none of the 2 classes"):
        open_pairs(Numbered([0, 7]), name="x")
    with pytest.raises(InputError, match="target_transform"):
        open_pairs(Numbered([0, 1], target_transform=lambda number: 1 - number), name="x")
    with pytest.raises(InputError, match="give the class name as caption"):
        open_pairs(FakeData(2, (3, 4, 4)), name="x")


def test_captions_of_a_dataset_with_classes_are_left_alone():
    pairs = open_pairs(Numbered(["a red apple", "a pear"]), name="x")
    assert pairs[0].text == "a red apple"
    assert pairs.classes is None


def test_names_of_folders_become_captions():
    names = ["hot_dog", "pine apple", "_a__b_"]
    assert list(map(normalize_class_name, names)) == ["hot dog", "pine apple", "a b"]


class TestHuggingFace:
    def dataset(self, **columns):
        features = {name: datasets.ClassLabel(names=["apple", "sea_lion"]) for name in columns}
        features |= {"image": datasets.Image(), "shade": datasets.Value("int64")}
        images = {"image": [picture(i) for i in range(3)], "shade": [0, 1, 2]}
        return datasets.Dataset.from_dict(images | columns, datasets.Features(features))

    @pytest.mark.parametrize("form", [None, "torch"])
    def test_names_of_the_label_column(self, form, monkeypatch):
        pairs = open_pairs(self.dataset(label=[0, 1, 1]).with_format(form), name="x")
        assert pairs.classes == ["apple", "sea lion"]
        assert captions(pairs) == [["apple"], ["sea lion"], ["sea lion"]]
        assert pairs[1].text == "sea lion"
        monkeypatch.setattr(datasets.Image, "decode_example", None)
        shade = {} if form else {"shade": 1}
        assert pairs.meta(1) == {**shade, "class": "sea lion"}

    def test_a_caption_column_wins_unless_the_label_is_named(self):
        source = self.dataset(label=[0, 1, 1]).add_column("text", ["a", "b", "c"])
        assert captions(open_pairs(source, name="x")) == [["a"], ["b"], ["c"]]
        named = open_pairs(source, name="x", text_key="label")
        assert captions(named) == [["apple"], ["sea lion"], ["sea lion"]]

    def test_columns_of_cifar(self):
        source = self.dataset(fine_label=[0, 1, 1]).rename_column("image", "img")
        assert open_pairs(source, name="x")[1].text == "sea lion"

    def test_several_label_columns_need_a_choice(self):
        source = self.dataset(fine=[0, 1, 1], coarse=[0, 0, 0])
        with pytest.raises(InputError, match=r"'fine', 'coarse'.*`text_key`"):
            open_pairs(source, name="x")
        assert open_pairs(source, name="x", text_key="fine").texts(1) == ["sea lion"]

    def test_streams_and_transforms(self):
        source = self.dataset(label=[0, 1, 1])
        stream = open_pairs(source.to_iterable_dataset(), name="x")
        assert captions(stream)[1] == ["sea lion"]
        assert stream.classes == ["apple", "sea lion"]
        images = source.with_transform(
            lambda rows: {
                "pixel_values": [torch.full((3, 2, 2), float(n)) for n in rows["shade"]],
                "label": rows["label"],
            }
        )
        pairs = open_pairs(images, name="x")
        assert pairs[1].text == "sea lion"
        assert torch.equal(pairs[1].image, torch.ones(3, 2, 2))

    def test_unlabelled_rows_are_broken_pairs(self):
        pairs = open_pairs(self.dataset(label=[0, -1, None]), name="x")
        for row in (1, 2):
            with pytest.raises(BrokenPair, match="no caption"):
                pairs[row]
