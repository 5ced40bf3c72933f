"""The contrastive benchmark: what it measures is what it says, and a killed run resumes."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import numpy as np
import pytest

from benchmarks.loss import __main__ as sweep
from benchmarks.loss import measure
from benchmarks.loss.case import Case, exact_losses, flops, in_fp64, make_inputs
from benchmarks.loss.providers import PROVIDERS, UnavailableError
from benchmarks.loss.report import explain_share, fastest, markdown_tables
from benchmarks.loss.rows import Row, read_rows, write_rows
from benchmarks.result_files import RESULTS
from fasterase.ops.contrastive import available_backends, cpu
from tests import oracle

NO_COMPILER = ["fasterase-cpu", "fasterase-chunked", "fasterase-dense", "torch-dense", "open_clip"]
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
            f"--output {path} --device cpu --sizes 24 40 --widths 16 --seconds 0 --error-size 20 "
            "--labels without --min-samples 1"
        )
        providers = ["--providers", "fasterase-chunked", "open_clip", "memeff"]
        sweep.main([*fixed.split(), *providers, *extra])
        return read_rows(path)

    call.path = path
    # Every timing collects garbage first; what the other tests left would make that seconds.
    gc.freeze()
    yield call
    gc.unfreeze()


@pytest.mark.parametrize(("kl", "labels"), [(False, False), (True, False), (False, True)])
def test_truth_agrees_with_the_oracle(kl, labels):
    inputs = in_fp64(make_inputs(Case(12, 8, scale=20.0, kl=kl, labels=labels)))
    losses = exact_losses(inputs)
    image, text, scale, ref_image, ref_text, ref_scale = (
        None if x is None else x.detach().numpy() for x in inputs[:6]
    )
    numbers = inputs.labels.numpy() if labels else None
    batch = oracle.Batch(image, text, float(scale), ref_image, ref_text, ref_scale, numbers)
    expected, _ = oracle.contrastive(batch, np.zeros((4, 12)))
    assert losses.clip.item() == pytest.approx(expected.mean(1).sum() / 2)
    logits = float(scale) * image @ text.T - 10
    sign = 2 * np.eye(12) - 1
    assert losses.siglip.item() == pytest.approx(np.log1p(np.exp(-sign * logits)).sum() / 12)
    assert (losses.reference_entropy.item() > 0) == kl


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("name", [*NO_COMPILER, "torch-linear-ce"])
def test_providers_compute_the_same_loss_and_gradients(name, kl, labels):
    case = Case(65, 24, scale=14.3, kl=kl, labels=labels)
    try:
        errors = measure.errors_against_fp64(PROVIDERS[name], case)
    except UnavailableError as why:
        pytest.skip(str(why))
    assert set(errors) == set(sweep.ERRORS)
    assert max(errors.values()) < 1e-5


@pytest.mark.skipif("cpu" not in available_backends(), reason="no C++ kernels")
def test_bf16_products_are_measured_only_where_there_is_amx(monkeypatch):
    provider, case = PROVIDERS["fasterase-cpu-bf16"], Case(65, 24, scale=14.3)
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    with pytest.raises(UnavailableError, match="no AMX"):
        provider.build(case)
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    errors = measure.errors_against_fp64(provider, case)
    assert 1e-5 < errors["image_grad_error"] < 2e-2


def test_the_truth_is_computed_once_a_case(monkeypatch):
    made = []
    monkeypatch.setattr(measure, "in_fp64", lambda inputs: made.append(1) or in_fp64(inputs))
    measure.fp64_truth.cache_clear()
    for name in ("fasterase-dense", "torch-dense", "open_clip"):
        measure.errors_against_fp64(PROVIDERS[name], Case(20, 8, kl=True))
    assert len(made) == 1
    measure.errors_against_fp64(PROVIDERS["torch-dense"], Case(21, 8, kl=True))
    assert len(made) == 2


def test_an_error_is_seen():
    def wrong(inputs):
        return 1.01 * (inputs.scale * inputs.image @ inputs.text.T).sum()

    provider = dataclasses.replace(PROVIDERS["fasterase-dense"], build=lambda case: wrong)
    assert min(measure.errors_against_fp64(provider, Case(20, 8)).values()) > 0.05


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
        min_samples=3,
        max_samples=10,
    )
    assert failures == {"broken": "RuntimeError: out of luck"}
    # The quick one's warm-up is dropped, the slow one's counts.
    assert samples == {"quick": [250.0] * 4, "slow": [3000.0] * 3}
    rounds = [sorted(order[start : start + 2]) for start in (0, 2, 4)]
    assert rounds == [["quick", "slow"]] * 3
    assert order[6:] == ["quick"] * 2


def test_no_provider_always_follows_the_same_other(monkeypatch):
    monkeypatch.setattr(measure.gc, "collect", lambda: None)  # of all that other tests have left
    order: list[str] = []

    def call(name: str):
        return lambda: order.append(name) or 1.0

    measure.time_interleaved(
        {name: call(name) for name in "abc"}, seconds=0.0, min_samples=100, max_samples=100
    )
    pairs = set(itertools.pairwise(order))
    assert {(a, b) for a, b in pairs if a != b} == set(itertools.permutations("abc", 2))


@pytest.mark.slow
def test_memory_is_that_of_the_matrices():
    case = Case(2048, 8)  # 16 MB a matrix, far above what a first call touches besides
    dense = ("fasterase-dense", "torch-dense")
    found = {
        name: measure.peak_extra_bytes(PROVIDERS[name], case, "full") / case.matrix_bytes
        for name in (*dense, "fasterase-chunked")
    }
    for name in dense:
        stated = PROVIDERS[name].dense_matrices[0]
        assert abs(found[name] - stated) < 1
    assert found["fasterase-chunked"] < found["fasterase-dense"] / 2


@pytest.mark.slow
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
        elif row.kernel_provider == "fasterase-chunked" and row.kernel_operation_mode in modes[1:3]:
            assert "its forward pass makes the gradients" in row.extra["why"]
        else:
            assert row.y_value_20 <= row.y_value_50 <= row.y_value_80
    for row in speed:
        if row.kernel_provider == "open_clip":
            case = Case(row.x_value, 16, kl=row.extra["kl"])
            rate = flops(case, row.kernel_operation_mode) / row.y_value_50 / 1e9
            assert row.extra["tflops"] == pytest.approx(rate, abs=1e-4)


def test_a_killed_run_resumes(run):
    assert read_rows(run.path) == []
    whole = run("--metrics", "speed")
    text = run.path.read_text()
    run("--metrics", "speed")
    assert run.path.read_text() == text
    write_rows(run.path, [*whole, *whole])
    assert read_rows(run.path) == whole

    lost = whole.pop()
    write_rows(run.path, whole)
    again = run("--metrics", "speed")
    assert {row.key for row in again} == {row.key for row in whole} | {lost.key}
    # Times compare only within a cell that was measured in turn: its others are measured anew.
    kept = {row.key: row for row in again}
    other_cells = [r for r in whole if (r.x_value, r.extra["kl"]) != (lost.x_value, True)]
    assert lost.extra["kl"]
    assert len(other_cells) == 3 * 4
    assert all(kept[row.key] == row for row in other_cells)

    fresh = run("--metrics", "speed", "--fresh")
    assert len(fresh) == len(whole) + 1
    assert run.path.read_text() != text
    kept = {row.key: row for row in run("--metrics", "speed", "--fresh", "--sizes", "24")}
    assert all(kept[row.key] == row for row in fresh if row.x_value == 40)
    assert any(kept[row.key] != row for row in fresh if row.x_value == 24)


def test_rows_of_another_version_are_measured_again(run, monkeypatch):
    arguments = ("--metrics", "error", "--teacher", "without")
    before = run(*arguments)
    monkeypatch.setattr(sweep, "code_version", lambda: "another")
    after = run(*arguments)
    assert [row.key for row in after] == [row.key for row in before]
    assert {row.version for row in after} == {"another"}


def test_what_failed_is_tried_again_after_all_else(run, monkeypatch):
    arguments, provider, seen = ("--metrics", "speed", "--teacher", "without"), "open_clip", []

    def build(case):
        seen.append(case.num_pairs)
        if len(seen) == 1:
            raise RuntimeError("no luck")
        if len(seen) == 2:
            raise KeyboardInterrupt
        return works.build(case)

    works = PROVIDERS[provider]
    monkeypatch.setitem(PROVIDERS, provider, dataclasses.replace(works, build=build))
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    (failed,) = [row for row in read_rows(run.path) if row.kernel_provider == provider]
    assert failed.extra["why"] == "RuntimeError: no luck"
    found = [row for row in run(*arguments) if row.kernel_provider == provider]
    assert seen[:3] == [24, 40, 40]
    assert all(row.y_value_50 for row in found)
    text, count = run.path.read_text(), len(seen)
    run(*arguments)  # memeff still gives its reason
    assert (run.path.read_text(), len(seen)) == (text, count)


def test_too_large_a_size_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(sweep, "available_bytes", lambda device: 1000)
    rows = run("--metrics", "speed", "--teacher", "without")
    found = {row.kernel_provider: row for row in rows}
    assert "not tried: its dense matrices" in found["open_clip"].extra["why"]
    assert found["fasterase-chunked"].y_value_50 > 0
    rows = run("--metrics", "error", "--teacher", "without")
    errors = {row.kernel_provider: row for row in rows if row.metric_name == "loss_error"}
    assert "not tried: its dense matrices" in errors["open_clip"].extra["why"]
    assert errors["fasterase-chunked"].y_value_50 is not None


def test_pictures_and_tables_show_what_was_measured(run, capsys):
    rows = run("--metrics", "speed", "--plot", "--table")
    picture = run.path.with_name("results_speed_float32_100.svg")
    assert picture.stat().st_size > 5000
    assert not run.path.with_name("results_memory_float32_100.svg").exists()
    assert markdown_tables(rows) in capsys.readouterr().out
    lines = markdown_tables(rows).splitlines()
    assert run.path.with_suffix(".md").read_text().splitlines() == lines
    assert sum("| open_clip | " in line for line in lines) == 4
    assert sum(line.startswith("- memeff: memeff has no KL") for line in lines) == 1
    value = next(r.y_value_50 for r in rows if (r.kernel_provider, r.x_value) == ("open_clip", 40))
    assert f" {value:.3g} | " in markdown_tables(rows).replace("*", "")


def timed(provider: str, low: float, middle: float, high: float, *, kl=False, share=0.5) -> Row:
    extra = {"D": 8, "dtype": "float32", "scale": 100.0, "kl": kl, "labels": False, "threads": 2}
    extra |= {"torch": "2.13", "samples": 5, "tflops": 0.1, "of_gemm": share}
    head = ("contrastive", provider, "full", "speed", "ms", "N", "pairs in the batch", 8192)
    return Row(*head, middle, low, high, extra)


def test_committed_tables_are_those_of_the_committed_numbers():
    path = RESULTS / "contrastive_cpu.csv"
    assert path.with_suffix(".md").read_text() == markdown_tables(read_rows(path)) + "\n"


def test_fastest_means_that_no_interval_overlaps():
    own, peer = timed("fasterase-cpu", 90, 100, 110), timed("open_clip", 111, 200, 210)
    assert fastest([peer, own]) is own
    assert "**100**" in markdown_tables([peer, own])
    peer.y_value_20 = 109.0
    assert fastest([peer, own]) is None
    assert "**100**" not in markdown_tables([peer, own])
    peer.y_value_20 = 150.0
    assert fastest([peer, own]) is own
    peer.extra["samples"] = 2
    assert fastest([peer, own]) is None
    assert fastest([]) is None


def test_tables_give_the_ratio_to_both_baselines():
    own = timed("fasterase-cpu", 90, 100, 110)
    others = [timed("torch-dense", 140, 150, 160), timed("open_clip", 290, 300, 310)]
    head = "| 8,192 | fasterase-cpu | 90 | **100** | 110 | 5 "
    assert f"{head}| 1.50 | 3.00 | 50% |" in markdown_tables([own, *others])
    assert f"{head}| – | – | 50% |" in markdown_tables([own])


def test_a_share_above_one_is_explained_or_left_out():
    assert explain_share(timed("open_clip", 1, 1, 1, share=1.04)) is None
    kept = timed("torch-dense", 1, 1, 1, share=1.3)
    assert "6 of the 8 N^2 D" in explain_share(kept)
    assert "8 of the 12 N^2 D" in explain_share(timed("torch-dense", 1, 1, 1, kl=True, share=1.5))
    assert "| 130% |" in markdown_tables([kept])
    note = "- torch-dense at N = 8,192 (130%): keeps logits"
    assert note in markdown_tables([kept])
    for unbelievable in (
        timed("torch-dense", 1, 1, 1, share=1.5),  # more than keeping all logits explains
        timed("fasterase-chunked", 1, 1, 1, share=1.1),  # keeps none
    ):
        assert "slowed down by other work" in explain_share(unbelievable)
        lines = markdown_tables([unbelievable]).splitlines()
        assert [line[-5:] for line in lines if line.startswith("| 8,192 |")] == ["| – |"]


def test_labels_are_a_dimension_at_the_first_width():
    parser = sweep._parser()
    given = "--device cpu --sizes 8 --widths 16 32 --metrics speed"
    args = parser.parse_args(given.split())
    found = [(case.width, case.kl, case.labels) for _, case, _ in sweep.cases(args)]
    assert sorted(found) == [
        *((16, kl, labels) for kl in (False, True) for labels in (False, True)),
        *((32, kl, False) for kl in (False, True)),
    ]
