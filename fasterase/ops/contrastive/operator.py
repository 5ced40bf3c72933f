"""Backends as torch operators: schemas, fake tensors and autograd, registered in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.checks import compute_dtype, scale_tensor
from fasterase.ops.contrastive.dense import Contrastive

_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
_BATCH_SCHEMA = (
    "Tensor image, Tensor text, Tensor scale, "
    "Tensor? ref_image, Tensor? ref_text, Tensor? ref_scale"
)

Groups = tuple[int, ...]


class Batch(NamedTuple):
    """The tensors of a call; the reference is complete or absent."""

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
        """Make a batch from arguments that `checks.check_call` has passed."""
        dtype = compute_dtype(image, text)
        scale = scale_tensor(scale, image, dtype)
        if ref_scale is not None:
            ref_scale = scale_tensor(ref_scale, image, dtype).detach()
        return cls(image, text, scale, ref_image, ref_text, ref_scale)

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
# Returns losses [2 or 4, N], statistics [matrices, 3, 2 (rows, columns), N] (the shift, the sums or
# a value that replaces them, the miss probability), and the backend's own saved tensors.
Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., Gradients]
Options = Callable[[Batch, Groups, bool, str], tuple[Any, ...]]


@dataclass(frozen=True)
class Operator:
    """A backend: its two torch operators. Differentiable once, for any upstream gradients.

    Attributes:
        forward: `(*batch, groups, *options) -> (losses, statistics, *saved)`.
        differentiable: the losses of the same call, followed by autograd.
        backward: `(upstream, *batch, statistics, *saved, groups, *wanted, *options) -> (d_image,
            d_text, d_scale)`. Gradients not requested are placeholders; only their dtype is
            meaningful.
        options: a function of (batch, groups, whether a backward pass may follow, the resolved
            products); raises InputError where the backend cannot take the batch.
        backward_takes_options: whether the backward operator has the arguments `options`.
        step: `(weights, *batch, groups, *wanted, *options) -> (losses, d_image, d_text, d_scale)`
            of a step that knows its weights, where the backend has a faster way than forward and
            backward.
        native: `(*batch, groups, labels, *options)`, the losses of the call, [N] each, followed by
            autograd and with the terms of repeated labels, where the backend has that in C++.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    differentiable: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    options: Options
    backward_takes_options: bool
    step: Callable[..., tuple[Tensor, ...]] | None = None
    native: Callable[..., list[Tensor]] | None = None

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ref_image: Tensor | None,
        ref_text: Tensor | None,
        ref_scale: Tensor | None,
        groups: Groups,  # none empty
        products: str = "fp32",  # as `resolve_products` returns them
    ) -> Contrastive:
        """Same numbers as `contrastive_dense`, and the same bits every time."""
        batch = Batch(image, text, scale, ref_image, ref_text, ref_scale)
        options = self.options(batch, groups, any(batch.requires_grad()), products)
        return unpack_losses(self.differentiable(*batch, groups, *options))

    def differentiate(
        self,
        upstream: Tensor,
        tensors: tuple[Any, ...],
        groups: Groups,
        wanted: Wanted,
        options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `backward`; tensors: the batch, and what forward returned after the losses."""
        more = options if self.backward_takes_options else ()
        return self.backward(upstream, *tensors, groups, *wanted, *more)

    def take_step(
        self, weights: Tensor, batch: Batch, groups: Groups, wanted: Wanted, options: Any
    ) -> tuple[Tensor, ...]:
        """(losses, d_image, d_text, d_scale) of `(weights * losses).sum()`."""
        if self.step is not None:
            return self.step(weights, *batch, groups, *wanted, *options)
        losses, *saved = self.forward(*batch, groups, *options)
        return losses, *self.differentiate(weights, (*batch, *saved), groups, wanted, options)


def unpack_losses(losses: Tensor) -> Contrastive:
    """Name the rows of `losses` [2 or 4, N]."""
    ce_row, ce_col, *kl = losses.unbind(0)
    return Contrastive(ce_row, ce_col, *(kl or (None, None)))


def _no_options(
    batch: Batch, groups: Groups, is_differentiable: bool, products: str
) -> tuple[Any, ...]:
    return ()


def register(
    name: str,
    saved: Mapping[str, Callable[..., Tensor]],
    *,
    key: str | None = None,
    forward: Forward | None = None,
    backward: Backward | None = None,
    step: Callable[..., tuple[Tensor | None, ...]] | bool = False,
    has_native: bool = False,
    options_schema: str = "",
    options: Options = _no_options,
    backward_takes_options: bool = False,
) -> Operator:
    """Define `fasterase::{name}` and `fasterase::{name}_backward`, with fakes and autograd.

    Args:
        saved: the tensors that forward returns after losses and statistics: for each name a
            function of (batch, groups, *options) that makes an empty tensor like it.
        key: dispatch key of forward and backward, None where C++ registers them.
        forward: a function of (batch, groups, *options).
        backward: a function of (upstream, batch, (statistics, *saved), groups, wanted) and, if
            `backward_takes_options`, *options; returns None for a gradient that is not wanted.
        step: a function of (weights, batch, groups, wanted, *options) that returns losses and
            gradients, likewise; True where C++ registers it, False where forward and backward are
            as fast.
        has_native: whether C++ registers `fasterase::{name}_losses`, which is `Operator.native`.
        options_schema: schema of the arguments that `options` returns.
    """
    outputs = ", ".join(f"Tensor {output}" for output in ("statistics", *saved))
    more = f", {options_schema}" if options_schema else ""
    backward_more = more if backward_takes_options else ""
    num_tensors = len(Batch._fields) + 1 + len(saved)
    _LIBRARY.define(f"{name}({_BATCH_SCHEMA}, SymInt[] groups{more}) -> (Tensor losses, {outputs})")
    _LIBRARY.define(
        f"{name}_backward(Tensor upstream, {_BATCH_SCHEMA}, {outputs}, SymInt[] groups, "
        f"bool wants_image, bool wants_text, bool wants_scale, bool rounded{backward_more}) "
        "-> (Tensor d_image, Tensor d_text, Tensor d_scale)",
    )
    forward_op, backward_op = (
        getattr(torch.ops.fasterase, each).default for each in (name, f"{name}_backward")
    )
    operator = Operator(forward_op, forward_op, backward_op, options, backward_takes_options)
    if key is not None and forward is not None and backward is not None:
        _LIBRARY.impl(name, _flatten_forward(forward), key)
        _LIBRARY.impl(f"{name}_backward", _flatten_backward(backward, num_tensors), key)

    def make_fake_outputs(*arguments: Any) -> tuple[Tensor, ...]:
        batch, *rest = Batch(*arguments[:6]), *arguments[6:]
        n = batch.image.shape[0]
        return (
            batch.scale.new_empty(2 * batch.matrices, n),
            batch.scale.new_empty(batch.matrices, 3, 2, n),
            *(make_empty(batch, *rest) for make_empty in saved.values()),
        )

    torch.library.register_fake(f"fasterase::{name}", make_fake_outputs, lib=_LIBRARY)
    torch.library.register_fake(
        f"fasterase::{name}_backward", partial(_make_fake_gradients, num_tensors), lib=_LIBRARY
    )
    if step:
        operator = replace(operator, step=_define_step(name, step, key, more))
    if has_native:
        _LIBRARY.define(
            f"{name}_losses({_BATCH_SCHEMA}, SymInt[] groups, Tensor? labels{more}) -> Tensor[]"
        )
        native = getattr(torch.ops.fasterase, f"{name}_losses").default
        operator = replace(operator, native=native)
    differentiate = _make_backward(operator)
    losses_of = add_autograd(forward_op, _save_context, differentiate, first_only=True)
    return replace(operator, differentiable=losses_of)


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
    pairs. Eager calls go around it, through an autograd function of the same parts.
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


def _flatten_forward(forward: Forward) -> Callable[..., tuple[Tensor, ...]]:
    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        groups, *options = arguments[6:]
        return forward(Batch(*arguments[:6]), tuple(groups), *options)

    return run_forward


def _define_step(
    name: str,
    step: Callable[..., tuple[Tensor | None, ...]] | bool,
    key: str | None,
    options_schema: str,
) -> Callable[..., tuple[Tensor, ...]]:
    """Define `fasterase::{name}_step`, and implement it where `step` is a function."""

    def parse(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return _parse_backward_arguments(len(Batch._fields), arguments)

    def run_step(weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        assert callable(step)
        batch, _, groups, wanted, *options = parse(arguments)
        losses, *made = step(weights, batch, groups, wanted, *options)
        assert losses is not None
        return losses, *_fill_placeholders(made, batch, wanted)

    def make_fake_outputs(weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        batch, _, _, wanted, *_ = parse(arguments)
        losses = batch.scale.new_empty(2 * batch.matrices, batch.image.shape[0])
        return losses, *_make_empty_gradients(batch, wanted)

    _LIBRARY.define(
        f"{name}_step(Tensor weights, {_BATCH_SCHEMA}, SymInt[] groups, bool wants_image, "
        f"bool wants_text, bool wants_scale, bool rounded{options_schema}) "
        "-> (Tensor losses, Tensor d_image, Tensor d_text, Tensor d_scale)"
    )
    if callable(step):
        _LIBRARY.impl(f"{name}_step", run_step, key)
    torch.library.register_fake(f"fasterase::{name}_step", make_fake_outputs, lib=_LIBRARY)
    operator: Callable[..., tuple[Tensor, ...]] = getattr(
        torch.ops.fasterase, f"{name}_step"
    ).default
    return operator


def _flatten_backward(backward: Backward, num_tensors: int) -> Callable[..., tuple[Tensor, ...]]:
    def run_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        batch, saved, groups, wanted, *options = _parse_backward_arguments(num_tensors, arguments)
        made = backward(upstream, batch, saved, groups, wanted, *options)
        return _fill_placeholders(made, batch, wanted)

    return run_backward


def _fill_placeholders(
    made: Sequence[Tensor | None], batch: Batch, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = made
    return (
        _make_placeholder(batch.image, batch, wanted) if image is None else image,
        _make_placeholder(batch.text, batch, wanted) if text is None else text,
        batch.scale.new_zeros(()) if scale is None else scale,
    )


def _make_fake_gradients(
    num_tensors: int, upstream: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, wanted, *_ = _parse_backward_arguments(num_tensors, arguments)
    return _make_empty_gradients(batch, wanted)


def _make_empty_gradients(batch: Batch, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (
        side.new_empty(side.shape, dtype=_gradient_dtype(side, batch, wanted))
        if is_wanted
        else _make_placeholder(side, batch, wanted)
        for side, is_wanted in ((batch.image, wanted.image), (batch.text, wanted.text))
    )
    return image, text, batch.scale.new_empty(())


def _parse_backward_arguments(num_tensors: int, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """(batch, saved, groups, wanted, *options) from the arguments that follow `upstream`."""
    tensors, (groups, *rest) = arguments[:num_tensors], arguments[num_tensors:]
    num_wanted = len(Wanted._fields)
    wanted, options = Wanted(*rest[:num_wanted]), rest[num_wanted:]
    return Batch(*tensors[:6]), tensors[6:], tuple(groups), wanted, *options


def _gradient_dtype(side: Tensor, batch: Batch, wanted: Wanted) -> torch.dtype:
    return side.dtype if wanted.rounded else batch.scale.dtype


def _make_placeholder(side: Tensor, batch: Batch, wanted: Wanted) -> Tensor:
    """An empty tensor in the place of a gradient that is not wanted."""
    return side.new_empty(0, dtype=_gradient_dtype(side, batch, wanted))


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.groups, *ctx.options = inputs[6:]
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *saved)


def _make_backward(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    def run_operator(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[:3]
        wanted = Wanted(wants[0], wants[1], wants[2], rounded=True)
        made = operator.differentiate(upstream, ctx.saved_tensors, ctx.groups, wanted, ctx.options)
        return keep_wanted(ctx, made)

    return differentiate_once(run_operator)


def keep_wanted(ctx: Any, made: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: d_image, d_text, d_scale where wanted, None for the rest."""
    wants = ctx.needs_input_grad
    gradients = (g if wanted else None for g, wanted in zip(made, wants[:3], strict=True))
    return (*gradients, *(None,) * (len(wants) - 3))


def differentiate_once(
    run: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of losses: `run`, which is skipped for losses that nobody uses."""
    refuse_or_run = once_differentiable(run)

    def differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        chosen = refuse_or_run if torch.is_grad_enabled() else run
        return chosen(ctx, refuse_second_derivative(upstream))

    return differentiate


def refuse_second_derivative(upstream: Tensor) -> Tensor:
    """Make `once_differentiable` refuse every second derivative.

    By itself it refuses only where the upstream gradient requires grad, but the gradients depend on
    the features as well.
    """
    return upstream.detach().requires_grad_() if torch.is_grad_enabled() else upstream
