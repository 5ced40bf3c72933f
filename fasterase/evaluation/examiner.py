"""The tasks and attacks by name; run the chosen ones on each model, and compare what they find.

A new one is a function from a `Target` to what it `Examined`, and an entry in `TASKS` or `ATTACKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError, import_extra
from fasterase.evaluation import tasks as task
from fasterase.evaluation.attacks.features import membership, probe, swap
from fasterase.evaluation.attacks.prompt import prompt
from fasterase.evaluation.attacks.weights import quantise, relearn
from fasterase.evaluation.evaluator import Evaluator, sampled_rows
from fasterase.evaluation.findings import (
    NON_MEMBERS,
    Examined,
    Finding,
    Findings,
    Target,
    UnsuitableModelError,
)
from fasterase.option_values import parse_names
from fasterase.pairs.table import PairTable
from fasterase.progress import say

TASKS: dict[str, Callable[[Target], Examined]] = {
    "zero_shot": task.zero_shot,
    "retrieval": task.retrieval,
    "image_retrieval": task.image_retrieval,
    "linear_probe": task.linear_probe,
    "prototypes": task.prototypes,
    "paraphrases": task.paraphrases,
}
ATTACKS: dict[str, Callable[[Target], Examined]] = {
    "swap": swap,
    "probe": probe,
    "quantise": quantise,
    "relearn": relearn,
    "prompt": prompt,
    "membership": membership,
}
NEED_SKLEARN = ("linear_probe", "probe")
NEEDS = {  # attack -> what it is given besides the pairs
    "swap": ("original", "the model before erasing. Pass it"),
    "membership": (
        "non_members",
        "pairs of the same source that no model was trained on. Pass them",
    ),
}


def check_tasks(names: Sequence[str]) -> list[str]:
    """Return the distinct names of tasks, in order; raises as `check_attacks`."""
    return _parse_names("tasks", names, TASKS)


def check_attacks(names: Sequence[str], *, original: bool, non_members: bool) -> list[str]:
    """Return the distinct names of attacks, in order.

    `original` and `non_members` say whether these are given. Raises `InputError` for an unknown
    name, for what an attack lacks and for what none needs; `MissingExtraError` for a package.
    """
    chosen = _parse_names("attacks", names, ATTACKS)
    given = {"original": original, "non_members": non_members}
    for name in chosen:
        argument, meaning = NEEDS.get(name, ("", ""))
        if argument and not given[argument]:
            raise InputError(
                f"attacks: {name!r} needs {meaning} as {argument}=, or leave {name!r} out."
            )
    if non_members and "membership" not in chosen:
        raise InputError(
            "non_members: none of the attacks uses them. Add 'membership' to attacks=, or leave "
            "non_members out."
        )
    return chosen


def _parse_names(argument: str, names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    chosen = parse_names(argument, names, known)
    for name in chosen:
        if name in NEED_SKLEARN:  # now, not after minutes of measuring
            import_extra("sklearn", "eval", f"{argument}: {name!r}")
    return chosen


class Examiner:
    """Runs tasks and attacks on models one after the other: the original first, if there is one.

    Args:
        tasks, attacks: names, checked.
        evaluator: has measured, or will measure, the models on its pairs.
        non_members: pairs that no model was trained on; as many as the evaluator measures of a set.

    Raises:
        InputError: no retain pair is unrelated to the sets to forget.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        tasks: Sequence[str] = (),
        attacks: Sequence[str] = (),
        non_members: PairTable | None = None,
    ) -> None:
        if attacks and not evaluator.judge.rows:
            raise InputError(
                "attacks: every caption of `retain` is also one to forget, so there is nothing to "
                "compare with. Give retain pairs with other captions, or no attacks."
            )
        self._evaluator = evaluator
        self._non_members = non_members
        # Features alone: of models given by name only one is in memory at a time.
        self._original: Mapping[str, PairFeatures] | None = None
        self._found: dict[str, dict[str, Examined]] = {name: {} for name in (*tasks, *attacks)}

    def examine(
        self, name: str, encoder: PairEncoder, features: Mapping[str, PairFeatures]
    ) -> None:
        """Run all tasks and attacks on one model, which is left as it is; see `Target`.

        Raises:
            InputError: one of them cannot be run on the model.
        """
        if not self._found:
            return
        evaluator, others = self._evaluator, self._non_members
        if others is not None:
            rows = sampled_rows(len(others), evaluator.max_pairs, seed=evaluator.seed)
            strangers = encoder.pairs(others, rows, description="measuring (non-members)")
            features = {**features, NON_MEMBERS: strangers}
        if name == "original":
            self._original = features
        target = Target(name, encoder, features, self._original, evaluator)
        for key, found in self._found.items():
            began = time.monotonic()
            try:
                findings, series = (TASKS | ATTACKS)[key](target)
            except UnsuitableModelError:
                if name == "model":
                    raise
                continue
            if findings:
                first, seconds = findings[0], time.monotonic() - began
                say(f"{key} of {name}: {first.title} {first.format(first.value)}", since=began)
                findings.append(Finding("seconds", "cost", "seconds", "seconds", "", seconds))
            found[name] = Examined(findings, [replace(each, model=name) for each in series])

    def results(self) -> dict[str, Any]:
        """Return the fields `tasks`, `attacks` and `series` of an evaluation, the model's first."""
        fields: dict[str, Any] = {"tasks": {}, "attacks": {}, "series": {}}
        for key, found in self._found.items():
            fields["tasks" if key in TASKS else "attacks"][key] = _side_by_side(found)
            models = sorted(found, key=lambda name: name != "model")
            series = [each for name in models for each in found[name].series]
            if series:
                fields["series"][key] = series
        return fields


def _side_by_side(found: Mapping[str, Examined]) -> Findings:
    by_key = {name: {each.key: each for each in those.findings} for name, those in found.items()}
    merged = {}
    for key, finding in by_key.pop("model").items():
        same = {name: findings[key] for name, findings in by_key.items() if key in findings}
        values = {name: other.value for name, other in same.items()}
        merged[key] = replace(
            finding,
            original=values.pop("original", None),
            references=values,
            other_intervals={
                name: [other.low, other.high]
                for name, other in same.items()
                if other.low is not None and other.high is not None
            },
        )
    return merged
