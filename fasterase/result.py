"""`UnlearnResult`: the erased model, the record of the run, and its reports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.card import CARD, model_card, push_model, read_base
from fasterase.config import UnlearnConfig
from fasterase.encode import PairEncoder
from fasterase.engine.history import StepRecord
from fasterase.engine.model_state import best_device, placed, resolve_device
from fasterase.engine.words import Word
from fasterase.errors import MissingExtraError
from fasterase.evaluation.verdict import FORGOTTEN, NEVER_KNOWN, Trace
from fasterase.facts import Picture, RunFacts
from fasterase.files import check_writable, parse_path, write_text
from fasterase.models.delta import fingerprint_weights, restored_original, save_delta
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.lora import LoraAdapter
from fasterase.page import write_markdown, write_page, write_reports, write_rest
from fasterase.pairs.skips import Skip
from fasterase.pairs.table import PairTable
from fasterase.provenance import (
    FORMAT,
    content_digest,
    library_versions,
    read_record,
    remember,
    write_record,
)
from fasterase.report.evaluation import Evaluation
from fasterase.report.pictures import Examples, example_rows, neighbours_among, picture_sheet
from fasterase.report.plots import history_charts, plot_charts
from fasterase.report.templating import render

MOST_SETS = 6  # further ones of which pictures are shown


@dataclass(frozen=True, repr=False)
class UnlearnResult:
    """Result of `fasterase.unlearn`.

    Attributes:
        model: the erased model: the object that was passed in, or its copy with `copy=True`.
        history: one record per step: `step` (from 1), `total`, `forget`, `retain`, `consistency`,
            `anchor`, `lr`, `grad_norm`, `applied`, `seconds`, and at the checks of an automatic
            run `residue`, `least_residue` and `damage`; as keys and as attributes.
        evaluation: measurements before and after; `None` if the config asked for none.
        verdict: `"forgotten"`, `"remembered"`, `"over-erased"` (less similar than unrelated pairs),
            `"undecided"` (too few images to tell, or too many of them still found) or `"never
            known"` (by the original), the worst over the forget set and all `forget_sets`; see
            `fasterase.evaluation.verdict`. None without a retain caption that is no forget caption.
        traces: set to forget -> the figures behind its verdict.
        config: the configuration of the run.
        skipped: pairs that could not be read, as `(id, reason)`.
        floor: the original's mean cosine of unrelated pairs.
        removed_from_retain: ids of retain pairs left out because they are also in the forget set.
        seconds: wall time of the run. A resumed one adds the seconds up to its checkpoint.
        encoder: `model` with its tokenizer and preprocessing, under fasterase's own interface.
        original_weights: what the run may have changed, as it was before, on the CPU.
        sets: the opened pairs by name, retain without those that are also in forget.
        adapter: what `tune="lora:N"` has added to the weights; None otherwise.
        parent_record: the record of the erasure before, if the model was loaded from a folder that
            had one; see `fasterase.provenance`.
        concept: what the caller named the forget set; None: not stated.
        concepts: names of several concepts, if the forget set was a mapping.
        verdicts: set to forget -> verdict on it.
        request: the request that is honoured, as the caller names it; None: not stated.
        withheld_until: the step after which an automatic run also drew the pairs that it had
            withheld for judging (the set `withheld`), since they alone were not forgotten, or None.
        words: those whose embeddings were overwritten (`forget_words`), each with `word`, and in
            how many pairs it occurs: `forget` and `retain`.
    """

    model: nn.Module
    history: list[StepRecord]
    evaluation: Evaluation | None
    verdict: str | None
    traces: Mapping[str, Trace]
    config: UnlearnConfig
    skipped: Sequence[Skip]
    floor: float
    removed_from_retain: Sequence[str]
    seconds: float
    encoder: DualEncoder
    original_weights: Mapping[str, Tensor]
    sets: Mapping[str, PairTable]
    adapter: LoraAdapter | None = None
    parent_record: Mapping[str, Any] | None = None
    concept: str | None = None
    concepts: Sequence[str] = ()
    verdicts: Mapping[str, str] = field(default_factory=dict)
    request: str | None = None
    words: Sequence[Word] = ()
    withheld_until: int | None = None

    @property
    def forgotten(self) -> bool:
        """Whether the verdict is "forgotten" or "never known": "over-erased" is a loud trace."""
        return self.verdict in (FORGOTTEN, NEVER_KNOWN)

    @property
    def residue(self) -> float | None:
        """Mean residue of the forget set: 1 known, 0.5 no trace, 0 loudly absent; or None."""
        return self.traces["forget"].residue if "forget" in self.traces else None

    @property
    def tokenizer(self) -> Any:
        """What reads captions, as the model's library or the caller gave it; None if unknown."""
        return self.encoder.companions.tokenizer

    @property
    def preprocess(self) -> Any:
        """What reads pictures: a transform or a transformers image processor; None if unknown."""
        return self.encoder.companions.preprocess

    def __repr__(self) -> str:
        return "\n  ".join(["UnlearnResult:", *(f"{k}: {v}" for k, v in self._summary().items())])

    def _repr_html_(self) -> str:
        """Show verdict, pictures before and after, damage and table in a notebook."""
        facts = self._summary()
        record = {"concept": self.concept, "outcome": {"verdict": self.verdict}}
        run = RunFacts(name="", record=record, traces=self.traces)
        try:
            run = self._with_pictures(run)
        except Exception as error:  # pictures may have been moved: the rest is shown all the same
            facts["no pictures"] = f"{type(error).__name__}: {error}"
        shown = render("notebook.html", headline=run.headline, facts=facts, sections=run.sections)
        return shown if self.evaluation is None else shown + self.evaluation._repr_html_()

    def _summary(self) -> dict[str, str]:
        """What fits on one screen: neither weights nor history."""
        facts = {
            "model": self.encoder.public_name,
            **({} if self.concept is None else {"concept": self.concept}),
            "verdict": self.verdict or "none",
            **({} if self.residue is None else {"residue": f"{self.residue:.2f}"}),
            "steps": f"{len(self.history):,}",
            "seconds": f"{self.seconds:.1f}",
        }
        if self.config.output_dir is not None:
            facts["saved in"] = self.config.output_dir
        return facts

    def save(
        self, folder: str | os.PathLike[str], *, delta: bool = False, card: bool = True
    ) -> Path:
        """Write the erased model so that open_clip (`local-dir:`) or `from_pretrained` loads it.

        The weights are one safetensors file up to 5 GB. The folder is written atomically. Of a
        model with adapters, only those are written; `PeftModel.from_pretrained` loads them.

        `provenance.json` records what was erased, when, with what configuration and library
        versions, the `request` if one was stated, digests of the data, how `fasterase.find` came
        to it, and the record of the model before; `fasterase.evaluate` of the folder compares the
        model with it. `README.md` is a model card that the Hugging Face hub reads. It names what
        was erased only if `concept` was stated or several concepts have names, no caption and no
        word. Neither names a folder of this machine.

        Args:
            folder: the folder to write.
            delta: write only what changed, for `fasterase.apply_delta`. After `tune="lora:N"` this
                is an adapter that peft loads too (docs/runs.md); else no library loads it. After
                `tune="all"` it is nearly as large as the model, which a warning says.
            card: write the model card.

        Raises:
            InputError: `folder` is no path, or holds files that fasterase did not write.
        """
        path = parse_path(folder, argument="folder")
        run = self._facts()  # before its parent's record is replaced, if that is the same folder
        base = read_base(self.encoder.name)
        if delta:
            save_delta(self.encoder, self.original_weights, path, self.adapter)
        else:
            self.encoder.save(path)
            write_record(path, run.record)
        if card:
            write_text(path / CARD, model_card(run, path, base))
        else:
            (path / CARD).unlink()
        return path

    def _record(self) -> dict[str, Any]:
        """What `provenance.json` holds."""
        before = restored_original(self.encoder, self.original_weights)
        return {
            "format": FORMAT,
            "concept": self.concept,
            "concepts": list(self.concepts),
            "request": self.request,
            "erased_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fingerprint": fingerprint_weights(self.encoder.module),
            "outcome": {
                "verdict": self.verdict,
                "verdicts": dict(self.verdicts),
                "residue": {name: trace.residue for name, trace in self.traces.items()},
                "steps": len(self.history),
                "withheld_until": self.withheld_until,
                "seconds": round(self.seconds, 1),
            },
            "words": [each._asdict() for each in self.words],
            **self._digests,
            "config": self.config.recipe(),
            "libraries": library_versions(),
            "parent": {
                "name": self.encoder.public_name,
                "fingerprint": fingerprint_weights(before.module),
                "record": self.parent_record,
            },
        }

    @cached_property
    def _digests(self) -> dict[str, Any]:
        """What the record holds of the pairs, which are read for it once."""
        forget = self.sets.get("forget")
        data: dict[str, dict[str, Any]] = {
            name: {"pairs": len(source), "digest": source.digest()}
            for name, source in self.sets.items()
        }
        if "retain" in data:
            data["retain"]["content"] = content_digest(self.sets["retain"])
        return {
            "erased": remember(forget, links=self.config.erases_link)
            if forget and self.config.remember_erased
            else None,
            "data": data,
            "found": None if forget is None else forget.found,
        }

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        commit_message: str = "Upload the model erased with fasterase",
        token: str | None = None,
    ) -> str:
        """Upload the erased model to the Hugging Face hub, and return its URL.

        open_clip loads it as `hf-hub:<name>`, transformers by `from_pretrained(name)`. The model
        card tells the verdict and how the model was erased, but nothing about the pairs.

        Args:
            name: `organisation/name`, or `name` for a repository of your own. An existing one gets
                a new commit.
            private: make a new repository private; refuse an existing one that is public.
            commit_message: of that commit.
            token: of the hub; None: as `hf auth login` or `HF_TOKEN` left it.

        Raises:
            InputError: `name` is not a repository's name; the hub refuses the token; the repository
                is public and `private` was asked for. Other errors of the hub are passed on.
        """
        return push_model(
            self.encoder,
            self._facts(),
            name,
            private=private,
            commit_message=commit_message,
            token=token,
        )

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a report: what was forgotten, what it cost and to whom, and how sure that is.

        Args:
            path: a file (an existing one, or a name with a suffix): a page with pictures for
                browsers if it ends in `.html`, else Markdown; or a folder for both (`report.html`,
                `report.md`), `losses.png` (losses, learning rate and checks over the steps) and
                `pictures.png`: pictures of the forget set, of its neighbours, of the rest of the
                retain set and of further sets, with the captions closest to each before and after.
                The pictures are read and encoded once, by the model as it is then.

        Raises:
            InputError: `path` is no path, or the folder cannot be written to.
            MissingExtraError: `path` is a folder and matplotlib is missing (extra `eval`); all but
                the plot is written.
        """
        path = parse_path(path, argument="path")
        if path.is_file() or (path.suffix and not path.is_dir()):
            if path.suffix == ".html":
                return write_page([self._with_pictures(self._facts())], path)
            return write_markdown(self._facts(), path, ())
        check_writable(path, argument="path")
        missing: MissingExtraError | None = None
        drawn: list[str] = []
        if charts := history_charts(self.history):
            try:
                drawn.append(plot_charts(charts, path / "losses.png").name)
            except MissingExtraError as error:
                missing = error
        drawn += self._draw_pictures(path)
        write_reports(self._with_pictures(self._facts()), path, drawn)
        if missing is not None:
            raise missing
        return path

    def write_output(self, folder: Path) -> None:
        """Write what a finished run leaves in its `output_dir`: model, measurement and reports.

        Raises:
            DiskFullError: there is no room for it.
        """
        run = self._facts(read_record(self.save(folder / "model")))
        if self.evaluation is not None:
            self.evaluation.to_json(folder / "evaluation.json")
        drawn: list[str] = []
        try:
            drawn = self._draw_pictures(folder)
            run = self._with_pictures(run)
        except Exception as error:  # whatever it is, hours of training are not to end with it
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"the report has no pictures ({reason})", stacklevel=3)
        write_rest(run, folder)
        write_reports(run, folder, drawn)

    def _facts(self, record: Mapping[str, Any] | None = None) -> RunFacts:
        output = self.config.output_dir
        return RunFacts(
            name=self.encoder.public_name if output is None else Path(output).resolve().name,
            record=self._record() if record is None else record,
            history=self.history,
            evaluation=self.evaluation,
            traces=self.traces,
            skipped=self.skipped,
            removed=len(self.removed_from_retain),
            has_folder=output is not None,
        )

    def _with_pictures(self, run: RunFacts) -> RunFacts:
        (rows, erased), neighbours = self._shown
        pictures = [Picture.of(row, erased) for row in rows]
        return replace(run, pictures=pictures, neighbours=neighbours)

    def _draw_pictures(self, folder: Path) -> list[str]:
        """Draw the sheet of pictures, if there are any; return the names of files drawn."""
        (rows, erased), _ = self._shown
        return [picture_sheet(rows, folder / "pictures.png", erased=erased).name] if rows else []

    @cached_property
    def _shown(self) -> tuple[Examples, list[str]]:
        """Pictures with captions, and the names in `evaluation.hurt` close to what was erased."""
        forget, retain = self.sets["forget"], self.sets["retain"]
        further = {n: each for n, each in self.sets.items() if n not in ("forget", "retain")}
        others = dict(islice(further.items(), MOST_SETS))
        hurt = [] if self.evaluation is None else self.evaluation.hurt
        names = list(dict.fromkeys(each.name for each in hurt))
        seed, precision = self.config.seed, self.config.precision
        original = restored_original(self.encoder, self.original_weights)
        device = resolve_device(self.config.device, default=best_device())
        with placed(original, device=device), placed(self.encoder, device=device):
            before = PairEncoder(original, precision=precision)
            after = PairEncoder(self.encoder, precision=precision)
            to_forget = [name for name in others if name in self.traces]
            encoders = before, after
            examples = example_rows(
                forget, retain, *encoders, seed=seed, others=others, forget_sets=to_forget
            )
            if not examples.rows:  # nor a caption
                return examples, []
            return examples, neighbours_among(names, forget, retain, before, seed=seed)
