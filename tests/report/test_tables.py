from __future__ import annotations

from fasterase.report.tables import Section, markdown_table, text_table

COLUMNS = ["metric", "a longer\nheader", "x"]
SECTIONS = [
    Section("first", [["recall", "1.0", "20.0"], ["rank of it", "-", "3"]]),
    Section("second", [["recall", "100.0", "7"]]),
]


def test_text_table_aligns_columns_and_stacks_headers() -> None:
    assert text_table(COLUMNS, SECTIONS, left=1).split("\n") == [
        "              a longer",
        "  metric        header     x",
        "----------------------------",
        "first",
        "  recall           1.0  20.0",
        "  rank of it         -     3",
        "----------------------------",
        "second",
        "  recall         100.0     7",
    ]


def test_markdown_table_has_a_heading_a_section_and_escapes_bars() -> None:
    sections = [*SECTIONS, Section("third", [["a|b", "1", "2"]])]
    text = markdown_table(["metric", "value", "x"], sections, left=1)
    assert text.startswith("## first\n\n| metric | value | x |\n| --- | ---: | ---: |\n| recall |")
    assert text.count("\n## ") == 2
    assert "| a\\|b | 1 | 2 |" in text
