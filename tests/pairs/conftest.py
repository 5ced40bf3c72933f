"""Small pictures, and the tars and folders made of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image


def _picture(shade: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    image = Image.new("RGB", size, (shade, 255 - shade, 7))
    image.putpixel((1, 2), (shade, shade, 200))
    return image


def _encoded(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    _picture(shade).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """shade (0-255), size -> a picture that no other shade has."""
    return _picture


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """shade, format -> the picture's file."""
    return _encoded


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., str]:
    """Writes {entry name: bytes, str or JSON-able} as a tar; returns its path."""

    def make(name: str, entries: Mapping[str, object], mode: str = "w") -> str:
        path = tmp_path / name
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for entry, content in entries.items():
                if isinstance(content, str):
                    content = content.encode()
                elif not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                info = tarfile.TarInfo(entry)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return str(path)

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 0.png ... 5.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for shade in range(6):
        (folder / f"{shade}.png").write_bytes(_encoded(shade))
    return folder


@pytest.fixture
def shards(make_tar: Callable[..., str]) -> Path:
    """A folder of s-0.tar ... s-3.tar: samples key0 ... key7, two each, with captions `n 0` ..."""
    for shard in range(4):
        entries: dict[str, object] = {}
        for n in (2 * shard, 2 * shard + 1):
            entries |= {
                f"key{n}.json": {"group": f"g{n}", "alt": [f"x{n}", f"y{n}"]},
                f"key{n}.png": _encoded(n),
                f"key{n}.txt": f" n {n}\n",
            }
        path = make_tar(f"s-{shard}.tar", entries)
    return Path(path).parent
