"""The whole method on one page: CLIPErase (Yang et al., ACL 2025) in plain PyTorch.

    python examples/the_method.py --steps 40

A model that learnt which texts go with which images forgets some of these pairs:

    L = 3 L_F + 1 L_R + 3 L_C
    L_F  forget:      mean cosine of the image and the text of a pair to forget
    L_R  retain:      CLIP's own loss over the pairs to keep, so that it stays as skilled
    L_C  consistency: KL(original || current) of their similarities, so that it stays as it was

`fasterase.erase_loss` has the same values and gradients without an N x N matrix, and
`fasterase.unlearn` adds what the paper lacks: it stops where a pair is unrelated, and keeps what is
in neither set.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

import fasterase

DEMO = files("fasterase.demo")


class Features(NamedTuple):
    """What a CLIP model makes of N pairs."""

    image: Tensor  # [N, D] unit rows
    text: Tensor  # [N, D] unit rows
    scale: Tensor  # [] exp(logit_scale), the inverse temperature


def encode(model: Any, images: Tensor, tokens: Tensor) -> Features:
    """Run both towers of an open_clip model."""
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(tokens, normalize=True)
    return Features(image.float(), text.float(), model.logit_scale.exp())


def erase_loss(
    now: Features,
    original: Features,  # of the same pairs, without gradients
    labels: Tensor,  # [N] equal for equal texts
    n_forget: int,  # the first rows are pairs to forget, the others are to be kept
    weights: tuple[float, float, float] = (3.0, 1.0, 3.0),
) -> Tensor:
    """Return CLIPErase's loss, weights[0] * L_F + weights[1] * L_R + weights[2] * L_C."""
    forget = (now.image[:n_forget] * now.text[:n_forget]).sum(1).mean()

    logits, before = (
        scale * image[n_forget:] @ text[n_forget:].T for image, text, scale in (now, original)
    )  # [R, R]
    kept = labels[n_forget:]
    target = (kept[:, None] == kept).to(logits.dtype)  # the same text again is no negative
    target /= target.sum(1, keepdim=True)
    retain = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    consistency = divergence(before, logits) + divergence(before.T, logits.T)
    return weights[0] * forget + weights[1] * retain + weights[2] * consistency


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """Return the mean over rows of KL(softmax(before) || softmax(now))."""
    log_p, log_q = before.log_softmax(1), now.log_softmax(1)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def main(arguments: list[str] | None = None) -> None:
    """Erase some fruit from the small CLIP and the emoji that ship with fasterase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forget", default="apple|banana|grapes|melon|pear", help="of captions")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=64, help="pairs to keep in a step")
    parser.add_argument("--lr", type=float, default=3e-5, help="the paper: 1e-6")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    name = f"local-dir:{DEMO / 'models' / 'base'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    forget, retain = fasterase.split(str(DEMO / "data" / "noto-000.tar"), forget=options.forget)
    pairs = [*forget, *retain]
    texts = [pair.text for pair in pairs]
    images = torch.stack([preprocess(pair.image) for pair in pairs])
    tokens = open_clip.get_tokenizer(name)(texts)
    labels = torch.tensor([texts.index(text) for text in texts])

    model.eval().logit_scale.requires_grad_(False)
    with torch.no_grad():
        original = encode(model, images, tokens)  # frozen, so it runs once
    print_known("before", original, labels, len(forget))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.lr, betas=(0.9, 0.98))
    for _ in range(options.steps):
        kept = len(forget) + torch.randperm(len(retain))[: options.batch_size]
        rows = torch.cat([torch.arange(len(forget)), kept])
        now = encode(model, images[rows], tokens[rows])
        before = Features(original.image[rows], original.text[rows], original.scale)
        loss = erase_loss(now, before, labels[rows], len(forget))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        print_known("after", encode(model, images, tokens), labels, len(forget))


def print_known(when: str, features: Features, labels: Tensor, n_forget: int) -> None:
    """Print how many images of either set are nearest to their own text."""
    nearest = (features.image @ features.text.T).argmax(1)
    known = (labels[nearest] == labels).float()
    forget, retain = known[:n_forget].mean(), known[n_forget:].mean()
    print(f"{when}: {forget:.1%} of the pairs to forget are known, {retain:.1%} of those to keep")


if __name__ == "__main__":
    main()
