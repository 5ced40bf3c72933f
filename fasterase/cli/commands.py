"""The commands by name: those of `erasure.py`, and the others."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fasterase
from fasterase.cli.erasure import Command, Evaluate, Split, Unlearn, spell_flags
from fasterase.config import DEMO, FIND, PLAN, Recipe, UnlearnConfig, field_names, format_yaml
from fasterase.errors import InputError, import_extra
from fasterase.files import check_creatable
from fasterase.option_values import special_values
from fasterase.progress import launched_rank


@dataclass(frozen=True)
class Plan(Command):
    """Tell memory, time and disk of an erasure beforehand, and how to run it.

    > Job

    Args:
        model: as for `fasterase unlearn`, or an open_clip name alone. No weights are read.
        pairs: number of pairs to keep.
        forget: number of pairs to forget. `none`: a hundredth of `pairs`.
        find: also tell what `fasterase find` costs, which encodes all pairs once.

    > Machine

    Args:
        gpus: number of GPUs.
        gpu_memory: memory of each in GB (10^9 bytes).
        tflops: dense peak of a GPU in TFLOP/s. `none`: an H100's.
        efficiency: share of that peak that training reaches.
        images_per_second: pictures that one process decodes. `none`: measured here on photographs.
        measure: correct the memory of activations by a micro-batch with random weights run here.

    Examples:
      fasterase plan --model ViT-B-32 --pairs 1_000_000
      fasterase plan --model ViT-bigG-14 --pairs 12_000_000 --forget 100_000 --gpus 8

    The numbers come from the architecture alone: the training code runs on tensors without storage,
    and its FLOPs and live memory are counted, in half a minute, or minutes for the largest models.
    Only decoding is measured, in a second. docs/planning.md explains each of them.
    """

    needs = ("model", "pairs")
    config_fields = field_names(PLAN)
    hidden = ("tflops", "efficiency", "images_per_second", "micro_batch_size", "lr")
    model: str | None = None
    pairs: int | None = None
    forget: int | None = None
    find: bool = False
    gpus: int = 1
    gpu_memory: float = 80.0
    tflops: float | None = None
    efficiency: float = 0.4
    images_per_second: float | None = None
    measure: bool = False

    def run(self, **fields: Any) -> None:
        print(fasterase.plan(**vars(self), config=UnlearnConfig(**fields)))


@dataclass(frozen=True)
class Find(Command):
    r"""Find the pairs of a concept in a corpus, by captions and pictures.

    > Concept

    Args:
        concept: what to find, in words, or several wordings and synonyms.
        images: example images: files, or one folder.
        not_about: wordings of what else the words may mean.
        picture_alone: also forget pairs of other captions, but with a picture as near as those of
            captions that name the concept.

    > Model and pairs

    Args:
        model: the model to be erased, as for `fasterase unlearn`.
        model_name: open_clip's name of the architecture of a model that is a checkpoint file.
        data: the corpus, in any form that `fasterase unlearn --forget` takes.
        image_key: column or tar entry of the image, if it has none of the usual names.
        text_key: column or tar entry of the caption, if it has none of the usual names.
        max_pairs: judge a sample of so many pairs. `none`: all.
        seed: of the sample, and of which pairs are unseen.

    > Output

    Args:
        output_dir: folder of the sets, of `review.html` and, without a reference_cache, of the
            features of all pairs.

    Examples:
      fasterase find --model ViT-B-32/laion2b_s34b_b79k --data pairs.csv --concept octopus \
          --output_dir sets
      fasterase find --model ViT-B-32/laion2b_s34b_b79k --data 'shards/{000..099}.tar' \
          --concept 'guide dog' 'seeing-eye dog' --not_about 'hot dog' --output_dir sets

    Open sets/review.html, correct decisions, and save decisions.csv into the folder: `fasterase
    unlearn --found sets` takes it over. Run the same command again after an interruption to go on.
    """

    needs = ("model", "data", "concept", "output_dir")
    config_fields = field_names(FIND)
    concept: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    not_about: list[str] = field(default_factory=list)
    picture_alone: bool = False
    model: str | None = None
    model_name: str | None = None
    data: str | None = None
    image_key: str | None = None
    text_key: str | None = None
    max_pairs: int | None = None
    seed: int = 0
    output_dir: str | None = None

    def run(self, **fields: Any) -> None:
        flags = dict(vars(self))
        model, data, folder = (flags.pop(name) for name in ("model", "data", "output_dir"))
        where = f"--output_dir={folder!r}"
        check_creatable(Path(folder), argument=where)
        self._check_concept(Path(folder), where)
        flags["images"] = self.images[0] if len(self.images) == 1 else self.images or None
        flags["not_about"] = self.not_about or None
        cache = fields.pop("reference_cache", None)
        flags["reference_cache"] = cache or Path(folder) / "reference"
        found = fasterase.find(model, data, flags.pop("concept"), **flags, **fields)
        if launched_rank() == 0:
            found.save(folder)
            page = Path(folder) / "review.html"
            print(f"{found!r}\nLook at {page}, and save decisions.csv beside it.")
            again = {"model": model, "found": folder, "reference_cache": cache}
            again["model_name"] = self.model_name
            print(f"Next: fasterase unlearn {spell_flags(again)} --output_dir RUN")

    def _check_concept(self, folder: Path, argument: str) -> None:
        """Refuse a folder of another search, whose decisions.csv would be taken for this one's."""
        from fasterase.finder.find import parse_wordings  # imports torch

        file = folder / "found.json"
        if file.is_file():
            other = json.loads(file.read_text(encoding="utf-8"))["concept"]
            if other != parse_wordings("concept", self.concept):
                raise InputError(
                    f"{argument} holds what was found of {', '.join(other)}. Give another folder."
                )


@dataclass(frozen=True)
class Report(Command):
    """Write the page of a run again, or put several runs side by side.

    > Runs

    Args:
        runs: the output folders of finished runs; they may stand first, without this flag.
        output: the page to write. `none`: report.html and report.md in the folder of a single run,
            comparison.html here for several.

    Examples:
      fasterase report runs/one
      fasterase report runs/one runs/two --output both.html

    The newest evaluation.json of each folder counts: what `fasterase evaluate --output
    runs/one/evaluation.json` writes, with tasks and attacks, comes into the page too.
    """

    needs = ("runs",)
    positional = "runs"
    runs: list[str] = field(default_factory=list)
    output: str | None = None

    def run(self, **fields: Any) -> None:
        from fasterase.page import MARKDOWN, PAGE, read_run, write_markdown, write_page

        found = [read_run(folder) for folder in self.runs]
        default = Path(self.runs[0]) / PAGE if len(found) == 1 else Path("comparison.html")
        page = write_page(found, Path(self.output or default))
        written = str(page)
        if self.output is None and len(found) == 1:
            written = f"{page}, {write_markdown(found[0], page.with_name(MARKDOWN))}"
        print(f"Written: {written}")


@dataclass(frozen=True)
class Demo(Command):
    """Erase a concept from the small CLIP that ships with the package.

    > Demo

    Args:
        forget: a group (`food-drink`), a subgroup (`food-fruit`) or a regular expression on names.
        model: another model than the one that ships, named as for `fasterase unlearn`.
        recipe: `fasterase`, or `cliperase` for the paper's; the other one is shown for comparison.
        output_dir: folder for the results. `none`: `runs/demo-` followed by what is erased.
        batch_size: pairs to keep per step. `none`: chosen for the shipped model.
        full: also print the table of every metric, which is always in `evaluation.txt`.

    Examples:
      fasterase demo
      fasterase demo --forget animal-bird --output_dir runs/birds
      fasterase demo --recipe cliperase
    """

    config_fields = field_names(DEMO)
    forget: str = "food-fruit"
    model: str | None = None
    recipe: Recipe = "fasterase"
    output_dir: str | None = None
    batch_size: int | None = None
    full: bool = False

    def run(self, **fields: Any) -> None:
        from fasterase.demo.run import run_demo

        arguments = {**vars(self), **fields}
        if self.batch_size is None:
            del arguments["batch_size"]
        run_demo(**arguments)


class Compile(Command):
    """Build the C++ kernels of the loss now instead of at first use.

    Examples:
      fasterase compile

    The library is cached in TORCH_EXTENSIONS_DIR, or else ~/.cache/torch_extensions, by compiler
    flags, torch version and CPU type: run this once per type of node that shares a home folder.
    Needs a C++ compiler, c++ on PATH or the one named by CXX, unless the wheel has libraries for
    the installed torch.
    """

    def run(self, **fields: Any) -> None:
        from fasterase.ops.contrastive.cpu import load_library

        print(f"The C++ kernels are ready: {load_library()}")


@dataclass(frozen=True)
class Completion(Command):
    """Print a script with which a shell completes commands, flags and their values.

    > Shell

    Args:
        shell: the shell; it may stand first, without this flag.

    Examples:
      fasterase completion bash > ~/.local/share/bash-completion/completions/fasterase
      fasterase completion zsh > ~/.zfunc/_fasterase
      fasterase completion fish > ~/.config/fish/completions/fasterase.fish

    zsh reads the folder if `fpath+=~/.zfunc` stands before `compinit` in ~/.zshrc. Needs shtab: pip
    install 'fasterase[completion]'.
    """

    needs = ("shell",)
    positional = "shell"
    shell: Literal["bash", "zsh", "fish", "tcsh"] | None = None

    def run(self, **fields: Any) -> None:
        # The parser is made of the commands, this one among them.
        from fasterase.cli.parser import command_parser, flags_of, general_parser

        shtab = import_extra("shtab", "completion", "fasterase completion")
        whole = argparse.ArgumentParser(
            prog="fasterase", parents=[general_parser()], add_help=False
        )
        commands = whole.add_subparsers()
        for name, cls in COMMANDS.items():
            flags = {f"--{flag.name}": flag for flag in flags_of(name)}
            parser = command_parser(name, flags.values())
            for action in parser._actions:
                flag = flags.get(action.option_strings[-1])
                if action.nargs == 0 or (flag is not None and isinstance(flag.default, bool)):
                    continue
                words = special_values(flag.hint) if flag is not None else []
                action.choices = [word for word in words if word is not None] or None
                if action.choices is None:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
            commands.add_parser(name, help=cls.purpose(), parents=[parser], add_help=False)
        print(shtab.complete(whole, self.shell))


COMMANDS: dict[str, type[Command]] = {
    cls.__name__.lower(): cls
    for cls in (Unlearn, Evaluate, Plan, Split, Find, Report, Demo, Compile, Completion)
}


def run_command(command: str, values: dict[str, Any]) -> str | None:
    """Run a command with the values of the flags given; return the verdict, if it comes to one.

    Raises:
        InputError: a required flag is missing, or a value cannot be used.
    """
    cls = COMMANDS[command]
    own = {each.name: values[each.name] for each in dataclasses.fields(cls) if each.name in values}
    flags, fields = cls(**own), {name: values[name] for name in values if name not in own}
    if fields.pop("print_config", False) and isinstance(flags, Unlearn):
        print(format_yaml({**own, **flags.config(fields).to_dict()}), end="")
        return None
    cls.check(values)
    return flags.run(**fields)
