"""The promises of every adapter, checked against the libraries' own answers; what `tune` trains."""

from __future__ import annotations

import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fasterase.errors import InputError
from fasterase.models import Tokens, frozen_copy, load_model
from tests import small_models
from tests.models.conftest import batch_for, build_model, noise_picture


def library_features(model, pixels, ids):
    module = model.module
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


def test_features_equal_the_library_s(model):
    pixels, tokens = batch_for(model)
    found = model.encode_image(pixels), model.encode_text(tokens)
    for features, expected in zip(found, library_features(model, pixels, tokens.ids), strict=True):
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
        assert features.shape == (4, model.embed_dim)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))


def test_uint8_images_are_normalised_by_the_model(model):
    assert model.image_transform is not None
    pictures = [noise_picture(50, 41), noise_picture(32, 32), noise_picture(20, 77)]
    pixels = torch.stack([model.image_transform.pixels(picture) for picture in pictures])
    floats = torch.stack([model.preprocess(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == floats.shape
    features = model.encode_image(pixels)
    torch.testing.assert_close(features, model.encode_image(floats), rtol=0, atol=1e-5)


def test_uint8_images_need_a_transform_that_splits():
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"^preprocess: CLIPModel came without"):
        load_model(small_models.hf_clip()).encode_image(pixels)
    whole = load_model(small_models.hf_clip(), preprocess=lambda image: torch.zeros(3, 32, 32))
    with pytest.raises(InputError, match=r"^preprocess: torch\.uint8 pixels cannot be normalised"):
        whole.encode_image(pixels)


def test_sizes_and_scale(model):
    assert model.image_size == (32, 32)
    assert model.context_length == small_models.CONTEXT_LENGTH
    assert model.device == torch.device("cpu")
    scale = model.scale()
    assert scale.ndim == 0
    assert float(scale.detach()) == pytest.approx(float(model.logit_scale.detach().exp()))
    scale.backward()
    assert model.logit_scale.grad is not None


def test_every_trainable_parameter_gets_a_gradient(model):
    pixels, tokens = batch_for(model)
    # A random direction: the row sums of normalised features would leave some gradients at zero.
    direction = torch.randn(2, 4, model.embed_dim, generator=torch.Generator().manual_seed(1))
    loss = (model.encode_image(pixels) * direction[0]).sum()
    loss = loss + (model.encode_text(tokens) * direction[1]).sum()
    loss.backward()
    chosen = dict(model.trainable("all"))
    without = [name for name, parameter in chosen.items() if parameter.grad is None]
    assert without == []
    for name, parameter in model.module.named_parameters():
        assert name in chosen or parameter.grad is None, name


def test_bf16_and_fp64_weights():
    model = build_model("open_clip_vit")
    pixels, tokens = batch_for(model)
    model.module.to(torch.bfloat16)
    assert model.encode_image(pixels).dtype == torch.float32
    model.module.to(torch.float64)
    assert model.encode_image(pixels).dtype == torch.float64
    assert model.encode_text(tokens).dtype == torch.float64


def test_callables_for_workers_pickle_without_weights(model):
    before = model.tokenize(["a red cat", "Two dogs."]).ids
    image = Image.new("RGB", (50, 40), (200, 30, 90))
    callables = pickle.dumps((model.image_transform, model.text_tokenizer))
    transform, tokenizer = pickle.loads(callables)
    assert torch.equal(tokenizer(["a red cat", "Two dogs."]).ids, before)
    assert torch.equal(transform(image), model.preprocess(image))
    assert model.preprocess(image).shape == (3, 32, 32)
    assert before.shape == (2, model.context_length)
    assert before.dtype == torch.int64


def test_fingerprint_follows_weights_preprocess_and_tokenizer():
    model = build_model("open_clip_vit")
    first = model.fingerprint()
    assert build_model("open_clip_vit").fingerprint() == first
    assert frozen_copy(model).fingerprint() == first
    with torch.no_grad():
        model.module.visual.proj[0, 0] += 1e-6
    changed = model.fingerprint()
    assert changed != first
    module = small_models.open_clip_vit()
    assert load_model(module).fingerprint() != first  # no tokenizer
    module.visual.preprocess_cfg["mean"] = (0.1, 0.1, 0.1)
    other = load_model(module, tokenizer=small_models.simple_tokenizer())
    assert other.fingerprint() != first


def test_frozen_copy_shares_nothing(kind):
    model = build_model(kind)
    model.module.train()
    frozen = frozen_copy(model)
    assert type(frozen) is type(model)
    assert not frozen.module.training
    assert model.module.training
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    pixels, _ = batch_for(model)
    before = frozen.encode_image(pixels)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    assert torch.equal(frozen.encode_image(pixels), before)
    assert not before.requires_grad


def test_hf_mask_reaches_the_model():
    model = build_model("hf_siglip")
    tokens = model.tokenize(["a cat"])
    assert tokens.mask is not None
    masked = model.module.get_text_features(
        input_ids=tokens.ids, attention_mask=tokens.mask
    ).pooler_output
    torch.testing.assert_close(model.encode_text(tokens), F.normalize(masked, dim=-1))
    assert not torch.allclose(model.encode_text(Tokens(tokens.ids)), model.encode_text(tokens))


def test_naflex_pixels_are_the_library_s_patches():
    from transformers import Siglip2ImageProcessor

    model = build_model("hf_siglip2")
    values = torch.arange(32 * 32 * 3, dtype=torch.int32).remainder(251).to(torch.uint8)
    image = Image.fromarray(values.reshape(32, 32, 3).numpy())
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    inputs = processor(images=image, return_tensors="pt")
    expected = F.normalize(model.module.get_image_features(**inputs).pooler_output, dim=-1)
    found = model.encode_image(model.preprocess(image)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_naflex_refuses_pixels_between_patches():
    with pytest.raises(InputError, match="30 x 32 pixels"):
        build_model("hf_siglip2").encode_image(torch.zeros(1, 3, 30, 32))


def test_unknown_tokenizer_and_preprocess_are_named():
    module = small_models.open_clip_vit()
    del module.visual.preprocess_cfg
    for model in (load_model(module), load_model(small_models.hf_clip())):
        assert model.text_tokenizer is None
        assert model.image_transform is None
        with pytest.raises(InputError, match="tokenizer"):
            model.tokenize(["a cat"])
        with pytest.raises(InputError, match="preprocess"):
            model.preprocess(Image.new("RGB", (8, 8)))


POOL = "visual.attnpool.c_proj"


def names(model, tune):
    return {name for name, _ in model.trainable(tune)}


def test_all_is_both_towers_in_the_module_s_order_and_never_the_temperature(model):
    image, text = names(model, "image"), names(model, "text")
    assert image
    assert text
    assert not image & text
    assert names(model, "all") == image | text
    order = [name for name, _ in model.module.named_parameters()]
    left = set(order) - image - text
    kept = {"logit_scale", "logit_bias", "text_decoder"}
    assert {name.partition(".")[0] for name in left} <= kept
    assert "logit_scale" in left
    chosen = model.trainable("all")
    assert [name for name, _ in chosen] == [name for name in order if name in image | text]
    assert all(p is model.module.get_parameter(name) for name, p in chosen)


def test_projections_are_within_last_within_all(model):
    projections = names(model, "projections")
    last, both = names(model, "last:1"), names(model, "last:2")
    assert projections < last < both < names(model, "all")
    assert projections & names(model, "image")
    assert projections & names(model, "text")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("open_clip_vit", "visual.proj text_projection"),
        ("open_clip_resnet", f"{POOL}.weight {POOL}.bias text_projection"),
        ("open_clip_coca", "visual.proj text.text_projection"),
        ("hf_clip", "visual_projection.weight text_projection.weight"),
    ],
)
def test_projections_by_name(kind, expected):
    assert names(build_model(kind), "projections") == set(expected.split())


def test_last_one_by_name():
    modules = {name.rpartition(".")[0] for name in names(build_model("hf_clip"), "last:1")}
    for part in ("vision_model.encoder.layers.1", "text_model.encoder.layers.1"):
        assert any(name.startswith(part) for name in modules)
    assert not any(".layers.0" in name or "embedding" in name for name in modules)
    assert {"vision_model.post_layernorm", "text_model.final_layer_norm"} <= modules
    resnet = names(build_model("open_clip_resnet"), "last:1")
    assert any(name.startswith("visual.layer4.") for name in resnet)
    assert not any(name.startswith("visual.layer3.") for name in resnet)
    assert any(name.startswith("visual.attnpool.") for name in resnet)


@pytest.mark.parametrize("tune", ["", "none", "last", "last:", "last:0", "last:-1", "last:x", None])
def test_unknown_tune_is_named(tune):
    with pytest.raises(InputError, match="tune"):
        build_model("hf_clip").trainable(tune)


def test_more_blocks_than_there_are(model):
    with pytest.raises(InputError, match=r"tune: .*has 2 blocks"):
        model.trainable("last:3")


def custom_text(**config):
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(**{**small_models.open_clip_config(), **config}).eval()


def test_timm_tower():
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_proj": "linear"}
    model = load_model(custom_text(vision_cfg=vision))
    assert model.image_size == (160, 160)
    assert names(model, "projections") == {"visual.head.proj.weight", "text.text_projection"}
    last = names(model, "last:1")
    depth = len(model.module.visual.trunk.blocks)
    assert any(name.startswith(f"visual.trunk.blocks.{depth - 1}.") for name in last)
    assert not any(name.startswith(f"visual.trunk.blocks.{depth - 2}.") for name in last)
    assert {"visual.trunk.norm.weight", "visual.head.proj.weight"} <= last
    assert not any("pos_embed" in name or "patch_embed" in name for name in last)
    assert model.encode_image(torch.randn(1, 3, 160, 160)).shape == (1, model.embed_dim)


def test_transformers_text_tower_inside_open_clip(tmp_path):
    from transformers import RobertaConfig

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    RobertaConfig(
        vocab_size=90, num_hidden_layers=2, max_position_embeddings=40, **size
    ).save_pretrained(tmp_path)
    text = {
        "hf_model_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
    }
    model = load_model(custom_text(text_cfg=text))
    assert model.embed_dim == small_models.EMBED_DIM
    assert "text.proj.weight" in names(model, "projections")
    last = names(model, "last:1")
    assert any(".encoder.layer.1." in name for name in last)
    assert not any(".encoder.layer.0." in name or "embeddings" in name for name in last)
    _, tokens = batch_for(load_model(small_models.hf_clip()))
    assert model.encode_text(tokens).shape == (4, model.embed_dim)
