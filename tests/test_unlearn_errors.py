"""Each wrong input of `unlearn` is a `FaseraseError` that names it, and the weights stay."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fasterase
from fasterase.errors import FaseraseError, InputError, MissingExtraError
from tests.marks import SHORT_RUN
from tests.small_models import hf_clip, open_clip_vit
from tests.tiny_model import TinyModel, pairs, same_weights

FORGET, RETAIN = pairs(4, seed=1), pairs(8, seed=2)


def refused(named: str, *, model=None, forget=FORGET, retain=RETAIN, error=InputError, **arguments):
    """`unlearn` refuses; its message matches `named`, and the model is as it was."""
    model = TinyModel() if model is None else model
    module = getattr(model, "module", model)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    with pytest.raises(FaseraseError, match=named) as caught:
        fasterase.unlearn(
            model, forget, retain, **{"progress": False, "evaluation": None, **arguments}
        )
    assert isinstance(caught.value, error)
    assert same_weights(before, module.state_dict())
    assert modes == [part.training for part in module.modules()]
    assert all(parameter.requires_grad for parameter in module.parameters())
    return str(caught.value)


@pytest.mark.parametrize("evaluation", [None, "quick"])
@pytest.mark.parametrize(
    ("sets", "named"),
    [
        ({"forget": []}, "`forget` is empty"),
        ({"retain": []}, "`retain` is empty"),
        ({"retain": FORGET}, "`retain`: all 4 pairs show images that are in `forget`"),
        ({"forget": [(torch.zeros(3, 5, 4), FORGET[0][1])]}, r"forget\[0\].*\[3, 4, 4\].*5, 4\]"),
        ({"forget": [FORGET[0][0]]}, "forget.*pair must be"),
        ({"forget": [(torch.zeros(2, 3, 4, 4), FORGET[0][1])]}, "forget.*2 images and"),
        ({"retain": [(torch.zeros(3, 4, 4), torch.ones(9).long())]}, r"retain\[0\]: 9 token ids"),
        ({"retain": [(RETAIN[0][0], "a dog")]}, r"retain\[0\].*`tokenizer` is not known"),
        ({"retain": [(torch.zeros(3, 4, 4).byte(), RETAIN[0][1])]}, "`preprocess` is not known"),
        ({"retain": 7}, "`retain` must be a dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sets(sets, named, evaluation):
    refused(named, **sets, evaluation=evaluation)


def nan_pairs(count: int, seed: int):
    items = pairs(count, seed=seed)
    items[0][0][1, 2, 3] = float("nan")
    return items


@pytest.mark.parametrize("evaluation", [None, "quick"])
def test_nan_image(evaluation):
    named = r"forget\[0\] \(image holds NaN values\)"
    refused(named, forget=nan_pairs(4, seed=3), evaluation=evaluation)


@pytest.mark.filterwarnings("ignore:1 broken pairs are skipped")
@pytest.mark.parametrize("evaluation", [None, "quick"])
def test_a_set_without_a_readable_pair(evaluation):
    message = refused(
        "`forget`: none of ",
        forget=nan_pairs(1, seed=3),
        retain=pairs(200, seed=4),
        evaluation=evaluation,
    )
    assert "can be read" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lrr": 1e-5}, r"unknown option `lrr`.*Did you mean lr"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"epochs": "ten"}, "epochs='ten'"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"tune": "middle"}, "tune='middle'"),
        ({"tune": "last:9"}, "tune.*last:9"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"backend": "triton"}, "backend='triton'"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"report_to": "mlflow"}, "report_to='mlflow'"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
        ({"device": "xpu:3"}, "device='xpu:3' cannot be used"),
        ({"deepspeed": "nowhere.json"}, r"deepspeed: no file nowhere\.json.*zero1\.json"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage is 4"),
        ({"resume": "must"}, "resume='must' without output_dir"),
        ({"config": {"lr": 1e-5}}, "config: expected an UnlearnConfig, found dict"),
        ({"callback": "print"}, "callback: expected a function"),
        ({"model_name": "ViT-B-32", "model": "x"}, "model_name"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_options(options, named):
    if isinstance(options.get("model"), str):
        with pytest.raises(InputError, match=named):
            fasterase.unlearn("x", FORGET, RETAIN, model_name="ViT-B-32")
    else:
        refused(named, **options)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_eight_bit_optimisers_name_the_extra(optimizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    encoded = []
    tower = TinyModel()
    tower.encode_image = encoded.append  # type: ignore
    message = refused(
        re.escape("fasterase[scale]"), model=tower, optimizer=optimizer, error=MissingExtraError
    )
    assert optimizer in message
    assert not encoded, "noticed before the sweep"


@SHORT_RUN
def test_several_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT is not set")
    monkeypatch.setenv("WORLD_SIZE", "1")
    fasterase.unlearn(TinyModel(), FORGET, RETAIN, max_steps=1, progress=False, evaluation=None)


def test_files(tmp_path):
    refused("`forget`: no file or folder", forget=str(tmp_path / "none.csv"))
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\tcaption\na.png\ta dog\n")
    refused(r"`retain`.*`text_key`", retain=str(table), text_key="titel")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    refused("output_dir: .* cannot be created", output_dir=blocked)
    refused("reference_cache: .* cannot be created", reference_cache=blocked)
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


@pytest.mark.parametrize("build", [open_clip_vit, hf_clip])
def test_strings_without_a_tokenizer(build):
    model = build(**({"vocab_size": 42} if build is open_clip_vit else {}))
    images = torch.randn(6, 3, 32, 32)
    named = [(image, f"a picture of thing {i}") for i, image in enumerate(images)]
    message = refused("tokenizer", model=model, forget=named[:2], retain=named[2:])
    assert "token ids" in message
