"""Runs that end early: non-finite steps, signals, callbacks, and errors before the first step."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch

from fasterase.engine import loop
from fasterase.errors import InputError, NonFiniteError, PreemptedError
from tests import tiny_concepts
from tests.marks import SHORT_RUN
from tests.tiny_concepts import knowing_model
from tests.tiny_model import RETAIN, TinyModel, erase, same_weights, unchanged, watch
from tests.tiny_run import preempted_with_workers

run = partial(erase, max_steps=5)
on_concept = partial(
    erase,
    forget=tiny_concepts.FORGET,
    retain=tiny_concepts.RETAIN,
    batch_size=32,
    forget_batch_size=8,
)
pytestmark = SHORT_RUN


def break_from(tower, step: int, *, steps: int | None = None, side: str = "image"):
    """Features turn NaN in training step `step` and the `steps` after it."""
    encodings = itertools.count(1)

    def see(given, features):
        is_trained = features.requires_grad
        is_broken = is_trained and 0 <= next(encodings) - step < (steps or math.inf)
        return features * float("nan") if is_broken else None

    watch(tower, side, see)


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_lasting_nan_stops_with_the_last_good_weights(side):
    tower = TinyModel()
    break_from(tower, 3, side=side)
    good = []
    with pytest.raises(NonFiniteError, match="not finite at step 5") as caught:
        run(tower, max_steps=50, callback=lambda record: good.append((record, tower.weights())))
    assert (caught.value.term, caught.value.step) == ("forget", 5)
    sets = (("forget", 6), ("retain", 20))
    assert set(caught.value.pair_ids) <= {f"{name}[{i}]" for name, n in sets for i in range(n)}
    assert len(caught.value.pair_ids) == 8 + 3
    assert [record.applied for record, _ in good] == [True, True, False, False]
    assert same_weights(tower.weights(), good[1][1])
    assert all(p.grad is None for p in tower.module.parameters() if p.requires_grad)


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
    before = tower.weights()

    def poison(record):
        if record.step == 1:
            tower.module.text_projection.weight.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(NonFiniteError) as caught:
        run(tower, max_steps=9, callback=poison)
    assert (caught.value.term, caught.value.step) == ("gradient", 4)
    assert not same_weights(tower.weights(), before)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_nan_step_does_not_reach_batch_norm_statistics(micro_batch_size):
    tower = TinyModel(batch_norm=True)
    _, layer, statistics, *_ = tower.module.image
    steps = []

    def hook(module, inputs, output):
        is_broken = tower.module.training and len(steps) == 2
        return output * float("nan") if is_broken else output

    layer.register_forward_hook(hook)
    options = {"train_mode": True, "micro_batch_size": micro_batch_size}
    result = run(tower, callback=lambda record: steps.append(record) or None, **options)
    assert [record.applied for record in result.history] == [True, True, False, True, True]
    assert statistics.running_mean.isfinite().all()
    assert statistics.running_var.isfinite().all()


@pytest.fixture
def _ctrl_c_is_heard():
    """A shell has what it starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


SIGNALS = {
    "SIGTERM": (PreemptedError, "SIGTERM"),
    "SIGUSR1": (PreemptedError, "SIGUSR1"),
    "SIGINT": (KeyboardInterrupt, "Ctrl-C"),
}


def continues_as_if_nothing_had_happened(folder):
    again, whole = TinyModel(), TinyModel()
    result = run(again, output_dir=folder)
    run(whole)
    assert [record.step for record in result.history] == [1, 2, 3, 4, 5]
    assert same_weights(again.weights(), whole.weights())


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_a_signal_finishes_the_step_and_saves_it(tmp_path, name, saving):
    tower, seen = TinyModel(), []

    def send(record):
        seen.append(tower.weights())
        if record.step == 2:
            os.kill(os.getpid(), getattr(signal, name))

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    error, called = SIGNALS[name]
    said = "A checkpoint is in .*checkpoints; make the same call" if saving else "Nothing was saved"
    with pytest.raises(error, match=rf"^stopped by {called} after step 2\. {said}"):
        run(tower, callback=send, output_dir=tmp_path if saving else None)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert same_weights(tower.weights(), seen[1])
    assert all(parameter.requires_grad for parameter in tower.module.parameters())
    saved = [folder.name for folder in tmp_path.glob("checkpoints/*")]
    assert saved == (["step-000000002"] if saving else [])
    if saving:
        continues_as_if_nothing_had_happened(tmp_path)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_a_signal_in_the_sweep_leaves_the_model_as_it_was(tmp_path, name, saving):
    """No reader of files or pairs takes it for damage."""
    tower = TinyModel()
    watch(tower, "text", lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    error, called = SIGNALS[name]
    said = "No step was saved yet; make the same call" if saving else "Nothing was saved"
    raises = pytest.raises(error, match=rf"^stopped by {called}\. {said}")
    with unchanged(tower.module), raises:
        run(tower, output_dir=tmp_path if saving else None)
    if saving:
        continues_as_if_nothing_had_happened(tmp_path)


@pytest.mark.slow
def test_sigterm_to_all_processes_of_the_run(tmp_path):
    """As schedulers send it: workers that died of it would take the step with them."""
    assert preempted_with_workers(tmp_path) == 75
    assert (tmp_path / "checkpoints" / "step-000000002").is_dir()


def test_sigterm_in_the_last_step_is_not_lost_without_output_dir_either():
    said = "after step 1. Nothing was saved; give an output_dir"
    with pytest.raises(PreemptedError, match=said):
        run(callback=lambda _: os.kill(os.getpid(), signal.SIGTERM), max_steps=1)


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    tower = TinyModel()

    def interrupt_twice(tokens, features):
        if features.requires_grad:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    watch(tower, "text", interrupt_twice)
    history = []
    with pytest.raises(KeyboardInterrupt):
        run(tower, callback=history.append)
    assert not history


def test_a_check_of_the_verdict_is_cut_short_after_a_moment(tmp_path, monkeypatch):
    """It cannot be saved midway: the run continues from the checkpoint before it."""
    monkeypatch.setattr(loop, "CHECK_PATIENCE_SECONDS", 0.2)
    told = []

    def terminate(tower, step):
        def stall(record):
            if record.step == step:
                watch(tower, "image", lambda *_: hang())

        return stall

    def hang():
        # The next step is finished; it is the check after it that takes long.
        if not (told or torch.is_grad_enabled()):
            told.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    config = {"stop_when_forgotten": True, "max_steps": 9, "save_every": 2, "output_dir": tmp_path}
    config |= {"lr": 1e-5}
    tower, whole = knowing_model(), knowing_model()
    with pytest.raises(PreemptedError, match=r"stopped by SIGTERM\. A checkpoint is in"):
        on_concept(tower, callback=terminate(tower, 3), **config)
    # Step 6, whose check it was, is not saved.
    saved = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-000000002", "step-000000004"]
    again = knowing_model()
    with pytest.warns(UserWarning, match="verdict: remembered"):
        on_concept(again, **config)
    on_concept(whole, **config | {"output_dir": None})
    assert same_weights(again.weights(), whole.weights())


@pytest.mark.parametrize(
    ("kind", "value", "usual"), [("dtype", torch.float64, torch.float32), ("device", "meta", None)]
)
def test_a_caller_s_defaults_of_torch_are_set_aside(kind, value, usual, caplog):
    plain, other = TinyModel(), TinyModel()
    run(plain)
    set_default = getattr(torch, f"set_default_{kind}")
    set_default(value)
    try:
        run(other)
        assert str(getattr(torch, f"get_default_{kind}")()) == str(value)
    finally:
        set_default(usual)
    assert caplog.text.count("are set aside during this call") == 1
    assert same_weights(plain.weights(), other.weights())


def test_runs_in_a_thread_which_may_set_no_handlers(caplog):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(max_steps=2)))
    thread.start()
    thread.join()
    assert len(results[0].history) == 2
    assert caplog.text.count("This is not the main thread, which alone may handle signals") == 1


def test_callback_true_ends_the_run_and_anything_else_does_not(tmp_path):
    result = run(callback=lambda record: record.step == 3, output_dir=tmp_path)
    assert len(result.history) == 3
    assert (tmp_path / "checkpoints" / "step-000000003").is_dir()
    assert (tmp_path / "model").is_dir()
    assert len(run(callback=lambda record: record).history) == 5


@pytest.mark.slow
@pytest.mark.parametrize("lr", [2e-3, "auto"])
def test_stops_when_forgotten_and_stays_stopped(tmp_path, lr):
    config = {"stop_when_forgotten": True, "lr": lr, "max_steps": 300, "output_dir": tmp_path}
    tower = knowing_model()
    result = on_concept(tower, **config)
    steps = len(result.history)
    assert result.verdict == "forgotten"
    assert 3 <= steps < 300
    assert steps % 3 == 0, "checked once a pass over the 24 forget pairs, three steps"
    longer = on_concept(knowing_model(), **{**config, "output_dir": None}, resume="never")
    assert len(longer.history) == steps
    again = knowing_model()
    repeated = on_concept(again, **config)
    assert repeated.verdict == "forgotten"
    assert len(repeated.history) == steps
    assert same_weights(again.weights(), tower.weights())
    config |= {"stop_when_forgotten": False, "max_steps": steps + 3}
    left = "who no longer wants it to stop gets the steps left"
    assert len(on_concept(knowing_model(), **config).history) == steps + 3, left


def test_a_model_that_never_knew_stops_at_the_first_check():
    result = on_concept(stop_when_forgotten=True, max_steps=300)
    assert (result.verdict, len(result.history)) == ("never known", 3)


def test_remembered_is_a_warning_that_says_what_to_change():
    remembered = r"^verdict: remembered\nforget: residue [\d.]+ image->text.*max_steps or epochs"
    with pytest.warns(UserWarning, match=rf"(?s){remembered}.*higher lr \(now 1e-07\)"):
        result = on_concept(knowing_model(), lr=1e-7, max_steps=5)
    assert not result.forgotten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_error_before_the_first_step_leaves_everything_as_it_was(dtype):
    tower = TinyModel(dropout=0.1, batch_norm=True)
    module = tower.module.to(dtype)
    module.train()
    module.image[2].eval()
    module.embedding.weight.requires_grad_(False)
    broken = [*RETAIN[:10], (torch.zeros(3, 5, 5), RETAIN[0][1])]
    with unchanged(module), pytest.raises(InputError, match=r"retain\[10\]"):
        run(tower, retain=broken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_trained_in_fp32_and_rounded_once(dtype):
    half, full = TinyModel(), TinyModel()
    half.module.to(dtype)
    full.module.load_state_dict({k: v.float() for k, v in half.weights().items()})
    run(half)
    run(full)
    rounded = {name: tensor.to(dtype) for name, tensor in full.weights().items()}
    assert same_weights(half.weights(), rounded)
