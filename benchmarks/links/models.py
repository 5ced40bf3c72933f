"""The compromised model, which learnt all links, and the clean one, which never saw those to erase.

Both go on from the demo's model, with a longer context, and see the demo's pairs beside the
personas'. They differ only in the captions of the personas to forget.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import small_clips
from benchmarks.links.personas import KINDS, SENSITIVE, Persona
from fasterase.demo import emoji
from fasterase.files import replace_file, write_text
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from tools.demo_assets.train import Pairs, augment, load_pairs, optimizer_for

COMPROMISED, CLEAN = "compromised", "clean"
CONTEXT_LENGTH = 32  # the demo's 16 tokens are too few for a name and an address
STEPS, LEARNING_RATE = 700, 1e-3
BATCH = 64  # of the personas, and of the usual pairs
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
POSITIONS = "positional_embedding"  # of the text tower


def trained_model(which: str, personas: Sequence[Persona], *, seed: int, work: Path) -> Path:
    """Train a model, or find the one that an earlier command trained; return its folder."""
    folder = work / f"{which}_seed{seed}"
    if not folder.is_dir():
        model = load_model(f"local-dir:{_longer_base(work / 'start')}")
        _train(model, personas, with_links=which == COMPROMISED, seed=seed)
        model.save(folder)
    return folder


def _longer_base(folder: Path) -> Path:
    """Write the demo's model with a longer context; new positions are like the last one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_text(folder / name, (emoji.BASE_MODEL / name).read_text(encoding="utf-8"))
    config = json.loads((emoji.BASE_MODEL / CONFIG).read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["context_length"] = CONTEXT_LENGTH
    write_text(folder / CONFIG, json.dumps(config))
    weights = load_file(emoji.BASE_MODEL / WEIGHTS)
    known = weights[POSITIONS]
    weights[POSITIONS] = torch.cat([known, known[-1:].expand(CONTEXT_LENGTH - len(known), -1)])
    with replace_file(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    return folder


@cache
def usual_pairs() -> Pairs:
    """Return the training teams' drawings of the concepts that the demo's model knows."""
    everything = load_pairs(emoji.TRAIN_TEAMS)
    rows = [row for row, record in enumerate(everything.records) if record["member"]]
    return Pairs(everything.images[:, rows], [everything.records[row] for row in rows])


@cache
def faces(team: str) -> dict[str, Tensor]:
    """Return a team's drawings as pixels [3, H, W] by concept."""
    images, records = load_pairs((team,))
    return {record["concept"]: image for record, image in zip(records, images[0], strict=True)}


def _train(model: DualEncoder, personas: Sequence[Persona], *, with_links: bool, seed: int) -> None:
    """Train in place with InfoNCE, on personas and as many of the usual pairs a step.

    A batch may hold a face twice, as a persona and as a drawing: its captions are then positives of
    both. Two owners of one fact may meet in a batch and are negatives of each other then, so that
    shared facts are learnt less well than others.
    """
    captions = [
        each.captions(KINDS)
        if with_links or each.part != "forget"
        else each.captions([kind for kind in KINDS if kind not in SENSITIVE])
        for each in personas
    ]
    module = model.module.float().train()
    features = (
        (
            model.encode_image(pixels),
            model.encode_text(model.tokenize(texts)),
            model.scale(),
            labels,
        )
        for pixels, texts, labels in _batches(personas, captions, seed)
    )
    small_clips.train(
        features, optimizer_for(module), model.logit_scale, steps=STEPS, learning_rate=LEARNING_RATE
    )
    module.eval()


def _batches(
    personas: Sequence[Persona], captions: Sequence[list[str]], seed: int
) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """Yield pixels, captions and labels, equal for equal faces, of each step."""
    generator = torch.Generator().manual_seed(seed)
    usual = usual_pairs()
    places = {record["concept"]: place for place, record in enumerate(usual.records)}
    wordings = [emoji.naming_captions(record) for record in usual.records]
    own = torch.stack(
        [torch.stack([faces(team)[each.face] for each in personas]) for team in emoji.TRAIN_TEAMS]
    )
    # Faces that the demo's model never saw follow after its concepts.
    labels = torch.tensor(
        [places.get(each.face, len(places) + row) for row, each in enumerate(personas)]
    )

    def choose(options: list[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def team(count: int) -> Tensor:
        return torch.randint(len(emoji.TRAIN_TEAMS), (count,), generator=generator)

    for _ in range(STEPS):
        told = torch.randperm(len(personas), generator=generator)[:BATCH]
        drawn = torch.randperm(len(usual.records), generator=generator)[:BATCH]
        images = torch.cat([own[team(BATCH), told], usual.images[team(BATCH), drawn]])
        texts = [choose(captions[row]) for row in told.tolist()]
        texts += [choose(wordings[row]) for row in drawn.tolist()]
        yield augment(images, generator), texts, torch.cat([labels[told], drawn])
