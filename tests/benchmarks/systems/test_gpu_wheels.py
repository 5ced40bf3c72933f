"""The folder of wheels for machines that lack packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.systems import gpu_wheels
from fasterase.errors import InputError


def test_wheels_replace_other_versions_and_are_of_those_that_fasterase_takes(tmp_path, monkeypatch):
    asked = []

    def pip(*arguments: str) -> None:
        asked.extend(arguments)
        folder = next(Path(word) for word in arguments if word.startswith(f"{tmp_path}/"))
        (folder / "webdataset-1.1-py3-none-any.whl").touch()

    monkeypatch.setattr(gpu_wheels, "_pip", pip)
    for name in ("webdataset-1.0-py3-none-any.whl", "mine-2-py3-none-any.whl"):
        (tmp_path / name).touch()
    gpu_wheels.fetch(tmp_path, [])
    names = ["mine-2-py3-none-any.whl", "webdataset-1.1-py3-none-any.whl"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    bounds = {re.split("[<>]", word)[0]: word for word in asked if "<" in word}
    assert set(bounds) == {"open_clip_torch", "webdataset", "deepspeed"}
    assert {"<2", ">=0.2.86"} == set(bounds["webdataset"].removeprefix("webdataset").split(","))


def test_wheels_and_project_have_a_size_limit(tmp_path, monkeypatch):
    (tmp_path / "small-1-py3-none-any.whl").write_bytes(b"x" * 1000)
    assert gpu_wheels.check_sizes(tmp_path, 30_000_000).startswith("1 wheel of 0.0 MB")
    monkeypatch.setattr(gpu_wheels, "LIMIT_BYTES", 30_000_500)
    with pytest.raises(InputError, match=r"more than 30 MB in all. The largest: small-1"):
        gpu_wheels.check_sizes(tmp_path, 30_000_000)
    assert gpu_wheels.project_bytes() < 40_000_000  # the rest is for wheels
