from __future__ import annotations

import dataclasses
import errno
import json
import tempfile
from pathlib import Path

import pytest

from fasterase.errors import InputError
from fasterase.report.evaluation import Evaluation, check_report_path


def scores(recall: float, rank: float, cosine: float) -> dict[str, dict[str, float]]:
    values = {"image_to_text_recall@1": recall, "median_rank": rank, "matched_cosine": cosine}
    return {"forget": dict(values), "retain": dict(values)}


def interval(low: float, high: float) -> dict[str, dict[str, tuple[float, float]]]:
    keys = scores(0, 0, 0)["forget"]
    return {name: dict.fromkeys(keys, (low, high)) for name in ("forget", "retain")}


EVALUATION = Evaluation(
    scores=scores(0.125, 512, -0.08),
    intervals=interval(-0.25, 0.5),
    chance=scores(0.001, 508, 0.01),
    pairs={"forget": 1, "retain": 1234},
    settings={"model": "fake", "candidates": 1015, "max_pairs": None, "seed": 0, "resamples": 9},
    original=scores(1, 1, 0.76),
    references={"fine-tuned on retain": scores(0.5, 3.5, 0.1)},
)


def test_table_says_for_every_row_what_is_wanted() -> None:
    lines = EVALUATION.table().split("\n")
    assert lines[:12] == [
        "                                                                          fine-tuned",
        "  metric               wanted    chance  original  model   95 % interval   on retain",
        "------------------------------------------------------------------------------------",
        "forget (1 pair, to forget)",
        "  image->text R@1, %   ↓            0.1     100.0   12.5   -25.0 to 50.0        50.0",
        "  median caption rank  ↑ chance   508.0       1.0  512.0     -0.2 to 0.5         3.5",
        "  mean matched cosine  ↓ chance   +0.01     +0.76  -0.08  -0.25 to +0.50       +0.10",
        "------------------------------------------------------------------------------------",
        "retain (1,234 pairs, to keep)",
        "  image->text R@1, %   ↑            0.1     100.0   12.5   -25.0 to 50.0        50.0",
        "  median caption rank  ↓          508.0       1.0  512.0     -0.2 to 0.5         3.5",
        "  mean matched cosine  ↑          +0.01     +0.76  -0.08  -0.25 to +0.50       +0.10",
    ]
    assert "among 1,015 captions" in lines[-2]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["report", "to_json", "from_json", "plot"])
def test_what_is_no_path_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=r"^(path|folder): expected a path, found NoneType"):
        getattr(EVALUATION, name)(None)


def test_verdicts_are_told_by_set_and_their_absence_is_explained() -> None:
    assert "\n\nVerdict: none. No retain pair has a caption" in EVALUATION.table()
    sets = {"forget": "forgotten", "unseen": "remembered"}
    verdicts = {"model": "remembered", "original": "remembered"}
    judged = dataclasses.replace(EVALUATION, verdicts=verdicts, set_verdicts={"model": sets})
    said = "model remembered (forgotten by forget, remembered by unseen), original remembered."
    assert f"\n\nVerdict: {said}\n\n" in judged.table()


def test_report_is_markdown_or_json_by_its_name(tmp_path: Path) -> None:
    text = EVALUATION.report(tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Evaluation of fake\n\n## forget (1 pair, to forget)\n\n| metric |")
    assert "| image->text R@1, % | ↓ | 0.1 | 100.0 | 12.5 | -25.0 to 50.0 | 50.0 |" in text
    other = dataclasses.replace(EVALUATION, references={"a|b <i>": scores(1, 1, 1)})
    assert other.markdown().count(" | a\\|b \\<i> |\n| --- | --- | ---: | ---: |") == 2
    path = EVALUATION.report(tmp_path / "report.json")
    assert Evaluation.from_json(path) == EVALUATION
    assert json.loads(path.read_text())["scores"] == EVALUATION.to_dict()
    with pytest.raises(InputError, match=r"report\.pdf"):
        EVALUATION.report(tmp_path / "report.pdf")
    with pytest.raises(InputError, match="is a folder"):
        EVALUATION.report(tmp_path)
    with pytest.raises(InputError, match=r"report\.json is not a folder"):
        EVALUATION.report(tmp_path / "report.json" / "new" / "report.md")


def test_a_report_that_could_not_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"--output='.*report\.md'.*written to \(Permission"):
        check_report_path(tmp_path / "new" / "report.md", argument="--output")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"intervals": {"forget": 1}}', "{"])
def test_other_files_are_no_evaluation(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not an evaluation"):
        Evaluation.from_json(path)
    with pytest.raises(InputError, match="no file"):
        Evaluation.from_json(tmp_path / "missing.json")


def test_to_dict_is_a_copy() -> None:
    EVALUATION.to_dict()["forget"]["median_rank"] = -1
    assert EVALUATION.scores["forget"]["median_rank"] == 512


def test_a_notebook_shows_the_table() -> None:
    shown = EVALUATION._repr_html_()
    assert shown.count("<tr>") == 1 + 2 * (1 + 3)
    assert "image-&gt;text R@1, %" in shown
    assert '<th colspan="7" style="text-align: left">forget (1 pair, to forget)</th>' in shown
    assert shown.count("<table>") == shown.count("</table>") == 1
    assert "should fall to chance" in shown
