"""Stands in for the functions that the commands call."""

from __future__ import annotations

from types import SimpleNamespace

from fasterase.config import UnlearnConfig

REQUIRED = ["--model", "m", "--forget", "f.csv", "--retain", "r.csv", "--output_dir", "out"]


class FakeApi:
    """Stands in for the library: keeps the call, returns or raises what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.error: BaseException | None = None
        self.verdict: str | None = "forgotten"

    def __call__(self, *args: object, **kwargs: object) -> SimpleNamespace:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        table = SimpleNamespace(table=lambda: "THE TABLE", report=lambda path: path)
        return SimpleNamespace(
            evaluation=table,
            verdict=self.verdict,
            seconds=1.0,
            table=table.table,
            report=table.report,
        )

    @property
    def config(self) -> UnlearnConfig:
        return self.calls[-1][1]["config"]
