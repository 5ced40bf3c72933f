"""GradCache must give the gradient of the whole batch, whatever the micro-batch and the library."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.engine.grad_cache import backpropagate
from fasterase.engine.loss import StepLoss, StepPairs
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import TowerForward
from fasterase.models.load import load_model
from fasterase.models.preprocessing import Tokens
from fasterase.objective import Objective, erase_loss
from tests import small_models
from tests.tiny_model import TinyModel, batch, micro_batches, watch

N, N_FORGET = 22, 6
ONE = torch.ones(())
OPTIONS = {"floor": -0.9, "anchor_weight": 2.0}
LIBRARIES = ("open_clip_vit", "open_clip_resnet", "hf_clip", "hf_siglip")


def built(kind: str, **sizes: int) -> DualEncoder:
    """A model whose Dropout and BatchNorm are on in train mode."""
    if kind.startswith("tiny"):
        return TinyModel(dropout=0.4, batch_norm=kind.endswith("norm"))
    if kind.startswith("open_clip"):
        sizes["vocab_size"] = len(small_models.HF_VOCABULARY)
    module = getattr(small_models, kind)(**sizes)
    for part in module.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.2
    return load_model(module)


def batch_for(model: DualEncoder) -> tuple[Tensor, Tokens]:
    if isinstance(model, TinyModel):
        return batch(N)
    pixels, ids = small_models.random_pairs(count=N)
    return pixels, Tokens(ids)


def original(model: DualEncoder) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(4)
    image, text = normalize(torch.randn(2, N, model.embed_dim, generator=numbers), dim=-1)
    return image, text, torch.tensor(10.0)


def backpropagated(
    model: DualEncoder,
    size: int | None,
    *,
    pixels=None,
    captions=range(N),
    keys=None,
    upstream=ONE,
    **sides: bool,
):
    """Loss and gradients; `sides` are what of the model is trained, if not all."""
    plain, tokens = batch_for(model)
    model.module.zero_grad(set_to_none=True)
    trained = {f"{side}_trained": sides.get(side, True) for side in ("image", "text")}
    step_loss = StepLoss(Objective(**OPTIONS), **trained)
    known = StepPairs(N_FORGET, torch.arange(N), *original(model))
    towers = TowerForward(model, precision="fp32", **trained)
    towers.device = torch.device("cpu")
    pixels, tokens = (plain if pixels is None else pixels), tokens.index(list(captions))
    found = backpropagate(
        towers,
        micro_batches(pixels, tokens, size, n_forget=N_FORGET, keys=keys),
        partial(step_loss, pairs=known, upstream=upstream),
        seed_of=lambda part: 1000 + part.offset,
    )
    return found, gradients(model)


def spied(model: DualEncoder, side: str) -> list[tuple[Any, Tensor]]:
    """A list that fills with the inputs and outputs of a tower."""
    seen: list[tuple[Any, Tensor]] = []
    watch(model, side, lambda *call: seen.append(call))
    return seen


def gradients(model: DualEncoder) -> dict[str, Tensor]:
    parameters = model.module.named_parameters()
    return {name: each.grad.clone() for name, each in parameters if each.grad is not None}


def one_graph(model: DualEncoder, size: int = N):
    """One graph from the pixels to the loss, over micro-batches, with nothing cut in between."""
    pixels, tokens = batch_for(model)
    images, texts = [], []
    for start in range(0, N, size):
        torch.manual_seed(1000 + start)
        rows = slice(start, start + size)
        images.append(model.encode_image(pixels[rows]))
        texts.append(model.encode_text(tokens.index(rows)))
    model.module.zero_grad(set_to_none=True)
    loss = erase_loss(
        torch.cat(images),
        torch.cat(texts),
        model.scale(),
        *original(model),
        n_forget=N_FORGET,
        labels=torch.arange(N),
        **OPTIONS,
    )
    loss.total.backward()
    return loss, gradients(model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    error = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    assert error < 1e-5 * total
    for name, gradient in expected.items():
        # A key's bias has no gradient but rounding, so a share of the whole is allowed for.
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * total, name


@pytest.mark.parametrize("kind", ["tiny", *LIBRARIES])
def test_gradients_equal_plain_autograd_whatever_the_micro_batch(kind):
    model = built(kind)
    expected_loss, expected = one_graph(model)
    for size in (None, 1, 5, 11, 21) if kind == "tiny" else (None, 1, 5):
        loss, found = backpropagated(model, size)
        for term, value in zip(loss, expected_loss, strict=True):
            torch.testing.assert_close(term, value.detach(), rtol=1e-5, atol=0)
        assert "logit_scale" in found
        assert_close(found, expected)


@pytest.mark.parametrize("size", [None, 1, 4, 7])
def test_a_caption_that_repeats_is_encoded_once(size):
    """In whatever micro-batches; where Dropout is on, each pair has a mask of its own."""
    model = TinyModel()
    captions = [0, 1, 0, 2, 2, 0, 3, 1, 4, *[3, 2, 0, 1, 1, 4, 2, 3] * 2][:N]
    keys = [str(caption) for caption in captions]
    passes = 1 if size is None else 2
    seen = spied(model, "text")

    def rows_encoded() -> int:
        total = sum(len(tokens.ids) for tokens, _ in seen)
        seen.clear()
        return total

    expected_loss, expected = backpropagated(model, size, captions=captions)
    assert rows_encoded() == passes * N
    loss, found = backpropagated(model, size, captions=captions, keys=keys)
    # A micro-batch encodes four of its captions at least.
    assert rows_encoded() == {None: 5, 1: 2 * N, 4: 2 * N, 7: 2 * (4 + 4 + 4 + 1)}[size]
    torch.testing.assert_close(loss, expected_loss)
    assert_close(found, expected)
    model.module.train()
    backpropagated(model, size, captions=captions, keys=keys)
    assert rows_encoded() == passes * N


@pytest.mark.parametrize("size", [None, 8])
def test_loss_scaling_scales_every_gradient(size):
    model = TinyModel()
    _, expected = backpropagated(model, size)
    loss, found = backpropagated(model, size, upstream=torch.tensor(1024.0))
    assert float(loss.total) < 100
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 1024 * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "tiny with batch norm", "open_clip_resnet", "hf_clip"])
def test_second_pass_repeats_the_first_in_train_mode(kind):
    """Dropout masks and BatchNorm statistics: as one graph kept over the same micro-batches."""
    first, second = built(kind), built(kind)
    first.module.train()
    second.module.train()
    _, expected = one_graph(first, 6)
    seen = [spied(second, side) for side in ("image", "text")]
    _, found = backpropagated(second, 6)
    for calls in seen:
        parts = len(calls) // 2
        for (_, one), (_, two) in zip(calls[:parts], calls[parts:], strict=True):
            assert torch.equal(one, two), "pass two must repeat pass one bit for bit"
    assert_close(found, expected)
    for one, other in zip(first.module.buffers(), second.module.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_masks_differ_between_micro_batches():
    model = TinyModel(dropout=0.5)
    model.module.train()
    pixels, _ = batch(1)
    seen = spied(model, "image")
    backpropagated(model, 1, pixels=pixels.repeat(N, 1, 1, 1))
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_in_train_mode_still_moves_its_statistics_once(side, train_mode):
    """Encoding is done twice; whichever tower is trained, the statistics move as in one pass."""
    models = [TinyModel(batch_norm=True, dropout=0.3) for _ in range(2)]
    for model, size in zip(models, (None, N // 2), strict=True):
        model.module.train(train_mode)
        backpropagated(model, size, image=side == "image", text=side == "text")
    counts = [int(model.module.image[2].num_batches_tracked) for model in models]
    assert counts == ([1, 2] if train_mode else [0, 0])


@pytest.mark.parametrize("size", [None, 7])
def test_a_frozen_tower_gets_no_gradient_and_one_encoding(size):
    model = TinyModel()
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name.startswith(("image", "logit_scale")))
    calls = spied(model, "text")
    _, found = backpropagated(model, size, text=False)
    assert found
    assert all(name.startswith(("image", "logit_scale")) for name in found)
    assert len(calls) == (1 if size is None else -(-N // size))


def test_a_non_finite_loss_spoils_every_gradient():
    """So that no engine can take the step, though nothing was read before its backward pass."""
    model = TinyModel()
    pixels, _ = batch(N)
    pixels[3] = float("nan")
    for size in (None, 8):
        loss, found = backpropagated(model, size, pixels=pixels)
        assert not torch.isfinite(loss.total)
        assert found
        assert all(each.isnan().any() for each in found.values())
