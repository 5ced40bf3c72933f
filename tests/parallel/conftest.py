"""A model and pairs on disk, for commands."""

from __future__ import annotations

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
