"""`config.yaml` names what a run was given, without secrets, and repeats it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

import fasterase
from fasterase.cli import main
from fasterase.config import UnlearnConfig
from fasterase.repeat import OBJECT, check_repeatable, describe_run
from tests import small_models
from tests.cli.fake_api import FakeApi
from tests.marks import SHORT_RUN


def described(**arguments):
    text = describe_run(arguments, UnlearnConfig(lr=1e-5))
    return text, yaml.safe_load(text)


def test_names_and_paths_are_written_as_they_were_given():
    text, values = described(
        model=Path("runs/one"),
        forget={"red": "red.csv", "pink": Path("pink.csv")},
        retain="shards/{000..099}.tar",
        sets={},
        holdout=None,
        concept="fruit",
        callback=print,
    )
    assert values["model"] == "runs/one"
    assert values["forget"] == {"red": "red.csv", "pink": "pink.csv"}
    assert values["retain"] == "shards/{000..099}.tar"
    assert (values["concept"], values["lr"]) == ("fruit", 1e-5)
    assert not {"sets", "holdout", "callback"} & set(values)
    assert "Given in Python alone, where no flag stands for it: callback." in text


def test_sets_that_others_made_are_named_by_these():
    made = SimpleNamespace(flags={"found": "sets"})
    _, values = described(model="m", forget=made, retain=made, sets={"near": made, "far": "f.csv"})
    assert values["found"] == "sets"
    assert values["sets"] == {"far": "f.csv"}
    assert not {"forget", "retain"} & set(values)


def test_all_sets_of_a_found_folder_are_named_by_it(monkeypatch, tmp_path):
    class Found:
        facts = property(lambda self: {"concept": ["octopus"]})
        unseen = property(lambda self: SimpleNamespace(name="unseen"))  # a new view each time
        neighbours = property(lambda self: SimpleNamespace(name="neighbours"))

        def __iter__(self):
            return iter((SimpleNamespace(name="forget"), SimpleNamespace(name="retain")))

    monkeypatch.setitem(vars(fasterase), "unlearn", unlearn := FakeApi())
    monkeypatch.setitem(vars(fasterase), "Found", SimpleNamespace(load=lambda folder: Found()))
    flags = ["--model", "m", "--found", "folder", "--output_dir", str(tmp_path)]
    assert main(["unlearn", *flags]) == 0
    (model, forget, retain), options = unlearn.calls[0]
    given = {"forget": forget, "retain": retain, **options}
    _, values = described(model=model, **{n: given[n] for n in ("forget", "retain", "sets")})
    assert (values["model"], values["found"]) == ("m", "folder")
    assert OBJECT not in str(values)


def test_texts_of_other_types_and_marks_of_other_kinds():
    _, values = described(model=np.str_("m"), sets={np.str_("near"): "n.csv"}, concept="f*** words")
    assert values["sets"] == {"near": "n.csv"}
    check_repeatable(values)


def test_secrets_are_left_out():
    secret = "https://user:word@host/a.csv?X-Amz-Signature=0123"
    text, values = described(model="m", forget=secret, retain="r", sets={"near": secret})
    assert not any(word in text for word in ("user:word", "0123"))
    assert "`***` stands for" in text
    assert values["sets"]["near"].startswith("https://***@host/a.csv")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": object(), "forget": [1], "retain": "r"}, "--model, --forget"),
        ({"model": "m", "forget": "f", "retain": "r", "sets": {"near": [1]}}, "--sets"),
        ({"model": "m", "forget": "https://a:b@host/f", "retain": "r"}, "a secret for --forget"),
    ],
)
def test_what_a_file_cannot_hold_is_to_be_given_anew(
    arguments, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(vars(fasterase), "unlearn", unlearn := FakeApi())
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    text, _ = described(**arguments)
    file.write_text(text)
    flags = ["--config", str(file), "--output_dir", "o"]
    assert main(["unlearn", *flags]) == 2
    assert named in capsys.readouterr().err
    assert not unlearn.calls
    flags += ["--model", "m", "--forget", "f", "--sets", "near=n.csv"]
    assert main(["unlearn", *flags]) == 0
    assert unlearn.calls[0][0] == ("m", "f", "r")
    assert OBJECT not in str(unlearn.calls[0])


@pytest.mark.slow
@SHORT_RUN
@pytest.mark.parametrize("way", ["paths", "split"])
def test_a_run_is_repeated(way, tmp_path, monkeypatch, capsys):
    from fasterase.models.load import load_model

    monkeypatch.chdir(tmp_path)
    model = small_models.open_clip_vit()
    load_model(model, tokenizer=small_models.simple_tokenizer()).save("original")
    for colour in ("red", "pink", "blue", "green", "black"):
        part = "forget" if colour in ("red", "pink") else "retain"
        for folder in (Path(part), Path("all")):
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(folder / f"{colour}.png")
            (folder / f"{colour}.txt").write_text(f"a {colour} square")
    flags = {
        "paths": ["--forget", "forget", "--retain", "retain", "--sets", "near=retain"],
        "split": ["--data", "all", "--forget_expression", "red|pink"],
    }[way]
    options = ["--max_steps", "2", "--lr", "1e-4", "--progress", "false", "--evaluation", "none"]
    assert main(["unlearn", "--model", "original", *flags, "--output_dir", "one", *options]) == 0
    assert main(["unlearn", "--config", "one/config.yaml", "--output_dir", "two"]) == 0
    first, second = (
        Path(run, "model/open_clip_model.safetensors").read_bytes() for run in ("one", "two")
    )
    assert first == second
    assert first != Path("original/open_clip_model.safetensors").read_bytes()
    one, two = (yaml.safe_load(Path(run, "config.yaml").read_text()) for run in ("one", "two"))
    assert {**one, "output_dir": "two"} == two
