"""GradCache must give the gradient of the whole batch, whatever the micro-batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fasterase.engine.grad_cache import backpropagate
from fasterase.engine.loss import StepLoss
from fasterase.models.forward import TowerForward
from fasterase.objective import Objective, erase_loss
from tests.tiny_model import TinyModel, batch, micro_batches

N, N_FORGET = 22, 6
CPU = torch.device("cpu")
ONE = torch.ones(())


OPTIONS = {
    "forget_weight": 3.0,
    "retain_weight": 1.0,
    "consistency_weight": 3.0,
    "floor": -0.5,
    "anchor_weight": 2.0,
}


def original() -> tuple[Tensor, Tensor, Tensor]:
    pixels, tokens = batch(N, seed=9)
    with torch.no_grad():
        model = TinyModel(seed=3)
        return model.encode_image(pixels), model.encode_text(tokens), torch.tensor(10.0)


def loss_of(*, image: bool = True, text: bool = True, upstream: Tensor = ONE):
    loss = StepLoss(
        Objective(**OPTIONS), image_trained=image, text_trained=text, scale_trained=True
    )
    return partial(
        loss,
        original=original(),
        n_forget=N_FORGET,
        labels=torch.arange(N),
        upstream=upstream,
    )


def backpropagated(model: TinyModel, size: int | None, *, pixels=None, upstream=ONE, **sides: bool):
    plain, tokens = batch(N)
    model.module.zero_grad(set_to_none=True)
    trained = {f"{side}_trained": value for side, value in sides.items()}
    loss = backpropagate(
        TowerForward(model, precision="fp32", **trained),
        micro_batches(plain if pixels is None else pixels, tokens, size, n_forget=N_FORGET),
        loss_of(upstream=upstream, **sides),
        device=CPU,
        seed_of=lambda part: 1000 + part.offset,
    )
    return loss, {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 5, 11, 21])
def test_gradients_equal_the_full_batch(size):
    model = TinyModel()
    expected_loss, expected = backpropagated(model, None)
    loss, found = backpropagated(model, size)
    torch.testing.assert_close(loss.total, expected_loss.total, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", [None, 7])
def test_gradients_equal_plain_autograd(size):
    """One graph from the pixels to the loss, nothing cut in between."""
    model = TinyModel()
    loss, found = backpropagated(model, size)
    model.module.zero_grad(set_to_none=True)
    pixels, tokens = batch(N)
    expected = erase_loss(
        model.encode_image(pixels),
        model.encode_text(tokens),
        model.scale(),
        *original(),
        n_forget=N_FORGET,
        labels=torch.arange(N),
        **OPTIONS,
    )
    expected.total.backward()
    torch.testing.assert_close(loss, type(loss)(*(term.detach() for term in expected)))
    for name, parameter in model.module.named_parameters():
        assert (found[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("size", [None, 1, 4, 7])
def test_a_caption_that_repeats_is_encoded_once(size):
    """In whatever micro-batches; where Dropout is on, each pair has a mask of its own."""
    model = TinyModel()
    captions = torch.tensor([0, 1, 0, 2, 2, 0, 3, 1, 4, *[3, 2, 0, 1, 1, 4, 2, 3] * 2])[:N]
    pixels, tokens = batch(N)
    repeated = tokens.index(captions)
    rows = []
    encode_text = model.encode_text
    model.encode_text = lambda given: rows.append(len(given.ids)) or encode_text(given)  # type: ignore

    def gradients(keys):
        rows.clear()
        model.module.zero_grad(set_to_none=True)
        loss = backpropagate(
            TowerForward(model, precision="fp32"),
            micro_batches(pixels, repeated, size, n_forget=N_FORGET, keys=keys),
            loss_of(),
            device=CPU,
            seed_of=lambda part: 0,
        )
        return loss, {name: part.grad for name, part in model.module.named_parameters()}

    expected_loss, expected = gradients(None)
    passes = 1 if size is None else 2
    assert sum(rows) == passes * N
    keys = [str(int(caption)) for caption in captions]
    loss, found = gradients(keys)
    # A micro-batch encodes four of its captions at least.
    assert sum(rows) == {None: 5, 1: 2 * N, 4: 2 * N, 7: 2 * (4 + 4 + 4 + 1)}[size]
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    model.module.train()
    gradients(keys)
    assert sum(rows) == passes * N


@pytest.mark.parametrize("size", [None, 8])
def test_loss_scaling_scales_every_gradient(size):
    model = TinyModel()
    _, expected = backpropagated(model, size)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    loss, found = backpropagated(model, size, upstream=torch.tensor(1024.0))
    assert float(loss.total) < 100
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 1024 * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_second_pass_repeats_the_first_in_train_mode(batch_norm):
    """Dropout masks and BatchNorm statistics: as one graph kept over the same micro-batches."""
    size = 6

    def kept_graph(model: TinyModel) -> tuple[dict[str, Tensor], list[Tensor]]:
        pixels, tokens = batch(N)
        images, texts = [], []
        for i in range(0, N, size):
            torch.manual_seed(1000 + i)
            images.append(model.encode_image(pixels[i : i + size]))
            texts.append(model.encode_text(tokens.index(slice(i, i + size))))
        loss = erase_loss(
            torch.cat(images),
            torch.cat(texts),
            model.scale(),
            *original(),
            n_forget=N_FORGET,
            **OPTIONS,
        )
        loss.total.backward()
        grads = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
        return grads, [buffer.clone() for buffer in model.module.buffers()]

    first = TinyModel(dropout=0.4, batch_norm=batch_norm)
    first.module.train()
    expected, expected_buffers = kept_graph(first)

    second = TinyModel(dropout=0.4, batch_norm=batch_norm)
    second.module.train()
    seen: list[Tensor] = []
    encode_image = second.encode_image
    second.encode_image = lambda x: seen.append(encode_image(x)) or seen[-1]  # type: ignore
    _, found = backpropagated(second, size)
    parts = len(seen) // 2
    for one, two in zip(seen[:parts], seen[parts:], strict=True):
        assert torch.equal(one, two), "pass two must repeat pass one bit for bit"
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    for buffer, other in zip(second.module.buffers(), expected_buffers, strict=True):
        torch.testing.assert_close(buffer, other)


def test_dropout_masks_differ_between_micro_batches():
    model = TinyModel(dropout=0.5)
    model.module.train()
    pixels, _ = batch(1)
    seen: list[Tensor] = []
    encode_image = model.encode_image
    model.encode_image = lambda x: seen.append(encode_image(x)) or seen[-1]  # type: ignore
    backpropagated(model, 1, pixels=pixels.repeat(N, 1, 1, 1))
    assert not torch.equal(seen[0], seen[1])


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
    calls = []
    encode_text = model.encode_text
    model.encode_text = lambda tokens: calls.append(1) or encode_text(tokens)  # type: ignore
    _, found = backpropagated(model, size, text=False)
    assert found
    assert all(name.startswith(("image", "logit_scale")) for name in found)
    assert len(calls) == (1 if size is None else -(-N // size))


def test_a_non_finite_loss_leaves_no_gradient():
    model = TinyModel()
    pixels, _ = batch(N)
    pixels[3] = float("nan")
    for size in (None, 8):
        loss, found = backpropagated(model, size, pixels=pixels)
        assert not torch.isfinite(loss.total)
        assert not found
