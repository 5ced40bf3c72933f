"""Measurements that the documentation quotes, a folder per topic."""
