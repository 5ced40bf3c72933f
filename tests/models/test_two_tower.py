"""What every adapter promises, held against the libraries' own answers."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fasterase.errors import InputError
from fasterase.models import DualEncoder, Tokens, frozen_copy, load_model
from tests import small_models
from tests.models.conftest import batch_for, build_tower


def library_features(tower: DualEncoder, pixels: torch.Tensor, ids: torch.Tensor):
    module = tower.module
    if type(module).__module__.startswith("open_clip"):
        return module.encode_image(pixels, normalize=True), module.encode_text(ids, normalize=True)
    if type(module).__name__ == "Siglip2Model":
        from transformers import Siglip2ImageProcessor

        processor = Siglip2ImageProcessor(
            patch_size=8, max_num_patches=16, do_resize=False, do_rescale=False, do_normalize=False
        )
        inputs = dict(processor(images=list(pixels), return_tensors="pt", input_data_format=None))
    else:
        inputs = {"pixel_values": pixels}
    image = module.get_image_features(**inputs).pooler_output
    text = module.get_text_features(input_ids=ids).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_features_are_the_library_s_own(tower: DualEncoder) -> None:
    pixels, tokens = batch_for(tower)
    image, text = library_features(tower, pixels, tokens.ids)
    torch.testing.assert_close(tower.encode_image(pixels), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(tower.encode_text(tokens), text, rtol=0, atol=1e-6)


def test_sizes_and_units(tower: DualEncoder) -> None:
    pixels, tokens = batch_for(tower)
    for features in (tower.encode_image(pixels), tower.encode_text(tokens)):
        assert features.shape == (4, tower.embed_dim)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert tower.image_size == (32, 32)
    assert tower.context_length == small_models.CONTEXT_LENGTH
    assert tower.device == torch.device("cpu")


def test_scale_is_differentiable_and_0d(tower: DualEncoder) -> None:
    scale = tower.scale()
    assert scale.ndim == 0
    assert float(scale.detach()) == pytest.approx(float(tower.logit_scale.detach().exp()))
    scale.backward()
    assert tower.logit_scale.grad is not None


def test_every_trainable_parameter_gets_a_gradient(tower: DualEncoder) -> None:
    pixels, tokens = batch_for(tower)
    # A random direction: the row sums of normalised features would leave some gradients at zero.
    direction = torch.randn(2, 4, tower.embed_dim, generator=torch.Generator().manual_seed(1))
    loss = (tower.encode_image(pixels) * direction[0]).sum()
    loss = loss + (tower.encode_text(tokens) * direction[1]).sum()
    loss.backward()
    chosen = dict(tower.trainable("all"))
    without = [name for name, parameter in chosen.items() if parameter.grad is None]
    assert without == []
    for name, parameter in tower.module.named_parameters():
        assert name in chosen or parameter.grad is None, name


def test_autocast_still_gives_fp32_units(tower: DualEncoder) -> None:
    pixels, tokens = batch_for(tower)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image, text = tower.encode_image(pixels), tower.encode_text(tokens)
    for features in (image, text):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert (image * tower.encode_image(pixels)).sum(-1).min() > 0.99


def test_bf16_and_fp64_weights() -> None:
    tower = build_tower("open_clip_vit")
    pixels, tokens = batch_for(tower)
    tower.module.to(torch.bfloat16)
    assert tower.encode_image(pixels).dtype == torch.float32
    tower.module.to(torch.float64)
    assert tower.encode_image(pixels).dtype == torch.float64
    assert tower.encode_text(tokens).dtype == torch.float64


def test_callables_for_workers_pickle_without_weights(tower: DualEncoder) -> None:
    before = tower.tokenize(["a red cat", "Two dogs."]).ids
    image = Image.new("RGB", (50, 40), (200, 30, 90))
    callables = pickle.dumps((tower.image_transform, tower.text_tokenizer))
    transform, tokenizer = pickle.loads(callables)
    assert torch.equal(tokenizer(["a red cat", "Two dogs."]).ids, before)
    assert torch.equal(transform(image), tower.preprocess(image))
    assert tower.preprocess(image).shape == (3, 32, 32)
    assert before.shape == (2, tower.context_length)
    assert before.dtype == torch.int64


def test_fingerprint_follows_weights_preprocess_and_tokenizer() -> None:
    tower = build_tower("open_clip_vit")
    first = tower.fingerprint()
    assert build_tower("open_clip_vit").fingerprint() == first
    assert frozen_copy(tower).fingerprint() == first
    with torch.no_grad():
        tower.module.visual.proj[0, 0] += 1e-6
    changed = tower.fingerprint()
    assert changed != first
    module = small_models.open_clip_vit()
    assert load_model(module).fingerprint() != first  # no tokenizer
    module.visual.preprocess_cfg["mean"] = (0.1, 0.1, 0.1)
    other = load_model(module, tokenizer=small_models.simple_tokenizer())
    assert other.fingerprint() != first


def test_frozen_copy_shares_nothing(kind: str) -> None:
    tower = build_tower(kind)
    tower.module.train()
    frozen = frozen_copy(tower)
    assert type(frozen) is type(tower)
    assert not frozen.module.training
    assert tower.module.training
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())
    assert all(parameter.requires_grad for parameter in tower.module.parameters())
    pixels, _ = batch_for(tower)
    before = frozen.encode_image(pixels)
    with torch.no_grad():
        for parameter in tower.module.parameters():
            parameter.zero_()
    assert torch.equal(frozen.encode_image(pixels), before)
    assert not before.requires_grad


def test_tokens_move_and_index() -> None:
    tokens = Tokens(torch.arange(6).reshape(3, 2), torch.ones(3, 2, dtype=torch.int64))
    picked = tokens.index(torch.tensor([2, 0])).to("cpu")
    assert picked.ids.tolist() == [[4, 5], [0, 1]]
    assert picked.mask is not None
    assert picked.mask.shape == (2, 2)
    assert Tokens(tokens.ids).index(slice(1, 3)).mask is None


def test_hf_mask_reaches_the_model() -> None:
    tower = build_tower("hf_siglip")
    tokens = tower.tokenize(["a cat"])
    assert tokens.mask is not None
    masked = tower.module.get_text_features(
        input_ids=tokens.ids, attention_mask=tokens.mask
    ).pooler_output
    torch.testing.assert_close(tower.encode_text(tokens), F.normalize(masked, dim=-1))
    assert not torch.allclose(tower.encode_text(Tokens(tokens.ids)), tower.encode_text(tokens))


def test_naflex_pixels_are_the_library_s_patches() -> None:
    from transformers import Siglip2ImageProcessor

    tower = build_tower("hf_siglip2")
    values = torch.arange(32 * 32 * 3, dtype=torch.int32).remainder(251).to(torch.uint8)
    image = Image.fromarray(values.reshape(32, 32, 3).numpy())
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    inputs = processor(images=image, return_tensors="pt")
    expected = F.normalize(tower.module.get_image_features(**inputs).pooler_output, dim=-1)
    found = tower.encode_image(tower.preprocess(image)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_naflex_refuses_pixels_between_patches() -> None:
    with pytest.raises(InputError, match="30 x 32 pixels"):
        build_tower("hf_siglip2").encode_image(torch.zeros(1, 3, 30, 32))


def test_unknown_tokenizer_and_preprocess_are_named() -> None:
    module = small_models.open_clip_vit()
    del module.visual.preprocess_cfg
    tower = load_model(module)
    assert tower.text_tokenizer is None
    assert tower.image_transform is None
    with pytest.raises(InputError, match="tokenizer"):
        tower.tokenize(["a cat"])
    with pytest.raises(InputError, match="preprocess"):
        tower.preprocess(Image.new("RGB", (8, 8)))
    hf = load_model(small_models.hf_clip())
    with pytest.raises(InputError, match="tokenizer"):
        hf.tokenize(["a cat"])
