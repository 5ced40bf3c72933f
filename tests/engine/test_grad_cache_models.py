"""GradCache on the libraries' own models: the full batch's gradients, Dropout and BatchNorm too."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fasterase.engine.grad_cache import TowerPass, backward
from fasterase.engine.precision import grad_scaler
from fasterase.models.dual_encoder import Tokens
from fasterase.models.load import load_model
from fasterase.objective import erase_loss
from tests import small_models

N, N_FORGET, SIZE = 13, 4, 5
NO_SCALING = grad_scaler("fp32", torch.device("cpu"))
VOCABULARY = len(small_models.HF_VOCABULARY)


def built(kind):
    build = getattr(small_models, kind)
    model = build(**({"vocab_size": VOCABULARY} if kind.startswith("open_clip") else {}))
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.2
    return load_model(model)


def batch():
    pixels, ids = small_models.random_pairs(count=N)
    return pixels, Tokens(ids)


def loss_of(tower):
    generator = torch.Generator().manual_seed(4)
    reference = torch.nn.functional.normalize(
        torch.randn(2, N, tower.embed_dim, generator=generator), dim=-1
    )

    def loss(image, text):
        options = {"n_forget": N_FORGET, "anchor_weight": 2.0, "floor": -0.9}
        return erase_loss(image, text, tower.scale(), *reference, 10.0, **options)

    return loss


def gradients(tower):
    return {
        name: parameter.grad.clone()
        for name, parameter in tower.module.named_parameters()
        if parameter.grad is not None
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    error = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    assert error < 1e-5 * total
    for name, gradient in expected.items():
        # A key's bias has no gradient but rounding, so a share of the whole is allowed for.
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * total, name


@pytest.mark.parametrize("size", [1, SIZE])
@pytest.mark.parametrize("kind", ["open_clip_vit", "open_clip_resnet", "hf_clip", "hf_siglip"])
def test_equals_the_full_batch(kind, size):
    tower = built(kind)
    backward(
        TowerPass(tower, contextlib.nullcontext, True, True, None),
        *batch(),
        loss_of(tower),
        NO_SCALING,
    )
    expected = gradients(tower)
    tower.module.zero_grad(set_to_none=True)
    backward(
        TowerPass(tower, contextlib.nullcontext, True, True, size),
        *batch(),
        loss_of(tower),
        NO_SCALING,
    )
    assert_close(gradients(tower), expected)


@pytest.mark.parametrize("kind", ["open_clip_resnet", "hf_clip"])
def test_equals_one_graph_over_the_micro_batches_in_train_mode(kind):
    kept, cached = built(kind), built(kind)
    pixels, tokens = batch()
    kept.module.train()
    cached.module.train()
    torch.manual_seed(8)
    images, texts = [], []
    for start in range(0, N, SIZE):
        rows = slice(start, start + SIZE)
        images.append(kept.encode_image(pixels[rows]))
        texts.append(kept.encode_text(tokens.index(rows)))
    loss_of(kept)(torch.cat(images), torch.cat(texts)).total.backward()

    seen = []
    plain = cached.encode_text
    cached.encode_text = lambda t: seen.append(plain(t)) or seen[-1]
    torch.manual_seed(8)
    backward(
        TowerPass(cached, contextlib.nullcontext, True, True, SIZE),
        pixels,
        tokens,
        loss_of(cached),
        NO_SCALING,
    )
    passes = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:passes], seen[passes:], strict=True))
    if kind == "hf_clip":
        with torch.no_grad():
            assert not torch.equal(seen[0], plain(tokens.index(slice(0, SIZE)))), "Dropout is on"
    assert_close(gradients(cached), gradients(kept))
    for one, other in zip(cached.module.buffers(), kept.module.buffers(), strict=True):
        torch.testing.assert_close(one, other)
