"""Measurements that the documentation quotes: erasing recipes, the loss, a model of its kernels."""
