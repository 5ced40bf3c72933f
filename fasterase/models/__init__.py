"""CLIP models of every supported library behind one interface."""

from __future__ import annotations

from fasterase.models.dual_encoder import DualEncoder, Tokens, frozen_copy
from fasterase.models.load import load_model

__all__ = ["DualEncoder", "Tokens", "frozen_copy", "load_model"]
