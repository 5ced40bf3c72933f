from __future__ import annotations

from fasterase.report.tables import Section, markdown_table, text_table

COLUMNS = ["metric", "as", "a longer\nheader", "x"]
SECTIONS = [
    Section("first", [["recall", "a", "1.0", "20.0"], ["rank of it", "b", "-", "3"]]),
    Section("second", [["recall|", "a", "100.0", "7"]]),
]


def test_text_table_aligns_columns_and_stacks_headers() -> None:
    assert text_table(COLUMNS, SECTIONS).split("\n") == [
        "                  a longer",
        "  metric      as    header     x",
        "--------------------------------",
        "first",
        "  recall      a        1.0  20.0",
        "  rank of it  b          -     3",
        "--------------------------------",
        "second",
        "  recall|     a      100.0     7",
    ]


def test_markdown_table_has_a_heading_a_section_and_escapes_bars() -> None:
    text = markdown_table(["metric", "as", "value", "x"], SECTIONS)
    assert text.startswith("## first\n\n| metric | as | value | x |\n| --- | --- | ---: | ---: |")
    assert text.count("## ") == 2
    assert "| recall\\| | a | 100.0 | 7 |" in text
