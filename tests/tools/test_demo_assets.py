"""What makes the demo's assets: packing, and the draws of training."""

from __future__ import annotations

import io
import json
import tarfile

import torch
from PIL import Image

from fasterase.demo import emoji
from tools.demo_assets import pack
from tools.demo_assets.small_clip import IMAGE_SIZE
from tools.demo_assets.train import augment


def test_training_step_draws_depend_on_seed_and_step_alone() -> None:
    """Resumed training must see the same batches as uninterrupted training."""
    images = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    first = augment(images, torch.Generator().manual_seed(7))
    again = augment(images, torch.Generator().manual_seed(7))
    other = augment(images, torch.Generator().manual_seed(8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    white = augment(torch.ones_like(images), torch.Generator().manual_seed(7))
    assert torch.allclose(white, torch.ones_like(white))


def test_shards_depend_only_on_their_content(tmp_path):
    """Packing the same drawings again gives the same bytes, readable as the demo reads its own."""
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    Image.new("RGBA", (72, 72), (255, 0, 0, 128)).save(drawings / "1f34e.png")
    records = [record for record, _ in emoji.samples("noto") if record["concept"] == "red apple"]
    records = [{**record, "hexcode": "1F34E"} for record in records]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pack.write_shards(records, "noto", drawings, tmp_path / name)
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}
    assert set(content) == {f"red-apple.{ending}" for ending in ("png", "txt", "json")}
    assert json.loads(content["red-apple.json"])["team"] == "noto"
    picture = Image.open(io.BytesIO(content["red-apple.png"]))
    assert picture.size == (pack.SIZE, pack.SIZE)
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 127, 127)
