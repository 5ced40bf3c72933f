"""Plans: their parts, their sums, what they recommend, and what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

import fasterase
from fasterase.cli import main
from fasterase.cli.parser import parse
from fasterase.errors import InputError
from fasterase.models.load import load_architecture
from fasterase.planner.count import measure_micro_batch
from fasterase.planner.plan import Feeding, _largest
from fasterase.planner.table import describe_hours
from tests import small_models

plan_module = sys.modules["fasterase.planner.plan"]  # the function has its name


@pytest.fixture(scope="module")
def printed_big_g():
    """A plan as the command makes it, and what the command prints."""
    plans = []

    def plan(*given, **options):
        plans.append(planner(*given, **options))
        return plans[0]

    planner = fasterase.plan
    flags = ["--pairs", "12_000_000", "--forget", "100_000", "--gpu-memory", "80", "--gpus", "8"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(plan_module, "measure_decoding", lambda model: 240.0)
        patch.setattr(fasterase, "plan", plan)
        assert main(["plan", "--model", "ViT-bigG-14", *flags]) == 0
    return plans[0], printed.getvalue()


@pytest.mark.slow
def test_big_g_on_eight_gpus_is_zero_1(printed_big_g):
    big_g = printed_big_g[0]
    numbers = 4 * big_g.parameters
    parts = big_g.bytes_per_gpu
    assert parts["weights"] == pytest.approx(numbers, rel=0.001)
    assert parts["gradients"] == numbers - 4  # all but the logit scale
    assert parts["optimizer_states"] == pytest.approx(2 * numbers / 8, rel=1e-6)
    assert parts["partitions"] == pytest.approx(2 * numbers / 8, rel=1e-6)
    assert sum(parts.values()) <= 80e9
    # A forward and a backward pass: each GPU's share fits, so that nothing is encoded twice.
    assert big_g.micro_batch_size == (256 + 64) / 8
    assert big_g.flops_per_pair == pytest.approx(3 * 1065.36e9, rel=0.02)
    assert big_g.gpu_hours_per_epoch == pytest.approx(
        12e6 * big_g.flops_per_pair / (0.4 * 989e12) / 3600
    )
    assert big_g.disk_bytes == 2 * 12_000_000 * (8 + 1280 * 2)
    assert big_g.retain_pairs == 100 * 256
    assert big_g.steps == math.ceil(100_000 / 64)
    assert "--model ViT-bigG-14/TAG " in big_g.command
    launcher, unlearn = big_g.command.split(" --module fasterase ")
    assert launcher == "deepspeed --num_gpus 8"
    assert parse(shlex.split(unlearn)).values["deepspeed"] == "zero1.json"
    assert "ZeRO-1 fits" in big_g.reason


@pytest.mark.slow
def test_the_table_names_every_part_and_is_the_one_in_the_docs(printed_big_g):
    big_g, table = printed_big_g
    assert table == f"{big_g}\n"
    page = Path(__file__).parents[2] / "docs" / "planning.md"
    assert f"```text\n{table}```" in page.read_text(encoding="utf-8")
    for part in big_g.bytes_per_gpu.values():
        assert f"{part / 1e9:9.2f}\n" in table
    command = table[table.index("deepspeed ") :].replace("\\\n", "")
    assert shlex.split(big_g.command) == shlex.split(command)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_encoded_twice():
    module = small_models.open_clip_vit(layers=1, vocab_size=300)
    options = {"forget": 4, "batch_size": 28, "forget_batch_size": 4, "tune": "image"}
    whole, parts = (
        fasterase.plan(module, 10_000, gpu_memory=memory_gb, **options)
        for memory_gb in (80, 0.0015)
    )
    assert whole.micro_batch_size == 28 + 4
    assert 1 < parts.micro_batch_size < 28
    assert parts.setup.peak_bytes <= 0.0015e9
    # Only the trained tower is encoded twice.
    assert parts.flops_per_pair == whole.flops_per_pair + whole.forward_flops["image"]
    assert f"--micro_batch_size {parts.micro_batch_size}" in parts.command
    assert "--micro_batch_size" not in whole.command


@pytest.mark.slow
def test_on_a_small_gpu_states_in_8_bits_are_used():
    module = small_models.open_clip_vit(layers=1, vocab_size=300)
    plan = fasterase.plan(module, 1000, gpu_memory=0.0008, batch_size=1, forget_batch_size=1)
    assert plan.setup.optimizer == "paged_adamw8bit"
    # Embeddings and small tensors, much of so small a model, keep 8 bytes.
    states = plan.bytes_per_gpu["optimizer_states"]
    assert 2 * plan.parameters < states < 5 * plan.parameters


@pytest.mark.parametrize("limit", [5, 1000, 1001, 4321, 10**6])
def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(limit):
    found = _largest(lambda pairs: max(20, 7 * pairs), limit, 3000)
    rounded = 8 if 64 < found < 3000 else 1
    assert found == 0 or max(20, 7 * found) <= limit
    assert found == 3000 or max(20, 7 * (found + rounded)) > limit


def test_a_micro_batch_measured_here_is_what_was_counted():
    model = load_architecture(small_models.open_clip_vit(image_size=128, layers=2))
    measured = measure_micro_batch(model, precision="fp32")
    # A small model: what the allocator keeps for itself shows.
    assert measured.correction == pytest.approx(1, abs=0.25)
    assert measured.tflops > 0


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("ViT-B-33", {}, "ViT-B-32"),
        (small_models.open_clip_vit(layers=1), {"gpu_memory": 0.01}, "Give more gpus or gpu_me"),
        ("ViT-B-32", {"gpus": 0}, "gpus=0"),
        ("ViT-B-32", {"forget": 1.5}, "forget=1.5"),
        (3, {}, "int is not a model"),
    ],
)
def test_what_cannot_be_planned_is_refused(model, options, says):
    with pytest.raises(InputError, match=says):
        fasterase.plan(model, 1000, **options)


def test_a_command_can_be_pasted():
    options = {"forget_words": ["guide dog", "cat"], "output_dir": "my runs", "device": "cpu"}
    command = fasterase.plan(small_models.open_clip_vit(), 1000, **options).command
    flags = shlex.split(command)
    assert flags[flags.index("--forget_words") + 1] == "guide dog,cat"
    assert flags.count("--output_dir") == 1


def test_a_configuration_out_of_reach_says_what_is_needed(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"folder .* works without network"):
        fasterase.plan("roberta-ViT-B-32", 1000)


@pytest.mark.slow
def test_finding_encodes_every_pair_once_and_holds_their_scores():
    model = small_models.open_clip_vit()
    plan = fasterase.plan(model, 2_000_000, tflops=1, efficiency=1, find=True)
    flops = 2_000_000 * (plan.forward_flops["image"] + plan.forward_flops["text"])
    assert plan.find_gpu_hours == pytest.approx(flops / 1e12 / 3600)
    lines = str(plan).splitlines()
    finding = lines.index("Finding the concept first (fasterase find)")
    assert "2,000,000 pairs" in lines[finding + 1]
    assert lines[finding + 2].endswith(" 12 MB")
    assert "Finding" not in str(fasterase.plan(model, 2_000_000))


@pytest.mark.slow
def test_outputs_of_frozen_blocks_take_disk():
    """17 tokens of 32 numbers for an image and 16 for a text, and 20 bytes beside each."""
    options = {"forget": 1000, "tune": "last:1", "prefix_cache": 20}
    model, image, text = small_models.open_clip_vit(), 17 * 32, 16 * 32
    found = fasterase.plan(model, 100_000, precision="fp32", **options)
    views = (25_600 + 9 * 1000) * (4 * image + 20)
    assert found.prefix_bytes == views + 26_600 * (4 * text + 20)
    assert "GB at most" in str(found)
    half = fasterase.plan(model, 100_000, forget_augment=False, **options)
    assert half.prefix_bytes == 26_600 * (2 * image + 2 * text + 40)
    assert fasterase.plan(model, 100_000, tune="last:1").prefix_bytes == 0
    flags = ["--model", "ViT-B-32", "--pairs", "9", "--prefix_cache", "20"]
    assert parse(["plan", *flags]).values["prefix_cache"] == 20
    with pytest.raises(InputError, match="one process"):
        fasterase.plan(model, 100_000, gpus=8, **options)


def test_loading_and_compute_make_the_wall_clock():
    """100 pairs/s of compute, 30 images/s of a worker: four workers keep up."""
    fed = Feeding(images_per_second=30, pairs_per_second=100, asked=0, is_measured=True)
    assert (fed.needed, fed.workers) == (4, 4)
    pairs, compute = 360_000, 1.0
    assert fed.hours(pairs, compute, 1, workers=4) == pytest.approx(1.0)  # compute binds
    assert fed.hours(pairs, compute, 1, workers=2) == pytest.approx(pairs / 60 / 3600)
    assert fed.hours(pairs, compute, 1, workers=0) == pytest.approx(pairs / 30 / 3600 + 1)
    assert fed.hours(pairs, compute, 2, workers=2) == pytest.approx(pairs / 120 / 3600)
    assert fed.describe().startswith("Compute binds")
    starved = dataclasses.replace(fed, asked=2)
    assert starved.workers == 2
    assert "Loading binds: 30 images/s per worker" in starved.describe()
    assert "waits 40% of the time with 2. Give --num_workers 4" in starved.describe()
    unknown = dataclasses.replace(fed, pairs_per_second=math.nan)
    assert (unknown.workers, unknown.describe()[:8]) == (1, "Loading:")


@pytest.mark.parametrize(
    ("hours", "said"), [(0.005, "18 s"), (0.5, "30.0 min"), (26.2, "26.2 h"), (math.nan, "unknown")]
)
def test_durations(hours, said):
    assert describe_hours(hours) == said


def test_a_plan_recommends_workers_and_measures_what_they_decode(capsys):
    model = small_models.open_clip_vit(layers=1, vocab_size=300)
    plan = fasterase.plan(model, 100_000, tflops=1, efficiency=1)
    rate = plan.feeding.images_per_second
    assert 5 < rate < 5000
    assert plan.feeding.is_measured
    assert f"--num_workers {plan.feeding.workers}" in plan.command
    assert "The smallest common GPU that it fits on is RTX 4060 (8 GB)" in str(plan)
    options = {"tflops": 1, "efficiency": 1, "images_per_second": 100, "num_workers": 3}
    told = fasterase.plan(model, 100_000, **options)
    assert "--num_workers 3" in told.command
    # 1,000 pairs to forget are 16 batches of 63.
    pairs = told.steps * (256 + 63) + told.retain_pairs
    loading = pairs / (100 * 3) / 3600
    assert loading > told.run_gpu_hours
    found = told.feeding.hours(told.run_pairs, told.run_gpu_hours, 1, workers=3)
    assert found == pytest.approx(loading)
    assert re.search(rf"the run, .* steps +{describe_hours(loading)} ", str(told))
    with pytest.raises(InputError, match="images_per_second=0"):
        fasterase.plan(model, 1000, images_per_second=0)


@pytest.mark.slow
def test_the_smallest_gpu_is_found_among_all_ways_to_run(monkeypatch):
    """Cards of the sizes of this small model: which one holds what is computed, not a constant."""
    model = small_models.open_clip_vit(layers=1, vocab_size=300)
    whole = fasterase.plan(model, 1000, images_per_second=1)
    peaks = sorted(each.peak_bytes / 0.92e9 for each in whole.setups)
    for memory, fits in ((1.01 * peaks[0], True), (0.99 * peaks[0], None), (1e-5, False)):
        monkeypatch.setattr(plan_module, "_CARDS", (("TINY", memory), ("LARGE", 2 * memory)))
        said = fasterase.plan(model, 1000, images_per_second=1).smallest_gpu
        assert ("none of the common GPUs" in said) == (fits is False)
        assert ("TINY" in said and "micro_batch_size" not in said) == bool(fits)
    assert not fasterase.plan(model, 1000, images_per_second=1, device="cpu").smallest_gpu


def test_progress_is_shown_while_passes_are_counted(monkeypatch, capsys):
    model = small_models.open_clip_vit(layers=1, vocab_size=300)
    shown = []
    bar = contextlib.nullcontext(SimpleNamespace(update=lambda: shown.append(1)))
    monkeypatch.setattr(plan_module, "Progress", lambda title, **options: bar)
    fasterase.plan(model, 1000, images_per_second=1)
    assert len(shown) >= 4  # both towers, a step, and one with checkpointing
