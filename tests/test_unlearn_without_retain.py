"""An empty retain set: with numbers for lr and steps the run forgets, and gives no verdict."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import fasterase
from fasterase.cli import main
from fasterase.errors import InputError
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from tests.small_models import open_clip_vit, simple_tokenizer
from tests.tiny_model import TinyModel, pairs, same_weights

FORGET = pairs(6, seed=1)
NUMBERS = {"lr": 1e-3, "max_steps": 3, "forget_batch_size": 4, "progress": False}


class Nothing(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)


class Augmented(Dataset):
    def __len__(self):
        return len(FORGET)

    def __getitem__(self, index):
        pixels, ids = FORGET[index]
        return pixels + 0.1 * torch.randn_like(pixels), ids


@pytest.mark.filterwarnings("ignore:.*returns a different item on a second read")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retain": Nothing(), "evaluation": None},
        {"retain": open_pairs(FORGET, name="all").select([], name="retain")},
        {"forget": Augmented()},
        {"evaluation": "full", "sets": {"near": pairs(5, seed=3)}},
        {"cross_weight": 0.0},
        {"forget_loss": "contrastive", "negatives": "joint"},
        {"micro_batch_size": 1, "tune": "image", "cross_weight": 1.0},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_run_forgets_and_gives_no_verdict(options):
    model = TinyModel()
    before = model.weights()
    given = {"forget": FORGET, "retain": [], **NUMBERS, **options}
    with pytest.warns(UserWarning, match="no verdict: there is no retain caption"):
        result = fasterase.unlearn(model, **given)
    assert (result.verdict, result.residue, result.forgotten) == (None, None, False)
    assert not same_weights(model.weights(), before)
    assert len(result.history) == 3
    assert all(each.retain == each.consistency == each.anchor == 0 for each in result.history)
    if result.evaluation is not None:
        assert result.evaluation.verdict is None
        assert set(result.evaluation.pairs) == {"forget", *options.get("sets", {})}


@pytest.mark.parametrize(
    "options",
    [
        {"lr": "auto", "max_steps": None},
        {"lr": "auto"},
        {"max_steps": None},
        {"stop_when_forgotten": True},
    ],
    ids=str,
)
def test_what_needs_a_retain_set_asks_for_numbers(options):
    with pytest.raises(InputError, match=r"`retain` is empty.*Give numbers for lr and epochs"):
        fasterase.unlearn(TinyModel(), FORGET, [], **{**NUMBERS, **options})
    with pytest.raises(InputError, match="`retain` is empty and forget_weight=0"):
        fasterase.unlearn(TinyModel(), FORGET, [], **NUMBERS, forget_weight=0.0)


def test_stop_when_forgotten_needs_other_captions_to_tell_by():
    other_pictures = [(pixels, FORGET[0][1]) for pixels, _ in pairs(4, seed=2)]
    forget = [(pixels, FORGET[0][1]) for pixels, _ in FORGET]
    with pytest.raises(InputError, match=r"retain: every caption .* no stop_when_forgotten"):
        fasterase.unlearn(TinyModel(), forget, other_pictures, **NUMBERS, stop_when_forgotten=True)


@pytest.mark.filterwarnings("ignore:no verdict")
@pytest.mark.parametrize(
    ("file", "content"), [("none.csv", "filepath,title\n"), ("none.jsonl", ""), ("none.json", "[]")]
)
def test_a_file_without_rows_on_the_command_line(file, content, tmp_path, capsys):
    load_model(open_clip_vit(), tokenizer=simple_tokenizer()).save(tmp_path / "original")
    rows = ["filepath,title"]
    for shade in range(0, 250, 50):
        Image.new("RGB", (40, 30), (shade, 9, 9)).save(tmp_path / f"{shade}.png")
        rows.append(f"{shade}.png,apple {shade}")
    (tmp_path / "forget.csv").write_text("\n".join(rows))
    (tmp_path / file).write_text(content)
    run = tmp_path / "run"
    sets = ["--forget", str(tmp_path / "forget.csv"), "--retain", str(tmp_path / file)]
    sets += ["--progress", "false"]
    command = ["unlearn", "--model", str(tmp_path / "original"), *sets, "--output_dir", str(run)]
    assert main(command) == 2
    assert "`retain` is empty" in capsys.readouterr().err
    command += ["--lr", "1e-4", "--tune", "projections", "--prefix_cache", "1"]
    for steps in (2, 3):  # the second time, the run continues
        assert main([*command, "--max_steps", str(steps)]) == 0
        assert "no verdict" in capsys.readouterr().out
    assert len((run / "history.jsonl").read_text().splitlines()) == 3
    assert (run / "report" / "losses.png").is_file()
    record = json.loads((run / "model" / "provenance.json").read_text())
    assert record["data"]["retain"]["pairs"] == 0
