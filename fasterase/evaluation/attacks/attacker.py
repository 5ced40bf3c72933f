"""Run the chosen attacks on each model, and put their figures side by side.

A new attack is a function from a `Target` to what it found in a file of this folder, and an entry
in `ATTACKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from fasterase.config import suggest_names
from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError, import_extra
from fasterase.evaluation.attacks.figures import Figure, Figures, Found
from fasterase.evaluation.attacks.membership import membership
from fasterase.evaluation.attacks.probe import probe
from fasterase.evaluation.attacks.prompt import prompt
from fasterase.evaluation.attacks.quantise import quantise
from fasterase.evaluation.attacks.relearn import relearn
from fasterase.evaluation.attacks.swap import swap
from fasterase.evaluation.attacks.target import Target
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.features import sampled_rows
from fasterase.pairs.source import PairSource
from fasterase.report.curves import Series


class Attack(NamedTuple):
    """How an attack is run."""

    run: Callable[[Target], Found]
    needs_original: bool = False
    needs_non_members: bool = False
    needs_module: str | None = None  # of the extra `eval`


ATTACKS: dict[str, Attack] = {
    "swap": Attack(swap, needs_original=True),
    "probe": Attack(probe, needs_module="sklearn"),
    "quantise": Attack(quantise),
    "relearn": Attack(relearn),
    "prompt": Attack(prompt),
    "membership": Attack(membership, needs_non_members=True, needs_module="sklearn"),
}


def check_attacks(names: Sequence[str], *, original: bool, non_members: bool) -> list[str]:
    """Return the distinct names of attacks, in order.

    Args:
        names: what the caller gave as `attacks`.
        original: whether the original is among the models.
        non_members: whether there are pairs that no model was trained on.

    Raises:
        InputError: a name is unknown, what an attack needs is missing, or no attack needs what was
            given for one.
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
        if attack.needs_non_members and not non_members:
            raise InputError(
                f"attacks: {name!r} needs pairs of the same source that no model was trained on. "
                f"Pass them as non_members=, or leave {name!r} out."
            )
        if attack.needs_module is not None:  # now, not after minutes of measuring
            import_extra(attack.needs_module, "eval", f"attacks: {name!r}")
    if non_members and not any(ATTACKS[name].needs_non_members for name in names):
        raise InputError(
            "non_members: none of the attacks uses them. Add 'membership' to attacks=, or leave "
            "non_members out."
        )
    return list(dict.fromkeys(names))


class Attacker:
    """Attacks models one after the other: the original first, if there is one.

    Args:
        names: names of attacks, checked.
        evaluator: has measured, or will measure, the models on its pairs.
        non_members: pairs that no model was trained on; as many as the evaluator measures of a set.

    Raises:
        InputError: no retain pair is unrelated to the sets to forget.
    """

    def __init__(
        self, names: Sequence[str], evaluator: Evaluator, *, non_members: PairSource | None = None
    ) -> None:
        if names and not evaluator.judge.rows:
            raise InputError(
                "attacks: every caption of `retain` is also one to forget, so there is nothing to "
                "compare with. Give retain pairs with other captions, or no attacks."
            )
        self._names = names
        self._evaluator = evaluator
        self._non_members = non_members
        self._original: Mapping[str, PairFeatures] | None = None
        self._original_non_members: PairFeatures | None = None
        self._found: dict[str, dict[str, Figures]] = {name: {} for name in names}
        self._series: dict[str, list[Series]] = {name: [] for name in names}

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
        strangers = self._encode_non_members(encoder)
        if name == "original":
            self._original, self._original_non_members = features, strangers
        target = Target(
            name,
            encoder,
            features,
            self._original,
            strangers,
            self._original_non_members,
            self._evaluator,
        )
        for attack in self._names:
            start = time.perf_counter()
            figures, series = ATTACKS[attack].run(target)
            seconds = time.perf_counter() - start
            if figures:
                figures.append(Figure("seconds", "cost", "seconds", "seconds", "", seconds))
            self._found[attack][name] = {figure.key: figure for figure in figures}
            self._series[attack] += [replace(each, model=name) for each in series]

    def _encode_non_members(self, encoder: PairEncoder) -> PairFeatures | None:
        if self._non_members is None:
            return None
        evaluator = self._evaluator
        rows = sampled_rows(len(self._non_members), evaluator.max_pairs, seed=evaluator.seed)
        return encoder.pairs(self._non_members, rows, description="measuring (non-members)")

    def figures(self) -> dict[str, Figures]:
        """Return attack -> the model's figures beside those of all others."""
        return {name: _side_by_side(found) for name, found in self._found.items()}

    def series(self) -> dict[str, list[Series]]:
        """Return attack -> what its plot shows, the model first; without attacks that have none."""
        return {
            name: sorted(those, key=lambda each: each.model != "model")
            for name, those in self._series.items()
            if those
        }


def _side_by_side(found: Mapping[str, Figures]) -> Figures:
    others = {name: figures for name, figures in found.items() if name != "model"}
    merged = {}
    for key, figure in found["model"].items():
        same = {name: figures[key] for name, figures in others.items() if key in figures}
        values = {name: other.value for name, other in same.items()}
        original = values.pop("original", None)
        intervals = {
            name: [other.low, other.high]
            for name, other in same.items()
            if other.low is not None and other.high is not None
        }
        merged[key] = replace(
            figure, original=original, references=values, other_intervals=intervals
        )
    return merged
