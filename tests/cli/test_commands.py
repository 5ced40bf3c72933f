"""What each command hands to the library, and what it prints and writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from fasterase.cli import main
from fasterase.cli.commands import Unlearn
from fasterase.config import COMMAND_KEYS, UnlearnConfig, field_names
from tests import small_models
from tests.cli.fake_api import REQUIRED, FakeApi
from tests.marks import SHORT_RUN


def test_flags_reach_unlearn(unlearn, capsys):
    flags = ["--holdout", "h.csv", "--text_key", "caption", "--lr", "3e-6", "--betas", "0.8,0.9"]
    assert main(["unlearn", *REQUIRED, *flags]) == 0
    args, kwargs = unlearn.calls[0]
    assert args == ("m", "f.csv", "r.csv")
    assert kwargs["holdout"] == "h.csv"
    assert kwargs["text_key"] == "caption"
    assert kwargs["image_key"] is None
    assert unlearn.config == UnlearnConfig(lr=3e-6, betas=(0.8, 0.9), output_dir="out")
    assert "THE TABLE" in capsys.readouterr().out


def test_yaml_and_flags_win_in_this_order(unlearn, tmp_path):
    file = tmp_path / "erase.yaml"
    file.write_text(
        "model: m\nforget: f\nretain: r\noutput_dir: out\nlr: 1e-4\nrecipe: cliperase\n"
        "batch_size: 32\nfloor: 0.1\n"
    )
    flags = ["--lr", "2e-4", "--optimizer", "adamw"]  # which the recipe does not replace
    assert main(["unlearn", "--config", str(file), *flags]) == 0
    given = {"lr": 2e-4, "batch_size": 32, "floor": 0.1, "optimizer": "adamw"}
    expected = UnlearnConfig.cliperase(output_dir="out", **given)
    assert unlearn.config == expected
    assert unlearn.calls[0][0] == ("m", "f", "r")


@pytest.mark.parametrize("recipe", ["fasterase", "cliperase"])
def test_print_config_gives_a_file_that_repeats_the_run(recipe, unlearn, tmp_path, capsys):
    flags = [*REQUIRED, "--recipe", recipe, "--seed", "5"]
    status = tmp_path / "run" / "status.json"
    status.parent.mkdir()
    status.write_text("of an earlier run")
    folder = ["--output_dir", str(status.parent)]
    assert main(["unlearn", *flags, *folder, "--print_config"]) == 0
    assert status.read_text() == "of an earlier run"
    capsys.readouterr()
    assert main(["unlearn", *flags, "--print_config"]) == 0
    assert not unlearn.calls
    printed = capsys.readouterr().out
    assert set(field_names()) < set(yaml.safe_load(printed))
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert main(["unlearn", *flags]) == 0
    assert main(["unlearn", "--config", str(file)]) == 0
    assert unlearn.calls[0] == unlearn.calls[1]
    assert UnlearnConfig.from_yaml(file) == unlearn.config


def test_the_keys_of_the_command_line_are_known_to_from_yaml():
    assert set(COMMAND_KEYS) == {field.name for field in dataclasses.fields(Unlearn)}


def test_unlearn_ends_with_the_path_of_its_page(unlearn, capsys):
    assert main(["unlearn", *REQUIRED]) == 0
    assert capsys.readouterr().out.endswith(f"Read {Path('out/report.html')}\n")


def test_evaluate(evaluate, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("apple\n\n pear \n")
    flags = [*REQUIRED[:-2], "--image_key", "img", "--text_key", "alt"]
    flags += ["--device", "cpu", "--num_workers", "3", "--progress", "false"]
    flags += ["--references", "retrained=other", "--original", "m0", "--max-pairs", "9"]
    flags += ["--class_names", str(tmp_path / "classes.txt"), "--output", "report.md"]
    flags += ["--attacks", "swap", "membership", "--non_members", "n.csv"]
    flags += ["--tasks", "retrieval", "--model_name", "ViT-B-32"]
    assert main(["evaluate", *flags]) == 0
    args, kwargs = evaluate.calls[0]
    assert args == ("m", "f.csv", "r.csv")
    assert kwargs == {
        "model_name": "ViT-B-32",
        "holdout": None,
        "sets": {},
        "forget_sets": {},
        "image_key": "img",
        "text_key": "alt",
        "original": "m0",
        "references": {"retrained": "other"},
        "class_names": ["apple", "pear"],
        "tasks": ["retrieval"],
        "attacks": ["swap", "membership"],
        "non_members": "n.csv",
        "max_pairs": 9,
        "seed": 0,
        "device": "cpu",
        "num_workers": 3,
        "progress": False,
    }
    assert "THE TABLE" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
def test_further_sets_to_keep_and_to_forget(command, request):
    api = request.getfixturevalue(command)
    flags = REQUIRED if command == "unlearn" else REQUIRED[:-2]
    sets = ["--sets", "near=n.csv", "forget-this=a=b.csv", "--sets=far=shards/{0..9}.tar"]
    assert main([command, *flags, *sets, "--forget_sets", "unseen=u.csv"]) == 0
    _, kwargs = api.calls[0]
    expected = {"near": "n.csv", "forget-this": "a=b.csv", "far": "shards/{0..9}.tar"}
    assert kwargs["sets"] == expected
    assert kwargs["forget_sets"] == {"unseen": "u.csv"}


def test_further_sets_in_yaml(unlearn, tmp_path):
    file = tmp_path / "erase.yaml"
    file.write_text("sets: {near: n.csv}\nforget_sets: [unseen=u.csv, hidden=h.csv]\n")
    assert main(["unlearn", *REQUIRED, "--config", str(file)]) == 0
    _, kwargs = unlearn.calls[0]
    assert kwargs["sets"] == {"near": "n.csv"}
    assert kwargs["forget_sets"] == {"unseen": "u.csv", "hidden": "h.csv"}


@pytest.mark.parametrize(
    ("flag", "path", "said"),
    [
        ("--output", "report.pdf", "--output='report.pdf'"),
        ("--output", ".", "--output='.'"),
        ("--output", "file/report.md", "--output='file/report.md'"),
        ("--plots", "file/plots", "file is not a folder"),
    ],
)
def test_evaluate_refuses_what_could_not_be_written(
    flag, path, said, evaluate, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["evaluate", *REQUIRED[:-2], "--attacks", "swap", flag, path]) == 2
    assert said in capsys.readouterr().err
    assert not evaluate.calls


def test_a_misspelt_attack_leaves_no_folder_for_plots(tmp_path, capsys):
    plots = tmp_path / "new" / "plots"
    flags = [*REQUIRED[:-2], "--attacks", "quantize", "--plots", str(plots)]
    assert main(["evaluate", *flags]) == 2
    assert "unknown attack 'quantize'. Did you mean quantise?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo_passes_only_what_was_given(monkeypatch):
    api = FakeApi()
    module = SimpleNamespace(run_demo=api)
    monkeypatch.setitem(sys.modules, "fasterase.demo.run", module)
    assert main(["demo", "--forget", "animal-bird", "--seed", "3"]) == 0
    defaults = {"model": None, "recipe": "fasterase", "output_dir": None, "full": False}
    assert api.calls[0][1] == {"forget": "animal-bird", "seed": 3, **defaults}


@SHORT_RUN
def test_unlearn_and_evaluate_on_a_saved_model(tmp_path, capsys):
    from fasterase.models.load import load_model

    model = small_models.open_clip_vit()
    load_model(model, tokenizer=small_models.simple_tokenizer()).save(tmp_path / "original")
    for name, colours in {"forget": ["red", "pink"], "retain": ["blue", "green", "black"]}.items():
        for colour in colours:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(tmp_path / name / f"{colour}.png")
            (tmp_path / name / f"{colour}.txt").write_text(f"a {colour} square")
    pairs = ["--forget", str(tmp_path / "forget"), "--retain", str(tmp_path / "retain")]
    folder = tmp_path / "out"
    flags = ["--output_dir", str(folder), "--max_steps", "2", "--lr", "1e-5"]
    flags += ["--progress", "false", "--forget_sets", f"unseen={tmp_path / 'forget'}"]
    assert main(["unlearn", "--model", str(tmp_path / "original"), *pairs, *flags]) == 0
    assert str(folder) in capsys.readouterr().out
    assert len((folder / "history.jsonl").read_text().splitlines()) == 2
    assert (folder / "evaluation.json").is_file()
    assert (folder / "pictures.png").is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") > 4
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in ("report.html", "report.md"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text(encoding="utf-8") == text
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    both = tmp_path / "both.html"
    assert main(["report", str(folder), str(folder), "--output", str(both)]) == 0
    assert "2 erasures side by side" in both.read_text(encoding="utf-8")
    assert main(["report"]) == 2
    assert "report needs --runs" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is no folder of a finished run" in capsys.readouterr().err

    report = tmp_path / "report.json"
    flags = ["--original", str(tmp_path / "original"), "--sets", f"near={tmp_path / 'forget'}"]
    flags += ["--forget_sets", f"unseen={tmp_path / 'forget'}", "--output", str(report)]
    assert main(["evaluate", "--model", str(folder / "model"), *pairs, *flags]) == 0
    scores = json.loads(report.read_text())["scores"]
    assert set(scores) == {"forget", "unseen", "retain", "near"}

    missing = ["--forget", "missing.csv", "--retain", str(tmp_path / "retain")]
    missing += ["--output_dir", str(tmp_path / "refused")]
    assert main(["unlearn", "--model", str(folder / "model"), *missing]) == 2
    assert "missing.csv" in capsys.readouterr().err
