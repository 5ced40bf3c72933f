"""`Found`: the sets that `fasterase.find` made of a corpus, to look at, correct, keep and use."""

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
# Set -> the decisions on its pairs.
SETS = {
    "forget": (Decision.FORGET,),
    "unseen": (Decision.UNSEEN,),
    "retain": (Decision.RETAIN, Decision.NEIGHBOUR),
    "neighbours": (Decision.NEIGHBOUR,),
    "unsure": (Decision.UNSURE,),
}
EXAMPLES = 6  # of each set in a notebook
THUMBNAIL = 112  # pixels
CAPTION = 300  # characters


class Choice(NamedTuple):
    """What a person decides on a pair."""

    codes: tuple[Decision, ...]  # decisions that already agree; others become the first of them
    shown: int  # pairs on the page; the file saved from it also holds the other ids, but of retain
    title: str  # on the page


CHOICES = {
    "unsure": Choice((Decision.UNSURE,), 2000, "Unsure: in neither set"),
    "forget": Choice((Decision.FORGET, Decision.UNSEEN), 2000, "Forget"),
    "retain": Choice(SETS["retain"], 300, "Retain: the nearest pairs that are kept"),
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
        return self._view("forget")

    @property
    def retain(self) -> PairTable:
        """Pairs to keep, `neighbours` among them."""
        return self._view("retain")

    @property
    def unseen(self) -> PairTable:
        """Pairs to forget that are kept from training, to judge by; no copy of them is trained."""
        return self._view("unseen")

    @property
    def neighbours(self) -> PairTable:
        """The pairs of `retain` that are nearest to the concept."""
        return self._view("neighbours")

    @property
    def unsure(self) -> PairTable:
        """Pairs in neither set, the nearest picture first."""
        rows = np.flatnonzero(self.codes == Decision.UNSURE)
        order = np.argsort(-self.scores[rows], kind="stable")
        return self._marked(self.source.select(rows[order], name="unsure"))

    def __iter__(self) -> Iterator[PairTable]:
        return iter((self.forget, self.retain))

    def _view(self, name: str) -> PairTable:
        return self._marked(self.source.where(np.isin(self.codes, SETS[name]), name=name))

    def _marked(self, view: PairTable) -> PairTable:
        view.found = {**self.facts, "counts": self.counts}
        return view

    @property
    def counts(self) -> dict[str, int]:
        """How many pairs each set has, and why those in neither set are there."""
        count = np.bincount(self.codes, minlength=len(Decision)).tolist()
        return {
            **{name: sum(count[code] for code in codes) for name, codes in SETS.items()},
            "unsure by caption alone": int(self.named[self.codes == Decision.UNSURE].sum()),
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
        file = parse_path(path, argument="path")
        judged = np.sort(self.scores[self.codes != Decision.UNJUDGED])
        pairs: dict[str, list[dict[str, Any]]] = {}
        rest: dict[str, list[str]] = {}
        for name, choice in CHOICES.items():
            rows = np.flatnonzero(np.isin(self.codes, choice.codes))
            # Of those to forget, the farthest are the doubtful ones.
            sign = 1 if name == "forget" else -1
            rows = rows[np.argsort(sign * self.scores[rows], kind="stable")]
            shown = rows[: choice.shown]
            place = 1 + len(judged) - np.searchsorted(judged, self.scores[shown], side="right")
            items = list(zip(shown.tolist(), place.tolist(), strict=True))
            bar = Progress(f"review page ({name})", items=items, unit="pair", delay=2)
            pairs[name] = [self._shown_pair(row, nearest) for row, nearest in bar]
            hidden = () if name == "retain" else rows[choice.shown :].tolist()
            rest[name] = [self.source.id(row) for row in hidden]
        script = render("review.js")
        text = render(
            "review.html",
            concept=", ".join(self.facts["concept"]),
            titles={name: choice.title for name, choice in CHOICES.items()},
            pairs=pairs,
            pictures=len(judged),
            more={name: len(ids) for name, ids in rest.items()},
            rest={name: list(filter(_is_text, rest[name])) for name in ("forget", "unsure")},
            script=script,
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
        return write_text(file, text)

    def _shown_pair(self, row: int, place: int) -> dict[str, Any]:
        """Return what a page shows of a pair whose picture is the `place`-th nearest, from 1."""
        id = self.source.id(row)
        found = {
            "id": id,
            "is_text": _is_text(id),
            "caption": _caption(self.source, row),
            "is_named": bool(self.named[row]),
            "place": place,
        }
        try:
            image = to_rgb(as_picture(self.source[row].image), id=id)
        except BrokenPair as error:
            return {**found, "image": None, "reason": error.reason}
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return {**found, "image": jpeg_uri(image)}

    def apply(self, path: str | os.PathLike[str]) -> Found:
        """Take over the decisions saved from a page, in place, and return itself.

        Pairs that the file does not name, or that are where it wants them, stay.

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
        for name, choice in CHOICES.items():
            self.codes[decided[name] & ~np.isin(self.codes, choice.codes)] = choice.codes[0]
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
        sets = {name: getattr(self, name) for name in SETS}
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
