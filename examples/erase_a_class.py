"""Erase a class of things from a CLIP model, check the result and save it.

    python examples/erase_a_class.py
    python examples/erase_a_class.py --model ViT-B-32/laion2b_s34b_b79k --pairs pairs.csv \\
        --forget '\\bapples?\\b' --output erased

Without arguments it erases some fruit from the small CLIP and the emoji that ship with fasterase.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import fasterase

DEMO = files("fasterase.demo")


def main(arguments: list[str] | None = None) -> fasterase.UnlearnResult:
    """Split the pairs, erase, print what changed, save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO / "models" / "base"))
    parser.add_argument("--pairs", default=str(DEMO / "data" / "noto-*.tar"))
    parser.add_argument("--forget", default="apple|banana|grapes|melon|pear", help="of captions")
    parser.add_argument("--max_steps", type=int, help="by default until it is forgotten")
    parser.add_argument("--output", default="runs/example", help="folder of the run")
    options = parser.parse_args(arguments)

    forget, retain = fasterase.split(options.pairs, forget=options.forget)
    print(f"{len(forget)} pairs to forget, {len(retain)} to keep")
    result = fasterase.unlearn(
        options.model,
        forget,
        retain,
        max_steps=options.max_steps,
        batch_size=128,
        forget_batch_size=32,
        output_dir=options.output,  # holds the model, the history and checkpoints to resume from
    )
    assert result.evaluation is not None
    before, after = result.evaluation.original, result.evaluation.to_dict()
    assert before is not None
    for name, metric in (("forget", "concept_hit@1"), ("retain", "image_to_text_recall@1")):
        print(f"{name}: {metric} {before[name][metric]:.1%} -> {after[name][metric]:.1%}")
    print(f"verdict: {result.verdict}; the model is in {options.output}/model")
    return result


if __name__ == "__main__":
    main()
