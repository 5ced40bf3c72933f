"""Does a text-to-image pipeline still draw the concept with the erased CLIP's text tower?

The same latents are denoised twice for each prompt: with the pipeline's own text encoder, and with
the erased tower in its place. A detector then looks for the object that the prompt names.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.protocols.diffusion_models import Detector, TextToImage
from benchmarks.protocols.protocol import EVALUATION, Reported
from benchmarks.protocols.text_encoder import TextTower, load_text_tower
from fasterase.engine.conditions import lock_run
from fasterase.engine.model_state import best_device, resolve_device
from fasterase.errors import InputError
from fasterase.evaluation.metrics import bootstrap_intervals, format_value, wilson_interval
from fasterase.evaluation.zero_shot import check_templates
from fasterase.files import remove_leftovers, replace_file, replace_folder, write_text
from fasterase.progress import Progress
from fasterase.report.lettering import Pen
from fasterase.report.pictures import (
    ERASED,
    GAP,
    INK,
    LINE,
    MARGIN,
    OWN,
    PICTURE,
    make_thumbnail,
    spread,
)
from fasterase.report.tables import Section, markdown_table
from fasterase.seeds import Stream, torch_seed

MODELS = (
    "the models are folders, or hub ids that are downloaded: PIPELINE a Stable Diffusion 1 or 2 in "
    "diffusers' format (stable-diffusion-v1-5/stable-diffusion-v1-5), DETECTOR an OWL-ViT or OWLv2 "
    "of transformers (google/owlv2-base-patch16-ensemble). ERASED is the CLIP whose text tower the "
    "pipeline was trained with, after erasing: of Stable Diffusion 1 OpenAI's ViT-L/14, of 2 "
    "OpenCLIP's ViT-H-14/laion2b_s32b_b79k."
)
DETECTED, SHEET = "detected.json", "pictures.png"
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

RESAMPLES = 1000
SHOWN = 10  # pictures of each object and arm on the sheet

COLUMNS = ["object", "wanted", "pictures", "original, %", "erased, %", "change, points"]
COLUMNS += ["elsewhere, %", "moved, %", "paper: original", "paper: CLIPErase"]
NOTES = (
    "Share of pictures in which the detector finds the object that the prompt names, with 95 % "
    "intervals (Wilson's; of the change the bootstrap's, over pairs of pictures that began as the "
    "same latents). elsewhere: how often the detector finds the object in the original's pictures "
    "of other prompts; forgetting need not go below that. moved: how far the prompts' hidden "
    "states moved, in percent of their distance to those of the empty prompt. The paper's figures "
    "are from third-party notes, for an apple; its pipeline, prompts and detector are not known to "
    "be these."
)
REPORTED = Reported(100.0, 2.0)  # of CONCEPT


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


def run_check(check: DiffusionCheck, output: Path) -> str:
    """Draw, detect, and return the table; pictures and figures are written to `output`.

    Each prompt has a folder in `output` for each arm. What is there is not drawn again; another
    detector or other objects are looked for in the same pictures.
    """
    device = resolve_device(check.device, default=best_device())
    tower = load_text_tower(check.erased)
    output.mkdir(parents=True, exist_ok=True)
    with lock_run(output):
        for folder in [output, *(path for path in output.rglob("*") if path.is_dir())]:
            remove_leftovers(folder)
        _draw_missing(check, tower, output, device)
        scores = _detect(check, output, device)
        figures = [measure_object(check, name, scores, output) for name in check.objects]
        settings = {**asdict(check), "device": str(device)}
        report = {"settings": settings, "columns": COLUMNS, "objects": figures}
        write_text(output / EVALUATION, json.dumps(report, indent=2) + "\n")
        contact_sheet(list(strips(check, figures, scores, output)), output / SHEET)
    return format_table(figures)


def _draw_missing(
    check: DiffusionCheck, tower: TextTower, output: Path, device: torch.device
) -> None:
    """Draw the prompts that have no folder yet, after comparing the original with the pipeline."""
    records = {
        (arm, prompt): _record(check, tower, device, arm=arm, prompt=prompt)
        for arm, prompt in itertools.product(ARMS, check.all_prompts)
    }
    missing = [each for each in records if not place(output, *each).exists()]
    for key in (each for each in records if each not in missing):
        found = read_record(place(output, *key) / DRAWN)
        # Another device rounds otherwise, which matters to what is still to be drawn.
        different = [
            f"{name} {found.get(name)} instead of {value}"
            for name, value in records[key].items()
            if found.get(name) != value and (name != "device" or missing)
        ]
        if different:
            raise InputError(
                f"--output={str(output)!r} holds pictures of {key[1]!r} that were drawn with "
                f"other settings: {', '.join(different)}. Give another --output, or remove its "
                f"folder {key[0]!r}."
            )
    if not missing and check.model is None:
        return
    pipeline = TextToImage(
        check.pipeline,
        device=device,
        steps=check.steps,
        guidance=check.guidance,
        batch_size=check.batch_size,
    )
    prompts = check.all_prompts
    if check.model is not None:
        argument = f"--model={check.model!r}"
        same = pipeline.fit(load_text_tower(check.model), prompts, argument=argument)
        pipeline.check_same(same, prompts, argument=argument)
    erased = pipeline.fit(tower, prompts, argument=f"--erased={check.erased!r}")
    moved = dict(zip(prompts, pipeline.distances(erased, prompts), strict=True))
    with Progress("pictures", total=check.images * len(missing), unit="picture") as bar:
        for arm, prompt in missing:
            encoder = erased if arm == "erased" else pipeline.own
            seeds = check.seeds(prompt)
            with replace_folder(place(output, arm, prompt)) as folder:
                for i, picture in enumerate(pipeline.draw(encoder, prompt, seeds)):
                    picture.save(folder / f"{i:04d}.png")
                    bar.update()
                record = {**records[arm, prompt], "seeds": seeds, "moved": moved[prompt]}
                write_text(folder / DRAWN, json.dumps(record, indent=2) + "\n")


def _record(
    check: DiffusionCheck, tower: TextTower, device: torch.device, *, arm: str, prompt: str
) -> dict[str, Any]:
    """Return the settings with which the pictures of a prompt are drawn."""
    return {
        "prompt": prompt,
        "pipeline": check.pipeline,
        "text encoder": tower.fingerprint() if arm == "erased" else "the pipeline's own",
        "steps": check.steps,
        "guidance": check.guidance,
        "seed": check.seed,
        "images": check.images,
        "device": device.type,
    }


def _detect(check: DiffusionCheck, output: Path, device: torch.device) -> Scores:
    """Return the scores of all objects in all pictures; detect where that is not done yet."""
    queries = {name: fill("a photo of a {}", name) for name in check.objects}
    wanted = {"detector": check.detector, "queries": queries}
    detector: Detector | None = None
    scores = {}
    keys = list(itertools.product(ARMS, check.all_prompts))
    for key in Progress("detection", items=keys, unit="prompt"):
        folder = place(output, *key)
        file = folder / DETECTED
        found = read_record(file) if file.is_file() else {}
        if any(found.get(name) != value for name, value in wanted.items()):
            if detector is None:
                detector = Detector(
                    check.detector, queries, device=device, batch_size=check.batch_size
                )
            found = {
                **wanted,
                "scores": detector.scores(
                    [open_picture(picture) for picture in sorted(folder.glob("*.png"))]
                ),
            }
            write_text(file, json.dumps(found, indent=2) + "\n")
        scores[key] = found["scores"]
    return scores


def measure_object(
    check: DiffusionCheck, name: str, scores: Scores, output: Path
) -> dict[str, Any]:
    """Return what was found of one object; shares are 0 to 1, intervals [low, high]."""

    def detected(arm: str, prompts: Sequence[str]) -> np.ndarray:  # [n] 0 or 1
        every = [each[name] for prompt in prompts for each in scores[arm, prompt]]
        return (np.array(every) >= check.threshold).astype(float)

    own = check.prompts(name)
    before, after = (detected(arm, own) for arm in ARMS)
    others = detected("original", [each for each in check.all_prompts if each not in own])
    change = after - before
    interval = bootstrap_intervals({"change": change}, resamples=RESAMPLES, seed=check.seed)
    moved = [read_record(place(output, "erased", prompt) / DRAWN)["moved"] for prompt in own]
    row: dict[str, Any] = {"object": name, "forget": name in check.concepts}
    row["pictures"] = len(before)
    for arm, found in zip(ARMS, (before, after), strict=True):
        share = float(found.mean())
        row |= {arm: share, f"{arm}_interval": wilson_interval(share, len(found))}
    row |= {"change": float(change.mean()), "change_interval": interval["change"]}
    row["elsewhere"] = float(others.mean()) if len(others) else None
    return {**row, "moved": float(np.mean(moved))}


def format_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of `measure_object`s: what was erased, and what should stay."""

    def percent(value: float | None) -> str:
        return "-" if value is None else format_value("share", value)

    def with_interval(figure: Mapping[str, Any], key: str) -> str:
        low, high = figure[f"{key}_interval"]
        return f"{percent(figure[key])} ({percent(low)} to {percent(high)})"

    def row(figure: Mapping[str, Any]) -> list[str]:
        known = figure["forget"] and figure["object"] == CONCEPT
        reported = REPORTED if known else Reported()
        return [
            figure["object"],
            "↓" if figure["forget"] else "↑",
            str(figure["pictures"]),
            *(with_interval(figure, key) for key in (*ARMS, "change")),
            percent(figure["elsewhere"]),
            percent(figure["moved"]),
            *("-" if each is None else f"{each:.2f}" for each in reported),
        ]

    titles = {True: "Erased: should not be drawn", False: "Controls: should still be drawn"}
    sections = [
        Section(title, [row(figure) for figure in figures if figure["forget"] is forget])
        for forget, title in titles.items()
    ]
    shown = [section for section in sections if section.rows]
    return f"{markdown_table(COLUMNS, shown)}\n\n{NOTES}\n"


class Strip(NamedTuple):
    """A row of pictures."""

    title: str  # stands above them
    pictures: Sequence[Image.Image]  # of any size; they are scaled to square thumbnails
    marked: Sequence[bool]  # which of them get a frame
    colour: str  # of the frames


def strips(
    check: DiffusionCheck, figures: Sequence[Mapping[str, Any]], scores: Scores, output: Path
) -> Iterator[Strip]:
    """Yield a strip per object and arm; pictures of the same latents stand below each other."""
    for figure, arm in itertools.product(figures, ARMS):
        name = figure["object"]
        places = [(p, i) for p in check.prompts(name) for i in range(check.images)]
        chosen = [places[i] for i in spread(range(len(places)), SHOWN)]
        yield Strip(
            f"{name}, {arm}: found in {format_value('share', figure[arm])} %",
            [open_picture(place(output, arm, prompt) / f"{i:04d}.png") for prompt, i in chosen],
            [scores[arm, prompt][i][name] >= check.threshold for prompt, i in chosen],
            ERASED if figure["forget"] else OWN,
        )


def contact_sheet(strips: Sequence[Strip], path: Path) -> None:
    """Draw strips below each other, each under its title, and write an image file."""
    columns = max(len(strip.pictures) for strip in strips)
    cell, height = PICTURE + GAP, LINE + PICTURE + GAP
    size = 2 * MARGIN + columns * cell - GAP, 2 * MARGIN + len(strips) * height
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    pen = Pen(draw, [strip.title for strip in strips])
    for number, strip in enumerate(strips):
        top = MARGIN + number * height
        pen.write((MARGIN, top - 2), strip.title, size=14, fill=INK)
        for column, (picture, marked) in enumerate(zip(strip.pictures, strip.marked, strict=True)):
            left, above = MARGIN + column * cell, top + LINE
            sheet.paste(make_thumbnail(picture), (left, above))
            if marked:
                outside = (left - 3, above - 3, left + PICTURE + 2, above + PICTURE + 2)
                draw.rectangle(outside, outline=strip.colour, width=3)
    with replace_file(path) as temporary:
        sheet.save(temporary)
