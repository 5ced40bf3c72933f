"""The diffusion check from folders of its models to the table, with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.protocols import diffusion
from benchmarks.protocols.__main__ import main
from benchmarks.protocols.diffusion_models import Detector, TextToImage
from fasterase.errors import FaseraseError
from fasterase.models.load import load_model
from tests import small_models, tiny_diffusion

pytestmark = pytest.mark.slow

TEMPLATES = ("a photo of a {}", "A {} in snow")
IMAGES = 3
# Some of the tiny detector's scores are above it.
THRESHOLD = 0.55


class Models(NamedTuple):
    pipeline: str
    original: str  # the CLIP whose text tower the pipeline has
    erased: str  # the same with another text tower
    detector: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    clip = tiny_diffusion.clip()
    encoder = tiny_diffusion.text_encoder(seed=9)
    getattr(encoder, "text_model", encoder).load_state_dict(clip.text_model.state_dict())
    names = Models(
        tiny_diffusion.save_pipeline(folder / "pipeline", encoder, tiny_diffusion.clip_tokenizer()),
        str(folder / "original"),
        str(folder / "erased"),
        tiny_diffusion.save_detector(folder / "detector", "Owlv2"),
    )
    load_model(clip, tokenizer=tiny_diffusion.clip_tokenizer()).save(names.original)
    with torch.no_grad():
        clip.text_model.encoder.layers[1].mlp.fc2.bias.add_(torch.randn(32))
    load_model(clip, tokenizer=tiny_diffusion.clip_tokenizer()).save(names.erased)
    return names


def command(models: Models, output: Path, *flags: str) -> list[str]:
    given = ["diffusion", "--pipeline", models.pipeline, "--erased", models.erased]
    given += ["--detector", models.detector, "--controls", "dog", "--output", str(output)]
    given += ["--templates", *TEMPLATES, "--images", str(IMAGES), "--batch_size", "2"]
    given += ["--steps", "2", "--threshold", str(THRESHOLD), "--device", "cpu"]
    return [*given, *flags]


@pytest.fixture(scope="module")
def finished(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the command, which are only read."""
    output = tmp_path_factory.mktemp("finished") / "out"
    main(command(models, output, "--model", models.original))
    return output


@pytest.fixture
def run(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command; return its table or error."""

    def call(*flags: str, output: Path = tmp_path / "out", **changed: str) -> str:
        try:
            main(command(models._replace(**changed), output, *flags))
        except FaseraseError as error:
            return str(error)
        shown = capsys.readouterr()
        table = (output / "table.md").read_text(encoding="utf-8")
        assert shown.out == f"{table}\nWritten to {output / 'table.md'}.\n"
        return table

    return call


def pictures(output: Path, arm: str) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((output / arm).rglob("*.png")):
        with Image.open(path) as picture:
            found[str(path.relative_to(output / arm))] = np.asarray(picture)
    return found


def equal(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> list[bool]:
    assert some.keys() == others.keys()
    return [np.array_equal(some[name], others[name]) for name in some]


def rows(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    return {cells[0]: cells[1:] for cells in lines}


@torch.no_grad()
def count_detections(folder: str, files: list[Path], queries: list[str]) -> np.ndarray:
    """Return [files, queries]: whether a box has its highest score for the query, and enough."""
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    model, processor = (
        kind.from_pretrained(folder) for kind in (Owlv2ForObjectDetection, Owlv2Processor)
    )
    found = np.zeros((len(files), len(queries)), dtype=bool)
    for i, file in enumerate(files):
        inputs = processor(text=queries, images=Image.open(file), return_tensors="pt")
        for logits in model(**inputs).logits[0]:  # [queries]
            best = int(logits.argmax())
            found[i, best] |= bool(logits[best].sigmoid() >= THRESHOLD)
    return found


def test_pictures(models: Models, finished: Path) -> None:
    from diffusers import StableDiffusionPipeline

    before, after = (pictures(finished, arm) for arm in diffusion.ARMS)
    assert len(before) == 2 * len(TEMPLATES) * IMAGES
    assert {"a+photo+of+an+apple/0000.png", "An+apple+in+snow/0002.png"} < set(before)
    assert not any(equal(before, after))
    # As anyone draws with the pipeline.
    folder = finished / "original" / "a+photo+of+a+dog"
    seeds = json.loads((folder / "drawn.json").read_text(encoding="utf-8"))["seeds"]
    assert len(set(seeds)) == IMAGES
    plain = StableDiffusionPipeline.from_pretrained(models.pipeline, safety_checker=None)
    generator = torch.Generator().manual_seed(seeds[2])
    (drawn,) = plain("a photo of a dog", num_inference_steps=2, generator=generator).images
    assert np.array_equal(np.asarray(drawn), before["a+photo+of+a+dog/0002.png"])


def test_table(models: Models, finished: Path) -> None:
    queries = ["a photo of an apple", "a photo of a dog"]
    folders = [["a+photo+of+an+apple", "An+apple+in+snow"], ["a+photo+of+a+dog", "A+dog+in+snow"]]
    found = {}
    for arm in diffusion.ARMS:
        for place, names in enumerate(folders):
            paths = [
                finished / arm / name / f"{i:04d}.png" for name in names for i in range(IMAGES)
            ]
            found[arm, place] = count_detections(models.detector, paths, queries)
    every = np.concatenate(list(found.values()))
    assert 0 < every.sum() < every.size
    table = rows((finished / "table.md").read_text(encoding="utf-8"))
    for place, name in enumerate(("apple", "dog")):
        cells = table[name]
        shares = [100 * found[arm, place][:, place].mean() for arm in diffusion.ARMS]
        assert cells[:2] == ["↓↑"[place], str(IMAGES * len(TEMPLATES))]
        assert [cell.split(" ")[0] for cell in cells[2:5]] == [
            f"{each:.1f}" for each in (*shares, shares[1] - shares[0])
        ]
        assert cells[5] == f"{100 * found['original', 1 - place][:, place].mean():.1f}"
        assert float(cells[6]) > 1
    assert table["apple"][-2:] == ["100.00", "2.00"]
    assert table["dog"][-2:] == ["-", "-"]
    saved = json.loads((finished / "protocol.json").read_text(encoding="utf-8"))
    assert saved["settings"]["templates"] == list(TEMPLATES)
    assert [each["object"] for each in saved["objects"]] == ["apple", "dog"]
    low, high = saved["objects"][0]["change_interval"]
    assert low <= saved["objects"][0]["change"] <= high
    with Image.open(finished / "pictures.png") as sheet:
        assert sheet.size[0] > IMAGES * len(TEMPLATES) * 96


def test_the_same_tower_draws_the_same_pictures(run, models: Models, tmp_path: Path) -> None:
    table = run("--templates", "a {}", erased=models.original)
    assert all(equal(*(pictures(tmp_path / "out", arm) for arm in diffusion.ARMS)))
    for name in ("apple", "dog"):
        assert rows(table)[name][4] == "0.0 (0.0 to 0.0)"
        assert rows(table)[name][6] == "0.0"


def test_only_what_is_missing_is_drawn(
    run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    first = (finished / "table.md").read_text(encoding="utf-8")
    with monkeypatch.context() as without:
        without.setattr(diffusion, "TextToImage", None)
        without.setattr(diffusion, "Detector", None)
        assert run() == first
        shares = rows(run("--threshold", "0.1"))["dog"][2:5]
        assert [cell.split(" ")[0] for cell in shares] == ["100.0", "100.0", "0.0"]
    drawn: list[str] = []
    draw = TextToImage.draw

    def record(self, encoder, prompt, seeds):
        drawn.append(prompt)
        for i, picture in enumerate(draw(self, encoder, prompt, seeds)):
            if prompt == "a cat" and i == 1:
                raise KeyboardInterrupt
            yield picture

    monkeypatch.setattr(TextToImage, "draw", record)
    # An interrupted prompt leaves no pictures behind.
    with pytest.raises(KeyboardInterrupt):
        run("--controls", "cat", "--templates", "a {}")
    assert drawn == ["an apple", "a cat"]
    assert len(list((output / "original").iterdir())) == 2 * len(TEMPLATES) + 1
    shutil.rmtree(output / "erased" / "a+photo+of+a+dog")
    drawn.clear()
    assert run() == first
    assert drawn == ["a photo of a dog"]
    again = pictures(output, "erased")
    assert all(equal(again, pictures(finished, "erased")))


def test_open_clip_tower_of_a_pipeline_without_the_last_block(run, tmp_path: Path) -> None:
    length = tiny_diffusion.TEXT["max_position_embeddings"]
    encoder = tiny_diffusion.text_encoder(
        hidden_act="gelu", num_hidden_layers=1, **tiny_diffusion.FULL
    )
    pipeline = tiny_diffusion.save_pipeline(
        tmp_path / "pipeline", encoder, tiny_diffusion.full_tokenizer()
    )
    module = small_models.open_clip_vit(context_length=length)
    tokenizer = small_models.simple_tokenizer(length)
    load_model(module, tokenizer=tokenizer).save(tmp_path / "erased")
    run("--templates", "a {}", pipeline=pipeline, erased=str(tmp_path / "erased"))
    assert not any(equal(*(pictures(tmp_path / "out", arm) for arm in diffusion.ARMS)))


@pytest.mark.parametrize("kind", ["OwlViT", "Owlv2"])
def test_detectors(kind: str, tmp_path: Path) -> None:
    source = tiny_diffusion.save_detector(tmp_path, kind)
    queries = {"apple": "a photo of an apple", "dog": "a photo of a dog"}
    images = [Image.new("RGB", (20, 30), (each, 0, 99)) for each in (0, 120, 250)]
    device = torch.device("cpu")
    one = Detector(source, queries, device=device, batch_size=1).scores(images)
    two = Detector(source, queries, device=device, batch_size=2).scores(images)
    assert [list(each) for each in one] == [["apple", "dog"]] * 3
    np.testing.assert_allclose(
        [list(each.values()) for each in one], [list(each.values()) for each in two], atol=1e-5
    )
    # Without a rival, every box is the only object's.
    alone = Detector(source, {"dog": queries["dog"]}, device=device, batch_size=3).scores(images)
    assert all(a["dog"] >= b["dog"] - 1e-5 for a, b in zip(alone, one, strict=True))


def test_what_does_not_fit_is_refused(run, models: Models, tmp_path: Path) -> None:
    def refused(*flags: str, **changed: str) -> str:
        return run(*flags, output=tmp_path / "refused", **changed)

    assert "nowhere" in refused(erased="nowhere")
    assert not (tmp_path / "refused").exists()
    narrow = tmp_path / "narrow"
    load_model(tiny_diffusion.clip(hidden_size=16, num_hidden_layers=1)).save(narrow)
    said = refused(erased=str(narrow))
    assert f"--erased='{narrow}': the text tower of {narrow} does not fit" in said
    assert "width 16 instead of 32, 1 blocks instead of 2 or more" in said
    assert "it is not the CLIP that the pipeline was trained with" in refused(
        "--model", models.erased
    )

    tokenizer = small_models.hf_tokenizer()
    load_model(tiny_diffusion.clip(), tokenizer=tokenizer).save(tmp_path / "other words")
    assert "to the pipeline's, so the text encoder would read other words" in refused(
        erased=str(tmp_path / "other words")
    )
    assert "--pipeline='nowhere': diffusers could not load it" in refused(pipeline="nowhere")
    index = tmp_path / "xl" / "model_index.json"
    index.parent.mkdir()
    index.write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "xl' is a StableDiffusionXLPipeline; StableDiffusionPipeline is needed" in refused(
        pipeline=str(index.parent)
    )
    assert "templates: 'a photo' must be text with one {}" in refused("--templates", "a photo")
    assert "--threshold=2.0 must be between 0 and 1" in refused("--threshold", "2")
    assert "--seed=-1 must not be negative" in refused("--seed", "-1")
    assert "--images=0 must be at least 1" in refused("--images", "0")


def test_the_extra_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "Install it with: pip install 'fasterase[diffusion]'" in run()


def test_other_settings_and_detectors(run, models: Models, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    said = run("--steps", "3", "--seed", "1")
    assert "/out' holds pictures of '" in said
    assert "steps 2 instead of 3, seed 0 instead of 1. Give another --output" in said
    assert "text encoder" in run(erased=models.original)
    # Also when there is nothing left to draw.
    assert "it is not the CLIP that the pipeline" in run("--model", models.erased)
    assert "is a 'clip' model; one of owlvit, owlv2 is needed" in run(detector=models.original)
    # Another detector looks at the same pictures.
    detector = tiny_diffusion.save_detector(tmp_path / "detector", "OwlViT")
    run(detector=detector)
    assert all(equal(pictures(tmp_path / "out", "erased"), pictures(finished, "erased")))
    detected = tmp_path / "out" / "erased" / "a+photo+of+a+dog" / "detected.json"
    assert json.loads(detected.read_text(encoding="utf-8"))["detector"] == detector
