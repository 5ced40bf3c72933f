"""What a protocol is, and how its cases are erased, measured and tabulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.evaluation.metrics import format_value
from fasterase.report.evaluation import Evaluation
from fasterase.report.tables import Section, markdown_table

EVALUATION = "protocol.json"


class Reported(NamedTuple):
    """What the paper reports of one measure, in percent; None where it is not known."""

    original: float | None = None
    cliperase: float | None = None


class Measure(NamedTuple):
    """One row of a protocol's table."""

    title: str
    task: str  # name of a task of `fasterase.evaluate`
    figure: str  # key of its figure


ACCURACIES = tuple(
    Measure(f"{name} accuracy, %", "zero_shot", f"{name} test/accuracy@1")
    for name in ("forget", "retain")
)
RECALLS = tuple(
    Measure(f"{name}, {title} R@{k}, %", "retrieval", f"{name} test/{key}@{k}")
    for name in ("forget", "retain")
    for key, title in (("image_to_text", "image->text"), ("text_to_image", "text->image"))
    for k in (1, 5, 10)
)


@dataclass(frozen=True)
class Case:
    """One erasure of a protocol."""

    name: str  # of the case, also of its folder
    forget: Any  # pairs to train on, as the next
    retain: Any
    forget_sets: Mapping[str, Any]  # pairs to measure, as in `fasterase.evaluate`
    sets: Mapping[str, Any]
    class_names: Sequence[str] | None = None  # classes of the zero-shot accuracy, if any
    # title of a measure -> what the paper reports of this case
    reported: Mapping[str, Reported] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """A data set, what is erased from it, and what is measured."""

    # folder of the data and concept to erase (None: the protocol's own) -> its cases
    cases: Callable[[Path, str | None], Iterable[Case]]
    measures: Sequence[Measure]  # rows of the table
    data: str  # what to put into the folder of the data, and where it is from
    differences: str  # where the setting is not the paper's, or not known to be


def run_protocol(
    protocol: Protocol,
    model: str,
    data: Path,
    output: Path,
    *,
    config: UnlearnConfig,
    concept: str | None = None,
    only: Sequence[str] = (),
    max_pairs: int | None = 5000,
) -> str:
    """Erase and measure each case, in a folder of its own, and return the table.

    A case whose measurements are there is not run again, and an interrupted erasure resumes.
    `concept` is erased instead of the protocol's own choice; `only` names the cases to run, if any.
    """
    cases = list(protocol.cases(data, concept))
    unknown = [name for name in only if name not in {case.name for case in cases}]
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise InputError(f"--cases {unknown[0]}: no such case. Known: {known}.")
    found: list[tuple[Case, Evaluation]] = []
    for case in cases:
        if not only or case.name in only:
            folder = output / case.name.replace(" ", "-")
            found.append((case, _run_case(protocol, case, model, folder, config, max_pairs)))
    return format_table(protocol, found)


def _run_case(
    protocol: Protocol,
    case: Case,
    model: str,
    folder: Path,
    config: UnlearnConfig,
    max_pairs: int | None,
) -> Evaluation:
    done = folder / EVALUATION
    if done.is_file():
        return Evaluation.from_json(done)
    result = fasterase.unlearn(
        model,
        case.forget,
        case.retain,
        forget_sets=case.forget_sets,
        config=config.replace(output_dir=str(folder), evaluation=None),
    )
    evaluation = fasterase.evaluate(
        result.encoder,
        case.forget,
        case.retain,
        forget_sets=case.forget_sets,
        sets=case.sets,
        original=model,
        class_names=case.class_names,
        tasks=list(dict.fromkeys(measure.task for measure in protocol.measures)),
        max_pairs=max_pairs,
        device=config.device,
        num_workers=config.num_workers if isinstance(config.num_workers, int) else 0,
        progress=config.progress,
    )
    evaluation.to_json(done)
    return evaluation


def format_table(protocol: Protocol, found: Sequence[tuple[Case, Evaluation]]) -> str:
    """Return a Markdown table with a section per case: ours beside what the paper reports."""
    columns = ["measure", "wanted", "chance", "original", "erased", "95 % interval"]
    columns += ["paper: original", "paper: CLIPErase"]
    sections = []
    for case, evaluation in found:
        rows = []
        for measure in protocol.measures:
            figure = evaluation.tasks[measure.task].get(measure.figure)
            if figure is None:
                continue
            reported = case.reported.get(measure.title, Reported())
            values = map(figure.format, (figure.chance, figure.original, figure.value))
            paper = ("-" if each is None else f"{each:.2f}" for each in reported)
            rows.append([measure.title, figure.wanted, *values, figure.interval, *paper])
        residue = evaluation.residue
        left = "-" if residue is None else format_value("share", residue)
        title = f"{case.name}: {evaluation.verdict or 'no verdict'}, residue {left} %"
        sections.append(Section(title, rows))
    return f"{markdown_table(columns, sections)}\n\n{protocol.differences}\n"
