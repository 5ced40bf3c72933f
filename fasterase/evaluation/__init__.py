"""How much a model knows of the pairs to forget, and what was damaged besides."""

from __future__ import annotations

from fasterase.evaluation.api import evaluate
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.evaluator import Evaluator, Measurement

__all__ = ["Evaluation", "Evaluator", "Measurement", "evaluate"]
