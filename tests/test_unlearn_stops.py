"""Runs that end early: non-finite steps, signals, callbacks, and errors before the first step."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

import fasterase
from fasterase.errors import InputError, NonFiniteError, PreemptedError
from tests.marks import SHORT_RUN
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model
from tests.tiny_model import TinyModel, pairs, same_weights
from tests.tiny_run import preempted_with_workers

FORGET, RETAIN = pairs(6, seed=1), pairs(20, seed=2)
QUIET = {"progress": False, "evaluation": None}
pytestmark = SHORT_RUN


def run(tower, *, forget=FORGET, retain=RETAIN, callback=None, **config):
    settings = {"lr": 1e-3, "batch_size": 8, "forget_batch_size": 4, "max_steps": 5}
    return fasterase.unlearn(
        tower, forget, retain, callback=callback, **{**settings, **QUIET, **config}
    )


def break_from(tower, step: int, *, steps: int | None = None, side: str = "image"):
    """Features turn NaN in training step `step` and the `steps` after it."""
    plain = getattr(tower, f"encode_{side}")
    seen = [0]

    def encode(batch):
        features = plain(batch)
        if features.requires_grad:
            seen[0] += 1
            if seen[0] >= step and (steps is None or seen[0] < step + steps):
                return features * float("nan")
        return features

    setattr(tower, f"encode_{side}", encode)


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_lasting_nan_stops_with_the_last_good_weights(side):
    tower = TinyModel()
    break_from(tower, 3, side=side)
    good = []
    with pytest.raises(NonFiniteError, match="not finite at step 5") as caught:
        run(
            tower,
            max_steps=50,
            callback=lambda record: good.append((record, tower.weights())),
        )
    assert caught.value.term == "forget"
    assert caught.value.step == 5
    assert set(caught.value.pair_ids) <= {
        *(f"forget[{i}]" for i in range(6)),
        *(f"retain[{i}]" for i in range(20)),
    }
    assert len(caught.value.pair_ids) == 8 + 3
    assert [record.applied for record, _ in good] == [True, True, False, False]
    assert same_weights(tower.weights(), good[1][1])
    assert all(
        not parameter.requires_grad or parameter.grad is None
        for parameter in tower.module.parameters()
    )


def test_one_nan_batch_is_left_out_and_the_run_goes_on():
    tower = TinyModel()
    break_from(tower, 2, steps=2)
    seen = []
    result = run(tower, callback=lambda _: seen.append(tower.weights()))
    assert [record.applied for record in result.history] == [True, False, False, True, True]
    assert same_weights(seen[0], seen[2])
    assert not same_weights(seen[2], seen[3])
    assert all(torch.isfinite(tensor).all() for tensor in tower.weights().values())


def test_a_nan_gradient_of_a_finite_loss_is_not_applied():
    tower = TinyModel()
    weight = tower.module.text_projection.weight
    before = tower.weights()
    handle = []

    def poison(record):
        if not handle:
            handle.append(weight.register_hook(lambda grad: grad * float("inf")))

    with pytest.raises(NonFiniteError) as caught:
        run(tower, max_steps=9, callback=poison)
    assert (caught.value.term, caught.value.step) == ("gradient", 4)
    assert not same_weights(tower.weights(), before)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_nan_step_does_not_reach_batch_norm_statistics(micro_batch_size):
    tower = TinyModel(batch_norm=True)
    statistics = tower.module.image[2]
    layer = tower.module.image[1]
    broken = [0]

    def hook(module, inputs, output):
        if tower.module.training and broken[0] == 1:
            return output * float("nan")
        return output

    layer.register_forward_hook(hook)

    def count(record):
        broken[0] = 1 if record.step == 2 else 0

    result = run(tower, callback=count, train_mode=True, micro_batch_size=micro_batch_size)
    assert [record.applied for record in result.history] == [True, True, False, True, True]
    assert statistics.running_mean.isfinite().all()
    assert statistics.running_var.isfinite().all()


def test_sigterm_stops_after_the_step_with_a_checkpoint(tmp_path):
    tower = TinyModel()

    def terminate(record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(PreemptedError, match=r"SIGTERM after step 2\. A checkpoint is in"):
        run(tower, callback=terminate, output_dir=tmp_path)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]
    again = TinyModel()
    result = run(again, output_dir=tmp_path)
    whole = TinyModel()
    run(whole)
    assert [record.step for record in result.history] == [1, 2, 3, 4, 5]
    assert same_weights(again.weights(), whole.weights())


def test_sigterm_to_all_processes_of_the_run(tmp_path):
    """As schedulers send it: workers that died of it would take the step with them."""
    assert preempted_with_workers(tmp_path) == 75
    assert (tmp_path / "checkpoints" / "step-000000002").is_dir()


def test_sigterm_in_the_last_step_is_not_lost_without_output_dir_either():
    said = "after step 1. Nothing was saved; give an output_dir"
    with pytest.raises(PreemptedError, match=said):
        run(TinyModel(), callback=lambda _: os.kill(os.getpid(), signal.SIGTERM), max_steps=1)


@pytest.mark.parametrize("saving", [False, True])
def test_ctrl_c_finishes_the_step(tmp_path, saving):
    tower = TinyModel()
    seen = []

    def interrupt(record):
        seen.append(tower.weights())
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    output = {"output_dir": tmp_path} if saving else {}
    said = (
        r"A checkpoint is in .*checkpoints; make the same call" if saving else "Nothing was saved"
    )
    with pytest.raises(KeyboardInterrupt, match=rf"^stopped by Ctrl-C after step 2\. {said}"):
        run(tower, callback=interrupt, **output)
    assert same_weights(tower.weights(), seen[1])
    assert all(parameter.requires_grad for parameter in tower.module.parameters())
    assert (tmp_path / "checkpoints" / "step-000000002").is_dir() == saving


@pytest.fixture
def _ctrl_c_is_heard():
    """A shell has what it starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_in_the_sweep_leaves_the_model_as_it_was(tmp_path, saving):
    tower = TinyModel()
    before = tower.weights()
    plain = tower.encode_text

    def encode(tokens):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(tokens)

    tower.encode_text = encode  # type: ignore[method-assign]
    said = "No step was saved yet; make the same call" if saving else "Nothing was saved"
    with pytest.raises(KeyboardInterrupt, match=rf"^stopped by Ctrl-C\. {said}"):
        run(tower, **({"output_dir": tmp_path} if saving else {}))
    assert same_weights(tower.weights(), before)


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    tower = TinyModel()
    plain = tower.encode_text

    def encode(tokens):
        features = plain(tokens)
        if features.requires_grad:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return features

    tower.encode_text = encode  # type: ignore[method-assign]
    history = []
    with pytest.raises(KeyboardInterrupt):
        run(tower, callback=history.append)
    assert not history


def test_runs_in_a_thread_which_may_set_no_handlers():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(TinyModel(), max_steps=2)))
    thread.start()
    thread.join()
    assert len(results[0].history) == 2


def test_callback_true_ends_the_run_and_anything_else_does_not(tmp_path):
    result = run(TinyModel(), callback=lambda record: record.step == 3, output_dir=tmp_path)
    assert len(result.history) == 3
    assert (tmp_path / "checkpoints" / "step-000000003").is_dir()
    assert (tmp_path / "model").is_dir()
    assert len(run(TinyModel(), callback=lambda record: record).history) == 5


def test_an_error_of_the_callback_comes_through():
    tower = TinyModel()

    def fail(record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tower, callback=fail)
    assert all(parameter.requires_grad for parameter in tower.module.parameters())


CONCEPT = {
    "forget": concept_pairs([FORGOTTEN], 24, seed=1),
    "retain": concept_pairs(KEPT, 20, seed=2),
    "batch_size": 32,
    "forget_batch_size": 8,
}


@pytest.mark.parametrize("lr", [2e-3, "auto"])
def test_stops_when_forgotten_and_stays_stopped(tmp_path, lr):
    config = {"stop_when_forgotten": True, "lr": lr, "max_steps": 300, "output_dir": tmp_path}
    tower = knowing_model()
    result = run(tower, **CONCEPT, **config)
    steps = len(result.history)
    assert result.verdict == "forgotten"
    assert 3 <= steps < 300
    assert steps % 3 == 0, "checked once a pass over the 24 forget pairs, three steps"
    longer = run(knowing_model(), **CONCEPT, **{**config, "output_dir": None}, resume="never")
    assert len(longer.history) == steps
    again = knowing_model()
    repeated = run(again, **CONCEPT, **config)
    assert repeated.verdict == "forgotten"
    assert len(repeated.history) == steps
    assert same_weights(again.weights(), tower.weights())
    on = run(
        knowing_model(),
        **CONCEPT,
        **{**config, "stop_when_forgotten": False, "max_steps": steps + 3},
    )
    assert len(on.history) == steps + 3, "who no longer wants it to stop gets the steps left"


def test_a_model_that_never_knew_stops_at_the_first_check():
    result = run(TinyModel(), **CONCEPT, stop_when_forgotten=True, max_steps=300)
    assert (result.verdict, len(result.history)) == ("never known", 3)


def test_remembered_is_a_warning_that_says_what_to_change():
    remembered = r"^verdict: remembered\nforget: residue [\d.]+ image->text.*max_steps or epochs"
    with pytest.warns(UserWarning, match=rf"(?s){remembered}.*higher lr \(now 1e-07\)"):
        result = run(knowing_model(), **CONCEPT, lr=1e-7)
    assert not result.forgotten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_error_before_the_first_step_leaves_everything_as_it_was(dtype):
    tower = TinyModel(dropout=0.1, batch_norm=True)
    module = tower.module.to(dtype)
    module.train()
    module.image[2].eval()
    module.embedding.weight.requires_grad_(False)
    before = tower.weights()
    modes = [part.training for part in module.modules()]
    flags = [parameter.requires_grad for parameter in module.parameters()]
    broken = [*RETAIN[:10], (torch.zeros(3, 5, 5), RETAIN[0][1])]
    with pytest.raises(InputError, match=r"retain\[10\]"):
        run(tower, retain=broken)
    assert same_weights(tower.weights(), before)
    assert modes == [part.training for part in module.modules()]
    assert flags == [parameter.requires_grad for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_trained_in_fp32_and_rounded_once(dtype):
    half, full = TinyModel(), TinyModel()
    half.module.to(dtype)
    full.module.load_state_dict({k: v.float() for k, v in half.weights().items()})
    run(half)
    run(full)
    rounded = {name: tensor.to(dtype) for name, tensor in full.weights().items()}
    assert same_weights(half.weights(), rounded)
