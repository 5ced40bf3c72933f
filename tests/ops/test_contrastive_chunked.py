"""Torch tiles as they run on a GPU: in half precision where asked, and without waiting for it."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.ops.contrastive import chunked
from fasterase.ops.contrastive.dense import contrastive_dense
from fasterase.ops.contrastive.operator import Batch, Wanted
from tests import oracle
from tests.ops.calls import INPUTS, arguments, make, norm_error, relative_error, tensors

ROOT = Path(__file__).resolve().parents[2]
EVERY = Wanted(image=True, text=True, scale=True, rounded=False)
HALVES = [("fp16", torch.float16), ("bf16", torch.bfloat16)]


def run(batch: Batch, upstream, groups, products):
    """Losses and gradients."""
    losses, *saved = chunked._forward(batch, groups, products)
    weights = torch.as_tensor(upstream, dtype=batch.scale.dtype)
    return losses, chunked._backward(weights, batch, tuple(saved), groups, EVERY, products)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors take the path of an accelerator, in several tiles."""
    monkeypatch.setattr(chunked.Shift, "from_bound", chunked.Shift.from_peaks)
    monkeypatch.setattr(chunked, "_TILE_CPU", 7)


class Products(TorchDispatchMode):
    """Notes the products of matrices, by operator and dtypes of the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            tensors = [str(each.dtype) for each in args if isinstance(each, torch.Tensor)]
            self.seen.add((str(func), *tensors[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("products", "dtype"), HALVES)
def test_halves_are_multiplied_as_such_and_nothing_is_read_back(products, dtype, monkeypatch):
    """A tensor without storage raises wherever the host would wait for its values."""
    monkeypatch.setattr(chunked, "_TILE_ACCELERATOR", 16)
    monkeypatch.setattr(chunked, "_multiplying", lambda *_: nullcontext())
    sides = [torch.empty(40, 8, device="meta") for _ in range(4)]
    scale = torch.empty((), device="meta")
    batch = Batch(sides[0], sides[1], scale, sides[2], sides[3], scale)
    with Products() as products_made:
        losses, *saved = chunked._forward(batch, (1, 14, 25), products)
        upstream = torch.empty_like(losses)
        gradients = chunked._backward(upstream, batch, tuple(saved), (1, 14, 25), EVERY, products)
    assert products_made.seen == {("aten.mm.dtype", str(dtype), str(dtype))}
    assert {x.dtype for x in (losses, *gradients)} == {torch.float32}


@pytest.mark.parametrize("cones", [False, True])
@pytest.mark.parametrize("reference", [True, False])
def test_maxima_found_on_the_way(as_on_a_gpu, cones, reference):
    """In fp64 exact; also for opposite cones, where a fixed shift loses every term."""
    call, data = make(60, 24, 100.0, dtype=torch.float64, cones=cones, reference=reference)
    batch = Batch(*arguments(call))
    upstream = np.random.default_rng(0).normal(size=(4, 60))
    upstream[2 * batch.matrices :] = 0
    weights = upstream[: 2 * batch.matrices]
    losses, gradients = run(batch, weights, (1, 19, 40), "fp64")
    values, exact = oracle.contrastive(data, upstream, (1, 19, 40))
    for found, value in zip(losses, values, strict=False):
        assert relative_error(found, value, 100.0) < 1e-10
    for name, found in zip(INPUTS, gradients, strict=True):
        assert relative_error(found, getattr(exact, name), 100.0) < 1e-10


@pytest.mark.parametrize("name", ["image", "ref_text"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_is(as_on_a_gpu, name, value):
    """As with the fixed shift: the losses of other rows and an infinite one's sign are kept."""
    batch = Batch(*arguments(make(20, 8, 10.0)[0]))
    getattr(batch, name)[3, 2] = value
    found, *_ = chunked._forward(batch, (20,), "fp32")
    dense = torch.stack(contrastive_dense(*batch, (20,)))
    assert torch.equal(found.isfinite(), dense.isfinite())


@pytest.mark.parametrize(("products", "dtype"), HALVES)
@pytest.mark.parametrize("length", [1e-4, 1.0, 300.0])  # of rows: fp16 holds neither as they are
def test_halves_are_near_fp64(as_on_a_gpu, products, dtype, length):
    n = 150
    _, data = make(n, 512, 100.0)
    data.image *= length
    data.scale /= length
    batch = Batch(*arguments(tensors(data, scale_dtype=torch.float32)))
    upstream = np.full((4, n), 1 / n)
    losses, gradients = run(batch, upstream, (50, 100), products)
    values, exact = oracle.contrastive(data, upstream, (50, 100))
    loose = torch.finfo(dtype).eps / torch.finfo(torch.float16).eps
    for found, value in zip(losses, values, strict=True):
        assert np.abs(found.double().numpy() - value).max() < 2e-2 * loose
    for name, found in zip(INPUTS[:2], gradients, strict=False):
        assert 1e-6 < norm_error(found, getattr(exact, name)) < 5e-3 * loose


def test_two_equal_models_have_no_kl_in_halves(as_on_a_gpu):
    batch = Batch(*arguments(make(40, 16, 50.0)[0]))
    same = batch._replace(ref_image=batch.image, ref_text=batch.text, ref_scale=batch.scale)
    of_kl = [[0.0] * 40] * 2 + [[1.0] * 40] * 2
    losses, gradients = run(same, of_kl, (40,), "fp16")
    assert losses[2:].abs().max() < 1e-6
    assert max(each.abs().max() for each in gradients) < 1e-5


# The limits of the shift, which torch, C++ and Triton cannot define in one place.
def find_one(sources: list[Path], pattern: str) -> str:
    """The one match in all sources; Triton's are read as text, since triton may be missing."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(sources))
    found = [match for text in texts for match in re.findall(pattern, text, re.MULTILINE)]
    assert len(found) == 1, (pattern, found)
    return found[0]


def read_cpp(name: str) -> float:
    sources = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cpp")]
    value = find_one(sources, rf"^constexpr double {name} = ([^;]+);")
    return float.fromhex(value) if value.startswith("0x") else float(value)


def read_triton(name: str) -> float:
    """`tl.constexpr(66.0)` or `tl.constexpr(2.0**-80)`."""
    pattern = rf"^_?{name}(?:: tl\.constexpr)? = tl\.constexpr\(([^)]+)\)"
    base, _, exponent = find_one([*(ROOT / "kernels").glob("*.py")], pattern).partition("**")
    return float(base) ** float(exponent or 1)


@pytest.mark.parametrize("name", ["HEADROOM", "UNDERFLOW"])
def test_all_backends_share_their_limits(name):
    value = getattr(chunked, name)
    assert read_cpp(f"k{name.capitalize()}") == value
    assert read_triton(name) == value
