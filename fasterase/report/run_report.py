"""A run in one Markdown page: recipe, losses, what was forgotten and what else changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig
from fasterase.files import write_text

TERMS = ("total", "forget", "retain", "consistency", "anchor")


def describe_recipe(config: UnlearnConfig) -> str:
    """The recipe by name, and the fields in which it differs from that."""
    recipes = {
        "fasterase defaults": UnlearnConfig(),
        "cliperase (the paper's)": UnlearnConfig.cliperase(),
    }
    changes = {name: _changes(config, base) for name, base in recipes.items()}
    name = min(changes, key=lambda key: len(changes[key]))
    changed = ", ".join(f"{field}={value!r}" for field, value in changes[name].items())
    return f"{name}; {changed}" if changed else name


# Where a run keeps its files and how it shows itself is not part of its recipe.
_NOT_RECIPE = {"output_dir", "reference_cache", "progress", "num_workers", "resume", "save_every"}


def _changes(config: UnlearnConfig, base: UnlearnConfig) -> dict[str, Any]:
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NOT_RECIPE
        and getattr(config, field.name) != getattr(base, field.name)
    }


def settings_yaml(config: UnlearnConfig) -> str:
    """All fields, as `UnlearnConfig.from_yaml` reads them."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def run_report(
    path: Path,
    *,
    config: UnlearnConfig,
    history: Sequence[Mapping[str, Any]],
    evaluation: str | None,
    forgotten: bool,
    floor: float,
    excess: float,
    skipped: Sequence[tuple[str, str]],
    removed_from_retain: Sequence[str],
    seconds: float,
) -> None:
    """Write the report to `path` (Markdown)."""
    lines = [
        "# Erasure report",
        "",
        f"- forgotten: **{'yes' if forgotten else 'no'}** (mean excess of matched forget cosines "
        f"over the floor {floor:+.3f}: {excess:.4f}; below 0.01 counts as forgotten)",
        f"- steps: {len(history)}, {seconds:.1f} s in all",
        f"- recipe: {describe_recipe(config)}",
        f"- unreadable pairs skipped: {len(skipped)}",
        f"- retain pairs left out because they are also in the forget set: "
        f"{len(removed_from_retain)}",
        "",
    ]
    if history:
        lines += ["## Losses", "", "| | " + " | ".join(TERMS) + " |", "|---" * 6 + "|"]
        for label, record in (("first step", history[0]), ("last step", history[-1])):
            lines.append(f"| {label} | " + " | ".join(f"{record[t]:.4f}" for t in TERMS) + " |")
        lines.append("")
    if evaluation is not None:
        lines += ["## Evaluation", "", "```", evaluation, "```", ""]
    lines += ["## Settings", "", "```yaml"]
    lines += [settings_yaml(config) + "```", ""]
    if skipped:
        lines += ["## Skipped pairs", ""] + [f"- {id}: {reason}" for id, reason in skipped] + [""]
    write_text(path, "\n".join(lines))
