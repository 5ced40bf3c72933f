"""Backends as torch operators: schemas, fake tensors and autograd, registered in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.dense import Contrastive

_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
_BATCH = (
    "Tensor image, Tensor text, Tensor scale, "
    "Tensor? ref_image, Tensor? ref_text, Tensor? ref_scale"
)
_WANTED = "bool wants_image, bool wants_text, bool wants_scale, bool rounded"
_GRADIENTS = "Tensor d_image, Tensor d_text, Tensor d_scale"

Groups = tuple[int, ...]


class Batch(NamedTuple):
    """The tensors of a call; the reference is complete or absent."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [] in the dtype of the computation
    ref_image: Tensor | None  # [N, D0]
    ref_text: Tensor | None  # [N, D0]
    ref_scale: Tensor | None  # []

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of each tensor's result."""
        return Batch._make(None if x is None else function(x) for x in self)

    @property
    def matrices(self) -> int:
        """1 for S, 2 with S0 of the reference."""
        return 1 if self.ref_image is None else 2

    def empty_losses(self) -> Contrastive:
        """Losses of a batch without rows, with gradients of 0 to image, text and scale."""
        dtype = self.scale.dtype
        empty = self.scale * (self.image.to(dtype) + self.text.to(dtype)).sum(1)
        return Contrastive(empty, empty, *((None, None) if self.matrices == 1 else (empty, empty)))

    def requires_grad(self) -> tuple[bool, bool, bool]:
        """Whether a backward pass can ask for the gradients of image, text and scale."""
        if not torch.is_grad_enabled():
            return False, False, False
        return self.image.requires_grad, self.text.requires_grad, self.scale.requires_grad


class Wanted(NamedTuple):
    """Which gradients a backward pass makes, and in which precision."""

    image: bool
    text: bool
    scale: bool
    rounded: bool  # those of image and text to their own dtype, else in that of the computation


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Options = Callable[[Batch, Groups, bool, str], tuple[Any, ...]]


@dataclass(frozen=True)
class Operator:
    """A backend: its torch operators. Differentiable once, for any upstream gradients."""

    # (*batch, groups, *options) -> (losses, statistics, *saved)
    forward: Callable[..., tuple[Tensor, ...]]
    # The losses of the same call, followed by autograd.
    differentiable: Callable[..., Tensor]
    # (upstream, *batch, statistics, *saved, groups, *wanted, *options) -> (d_image, d_text,
    # d_scale). Of gradients not requested only the dtype is meaningful.
    backward: Callable[..., Any]
    # Of (batch, groups, whether a backward pass may follow, the resolved products); raises
    # InputError where the backend cannot take the batch.
    options: Options
    # Whether labels, or None, come before the options; else their terms are added to the losses.
    takes_labels: bool
    # (weights, *batch, groups, *wanted, *options) -> (losses, d_image, d_text, d_scale), where the
    # backend has a faster way than forward and backward.
    step: Callable[..., tuple[Tensor, ...]] | None
    # (weights, *batch, groups, *options) -> (the differentiable weighted total, losses), where C++
    # has a step and its autograd.
    weighted: Callable[..., tuple[Tensor, Tensor]] | None

    def take_step(
        self, weights: Tensor, batch: Batch, groups: Groups, wanted: Wanted, options: Any
    ) -> tuple[Tensor, ...]:
        """(losses, d_image, d_text, d_scale) of `(weights * losses).sum()`."""
        if self.step is not None:
            return self.step(weights, *batch, groups, *wanted, *options)
        losses, *saved = self.forward(*batch, groups, *options)
        return losses, *self.backward(weights, *batch, *saved, groups, *wanted, *options)


def unpack_losses(losses: Tensor) -> Contrastive:
    """Name the rows of `losses` [2 or 4, N]."""
    ce_row, ce_col, *kl = losses.unbind(0)
    return Contrastive(ce_row, ce_col, *(kl or (None, None)))


def register(
    name: str,
    saved: Mapping[str, Callable[..., Tensor]],
    *,
    options: Options,
    options_schema: str,
    key: str | None = None,
    forward: Callable[..., tuple[Tensor, ...]] | None = None,
    backward: Callable[..., Gradients] | None = None,
    step: Callable[..., tuple[Tensor | None, ...]] | None = None,
    in_cpp: bool = False,
) -> Operator:
    """Define `fasterase::{name}` and `fasterase::{name}_backward`, with fakes and autograd.

    Args:
        saved: the tensors that forward returns after losses and statistics: for each name a
            function of (batch, groups, *options) that makes an empty tensor like it.
        options, options_schema: of the last arguments, see `Operator`.
        key: dispatch key of the functions below; None where C++ registers them.
        forward: a function of (batch, groups, *options) that returns losses [2 or 4, N], statistics
            [matrices, 3, 2 (rows, columns), N] (the shift, the sums or a value that replaces them,
            the miss probability), and the tensors to save.
        backward: a function of (upstream, batch, (statistics, *saved), groups, wanted, *options);
            returns None for a gradient that is not wanted.
        step: a function of (weights, batch, groups, wanted, *options) that returns losses and
            gradients, likewise.
        in_cpp: C++ registers all of them and `fasterase::{name}_weighted`, and takes labels.
    """
    outputs = [f"Tensor {output}" for output in ("statistics", *saved)]
    more = f", {'Tensor? labels, ' if in_cpp else ''}{options_schema}"

    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        assert forward is not None
        groups, *rest = arguments[6:]
        return forward(Batch(*arguments[:6]), tuple(groups), *rest)

    def make_fake_outputs(*arguments: Any) -> tuple[Tensor, ...]:
        batch, *rest = Batch(*arguments[:6]), *arguments[6:]
        n = batch.image.shape[0]
        return (
            batch.scale.new_empty(2 * batch.matrices, n),
            batch.scale.new_empty(batch.matrices, 3, 2, n),
            *(make_empty(batch, *rest) for make_empty in saved.values()),
        )

    schema = f"({_BATCH}, SymInt[] groups{more}) -> (Tensor losses, {', '.join(outputs)})"
    forward_op = define(name, schema, run_forward, key, make_fake_outputs)
    backward_op = _define_gradients(f"{name}_backward", outputs, backward, key, more)
    step_op = weighted_op = None
    if step or in_cpp:
        step_op = _define_gradients(f"{name}_step", [], step, key, more)
    if in_cpp:
        inputs = f"Tensor weights, {_BATCH}, SymInt[] groups{more}"
        schema = f"({inputs}) -> (Tensor total, Tensor losses)"
        weighted_op = define(f"{name}_weighted", schema, None, None, None)
    derivative = _make_backward(backward_op)
    losses_of = add_autograd(forward_op, _save_context, derivative, first_only=True)
    return Operator(forward_op, losses_of, backward_op, options, in_cpp, step_op, weighted_op)


def define(
    name: str, schema: str, run: Callable[..., Any] | None, key: str | None, fake: Any
) -> Any:
    """Define `fasterase::{name}`; with a dispatch `key` it runs `run`, else C++ registers it."""
    _LIBRARY.define(name + schema)
    if key is not None:
        _LIBRARY.impl(name, run, key)
    if fake is not None:
        torch.library.register_fake(f"fasterase::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fasterase, name).default


def _define_gradients(
    name: str, saved: Sequence[str], run: Callable[..., Any] | Any, key: str | None, more: str
) -> Callable[..., tuple[Tensor, ...]]:
    """Define an operator that makes gradients; it returns the losses too if none are `saved`."""
    num_tensors = len(Batch._fields) + len(saved)

    def parse(arguments: tuple[Any, ...]) -> tuple[Batch, Wanted, tuple[Any, ...]]:
        tensors, (groups, *rest) = arguments[:num_tensors], arguments[num_tensors:]
        batch, wanted = Batch(*tensors[:6]), Wanted(*rest[:4])
        held = (tensors[6:],) if saved else ()
        return batch, wanted, (batch, *held, tuple(groups), wanted, *rest[4:])

    def compute(weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        batch, wanted, given = parse(arguments)
        *losses, image, text, scale = run(weights, *given)
        return (
            *losses,
            _empty_gradient(batch.image, batch, wanted) if image is None else image,
            _empty_gradient(batch.text, batch, wanted) if text is None else text,
            batch.scale.new_zeros(()) if scale is None else scale,
        )

    def make_fake_outputs(weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        batch, wanted, _ = parse(arguments)
        losses = batch.scale.new_empty(2 * batch.matrices, batch.image.shape[0])
        return (
            *(() if saved else (losses,)),
            _empty_gradient(batch.image, batch, wanted, wanted.image),
            _empty_gradient(batch.text, batch, wanted, wanted.text),
            batch.scale.new_empty(()),
        )

    inputs = ", ".join(("Tensor weights", _BATCH, *saved, "SymInt[] groups"))
    outputs = ", ".join((*(() if saved else ("Tensor losses",)), _GRADIENTS))
    schema = f"({inputs}, {_WANTED}{more}) -> ({outputs})"
    return define(name, schema, compute, key, make_fake_outputs)


def _empty_gradient(side: Tensor, batch: Batch, wanted: Wanted, is_wanted: bool = False) -> Tensor:
    """An empty tensor for a gradient, or in the place of one that is not wanted."""
    dtype = side.dtype if wanted.rounded else batch.scale.dtype
    return side.new_empty(side.shape if is_wanted else 0, dtype=dtype)


def add_autograd(
    run: torch._ops.OpOverload[..., Any],
    save_context: Callable[..., None],
    differentiate: Callable[..., Any],
    *,
    first_only: bool = False,
) -> Callable[..., Any]:
    """Give a torch operator its derivative; return what to call in its place.

    With `first_only` that returns the first output alone, and only `save_context` sees the others.
    A derivative in Python costs the dispatcher 0.1 ms per step, as much as the products of 64
    pairs: eager calls go around it, through an autograd function.
    """
    torch.library.register_autograd(
        run.name(), differentiate, setup_context=save_context, lib=_LIBRARY
    )

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*inputs)
        save_context(ctx, inputs, output)
        return output[0] if first_only else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type("Eager", (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function.apply(*inputs)
        output = run(*inputs)
        return output[0] if first_only else output

    return call


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.groups, first, *ctx.options = inputs[6:]
    _, *saved = output
    # Labels come first: saved as the features are, so that a later change of them raises.
    is_labels = isinstance(first, Tensor)
    ctx.first_option = None if is_labels else first
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first if is_labels else None, *inputs[:6], *saved)


def _make_backward(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of losses, which is skipped for losses that nobody uses."""

    @differentiable_once
    def run(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad
        wanted = Wanted._make((*wants[:3], True))
        # Read once: a checkpoint that computes them again does so only once.
        labels, *saved = ctx.saved_tensors
        first = ctx.first_option if labels is None else labels
        made = backward(upstream, *saved, ctx.groups, *wanted, first, *ctx.options)
        gradients = (g if is_wanted else None for g, is_wanted in zip(made, wants, strict=False))
        return (*gradients, *(None,) * (len(wants) - 3))

    def differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if upstream is None else run(ctx, upstream)

    return differentiate


def differentiable_once(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass `(ctx, upstream)` refuse every second derivative.

    By itself `once_differentiable` refuses only where the upstream gradient requires grad, but the
    gradients depend on the features as well.
    """
    refuse = once_differentiable(run)

    def differentiate(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            return refuse(ctx, upstream.detach().requires_grad_())
        return run(ctx, upstream)

    return differentiate
