"""Run the chosen attacks on each model, and put their figures side by side.

A new attack is a function from a `Target` to figures in a file of this folder, and an entry in
`ATTACKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from fasterase.config import suggest_names
from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError, import_extra
from fasterase.evaluation.attacks.figures import Figure, Figures
from fasterase.evaluation.attacks.probe import probe
from fasterase.evaluation.attacks.quantise import quantise
from fasterase.evaluation.attacks.swap import swap
from fasterase.evaluation.attacks.target import Target
from fasterase.evaluation.evaluator import Evaluator


class Attack(NamedTuple):
    """How an attack is run."""

    run: Callable[[Target], list[Figure]]
    needs_original: bool = False
    needs_module: str | None = None  # of the extra `eval`


ATTACKS: dict[str, Attack] = {
    "swap": Attack(swap, needs_original=True),
    "probe": Attack(probe, needs_module="sklearn"),
    "quantise": Attack(quantise),
}


def check_attacks(names: Sequence[str], *, original: bool) -> list[str]:
    """Return the distinct names of attacks, in order.

    Args:
        names: what the caller gave as `attacks`.
        original: whether the original is among the models.

    Raises:
        InputError: a name is unknown, or what an attack needs is missing.
        MissingExtraError: an attack needs a package that is not installed.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(
            f"attacks={names!r}: expected a list of names. Known: {', '.join(ATTACKS)}."
        )
    for name in names:
        if name not in ATTACKS:
            hint = suggest_names(name, ATTACKS, otherwise=f"Known: {', '.join(ATTACKS)}.")
            raise InputError(f"attacks: unknown attack {name!r}.{hint}")
        attack = ATTACKS[name]
        if attack.needs_original and not original:
            raise InputError(
                f"attacks: {name!r} needs the model before erasing. Pass it as original=, or leave "
                f"{name!r} out."
            )
        if attack.needs_module is not None:  # now, not after minutes of measuring
            import_extra(attack.needs_module, "eval", f"attacks: {name!r}")
    return list(dict.fromkeys(names))


class Attacker:
    """Attacks models one after the other: the original first, if there is one.

    Args:
        names: names of attacks, checked.
        evaluator: has measured, or will measure, the models on its pairs.

    Raises:
        InputError: no retain pair is unrelated to the sets to forget.
    """

    def __init__(self, names: Sequence[str], evaluator: Evaluator) -> None:
        if names and not evaluator.judge.rows:
            raise InputError(
                "attacks: every caption of `retain` is also one to forget, so there is nothing to "
                "compare with. Give retain pairs with other captions, or no attacks."
            )
        self._names = names
        self._evaluator = evaluator
        self._original: Mapping[str, PairFeatures] | None = None
        self._found: dict[str, dict[str, Figures]] = {name: {} for name in names}

    def attack(self, name: str, encoder: PairEncoder, features: Mapping[str, PairFeatures]) -> None:
        """Run all attacks on one model.

        Args:
            name: `"model"`, `"original"` or the name of a reference.
            encoder: the model, which is left as it is.
            features: set -> its features of the evaluator's pairs.

        Raises:
            InputError: an attack cannot be run on the model.
        """
        if not self._names:
            return
        if name == "original":
            self._original = features
        target = Target(name, encoder, features, self._original, self._evaluator)
        for attack in self._names:
            start = time.perf_counter()
            figures = ATTACKS[attack].run(target)
            seconds = time.perf_counter() - start
            if figures:
                figures.append(Figure("seconds", "cost", "seconds", "seconds", "", seconds))
            self._found[attack][name] = {figure.key: figure for figure in figures}

    def figures(self) -> dict[str, Figures]:
        """Return attack -> the model's figures beside those of all others."""
        return {name: _side_by_side(found) for name, found in self._found.items()}


def _side_by_side(found: Mapping[str, Figures]) -> Figures:
    others = {name: figures for name, figures in found.items() if name != "model"}
    merged = {}
    for key, figure in found["model"].items():
        values = {name: figures[key].value for name, figures in others.items() if key in figures}
        original = values.pop("original", None)
        merged[key] = replace(figure, original=original, references=values)
    return merged
