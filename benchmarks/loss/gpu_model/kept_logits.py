"""What logits kept in 16 bits between the passes would cost in accuracy.

    python -m benchmarks.loss.gpu_model.kept_logits

A step could keep its [N, N] logits between the passes and save two of its products per matrix
(`cost_model` predicts the gain, "if kept"). Memory allows 16 bits only. This command computes in
fp64 the gradient of an objective (InfoNCE and 3 x KL) with nothing but the kept matrices rounded,
beside the gradient with rounded features that the kernels compute. It writes
`benchmarks/results/kept_logits.csv`: relative errors of d_image (norm).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.command import exit_with
from benchmarks.result_files import RESULTS, write_csv

N, WIDTH, SCALE, SEEDS = 512, 512, 100.0, 5
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """Unit features of the original and of a model that was trained further, [N, WIDTH] each."""

    ref_image: Tensor
    ref_text: Tensor
    image: Tensor
    text: Tensor


def make_case(drift: float, moved: float, seed: int) -> Case:
    """Features with a real CLIP's statistics: cosines near 0.32 where matched, else 0.13 +- 0.05.

    `drift` is the length of a random change of every feature, `moved` the share of the images whose
    association was moved to another pair's caption.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared = 0.55 * noise(N, 64) @ noise(64, WIDTH) / 8 + 0.4 * noise(1, WIDTH)
    ref_image, ref_text = (normalize(shared + noise(N, WIDTH)) for _ in range(2))
    image, text = (
        normalize(x + drift * noise(N, WIDTH) / WIDTH**0.5) for x in (ref_image, ref_text)
    )
    count = round(moved * N)
    image[:count] = normalize(image[:count].roll(1, 0) + 0.5 * image[:count])
    return Case(ref_image, ref_text, image, text)


def find_errors(case: Case) -> Iterator[tuple[str, float]]:
    """Yield (what is rounded, relative error of the gradient)."""
    s, s0 = _logits(case.image, case.text), _logits(case.ref_image, case.ref_text)
    row, col = s.logsumexp(1, keepdim=True), s.logsumexp(0, keepdim=True)
    row0, col0 = s0.logsumexp(1, keepdim=True), s0.logsumexp(0, keepdim=True)
    exact = _gradient(case.text, s - row, s - col, s0 - row0, s0 - col0)

    def error(found: Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    features = Case(*(x.half().double() for x in case))
    t, t0 = _logits(features.image, features.text), _logits(features.ref_image, features.ref_text)
    launched = (t.log_softmax(1), t.log_softmax(0), t0.log_softmax(1), t0.log_softmax(0))
    yield "features, fp16 (as launched)", error(_gradient(case.text, *launched))
    for name, dtype in DTYPES.items():
        kept, kept0 = s.to(dtype).double(), s0.to(dtype).double()
        found = _gradient(case.text, kept - row, kept - col, kept0 - row0, kept0 - col0)
        yield f"S and S0, {name}", error(found)
        share = (s0 - row0).exp().to(dtype).double().log()  # -inf where it underflows
        change = (s0 - s).to(dtype).double()
        again = share + row0 - change
        found = _gradient(case.text, again - row, again - col, share, share + row0 - col0)
        yield f"exp(S0 - lse) and S0 - S, {name}", error(found)


def _logits(image: Tensor, text: Tensor) -> Tensor:
    return SCALE * image @ text.T


def _gradient(text: Tensor, row: Tensor, col: Tensor, row0: Tensor, col0: Tensor) -> Tensor:
    """G @ text, from the logarithms of both softmaxes of both matrices."""
    p, q = row.exp(), col.exp()
    of_kl = (p - row0.exp()) + (q - col0.exp())
    return ((p + q) / 2 - torch.eye(N, dtype=p.dtype) + 3 * of_kl) @ text


def main() -> None:
    rows = []
    for drift in (0.02, 0.1, 0.3):
        for moved in (0.0, 0.05):
            errors: dict[str, list[float]] = {}
            for seed in range(SEEDS):
                for name, error in find_errors(make_case(drift, moved, seed)):
                    errors.setdefault(name, []).append(error)
            for name, found in errors.items():
                worst = {"worst_error": f"{max(found):.1e}"}
                rows.append({"rounded": name, "drift": drift, "moved": moved, **worst})
                print(f"drift {drift:<5} moved {moved:<5} {name:<32} {max(found):.1e}")
    write_csv(RESULTS / "kept_logits.csv", rows)


if __name__ == "__main__":
    exit_with(main)
