"""The tasks by name.

A new task is a function from a `Target` to what it found in a file of this folder, and an entry in
`TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fasterase.errors import import_extra
from fasterase.evaluation.figures import Found
from fasterase.evaluation.target import Target
from fasterase.evaluation.tasks.classify import linear_probe, prototypes, zero_shot
from fasterase.evaluation.tasks.paraphrases import paraphrases
from fasterase.evaluation.tasks.retrieve import image_retrieval, retrieval
from fasterase.option_values import parse_names


class Task(NamedTuple):
    """How a task is run."""

    run: Callable[[Target], Found]
    needs_module: str | None = None  # of the extra `eval`


TASKS: dict[str, Task] = {
    "zero_shot": Task(zero_shot),
    "retrieval": Task(retrieval),
    "image_retrieval": Task(image_retrieval),
    "linear_probe": Task(linear_probe, needs_module="sklearn"),
    "prototypes": Task(prototypes),
    "paraphrases": Task(paraphrases),
}


def check_tasks(names: Sequence[str]) -> list[str]:
    """Return the distinct names of tasks, in order.

    Raises:
        InputError: a name is unknown.
        MissingExtraError: a task needs a package that is not installed.
    """
    chosen = parse_names("tasks", names, TASKS)
    for name in chosen:
        module = TASKS[name].needs_module
        if module is not None:  # now, not after minutes of measuring
            import_extra(module, "eval", f"tasks: {name!r}")
    return chosen
