"""Erasing links: what belongs to a face goes, the face, its name and everybody else stay."""
