"""`Found`: the sets that `fasterase.find` made of a corpus, to look at, correct, keep and use.

The review page is one HTML file with pictures, captions and scores, which asks no server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fasterase.errors import InputError
from fasterase.files import check_writable, parse_path, replace_file, write_text
from fasterase.finder.decisions import Decision
from fasterase.pairs.images import to_rgb
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import read_decisions, write_split
from fasterase.pairs.table import PairTable
from fasterase.progress import Progress
from fasterase.report.pictures import as_picture, make_thumbnail, spread
from fasterase.report.templating import jpeg_uri, render

FACTS, ROWS, DECIDED = "found.json", "found.npz", "decisions.csv"
PAGE = "review.html"
# What a person decides -> the codes that already agree, and the one that others get.
_MEANT = {
    "forget": ((Decision.FORGET, Decision.UNSEEN), Decision.FORGET),
    "retain": ((Decision.RETAIN, Decision.NEIGHBOUR), Decision.RETAIN),
    "unsure": ((Decision.UNSURE,), Decision.UNSURE),
}
EXAMPLES = 6  # of each set in a notebook
# Pairs of each decision on a page. The file saved from it also holds the other ids, but of retain.
SHOWN = {"forget": 2000, "unsure": 2000, "retain": 300}
THUMBNAIL = 112  # pixels
CAPTION = 300  # characters
_TITLES = {
    "unsure": "Unsure: in neither set",
    "forget": "Forget",
    "retain": "Retain: the nearest pairs that are kept",
}


class Found:
    """A corpus in sets. Unpacks as `forget, retain`; all sets are views that `unlearn` takes.

    Attributes:
        source: the corpus.
        facts: what was looked for, by which model and with what limits, as JSON takes it.
        codes: [n] uint8, the `Decision` on each pair of the source.
        scores: [n] float32, how near each picture is to the concept; NaN if not judged.
        named: [n] bool, whether a caption names it.
    """

    def __init__(
        self,
        source: PairTable,
        codes: np.ndarray,
        scores: np.ndarray,
        named: np.ndarray,
        facts: Mapping[str, Any],
        corpus: Mapping[str, Any] | None = None,  # how `open_pairs` gets the source from a path
    ) -> None:
        self.source, self.codes, self.facts = source, codes, facts
        self.scores, self.named, self._corpus = scores, named, corpus

    @property
    def forget(self) -> PairTable:
        """Pairs to forget, to train on."""
        return self._view("forget", Decision.FORGET)

    @property
    def retain(self) -> PairTable:
        """Pairs to keep, `neighbours` among them."""
        return self._view("retain", Decision.RETAIN, Decision.NEIGHBOUR)

    @property
    def unseen(self) -> PairTable:
        """Pairs to forget that are kept from training, to judge by; no copy of them is trained."""
        return self._view("unseen", Decision.UNSEEN)

    @property
    def neighbours(self) -> PairTable:
        """The pairs of `retain` that are nearest to the concept."""
        return self._view("neighbours", Decision.NEIGHBOUR)

    @property
    def unsure(self) -> PairTable:
        """Pairs in neither set, the nearest picture first."""
        rows = np.flatnonzero(self.codes == Decision.UNSURE)
        order = np.argsort(-self.scores[rows], kind="stable")
        return self._marked(self.source.select(rows[order], name="unsure"))

    def __iter__(self) -> Iterator[PairTable]:
        return iter((self.forget, self.retain))

    def _view(self, name: str, *codes: Decision) -> PairTable:
        return self._marked(self.source.where(np.isin(self.codes, codes), name=name))

    def _marked(self, view: PairTable) -> PairTable:
        view.found = {**self.facts, "counts": self.counts}
        return view

    @property
    def counts(self) -> dict[str, int]:
        """How many pairs each set has, and why those in neither set are there."""
        count = np.bincount(self.codes, minlength=len(Decision)).tolist()
        unsure = self.codes == Decision.UNSURE
        return {
            "forget": count[Decision.FORGET],
            "unseen": count[Decision.UNSEEN],
            "retain": count[Decision.RETAIN] + count[Decision.NEIGHBOUR],
            "neighbours": count[Decision.NEIGHBOUR],
            "unsure": count[Decision.UNSURE],
            "unsure by caption alone": int((unsure & self.named).sum()),
            "not judged": count[Decision.UNJUDGED],
        }

    def __repr__(self) -> str:
        counts, total = self.counts, max(1, len(self.source))
        alone = counts["unsure by caption alone"]
        return "\n  ".join(
            [
                f"Found {', '.join(self.facts['concept'])}: {self.source!r}",
                f"forget: {counts['forget']:,}, and {counts['unseen']:,} unseen to judge by",
                f"retain: {counts['retain']:,}, {counts['neighbours']:,} of them neighbours",
                f"unsure: {counts['unsure']:,} ({counts['unsure'] / total:.1%}), "
                f"{alone:,} by caption alone, {counts['unsure'] - alone:,} by picture",
                f"not judged: {counts['not judged']:,}",
            ]
        )

    def _repr_html_(self) -> str:
        """Show the counts, and pictures of each set, in a notebook."""
        shown = [self.unsure, *self, self.unseen, self.neighbours]
        return render(
            "notebook.html",
            headline=f"Found {', '.join(self.facts['concept'])}",
            facts={name: f"{count:,}" for name, count in self.counts.items()},
            sections=[
                (part.name, example_pairs(part, spread(range(len(part)), EXAMPLES)))
                for part in shown
                if len(part)
            ],
        )

    def review(self, path: str | os.PathLike[str]) -> Path:
        """Write a page to look at pairs and correct decisions, and return its path.

        One HTML file that asks no server for anything: pictures, captions and both scores by
        decision; at most 2,000 pairs to forget and as many unsure ones, the doubtful ones first,
        and the 300 nearest of those to keep. Keys or clicks move a pair, and "save" downloads
        `decisions.csv` for `apply`, `fasterase.split` and `--forget_ids`.

        Raises:
            InputError: the file cannot be written.
        """
        judged = np.sort(self.scores[self.codes != Decision.UNJUDGED])
        rows: dict[str, list[PageRow]] = {}
        rest: dict[str, list[str]] = {}
        for name, (codes, _) in _MEANT.items():
            these = np.flatnonzero(np.isin(self.codes, codes))
            # Of those to forget, the farthest are the doubtful ones.
            sign = 1 if name == "forget" else -1
            these = these[np.argsort(sign * self.scores[these], kind="stable")]
            shown, hidden = these[: SHOWN[name]], these[SHOWN[name] :]
            place = 1 + len(judged) - np.searchsorted(judged, self.scores[shown], side="right")
            rows[name] = [
                PageRow(row, bool(self.named[row]), nearest)
                for row, nearest in zip(shown.tolist(), place.tolist(), strict=True)
            ]
            if name != "retain":
                rest[name] = [self.source.id(row) for row in hidden.tolist()]
        title = ", ".join(self.facts["concept"])
        file = parse_path(path, argument="path")
        return write_page(file, title, self.source, rows, rest, pictures=len(judged))

    def apply(self, path: str | os.PathLike[str]) -> Found:
        """Take over the decisions saved from a page, in place, and return itself.

        Pairs whose decision is the old one stay where they are; pairs that the file does not name
        do too.

        Raises:
            InputError: the file is no file of decisions, or has an id that no pair has.
        """
        file = parse_path(path, argument="path")
        decided = read_decisions(self.source, file, argument="path")
        if decided is None:
            raise InputError(
                f"path: {file} holds no decisions: the first line must be `id,decision`. Save it "
                "from the page that `review` writes."
            )
        for name, (agreeing, other) in _MEANT.items():
            self.codes[decided[name] & ~np.isin(self.codes, agreeing)] = other
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write all of it to a folder, which `load` and `fasterase unlearn --found` read.

        `forget`, `retain`, `unseen`, `neighbours` and `unsure` are tables (CSV, or JSONL where
        pairs have several captions) if images are files, else lists of ids (`.txt`). Beside them
        are `review.html`, `found.json` with what was looked for, limits, counts and digests, and
        `found.npz` with the decision on each pair.

        Raises:
            InputError: the folder cannot be written to.
        """
        target = parse_path(folder, argument="folder")
        check_writable(target, argument="folder")
        sets = {
            name: getattr(self, name)
            for name in ("forget", "retain", "unseen", "neighbours", "unsure")
        }
        write_split(folder=target, **sets)
        self.review(target / PAGE)
        with replace_file(target / ROWS) as temporary:
            np.savez(temporary, codes=self.codes, scores=self.scores, named=self.named)
        digests = {name: part.digest() for name, part in sets.items()}
        facts = {**self.facts, "counts": self.counts, "digests": digests}
        facts["corpus"] = {"opened": self._corpus, "digest": self.source.digest()}
        write_text(target / FACTS, json.dumps(facts, indent=1) + "\n")
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Found:
        """Read what `save` wrote; a `decisions.csv` in the folder is applied.

        Raises:
            InputError: the folder holds nothing that was saved, the corpus was no path or has
                changed since, or the decisions cannot be used.
        """
        target = parse_path(folder, argument="found")
        try:
            facts = json.loads((target / FACTS).read_text(encoding="utf-8"))
            corpus = facts.pop("corpus")
            with np.load(target / ROWS, allow_pickle=False) as file:
                codes, scores, named = (file[name] for name in ("codes", "scores", "named"))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"found: {target} is no folder that `fasterase find` wrote ({error!r}). Give its "
                "output_dir."
            ) from error
        if corpus["opened"] is None:
            raise InputError(
                f"found: the corpus of {target} was no path, so it cannot be opened again. Pass "
                "found.forget and found.retain to fasterase.unlearn."
            )
        source = open_pairs(name="source", **corpus["opened"])
        if source.digest() != corpus["digest"]:
            raise InputError(
                f"found: the pairs of {corpus['opened']['source']} are not those of {target}: they "
                "have changed since. Run `fasterase find` again."
            )
        found = cls(source, codes, scores, named, facts, corpus["opened"])
        return found.apply(target / DECIDED) if (target / DECIDED).is_file() else found


class PageRow(NamedTuple):
    """A pair on the page."""

    row: int  # of the source
    is_named: bool  # whether a caption names the concept
    place: int  # of the picture by nearness to the concept, from 1


def write_page(
    path: Path,
    concept: str,
    source: PairTable,
    rows: Mapping[str, Sequence[PageRow]],
    rest: Mapping[str, Sequence[str]],
    *,
    pictures: int,
) -> Path:
    """Write the page atomically, and return its path.

    Args:
        rows: decision -> pairs to show, in order.
        rest: decision -> ids of further pairs, which are saved but not shown.
        pictures: how many have a place.
    """
    every = [(name, row) for name in _TITLES for row in rows[name]]
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in _TITLES}
    for name, row in Progress("review page", items=every, unit="pair", delay=2):
        pairs[name].append(_shown_pair(source, row))
    script = render("review.js")
    text = render(
        "review.html",
        concept=concept,
        titles=_TITLES,
        pairs=pairs,
        pictures=pictures,
        more={name: len(rest.get(name, ())) for name in _TITLES},
        rest={name: list(filter(_is_text, ids)) for name, ids in rest.items()},
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return write_text(path, text)


def _shown_pair(source: PairTable, shown: PageRow) -> dict[str, Any]:
    id = source.id(shown.row)
    found = {"id": id, "is_text": _is_text(id), "caption": _caption(source, shown.row)}
    try:
        image = to_rgb(as_picture(source[shown.row].image), id=id)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        found["image"] = jpeg_uri(image)
    except BrokenPair as error:
        found |= {"image": None, "reason": error.reason}
    return {**found, **shown._asdict()}


def example_pairs(source: PairTable, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return those of the pairs that can be read, for `notebook.html`."""
    found = []
    for row in rows:
        with suppress(BrokenPair):
            image = jpeg_uri(make_thumbnail(as_picture(source[row].image)))
            texts = {"image": image, "caption": _caption(source, row), "before": (), "after": ()}
            found.append({**texts, "is_wrong": False})
    return found


def _caption(source: PairTable, row: int) -> str:
    captions = source.texts(row)
    text = " / ".join(captions) if not isinstance(captions, Tensor) else "token ids"
    return text[:CAPTION] + ("..." if len(text) > CAPTION else "")


def _is_text(id: str) -> bool:
    """Whether a file can hold the id: names of files may be no text."""
    return id.encode("utf-8", "replace").decode() == id
