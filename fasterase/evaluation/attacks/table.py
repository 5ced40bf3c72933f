"""The attacks by name.

A new attack is a function from a `Target` to what it found in a file of this folder, and an entry
in `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fasterase.errors import InputError, import_extra
from fasterase.evaluation.attacks.membership import membership
from fasterase.evaluation.attacks.probe import probe
from fasterase.evaluation.attacks.prompt import prompt
from fasterase.evaluation.attacks.quantise import quantise
from fasterase.evaluation.attacks.relearn import relearn
from fasterase.evaluation.attacks.swap import swap
from fasterase.evaluation.figures import Found
from fasterase.evaluation.target import Target
from fasterase.option_values import parse_names


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
    chosen = parse_names("attacks", names, ATTACKS)
    for name in chosen:
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
    if non_members and not any(ATTACKS[name].needs_non_members for name in chosen):
        raise InputError(
            "non_members: none of the attacks uses them. Add 'membership' to attacks=, or leave "
            "non_members out."
        )
    return chosen
