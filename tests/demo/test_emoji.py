"""What ships for the demo: the pairs read back whole, the models load without fasterase."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fasterase.demo import emoji
from fasterase.errors import InputError

CONCEPTS = 1015
NON_MEMBERS = 102
PARAMETERS = 2_806_145


@pytest.mark.parametrize("team", emoji.TEAMS)
def test_shards_hold_every_concept_once(team: str) -> None:
    found = list(emoji.samples(team))
    records = [record for record, _ in found]
    assert len(found) == len({record["concept"] for record in records}) == CONCEPTS
    assert {record["team"] for record in records} == {team}
    assert Counter(record["member"] for record in records)[False] == NON_MEMBERS
    assert len({record["group"] for record in records}) == 6
    fruit = [record for record in records if record["subgroup"] == "food-fruit"]
    assert len(fruit) == 19
    assert all(record["member"] and record["group"] == "food-drink" for record in fruit)


@pytest.mark.parametrize("team", emoji.TEAMS)
def test_every_picture_is_64_pixels_on_white(team: str) -> None:
    corners = Counter()
    for _, png in emoji.samples(team):
        picture = Image.open(io.BytesIO(png))
        picture.load()
        assert picture.size == (64, 64)
        assert "transparency" not in picture.info
        corners[picture.convert("RGB").getpixel((0, 0))] += 1
    assert corners.most_common(1)[0][0] == (255, 255, 255)


def test_teams_agree_on_order_and_members() -> None:
    """Code that lines the teams up row by row rests on this."""
    teams = [[{**record, "team": ""} for record, _ in emoji.samples(team)] for team in emoji.TEAMS]
    assert teams[0] == teams[1] == teams[2]


def test_non_members_are_spread_over_subgroups() -> None:
    records = [record for record, _ in emoji.samples("noto")]
    total = Counter(record["subgroup"] for record in records)
    left_out = Counter(record["subgroup"] for record in records if not record["member"])
    for subgroup, count in total.items():
        if subgroup != "food-fruit":
            assert abs(left_out[subgroup] - 0.1 * count) < 1.5, subgroup


def test_plain_webdataset_reads_the_shards() -> None:
    import webdataset

    paths = [str(path) for path in emoji.shards("twemoji")]
    rows = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(rows) == CONCEPTS
    for row in rows:
        assert row["txt"].decode() == json.loads(row["json"])["concept"]
        assert row["png"].startswith(b"\x89PNG")


def test_shards_are_small_and_licences_lie_beside_them() -> None:
    size = sum(path.stat().st_size for team in emoji.TEAMS for path in emoji.shards(team))
    assert size < 14_000_000
    licenses = emoji.DATA / "licenses"
    attribution = (licenses / "ATTRIBUTION.md").read_text(encoding="utf-8")
    texts = sorted(licenses.glob("*.txt"))
    assert len(texts) == 5
    for text in texts:
        assert text.name in attribution


def test_unknown_team_is_refused() -> None:
    with pytest.raises(InputError, match="openmoji"):
        emoji.shards("openmoji")


def test_captions_begin_with_the_name_and_end_with_the_classes() -> None:
    records = {record["concept"]: record for record, _ in emoji.samples("noto")}
    apple = records["red apple"]
    captions = emoji.captions(apple)
    assert captions[0] == "red apple"
    assert "a picture of red apple" in captions
    assert captions[-2:] == ["food fruit", "food drink"]
    assert "food fruit" not in emoji.naming_captions(apple)
    assert len(captions) == len(set(captions))


@pytest.mark.parametrize("folder", [emoji.BASE_MODEL, emoji.RETRAINED_MODEL])
def test_model_loads_in_plain_open_clip(folder: Path) -> None:
    """Loading, tokenizing and preprocessing need nothing of fasterase."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    model.eval()

    found = [(record, png) for record, png in emoji.samples("noto") if record["member"]][::10]
    kept = [pair for pair in found if pair[0]["subgroup"] != "food-fruit"]
    images = torch.stack(
        [preprocess(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in kept]
    )
    ids = tokenizer([record["concept"] for record, _ in kept])
    # open_clip reads the text feature at the highest id: it must be <end>, in every row.
    assert (ids.max(dim=1).values == model.vocab_size - 1).all()
    with torch.no_grad():
        similarity = model.encode_image(images, normalize=True) @ (
            model.encode_text(ids, normalize=True).T
        )
    recall = (similarity.argmax(dim=1) == torch.arange(len(kept))).float().mean()
    assert recall > 0.97


def test_only_the_base_knows_fruit() -> None:
    logs = [
        json.loads((folder / "training.json").read_text(encoding="utf-8"))
        for folder in (emoji.BASE_MODEL, emoji.RETRAINED_MODEL)
    ]
    base, retrained = (log["metrics"]["noto"]["food-fruit"]["recall@1"] for log in logs)
    assert base > 90
    assert retrained < 10
