"""Erasing recipes against each other, on concepts that none of them was tuned on."""
