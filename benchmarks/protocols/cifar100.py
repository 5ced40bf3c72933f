"""CIFAR-100: one class, several classes, and a part of a class's pictures; zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fasterase
from benchmarks.protocols.protocol import ACCURACIES, Case, Protocol, Reported
from fasterase.errors import InputError

CLASS = "apple"
SEVERAL = ("apple", "mushroom", "orange", "pear", "sweet pepper")
# Shares of the class's training pictures that the eraser is given.
RATIOS = (0.5, 0.1)
DATA = (
    "the folder `cifar-100-python` (`train`, `test`, `meta`), which torchvision downloads: python "
    "-c \"import torchvision; torchvision.datasets.CIFAR100('DATA', download=True)\""
)


def cases(data: Path, concept: str | None) -> Iterator[Case]:
    """Yield the cases: test pictures are never trained on.

    Raises:
        InputError: the data is missing, or `concept` is not a class.
    """
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(str(data), train=each, download=False) for each in (True, False))
    except RuntimeError as error:
        raise InputError(f"--data={str(data)!r} holds no CIFAR-100. Put there {DATA}.") from error
    names = [name.replace("_", " ") for name in train.classes]
    if concept is not None and concept not in names:
        raise InputError(f"--concept {concept!r} is no class of CIFAR-100: {', '.join(names)}.")
    one = concept or CLASS
    chosen: dict[str, tuple[tuple[str, ...], float]] = {one: ((one,), 1.0)}
    if concept is None:
        chosen["fruit and vegetables"] = (SEVERAL, 1.0)
        chosen |= {f"{one}, {ratio:.0%} of the pictures": ((one,), ratio) for ratio in RATIOS}
    for name, (classes, ratio) in chosen.items():
        forget, retain = fasterase.split(train, forget=list(classes))
        forget_test, retain_test = fasterase.split(test, forget=list(classes))
        yield Case(
            name.replace("%", " percent"),
            forget[: max(1, round(ratio * len(forget)))],
            retain,
            forget_sets={"forget test": forget_test},
            sets={"retain test": retain_test},
            class_names=names,
            reported={
                "forget accuracy, %": Reported(86.08, 0.00),
                "retain accuracy, %": Reported(72.85, 90.99),
            }
            if name == CLASS
            else {},
        )


CIFAR = Protocol(
    cases,
    ACCURACIES,
    DATA,
    "Accuracies are over the names of all 100 classes, on test pictures. The paper's figures are "
    "from third-party notes, for one class with the paper's own choice of CLIP; its class and "
    "prompts are not known to be these.",
)
