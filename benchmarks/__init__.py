"""Measurements that the README quotes; each module is a command that makes its results again."""
