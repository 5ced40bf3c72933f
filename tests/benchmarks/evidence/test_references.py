"""Erased models beside retrained ones: which references are found, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence import references
from benchmarks.evidence.references import ATTACKED, ERASED, ORIGINAL, RETRAINED, VERDICT
from fasterase.demo import emoji
from fasterase.errors import InputError
from fasterase.evaluation.evaluator import Scores
from fasterase.evaluation.findings import Finding
from fasterase.report.evaluation import Evaluation


def scores(known: float, kept: float) -> Scores:
    trace = {references.HIT: known, "image_to_text_residue": known}
    trace["text_to_image_residue"] = known + 0.2
    return {
        **dict.fromkeys(references.FORGET_SETS, trace),
        **{name: {references.RECALL: kept} for name in references.KEEP_SETS},
    }


def evaluation(erased: float, retrained: float) -> Evaluation:
    attacks: dict[str, dict[str, Finding]] = {}
    others = {"original": 0.9, "references": {RETRAINED: retrained}}
    others["other_intervals"] = {ORIGINAL: [0.8, 1.0], RETRAINED: [0.1, 0.9]}
    for each in ATTACKED:
        value = erased, erased - 0.1, erased + 0.1
        figure = Finding(each.key, "", "", "share", "↓", *value, **others)
        attacks.setdefault(each.attack, {})[each.key] = figure
    verdicts = {"model": "over-erased", ORIGINAL: "remembered", RETRAINED: "forgotten"}
    return Evaluation(
        scores(erased, 0.94),
        *({}, {}, {}, {}),
        verdicts=verdicts,
        set_verdicts={k: dict.fromkeys(references.FORGET_SETS, v) for k, v in verdicts.items()},
        original=scores(0.8, 0.97),
        references={RETRAINED: scores(retrained, 0.96)},
        attacks=attacks,
    )


def test_references_are_the_packaged_model_and_finished_ones(tmp_path: Path) -> None:
    packaged = {"food-fruit": emoji.RETRAINED_MODEL}
    assert references.find_references(None) == packaged
    for concept in ("animal-bird", "drink"):
        (tmp_path / f"without-{concept}").mkdir()
    with pytest.raises(InputError, match=r"--references: no folder .*without-CONCEPT"):
        references.find_references(tmp_path)
    (tmp_path / "without-drink" / "training.json").write_text("{}")
    assert references.find_references(tmp_path) == {**packaged, "drink": tmp_path / "without-drink"}


def test_every_model_has_every_figure() -> None:
    rows = list(references.rows_of("drink", evaluation(erased=0.3, retrained=0.5)))
    values = {(row["model"], row["figure"]): row["value"] for row in rows}
    assert len(values) == len(rows) == 3 * (2 * 3 + 3 + len(ATTACKED))
    assert values[ERASED, "unseen hit@1"] == 0.3
    assert values[RETRAINED, "residue"] == pytest.approx(0.6)
    assert values[ORIGINAL, "retain change"] == 0
    assert values[RETRAINED, "holdout change"] == pytest.approx(-0.01)
    assert values[ERASED, "neighbour change"] == pytest.approx(-0.03)
    assert [values[model, ATTACKED[-1].title] for model in references.MODELS] == [0.9, 0.5, 0.3]
    intervals = [(row["low"], row["high"]) for row in rows if row["figure"] == ATTACKED[-1].title]
    assert intervals == [(0.8, 1.0), (0.1, 0.9), pytest.approx((0.2, 0.4))]
    assert values[RETRAINED, VERDICT] == "forgotten"
    assert values[ERASED, f"unseen {VERDICT}"] == "over-erased"


def test_means_and_distances_are_over_seeds_and_concepts() -> None:
    one = list(references.rows_of("drink", evaluation(erased=0.3, retrained=0.5)))
    assert "mean" not in references.table(one)
    both = [*one, *references.rows_of("sport", evaluation(erased=0.4, retrained=0.5))]
    lines = [line.strip("| ").split(" | ") for line in references.table(both).splitlines()]
    place = lines[0].index("membership AUC")
    cells = {(line[0], line[1]): line for line in lines[2:]}
    assert len(cells) == 3 * 3
    assert [cells["mean", model][place] for model in references.MODELS] == ["90.0", "50.0", "35.0"]
    assert cells["mean", ERASED][lines[0].index("retain change")] == "-3.0"
    assert cells["mean", RETRAINED][lines[0].index(VERDICT)] == "forgotten 2"
    (line,) = (
        line for line in references.distances(both).splitlines() if line.startswith("membership")
    )
    assert line.split(maxsplit=2)[2] == "-15.0 (-20.0, -10.0)"
    again = [*both, *references.rows_of("drink", evaluation(erased=0.1, retrained=0.5))]
    assert "| drink | erased | 20.0 |" in references.table(again)
    assert "-20.0 (-30.0, -10.0)" in references.distances(again)
