"""The contrastive benchmark: what it measures is what it says, and a killed run resumes."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

from benchmarks.contrastive import measure, sweep
from benchmarks.contrastive.case import Case, exact_losses, flops, in_fp64, make_inputs
from benchmarks.contrastive.providers import PROVIDERS, UnavailableError
from benchmarks.contrastive.report import markdown_tables
from benchmarks.contrastive.rows import read_rows, write_rows
from tests import oracle

NO_COMPILER = ["fasterase-cpu", "fasterase-chunked", "fasterase-dense", "open_clip"]
LIGER_HEADER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,version"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A small sweep into a file of its own; returns its rows."""
    monkeypatch.setattr(sweep, "GEMM_SIZE", {"cpu": 64})
    path = tmp_path / "results.csv"

    def call(*extra: str):
        fixed = (
            f"--output {path} --device cpu --sizes 24 40 --widths 16 --seconds 0 --error-size 20"
        )
        providers = ["--providers", "fasterase-chunked", "open_clip", "memeff"]
        sweep.main([*fixed.split(), *providers, *extra])
        return read_rows(path)

    call.path = path
    # Every timing collects garbage first; what the other tests left would make that seconds.
    gc.freeze()
    yield call
    gc.unfreeze()


@pytest.mark.parametrize("kl", [False, True])
def test_truth_agrees_with_the_oracle(kl):
    inputs = in_fp64(make_inputs(Case(12, 8, scale=20.0, kl=kl)))
    losses = exact_losses(inputs)
    image, text, scale, ref_image, ref_text, ref_scale = (
        None if x is None else x.detach().numpy() for x in inputs
    )
    batch = oracle.Batch(image, text, float(scale), ref_image, ref_text, ref_scale)
    expected, _ = oracle.contrastive(batch, np.zeros((4, 12)))
    assert losses.clip.item() == pytest.approx(expected.mean(1).sum() / 2)
    logits = float(scale) * image @ text.T - 10
    sign = 2 * np.eye(12) - 1
    assert losses.siglip.item() == pytest.approx(np.log1p(np.exp(-sign * logits)).sum() / 12)
    assert (losses.reference_entropy.item() > 0) == kl


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("name", [*NO_COMPILER, "torch-linear-ce"])
def test_providers_compute_the_same_loss_and_gradients(name, kl):
    case = Case(65, 24, scale=14.3, kl=kl)
    try:
        errors = measure.errors_against_fp64(PROVIDERS[name], case)
    except UnavailableError as why:
        pytest.skip(str(why))
    assert set(errors) == set(sweep.ERRORS)
    assert max(errors.values()) < 1e-5


def test_an_error_is_seen():
    wrong = dataclasses.replace(
        PROVIDERS["fasterase-dense"],
        build=lambda case: (
            lambda inputs: 1.01 * (inputs.scale * inputs.image @ inputs.text.T).sum()
        ),
    )
    assert min(measure.errors_against_fp64(wrong, Case(20, 8)).values()) > 0.05


def test_flops_are_those_of_the_algorithm():
    plain, kl = Case(10, 3), Case(10, 3, kl=True)
    unit = 10**2 * 3
    found = [flops(case, mode) // unit for case in (plain, kl) for mode in ("forward", "backward")]
    assert found == [2, 6, 4, 8]
    assert [flops(plain, "full"), flops(kl, "full")] == [8 * unit, 12 * unit]
    assert flops(plain, "full", "siglip") == 6 * unit


def test_modes_time_their_own_part(monkeypatch):
    case = Case(8, 4)
    inputs = make_inputs(case)
    loss = PROVIDERS["open_clip"].build(case)
    seen = []

    def clock(call, device):
        before = inputs.image.grad is not None
        result = call()
        seen.append((before, inputs.image.grad is not None, getattr(result, "requires_grad", None)))
        return 1.0

    monkeypatch.setattr(measure, "clock", clock)
    for mode in ("no-grad-forward", "forward", "backward", "full"):
        measure.repetition(loss, inputs, mode, "cpu")()
    assert seen == [(False, False, False), (False, False, True), *[(False, True, None)] * 2]


def test_times_are_interleaved_and_share_out_the_budget(monkeypatch):
    now, order = 0.0, []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)

    def takes(name: str, seconds: float):
        def call() -> float:
            nonlocal now
            now += seconds
            order.append(name)
            return seconds * 1e3

        return call

    def fails() -> float:
        raise RuntimeError("out of luck\nand a stack")

    samples, failures = measure.time_interleaved(
        {"quick": takes("quick", 0.25), "slow": takes("slow", 3.0), "broken": fails},
        seconds=1.0,
        patience=5.0,
        min_samples=3,
        max_samples=10,
    )
    assert failures == {"broken": "RuntimeError: out of luck"}
    # The quick one's warm-up is dropped, the slow one's counts; its patience ends after two.
    assert samples == {"quick": [250.0] * 4, "slow": [3000.0] * 2}
    assert order == ["quick", "slow", "slow", "quick", "quick", "quick", "quick"]


def test_memory_is_that_of_the_matrices():
    case = Case(2048, 8)  # 16 MB a matrix, far above what a first call touches besides
    matrices = [
        measure.peak_extra_bytes(PROVIDERS[name], case, "full") / case.matrix_bytes
        for name in ("fasterase-dense", "fasterase-chunked")
    ]
    assert 4 < matrices[0] <= PROVIDERS["fasterase-dense"].dense_matrices[0] + 0.5
    assert matrices[1] < matrices[0] / 2


def test_memory_of_a_provider_that_fails_says_why():
    with pytest.raises(UnavailableError, match="need a CUDA GPU"):
        measure.peak_extra_bytes(PROVIDERS["memeff"], Case(64, 8), "full")


def test_every_cell_is_a_row_and_a_failure_says_why(run):
    modes = ["full", "forward", "backward", "no-grad-forward"]
    rows = run("--metrics", "speed", "error", "--modes", *modes)
    assert run.path.read_text().splitlines()[0] == LIGER_HEADER
    speed = [row for row in rows if row.metric_name == "speed"]
    assert len(speed) == 2 * 2 * len(modes) * (3 + 1)  # sizes, teachers; gemm beside providers
    assert len(rows) - len(speed) == 2 * 3 * len(sweep.ERRORS)
    for row in rows:
        if row.kernel_provider == "memeff":
            assert row.y_value_50 is None
            assert "KL" in row.extra["why"] or "CUDA" in row.extra["why"]
        else:
            assert row.y_value_20 <= row.y_value_50 <= row.y_value_80
    for row in speed:
        if row.kernel_provider == "open_clip":
            case = Case(row.x_value, 16, kl=row.extra["kl"])
            rate = flops(case, row.kernel_operation_mode) / row.y_value_50 / 1e9
            assert row.extra["tflops"] == pytest.approx(rate, abs=1e-4)


def test_a_killed_run_resumes(run):
    whole = run("--metrics", "speed")
    text = run.path.read_text()
    run("--metrics", "speed")
    assert run.path.read_text() == text

    lost = whole.pop()
    write_rows(run.path, whole)
    again = run("--metrics", "speed")
    assert {row.key for row in again} == {row.key for row in whole} | {lost.key}
    kept = {row.key: row for row in again}
    providers = [row for row in whole if row.kernel_provider != "gemm"]
    assert all(kept[row.key] == row for row in providers)

    fresh = run("--metrics", "speed", "--fresh")
    assert len(fresh) == len(whole) + 1
    assert run.path.read_text() != text


def test_too_large_a_size_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(sweep, "available_bytes", lambda device: 1000)
    rows = run("--metrics", "speed", "--teacher", "without")
    found = {row.kernel_provider: row for row in rows}
    assert "not tried: its dense matrices" in found["open_clip"].extra["why"]
    assert found["fasterase-chunked"].y_value_50 > 0


def test_rows_survive_the_file(run, tmp_path):
    rows = run("--metrics", "speed")
    write_rows(tmp_path / "copy.csv", [*rows, *rows])
    assert read_rows(tmp_path / "copy.csv") == rows
    assert read_rows(tmp_path / "none.csv") == []


def test_pictures_and_tables_show_what_was_measured(run, capsys):
    rows = run("--metrics", "speed", "--plot", "--table")
    picture = run.path.with_name("results_speed_float32_100.svg")
    assert picture.stat().st_size > 5000
    assert not run.path.with_name("results_memory_float32_100.svg").exists()
    assert markdown_tables(rows) in capsys.readouterr().out
    lines = markdown_tables(rows).splitlines()
    assert sum(line.startswith("| open_clip | ") for line in lines) == 2
    assert sum(line.startswith("- memeff: memeff has no KL") for line in lines) == 1
    value = next(r.y_value_50 for r in rows if (r.kernel_provider, r.x_value) == ("open_clip", 40))
    assert f"| {value:.3g} (" in markdown_tables(rows)


def test_inputs_are_unit_rows_and_the_same_every_time():
    one, two = (make_inputs(Case(30, 16, kl=True)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    for features in (one.image, one.text, one.ref_image, one.ref_text):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(30))
