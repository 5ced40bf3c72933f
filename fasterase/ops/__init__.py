"""Tensor operators. Symbols used in their signatures and comments:

N pairs, n pairs of one group, D embedding width (D0 the original model's), scale the logit scale,
already exponentiated, S = scale * image @ text.T the logits. `# [N, D]` is a shape, row-major.
"""
