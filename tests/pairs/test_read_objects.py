"""Pairs from Python objects: every accepted form, class numbers among them, and helpful errors for
the others."""

from __future__ import annotations

import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder, FakeData, ImageFolder

from fasterase.errors import InputError
from fasterase.pairs.items import normalize_class_name
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import split
from tests.pairs.reading import captions, encoded, picture, read_all, shade


def floats(n: int) -> list[torch.Tensor]:
    return [torch.full((3, 4, 4), float(i)) for i in range(n)]


def ids(n: int) -> list[torch.Tensor]:
    return [torch.tensor([1, i + 2, 0]) for i in range(n)]


class Pairs(Dataset):
    """Map-style, with items made by a function."""

    def __init__(self, make, n: int = 5) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        return self.make(index)


class Stream(IterableDataset):
    def __init__(self, items) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


TUPLES = list(zip(floats(4), ids(4), strict=True))
TEXT_TUPLES = [(image, f"caption {i}") for i, image in enumerate(floats(4))]
DICTS = [{"image": image, "text": text} for image, text in TEXT_TUPLES]
TOKEN_DICTS = [
    {"pixel_values": image, "input_ids": row, "attention_mask": torch.tensor([1, 1, 0])}
    for image, row in TUPLES
]
STACKED = torch.stack(floats(4))

FORMS = {
    "list of tuples": (TEXT_TUPLES, "text"),
    "tuple of lists": (tuple(list(pair) for pair in TEXT_TUPLES), "text"),
    "list of dicts": (DICTS, "text"),
    "caption key": ([{"image": d["image"], "caption": d["text"]} for d in DICTS], "text"),
    "token ids": (TUPLES, "ids"),
    "token ids [1, L]": ([(image, row[None]) for image, row in TUPLES], "ids"),
    "token dicts": (TOKEN_DICTS, "ids"),
    "token dicts with a leading 1": (
        [{key: value[None] for key, value in item.items()} for item in TOKEN_DICTS],
        "ids",
    ),
    "ids as lists": ([(image, row.tolist()) for image, row in TUPLES], "ids"),
    "map-style dataset": (Pairs(lambda i: TEXT_TUPLES[i], 4), "text"),
    "tensor dataset": (TensorDataset(STACKED, torch.stack(ids(4))), "ids"),
    "data loader": (DataLoader(Pairs(lambda i: TEXT_TUPLES[i], 4), batch_size=3), "text"),
    "data loader of a list": (DataLoader(TOKEN_DICTS, batch_size=2, shuffle=True), "ids"),
    "data loader of a stream": (DataLoader(Stream(TEXT_TUPLES), batch_size=3), "text"),
    "iterable dataset": (Stream(DICTS), "text"),
    "generator": (lambda: (pair for pair in TEXT_TUPLES), "text"),
    "batch of tensors": (
        [(STACKED[:3], ["caption 0", "caption 1", "caption 2"]), (STACKED[3:], ["caption 3"])],
        "text",
    ),
    "one batch": ((STACKED, [f"caption {i}" for i in range(4)]), "text"),
    "one batch dict": ({"image": STACKED, "text": [f"caption {i}" for i in range(4)]}, "text"),
    "batches of a loader": (lambda: iter(DataLoader(TOKEN_DICTS, batch_size=3)), "ids"),
    "batches [B, 1, L]": ([(STACKED, torch.stack(ids(4))[:, None])], "ids"),
    "list columns": ([(floats(4), [f"caption {i}" for i in range(4)])], "text"),
    "lists of pairs": ([TEXT_TUPLES[:2], TEXT_TUPLES[2:]], "text"),
    "lists of dicts": ([DICTS[:2], DICTS[2:]], "text"),
    "dataset of batches": (
        Pairs(
            lambda i: (STACKED[2 * i : 2 * i + 2], [f"caption {2 * i}", f"caption {2 * i + 1}"]), 2
        ),
        "text",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same_pairs(form):
    source, kind = FORMS[form]
    if callable(source) and not isinstance(source, Dataset):
        source = source()
    pairs = open_pairs(source, name="forget")
    assert len(pairs) == 4
    assert pairs.stable
    for i in range(4):
        record = pairs[i]
        assert record.id == pairs.id(i) == f"forget[{i}]"
        assert torch.equal(record.image, floats(4)[i])
        if kind == "text":
            assert record.text == f"caption {i}"
            assert pairs.texts(i) == [f"caption {i}"]
        else:
            assert torch.equal(record.text, ids(4)[i])
            assert torch.equal(pairs.texts(i), ids(4)[i])
        if form in ("token dicts", "batches of a loader"):
            assert record.mask.tolist() == [1, 1, 0]


def test_a_list_of_str_beside_one_image_is_its_alternatives():
    pairs = open_pairs([(picture(1), ["a", "b"]), (floats(1)[0], ["c", "", "d", "e"])], name="x")
    assert len(pairs) == 2
    assert pairs[0].text == ["a", "b"]
    assert pairs.texts(1) == ["c", "d", "e"]


def test_keys_name_columns_of_dicts_and_of_batches():
    items = [{"img": image, "label_text": text, "source": "s"} for image, text in TEXT_TUPLES]
    pairs = open_pairs(items, name="x", image_key="img", text_key="label_text")
    assert pairs[1].text == "caption 1"
    assert pairs.meta(1) == {"source": "s"}
    batch = {"img": STACKED, "label_text": ["a", "b", "c", "d"]}
    assert open_pairs([batch], name="x", image_key="img", text_key="label_text")[3].text == "d"
    with pytest.raises(InputError, match=r"`forget`: `text_key`: no column 'x'.*'image', 'text'"):
        open_pairs(DICTS, name="forget", text_key="x")


def test_numpy_images_are_pictures_in_colour_or_grey():
    colour = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    grey = colour[..., 0]
    pairs = open_pairs([(colour, "a"), (grey, "b"), (grey[..., None], "c")], name="x")
    assert np.array_equal(np.asarray(pairs[0].image), colour)
    assert pairs[0].image.mode == "RGB"
    for index in (1, 2):
        assert np.array_equal(np.asarray(pairs[index].image), grey)
        assert pairs[index].image.mode == "L"
    for batch in ((colour[None].repeat(2, 0), ["a", "b"]), [(colour, "a"), (grey, "b")]):
        assert [record.text for record in open_pairs([batch], name="x")] == ["a", "b"]


def test_files_are_listed_with_other_columns_and_beside_broken_pairs(pictures):
    file = str(pictures / "2.png")
    items = [
        {"path": file, "captions": ["a", "b"], "year": 2019},
        {"path": pictures / "none.png", "captions": "c"},
        {"path": None, "captions": "d"},
    ]
    pairs = open_pairs(items, name="x")
    assert (shade(pairs, 0), pairs[0].text) == (2, ["a", "b"])
    assert [pairs.meta(row) for row in range(2)] == [{"year": 2019}, {}]
    _, broken = read_all(pairs)
    assert list(broken) == [str(pictures / "none.png"), "x[2]"]
    assert "none.png cannot be read: No such file" in broken[str(pictures / "none.png")]
    assert broken["x[2]"] == "no image"
    assert pairs.encoded_sizes().tolist() == [os.path.getsize(file), -1, -1]


def test_encoded_images_are_read_as_files_are():
    pairs = open_pairs([(encoded(3), "a"), (None, "b")], name="x")
    assert (shade(pairs, 0), read_all(pairs)) == (3, ({"x[0]": "a"}, {"x[1]": "no image"}))
    mixed = open_pairs([(encoded(3), "a"), (picture(4), "b")], name="x")
    assert [shade(mixed, row) for row in range(2)] == [3, 4]


@pytest.mark.parametrize(
    "bad",
    [
        (None, "text"),
        (torch.zeros(3, 4, 4), None),
        (torch.zeros(3, 4, 4), float("nan")),
        (torch.zeros(3, 4, 4), np.float32("nan")),
        (torch.zeros(3, 4, 4), [float("nan"), None]),
        (float("nan"), "text"),
        (torch.zeros(3, 4, 4), " "),
        (torch.zeros(3, 4, 4), [""]),
    ],
)
def test_missing_parts_make_a_broken_pair_not_an_error(bad):
    pairs = open_pairs([TEXT_TUPLES[0], bad], name="forget")
    with pytest.raises(BrokenPair) as caught:
        pairs[1]
    assert caught.value.id == "forget[1]"


def test_an_item_that_fails_is_a_broken_pair_and_all_of_them_an_error():
    def failing(*indices):
        def make(index: int):
            if index in indices:
                raise OSError("disk on fire")
            return TEXT_TUPLES[index]

        return open_pairs(Pairs(make, 4), name="retain")

    with pytest.raises(BrokenPair, match="OSError: disk on fire"):
        failing(1)[1]
    with pytest.raises(InputError, match=r"`retain`: no pair can be read.*disk on fire"):
        failing(0, 1, 2, 3)


def test_random_augmentation_is_seen():
    flips = Pairs(lambda i: (TEXT_TUPLES[1][0] * (torch.rand(()) < 0.5), "text"), 50)
    torch.manual_seed(0)
    assert not open_pairs(flips, name="x").stable
    texts = Pairs(lambda i: (TEXT_TUPLES[0][0], f"text {torch.rand(())}"), 5)
    assert not open_pairs(texts, name="x").stable


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "`forget` is empty"),
        ((), "`forget` is empty"),
        (iter(()), "`forget` is empty"),
        (Pairs(lambda i: None, 0), "`forget` is empty"),
        (None, "`forget` must be a dataset.*found NoneType"),
        (7, "`forget` must be a dataset.*found int"),
        ([1, 2], r"`forget`.*a pair must be .*found 1"),
        ([(torch.zeros(3, 4, 4), "a", "b")], "tuple of 3"),
        ([{"image": 1, "label": 2}], r"columns found are \['image', 'label'\].*`text_key`"),
        ([{"picture": 1, "text": "a"}], r"columns found are \['picture', 'text'\].*`image_key`"),
        ([(torch.zeros(3, 4, 4), 3)], "found 3: that looks like a class number"),
        ([(torch.zeros(3, 4, 4), torch.tensor(3))], "looks like a class number"),
        ([(torch.zeros(3, 4, 4), torch.zeros(3))], "found a tensor .3. of float32"),
        ([(torch.zeros(4, 4), "a")], "image tensor must be .* found a tensor .4, 4."),
        ([(torch.zeros(4, 4, 3, dtype=torch.uint8), "a")], r"\[3, height, width\]"),
        ([(torch.zeros(3, 4, 4, dtype=torch.int64), "a")], "of int64"),
        ([(np.zeros((4, 4, 3)), "a")], r"\[4, 4, 3\] of float64. Scale it to 0..255"),
        ([(np.zeros((3, 4, 4), np.uint8), "a")], r"image.transpose\(1, 2, 0\)"),
        ([(np.zeros((4, 5, 4), np.uint8), "a")], r"found an array \[4, 5, 4\] of uint8.*alpha"),
        ([(np.zeros(4, np.uint8), "a")], r"shape \[height, width, 3\], or \[height, width\]"),
        ([(torch.zeros(2, 3, 4, 4), ["a", "b", "c"])], "2 images and 3 texts"),
        ([(torch.zeros(2, 3, 4, 4), "a")], "2 images needs as many texts; found str"),
        ([("a", Image.new("RGB", (4, 4)))], r"found Image: a pair is \(image, text\)"),
        ([(["a", "b"], Image.new("RGB", (4, 4)))], "found Image. .*the image comes first"),
        (
            [TOKEN_DICTS[0] | {"attention_mask": torch.tensor([1])}],
            "attention_mask has 1 entries for 3 token ids",
        ),
        (DataLoader(Pairs(lambda i: i, 4), collate_fn=list), r"pass iter\(loader\) instead"),
    ],
)
def test_wrong_inputs_are_named(source, message):
    with pytest.raises(InputError, match=message):
        open_pairs(source, name="forget")


def test_items_are_read_once_for_all_manifests():
    read = []
    pairs = open_pairs(Pairs(lambda i: (read.append(i), TEXT_TUPLES[i])[1], 3), name="x")
    read.clear()
    assert pairs.digest() == pairs.digest()
    assert sorted(read) == [0, 1, 2]


def test_manifest_follows_captions_pixels_and_order():
    (image, _), *others = TEXT_TUPLES
    manifest = open_pairs(TEXT_TUPLES, name="a").digest()
    assert manifest == open_pairs(list(TEXT_TUPLES), name="b").digest()
    for first in ((image + 1, "caption 0"), (image, "other")):
        assert manifest != open_pairs([first, *others], name="a").digest()
    assert manifest != open_pairs(TEXT_TUPLES[::-1], name="a").digest()


def test_sources_pickle_for_spawned_workers():
    pairs = pickle.loads(pickle.dumps(open_pairs([*TEXT_TUPLES, (None, "x")], name="x")))
    assert pairs[1].text == "caption 1"
    with pytest.raises(BrokenPair):
        pairs[4]


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
    def dataset(self, *, classes=(), **columns):
        """Three pictures, columns, and columns of class numbers (`classes`: their names)."""
        columns = {"image": [picture(i) for i in range(3)], **columns}
        source = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        for name in classes:
            source = source.cast_column(name, datasets.ClassLabel(names=["apple", "sea_lion"]))
        return source

    def test_columns_by_name(self, monkeypatch):
        source = self.dataset(caption=["a", "b", "c"], source=["x", "y", "z"])
        pairs = open_pairs(source, name="retain")
        assert len(pairs) == 3
        assert pairs.texts(1) == ["b"]
        assert pairs.meta(1) == {"source": "y"}
        assert pairs[1].image.getpixel((0, 0)) == picture(1).getpixel((0, 0))
        assert pairs.stable
        # Captions do not decode images.
        monkeypatch.setattr(datasets.Image, "decode_example", None)
        assert pairs.texts(2) == ["c"]

    def test_alternatives_and_keys(self):
        source = self.dataset(alt=[["a", "b"], ["c"], ["d"]])
        assert open_pairs(source, name="retain", text_key="alt")[0].text == ["a", "b"]

    def test_manifest_repeats(self):
        first, again, other = (
            open_pairs(self.dataset(text=list(texts)), name="x").digest()
            for texts in ("abc", "abc", "abd")
        )
        assert first == again != other

    def test_user_transform_keeps_working(self):
        source = self.dataset(text=["a", "b", "c"])
        source.set_transform(
            lambda rows: {"image": rows["image"], "text": [t.upper() for t in rows["text"]]}
        )
        assert open_pairs(source, name="x").texts(1) == ["B"]

    def test_wrong_columns_and_missing_split(self):
        source = self.dataset(label=[0, 1, 2])
        with pytest.raises(InputError, match=r"`x`.*\['image', 'label'\]"):
            open_pairs(source, name="x")
        splits = datasets.DatasetDict({"train": source})
        with pytest.raises(InputError, match=r"DatasetDict.*\['train'\]"):
            open_pairs(splits, name="x")

    @pytest.mark.parametrize("form", [None, "torch"])
    def test_names_of_the_label_column(self, form, monkeypatch):
        source = self.dataset(classes=["label"], label=[0, 1, 1], shade=[0, 1, 2])
        pairs = open_pairs(source.with_format(form), name="x")
        assert pairs.classes == ["apple", "sea lion"]
        assert captions(pairs) == [["apple"], ["sea lion"], ["sea lion"]]
        assert pairs[1].text == "sea lion"
        monkeypatch.setattr(datasets.Image, "decode_example", None)
        shade = {} if form else {"shade": 1}
        assert pairs.meta(1) == {**shade, "class": "sea lion"}

    def test_a_caption_column_wins_unless_the_label_is_named(self):
        source = self.dataset(classes=["label"], label=[0, 1, 1], text=["a", "b", "c"])
        assert captions(open_pairs(source, name="x")) == [["a"], ["b"], ["c"]]
        named = open_pairs(source, name="x", text_key="label")
        assert captions(named) == [["apple"], ["sea lion"], ["sea lion"]]

    def test_columns_of_cifar(self):
        source = self.dataset(classes=["fine_label"], fine_label=[0, 1, 1])
        pairs = open_pairs(source.rename_column("image", "img"), name="x")
        assert pairs[1].text == "sea lion"

    def test_several_label_columns_need_a_choice(self):
        source = self.dataset(classes=["fine", "coarse"], fine=[0, 1, 1], coarse=[0, 0, 0])
        with pytest.raises(InputError, match=r"'fine', 'coarse'.*`text_key`"):
            open_pairs(source, name="x")
        assert open_pairs(source, name="x", text_key="fine").texts(1) == ["sea lion"]

    def test_streams_and_transforms(self):
        source = self.dataset(classes=["label"], label=[0, 1, 1], shade=[0, 1, 2])
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
        pairs = open_pairs(self.dataset(classes=["label"], label=[0, -1, None]), name="x")
        for row in (1, 2):
            with pytest.raises(BrokenPair, match="no caption"):
                pairs[row]
