"""The demo's pairs and models: their paths, how to read them, how to word a concept."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from fasterase.errors import InputError

DATA = Path(__file__).parent / "data"
MODELS = Path(__file__).parent / "models"

# The models are trained on the Noto and Fluent drawings. Twemoji's are the unseen images.
TRAIN_TEAMS = ("noto", "fluent")
UNSEEN_TEAM = "twemoji"
TEAMS = (*TRAIN_TEAMS, UNSEEN_TEAM)

BASE_MODEL = MODELS / "base"
RETRAINED_MODEL = MODELS / "without-food-fruit"
DEFAULT_FORGET = "food-fruit"

TEMPLATES = ("a picture of {}", "a drawing of {}", "an emoji of {}")


class EmojiInfo(TypedDict):
    """The `json` of a sample; groups and subgroups as emojibase spells them."""

    concept: str
    group: str
    subgroup: str
    keywords: list[str]
    team: str
    hexcode: str
    member: bool


def shards(team: str) -> list[Path]:
    """Return the team's WebDataset shards (`png;txt;json`), sorted.

    Raises:
        InputError: `team` is not one of `TEAMS`.
    """
    if team not in TEAMS:
        raise InputError(f"team must be one of {', '.join(TEAMS)}; found {team!r}")
    return sorted(DATA.glob(f"{team}-*.tar"))


def samples(team: str) -> Iterator[tuple[EmojiInfo, bytes]]:
    """Yield every (record, PNG bytes) of a team in shard order: concepts sorted by their key."""
    for shard in shards(team):
        with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as archive:
            content = {member.name: archive.extractfile(member) for member in archive}
            for name, png in content.items():
                if name.endswith(".png"):
                    record = content[name.removesuffix(".png") + ".json"]
                    assert png is not None
                    assert record is not None
                    yield json.loads(record.read()), png.read()


def class_name(group_or_subgroup: str) -> str:
    """Return a group or subgroup as a caption: "food-fruit" -> "food fruit"."""
    return group_or_subgroup.replace("-", " ")


def name_only(record: EmojiInfo) -> list[str]:
    """Return the concept's name, the caption used for all measurements."""
    return [record["concept"]]


def naming_captions(record: EmojiInfo) -> list[str]:
    """Return captions that identify this concept, its name first.

    All keywords together nearly always identify a concept. The base model is trained on these
    captions alone: one such as "food fruit" fits a pear as well as an apple, so it would be a false
    negative in a contrastive batch.
    """
    name = record["concept"]
    keywords = [keyword for keyword in record["keywords"] if keyword != name]
    captions = [name]
    captions += [template.format(name) for template in TEMPLATES]
    captions += [f"{name}, {class_name(record[level])}" for level in ("subgroup", "group")]
    captions += [f"{name}, {keyword}" for keyword in keywords]
    if len(keywords) > 1:
        captions.append(", ".join(keywords))
    return list(dict.fromkeys(captions))


def captions(record: EmojiInfo) -> list[str]:
    """Return all wordings: `naming_captions`, then the names of the subgroup and the group."""
    return [*naming_captions(record), class_name(record["subgroup"]), class_name(record["group"])]
