"""Run one of the paper's protocols on a model: `python -m fasterase.protocols cifar100 --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fasterase.config import UnlearnConfig
from fasterase.errors import FaseraseError
from fasterase.protocols.cc12m import CC12M
from fasterase.protocols.cifar100 import CIFAR
from fasterase.protocols.flickr30k import FLICKR
from fasterase.protocols.protocol import TABLE, Protocol, run_protocol

# A new protocol is one file and one entry here.
PROTOCOLS: dict[str, Protocol] = {"cifar100": CIFAR, "flickr30k": FLICKR, "cc12m": CC12M}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m fasterase.protocols",
        description="Repeat an experiment of CLIPErase (Yang et al., ACL 2025) with any model.",
        epilog="\n\n".join(f"{name}: DATA is {each.data}." for name, each in PROTOCOLS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--model", required=True, help="as in `fasterase unlearn`")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--output", type=Path, help="folder of the results: runs/PROTOCOL")
    parser.add_argument("--concept", help="what to erase instead of the protocol's own choice")
    parser.add_argument("--cases", nargs="+", default=[], help="run only these cases")
    parser.add_argument("--recipe", choices=("fasterase", "cliperase"), default="fasterase")
    parser.add_argument("--config", type=Path, help="YAML file of the recipe's fields instead")
    parser.add_argument("--max_pairs", type=int, default=5000, help="pairs measured of each set")
    options = parser.parse_args(argv)
    try:
        if options.config is not None:
            config = UnlearnConfig.from_yaml(options.config)
        else:
            cliperase = options.recipe == "cliperase"
            config = UnlearnConfig.cliperase() if cliperase else UnlearnConfig()
        output = options.output or Path("runs") / options.protocol
        table = run_protocol(
            PROTOCOLS[options.protocol],
            options.model,
            options.data,
            output,
            config=config,
            concept=options.concept,
            only=options.cases,
            max_pairs=options.max_pairs,
        )
    except FaseraseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{table}\nWritten to {output / TABLE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
