"""CLIP models of every supported library behind one interface."""

from __future__ import annotations

from fasterase.models.load import load_tower
from fasterase.models.two_tower import Tokens, TwoTower, frozen_copy

__all__ = ["Tokens", "TwoTower", "frozen_copy", "load_tower"]
