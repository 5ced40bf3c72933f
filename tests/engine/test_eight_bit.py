"""8-bit optimiser states: which parameters have them, and that nothing is lost with them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from fasterase.engine.model_state import borrowed
from fasterase.engine.optim import Trained, build_optimizer
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from tests import small_models
from tests.marks import SHORT_RUN
from tests.tiny_model import erase, same_weights

SMALL = {"vocab_size": 200}
OPTIMIZERS = ("adamw8bit", "paged_adamw8bit", "lion8bit")
# On the CPU it cannot page, and says so.
unpaged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def optimizer_of(model: DualEncoder, name: str, lr: float = 1e-3) -> torch.optim.Optimizer:
    trained = Trained.choose(model, "all", logit_scale=True)
    return build_optimizer(
        model.module, trained, name=name, lr=lr, betas=(0.9, 0.98), weight_decay=0.1
    )


def take_steps(optimizer: torch.optim.Optimizer, count: int, *, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def state_dtypes(model: DualEncoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.dtype]:
    return {
        name: optimizer.state[parameter]["state1"].dtype
        for name, parameter in model.module.named_parameters()
        if parameter in optimizer.state
    }


@unpaged
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("build", "sizes", "eight_bit"),
    [
        # Two towers of 2 blocks with 2 matrices large enough; the patches; both projections.
        (small_models.open_clip_vit, {"embed_dim": 128, **SMALL}, 2 * 2 * 2 + 1 + 2),
        (small_models.open_clip_coca, SMALL, 2 * 2 * 2 + 1),
        (small_models.open_clip_resnet, SMALL, 15),
        (small_models.hf_clip, {"image_size": 256}, 1),  # the patches
        (small_models.hf_siglip, {"image_size": 256}, 1),
    ],
)
def test_only_large_products_have_8_bits(build, sizes, eight_bit, name):
    model = load_model(build(**sizes))
    optimizer = optimizer_of(model, name)
    take_steps(optimizer, 1)
    dtypes = state_dtypes(model, optimizer)
    products = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    assert len(dtypes) == sum(len(group["params"]) for group in optimizer.param_groups)
    for path, dtype in dtypes.items():
        parameter = model.module.get_parameter(path)
        owner, _, own_name = path.rpartition(".")
        is_product = isinstance(model.module.get_submodule(owner), products)
        expected = is_product or own_name in ("proj", "text_projection")
        expected = expected and parameter.numel() >= 4096 and parameter.ndim >= 2
        assert dtype == (torch.uint8 if expected else torch.float32), path
    assert list(dtypes.values()).count(torch.uint8) == eight_bit
    exact = [p for p, dtype in dtypes.items() if dtype == torch.float32]
    assert "logit_scale" in exact
    assert any("bias" in p for p in exact)
    assert any("embedding" in p and model.module.get_parameter(p).numel() > 4096 for p in exact)


@unpaged
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_keep_their_bits_when_stepped_alone_and_flattened(name):
    """As ZeRO does: one tensor per group, and the optimiser sees one group at a time."""
    optimizer = optimizer_of(load_model(small_models.open_clip_vit(**SMALL)), name)
    groups = list(optimizer.param_groups)
    found = []
    for group in groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        group["params"] = [flat]
        optimizer.param_groups = [group]
        take_steps(optimizer, 1)
        found.append((group["weight_decay"], optimizer.state[flat]["state1"].dtype))
    assert found == [(0.1, torch.uint8), (0.1, torch.float32), (0.0, torch.float32)]


@unpaged
@SHORT_RUN
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, name):
    pairs = list(zip(*small_models.random_pairs(SMALL["vocab_size"], count=12), strict=True))
    sizes = {"max_steps": 4, "batch_size": 4, "forget_batch_size": 2}

    def run(**more) -> dict[str, Tensor]:
        model = small_models.open_clip_vit(**SMALL)
        erase(model, pairs[:4], pairs[4:], optimizer=name, **sizes, **more)
        return model.state_dict()

    whole = run()
    run(output_dir=tmp_path, callback=lambda record: record.step == 2)
    assert same_weights(run(output_dir=tmp_path, resume="must"), whole)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_small_rates_vanish_in_bf16_weights_and_not_in_a_run(name):
    """A run holds fp32 weights whatever the model's own dtype, and rounds them once, at the end."""
    shares = []
    for in_a_run in (False, True):
        module = small_models.open_clip_vit(**SMALL).to(torch.bfloat16)
        model = load_model(module)
        before = [p.detach().clone() for p in module.parameters()]
        with borrowed(model, device=torch.device("cpu")) if in_a_run else nullcontext():
            optimizer = optimizer_of(model, name, lr=1e-6)
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            for _ in range(60):
                optimizer.step()
        # Of the weights whose neighbours in bf16 are 8e-6 to 3e-5 away.
        changes = [
            (p != q)[(q.abs() > 1e-3) & (q.abs() < 8e-3)]
            for p, q in zip(module.parameters(), before, strict=True)
        ]
        shares.append(torch.cat(changes).float().mean().item())
    assert shares[0] == 0.0
    assert shares[1] > 0.9
