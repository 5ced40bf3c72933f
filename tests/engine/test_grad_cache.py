"""GradCache must give the gradient of the whole batch, whatever the micro-batch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from fasterase.engine.grad_cache import TowerPass, backward
from fasterase.engine.precision import grad_scaler
from fasterase.models.dual_encoder import Tokens
from fasterase.objective import EraseLoss, erase_loss
from tests.tiny_tower import TinyTower, batch

N, N_FORGET = 22, 6
NO_SCALING = grad_scaler("fp32", torch.device("cpu"))


def towers(tower: TinyTower, size: int | None, *, image: bool = True, text: bool = True):
    return TowerPass(tower, contextlib.nullcontext, image, text, size)


def loss_of(tower: TinyTower):
    pixels, tokens = batch(N, seed=9)
    with torch.no_grad():
        original = TinyTower(seed=3)
        reference = original.encode_image(pixels), original.encode_text(tokens)

    def loss(image: Tensor, text: Tensor) -> EraseLoss:
        return erase_loss(
            image,
            text,
            tower.scale(),
            *reference,
            10.0,
            n_forget=N_FORGET,
            floor=-0.5,
            anchor_weight=2.0,
        )

    return loss


def gradients(tower: TinyTower, size: int | None, *, seed: int = 5, **sides: bool):
    pixels, tokens = batch(N)
    tower.module.zero_grad(set_to_none=True)
    function = loss_of(tower)
    torch.manual_seed(seed)
    loss = backward(towers(tower, size, **sides), pixels, tokens, function, NO_SCALING)
    return loss, {n: p.grad for n, p in tower.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 5, 11, 21])
def test_gradients_equal_the_full_batch(size):
    tower = TinyTower()
    expected_loss, expected = gradients(tower, None)
    loss, found = gradients(tower, size)
    torch.testing.assert_close(loss.total, expected_loss.total, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("batch_norm", [False, True])
def test_second_pass_repeats_the_first_in_train_mode(batch_norm):
    """Dropout masks and BatchNorm statistics: as one graph kept over the same micro-batches."""
    size = 6

    def kept_graph(tower: TinyTower) -> tuple[dict[str, Tensor], list[Tensor]]:
        pixels, tokens = batch(N)
        torch.manual_seed(5)
        parts = [
            (
                towers(tower, None).encode_image(pixels[i : i + size], graph=True),
                towers(tower, None).encode_text(tokens.index(slice(i, i + size)), graph=True),
            )
            for i in range(0, N, size)
        ]
        loss = loss_of(tower)(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        loss.total.backward()
        grads = {n: p.grad for n, p in tower.module.named_parameters() if p.grad is not None}
        return grads, [buffer.clone() for buffer in tower.module.buffers()]

    first = TinyTower(dropout=0.4, batch_norm=batch_norm)
    first.module.train()
    expected, expected_buffers = kept_graph(first)

    second = TinyTower(dropout=0.4, batch_norm=batch_norm)
    second.module.train()
    seen: list[Tensor] = []
    encode_image = second.encode_image
    second.encode_image = lambda x: seen.append(encode_image(x)) or seen[-1]  # type: ignore
    _, found = gradients(second, size)
    parts = len(seen) // 2
    for one, two in zip(seen[:parts], seen[parts:], strict=True):
        assert torch.equal(one, two), "pass two must repeat pass one bit for bit"
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    for buffer, other in zip(second.module.buffers(), expected_buffers, strict=True):
        torch.testing.assert_close(buffer, other)


def test_dropout_masks_differ_between_micro_batches():
    tower = TinyTower(dropout=0.5)
    tower.module.train()
    pixels, tokens = batch(1)
    twice = pixels.repeat(2, 1, 1, 1), Tokens(tokens.ids.repeat(2, 1))
    features = []

    def loss(image: Tensor, text: Tensor) -> EraseLoss:
        features.append(image.detach())
        return erase_loss(image, text, 10.0, None, None, None, n_forget=2, consistency_weight=0)

    backward(towers(tower, 1), *twice, loss, NO_SCALING)
    assert not torch.equal(features[0][0], features[0][1])


@pytest.mark.parametrize("size", [None, 7])
def test_a_frozen_tower_gets_no_gradient_and_one_encoding(size):
    tower = TinyTower()
    for name, parameter in tower.module.named_parameters():
        parameter.requires_grad_(name.startswith("image"))
    calls = []
    encode_text = tower.encode_text
    tower.encode_text = lambda tokens: calls.append(1) or encode_text(tokens)  # type: ignore
    _, found = gradients(tower, size, text=False)
    assert found
    assert all(name.startswith("image") for name in found)
    assert len(calls) == (1 if size is None else -(-N // size))


def test_a_non_finite_loss_leaves_no_gradient():
    tower = TinyTower()
    pixels, tokens = batch(N)
    pixels[3] = float("nan")
    for size in (None, 8):
        loss = backward(towers(tower, size), pixels, tokens, loss_of(tower), NO_SCALING)
        assert not torch.isfinite(loss.total)
        assert all(p.grad is None for p in tower.module.parameters())
