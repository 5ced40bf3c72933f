"""Train the small CLIPs of handwriting that the tests start from, and write their weights.

    python -m tools.train_digits [--output tests/data]

Tests load these files: a model that is trained anew differs from CPU to CPU, and with it what an
erasure of it ends with. `python -m benchmarks.robustness` tests that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.command import new_parser
from fasterase.files import replace_file
from tests import digits


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model of each kind."""
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=digits.WEIGHTS)
    options = parser.parse_args(arguments)
    trained, _ = digits.Digits.load()
    for kind in digits.KINDS:
        weights = digits.trained_model(kind, trained).state_dict()
        halves = {
            name: weight.half() if weight.dtype == torch.float32 else weight
            for name, weight in weights.items()
        }
        with replace_file(options.output / f"digits_{kind}.safetensors") as temporary:
            save_file(halves, temporary)


if __name__ == "__main__":
    main()
