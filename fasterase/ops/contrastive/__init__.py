"""The contrastive operator: per-sample InfoNCE and KL, both ways. README.md derives it."""

from fasterase.ops.contrastive.api import contrastive, explain_backend
from fasterase.ops.contrastive.backends import BackendChoice, available_backends
from fasterase.ops.contrastive.dense import Contrastive

__all__ = [
    "BackendChoice",
    "Contrastive",
    "available_backends",
    "contrastive",
    "explain_backend",
]
