"""`UnlearnResult`: the erased model, the record of the run, and its Markdown report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.config import UnlearnConfig, describe_recipe, format_yaml
from fasterase.encode import PairEncoder
from fasterase.engine.history import StepRecord
from fasterase.engine.model_state import best_device, placed, resolve_device
from fasterase.engine.words import Word
from fasterase.erased import content_digest, remember
from fasterase.errors import MissingExtraError
from fasterase.evaluation.verdict import FORGOTTEN, NEVER_KNOWN, Trace
from fasterase.files import check_writable, parse_path, write_text
from fasterase.models.delta import fingerprint_weights, restored_original, save_delta
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.hub import push_model
from fasterase.models.lora import LoraAdapter
from fasterase.objective import EraseLoss
from fasterase.pairs.skips import Skip
from fasterase.pairs.table import PairTable
from fasterase.provenance import FORMAT, library_versions, write_record
from fasterase.report.evaluation import Evaluation
from fasterase.report.pictures import TEXT_WIDTH, Examples, example_rows, picture_sheet
from fasterase.report.plots import plot_history
from fasterase.report.tables import Section, html_table

_NAMED_SKIPS = 100  # in a report
# Captions of more characters than a name are given more pixels.
NAME_LENGTH, SENTENCE_WIDTH = 30, 290


@dataclass(frozen=True, repr=False)
class UnlearnResult:
    """Result of `fasterase.unlearn`.

    Attributes:
        model: the erased model: the object that was passed in, or its copy with `copy=True`.
        history: one record per step: `step` (from 1), `total`, `forget`, `retain`, `consistency`,
            `anchor`, `lr`, `grad_norm`, `applied`, `seconds`; as keys and as attributes.
        evaluation: measurements before and after; `None` if the config asked for none.
        verdict: `"forgotten"`, `"remembered"`, `"over-erased"` (less similar than unrelated pairs),
            `"undecided"` (too few images to tell) or `"never known"` (by the original), the worst
            over the forget set and all `forget_sets`; see `fasterase.evaluation.verdict`. None
            without a retain caption that is no forget caption.
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
        words: those whose embeddings were overwritten (`forget_words`), each with `word`, `forget`
            and `retain`: in how many pairs of these sets it occurs.
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
    words: Sequence[Word] = ()

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
        return "\n  ".join(["UnlearnResult:", *(f"{k}: {v}" for k, v in self._facts().items())])

    def _repr_html_(self) -> str:
        """Show a table in a notebook."""
        rows = [[fact, value] for fact, value in self._facts().items()]
        table = html_table(["", "erasure"], [Section("", rows)])
        return table if self.evaluation is None else table + self.evaluation._repr_html_()

    def _facts(self) -> dict[str, str]:
        """What fits on one screen: neither weights nor history."""
        facts = {
            "model": self.encoder.name,
            **({} if self.concept is None else {"concept": self.concept}),
            "verdict": self.verdict or "none",
            **({} if self.residue is None else {"residue": f"{self.residue:.2f}"}),
            "steps": f"{len(self.history):,}",
            "seconds": f"{self.seconds:.1f}",
        }
        if self.config.output_dir is not None:
            facts["saved in"] = self.config.output_dir
        return facts

    def save(self, folder: str | os.PathLike[str], *, delta: bool = False) -> Path:
        """Write the erased model so that open_clip (`local-dir:`) or `from_pretrained` loads it.

        The weights are one safetensors file up to 5 GB. The folder is written atomically. Of a
        model with adapters, only those are written; `PeftModel.from_pretrained` loads them.

        `provenance.json` beside them records what was erased, when, with what configuration and
        library versions, digests of the data, how `fasterase.find` came to it, if it did, and the
        model before with its own record, if it had one; the model card tells the same in short, and
        neither names a folder of this machine.
        `fasterase.evaluate` of the folder compares the model with its record.

        Args:
            folder: the folder to write.
            delta: write only what changed, for `fasterase.apply_delta`. After `tune="lora:N"` this
                is an adapter that peft loads too (docs/runs.md); else no library loads it.

        Raises:
            InputError: `folder` is no path, or holds files that fasterase did not write.
        """
        path = parse_path(folder, argument="folder")
        if delta:
            return save_delta(self.encoder, self.original_weights, path, self.adapter)
        record = self._record()  # before its parent's is replaced, if that is the same folder
        self.encoder.save(path)
        write_record(path, record)
        return path

    def _record(self) -> dict[str, Any]:
        """What `provenance.json` holds."""
        before = restored_original(self.encoder, self.original_weights)
        return {
            "format": FORMAT,
            "concept": self.concept,
            "erased_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fingerprint": fingerprint_weights(self.encoder.module),
            "outcome": {
                "verdict": self.verdict,
                "residue": {name: trace.residue for name, trace in self.traces.items()},
                "steps": len(self.history),
                "seconds": round(self.seconds, 1),
            },
            "words": [each._asdict() for each in self.words],
            "erased": remember(self.sets["forget"]) if self.config.remember_erased else None,
            "data": {
                name: {
                    "pairs": len(source),
                    "digest": source.digest(),
                    **({"content": content_digest(source)} if name == "retain" else {}),
                }
                for name, source in self.sets.items()
            },
            "found": self.sets["forget"].found,
            "config": self.config.recipe(),
            "libraries": library_versions(),
            "parent": {
                "name": self.encoder.public_name,
                "fingerprint": fingerprint_weights(before.module),
                "record": self.parent_record,
            },
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
        facts = {**self._facts(), "recipe": describe_recipe(self.config)}
        for fact in ("model", "saved in"):  # they may name folders of this machine
            facts.pop(fact, None)
        return push_model(
            self.encoder,
            name,
            facts=[f"{fact}: {value}" for fact, value in facts.items()],
            private=private,
            commit_message=commit_message,
            token=token,
        )

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a report: recipe, losses, forgetting, and the evaluation's table.

        Args:
            path: a file (an existing one, or a name with a suffix) for the Markdown alone; or a
                folder for `report.md`, `losses.png` (losses and learning rate over the steps) and
                `pictures.png`: pictures of the forget set, of its neighbours and of the rest of
                the retain set, with the captions closest to each before and after. The pictures
                are read again, and encoded by the model as it is now.

        Raises:
            InputError: `path` is no path, or the folder cannot be written to.
            MissingExtraError: `path` is a folder and matplotlib is missing (extra `eval`); all but
                the plot is written.
        """
        path = parse_path(path, argument="path")
        text = _format_report(self)
        if path.is_file() or (path.suffix and not path.is_dir()):
            return write_text(path, text)
        check_writable(path, argument="path")
        missing: MissingExtraError | None = None
        if self.history:
            try:
                plot_history(self.history, path / "losses.png")
                text += _section("Losses over the steps", "losses.png")
            except MissingExtraError as error:
                missing = error
        examples = self._examples()
        if examples.rows:
            longest = max(len(name) for row in examples.rows for name in (*row.before, *row.after))
            width = SENTENCE_WIDTH if longest > NAME_LENGTH else TEXT_WIDTH
            sheet = path / "pictures.png"
            picture_sheet(examples.rows, sheet, erased=examples.erased, text_width=width)
            text += _section("Closest captions before and after", "pictures.png")
        write_text(path / "report.md", text)
        if missing is not None:
            raise missing
        return path

    def _examples(self) -> Examples:
        before = restored_original(self.encoder, self.original_weights)
        device = resolve_device(self.config.device, default=best_device())
        with placed(before, device=device), placed(self.encoder, device=device):
            return example_rows(
                self.sets["forget"],
                self.sets["retain"],
                PairEncoder(before, precision=self.config.precision),
                PairEncoder(self.encoder, precision=self.config.precision),
                seed=self.config.seed,
            )


def _section(title: str, file: str) -> str:
    return f"\n## {title}\n\n![{title}]({file})\n"


def _list_words(words: Sequence[Word]) -> str:
    """Name words with their counts, common ones in bold."""
    listed = [
        f"{'**' if each.is_common else ''}{each.word}{'**' if each.is_common else ''} "
        f"({each.forget:,} forget pair{'' if each.forget == 1 else 's'})"
        for each in words
    ]
    common = ". Words in bold are common in English: captions outside both sets may need them"
    return (", ".join(listed) or "none") + (common if any(w.is_common for w in words) else "")


def _format_report(result: UnlearnResult) -> str:
    lines = [
        "# Erasure report",
        "",
        f"- concept: {result.concept or 'not stated'}",
        f"- verdict: **{result.verdict or 'none'}**",
        *(f"  - {name}: {trace.describe()}" for name, trace in result.traces.items()),
        f"- steps: {len(result.history)}, {result.seconds:.1f} s in all",
        f"- recipe: {describe_recipe(result.config)}",
        f"- words that lost their meaning: {_list_words(result.words)}",
        f"- unreadable pairs skipped: {len(result.skipped)}",
        f"- retain pairs left out because they are also in the forget set: "
        f"{len(result.removed_from_retain)}",
        "",
    ]
    if result.history:
        terms = EraseLoss._fields
        lines += ["## Losses", "", "| | " + " | ".join(terms) + " |"]
        lines.append("|---" * (len(terms) + 1) + "|")
        for label, record in (("first step", result.history[0]), ("last step", result.history[-1])):
            lines.append(f"| {label} | " + " | ".join(f"{record[t]:.4f}" for t in terms) + " |")
        lines.append("")
    if result.evaluation is not None:
        lines += ["## Evaluation", "", "```", result.evaluation.table(), "```", ""]
    lines += ["## Settings", "", "```yaml", format_yaml(result.config.to_dict()) + "```", ""]
    if result.skipped:
        lines += ["## Skipped pairs", ""]
        lines += [f"- {id}: {reason}" for id, reason in result.skipped[:_NAMED_SKIPS]]
        if len(result.skipped) > _NAMED_SKIPS:
            lines.append(f"- and {len(result.skipped) - _NAMED_SKIPS} more (`result.skipped`)")
        lines.append("")
    return "\n".join(lines)
