"""A model and pairs on disk, for commands."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasterase.models import load_model
from tests.small_models import open_clip_vit, simple_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two tables of pictures, in a folder."""
    folder = tmp_path_factory.mktemp("inputs")
    load_model(open_clip_vit(), tokenizer=simple_tokenizer()).save(folder / "model")
    numbers = torch.Generator().manual_seed(0)
    for name, count in (("forget", 6), ("retain", 24)):
        lines = ["filepath,title"]
        for i in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=numbers)
            Image.fromarray(pixels.numpy()).save(folder / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,a {name} thing number {i % 10}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def shards(inputs: Path) -> dict[str, Path]:
    """The pairs of `inputs` in tars."""
    for name in ("forget", "retain"):
        rows = (inputs / f"{name}.csv").read_text().splitlines()[1:]
        for number in range(2):
            with tarfile.open(inputs / f"{name}-{number}.tar", "w") as tar:
                for row in rows[number::2]:
                    file, caption = row.split(",")
                    (inputs / "caption.txt").write_text(caption)
                    tar.add(inputs / file, file)
                    tar.add(inputs / "caption.txt", Path(file).with_suffix(".txt").name)
    return {name: inputs / f"{name}-{{0..1}}.tar" for name in ("forget", "retain")}
