"""The record of an erasure that is kept with the request: what was asked, done, found, not claimed.

It says in one place, and in words, what the other parts of a report show in tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fasterase.evaluation.findings import Finding
from fasterase.evaluation.verdict import WITHHELD
from fasterase.facts import LISTED, Judged, Kept, RunFacts
from fasterase.numerals import counted
from fasterase.report.templating import percent

NOT_STATED = "not stated"


class Entry(NamedTuple):
    """One heading of the record, and its sentences."""

    title: str
    lines: list[str]


def state(run: RunFacts) -> list[Entry]:
    """Return the record of a run, in the order in which it is read."""
    entries = {
        "Request": [run.record["request"] or NOT_STATED],
        "What was to be forgotten": [run.record["concept"] or f"{NOT_STATED}, but for the pairs"],
        "Scope": list(_scope(run)),
        "What was done": list(_deeds(run)),
        "Verdict": [_tell_judged(each) for each in run.judged] or ["Not judged."],
        "By wording": list(_wordings(run)),
        "Damage": list(_damage(run)),
        "Attacks": list(_attacks(run)),
        "To repeat it": list(_commands(run)),
        "What is not claimed": list(run.limits),
    }
    return [Entry(title, lines) for title, lines in entries.items() if lines]


def _scope(run: RunFacts) -> Iterator[str]:
    """Tell the sets, what each was for, and by which digest it is known again."""
    to_forget = {"forget", *run.traces}
    if run.evaluation is not None:
        to_forget |= set(run.evaluation.forget_sets)
    drawn = {"forget", "retain", *run.record.get("concepts", ())}
    if run.record["outcome"].get("withheld_until") is not None:
        drawn.add(WITHHELD)
    for name, each in run.record["data"].items():
        use = "training draws from it" if name in drawn else "measured only"
        aim = "to forget" if name in to_forget else "to keep"
        yield f"{name}: {counted(each['pairs'], 'pair')}, {aim}, {use}; digest {each['digest']}"


def _deeds(run: RunFacts) -> Iterator[str]:
    record, settings = run.record, run.settings
    parent, outcome = record["parent"], record["outcome"]
    yield (
        f"{record['erased_at']}: fasterase {record['libraries']['fasterase']} took "
        f"{counted(outcome['steps'], 'step')} from {parent['name']} (weights "
        f"{parent['fingerprint']}) to weights {record['fingerprint']}."
    )
    yield f"Trained: tune={settings['tune']!r}."
    if (until := outcome.get("withheld_until")) is not None:
        yield f"The pairs withheld for judging alone were not forgotten: drawn after step {until}."
    words = [each["word"] for each in record["words"]]
    yield (
        f"{counted(len(words), 'word lost its meaning', 'words lost their meaning')}: "
        f"{', '.join(words)}."
        if words
        else "No word lost its meaning."
    )


def _tell_judged(each: Judged) -> str:
    """Tell the verdict on a set and the figures behind it."""
    before = "" if each.before is None else f" (before: {percent(each.before)})"
    towers = "".join(
        f"; its {name} tower with the original's other one: {percent(hit)}"
        for name, hit in each.towers.items()
    )
    return (
        f"{each.name}: {each.verdict or 'no verdict'}. Still named{before}: {percent(each.hit)} of "
        f"{counted(each.pairs, 'picture')}, 95 % interval {percent(each.low)} to "
        f"{percent(each.high)}, by chance {percent(each.chance)}; residue "
        f"{each.residues[0]:.2f} image->text, {each.residues[1]:.2f} text->image (1 known, 0.5 no "
        f"trace){towers}."
    )


def _wordings(run: RunFacts) -> Iterator[str]:
    if run.evaluation is None or not run.judged:
        return
    found = run.evaluation.remaining
    for each in found[:LISTED]:
        yield f"still finds its pictures: {each.describe()}"
    if len(found) > LISTED:
        yield f"and {len(found) - LISTED:,} more"
    if not found:
        yield "No first caption of the pictures that were judged still finds one of them."


def _damage(run: RunFacts) -> Iterator[str]:
    for each in run.kept:
        yield _tell_kept(each)
    if run.outside:
        yield run.outside
    if run.evaluation is not None and run.evaluation.original is not None:
        names = counted(len(run.evaluation.hurt), "name", "names")
        kinds = (
            "captions, classes and everyday words"
            if run.evaluation.outside
            else "captions and classes"
        )
        yield f"{names} of {kinds} lost something."
    elif not run.kept:
        yield "Not measured."


def _tell_kept(each: Kept) -> str:
    before = "" if each.before is None else f"{percent(each.before)} before, "
    return (
        f"{each.name}: own caption first for {before}{percent(each.after)} after (95 % interval "
        f"{percent(each.low)} to {percent(each.high)}) of {counted(each.pairs, 'picture')}."
    )


def _attacks(run: RunFacts) -> Iterator[str]:
    """Tell what each attack was and what it brought back, at every strength that was tried."""
    attacks = {} if run.evaluation is None else run.evaluation.attacks
    for name, findings in attacks.items():
        for finding in findings.values():
            yield f"{name}: {_tell_finding(finding)}"
    if not attacks:
        yield "None was tried."


def _tell_finding(finding: Finding) -> str:
    def tell(value: float | str | None) -> str:
        if finding.unit == "share" and isinstance(value, float):
            return percent(value)
        return finding.format(value)

    title = f"{finding.group}, {finding.title.removesuffix(', %')}"
    interval = "" if finding.low is None else f" ({tell(finding.low)} to {tell(finding.high)})"
    before = "" if finding.original is None else f"; original {tell(finding.original)}"
    return f"{title}: {tell(finding.value)}{interval}{before}"


def _commands(run: RunFacts) -> Iterator[str]:
    yield (
        "fasterase unlearn --config RUN/config.yaml --output_dir AGAIN, where RUN is the run's "
        "folder, from the folder that it was started in. The first lines of the file name what is "
        "to be given anew, if anything."
        if run.has_folder
        else "With the settings below, the pairs of these digests and the same versions."
    )
