"""Activation checkpointing: the same gradients in less memory, and the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.engine.model_state import borrowed, checkpointed_activations
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.preprocessing import Tokens
from tests import small_models
from tests.engine.test_grad_cache import LIBRARIES, built
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, erase, same_weights

KINDS = (*LIBRARIES, "open_clip_custom_text", "open_clip_coca", "hf_siglip2")


def features(model: DualEncoder) -> tuple[Tensor, Tensor]:
    pixels, ids = small_models.random_pairs(count=6)
    torch.manual_seed(7)
    return model.encode_image(pixels), model.encode_text(Tokens(ids))


def gradients(model: DualEncoder) -> dict[str, Tensor]:
    image, text = features(model)
    torch.manual_seed(8)  # the backward pass has to draw the same masks all the same
    (image @ text.T).pow(2).sum().backward()
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients_and_buffers(kind, train_mode):
    plain, checkpointed = built(kind), built(kind)
    for model in (plain, checkpointed):
        model.module.train(train_mode)
    expected = gradients(plain)
    with checkpointed_activations(checkpointed):
        found = gradients(checkpointed)
    assert found.keys() == expected.keys()
    assert same_weights(found, expected)
    buffers = (dict(model.module.named_buffers()) for model in (plain, checkpointed))
    assert same_weights(*buffers)


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def kept_bytes(model: DualEncoder) -> int:
    """What a forward pass of both towers keeps for the backward pass."""
    with AliveTensors() as alive:
        _kept = features(model)
        return alive.bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_less_memory(kind):
    model = built(kind, **({} if kind == "open_clip_resnet" else {"layers": 6}))
    plain = kept_bytes(model)
    with checkpointed_activations(model):
        checkpointed = kept_bytes(model)
    assert checkpointed < (0.8 if kind == "open_clip_resnet" else 0.5) * plain


@pytest.mark.parametrize("kind", ["open_clip_vit", "hf_clip"])
def test_the_model_is_as_before(kind):
    model = built(kind)
    before = {name: dict(part.__dict__) for name, part in model.module.named_modules()}
    special = model.text_parts().blocks[0]
    special.forward = own = special.forward  # as some libraries' hooks leave it
    with pytest.raises(RuntimeError, match="on purpose"), checkpointed_activations(model):
        raise RuntimeError("on purpose")
    assert special.__dict__.pop("forward") == own
    for name, part in model.module.named_modules():
        assert part.__dict__.keys() == before[name].keys(), name


def test_a_copy_made_during_a_run_is_its_own():
    model = built("open_clip_vit")
    with checkpointed_activations(model):
        other = copy.copy(model)
        other.module = copy.deepcopy(model.module)
        with torch.no_grad():
            for block in (*model.image_parts().blocks, *model.text_parts().blocks):
                for parameter in block.parameters():
                    parameter.zero_()
        moved = [one - two for one, two in zip(features(model), features(other), strict=True)]
    assert min(difference.abs().max() for difference in moved) > 1e-3


def test_blocks_that_are_not_known():
    model = TinyModel()
    parts = model.text_parts()
    model.text_parts = lambda: type(parts)(parts.everything, [], [], parts.projection)  # type: ignore
    with (
        pytest.raises(InputError, match="activation_checkpointing: the blocks of the text tower"),
        borrowed(model, device=torch.device("cpu"), activation_checkpointing=True),
    ):
        pass
    assert "forward" not in model.module.image[1].__dict__


@SHORT_RUN
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_run_ends_with_the_same_weights(micro_batch_size):
    """With Dropout and BatchNorm in train mode, and both of GradCache's passes."""
    options = {"lr": 1e-2, "train_mode": True, "micro_batch_size": micro_batch_size}
    runs = []
    for checkpointing in (False, True):
        model = TinyModel(dropout=0.3, batch_norm=True)
        calls: list[None] = []
        model.module.text[0].register_forward_hook(lambda *_, calls=calls: calls.append(None))
        erase(model, activation_checkpointing=checkpointing, **options)
        runs.append((model.weights(), len(calls)))
    (plain, once), (checkpointed, again) = runs
    assert same_weights(plain, checkpointed)
    assert again == once + 3 * (3 if micro_batch_size else 1)  # once more per backward pass
