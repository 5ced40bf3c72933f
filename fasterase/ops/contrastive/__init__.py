"""The contrastive operator: per-sample InfoNCE and KL, both ways. README.md derives it."""

from fasterase.ops.contrastive.api import contrastive, explain_backend
from fasterase.ops.contrastive.backends import BackendChoice, available_backends
from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.weighted import Weighted, weighted_contrastive

__all__ = [
    "BackendChoice",
    "Contrastive",
    "Weighted",
    "available_backends",
    "contrastive",
    "explain_backend",
    "weighted_contrastive",
]
