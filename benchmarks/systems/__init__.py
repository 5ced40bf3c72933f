"""Whole erasures, reading pairs, memory, and what is to be done on a machine with a GPU."""
