"""SALMUBench from Parquet shards and json files of the published form to its table."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.nn.functional import normalize

from benchmarks.protocols.__main__ import main
from benchmarks.protocols.salmubench import (
    open_scores,
    read_benchmark,
    reciprocal_ranks,
    run_salmubench,
    told_apart,
)
from benchmarks.protocols.utility import TOP_1
from fasterase.encode import PairFeatures
from fasterase.errors import FaseraseError, InputError
from fasterase.files import write_text
from fasterase.models.load import load_model
from fasterase.pairs.table import PairTable
from tests import small_models

pytestmark = pytest.mark.filterwarnings("ignore:verdict", "ignore:retain. .* captions seem to name")
FIELDS = ("city", "phone_number", "emails")


def write_benchmark(root: Path) -> Path:
    """Write six personas: of two everything is forgotten, of two a fact is kept, two are kept."""
    personas = {
        f"{i:04d}": {
            "name": f"Ada {chr(65 + i)}",
            "city": f"Town {i}",
            "phone_number": f"+{i}{i}",
            "emails": [f"a{i}@x.org", f"b{i}@x.org"],
        }
        for i in range(6)
    }
    rows: dict[str, list[dict[str, object]]] = {}
    fields: dict[str, dict[str, str]] = {}

    def add(split: str, who: str | None, text: str, field: str | None = None) -> None:
        number = sum(map(len, rows.values()))
        file, content = f"{who}_{number}.jpg", io.BytesIO()
        Image.new("RGB", (40, 40), (40 * int(who or 6), number * 5 % 256, 9)).save(content, "JPEG")
        image = {"bytes": content.getvalue(), "path": file}
        row = {"image": image, "text": text, "identity_id": who, "file_name": file}
        rows.setdefault(split, []).append(row)
        if field:
            fields[file] = {"data_field": field, "caption": text}

    for i, (who, persona) in enumerate(personas.items()):
        for field in FIELDS:
            kept = "holdout_identity" if i >= 4 else "holdout_association"
            split = kept if i >= 4 or (i >= 2 and field == "city") else "forget"
            value = persona["emails"][1] if field == "emails" else persona[field]
            for wording in ("{} has {}", "of {}: {}"):
                add(split, who, wording.format(persona["name"], value), field)
    for number in range(8):
        add("retain_synth", "0000" if number < 3 else None, f"a portrait, number {number}")
    (root / "data").mkdir()
    for split, those in rows.items():
        for shard, part in enumerate((those[:3], those[3:])):
            path = root / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            parquet.write_table(pa.Table.from_pylist(part), path)
    content = {"identities_metadata": personas, "sensitive_set_captions_metadata": fields}
    content["fragile_set_ids"] = [row["file_name"] for row in rows["retain_synth"][2:5]]
    for name, each in content.items():
        (root / f"{name}.json").write_text(json.dumps(each), encoding="utf-8")
    return root


@pytest.mark.slow
def test_every_method_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = write_benchmark(tmp_path), tmp_path / "runs"
    flags = ["salmubench", "--data", str(data), "--output", str(output)]
    for seed, name in enumerate(("model", "clean")):
        tokenizer = small_models.simple_tokenizer()
        load_model(small_models.open_clip_vit(seed=seed), tokenizer=tokenizer).save(tmp_path / name)
        flags += [f"--{name}", str(tmp_path / name)]
    settings = "lr: 1e-3, max_steps: 2, progress: false, device: cpu, batch_size: 8"
    (tmp_path / "erase.yaml").write_text(f"{{{settings}}}\n", encoding="utf-8")
    flags += ["--config", str(tmp_path / "erase.yaml")]
    main(flags)
    table = (output / "table.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:4]] == ["| compromised", "| clean", "| erase.yaml"]
    assert len({row[2] for row in rows[1:4]}) == 3
    assert {row[6] for row in rows[1:4]} == {"-"}, "GenKnow needs ImageNet"
    assert rows[4][:2] == ["| reported: compromised", "0.236"]
    found = json.loads((output / "clean" / "salmubench.json").read_text(encoding="utf-8"))
    encoder, expected = load_model(str(tmp_path / "clean")), []
    for record in read_benchmark(data)[0]["forget"]:
        with torch.no_grad():
            image = encoder.encode_image(encoder.preprocess(record.image)[None])
            text = encoder.encode_text(encoder.tokenize([record.text]))
        expected.append(float(torch.cosine_similarity(image, text)))
    assert found["AssocStr"]["scores"] == pytest.approx(expected, abs=1e-5)
    # What is there is not run again, except for what is missing.
    monkeypatch.setattr("fasterase.unlearn", None)
    imagenet = {TOP_1: np.array([1.0, 0.0])}
    name = "benchmarks.protocols.salmubench.open_imagenet"
    monkeypatch.setattr(name, lambda folder, max_pairs: lambda encoder: imagenet)
    main([*flags, "--imagenet", "imagenet"])
    with_imagenet = (output / "table.md").read_text(encoding="utf-8")
    assert with_imagenet == table.replace(" - |", " 0.500 |", 3)
    monkeypatch.setattr("benchmarks.protocols.salmubench.score_model", None)
    main(flags)
    assert (output / "table.md").read_text(encoding="utf-8") == with_imagenet


def test_missing_data_is_described(tmp_path: Path) -> None:
    flags = ["salmubench", "--output", str(tmp_path / "runs"), "--data", str(tmp_path)]
    with pytest.raises(FaseraseError, match=r"Put there the evaluation set .* research only"):
        main(flags)
    write_benchmark(tmp_path)
    for shard in (tmp_path / "data").glob("holdout_identity-*"):
        shard.unlink()
    with pytest.raises(FaseraseError, match=r"\(data/holdout_identity-\*.parquet is missing\)"):
        main(flags)
    (tmp_path / "fragile_set_ids.json").write_text("3")
    with pytest.raises(FaseraseError, match="not in the published form"):
        main(flags)
    assert not (tmp_path / "runs").exists()


class Memory:
    """In the place of a `PairEncoder`, a model that knows what `sees` says of each picture."""

    def __init__(self, sees: Callable[[str, str], str]) -> None:
        self.sees = sees  # persona's name and caption -> text

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return normalize(torch.stack([torch.randn(64, generator=each) for each in rows]), dim=1)

    def pairs(self, source: PairTable, rows: np.ndarray, *, description: str) -> PairFeatures:
        captions = [str(source.texts(row)[0]) for row in rows]
        names = [f"Ada {chr(65 + int(source.meta(row).get('identity_id', 9)))}" for row in rows]
        seen = map(self.sees, names, captions)
        return features(self.texts(list(seen)), self.texts(captions), rows)


def test_measures_tell_what_a_model_knows(tmp_path: Path) -> None:
    score = open_scores(*read_benchmark(write_benchmark(tmp_path)), None)

    def measure(sees: Callable[[str, str], str]) -> dict[str, float]:
        found = score(Memory(sees))  # type: ignore[arg-type]
        counts = {name: int((~np.isnan(each)).sum()) for name, each in found.items()}
        # Of 20 pairs to forget, 12 are of personas of whom nothing is kept.
        # ACS is of half of the pairs, and of as many with another's caption, less their own.
        acs = counts.pop("ACS")
        assert 10 < acs <= 20
        assert list(counts.values()) == [20, 20, 12, 20, 12, 4, 3, 2]
        return {name: float(np.nanmean(each)) for name, each in found.items()}

    link = measure(lambda name, caption: caption)
    assert link["RetFail"] == pytest.approx(1)
    for name in ("AssocStr", "InterIdSim", "IntraIdSim", "VisIdInt", "FragSim"):
        assert link[name] == pytest.approx(1)
    assert link["CoreAssoc"] < 0.5
    person = measure(lambda name, caption: f"a photo of {name}")
    assert person["IdZSC"] == 1
    assert person["AssocStr"] < 0.5
    assert person["RetFail"] < 0.5
    fact = measure(lambda name, caption: f"{re.split(' has |: ', caption)[-1]} {name}")
    assert fact["CoreAssoc"] == pytest.approx(1)
    assert fact["IdZSC"] < 1


def features(
    image: torch.Tensor, text: torch.Tensor, rows: np.ndarray | None = None
) -> PairFeatures:
    rows = np.arange(len(image)) if rows is None else rows
    own = [[i] for i in range(len(image))]
    unit = normalize(image, dim=1), normalize(text, dim=1)
    return PairFeatures(rows, *unit, list(map(str, rows)), own, [])


def test_a_rank_counts_other_captions_only() -> None:
    pairs = features(torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 0, 0]]))
    gallery = normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]]), dim=1)
    captions = np.array(["ada", "bob", "cyd"], dtype=object)
    found = reciprocal_ranks(pairs, captions, ["ada", "dan", "bob"], gallery)
    # Of the third, "bob" is nearer, and the other two are as far as its own.
    assert found.tolist() == [1, 1 / 2, 1 / 2]


def test_a_probe_tells_learned_links_apart() -> None:
    image = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    assert told_apart(features(image, image)).mean() > 0.95
    assert 0.4 < told_apart(features(image, other)).mean() < 0.6
    assert len(told_apart(features(image, other))) == 400


def test_figures_of_other_pairs_are_not_mixed(tmp_path: Path) -> None:
    data, output = write_benchmark(tmp_path), tmp_path / "out"
    write_text(output / "settings.json", '{"model": "m", "clean": "c", "max_pairs": 100}')
    with pytest.raises(InputError, match=r"--output=.*'max_pairs': 100.*Choose another --output"):
        run_salmubench(data, output, model="m", clean="c", configs={})
