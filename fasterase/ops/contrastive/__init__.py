"""The contrastive operator: per-sample InfoNCE and KL, both ways. README.md derives it."""

from fasterase.ops.contrastive.api import (
    BackendChoice,
    Weighted,
    available_backends,
    contrastive,
    explain_backend,
    weighted_contrastive,
)
from fasterase.ops.contrastive.dense import Contrastive

__all__ = [
    "BackendChoice",
    "Contrastive",
    "Weighted",
    "available_backends",
    "contrastive",
    "explain_backend",
    "weighted_contrastive",
]
