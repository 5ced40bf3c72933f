"""Small pictures, and the tars and folders made of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fasterase.pairs.images import ImageFiles
from fasterase.pairs.read_tars import TarImages
from tests.pairs.reading import encoded, samples


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
        (folder / f"{shade}.png").write_bytes(encoded(shade))
    return folder


@pytest.fixture
def shards(make_tar: Callable[..., str]) -> Path:
    """A folder of s-0.tar ... s-3.tar: samples key0 ... key7, two each, with captions `n 0` ..."""
    for shard in range(4):
        some = {n: f" n {n}\n" for n in (2 * shard, 2 * shard + 1)}
        metas = [{"group": f"g{n}", "alt": [f"x{n}", f"y{n}"]} for n in some]
        path = make_tar(f"s-{shard}.tar", samples(some, metas=metas, key="key"))
    return Path(path).parent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The row and id of each encoded image that this process reads from then on."""
    found = []

    def note(kind: type) -> None:
        read = kind.read

        def noted(self: object, row: int, id: str) -> bytes:
            found.append((row, id))
            return read(self, row, id)

        monkeypatch.setattr(kind, "read", noted)

    note(ImageFiles)
    note(TarImages)
    return found
