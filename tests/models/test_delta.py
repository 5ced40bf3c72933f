"""Deltas are put on and taken off bit for bit, and on their own original only."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fasterase
from fasterase.models.delta import keep_original, save_delta
from fasterase.models.load import load_model
from tests import small_models, tiny_model
from tests.tiny_model import TinyModel, same_weights

pytestmark = pytest.mark.filterwarnings("ignore:the delta takes")


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def erase(model, folder, **options):
    """A short run whose delta is in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tiny_model.erase(model, lr=1e-2, **options)
    result.save(folder, delta=True)
    return result


def test_one_of_all_weights_is_told_to_be_as_large_as_the_model(tmp_path):
    model = TinyModel()
    with pytest.warns(UserWarning, match=r"delta takes .* MB of .* tune='lora:8'"):
        erase(model, tmp_path / "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erase(model, tmp_path / "few", tune="projections")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 10.0])
def test_both_directions_are_exact(tmp_path, dtype, size):
    model = load_model(small_models.open_clip_vit(vocab_size=50).to(dtype))
    original = weights(model.module)
    kept = keep_original(model, "all", logit_scale=True, buffers=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn_like(parameter) * size * torch.rand_like(parameter) ** 20)
    erased = weights(model.module)
    save_delta(model, kept, tmp_path / "delta")
    assert not same_weights(erased, original)
    assert fasterase.apply_delta(model.module, tmp_path / "delta", -1) is model.module
    assert same_weights(weights(model.module), original)
    fasterase.apply_delta(model.module, tmp_path / "delta")
    assert same_weights(weights(model.module), erased)


def test_the_file_holds_the_changed_bits_of_what_changed_alone(tmp_path):
    model = TinyModel()
    before = model.weights()
    result = erase(model, tmp_path / "delta", tune="text")
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    after = result.model.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert stored.keys() == {f"xor/{name}" for name in changed}
    assert not any(name.startswith("image") for name in changed)
    for name in changed:
        bits = before[name].view(torch.int32) ^ stored[f"xor/{name}"]
        assert torch.equal(bits.view(torch.float32), after[name])


def test_buffers_that_the_run_moved_are_part_of_it(tmp_path):
    model = TinyModel(batch_norm=True)
    before = model.weights()
    erase(model, tmp_path / "delta", train_mode=True)
    assert not torch.equal(model.weights()["image.2.running_mean"], before["image.2.running_mean"])
    fasterase.apply_delta(model, tmp_path / "delta", -1)
    assert same_weights(model.weights(), before)


def test_a_half_precision_delta_fits_the_same_values_in_fp32(tmp_path):
    model = load_model(small_models.hf_clip().half())
    original = copy.deepcopy(model.module).float()
    kept = keep_original(model, "all", logit_scale=False, buffers=False)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.01)
    model.module.logit_scale.data.copy_(original.logit_scale)
    save_delta(model, kept, tmp_path / "delta")
    fasterase.apply_delta(original, tmp_path / "delta")
    expected = model.module.float().state_dict()
    assert same_weights(weights(original), {**expected})


def test_only_its_own_models_are_taken_and_others_are_left_alone(tmp_path):
    model = TinyModel()
    folder = tmp_path / "delta"
    original = copy.deepcopy(model)
    erase(model, folder)
    with pytest.raises(fasterase.InputError, match="sign=2"):
        fasterase.apply_delta(original, folder, 2)
    with pytest.raises(fasterase.InputError, match="already on"):
        fasterase.apply_delta(model, folder)
    with pytest.raises(fasterase.InputError, match="not on"):
        fasterase.apply_delta(original, folder, -1)
    other = TinyModel(seed=5)
    before = other.weights()
    for sign in (1, -1):
        with pytest.raises(fasterase.InputError, match="not those of the"):
            fasterase.apply_delta(other, folder, sign)
    assert same_weights(other.weights(), before)
    with pytest.raises(fasterase.InputError, match="another architecture"):
        fasterase.apply_delta(small_models.open_clip_vit(vocab_size=50), folder)


def test_a_folder_that_is_no_delta_or_no_model_says_so(tmp_path):
    with pytest.raises(fasterase.InputError, match="holds no delta"):
        fasterase.apply_delta(TinyModel(), tmp_path)
    erase(TinyModel(), tmp_path / "delta")
    with pytest.raises(fasterase.InputError, match="apply_delta"):
        load_model(tmp_path / "delta")
    (tmp_path / "delta" / "delta.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(fasterase.InputError, match="cannot be read"):
        fasterase.apply_delta(TinyModel(), tmp_path / "delta")


@pytest.mark.parametrize(
    "changed",
    [{"dtypes": None}, {"dtypes": "[]"}, {"factors": "{"}, {"dtypes": '{"gone": "float32"}'},
     {"erased": None}, {"factors": '{"text.weight": "layer"}'}, "a bit"],
)  # fmt: skip
def test_damage_is_refused(tmp_path, changed):
    model = TinyModel()
    before = model.weights()
    erase(copy.deepcopy(model), tmp_path / "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    stored = load_file(file)
    if changed == "a bit":
        next(iter(stored.values())).view(-1)[0] ^= 1
    else:
        metadata |= changed
    save_file(stored, file, {name: text for name, text in metadata.items() if text is not None})
    says = "may be damaged" if changed == "a bit" else "(is damaged|cannot be read)"
    with pytest.raises(fasterase.InputError, match=rf"folder: .*{says}"):
        fasterase.apply_delta(model, tmp_path / "delta")
    assert same_weights(model.weights(), before)
