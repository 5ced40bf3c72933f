"""The benchmark of what erasing costs outside both sets."""

from __future__ import annotations

import json

import pytest

from benchmarks import outside
from benchmarks.outside import OTHERS, SHARING, Cell, run, split_drawings, table
from fasterase.demo import emoji
from fasterase.demo.sets import open_teams
from fasterase.errors import InputError


def test_those_outside_are_in_neither_set_by_name_nor_by_drawing():
    source = open_teams(emoji.TRAIN_TEAMS)
    sets = split_drawings(Cell("guide dog", "150", 0), source)
    names = {name: set(those.names) for name, those in sets.items()}
    assert names["forget"] == {"guide dog"}
    assert len(sets["retain"]) == 150
    assert names[SHARING] == {"dog", "dog face", "service dog"} - names["retain"]
    assert not (names[OTHERS] & (names["retain"] | names["forget"] | names[SHARING]))
    assert len(sets[OTHERS]) > 1000
    assert all("dog" not in name.split() for name in names[OTHERS])
    whole = split_drawings(Cell("guide dog", "all", 0), source)
    assert set(whole) == {"forget", "retain"}, "nothing is outside"


def test_rows_that_were_made_are_read_and_summed_up(tmp_path):
    rows = [
        {f"{SHARING}, before": 1.0, f"{SHARING}, after": 0.5, "verdict": "undecided"},
        {f"{OTHERS}, before": 0.9, f"{OTHERS}, after": 0.91, "verdict": "forgotten"},
    ]
    cells = [Cell("octopus", "100", seed) for seed in range(2)]
    for cell, row in zip(cells, rows, strict=True):
        row["retain"] = cell.retain
        (tmp_path / cell.file_name).write_text(json.dumps(row))
    assert [run(cell, tmp_path) for cell in cells] == rows
    assert table(rows).splitlines()[2] == "| 100 | 2 | 1 | 50.0 | 50.0 | -1.0 | -1.0 |"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--concepts", "no such thing"], "the model was not trained on 'no such thing'"),
        (["--retain", "few"], "--retain few: give a number of pairs, or all"),
    ],
)
def test_wrong_input_is_named(flags, says):
    with pytest.raises(InputError, match=says):
        outside.main(flags)
