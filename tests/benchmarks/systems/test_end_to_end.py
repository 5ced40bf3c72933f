"""The end-to-end benchmark: both implementations do the same, and an interrupted one resumes."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from PIL import Image

import fasterase
from benchmarks.processes import MeasurementError
from benchmarks.result_files import read_csv
from benchmarks.systems import end_to_end
from benchmarks.systems.end_to_end import Setting, summarise
from benchmarks.systems.naive_erasure import erase_naively
from fasterase.models.load import load_model
from fasterase.pairs.sampler import Sampler
from tests import small_models

WORDS = ("apple", "dog", "cat", "house", "tree")


def pairs(count: int, offset: int) -> list[dict]:
    return [
        {
            "image": Image.new("RGB", (40, 40), (12 * i, 255 - 12 * i, 50 + offset)),
            "text": [f"{article} {WORDS[(i + offset) % 5]}" for article in ("a", "the")],
        }
        for i in range(count)
    ]


@pytest.mark.filterwarnings("ignore:no verdict", "ignore:.*captions seem to name")
def test_the_loop_does_what_the_library_does():
    setting = Setting("", "", "cpu", 3, 1e-3, 8, 4, 0, 10)
    forget, retain = pairs(6, 0), pairs(14, 1)
    own = small_models.open_clip_vit()
    start = copy.deepcopy(own.state_dict())
    naive = copy.deepcopy(own)
    fasterase.unlearn(
        own, forget, retain, config=setting.config(), tokenizer=small_models.simple_tokenizer()
    )
    sampler = Sampler(6, 14, forget_batch_size=4, batch_size=8, seed=0)
    steps = []
    erase_naively(
        naive,
        forget,
        retain,
        map(sampler.draw, range(3)),
        config=setting.config(),
        preprocess=load_model(naive).companions.preprocess,
        tokenizer=small_models.simple_tokenizer(),
        after_step=lambda: steps.append(1),
    )
    assert len(steps) == 3
    # Keys' biases have no gradient; Adam divides the rounding noise by its own size.
    ours, theirs = (
        {k: v for k, v in module.state_dict().items() if not k.endswith("in_proj_bias")}
        for module in (own, naive)
    )
    moved, apart = (
        torch.stack([(value - other[name]).norm() for name, value in ours.items()])
        for other in (start, theirs)
    )
    assert moved.max() > 1e-2
    assert apart.max() < 1e-3 * moved.max()


def row(implementation: str, repeat: int, seconds: float, verdict: str = "forgotten") -> dict:
    found = {"implementation": implementation, "repeat": repeat}
    found |= vars(Setting("base", "food", "cpu", 2, 1e-4, 8, 4, 0, 10))
    found |= {"gpu_name": "a CPU", "threads": 1, "torch": "2.13", "verdict": verdict}
    found |= {"seconds": seconds, "pairs_per_second": 24 / seconds, "cpu_seconds": 9}
    found |= {"bound": 1.5, "first_step": 2, "step_ms": 5, "peak_mib": 100, "residue": 0.5}
    return {name: str(value) for name, value in found.items()}


def test_an_advantage_is_clear_where_intervals_do_not_overlap():
    rows = [row("fasterase", i, 10 + i) for i in range(3)]
    rows += [row("naive", i, 20 + i, "remembered") for i in range(3)]
    table = summarise(rows)
    assert "| seconds | 10.4 / 11 / 11.6 | 20.4 / 21 / 21.6 | **1.91x** |" in table
    assert re.search(r"pairs_per_second \| [\d.]+ / 2.182 / [\d.]+ \|.*\| \*\*1.91x", table)
    assert "| step_ms | 5 / 5 / 5 | 5 / 5 / 5 | 1.00x |" in table
    assert "| verdict (residue) | forgotten (0.50) | remembered (0.50) |  |" in table
    rows[5]["seconds"] = "10.5"
    rows[4]["seconds"] = "10.5"
    assert "**" not in summarise(rows).splitlines()[6]
    assert "| 1.91x |" in summarise([rows[1], row("naive", 0, 21)])


def test_an_interrupted_benchmark_resumes(tmp_path, monkeypatch, capsys):
    calls = []

    def fake(call, name, setting, *, seconds, preload):
        calls.append(name)
        if len(calls) == 4:
            raise MeasurementError("its process ended with code -9")
        figures = {"seconds": 1.0, "first_step": 0.5, "pairs_per_second": 20.0, "step_ms": 30.0}
        figures |= {"peak_mib": 40.0, "verdict": "forgotten", "residue": None}
        return {**figures, "bound": 0.0, "cpu_seconds": 0.9}

    monkeypatch.setattr(end_to_end, "call_in_process", fake)
    path = tmp_path / "end.csv"
    arguments = ["--output", str(path), "--repeats", "2", "--device", "cpu", "--steps", "2"]
    with pytest.raises(MeasurementError):
        end_to_end.main(arguments)
    end_to_end.main(arguments)
    assert calls == ["fasterase", "naive", "naive", "fasterase", "fasterase"]
    found = [(each["implementation"], each["repeat"]) for each in read_csv(path)]
    assert sorted(found) == sorted((n, r) for n in ("fasterase", "naive") for r in "01")
    assert "| runs | 2 | 2 |  |" in capsys.readouterr().out
    end_to_end.main(["--steps", "3", *arguments[:-2]])  # another setting is another measurement
    assert len(read_csv(path)) == 8
    before = len(calls)
    end_to_end.main([*arguments, "--fresh"])  # of the other setting nothing is lost
    assert (len(calls), len(read_csv(path))) == (before + 4, 8)


@pytest.mark.slow
def test_a_run_of_the_demo_is_measured(monkeypatch):
    """Both implementations, whole, on two steps of the demo's model."""
    monkeypatch.setattr(end_to_end.fasterase, "evaluate", lambda *_, **__: Evaluated())
    monkeypatch.setattr(end_to_end, "build_sets", functools.cache(end_to_end.build_sets))
    setting = Setting(str(end_to_end.emoji.BASE_MODEL), "food-fruit", "cpu", 2, 1e-4, 8, 4, 0, 5)
    for name in end_to_end.IMPLEMENTATIONS:
        sample = end_to_end.measure(name, setting)
        assert sample["pairs_per_second"] == pytest.approx(24 / sample["seconds"])
        assert 0 < sample["step_ms"] < 1e3 * sample["seconds"]
        assert 0 < sample["first_step"] < sample["seconds"]
        assert sample["peak_mib"] > 1
        assert sample["verdict"] == "forgotten"


class Evaluated:
    verdict, residue = "forgotten", 0.4
