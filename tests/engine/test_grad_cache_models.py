"""GradCache on the libraries' own models: the full batch's gradients, Dropout and BatchNorm too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fasterase.engine.grad_cache import backpropagate
from fasterase.engine.loss import StepLoss
from fasterase.models.forward import TowerForward
from fasterase.models.load import load_model
from fasterase.models.preprocessing import Tokens
from fasterase.objective import Objective, erase_loss
from tests import small_models
from tests.tiny_model import micro_batches

N, N_FORGET, SIZE = 13, 4, 5
VOCABULARY = len(small_models.HF_VOCABULARY)
OPTIONS = {"anchor_weight": 2.0, "floor": -0.9}


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


def original(model):
    generator = torch.Generator().manual_seed(4)
    image, text = torch.nn.functional.normalize(
        torch.randn(2, N, model.embed_dim, generator=generator), dim=-1
    )
    return image, text, torch.tensor(10.0)


def backpropagated(model, size):
    loss = StepLoss(
        Objective(**OPTIONS),
        image_trained=True,
        text_trained=True,
        scale_trained=True,
        max_scale=1e9,
    )
    backpropagate(
        TowerForward(model, precision="fp32"),
        micro_batches(*batch(), size, n_forget=N_FORGET),
        partial(
            loss,
            original=original(model),
            n_forget=N_FORGET,
            labels=torch.arange(N),
            upstream=torch.ones(()),
        ),
        device=torch.device("cpu"),
        seed_of=lambda part: 1000 + part.offset,
    )


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.module.named_parameters()
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
    model = built(kind)
    backpropagated(model, None)
    expected = gradients(model)
    model.module.zero_grad(set_to_none=True)
    backpropagated(model, size)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("kind", ["open_clip_resnet", "hf_clip"])
def test_equals_one_graph_over_the_micro_batches_in_train_mode(kind):
    kept, cached = built(kind), built(kind)
    pixels, tokens = batch()
    kept.module.train()
    cached.module.train()
    images, texts = [], []
    for start in range(0, N, SIZE):
        torch.manual_seed(1000 + start)
        rows = slice(start, start + SIZE)
        images.append(kept.encode_image(pixels[rows]))
        texts.append(kept.encode_text(tokens.index(rows)))
    loss = erase_loss(
        torch.cat(images),
        torch.cat(texts),
        kept.scale(),
        *original(kept),
        n_forget=N_FORGET,
        **OPTIONS,
    )
    loss.total.backward()

    seen = []
    plain = cached.encode_text
    cached.encode_text = lambda t: seen.append(plain(t)) or seen[-1]
    backpropagated(cached, SIZE)
    passes = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:passes], seen[passes:], strict=True))
    if kind == "hf_clip":
        with torch.no_grad():
            assert not torch.equal(seen[0], plain(tokens.index(slice(0, SIZE)))), "Dropout is on"
    assert_close(gradients(cached), gradients(kept))
    for one, other in zip(cached.module.buffers(), kept.module.buffers(), strict=True):
        torch.testing.assert_close(one, other)
