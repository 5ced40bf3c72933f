"""What `contrastive` refuses and how it says so; which backend a call takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase.errors import InputError
from fasterase.ops.contrastive import (
    api,
    available_backends,
    checks,
    contrastive,
    explain_backend,
)
from tests.ops.test_contrastive_triton import VERSION, needs_triton


def call(**changes):
    arguments = {
        "image": torch.zeros(4, 3),
        "text": torch.zeros(4, 3),
        "scale": 10.0,
        "ref_image": torch.zeros(4, 2),
        "ref_text": torch.zeros(4, 2),
        "ref_scale": 10.0,
    }
    arguments.update(changes)
    return arguments


WRONG = [
    ({"image": np.zeros((4, 3))}, "image must be a torch.Tensor.*ndarray"),
    ({"text": [[0.0] * 3] * 4}, "text must be a torch.Tensor.*list"),
    ({"image": torch.zeros(4, 3, 1)}, r"image must be .*shape \(N, D\).*\(4, 3, 1\)"),
    ({"text": torch.zeros(4, 3).long()}, "text must be float.*int64"),
    ({"text": torch.zeros(5, 3)}, r"image and text must have the same shape.*\(5, 3\)"),
    ({"text": torch.zeros(4, 2)}, "image and text must have the same shape"),
    ({"text": torch.zeros(4, 3, device="meta")}, "on one device; got .* on cpu and .* on meta"),
    ({"scale": "100"}, "scale must be a 0-d floating-point tensor or a float.*str"),
    ({"scale": None}, "scale must be .*NoneType"),
    ({"scale": True}, "scale must be .*bool"),
    ({"scale": -1.0}, "scale must be a positive number.*-1.0"),
    ({"scale": float("nan")}, "scale must be a positive number"),
    ({"scale": 1e300}, "scale must be a positive number.* that fits fp32; got 1e\\+300"),
    ({"scale": 10**400}, "scale must be a positive number"),
    ({"scale": torch.ones(1)}, r"scale must be a 0-d floating-point tensor.*\(1,\)"),
    ({"scale": torch.tensor(3)}, "scale must be a 0-d floating-point tensor.*int64"),
    ({"ref_scale": 0.0}, "ref_scale must be a positive number"),
    ({"ref_image": None}, "go together; ref_image missing"),
    ({"ref_text": None, "ref_scale": None}, "go together; ref_text and ref_scale missing"),
    ({"ref_text": torch.zeros(4, 3)}, "ref_image and ref_text must have the same shape"),
    (
        {"ref_image": torch.zeros(3, 2), "ref_text": torch.zeros(3, 2)},
        r"ref_image and ref_text must have one row a pair, 4.*got .*\(3, 2\)",
    ),
    (
        {k: torch.zeros(4, 2, device="meta") for k in ("ref_image", "ref_text")},
        "on image's device cpu; got .* on meta",
    ),
    ({"ref_text": torch.zeros(4, 2, requires_grad=True)}, "ref_text requires grad.*detach"),
    ({"products": "tf16"}, "products must be one of 'auto', 'fp32', 'fp16', 'bf16'; got 'tf16'"),
    ({"labels": [0, 0, 1, 1]}, "labels must be a tensor of 4 integers.*list"),
    ({"labels": torch.zeros(4)}, "labels must be integers; got torch.float32"),
    ({"labels": torch.zeros(4, dtype=torch.bool)}, "labels must be integers; got torch.bool"),
    ({"labels": torch.zeros(3).long()}, r"labels must be a tensor of 4 integers.*\(3,\)"),
    ({"groups": 4}, "groups must be a tuple of row counts; got 4"),
    ({"groups": (2.0, 2.0)}, "groups must be a tuple of row counts"),
    ({"groups": (2, 1)}, "sum to the 4 rows.*sum 3"),
    ({"groups": (5, -1)}, "non-negative"),
    ({"backend": "fast"}, "backend must be one of 'auto', 'dense', 'chunked'.*'fast'"),
    ({"backend": None}, "backend must be one of"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(changes, message):
    for function in (contrastive, explain_backend):
        with pytest.raises(InputError, match=message):
            function(**call(**changes))


@pytest.mark.parametrize("name", sorted({"cpu", "triton"} - set(available_backends())))
def test_a_backend_that_is_not_built_in_says_so(name):
    with pytest.raises(InputError, match=f"backend='{name}' is not available in this installation"):
        contrastive(**call(backend=name))


def test_explain_backend_names_what_runs_and_why():
    assert {"dense", "chunked"} <= set(available_backends())
    for name in set(available_backends()) - {"triton"}:  # which takes GPU tensors
        choice = explain_backend(**call(backend=name))
        assert (choice.name, choice.reason) == (name, "named by the caller")
    choice = explain_backend(**call())
    assert choice.name in available_backends()
    assert str(choice).startswith(f"{choice.name}, fp32 products: auto")
    assert explain_backend(**call(products="fp16")).products == "fp32"  # nothing is rounded here


def test_a_number_for_the_scale_is_made_on_the_device():
    """Copied there, it would wait for the device at every call."""

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    image = torch.empty(4, 3, device="meta")
    with Operators():
        scale = checks.scale_tensor(10.0, image, torch.float32)
    assert (scale.device.type, scale.dtype, scale.shape) == ("meta", torch.float32, ())
    assert seen == ["new_full"]
    assert checks.scale_tensor(10, torch.zeros(4, 3), torch.float64).item() == 10


def test_torch_compile_traces_the_checks():
    """torch 2.9 does not know `isinstance(x, int | float)`."""

    def losses(image, text):
        return contrastive(image, text, 10.0, groups=(1, 3), backend="dense").ce_row

    batch = torch.randn(4, 3), torch.randn(4, 3)
    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*batch), losses(*batch))


@pytest.mark.parametrize("image_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text_dtype", [torch.float32, torch.float64])
def test_auto_leaves_fp64_on_a_gpu_to_torch_tiles(image_dtype, text_dtype, monkeypatch):
    monkeypatch.setattr(api, "_explain_missing", lambda name: None)
    with FakeTensorMode():
        image = torch.empty(4, 3, dtype=image_dtype, device="cuda")
        text = torch.empty(4, 3, dtype=text_dtype, device="cuda")
        has_fp64 = torch.float64 in (image_dtype, text_dtype)
        choice = explain_backend(image, text, 1.0, products="fp16")
        assert choice.name == ("chunked" if has_fp64 else "triton")
        assert choice.products == ("fp64" if has_fp64 else "fp16")


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_products_on_a_gpu(backend, monkeypatch):
    fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

    def products(*dtypes, asked="auto"):
        with FakeTensorMode():
            features = [torch.empty(4, 3, dtype=dtype, device="cuda") for dtype in dtypes]
        return checks.resolve_products(asked, backend, features)

    for asked, used in {"auto": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}.items():
        assert products(fp32, fp32, asked=asked) == used
    assert products(fp16, fp16) == products(fp16, fp16, asked="fp32") == "fp16"
    assert products(bf16, bf16) == "bf16"
    assert products(fp16, fp16, fp16, fp32) == "fp32"  # never one of them alone
    assert products(fp64, fp32, asked="fp16") == "fp64"
    monkeypatch.setattr(checks, "allows_tf32", lambda: True)
    assert products(fp32, fp32) == "tf32"
    assert products(fp32, fp32, asked="fp32") == "fp32"


def test_without_kernels_fp64_warns_of_nothing_and_a_cpu_multiplies_in_fp32(monkeypatch, recwarn):
    missing = {"triton": "it is missing", "cpu": "it is missing"}
    monkeypatch.setattr(api, "_explain_missing", missing.get)
    api._warn_of_fallback.cache_clear()
    with FakeTensorMode():
        double = torch.empty(4, 3, dtype=torch.float64, device="cuda")
    assert api.choose_backend("auto", (double, double))[0] == "chunked"
    assert not recwarn.list
    on_cpu = torch.ones(4, 3)
    choice = explain_backend(on_cpu, on_cpu, 1.0, backend="chunked", products="fp16")
    assert (choice.name, choice.products) == ("chunked", "fp32")


@pytest.mark.skipif(
    VERSION < (3, 5) or torch.cuda.is_available(), reason="has a GPU, or no Triton 3.5"
)
def test_without_a_gpu_triton_is_refused():
    with pytest.raises(InputError, match="no CUDA device"):
        contrastive(**call(backend="triton"))


@needs_triton
def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.1+git")
    with pytest.raises(InputError, match=r"kernels need 3\.5"):
        contrastive(**call(backend="triton"))


@needs_triton
def test_an_old_gpu_is_refused_and_auto_takes_torch_tiles(monkeypatch):
    """A T4 has too little shared memory for the tiles."""
    with FakeTensorMode():
        on_gpu = torch.empty(4, 3, device="cuda")
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for major in (8, 7):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda x=properties: x)
        assert ("triton" in available_backends()) == (major == 8)
    with pytest.raises(InputError, match=r"compute capability 8\.0"):
        contrastive(**call(backend="triton"))
    api._warn_of_fallback.cache_clear()
    # It would multiply in fp32 without tensor cores: not in silence.
    with pytest.warns(UserWarning, match=r"torch tiles .* capability 8\.0.* Losses, and the prec"):
        choice = explain_backend(on_gpu, on_gpu, 1.0)
    assert choice.name == "chunked"
    assert "compute capability 8.0" in choice.reason
