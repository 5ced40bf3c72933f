"""The settings of the diffusion check, and where its pictures and their records lie."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from PIL import Image

from fasterase.errors import InputError
from fasterase.evaluation.zero_shot import check_templates
from fasterase.seeds import Stream, torch_seed

CONCEPT = "apple"
# Two that are like the concept, and three that are not.
CONTROLS = ("orange", "banana", "dog", "car", "chair")
TEMPLATES = (
    "a photo of a {}",
    "a close-up photo of a {}",
    "a {} on a table",
    "a photo of a {} in a garden",
    "an oil painting of a {}",
)
ARMS = ("original", "erased")
DRAWN = "drawn.json"  # the record beside the pictures of a prompt

# Arm, prompt -> for each picture: object -> score.
Scores = Mapping[tuple[str, str], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class DiffusionCheck:
    """Settings of the check."""

    pipeline: str  # folder or hub id of a Stable Diffusion 1 or 2 in diffusers' format
    erased: str  # the erased CLIP, as `load_text_tower` takes it
    detector: str  # folder or hub id of an OWL-ViT or OWLv2 of transformers
    # The CLIP before erasing, to check that its tower is the pipeline's; None: no check.
    model: str | None = None
    concepts: Sequence[str] = (CONCEPT,)  # what was erased
    controls: Sequence[str] = CONTROLS  # other objects, which should still be drawn
    # Texts with one `{}` for an object; "a {}" becomes "an {}" before a vowel.
    templates: Sequence[str] = TEMPLATES
    images: int = 10  # pictures of each prompt and arm
    threshold: float = 0.2  # score from which on a detection counts
    steps: int = 50  # of denoising
    guidance: float = 7.5  # scale of the classifier-free guidance
    seed: int = 0  # of the latents
    batch_size: int = 5  # pictures drawn at once
    device: str | None = None  # where to run; None: the accelerator if there is one

    def __post_init__(self) -> None:
        check_templates(self.templates)
        for name in ("images", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise InputError(f"--seed={self.seed} must not be negative.")
        if not 0 < self.threshold < 1:
            raise InputError(f"--threshold={self.threshold} must be between 0 and 1.")

    @property
    def objects(self) -> list[str]:
        """Concepts and controls, each once."""
        return list(dict.fromkeys((*self.concepts, *self.controls)))

    def prompts(self, name: str) -> list[str]:
        """Return the prompts of an object."""
        return [fill(template, name) for template in self.templates]

    @property
    def all_prompts(self) -> list[str]:
        """The prompts of all objects."""
        return [prompt for name in self.objects for prompt in self.prompts(name)]

    def seeds(self, prompt: str) -> list[int]:
        """Return the seeds of a prompt's latents, which do not depend on the other prompts."""
        number = zlib.crc32(prompt.encode())
        return [torch_seed(self.seed, Stream.LATENTS, number, i) for i in range(self.images)]


def fill(template: str, name: str) -> str:
    """Put `name` into a template, after "an" if it begins with a vowel."""
    if name[:1].lower() in tuple("aeiou"):
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.format(name)


def place(output: Path, arm: str, prompt: str) -> Path:
    """Return the folder of the pictures of a prompt."""
    return output / arm / quote_plus(prompt)


def open_picture(file: Path) -> Image.Image:
    """Read a picture."""
    with Image.open(file) as picture:
        return picture.convert("RGB")


def read_record(file: Path) -> dict[str, Any]:
    """Read what was written beside the pictures."""
    return json.loads(file.read_text(encoding="utf-8"))
