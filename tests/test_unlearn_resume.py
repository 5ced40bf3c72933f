"""A run that was killed goes on and ends with the very weights of one that was not."""

from __future__ import annotations

import functools
import json
import warnings
import zlib

import pytest
import torch

import fasterase
from fasterase.errors import ResumeError
from tests.marks import SHORT_RUN
from tests.tiny_concepts import AUTOMATIC, FORGET, RETAIN, knowing_model
from tests.tiny_model import Noisy, TinyModel, erase, pairs, same_weights, unchanged
from tests.tiny_run import CONFIG, in_process

EVERYTHING = {"train_mode": True, "train_logit_scale": True, "negatives": "joint"}
EVERYTHING |= {"warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1, "micro_batch_size": 3}
STEPS = [1, 2, 3, 4, 5, 6]


def lines(folder):
    path = folder / "history.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def steps(folder):
    return [json.loads(line)["step"] for line in lines(folder)]


def checkpoints(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return in_process(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    "die_at",
    [
        *("sweep block 2", "optimiser step 1", "optimiser step 4", "history line 3"),
        *("checkpoint shard 2", "checkpoint removal 1"),
    ],
)
def test_killed_once_and_run_again(tmp_path, whole, die_at):
    folder = tmp_path / "run"
    in_process(folder, die_at=die_at)
    saved = max(checkpoints(folder), default=0)
    before = lines(folder)[:saved]
    assert same_weights(in_process(folder), whole)
    assert lines(folder)[:saved] == before, "with its times, so these steps were not taken again"
    assert steps(folder) == STEPS
    assert checkpoints(folder) == [4, 6]


def test_killed_at_every_kind_of_moment_with_everything_on(tmp_path):
    options = {**EVERYTHING, "tower": {"dropout": 0.3, "batch_norm": True}, "n_retain": 1100}
    expected = in_process(tmp_path / "whole", **options)
    folder = tmp_path / "run"
    for moment in ("sweep block 3", "optimiser step 3", "checkpoint shard 1", "optimiser step 4"):
        in_process(folder, die_at=moment, **options)
    assert same_weights(in_process(folder, **options, num_workers=2), expected)
    assert steps(folder) == STEPS


def test_what_judges_a_run_that_ends_by_itself_does_not_change_on_resume(tmp_path):
    config = {**AUTOMATIC, "output_dir": str(tmp_path)}
    stopped = {"callback": lambda record: record.step == 2, "evaluation": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")
        fasterase.unlearn(knowing_model(), FORGET, RETAIN, **config, **stopped)
    with pytest.raises(ResumeError, match="what judges a run that ends by itself was None"):
        fasterase.unlearn(knowing_model(), FORGET, RETAIN, **config, evaluation="quick")


@pytest.mark.slow
def test_an_automatic_run_is_killed_while_it_learns_and_while_it_fades(tmp_path):
    config = {**AUTOMATIC, "save_every": 4}
    expected = in_process(tmp_path / "whole", **config)
    folder = tmp_path / "run"
    total = len(steps(tmp_path / "whole"))
    assert total > 40
    for step in (23, total - 5):
        taken = len(steps(folder)) // 4 * 4  # of which a checkpoint was written
        in_process(folder, die_at=f"optimiser step {step - taken}", **config)
        newest = max((folder / "checkpoints").iterdir())
        assert (newest / "best.safetensors").is_file()
    assert same_weights(in_process(folder, **config), expected)
    found, wanted = (
        [json.loads(line)["lr"] for line in lines(each)] for each in (folder, tmp_path / "whole")
    )
    assert found == wanted


def go(folder, tower=None, **config):
    return erase(tower, **{**CONFIG, "output_dir": folder, **config})


@functools.cache
def weights_of_an_unbroken_run():
    tower = TinyModel()
    erase(tower, **CONFIG)
    return tower.weights()


@pytest.fixture
def stopped(tmp_path):
    """A folder with a run that was stopped after three of its six steps."""
    go(tmp_path, callback=lambda record: record.step == 3)
    return tmp_path


@SHORT_RUN
class TestResume:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"lr": 2e-3}, "lr was 0.001, now 0.002"),
            ({"seed": 1}, "seed was 0, now 1"),
            ({"lr": "auto", "warmup_steps": 0}, "lr was 0.001, now 'auto'"),
            ({"max_steps": None}, "whether the run ends by itself was False, now True"),
            ({"forget_batch_size": 3}, "forget_batch_size was 4, now 3"),
            ({"betas": (0.9, 0.99)}, "betas was"),
            ({"tower": TinyModel(seed=5)}, "the model weights differ"),
            ({"retain": pairs(21, seed=2)}, "the retain pairs differ"),
            ({"forget": pairs(6, seed=4)}, "the forget pairs differ"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_another_run_is_refused_by_name(self, stopped, change, named):
        tower = change.get("tower") or TinyModel()
        config = (stopped / "config.yaml").read_text()
        with unchanged(tower.module), pytest.raises(ResumeError, match=named) as caught:
            go(stopped, **{**change, "tower": tower})
        assert "resume='never'" in str(caught.value)
        assert (stopped / "config.yaml").read_text() == config
        assert steps(stopped) == [1, 2, 3]

    @pytest.mark.parametrize(
        "change",
        [
            {"num_workers": 1, "save_every": 5, "max_skipped": 0.5},
            {"progress": True},
            {"device": "cpu"},
            {"micro_batch_size": 3},
            {"evaluation": "quick"},
            {"max_steps": None, "epochs": 3},
            {"stop_when_forgotten": True},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_what_changes_no_weight_may_change(self, stopped, change):
        again = TinyModel()
        result = go(stopped, again, **change)
        if "stop_when_forgotten" not in change:
            assert [record.step for record in result.history] == STEPS
            expected = weights_of_an_unbroken_run()
            torch.testing.assert_close(again.weights(), expected, atol=1e-6, rtol=0)

    def test_a_finished_run_goes_on_if_it_may_take_more_steps_and_else_does_nothing(self, tmp_path):
        whole = TinyModel()
        go(tmp_path / "whole", whole, max_steps=10)
        go(tmp_path / "run", max_steps=6)
        first = lines(tmp_path / "run")
        for taken in ([7, 8, 9, 10], []):
            again, seen = TinyModel(), []
            result = go(tmp_path / "run", again, max_steps=10, callback=seen.append)
            assert [record.step for record in seen] == taken
            assert [record.step for record in result.history] == list(range(1, 11))
            assert lines(tmp_path / "run")[:6] == first
            assert same_weights(again.weights(), whole.weights())

    @pytest.mark.parametrize(
        ("change", "asked"),
        [
            ({"max_steps": 2}, "max_steps=2"),
            ({"max_steps": None, "epochs": 1}, r"epochs=1 \(2 steps\)"),
            ({"max_steps": 2, "resume": "must"}, "max_steps=2"),
        ],
        ids=str,
    )
    def test_fewer_steps_than_were_taken_are_refused(self, stopped, change, asked):
        tower, config = TinyModel(), (stopped / "config.yaml").read_text()
        named = rf"{asked}: .* taken 3 steps .* Give 3 or more"
        with unchanged(tower.module), pytest.raises(ResumeError, match=named):
            go(stopped, tower, **change)
        assert (stopped / "config.yaml").read_text() == config
        assert [record.step for record in go(stopped, max_steps=3).history] == [1, 2, 3]

    def test_seconds_add_up_over_restarts_and_resuming_says_from_where(self, stopped, capsys):
        path = stopped / "checkpoints" / "step-000000003" / "state.json"
        state = json.loads(path.read_text())
        assert 0 < state["seconds"] < 100
        del state["checksum"]
        state["seconds"] = 1000.0
        signed = {**state, "checksum": zlib.crc32(json.dumps(state).encode())}
        path.write_text(json.dumps(signed))
        capsys.readouterr()
        assert 1000 < go(stopped, progress=True).seconds < 1100
        assert "".join(capsys.readouterr()).count("resuming after step 3") == 1
        assert go(stopped / "other").seconds < 100

    def test_never_starts_anew(self, stopped):
        tower, fresh = TinyModel(), TinyModel()
        result = go(stopped, tower=tower, resume="never", lr=2e-3, max_steps=2)
        assert [record.step for record in result.history] == [1, 2]
        assert steps(stopped) == [1, 2]
        go(stopped / "other", tower=fresh, lr=2e-3, max_steps=2)
        assert same_weights(tower.weights(), fresh.weights())
        assert checkpoints(stopped) == [2]

    def test_must_needs_a_checkpoint(self, tmp_path, stopped):
        with pytest.raises(ResumeError, match="holds no checkpoint"):
            go(tmp_path / "empty", resume="must")
        with pytest.raises(ResumeError, match="without output_dir"):
            go(None, resume="must")
        assert len(go(stopped, resume="must").history) == 6

    @pytest.mark.parametrize("part", ["shard-00001-of-00001.safetensors", "state.json"])
    def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_replaced(
        self, stopped, caplog, part
    ):
        newest = stopped / "checkpoints" / "step-000000003"
        data = (newest / part).read_bytes()
        seconds = data.find(b'"seconds": ') + len(b'"seconds": ')
        harmed = data[:seconds] + b"7" + data[seconds + 1 :] if part == "state.json" else data[:-9]
        assert harmed != data
        (newest / part).write_bytes(harmed)
        # It repeats the step that was lost, and no other run repeats it again.
        for stop_at, expected in ((3, [3]), (6, [4, 5, 6])):
            again, seen = TinyModel(), []
            go(stopped, again, callback=lambda each: seen.append(each.step) or each.step == stop_at)  # noqa: B023
            assert seen == expected
            assert caplog.text.count(f"{newest} cannot be read ({part} is damaged)") == 1
        assert same_weights(again.weights(), weights_of_an_unbroken_run())
        assert steps(stopped) == STEPS

    def test_a_damaged_checkpoint_pushes_out_no_whole_one(self, stopped):
        (stopped / "checkpoints" / "step-000000005").mkdir()
        go(stopped, callback=lambda record: record.step == 4)
        assert checkpoints(stopped) == [3, 4]

    def test_no_readable_checkpoint_is_an_error(self, stopped):
        for folder in (stopped / "checkpoints").iterdir():
            (folder / "state.json").unlink()
        with pytest.raises(ResumeError, match=r"none of the checkpoints .* can be read"):
            go(stopped)

    def test_fp16_loss_scale_and_counts_go_on(self, stopped):
        folder = stopped / "fp16"
        config = {"precision": "fp16", "max_steps": 5, "save_every": 1}
        go(folder, callback=lambda record: record.step == 3, **config)
        whole, again = TinyModel(), TinyModel()
        go(folder, tower=again, **config)
        go(stopped / "whole", tower=whole, **config)
        assert same_weights(again.weights(), whole.weights())

    @pytest.mark.filterwarnings("ignore:.retain. is not checked for images")
    def test_random_data_is_repeated_too(self, tmp_path):
        sets = {"forget": Noisy(pairs(10, seed=1)), "retain": Noisy(pairs(10, seed=2))}

        def noisy(folder, tower, **options):
            with pytest.warns(UserWarning, match="runs beside the trained one in every step"):
                return go(folder, tower=tower, **sets, **options)

        whole, again = TinyModel(), TinyModel()
        expected = noisy(tmp_path / "whole", whole)
        noisy(tmp_path / "run", TinyModel(), callback=lambda record: record.step == 3)
        torch.manual_seed(77)
        result = noisy(tmp_path / "run", again)
        assert (result.floor, result.traces) == (expected.floor, expected.traces)
        assert same_weights(again.weights(), whole.weights())
        assert not (tmp_path / "run" / "reference").exists()
