"""What a command is, and those that erase, measure and split.

The fields of a class are its flags; its docstring is the help of both.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fasterase
from fasterase.config import BASIC, EVALUATE, Recipe, UnlearnConfig, field_names
from fasterase.errors import InputError
from fasterase.files import check_creatable
from fasterase.progress import speaking
from fasterase.repeat import check_repeatable

SETS = ("forget", "retain")
RULES = ("forget_expression", "forget_ids", "forget_classes")  # which split `data` into these


@dataclass(frozen=True)
class Command(ABC):
    """A command without flags of its own.

    Attributes:
        needs: flags without which it does not run.
        config_fields: fields of `UnlearnConfig` that are flags too; `run` gets those given.
        positional: the flag whose values may stand first, without it.
        hidden: flags of its own that only `--help-all` shows, with all settings but the basic ones.
            Without any, `--help` shows every flag.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    config_fields: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[str | None] = None
    hidden: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def purpose(cls) -> str:
        """Return the first line of its help."""
        return (cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def shows(cls, flag: str) -> bool:
        """Whether `--help` shows a flag, or only `--help-all`."""
        is_basic = flag not in cls.config_fields or flag in field_names(BASIC)
        return not cls.hidden or (is_basic and flag not in cls.hidden)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Raise `InputError` if the flags given cannot go together, or some are missing."""
        missing = [f"--{name}" for name in cls.needs if values.get(name) is None]
        if missing:
            command = cls.__name__.lower()
            raise InputError(
                f"{command} needs {', '.join(missing)}. Give each as a flag, or without the "
                "dashes as a key of the YAML file of --config; "
                f"`fasterase {command} --help` explains them."
            )

    @abstractmethod
    def run(self, **fields: Any) -> str | None:
        """Run the command; return the verdict, if it comes to one."""


@dataclass(frozen=True)
class _Sets(Command):
    """The model and its sets.

    > Model and pairs

    Args:
        model: an open_clip name/tag (`ViT-B-32/laion2b_s34b_b79k`), `hf-hub:org/name` (open_clip),
            `hf:org/name` (transformers), a folder, or an open_clip checkpoint file.
        model_name: open_clip's name of the architecture of models that are checkpoint files.
        forget: pairs to forget: a CSV, TSV, JSONL, JSON or Parquet file (columns `filepath`,
            `title`), a folder of `x.jpg` + `x.txt` or of classes, or tars (`{000..099}.tar`). For
            several concepts NAME=WHERE of each (in YAML also a mapping).
        retain: pairs to keep, in any of the same forms.
        holdout: pairs in neither set, only measured.
        sets: further pairs that should be kept, only measured (in YAML also a mapping).
        forget_sets: further pairs that should be forgotten as well, such as unseen pictures, only
            measured. The verdict is the worst over all.
    """

    model: str | None = None
    model_name: str | None = None
    forget: str | dict[str, str] | None = None
    retain: str | None = None
    holdout: str | None = None
    sets: dict[str, str] = field(default_factory=dict)
    forget_sets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source(Command):
    r"""One source of pairs that is split.

    > One source to split

    Args:
        data: pairs in any form that `fasterase unlearn --forget` takes, split into those to forget
            and those to keep by exactly one of the next three flags.
        forget_expression: regular expression that is found in a caption, such as `\bapples?\b`.
        forget_ids: file of ids, one per line, or the decisions.csv of `fasterase find`'s page.
        forget_classes: classes or whole captions to forget, separated by commas.

    > Columns

    Args:
        image_key: column or tar entry of the image, if it has none of the usual names.
        text_key: column or tar entry of the caption, if it has none of the usual names.
    """

    data: str | None = None
    forget_expression: str | None = None
    forget_ids: str | None = None
    forget_classes: list[str] | None = None
    image_key: str | None = None
    text_key: str | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Check also that they name two sets, or one source and a rule that splits it, or `found`.

        A file that repeats a run may lack what no file holds.
        """
        check_repeatable(values)
        given = [name for name in (*RULES, *SETS) if values.get(name) is not None]
        rules, flags = [name for name in given if name in RULES], [f"--{name}" for name in given]
        data, found = values.get("data"), values.get("found")
        if found is not None and (given or data is not None):
            beside = " and ".join(flags if data is None else [*flags, "--data"])
            raise InputError(
                f"--found names the sets by itself; found {beside} beside it. Leave out one or the "
                "other."
            )
        if data is None and rules:
            raise InputError(f"--{rules[0]} splits the pairs of --data, which is missing: give it.")
        if data is not None and (len(rules) != 1 or rules != given):
            raise InputError(
                f"--data needs one of {', '.join(f'--{name}' for name in RULES)}, which says what "
                "to forget, and neither --forget nor --retain; found "
                f"{' and '.join(flags) or 'none'}."
            )
        if data or found:  # which give both sets
            values = {**values, **dict.fromkeys(SETS, data or found)}
        super().check(values)

    def split(self) -> tuple[Any, Any]:
        """Split the pairs of `data`; return those to forget and those to keep.

        Raises:
            InputError: the source or the rule cannot be used; the message names the flag.
        """
        (name,) = (name for name in RULES if getattr(self, name) is not None)
        rule: Any = getattr(self, name)
        keys = {"image_key": self.image_key, "text_key": self.text_key}
        try:
            if name == "forget_expression":
                rule = re.compile(rule, re.IGNORECASE)
            elif name == "forget_ids":
                rule = Path(rule)
            parts = fasterase.split(self.data, forget=rule, **keys)
        except re.error as error:
            raise InputError(f"--{name}={rule!r} is not a regular expression: {error}") from error
        except InputError as error:
            message = str(error).replace("`source`", "--data").replace("`forget`", f"--{name}")
            raise type(error)(message) from error
        for part in parts:
            part.flags = {"data": self.data, name: getattr(self, name)}
        return parts


@dataclass(frozen=True)
class Erasure(_Source, _Sets):
    """A model, and its sets in any way.

    > Model and pairs

    Args:
        found: folder that `fasterase find` wrote: its pairs to forget and to keep, and unless they
            are given, `unseen` of forget_sets and `neighbours` of sets.
    """

    hidden: ClassVar[tuple[str, ...]] = (
        *("model_name", "holdout", "forget_ids", "forget_classes", "image_key", "text_key"),
    )
    found: str | None = None

    def call(self, function: Any, *, without: tuple[str, ...], shown: bool, **others: Any) -> Any:
        """Call a function of the library with the flags, but `without` some, and with `others`."""
        without = ("model", "found", "data", *SETS, *RULES, *without)
        flags = {name: value for name, value in vars(self).items() if name not in without}
        sets: Any = self.forget, self.retain
        with speaking(shown):
            if self.found is not None:
                found = fasterase.Found.load(self.found)
                sets = tuple(found)
                further = {"forget_sets": found.unseen, "sets": found.neighbours}
                for argument, part in further.items():
                    flags[argument] = {part.name: part} | flags[argument]
                for part in (*sets, *further.values()):
                    part.flags = {"found": self.found}
                if len(found.facts["concept"]) == 1 and flags.get("concept", "") is None:
                    flags["concept"] = found.facts["concept"][0]
            elif self.data is not None:
                sets = self.split()
        return function(self.model, *sets, **{**flags, **others})


@dataclass(frozen=True)
class Unlearn(Erasure):
    r"""Make a CLIP model forget a set of image-text pairs.

    > Model and pairs

    Args:
        recipe: defaults that flags and YAML override: `fasterase`, or `cliperase`, the paper's.
        concept: what is forgotten, in words, such as "octopus": `forget_words` takes its meaning,
            and the report, the model card and the provenance name it.
        request: the removal request that is honoured, such as REQ-17, for report and provenance.

    Examples:
      fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --forget forget.csv \
          --retain 'shards/{000..099}.tar' --output_dir runs/one
      fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --data pairs.csv \
          --forget_expression '\bapples?\b' --output_dir runs/apples
      fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --found sets --output_dir runs/octopus
      fasterase unlearn --config erase.yaml --lr 3e-6 --floor none
      fasterase unlearn --recipe cliperase --print_config > erase.yaml

    The output folder D gets the erased model (D/model), the losses of every step (D/history.jsonl),
    the measurement (D/evaluation.json) and the exit code (D/status.json). Run the same command
    again after an interruption to resume from the last checkpoint. `-` and `_` in flags are the
    same, `none` and `null` mean no value, and a flag overrides the same key in the YAML file.

    Exit codes: 0 done, 2 wrong input, 3 losses stayed non-finite, 4 done but the verdict is
    "remembered", 75 preempted (run again), 130 Ctrl-C (run again), 1 anything else.
    """

    needs = ("model", "forget", "retain", "output_dir")
    config_fields = field_names()
    hidden = (*Erasure.hidden, "request")
    recipe: Recipe = "fasterase"
    concept: str | None = None
    request: str | None = None

    def config(self, fields: dict[str, Any]) -> UnlearnConfig:
        return (UnlearnConfig.cliperase if self.recipe == "cliperase" else UnlearnConfig)(**fields)

    def run(self, **fields: Any) -> str | None:
        if self.found is not None and (Path(self.found) / "reference").is_dir():
            fields.setdefault("reference_cache", str(Path(self.found) / "reference"))
        config = self.config(fields)
        result = self.call(
            fasterase.unlearn, without=("recipe",), shown=config.progress, config=config
        )
        if result.evaluation is not None:
            print(result.evaluation.table())
        print(
            f"Done in {result.seconds:.0f} s: {result.verdict or 'no verdict'}. Model and history: "
            f"{config.output_dir}\nRead {Path(config.output_dir or '') / 'report.html'}"
        )
        return result.verdict


@dataclass(frozen=True)
class Evaluate(Erasure):
    r"""Measure how well a model still knows the pairs to forget, to keep and in further sets.

    > Comparison

    Args:
        original: the model before erasing, for comparison.
        references: further models for comparison, such as one retrained without the forget set.

    > Measuring

    Args:
        class_names: text file with one class name per line, for zero-shot accuracy.
        tasks: what models are used for, by name: zero_shot, retrieval, image_retrieval,
            linear_probe, prototypes, paraphrases.
        attacks: attempts to bring the concept back, by name: swap (needs `original`),
            probe, quantise, relearn, prompt, membership (needs `non_members`).
        non_members: pairs of the same source that no model was trained on.
        max_pairs: number of pairs to measure per set, drawn with `seed`.
        seed: seed of the draw and of the bootstrap intervals.
        output: also write the result to this file: the values as `.json`, or the report as `.md`.
        plots: also draw each task and attack to a file in this folder.

    Examples:
      fasterase evaluate --model runs/one/model --forget forget.csv --retain retain.csv
      fasterase evaluate --model runs/one/model --original ViT-B-32/laion2b_s34b_b79k \
          --forget forget.csv --retain retain.csv --sets neighbours=near.csv \
          --forget_sets unseen=unseen.csv --output report.md

    Exit codes: 0 done, 2 wrong input, 4 the verdict is "remembered", 75 SIGTERM or SIGUSR1, 130
    Ctrl-C, 1 anything else.
    """

    needs = ("model", "forget", "retain")
    config_fields = field_names(EVALUATE)
    hidden = (*Erasure.hidden, "class_names", "max_pairs", "seed")
    original: str | None = None
    references: dict[str, str] = field(default_factory=dict)
    class_names: str | None = None
    tasks: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    non_members: str | None = None
    max_pairs: int = 5000
    seed: int = 0
    output: str | None = None
    plots: str | None = None

    def run(self, **fields: Any) -> str | None:
        from fasterase.report.evaluation import check_report_path
        from fasterase.report.plots import require_matplotlib

        if self.output is not None:
            check_report_path(Path(self.output), argument="--output")
        if self.plots is not None:
            if not (self.tasks or self.attacks):
                raise InputError("--plots: there is nothing to draw without --tasks or --attacks.")
            check_creatable(Path(self.plots), argument="--plots")
            require_matplotlib()
        evaluation = self.call(
            fasterase.evaluate,
            without=("output", "plots"),
            shown=fields.get("progress", True),
            class_names=self._read_classes(),
            **fields,
        )
        print(evaluation.table())
        if self.output is not None:
            print(f"Written to {evaluation.report(self.output)}.")
        if self.plots is not None:
            print(f"Plots: {', '.join(map(str, evaluation.plot(self.plots)))}.")
        return evaluation.verdict

    def _read_classes(self) -> list[str] | None:
        if self.class_names is None:
            return None
        file = Path(self.class_names)
        if not file.is_file():
            raise InputError(f"class_names: no file {file}. Give one with a name per line.")
        lines = file.read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Split(_Source):
    r"""Split pairs into those to forget and those to keep.

    > Output

    Args:
        output_dir: folder for the two sets: tables `forget.csv` and `retain.csv` (`.jsonl` where
            pairs have several captions) if images are files, else lists of ids `forget.txt` ...

    Examples:
      fasterase split --data pairs.csv --forget_expression '\bapples?\b' --output_dir sets
      fasterase split --data photos --forget_classes apple,pear --output_dir sets

    `fasterase unlearn` splits --data itself by the same flags; this shows what they select.
    """

    needs = ("data", "output_dir")
    output_dir: str | None = None

    def run(self, **fields: Any) -> None:
        from fasterase.pairs.split import write_split

        data, folder = Path(str(self.data)), Path(str(self.output_dir))
        where = f"--output_dir={self.output_dir!r}"
        if data.resolve().parent == folder.resolve() and data.stem in ("forget", "retain"):
            raise InputError(f"{where}: the split would replace --data={self.data!r}.")
        check_creatable(folder, argument=where)
        forget, retain = self.split()
        files = write_split(forget, retain, folder)
        print(f"{forget!r}: {files.forget}\n{retain!r}: {files.retain}")
        flags: dict[str, Any] = {"forget": files.forget, "retain": files.retain}
        if not files.tables:
            flags = {"data": self.data, "forget_ids": files.forget}
            flags |= {"image_key": self.image_key, "text_key": self.text_key}
        print(f"Next: fasterase unlearn --model MODEL --output_dir RUN {spell_flags(flags)}")


def spell_flags(values: Mapping[str, Any]) -> str:
    """Return flags as a shell takes them; those that are None are left out."""
    given = {name: str(value) for name, value in values.items() if value is not None}
    return shlex.join(word for name, value in given.items() for word in (f"--{name}", value))
