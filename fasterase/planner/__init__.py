"""What an erasure costs, from the model's architecture alone."""

from __future__ import annotations

from fasterase.planner.plan import Plan, plan

__all__ = ["Plan", "plan"]
