"""The compared ways to forget: what they do to features, and how settings are chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from shutil import copyfile

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.command import TEST, VALIDATION
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import closed_form, trained
from benchmarks.evidence.__main__ import final_setting, finalists, read_settings, settings_table
from benchmarks.evidence.cells import (
    METHODS,
    ORIGINAL,
    RETRAINED,
    as_text,
    flatten,
    place_of,
    read_models,
)
from benchmarks.evidence.table import (
    ATTACKED,
    _spread,
    as_table,
    beside_retrained,
    choose,
    damage,
    summarise,
)
from benchmarks.result_files import RESULTS, read_csv, write_csv
from fasterase.errors import InputError


def test_folded_maps_act_on_features(task):
    before = closed_form.encode_images(task.model, task.sets.forget)
    text = closed_form.encode_captions(task.model, task.sets.retain)
    image_map, text_map = torch.randn(2, before.shape[1], before.shape[1], dtype=torch.float64)
    closed_form.fold(task.model, image_map, text_map)
    after = closed_form.encode_images(task.model, task.sets.forget)
    torch.testing.assert_close(after, normalize(before @ image_map), rtol=0, atol=1e-5)
    after = closed_form.encode_captions(task.model, task.sets.retain)
    torch.testing.assert_close(after, normalize(text @ text_map), rtol=0, atol=1e-5)


def test_projected_out_directions_are_gone_from_both_towers(task):
    text = closed_form.encode_captions(task.model, task.sets.forget)
    strongest = torch.linalg.svd(text, full_matrices=False).Vh[:2]
    closed_form.project_texts_out(task, {"rank": 2, "centred": False})
    for encode in (closed_form.encode_images, closed_form.encode_captions):
        assert (encode(task.model, task.sets.forget) @ strongest.T).abs().max() < 1e-5


def test_leace_leaves_no_difference_of_means(task):
    """What linear classifiers cannot find has the same mean as the rest; scale is not kept."""
    module = task.model.module
    weight = module.visual.proj.detach().double().clone()
    features = closed_form.encode_images(task.model, task.sets.forget)
    others = closed_form.encode_images(task.model, task.sets.retain)
    closed_form.erase_linearly(task, {"labels": "set"})
    image_map = torch.linalg.lstsq(weight, module.visual.proj.detach().double()).solution
    gap = (features.mean(0) - others.mean(0)).norm()
    assert ((features - others.mean(0)) @ image_map).mean(0).norm() < 0.02 * gap


def test_noise_is_far_from_the_forgotten_names(task, monkeypatch):
    monkeypatch.setattr(trained, "NOISE_PER_CONCEPT", 1)
    noise = trained.find_noise(task)
    pictures = torch.stack([each["image"] for each in noise])
    with torch.no_grad():
        text = task.model.encode_text(task.model.tokenize([each["text"] for each in noise]))
        found = (task.model.encode_image(pictures) * text).sum(1).mean()
        start = (task.model.encode_image(torch.randn(pictures.shape)) * text).sum(1).mean()
    assert found < start - 0.3


def measured(method: str, setting: dict, *, hit: float, recall: float, place: str = "x"):
    scores = {name: {"concept_hit@1": hit} for name in ("forget", "forget-unseen")}
    scores |= {n: {"image_to_text_recall@1": recall} for n in ("retain", "neighbour", "holdout")}
    chance = {name: {"concept_hit@1": 0.02} for name in ("forget", "forget-unseen")}
    found = {"method": method, "setting": as_text(setting), "subgroup": place, "seed": 0}
    found |= {"scores": scores, "chance": chance, "attacks": {}, "seconds": 0.0}
    found["verdicts"] = dict.fromkeys(chance, "forgotten")
    return flatten({**found, "residues": dict.fromkeys(chance, 0.5)})


def test_the_setting_of_least_damage_on_average_is_chosen():
    by_set, by_concept = {"labels": "set"}, {"labels": "concepts"}
    found = [
        measured(ORIGINAL, {}, hit=1.0, recall=0.9),
        measured(ORIGINAL, {}, hit=1.0, recall=0.8, place="y"),
        # 3 x 0.1 and 3 x 0.3 lost; nothing lost, but 2 x 0.48 left of x, all forgotten of y.
        measured("LEACE", by_set, hit=0.0, recall=0.8),
        measured("LEACE", by_set, hit=0.0, recall=0.5, place="y"),
        measured("LEACE", by_concept, hit=0.5, recall=0.9),
        measured("LEACE", by_concept, hit=0.02, recall=0.8, place="y"),
    ]
    assert choose(found)["LEACE"] == (as_text(by_concept), pytest.approx(0.48))
    (before, row) = summarise(found[:4])
    assert before["retain change"] == 0
    assert row["holdout change"] == pytest.approx(-0.2)
    assert "-20.0 (-30 to -10)" in as_table([row])


def test_a_method_stands_beside_models_that_never_saw_the_concept():
    found = [
        measured(method, {}, hit=hit, recall=recall, place=place)
        for place in ("x", "y")
        for method, hit, recall in ((ORIGINAL, 1.0, 0.9), ("fasterase", 0.1, 0.7), ("a", 0.5, 0.5))
    ]
    assert beside_retrained(found, "fasterase") == ""
    found.append(measured(RETRAINED, {}, hit=0.2, recall=0.8, place="y"))
    lines = beside_retrained(found, "fasterase").splitlines()
    # No line of x, nor of other methods; no figure of attacks, of which there are none.
    names = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[2:]]
    models = (ORIGINAL, "fasterase", RETRAINED)
    assert names == [(place, model) for place in ("y", "mean") for model in models]
    assert lines[3] == "| y | fasterase | 10.0 | 50.0 | 10.0 | 50.0 | -20.0 | -20.0 | -20.0 |"


def test_what_is_below_chance_or_above_the_original_earns_nothing():
    original = measured(ORIGINAL, {}, hit=1.0, recall=0.8)
    assert damage(measured("a", {}, hit=0.0, recall=0.9), original) == 0
    assert damage(measured("a", {}, hit=0.12, recall=0.7), original) == pytest.approx(0.2 + 0.3)


def test_methods_are_tuned_on_other_concepts_than_those_reported():
    assert not set(VALIDATION) & set(TEST)
    assert len(set(TEST)) >= 8


def test_variants_of_the_default_differ_from_it_as_they_say(task, monkeypatch):
    configs = []
    monkeypatch.setattr(trained, "train", lambda task, config, **_: configs.append(config) or 1)
    for setting in ({}, *trained.VARIED.values()):
        trained.erase_by_default(replace(task, measure=lambda steps: None), setting)
    plain, *varied = map(asdict, configs)
    changed = [{k: v for k, v in each.items() if v != plain[k]} for each in varied]
    assert changed == [*trained.VARIED.values()]


def test_a_chosen_number_of_steps_is_the_only_one_measured():
    chosen = {"CLIPErase": (as_text({"lr": 1e-4, "steps": 30}), 0.1)}
    assert final_setting(chosen, "CLIPErase") == as_text({"lr": 1e-4, "steps": [30]})
    assert final_setting(chosen, "fasterase") == "{}"


def test_finalists_are_the_best_and_those_that_nothing_was_chosen_for():
    chosen = {"CLIPErase": ("{}", 0.1), "LEACE": ("{}", 0.9), "retain only": ("{}", 0.5)}
    methods = [METHODS[title] for title in (*chosen, "fasterase")]
    assert finalists(methods, chosen, 2) == ["CLIPErase", "retain only", "fasterase"]
    assert finalists(methods, chosen, 0) == ["fasterase"]


def test_what_was_chosen_is_taken_again(tmp_path):
    chosen = {"CLIPErase": (as_text({"lr": 1e-4, "steps": 30}), 0.25)}
    file = tmp_path / "evidence_settings.csv"
    write_csv(file, settings_table(chosen, "food-asian"))
    untuned = METHODS["fasterase"]
    assert read_settings(file, [METHODS["CLIPErase"], untuned]) == (chosen, "food-asian")
    with pytest.raises(InputError, match="none of LEACE"):
        read_settings(file, [METHODS["CLIPErase"], METHODS["LEACE"]])


def test_the_committed_table_has_the_committed_settings():
    shown = {row["method"]: row["setting"] for row in read_csv(RESULTS / "evidence.csv")}
    methods = [METHODS[title] for title in shown if title in METHODS]
    chosen, _ = read_settings(RESULTS / "evidence_settings.csv", methods)
    assert {title: shown[title] for title in chosen} == {t: s for t, (s, _) in chosen.items()}


def test_figures_of_attacks_are_named_as_the_attacks_name_them():
    known = {(row["attack"], row["figure"]) for row in read_csv(RESULTS / "attacks.csv")}
    assert {(attack, figure) for attack, figure, _ in ATTACKED} <= known


def test_the_committed_table_is_that_of_the_committed_models(tmp_path):
    """So methods that are not run again can be taken from there."""
    models = RESULTS / "evidence_models.csv"
    found = read_models(models)
    rows = {row["method"]: row for row in summarise(found)}
    committed = read_csv(RESULTS / "evidence.csv")
    assert {row["method"] for row in committed} == rows.keys()
    for row in committed:
        again = rows[row["method"]]
        for column in (each for each in row if each.endswith((" low", " high", " change"))):
            if row[column]:
                assert again[column] == pytest.approx(float(row[column]), abs=1e-6)
        assert again["forget verdicts"] == row["forget verdicts"]
    text = (RESULTS / "evidence.md").read_text(encoding="utf-8")
    assert text.endswith(f"\n\n{beside_retrained(found, 'fasterase')}")
    write_csv(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_text() == models.read_text()


def test_seeds_of_one_concept_make_no_interval_narrower():
    few, many = ([*range(8)], [place for place in range(8) for _ in range(3)])
    one, three = (_spread("x", those, np.array(those)) for those in (few, many))
    assert (one["x low"], one["x high"]) == (three["x low"], three["x high"])
    assert one["x low"] < 2.5 < 4.5 < one["x high"]


def test_merging_runs_the_named_methods_alone(tmp_path, monkeypatch):
    for name in ("evidence_models.csv", "evidence_settings.csv"):
        copyfile(RESULTS / name, tmp_path / name)
    ran = []

    def run(cells, work, processes):
        ran.extend(cells)
        places = {(cell.method, cell.subgroup, cell.seed) for cell in cells}
        again = {"forget residue": 0.25, "forget-unseen residue": 0.25}
        rows = read_models(RESULTS / "evidence_models.csv")
        return [row | again for row in rows if place_of(row) in places]

    monkeypatch.setattr(evidence.cells, "run_cells", run)
    settings = ["--settings", str(RESULTS / "evidence_settings.csv")]
    evidence.main(
        ["--methods", "fasterase", "LEACE", "--merge", "--output", str(tmp_path), *settings]
    )
    assert {each.method for each in ran} == {"fasterase", "LEACE"}
    assert len([each for each in ran if each.method == "LEACE"]) == 8, "no finalist"
    before, after = (read_csv(folder / "evidence.csv") for folder in (RESULTS, tmp_path))
    assert [row["method"] for row in before] == [row["method"] for row in after]
    for old, new in zip(before, after, strict=True):
        again = new["method"] in ("fasterase", "LEACE")
        assert new["forget residue"] == ("0.25" if again else old["forget residue"])
        assert new["forget verdicts"] == old["forget verdicts"]
    kept, merged = (read_csv(folder / "evidence_settings.csv") for folder in (RESULTS, tmp_path))
    assert {row["method"]: row for row in merged} == {row["method"]: row for row in kept}
