"""Does a text-to-image pipeline still draw the concept with the erased CLIP's text tower?

The same latents are denoised twice for each prompt: with the pipeline's own text encoder, and with
the erased tower in its place. A detector then looks for the object that the prompt names.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.protocols.detector import Detector
from benchmarks.protocols.diffusion_check import (
    ARMS,
    DRAWN,
    DiffusionCheck,
    Scores,
    fill,
    open_picture,
    place,
    read_record,
)
from benchmarks.protocols.diffusion_report import (
    COLUMNS,
    contact_sheet,
    format_table,
    measure_object,
    strips,
)
from benchmarks.protocols.protocol import EVALUATION, TABLE
from benchmarks.protocols.text_encoder import TextTower, load_text_tower
from benchmarks.protocols.text_to_image import TextToImage
from fasterase.engine.conditions import lock_run
from fasterase.engine.model_state import best_device, resolve_device
from fasterase.errors import InputError
from fasterase.files import check_creatable, remove_leftovers, replace_folder, write_text
from fasterase.progress import Progress

MODELS = (
    "the models are folders, or hub ids that are downloaded: PIPELINE a Stable Diffusion 1 or 2 in "
    "diffusers' format (stable-diffusion-v1-5/stable-diffusion-v1-5), DETECTOR an OWL-ViT or OWLv2 "
    "of transformers (google/owlv2-base-patch16-ensemble). ERASED is the CLIP whose text tower the "
    "pipeline was trained with, after erasing: of Stable Diffusion 1 OpenAI's ViT-L/14, of 2 "
    "OpenCLIP's ViT-H-14/laion2b_s32b_b79k."
)
DETECTED, SHEET = "detected.json", "pictures.png"


def run_check(check: DiffusionCheck, output: Path) -> str:
    """Draw, detect, and return the table, which is also written to `output` with the pictures.

    Each prompt has a folder in `output` for each arm. What is there is not drawn again; another
    detector or other objects are looked for in the same pictures.
    """
    check_creatable(output, argument=f"--output={str(output)!r}")
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
        table = format_table(figures)
        write_text(output / TABLE, table)
    return table


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
                (folder / DRAWN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
