"""Backends as torch operators: schemas, fake tensors and autograd, registered in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.checks import compute_dtype, scale_tensor
from fasterase.ops.contrastive.dense import Contrastive

_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
_BATCH = (
    "Tensor image, Tensor text, Tensor scale, "
    "Tensor? ref_image, Tensor? ref_text, Tensor? ref_scale"
)

Groups = tuple[int, ...]


class Batch(NamedTuple):
    """What the losses are of; the reference is there whole or not at all."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [] in the dtype of the computation
    ref_image: Tensor | None  # [N, D0]
    ref_text: Tensor | None  # [N, D0]
    ref_scale: Tensor | None  # []

    @classmethod
    def of(
        cls,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        ref_image: Tensor | None,
        ref_text: Tensor | None,
        ref_scale: Tensor | float | None,
    ) -> Batch:
        """From arguments that `checks.check_call` has passed."""
        dtype = compute_dtype(image, text)
        scale = scale_tensor(scale, image, dtype)
        if ref_scale is not None:
            ref_scale = scale_tensor(ref_scale, image, dtype).detach()
        return cls(image, text, scale, ref_image, ref_text, ref_scale)

    @property
    def matrices(self) -> int:
        """S, and S0 where there is a reference."""
        return 1 if self.ref_image is None else 2

    def no_losses(self) -> Contrastive:
        """Of a batch without rows: empty, with gradients of 0 to image, text and scale."""
        dtype = self.scale.dtype
        empty = self.scale * (self.image.to(dtype) + self.text.to(dtype)).sum(1)
        return Contrastive(empty, empty, *((None, None) if self.matrices == 1 else (empty, empty)))

    def requires_grad(self) -> tuple[bool, bool, bool]:
        """Of image, text and scale: whether a gradient can be asked for."""
        if not torch.is_grad_enabled():
            return False, False, False
        return self.image.requires_grad, self.text.requires_grad, self.scale.requires_grad


class Wanted(NamedTuple):
    """Which gradients a backward pass makes, and in which precision."""

    image: bool
    text: bool
    scale: bool
    rounded: bool  # image's and text's to their own dtype, else in that of the computation


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# Losses [2 or 4, N], statistics [matrices, 3, 2 (rows, columns), N] (shift, sums or what follows
# from them, off), and what
# else the backward pass needs.
Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[[Tensor, Batch, tuple[Tensor, ...], Groups, Wanted], Gradients]
Options = Callable[[Batch, Groups, bool], tuple[int, ...]]


def _no_options(batch: Batch, groups: Groups, is_differentiable: bool) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Operator:
    """A backend: its two torch operators. Differentiable once, for any upstream gradients.

    Attributes:
        forward: `(*batch, groups, *options) -> (losses, statistics, *saved)`.
        backward: `(upstream, *batch, statistics, *saved, groups, *wanted) -> (d_image, d_text,
            d_scale)`; of one that is not wanted nothing but the dtype means anything.
        options: of (batch, groups, whether a backward pass may follow); raises InputError where the
            backend cannot take the batch.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    options: Options

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ref_image: Tensor | None,
        ref_text: Tensor | None,
        ref_scale: Tensor | None,
        groups: Groups,  # none empty
    ) -> Contrastive:
        """Same numbers as `contrastive_dense`, the same bits every time."""
        batch = Batch(image, text, scale, ref_image, ref_text, ref_scale)
        options = self.options(batch, groups, any(batch.requires_grad()))
        return per_sample(self.forward(*batch, groups, *options)[0])


def per_sample(losses: Tensor) -> Contrastive:
    """The rows of `losses` [2 or 4, N] by name."""
    ce_row, ce_col, *kl = losses.unbind(0)
    return Contrastive(ce_row, ce_col, *(kl or (None, None)))


def register(
    name: str,
    saved: Mapping[str, Callable[..., Tensor]],
    *,
    key: str | None = None,
    forward: Forward | None = None,
    backward: Backward | None = None,
    options_schema: str = "",
    options: Options = _no_options,
    tags: tuple[torch.Tag, ...] = (),
) -> Operator:
    """Define `fasterase::{name}` and `fasterase::{name}_backward`, with fakes and autograd.

    Args:
        saved: by name, what forward returns beside losses and statistics: a function of
            (batch, groups, *options) that makes an empty tensor like it.
        key: dispatch key of forward and backward, None where C++ registers them.
        forward: of (batch, groups, *options).
        backward: of (upstream, batch, (statistics, *saved), groups, wanted); None for a gradient
            that is not wanted.
        options_schema: of the arguments that `options` gives.
        tags: of both operators, for torch.compile.
    """
    outputs = ", ".join(f"Tensor {output}" for output in ("statistics", *saved))
    more = f", {options_schema}" if options_schema else ""
    _LIBRARY.define(
        f"{name}({_BATCH}, SymInt[] groups{more}) -> (Tensor losses, {outputs})", tags=tags
    )
    _LIBRARY.define(
        f"{name}_backward(Tensor upstream, {_BATCH}, {outputs}, SymInt[] groups, bool wants_image, "
        "bool wants_text, bool wants_scale, bool rounded) "
        "-> (Tensor d_image, Tensor d_text, Tensor d_scale)",
        tags=tags,
    )
    operator = Operator(
        getattr(torch.ops.fasterase, name).default,
        getattr(torch.ops.fasterase, f"{name}_backward").default,
        options,
    )
    if key is not None and forward is not None and backward is not None:
        _LIBRARY.impl(name, _flat_forward(forward), key)
        _LIBRARY.impl(f"{name}_backward", _flat_backward(backward), key)

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        batch, *rest = Batch(*arguments[:6]), *arguments[6:]
        n = batch.image.shape[0]
        return (
            batch.scale.new_empty(2 * batch.matrices, n),
            batch.scale.new_empty(batch.matrices, 3, 2, n),
            *(like(batch, *rest) for like in saved.values()),
        )

    torch.library.register_fake(f"fasterase::{name}", fake, lib=_LIBRARY)
    torch.library.register_fake(f"fasterase::{name}_backward", _fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        f"fasterase::{name}", _autograd(operator), setup_context=_set_up, lib=_LIBRARY
    )
    return operator


def _flat_forward(forward: Forward) -> Callable[..., tuple[Tensor, ...]]:
    def flat(*arguments: Any) -> tuple[Tensor, ...]:
        groups, *options = arguments[6:]
        return forward(Batch(*arguments[:6]), tuple(groups), *options)

    return flat


def _flat_backward(backward: Backward) -> Callable[..., tuple[Tensor, ...]]:
    def flat(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        batch, found, groups, wanted = _split(arguments)
        image, text, scale = backward(upstream, batch, found, groups, wanted)
        return (
            _nothing(batch.image, batch, wanted) if image is None else image,
            _nothing(batch.text, batch, wanted) if text is None else text,
            batch.scale.new_zeros(()) if scale is None else scale,
        )

    return flat


def _fake_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, wanted = _split(arguments)
    image, text = (
        side.new_empty(side.shape, dtype=_dtype(side, batch, wanted))
        if is_wanted
        else _nothing(side, batch, wanted)
        for side, is_wanted in ((batch.image, wanted.image), (batch.text, wanted.text))
    )
    return image, text, batch.scale.new_empty(())


def _split(arguments: tuple[Any, ...]) -> tuple[Batch, tuple[Tensor, ...], Groups, Wanted]:
    """Arguments of the backward operator, but for the first."""
    *tensors, groups, wants_image, wants_text, wants_scale, rounded = arguments
    wanted = Wanted(wants_image, wants_text, wants_scale, rounded)
    return Batch(*tensors[:6]), tuple(tensors[6:]), tuple(groups), wanted


def _dtype(side: Tensor, batch: Batch, wanted: Wanted) -> torch.dtype:
    return side.dtype if wanted.rounded else batch.scale.dtype


def _nothing(side: Tensor, batch: Batch, wanted: Wanted) -> Tensor:
    """In the place of a gradient that is not wanted."""
    return side.new_empty(0, dtype=_dtype(side, batch, wanted))


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.groups, ctx.num_inputs = inputs[6], len(inputs)
    _, *found = output
    ctx.mark_non_differentiable(*found)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *found)


def refusing_second(upstream: Tensor) -> Tensor:
    """What makes `once_differentiable` refuse a second derivative whatever it would be of.

    By itself it does so only where the upstream gradient requires grad, though the gradients depend
    on the features as well.
    """
    return upstream.detach().requires_grad_() if torch.is_grad_enabled() else upstream


def _autograd(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    @once_differentiable
    def once(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        wants = ctx.needs_input_grad[:3]
        if upstream is not None:
            made = operator.backward(upstream, *ctx.saved_tensors, ctx.groups, *wants, True)
            gradients[:3] = [g if wanted else None for g, wanted in zip(made, wants, strict=True)]
        return tuple(gradients)

    def differentiate(ctx: Any, upstream: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
        return once(ctx, None if upstream is None else refusing_second(upstream), *rest)

    return differentiate
