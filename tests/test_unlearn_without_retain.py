"""An empty retain set: with numbers for lr and steps the run forgets, and gives no verdict."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from fasterase.cli import main
from fasterase.errors import InputError
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from tests.small_models import open_clip_vit, simple_tokenizer
from tests.tiny_model import FORGET, Noisy, TinyModel, erase, pairs, same_weights


@pytest.mark.filterwarnings("ignore:.*returns a different item on a second read")
@pytest.mark.parametrize(
    "options",
    [
        {"evaluation": "quick"},
        {"retain": Noisy([])},
        {"retain": open_pairs(FORGET, name="all").select([], name="retain")},
        {"forget": Noisy(FORGET)},
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
    with pytest.warns(UserWarning, match="no verdict: there is no retain caption"):
        result = erase(model, **{"retain": [], **options})
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
        erase(retain=[], **options)
    with pytest.raises(InputError, match="`retain` is empty and forget_weight=0"):
        erase(retain=[], forget_weight=0.0)


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
    folders = {"model": "original", "forget": "forget.csv", "retain": file, "output_dir": "run"}
    flags = [f"--{name}={tmp_path / path}" for name, path in folders.items()]
    command = ["unlearn", *flags, "--progress", "false"]
    assert main(command) == 2
    assert "`retain` is empty" in capsys.readouterr().err
    command += ["--lr", "1e-4", "--tune", "projections", "--prefix_cache", "1"]
    for steps in (2, 3):  # the second time, the run continues
        assert main([*command, "--max_steps", str(steps)]) == 0
        assert "no verdict" in capsys.readouterr().out
    assert len((run / "history.jsonl").read_text().splitlines()) == 3
    assert (run / "report.html").is_file()
    record = json.loads((run / "model" / "provenance.json").read_text())
    assert record["data"]["retain"]["pairs"] == 0
