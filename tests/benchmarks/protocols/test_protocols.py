"""Each protocol from the published form of its data to its table, with a tiny model."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

import fasterase
from benchmarks.protocols.__main__ import PROTOCOLS, main
from benchmarks.protocols.diffusion import Strip, contact_sheet
from fasterase.errors import FaseraseError
from fasterase.files import write_text
from fasterase.models.load import load_model
from fasterase.report.pictures import GAP, MARGIN, PICTURE
from tests import small_models

pytestmark = pytest.mark.filterwarnings("ignore:verdict", "ignore:retain. .* captions seem to name")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    small, tokenizer = small_models.open_clip_vit(), small_models.simple_tokenizer()
    load_model(small, tokenizer=tokenizer).save(folder)
    return str(folder)


@pytest.fixture
def run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_text(
        tmp_path / "erase.yaml",
        "{lr: 1e-4, max_steps: 1, progress: false, device: cpu, batch_size: 8}\n",
    )

    def call(name: str, data: Path, *flags: str) -> str:
        output = tmp_path / "runs"
        given = ["--model", model, "--data", str(data), "--output", str(output), *flags]
        try:
            main([name, "--config", str(config), "--max_pairs", "100", *given])
        except FaseraseError as error:
            return str(error)
        assert not capsys.readouterr().err
        return (output / "table.md").read_text(encoding="utf-8")

    return call


def picture(number: int) -> bytes:
    content = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, 99)
    Image.new("RGB", (40, 30), colour).save(content, "JPEG")
    return content.getvalue()


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, *, each: int) -> list[str]:
    """Write CIFAR-100 in its python form with `each` pictures of each class."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    names = [f"class_{i}" for i in range(94)]
    names += ["apple", "mushroom", "orange", "pear", "sweet_pepper", "woman"]
    numbers = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = list(range(100)) * each
        content = {
            "filenames": [f"{split}_{i}.png" for i in range(len(labels))],
            "fine_labels": labels,
            "coarse_labels": [0] * len(labels),
            "data": numbers.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
        }
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": names, "coarse_label_names": ["things"]})
    )
    # The published files are known by their digests, which a fixture cannot have.
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    return names


def test_cifar100(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, each=2)
    table = run("cifar100", tmp_path, "--cases", "apple")
    (apple,) = table.split("## ")[1:]
    assert apple.startswith("apple: ")
    row = next(line for line in apple.splitlines() if line.startswith("| forget accuracy"))
    assert row.split(" | ")[1:3] == ["↓", "1.0"]
    assert row.endswith(" | 86.08 | 0.00 |")
    assert "| 72.85 | 90.99 |" in apple
    assert "are not known to be these" in apple
    done = fasterase.report.evaluation.Evaluation.from_json(
        tmp_path / "runs" / "apple" / "protocol.json"
    )
    assert done.pairs == {"forget": 2, "forget test": 2, "retain": 100, "retain test": 100}
    monkeypatch.setattr(fasterase, "unlearn", None)  # what is done is not run again
    assert run("cifar100", tmp_path, "--cases", "apple") == table


def test_a_ratio_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, each=20)
    sizes = {c.name: len(c.forget) for c in PROTOCOLS["cifar100"].cases(tmp_path, None)}
    assert list(sizes.values()) == [20, 100, 10, 2]
    assert list(sizes)[3] == "apple, 10 percent of the pictures"
    (pears,) = PROTOCOLS["cifar100"].cases(tmp_path, "pear")
    assert {record.text for record in pears.forget} == {record.text for record in pears.forget[:1]}


def write_flickr(root: Path) -> Path:
    """Write Flickr30K in Karpathy's form: 40 pictures, 16 of them to test on."""
    (root / "flickr30k-images").mkdir(parents=True)
    images = []
    for i in range(40):
        named = "Two dogs run" if i % 4 == 0 else "A hotdog stand"
        (root / "flickr30k-images" / f"{i}.jpg").write_bytes(picture(i))
        raws = [f"{named} {i}.", *(f"Sentence {k} of {i}." for k in range(4))]
        images.append(
            {
                "sentids": list(range(5 * i, 5 * i + 5)),
                "imgid": i,
                "sentences": [
                    {"tokens": raw.lower().split(), "raw": raw, "imgid": i, "sentid": 5 * i + k}
                    for k, raw in enumerate(raws)
                ],
                "split": "test" if i < 16 else "val" if i < 20 else "train",
                "filename": f"{i}.jpg",
            }
        )
    path = root / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return path


@pytest.mark.slow
def test_flickr30k(run, tmp_path: Path) -> None:
    path = write_flickr(tmp_path)
    table = run("flickr30k", tmp_path)
    assert "## dog: " in table
    assert "| forget, image->text R@1, % | ↓ | 25.0 |" in table  # 5 of 20 captions are right
    assert "| retain, text->image R@10, % | ↑ | 83.3 |" in table  # 10 of 12 images
    assert table.count("| 10.55 |") == 0  # only four images name it: R@10 says nothing
    assert "| - | 50.35 |" in table
    assert "--concept 'whale': no images of the train split name it" in run(
        "flickr30k", tmp_path, "--concept", "whale"
    )
    path.write_text("{}")
    assert "is not in Karpathy's form" in run("flickr30k", tmp_path)


@pytest.mark.slow
def test_cc12m(run, tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as archive:
            for i in range(40):
                key = f"{shard:05d}{i:04d}"
                caption = f"an apple on table {i}" if i % 4 == 0 else f"a dog beside pineapple {i}"
                record = {"caption": caption, "url": "https://x/y.jpg", "key": key, "width": 40}
                content = {"jpg": picture(i + 40 * shard), "txt": caption.encode()}
                content["json"] = json.dumps({**record, "status": "success"}).encode()
                for ending, data in content.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    table = run("cc12m", tmp_path)
    assert "## apple: " in table
    assert "| retain accuracy, % | ↑ | 9.1 |" in table  # one of eleven classes
    assert "| - | 97.10 |" in table
    assert "matches no pair of 80" in run("cc12m", tmp_path, "--concept", "whale")


def test_utility_is_compared_picture_by_picture(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"thing {i}" for i in range(20)]
    monkeypatch.setattr("open_clip.IMAGENET_CLASSNAMES", names)
    monkeypatch.setattr("open_clip.OPENAI_IMAGENET_TEMPLATES", [lambda name: f"a {name}."])
    for i in range(20):
        (tmp_path / "imagenet" / f"n{i:08d}").mkdir(parents=True)
        (tmp_path / "imagenet" / f"n{i:08d}" / "1.JPEG").write_bytes(picture(i))
    flickr = write_flickr(tmp_path / "flickr").parent
    other = small_models.open_clip_vit()
    torch.nn.init.normal_(other.text_projection)
    load_model(other, tokenizer=small_models.simple_tokenizer()).save(tmp_path / "other")
    data = ["--imagenet", str(tmp_path / "imagenet"), "--flickr30k", str(flickr)]
    found = {}
    for name, second in (("same", model), ("changed", str(tmp_path / "other"))):
        output = tmp_path / name
        flags = ["--model", second, "--original", model, *data, "--output", str(output)]
        main(["utility", *flags])
        found[name] = json.loads((output / "utility.json").read_text(encoding="utf-8"))
        table = (output / "utility.md").read_text(encoding="utf-8")
        assert table in capsys.readouterr().out
        assert table.count("\n") == 2 + 1 + 6
    assert found["same"]["ImageNet, zero-shot top 1"]["queries"] == 20
    assert found["same"]["Flickr30K, image->text R@10"]["queries"] == 16
    assert found["same"]["Flickr30K, text->image R@1"]["queries"] == 80
    for each in found["same"].values():
        assert (each["low"], each["high"]) == (0, 0), "of one model no picture differs"
    recalls = [found["changed"][f"Flickr30K, {way} R@10"] for way in ("image->text", "text->image")]
    assert any(each["low"] < each["high"] for each in recalls)
    for each in recalls:
        assert each["low"] <= each["erased"] - each["original"] <= each["high"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no data set: give one or more of --imagenet, --coco, --flickr30k"),
        (["--imagenet", "."], "folders n..., not 1,000. Put there the validation pictures"),
        (["--coco", "."], "--coco='.' holds no COCO. Put there `dataset_coco.json`"),
    ],
)
def test_utility_says_which_data_it_needs(data: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(FaseraseError, match=re.escape(said)):
        main(["utility", "--model", "m", "--original", "m", *data, "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_missing_data_is_described(run, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    said = run(name, tmp_path / "empty")
    assert said.startswith("--data=")
    assert "Put there" in said
    assert not (tmp_path / "runs").exists()


def test_unknown_cases_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, each=1)
    assert "--cases pear: no such case. Known: apple, " in run(
        "cifar100", tmp_path, "--cases", "pear"
    )
    assert "--concept 'zebra' is no class of CIFAR-100" in run(
        "cifar100", tmp_path, "--concept", "zebra"
    )


def test_marked_pictures_of_a_strip_are_framed(tmp_path: Path) -> None:
    blue = Image.new("RGB", (40, 40), (0, 0, 255))
    strips = [
        Strip("apple", [blue, blue], [False, True], "#c8102e"),
        Strip("dog", [blue], [True], "#1a7f37"),
    ]
    contact_sheet(strips, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 2 * MARGIN + 2 * PICTURE + GAP
        middle, half = MARGIN + PICTURE + GAP // 2, sheet.height // 2
        boxes = (0, 0, middle, half), (middle, 0, sheet.width, half), (0, half, middle, 2 * half)
        parts = [sheet.convert("RGB").crop(box).getcolors(1 << 20) for box in boxes]
    red, green = (0xC8, 0x10, 0x2E), (0x1A, 0x7F, 0x37)
    found = [{colour for _, colour in part or []} & {red, green} for part in parts]
    assert found == [set(), {red}, {green}]
