"""Two sets, or one source that is split: what commands take, and `fasterase split`."""

from __future__ import annotations

import io
import shlex
import tarfile

import pytest

import fasterase
from fasterase.cli import main
from fasterase.pairs.open import open_pairs
from fasterase.progress import say

OTHERS = ["--model", "m", "--output_dir", "out"]


@pytest.fixture
def data(tmp_path):
    rows = ["apple.png,a red Apple", "pear.png,a pear", "pineapple.png,pineapple"]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["filepath,title", *rows]) + "\n")
    return str(path)


def ids(pairs):
    return [pairs.id(i) for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("expression", r"\bapple\b", ["apple.png"]),
        ("expression", "apple", ["apple.png", "pineapple.png"]),
        ("classes", "pineapple", ["pineapple.png"]),
        ("classes", "A pear, pineapple", ["pear.png", "pineapple.png"]),
        ("ids", "ids.txt", ["pear.png"]),
    ],
)
def test_unlearn_splits_data(rule, value, expected, data, unlearn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ids.txt", "apple"):  # an expression is never taken for a file
        (tmp_path / name).write_text("pear.png\n")
    assert main(["unlearn", *OTHERS, "--data", data, f"--forget_{rule}", value]) == 0
    (model, forget, retain), _ = unlearn.calls[0]
    assert model == "m"
    assert ids(forget) == expected
    assert sorted(ids(forget) + ids(retain)) == ["apple.png", "pear.png", "pineapple.png"]


@pytest.mark.parametrize("shown", [True, False])
def test_a_split_is_as_quiet_as_the_run(shown, data, unlearn, tmp_path, monkeypatch, capsys):
    real = fasterase.split

    def split(*args, **kwargs):
        say("splitting")
        return real(*args, **kwargs)

    monkeypatch.setitem(vars(fasterase), "split", split)
    rule = ["--data", data, "--forget_expression", "apple", "--progress", str(shown).lower()]
    assert main(["unlearn", *OTHERS, *rule]) == 0
    assert ("splitting" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("by", ["flags", "yaml"])
def test_several_concepts_have_names(by, unlearn, tmp_path):
    flags = ["--forget", "octopus=a.csv", "bus=b.csv"]
    if by == "yaml":
        file = tmp_path / "erase.yaml"
        file.write_text("forget:\n  octopus: a.csv\n  bus: b.csv\n")
        flags = ["--config", str(file)]
    assert main(["unlearn", *OTHERS, "--retain", "r.csv", *flags]) == 0
    assert unlearn.calls[0][0][1] == {"octopus": "a.csv", "bus": "b.csv"}


def test_one_source_with_an_equals_sign_is_a_file_where_there_is_one(
    unlearn, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "a=b.csv"
    rest = [*OTHERS, "--retain", "r.csv"]
    assert main(["unlearn", *rest, "--forget", "one=a.csv"]) == 0
    file.touch()
    assert main(["unlearn", *rest, "--forget", str(file)]) == 0
    (tmp_path / "date=2024").mkdir()
    monkeypatch.chdir(tmp_path)
    others = ["https://h/a.tar?sig=abc", "pipe:cat a.tar #x=1", "data/date=2024/{000..009}.tar"]
    others += ["date=2024/{000..009}.tar", "data/part=1-{000..009}.tar"]
    for other in others:
        assert main(["unlearn", *rest, "--forget", other]) == 0
    assert [call[0][1] for call in unlearn.calls] == [{"one": "a.csv"}, str(file), *others]
    for named in ("alice=https://h/a.tar", "artist:monet=a.csv", "date=2023/0.tar"):
        assert main(["unlearn", *rest, "--forget", named]) == 0
        assert unlearn.calls[-1][0][1] == dict([named.split("=", 1)])
    assert main(["unlearn", *rest, "--forget", "a.csv", "b.csv"]) == 2
    assert "--forget a.csv: expected NAME=WHERE" in capsys.readouterr().err


def test_evaluate_splits_data_and_yaml_gives_it(data, evaluate, tmp_path):
    file = tmp_path / "measure.yaml"
    file.write_text(f"model: m\ndata: {data}\nforget_classes: [a pear]\n")
    assert main(["evaluate", "--config", str(file)]) == 0
    (_, forget, retain), _ = evaluate.calls[0]
    assert (ids(forget), ids(retain)) == (["pear.png"], ["apple.png", "pineapple.png"])


RULES = "one of --forget_expression, --forget_ids, --forget_classes"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data", "DATA"], f"--data needs {RULES}"),
        (["--data", "DATA", "--forget", "f.csv"], "nor --retain; found --forget."),
        (
            ["--data", "DATA", "--forget_expression", "a", "--retain", "r.csv"],
            "found --forget_expression and --retain.",
        ),
        (
            ["--data", "DATA", "--forget_expression", "a", "--forget_ids", "i.txt"],
            "found --forget_expression and --forget_ids",
        ),
        (["--forget_expression", "a"], "--forget_expression splits the pairs of --data"),
        (["--data", "DATA", "--forget_expression", "("], "--forget_expression='(' is not a reg"),
        (["--data", "DATA", "--forget_expression", "cat"], "--forget_expression='cat' matches no"),
        (["--data", "DATA", "--forget_ids", "none.txt"], "--forget_ids: the file of ids none.txt"),
        (["--data", "none.csv", "--forget_expression", "a"], "--data: no file or folder 'none.c"),
        (
            ["--found", "sets", "--retain", "r.csv"],
            "--found names the sets by itself",
        ),
        (["--found", "sets"], "found: sets is no folder that `fasterase find` wrote"),
    ],
)
@pytest.mark.parametrize("command", ["unlearn", "split"])
def test_wrong_combinations(command, flags, named, data, unlearn, tmp_path, capsys):
    flags = [data if flag == "DATA" else flag for flag in flags]
    if command == "split" and {"--forget", "--retain", "--found"} & set(flags):
        named = "unknown flag"
    others = OTHERS if command == "unlearn" else ["--output_dir", str(tmp_path / "sets")]
    assert main([command, *others, *flags]) == 2
    assert not (tmp_path / "sets").exists()
    printed = capsys.readouterr()
    assert named in printed.err
    assert printed.err.count("\n") == 1
    assert not unlearn.calls
    assert printed.out == ""


def next_command(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("Next: fasterase ")]
    return [flag.replace("MODEL", "m") for flag in shlex.split(line)[2:]]


def test_split_writes_tables_that_unlearn_reads(data, unlearn, tmp_path, capsys):
    sets = tmp_path / "my sets"
    flags = ["--data", data, "--forget_expression", "apple", "--output_dir", str(sets)]
    assert main(["split", *flags]) == 0
    printed = capsys.readouterr().out
    assert f"forget pairs: 2 of 3 of pairs.csv: {sets / 'forget.csv'}" in printed
    assert main(next_command(printed)) == 0
    (_, forget, retain), _ = unlearn.calls[0]
    assert (len(open_pairs(forget, name="f")), len(open_pairs(retain, name="r"))) == (2, 1)


def test_split_of_tars_gives_ids_that_unlearn_takes(unlearn, tmp_path, capsys):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        entries = {"a.alt": "apple", "a.png": "1", "b.alt": "pear", "b.png": "2"}
        for entry, content in entries.items():
            info = tarfile.TarInfo(entry)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    flags = ["--data", str(tmp_path / "s.tar"), "--text_key", "alt", "--forget_classes", "pear"]
    assert main(["split", *flags, "--output_dir", str(tmp_path / "sets")]) == 0
    assert (tmp_path / "sets/forget.txt").read_text() == "s.tar/b\n"
    assert main(next_command(capsys.readouterr().out)) == 0
    (_, forget, retain), kwargs = unlearn.calls[0]
    assert (ids(forget), ids(retain)) == (["s.tar/b"], ["s.tar/a"])
    assert kwargs["text_key"] == "alt"


def test_split_does_not_replace_its_source(data, tmp_path, capsys):
    (tmp_path / "forget.csv").write_bytes((tmp_path / "pairs.csv").read_bytes())
    flags = ["--data", str(tmp_path / "forget.csv"), "--forget_expression", "apple"]
    assert main(["split", *flags, "--output_dir", str(tmp_path)]) == 2
    assert "would replace" in capsys.readouterr().err
    (tmp_path / "file").touch()
    flags = ["--data", data, "--forget_expression", "apple"]
    assert main(["split", *flags, "--output_dir", str(tmp_path / "file" / "sets")]) == 2
    assert "cannot be created" in capsys.readouterr().err
