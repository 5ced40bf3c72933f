"""A text tower of either library gives the same hidden states inside a `CLIPTextModel`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.protocols.text_encoder import build_text_encoder, load_text_tower, read_text_tower
from fasterase.errors import InputError
from fasterase.models.load import load_model
from tests import small_models, tiny_diffusion

SIZES = {
    "vocab_size": tiny_diffusion.TEXT["vocab_size"],
    "context_length": tiny_diffusion.TEXT["max_position_embeddings"],
}
IDS = torch.randint(
    2, tiny_diffusion.START, (4, SIZES["context_length"]), generator=torch.manual_seed(0)
)
IDS[:, 0], IDS[:, 9:] = tiny_diffusion.START, tiny_diffusion.END


def pipeline_encoder(**text):
    """Another model's text encoder, as a pipeline holds it: none of its weights may stay."""
    return tiny_diffusion.text_encoder(seed=9, **text)


def build(module, **text):
    """The text tower of a model in the place of a pipeline's."""
    tower = read_text_tower(load_model(module))
    return build_text_encoder(tower, pipeline_encoder(**text), argument="--erased")


def randomised(module):
    """Fill biases and norms too, which libraries begin with 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


@torch.no_grad()
def open_clip_hidden_states(module, blocks: int) -> torch.Tensor:
    """Run open_clip's own parts: `blocks` blocks, then the final norm."""
    text = getattr(module, "text", module)
    states = text.token_embedding(IDS) + text.positional_embedding
    for block in text.transformer.resblocks[:blocks]:
        states = block(states, attn_mask=text.attn_mask)
    return text.ln_final(states)


def quick_gelu(**sizes):
    from open_clip.model import CLIP

    return CLIP(**small_models.open_clip_config(**sizes), quick_gelu=True).eval()


@pytest.mark.parametrize("kind", ["vit", "custom_text", "resnet", "quick_gelu"])
@pytest.mark.parametrize("layers", [2, 1])
def test_open_clip_tower(kind: str, layers: int) -> None:
    is_quick = kind == "quick_gelu"
    make = quick_gelu if is_quick else getattr(small_models, f"open_clip_{kind}")
    module = randomised(make(**SIZES))
    act = {} if is_quick else {"hidden_act": "gelu"}
    built = build(module, num_hidden_layers=layers, **act)
    with torch.no_grad():
        found = built(IDS)
        torch.testing.assert_close(found.last_hidden_state, open_clip_hidden_states(module, layers))
        if layers == 2:
            projection = getattr(module, "text", module).text_projection
            torch.testing.assert_close(found.pooler_output @ projection, module.encode_text(IDS))


@pytest.mark.parametrize("layers", [2, 1])
def test_transformers_tower(layers: int) -> None:
    module = randomised(tiny_diffusion.clip())
    like = pipeline_encoder(num_hidden_layers=layers).half()
    before = copy.deepcopy(like.state_dict())
    built = build_text_encoder(read_text_tower(load_model(module)), like, argument="--erased")
    assert built.dtype == torch.float16
    assert all(torch.equal(like.state_dict()[name], weight) for name, weight in before.items())
    states = []
    module.text_model.encoder.layers[layers - 1].register_forward_hook(
        lambda block, inputs, output: states.append(output)
    )
    with torch.no_grad():
        module.get_text_features(input_ids=IDS)
        (last,) = states
        expected = module.text_model.final_layer_norm(last[0] if isinstance(last, tuple) else last)
        found = built.float()(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection"])
def test_folders_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    if kind == "CLIPModel":
        module = randomised(tiny_diffusion.clip())
    else:
        config = tiny_diffusion.text_encoder().config
        module = randomised(getattr(transformers, kind)(config))
    module.save_pretrained(tmp_path)
    tower = load_text_tower(str(tmp_path))
    built = build_text_encoder(tower, pipeline_encoder(), argument="--erased")
    with torch.no_grad():
        inner = module if kind == "CLIPTextModel" else module.text_model
        assert torch.equal(built(IDS).last_hidden_state, inner.eval()(IDS).last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft
def test_adapters_are_merged() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_diffusion.clip()
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    built = build(adapted)
    with torch.no_grad():
        found = built(IDS).last_hidden_state
        torch.testing.assert_close(found, base.text_model(IDS).last_hidden_state)
        with adapted.disable_adapter():
            assert (found - base.text_model(IDS).last_hidden_state).abs().max() > 0.01


def test_fingerprint_is_of_what_the_pipeline_reads() -> None:
    module = small_models.open_clip_vit(**SIZES)
    encoder = load_model(module)
    first = read_text_tower(encoder).fingerprint()
    with torch.no_grad():
        module.text_projection.add_(1)
        module.visual.proj.add_(1)
    assert read_text_tower(encoder).fingerprint() == first
    with torch.no_grad():
        module.ln_final.bias.add_(1)
    assert read_text_tower(encoder).fingerprint() != first


def test_differences_are_listed() -> None:
    tower = read_text_tower(
        load_model(small_models.open_clip_vit(layers=1, context_length=20, vocab_size=54))
    )
    with pytest.raises(InputError) as caught:
        build_text_encoder(tower, pipeline_encoder(hidden_size=16), argument="--erased='x'")
    said = str(caught.value)
    assert said.startswith("--erased='x': the text tower of ")
    assert (
        "width 32 instead of 16, activation gelu instead of quick_gelu, positions 20 instead of "
        "24, 1 blocks instead of 2 or more. Erase from the CLIP"
    ) in said


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: small_models.open_clip_custom_text(siglip=True, **SIZES),
            "also attend to later ones",
        ),
        (lambda: small_models.open_clip_coca(**SIZES), "it has weights named cls_emb"),
        (small_models.hf_siglip, "it is a SiglipModel"),
    ],
)
def test_other_architectures_are_refused(build, reason: str) -> None:
    with pytest.raises(InputError, match=f"is not CLIP's .*{reason}"):
        read_text_tower(load_model(build()))
