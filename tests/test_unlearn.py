"""`fasterase.unlearn`: models of every kind, every setting, and what the result promises."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import yaml
from PIL import Image

import fasterase
from fasterase.engine import loss
from fasterase.engine.model_state import borrowed
from fasterase.pairs.images import read_image_file
from tests import small_models
from tests.marks import SHORT_RUN
from tests.tiny_model import FORGET, TinyModel, erase, pairs, same_weights

VOCABULARY = len(small_models.HF_VOCABULARY)
RECORD = "step total forget retain consistency anchor lr grad_norm applied seconds"
pytestmark = SHORT_RUN


def image_pairs(count: int):
    return list(zip(*small_models.random_pairs(count=count), strict=True))


@pytest.mark.parametrize(
    "build",
    [
        small_models.open_clip_vit,
        small_models.open_clip_resnet,
        small_models.hf_clip,
        small_models.hf_siglip,
        small_models.hf_siglip2,
    ],
)
def test_models_of_every_kind_change_in_place_and_stay_trainable(build):
    model = build(**({"vocab_size": VOCABULARY} if "open_clip" in build.__name__ else {}))
    names = {name for name, _ in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    items = image_pairs(24)
    result = erase(model, items[:6], items[6:], micro_batch_size=5)
    assert result.model is model
    kept = {name for name, value in model.state_dict().items() if torch.equal(before[name], value)}
    assert kept & names == {"logit_scale", "logit_bias"} & names
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_output_folder(tmp_path):
    retain = pairs(20, seed=2)
    retain[4] = (FORGET[3][0], retain[4][1])
    options = {"output_dir": tmp_path, "holdout": pairs(9, seed=3), "evaluation": "quick"}
    with pytest.warns(UserWarning, match=r"1 retain pair is also in the forget set.*\[4\]"):
        result = erase(retain=retain, **options)
    assert result.removed_from_retain == ["retain[4]"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(".run.lock", "checkpoints", "config.yaml", "evaluation.json", "history.jsonl"),
        *("model", "reference", "report.html", "report.json", "report.md"),
    }
    assert fasterase.UnlearnConfig.from_yaml(tmp_path / "config.yaml") == result.config
    settings = (tmp_path / "config.yaml").read_text()
    assert "# Objects in Python, to be given anew: model, forget, retain, holdout.\n" in settings
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert all(set(line) == set(RECORD.split()) for line in lines)
    assert result.history[1].step == 2
    assert set(result.evaluation.to_dict()) == {"forget", "retain", "holdout"}
    report = (tmp_path / "report.md").read_text()
    assert "Erasure report" in report
    assert f"```\n{result.evaluation.table()}\n```" in report
    assert yaml.safe_load(report.partition("```yaml")[2].partition("```")[0])["max_steps"] == 3


def test_copy_leaves_the_model_alone():
    model = small_models.open_clip_vit(vocab_size=VOCABULARY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    items = image_pairs(24)
    copies = []
    for mode in (nullcontext, torch.inference_mode):
        with mode():
            copies.append(erase(model, items[:6], items[6:], copy=True).model)
    assert same_weights(before, model.state_dict())
    erase(model, items[:6], items[6:])
    for copy in copies:
        assert copy is not model
        assert type(copy) is type(model)
        assert same_weights(copy.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:1 broken pair is")
def test_broken_pairs_are_named_counted_and_left_out():
    retain, holdout = pairs(400, seed=2), pairs(50, seed=3)
    retain[7][0][0, 0, 0] = float("nan")
    retain[9] = (retain[9][0], None)
    holdout[5][0][0, 0, 0] = float("inf")
    with pytest.warns(UserWarning, match=r"retain\[7\] \(image holds NaN"):
        result = erase(retain=retain, holdout=holdout, evaluation="quick")
    assert {skip.id for skip in result.skipped} == {"retain[7]", "retain[9]", "holdout[5]"}
    assert dict(result.skipped)["retain[9]"] == "no caption"


@pytest.mark.parametrize("wrapper", [torch.no_grad, torch.inference_mode])
def test_trains_also_where_the_caller_has_gradients_off(wrapper):
    plain, wrapped = TinyModel(), TinyModel()
    erase(plain, evaluation="quick")
    with wrapper():
        erase(wrapped, evaluation="quick")
        assert not torch.is_grad_enabled()
    assert same_weights(plain.weights(), wrapped.weights())


def test_half_precision_comes_back_from_another_device_in_buffers_too():
    model = TinyModel(batch_norm=True)
    model.module.to(torch.bfloat16)
    # To torch another device than "cpu": modules get other buffers.
    with borrowed(model, device=torch.device("cpu", 0)):
        assert model.module.image[2].running_mean.dtype == torch.float32
    floats = [each for each in model.module.state_dict().values() if each.is_floating_point()]
    assert {each.dtype for each in floats} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_rounds_nothing(precision):
    plain, wrapped = TinyModel(), TinyModel()
    options = {"evaluation": "quick", "precision": precision}
    alone = erase(plain, **options)
    pairs_of = {"forget": FORGET, "retain": pairs(20, seed=2), "progress": False}
    measured = fasterase.evaluate(plain, **pairs_of).to_dict()
    with torch.autocast("cpu", torch.bfloat16):
        inside = erase(wrapped, **options)
        assert fasterase.evaluate(wrapped, **pairs_of).to_dict() == measured
        assert torch.is_autocast_enabled("cpu")
    assert same_weights(plain.weights(), wrapped.weights())
    assert alone.evaluation.to_dict() == inside.evaluation.to_dict()


def test_the_callers_random_numbers_are_not_touched():
    tower = TinyModel(dropout=0.2)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    erase(tower, train_mode=True)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"micro_batch_size": 1},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"negatives": "joint"},
        {"negatives": "joint", "forget_loss": "contrastive"},
        {"forget_loss": "contrastive", "consistency_weight": 0.0, "anchor_weight": 0.0},
        {"floor": None},
        {"floor": 0.1, "retain_weight": 0.0},
        {"max_grad_norm": None},
        {"backend": "dense"},
        {"forget_weight": 0.0},
        {"batch_size": 1000, "forget_batch_size": 1000},
        {"max_steps": None, "epochs": 2},
        {"seed": 2**70},
        {"evaluation": "full"},
    ],
    ids=lambda config: ",".join(f"{name}={value}" for name, value in config.items()),
)
def test_settings(config):
    tower = TinyModel()
    before = tower.weights()
    result = erase(tower, **config)
    assert [record.step for record in result.history] == list(range(1, len(result.history) + 1))
    assert len(result.history) == (4 if "epochs" in config else 3)
    assert any(record.applied for record in result.history)
    assert all(tensor.dtype == torch.float32 for tensor in tower.weights().values())
    assert not same_weights(before, tower.weights())


@pytest.mark.parametrize(
    ("tune", "moved"),
    [
        ("image", {"image.1", "image.2", "image.5"}),
        ("text", {"embedding", "text.0", "text_projection"}),
        ("projections", {"image.5", "text_projection"}),
        ("last:1", {"image.1", "image.2", "image.5", "text.0", "text_projection"}),
    ],
)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_tune_moves_what_it_names(tune, moved, micro_batch_size):
    tower = TinyModel()
    before = tower.weights()
    erase(tower, tune=tune, weight_decay=0.5, micro_batch_size=micro_batch_size)
    changed = {
        name.rpartition(".")[0]
        for name, tensor in tower.weights().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == moved


@pytest.mark.parametrize(("start", "ceiling"), [(4.0, 100.0), (6.0, 403.4288)])
def test_a_trained_logit_scale_is_clamped_inside_the_loss(start, ceiling, monkeypatch):
    tower = TinyModel()
    with torch.no_grad():
        tower.module.logit_scale.fill_(start)
    seen = []
    plain = loss.weighted_erase_loss

    def spy(image, text, scale, *rest, **options):
        seen.append(float(scale.detach()))
        return plain(image, text, scale, *rest, **options)

    def raise_scale(record):
        tower.module.logit_scale.data.add_(1.0)

    monkeypatch.setattr(loss, "weighted_erase_loss", spy)
    erase(tower, train_logit_scale=True, callback=raise_scale)
    assert seen == pytest.approx([math.exp(start), ceiling, ceiling])


@pytest.mark.parametrize("form", ["table", "folder", "list"])
def test_an_image_is_read_once_before_the_first_step(form, tmp_path, monkeypatch):
    read = Counter()

    def note(path, *, id):
        read[path] += 1
        return read_image_file(path, id=id)

    def make_set(name, count):
        (tmp_path / name).mkdir()
        rows = []
        for number in range(count):
            image = tmp_path / name / f"{number}.png"
            Image.new("RGB", (40, 40), (9 * number, 90, 9 * count)).save(image)
            # No two files of both sets have the same size.
            image.write_bytes(image.read_bytes() + bytes(1000 * count + number))
            image.with_suffix(".txt").write_text(f"{name} {number}")
            rows.append((str(image), f"{name} {number}"))
        (tmp_path / f"{name}.csv").write_text("\n".join(map(",".join, [("path", "text"), *rows])))
        return {"list": rows, "table": tmp_path / f"{name}.csv", "folder": tmp_path / name}[form]

    forget, retain = make_set("boat", 6), make_set("tree", 12)
    for module in ("images", "read_objects"):
        monkeypatch.setattr(f"fasterase.pairs.{module}.read_image_file", note)
    seen = []
    erase(
        small_models.open_clip_vit(),
        forget,
        retain,
        tokenizer=small_models.simple_tokenizer(),
        callback=lambda record: seen.append(Counter(read)),
        max_steps=1,
    )
    assert len(seen[0]) == 18
    # Encoded once; the 3 + 8 of the step are read again to be trained on.
    assert sorted(seen[0].values()) == [1] * 7 + [2] * 11
