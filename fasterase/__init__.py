"""fasterase: make a CLIP model forget chosen image-text associations, fast, and prove it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout kernels/ and csrc/ sit beside this folder; an installed wheel has them inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from fasterase.api import evaluate as evaluate
    from fasterase.api import unlearn as unlearn
    from fasterase.config import UnlearnConfig as UnlearnConfig
    from fasterase.errors import DiskFullError as DiskFullError
    from fasterase.errors import FaseraseError as FaseraseError
    from fasterase.errors import InputError as InputError
    from fasterase.errors import MissingExtraError as MissingExtraError
    from fasterase.errors import NonFiniteError as NonFiniteError
    from fasterase.errors import PreemptedError as PreemptedError
    from fasterase.errors import ResumeError as ResumeError
    from fasterase.finder.find import find as find
    from fasterase.finder.found import Found as Found
    from fasterase.losses import ClipLoss as ClipLoss
    from fasterase.losses import DistillClipLoss as DistillClipLoss
    from fasterase.models.delta import apply_delta as apply_delta
    from fasterase.objective import EraseLoss as EraseLoss
    from fasterase.objective import erase_loss as erase_loss
    from fasterase.ops.contrastive import Contrastive as Contrastive
    from fasterase.ops.contrastive import available_backends as available_backends
    from fasterase.ops.contrastive import contrastive as contrastive
    from fasterase.ops.contrastive import explain_backend as explain_backend
    from fasterase.pairs.split import split as split
    from fasterase.planner.plan import Plan as Plan
    from fasterase.planner.plan import plan as plan
    from fasterase.report.evaluation import Evaluation as Evaluation
    from fasterase.result import UnlearnResult as UnlearnResult

__version__ = "0.1.0"

# Imported when first used, so that `fasterase --help` and a mistyped flag need not wait for torch.
_NAMES = {
    "fasterase.api": ("unlearn", "evaluate"),
    "fasterase.result": ("UnlearnResult",),
    "fasterase.config": ("UnlearnConfig",),
    "fasterase.report.evaluation": ("Evaluation",),
    "fasterase.pairs.split": ("split",),
    "fasterase.finder.find": ("find",),
    "fasterase.finder.found": ("Found",),
    "fasterase.planner": ("plan", "Plan"),
    "fasterase.models.delta": ("apply_delta",),
    "fasterase.objective": ("erase_loss", "EraseLoss"),
    "fasterase.losses": ("ClipLoss", "DistillClipLoss"),
    "fasterase.ops.contrastive": (
        *("contrastive", "Contrastive", "available_backends", "explain_backend"),
    ),
    "fasterase.errors": (
        *("FaseraseError", "InputError", "MissingExtraError", "ResumeError"),
        *("DiskFullError", "NonFiniteError", "PreemptedError"),
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fasterase' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
