"""Run one of the paper's protocols on a model: `python -m benchmarks.protocols cifar100 --help`.

Two are none of the paper's: `utility`, what else the field compares CLIPs by, for an erased model,
and `salmubench`, which erases links of faces and facts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import exit_with, new_parser
from benchmarks.protocols.diffusion import CONCEPT, CONTROLS, MODELS, DiffusionCheck, run_check
from benchmarks.protocols.protocol import Protocol, run_protocol
from benchmarks.protocols.published import CC12M, CIFAR, FLICKR
from benchmarks.protocols.salmubench import CLEAN, COMPROMISED, SALMUBENCH_DATA, run_salmubench
from benchmarks.protocols.utility import DATA, IMAGENET_DATA, run_utility
from fasterase.config import UnlearnConfig
from fasterase.files import check_creatable, write_text

# A new protocol that erases from a model is a `Protocol` and an entry here.
PROTOCOLS: dict[str, Protocol] = {"cifar100": CIFAR, "flickr30k": FLICKR, "cc12m": CC12M}
RECIPES: dict[str, Callable[[], UnlearnConfig]] = {
    "fasterase": UnlearnConfig,
    "cliperase": UnlearnConfig.cliperase,
}
_CHECK_FIELDS = {field.name for field in fields(DiffusionCheck)}


class Command(NamedTuple):
    """What is run under one name."""

    data: str  # what it needs
    add_flags: Callable[[argparse.ArgumentParser], None]
    # Flags and folder -> the table; what is in the folder is not measured again.
    run: Callable[[argparse.Namespace, Path], str]
    table: str = "table.md"  # file of the table


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(
        "Repeat an experiment of CLIPErase (Yang et al., ACL 2025), or SALMUBench, with any model.",
        prog="python -m benchmarks.protocols",
        epilog="\n\n".join(f"{name}: {each.data}" for name, each in COMMANDS.items()),
    )
    commands = parser.add_subparsers(dest="protocol", required=True)
    for name, each in COMMANDS.items():
        command = commands.add_parser(name, description=each.data)
        command.add_argument("--output", type=Path, help=f"folder of the results: runs/{name}")
        each.add_flags(command)
    options = parser.parse_args(argv)
    chosen = COMMANDS[options.protocol]
    output = options.output or Path("runs") / options.protocol
    check_creatable(output, argument=f"--output={str(output)!r}")
    table = chosen.run(options, output)
    write_text(output / chosen.table, table)
    print(f"{table}\nWritten to {output / chosen.table}.")


def _add_erasing(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="as in `fasterase unlearn`")
    command.add_argument("--data", type=Path, required=True, help="folder of the data set")
    command.add_argument("--concept", help="what to erase instead of the protocol's own choice")
    command.add_argument("--cases", nargs="+", default=[], help="run only these cases")
    command.add_argument("--recipe", choices=RECIPES, default="fasterase")
    command.add_argument("--config", type=Path, help="YAML file of the recipe's fields instead")
    command.add_argument("--max_pairs", type=int, default=5000, help="pairs measured of each set")


def _configs(options: argparse.Namespace, recipes: Sequence[str]) -> dict[str, UnlearnConfig]:
    """Return the config of --config by the name of its file, or else those of recipes by theirs."""
    if options.config is not None:
        return {options.config.name: UnlearnConfig.from_yaml(options.config)}
    return {name: RECIPES[name]() for name in recipes}


def _run_protocol(options: argparse.Namespace, output: Path) -> str:
    (config,) = _configs(options, [options.recipe]).values()
    return run_protocol(
        PROTOCOLS[options.protocol],
        options.model,
        options.data,
        output,
        config=config,
        concept=options.concept,
        only=options.cases,
        max_pairs=options.max_pairs,
    )


def _add_utility(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="erased, as in `fasterase evaluate`")
    command.add_argument("--original", required=True, help="the model before erasing")
    for name in DATA:
        command.add_argument(f"--{name}", type=Path, help="folder of this data set")
    command.add_argument("--max_pairs", type=int, help="pictures of each data set: all")


def _run_utility(options: argparse.Namespace, output: Path) -> str:
    given = {name: vars(options)[name] for name in DATA if vars(options)[name] is not None}
    return run_utility(options.model, options.original, given, output, max_pairs=options.max_pairs)


def _add_salmubench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, required=True, help="folder of the evaluation set")
    command.add_argument("--model", default=COMPROMISED, help=f"the compromised one: {COMPROMISED}")
    command.add_argument("--clean", default=CLEAN, help=f"the one to compare with: {CLEAN}")
    command.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    command.add_argument("--config", type=Path, help="YAML file of another recipe's fields instead")
    command.add_argument("--imagenet", type=Path, help="folder of ImageNet, for GenKnow")
    command.add_argument("--max_pairs", type=int, help="pairs measured of each split: all")


def _run_salmubench(options: argparse.Namespace, output: Path) -> str:
    return run_salmubench(
        options.data,
        output,
        model=options.model,
        clean=options.clean,
        configs=_configs(options, options.recipe),
        imagenet=options.imagenet,
        max_pairs=options.max_pairs,
    )


def _add_diffusion(command: argparse.ArgumentParser) -> None:
    """Add a flag per field of `DiffusionCheck`, under its name unless `dest` says otherwise."""

    def add(flag: str, **settings: Any) -> None:
        # What is not given is left to the dataclass.
        command.add_argument(flag, default=argparse.SUPPRESS, **settings)

    add("--pipeline", required=True, help="Stable Diffusion 1 or 2: folder or hub id")
    add("--erased", required=True, help="the erased CLIP, as --model of `fasterase evaluate`")
    add("--detector", required=True, help="OWL-ViT or OWLv2: folder or hub id")
    add("--model", help="the CLIP before erasing, to check that the pipeline has its text tower")
    add("--concept", dest="concepts", nargs="+", help=f"what was erased: {CONCEPT}")
    add("--controls", nargs="*", help=f"what should still be drawn: {' '.join(CONTROLS)}")
    add("--templates", nargs="+", help='prompts with {} for the object, as in "a photo of a {}"')
    add("--images", type=int, help="pictures of each prompt, with each text encoder: 10")
    add("--threshold", type=float, help="score from which on a detection counts: 0.2")
    add("--steps", type=int, help="denoising steps: 50")
    add("--guidance", type=float, help="scale of the classifier-free guidance: 7.5")
    add("--seed", type=int, help="of the latents: 0")
    add("--batch_size", type=int, help="pictures drawn at once: 5")
    add("--device", help="where to run: the accelerator if there is one")


def _run_diffusion(options: argparse.Namespace, output: Path) -> str:
    given = {name: value for name, value in vars(options).items() if name in _CHECK_FIELDS}
    return run_check(DiffusionCheck(**given), output)


COMMANDS = {
    **{
        name: Command(f"DATA is {each.data}.", _add_erasing, _run_protocol)
        for name, each in PROTOCOLS.items()
    },
    "diffusion": Command(MODELS, _add_diffusion, _run_diffusion),
    "utility": Command(
        "; ".join(f"--{name}: {data}" for name, data in DATA.items()) + ".",
        _add_utility,
        _run_utility,
        "utility.md",
    ),
    "salmubench": Command(
        f"DATA is {SALMUBENCH_DATA}. --imagenet: {IMAGENET_DATA}.", _add_salmubench, _run_salmubench
    ),
}

if __name__ == "__main__":
    exit_with(main)
