"""Train the demo's small CLIP on the Noto and Fluent drawings of the member concepts.

    python -m tools.demo_assets.train --output fasterase/demo/models/base
    python -m tools.demo_assets.train --without food-fruit \\
        --output fasterase/demo/models/without-food-fruit

1,600 steps take about half an hour on one core. An interrupted run resumes from its last checkpoint
when started again. The output folder is a plain open_clip model that `local-dir:` loads.
"""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.command import new_parser
from fasterase.demo.emoji import (
    DEFAULT_FORGET,
    TEAMS,
    TRAIN_TEAMS,
    EmojiInfo,
    class_name,
    naming_captions,
    samples,
)
from fasterase.errors import InputError
from fasterase.files import replace_file, write_text
from tools.demo_assets.small_clip import (
    MEAN,
    STD,
    build_model,
    build_tokenizer,
    model_config,
    save,
    tokenize,
)

LEARNING_RATE = 1.5e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
WARM_UP = 20
BATCH = 256
MAX_SCALE = 100.0
CLASS_WEIGHT = 0.3

CHECKPOINT_EVERY = 100

# Light augmentation: uniform within these bounds.
ROTATION_DEGREES = 15.0
SHIFT = 0.12  # of the half width
ZOOM = (0.8, 1.15)


class Pairs(NamedTuple):
    """All drawings in memory; the records are in the order of the concepts."""

    images: Tensor  # [teams, concepts, 3, 64, 64], normalised
    records: list[EmojiInfo]  # one per concept


def load_pairs(teams: tuple[str, ...]) -> Pairs:
    """Decode the teams' shards; every team has the same concepts in the same order."""
    rows: list[np.ndarray] = []
    records: list[EmojiInfo] = []
    for team in teams:
        found = list(samples(team))
        records = [record for record, _ in found]
        rows += [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in found]
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float().div_(255)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return Pairs(images.unflatten(0, (len(teams), len(records))), records)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift and scale each image of [B, 3, H, W] at random, on white."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    angle = uniform(-ROTATION_DEGREES, ROTATION_DEGREES).deg2rad()
    zoom = uniform(*ZOOM)
    rows = [
        torch.stack([angle.cos() / zoom, -angle.sin() / zoom], dim=1),
        torch.stack([angle.sin() / zoom, angle.cos() / zoom], dim=1),
    ]
    affine = torch.cat([torch.stack(rows, dim=1), uniform(-SHIFT, SHIFT, 2, 1)], dim=2)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    # grid_sample pads with 0; white is +1 here.
    return functional.grid_sample(images - 1, grid, align_corners=False) + 1


class Classes(NamedTuple):
    """Group and subgroup names as zero-shot classes."""

    groups: list[str]
    subgroups: list[str]
    group_of: Tensor  # [concepts]
    subgroup_of: Tensor  # [concepts]


def find_classes(records: list[EmojiInfo]) -> Classes:
    """Return the classes of these records, sorted."""
    groups = sorted({record["group"] for record in records})
    subgroups = sorted({record["subgroup"] for record in records})
    return Classes(
        groups,
        subgroups,
        torch.tensor([groups.index(record["group"]) for record in records]),
        torch.tensor([subgroups.index(record["subgroup"]) for record in records]),
    )


def training_loss(
    model: Any,
    images: Tensor,  # [B, 3, 64, 64]
    texts: Tensor,  # [B + groups + subgroups, 16]
    group_of: Tensor,  # [B]
    subgroup_of: Tensor,  # [B]
    num_groups: int,
) -> Tensor:
    """Symmetric InfoNCE + 0.3 x cross-entropy against the group and the subgroup names.

    The InfoNCE batch leaves out the class names, which would be false negatives there.
    """
    size = len(images)
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    own = torch.arange(size)
    pairs, groups, subgroups = logits.split(
        [size, num_groups, logits.shape[1] - size - num_groups], dim=1
    )
    contrastive = functional.cross_entropy(pairs, own) + functional.cross_entropy(pairs.T, own)
    classes = functional.cross_entropy(groups, group_of)
    classes = classes + functional.cross_entropy(subgroups, subgroup_of)
    return contrastive / 2 + CLASS_WEIGHT * classes


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """Build an AdamW that decays only matrices."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
    )


def train(
    model: Any, tokenizer: Any, pairs: Pairs, *, steps: int, seed: int, checkpoint: Path
) -> list[float]:
    """Train in place on `pairs`, and return the loss of every step.

    The random draws of a step depend only on (seed, step), so a resumed run sees the same batches.
    """
    classes = find_classes(pairs.records)
    caption_ids = [tokenize(tokenizer, naming_captions(record)) for record in pairs.records]
    class_names = [class_name(name) for name in (*classes.groups, *classes.subgroups)]
    class_ids = tokenize(tokenizer, class_names)
    optimizer = optimizer_for(model)
    losses: list[float] = []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    num_teams, num_concepts = pairs.images.shape[:2]
    started = time.perf_counter()
    model.train()
    for step in range(len(losses), steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        concepts = torch.randperm(num_concepts, generator=generator)[:BATCH]
        teams = torch.randint(num_teams, concepts.shape, generator=generator)
        draws = torch.rand(concepts.shape, generator=generator).tolist()
        images = augment(pairs.images[teams, concepts], generator)
        captions = [
            caption_ids[concept][int(draw * len(caption_ids[concept]))]
            for concept, draw in zip(concepts.tolist(), draws, strict=True)
        ]
        loss = training_loss(
            model,
            images,
            torch.cat([torch.stack(captions), class_ids]),
            classes.group_of[concepts],
            classes.subgroup_of[concepts],
            len(classes.groups),
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(MAX_SCALE))
        losses.append(loss.item())
        if len(losses) % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replace_file(checkpoint) as temporary:
                torch.save({**state, "losses": losses}, temporary)
        if len(losses) % 20 == 0:
            passed = time.perf_counter() - started
            print(f"step {len(losses)} loss {losses[-1]:.4f} {passed:.0f} s", flush=True)
    return losses


@torch.no_grad()
def measure(model: Any, tokenizer: Any, pairs: Pairs, teams: tuple[str, ...]) -> dict[str, Any]:
    """Measure recall@1 and @10 image->text among all names, and group and subgroup accuracy.

    All are in percent, higher is better. Each team has values for the concept that the demo forgets
    by default, for other members, and for non-members.
    """
    model.eval()
    classes = find_classes(pairs.records)
    names = [record["concept"] for record in pairs.records]
    wordings = (names, *([class_name(n) for n in c] for c in (classes.groups, classes.subgroups)))
    text, groups, subgroups = (
        model.encode_text(tokenize(tokenizer, wording), normalize=True) for wording in wordings
    )
    fruit = torch.tensor([record["subgroup"] == DEFAULT_FORGET for record in pairs.records])
    member = torch.tensor([record["member"] for record in pairs.records])
    sets = {"members": member & ~fruit, "non_members": ~member, DEFAULT_FORGET: fruit}
    result: dict[str, Any] = {}
    for team, images in zip(teams, pairs.images, strict=True):
        image = model.encode_image(images, normalize=True)
        similarity = image @ text.T
        rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
        right = {
            "recall@1": rank < 1,
            "recall@10": rank < 10,
            "group": (image @ groups.T).argmax(dim=1) == classes.group_of,
            "subgroup": (image @ subgroups.T).argmax(dim=1) == classes.subgroup_of,
        }
        result[team] = {
            which: {
                name: round(100 * hit[rows].float().mean().item(), 1) for name, hit in right.items()
            }
            for which, rows in sets.items()
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Train, save and measure."""
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--without", help="group or subgroup to leave out of training")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    everything = load_pairs(TEAMS)
    known = {record[level] for record in everything.records for level in ("group", "subgroup")}
    if options.without is not None and options.without not in known:
        raise InputError(
            f"--without: no group or subgroup {options.without!r}; there are {sorted(known)}"
        )
    kept = [
        row
        for row, record in enumerate(everything.records)
        if record["member"] and options.without not in (record["group"], record["subgroup"])
    ]
    train_rows = torch.tensor([TEAMS.index(team) for team in TRAIN_TEAMS])
    pairs = Pairs(everything.images[train_rows][:, kept], [everything.records[row] for row in kept])
    tokenizer = build_tokenizer(everything.records)
    model = build_model(model_config(tokenizer.get_vocab_size()))
    checkpoint = options.output / "checkpoint.pt"
    started = time.perf_counter()
    losses = train(
        model, tokenizer, pairs, steps=options.steps, seed=options.seed, checkpoint=checkpoint
    )
    seconds = time.perf_counter() - started
    # Measure the rounded weights, which are the ones that ship.
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    save(model, tokenizer, options.output)
    log = {
        "without": options.without,
        "steps": options.steps,
        "seed": options.seed,
        "concepts": len(kept),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "threads": options.threads,
        "torch": torch.__version__,
        "loss_every_20_steps": [round(loss, 4) for loss in losses[19::20]],
        "metrics": measure(model, tokenizer, everything, TEAMS),
    }
    write_text(options.output / "training.json", json.dumps(log, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(log["metrics"], indent=2))


if __name__ == "__main__":
    main()
