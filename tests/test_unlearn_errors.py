"""Each wrong input of `unlearn` is a `FaseraseError` that names it, and the weights stay."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

import fasterase
from fasterase.engine import run
from fasterase.errors import FaseraseError, InputError, MissingExtraError
from tests.marks import SHORT_RUN
from tests.small_models import hf_clip, open_clip_vit
from tests.tiny_model import TinyModel, erase, pairs, unchanged

FORGET, RETAIN = pairs(4, seed=1), pairs(8, seed=2)


def nan_pairs(count: int):
    items = pairs(count, seed=3)
    items[0][0][1, 2, 3] = float("nan")
    return items


def refused(named: str, *, model=None, forget=FORGET, retain=RETAIN, error=InputError, **arguments):
    """`unlearn` refuses; its message matches `named`, and the model is as it was."""
    model = TinyModel() if model is None else model
    raises = pytest.raises(FaseraseError, match=named)
    options = {"evaluation": None, "progress": False, **arguments}
    with unchanged(getattr(model, "module", model)), raises as caught:
        fasterase.unlearn(model, forget, retain, **options)
    assert isinstance(caught.value, error)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:1 broken pair is skipped")
@pytest.mark.parametrize("evaluation", [None, "quick"])
@pytest.mark.parametrize(
    ("sets", "named"),
    [
        ({"forget": None}, "`forget` must be a dataset.*NoneType"),
        ({"retain": None}, "`retain` must be a dataset.*NoneType"),
        ({"retain": 7}, "`retain` must be a dataset"),
        ({"forget": []}, "`forget` is empty"),
        ({"retain": []}, "`retain` is empty"),
        ({"retain": FORGET}, "`retain`: all 4 pairs show images that are in `forget`"),
        ({"forget": [(torch.zeros(3, 5, 4), FORGET[0][1])]}, r"forget\[0\].*\[3, 4, 4\].*5, 4\]"),
        ({"forget": [FORGET[0][0]]}, "forget.*pair must be"),
        ({"forget": [(torch.zeros(2, 3, 4, 4), FORGET[0][1])]}, "forget.*2 images and"),
        ({"forget": nan_pairs(4), "max_skipped": 0}, r"forget\[0\] \(image holds NaN values\)"),
        ({"forget": nan_pairs(1), "retain": pairs(200, seed=4)}, "`forget`: none of .*can be read"),
        ({"retain": [(torch.zeros(3, 4, 4), torch.ones(9).long())]}, r"retain\[0\]: 9 token ids"),
        ({"retain": [(RETAIN[0][0], "a dog")]}, r"retain\[0\].*`tokenizer` is not known"),
        ({"retain": [(torch.zeros(3, 4, 4).byte(), RETAIN[0][1])]}, "`preprocess` is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sets(sets, named, evaluation):
    refused(named, **sets, evaluation=evaluation)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lrr": 1e-5}, r"unknown option `lrr`.*Did you mean lr"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"tune": "last:9"}, "tune.*last:9"),
        ({"backend": "triton"}, "backend='triton'"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
        ({"device": "xpu:3"}, "device='xpu:3' cannot be used"),
        ({"deepspeed": "nowhere.json"}, r"deepspeed: no file nowhere\.json.*zero1\.json"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage is 4"),
        ({"config": {"lr": 1e-5}}, "config: expected an UnlearnConfig, found dict"),
        ({"callback": "print"}, "callback: expected a function"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_options(options, named):
    refused(named, **options)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_eight_bit_optimisers_name_the_extra(optimizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    tower = TinyModel()
    tower.encode_image = lambda _: pytest.fail("noticed after the sweep")  # type: ignore
    extra = re.escape("fasterase[scale]")
    assert optimizer in refused(extra, model=tower, optimizer=optimizer, error=MissingExtraError)


@SHORT_RUN
def test_several_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT is not set")
    monkeypatch.setenv("WORLD_SIZE", "1")
    erase(max_steps=1)


def test_a_contradiction_of_deepspeed_is_told_before_the_original_is_measured(monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(run, "measure_original", None)
    clipped = {"zero_optimization": {"stage": 1}, "gradient_clipping": 5.0}
    refused("gradient_clipping", deepspeed=clipped, concept="octopus")


def test_files(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\tcaption\na.png\ta dog\n")
    refused(r"`retain`.*`text_key`", retain=str(table), text_key="titel")
    for argument in ("output_dir", "reference_cache"):
        for blocked in (table, table / "deep"):
            refused(f"{argument}: .* cannot be created", **{argument: blocked})
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("mine")
    refused("holds files that fasterase did not write", output_dir=tmp_path / "out")


def test_a_wrong_argument_leaves_no_output_folder(tmp_path):
    output = {"output_dir": tmp_path / "runs" / "one"}
    refused("`forget`: no file or folder", forget=str(tmp_path / "none.csv"), **output)
    refused("tune", tune="nothing", **output)
    with pytest.raises(InputError, match="model"):
        fasterase.unlearn("no-such-model", FORGET, RETAIN, **output)
    assert not list(tmp_path.iterdir())


def test_not_a_clip():
    refused("model: Linear is not a supported CLIP model", model=nn.Linear(3, 3))
    for model, named in (("no-such-model", "no-such-model"), (7, "model: int is not a model")):
        with pytest.raises(InputError, match=named):
            fasterase.unlearn(model, FORGET, RETAIN)
    with pytest.raises(InputError, match="model_name"):
        fasterase.unlearn("x", FORGET, RETAIN, model_name="ViT-B-32")


@pytest.mark.parametrize("build", [open_clip_vit, hf_clip])
def test_strings_without_a_tokenizer(build):
    model = build(**({"vocab_size": 42} if build is open_clip_vit else {}))
    named = [(image, f"thing {i}") for i, image in enumerate(torch.randn(6, 3, 32, 32))]
    message = refused("tokenizer", model=model, forget=named[:2], retain=named[2:])
    assert "token ids" in message
