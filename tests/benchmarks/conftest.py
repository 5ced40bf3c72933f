"""The demo's model and a few of its drawings, to be erased by what the benchmarks compare."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from benchmarks.evidence.task import Task
from fasterase.demo import emoji
from fasterase.demo.sets import DemoSets, Drawings, build_sets
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model


class Few(Drawings):
    """The first of some drawings."""

    def __init__(self, drawings: Drawings, count: int) -> None:
        super().__init__(drawings._source, drawings._rows[:count], drawings._wording)


@pytest.fixture(scope="session")
def sets() -> DemoSets:
    whole = build_sets("animal-marine", original=str(emoji.BASE_MODEL), seed=0)
    return replace(whole, forget=Few(whole.forget, 12), retain=Few(whole.retain, 60))


@pytest.fixture(scope="session")
def original() -> DualEncoder:
    return load_model(str(emoji.BASE_MODEL))


@pytest.fixture
def task(sets: DemoSets, original: DualEncoder) -> Task:
    return Task(copy.deepcopy(original), sets, seed=0, measure=lambda steps: None)
