"""The forward pass of both towers as one module, whole or from the output of a frozen lower part.

Training calls `TowerForward` only, so that a wrapper around it sees every use of a parameter,
`logit_scale` included.

With `tune="last:N"` and `"projections"` the lower blocks stay as they are, and so do their outputs
for a pair. Both parts are the library's own forward pass. The lower one ends with the output of the
last frozen block; in the upper one, the frozen blocks return that output, whatever their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder, Tokens
from fasterase.option_values import parse_value
from fasterase.transfers import to_device

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Features(NamedTuple):
    """Features of a batch, and the scale to compare them with."""

    image: Tensor | None  # [n, D] fp32 unit rows; None without pixels
    text: Tensor | None  # [n, D] fp32 unit rows; None without tokens
    scale: Tensor  # [] exp(logit_scale), differentiable


class TowerForward(nn.Module):
    """Run the image tower, the text tower or both, and return unit features and the scale.

    The model's module becomes the submodule `module`, not a copy. A tower without trained
    parameters is run without a graph, even in grad mode.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        precision: str,  # "bf16", "fp16" or "fp32", of the matrix products; weights stay fp32
        image_trained: bool = True,
        text_trained: bool = True,
    ) -> None:
        super().__init__()
        self.module = model.module
        self.precision = precision
        self.image_trained = image_trained
        self.text_trained = text_trained
        self._model = model  # knows how to call `module`; holds no parameter of its own

    def forward(
        self,
        pixels: Tensor | Halfway | None = None,  # [n, 3, H, W] uint8 or preprocessed floats
        tokens: Tokens | Halfway | None = None,  # [n, L]
    ) -> Features:
        """Encode what is given, on the device of the inputs."""
        image = self._encode(self._model.encode_image, pixels, self.image_trained)
        text = self._encode(self._model.encode_text, tokens, self.text_trained)
        return Features(image, text, self._model.scale())

    def _encode(
        self,
        encode: Callable[[Any], Tensor],
        given: Tensor | Tokens | Halfway | None,
        trained: bool,
    ) -> Tensor | None:
        if given is None:
            return None
        grad = torch.is_grad_enabled() and trained
        with torch.set_grad_enabled(grad), autocast(self.precision, given.device):
            return (given.finish() if isinstance(given, Halfway) else encode(given)).float()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `"auto"`: bf16 on CUDA devices that have it, else fp16; fp32 on other devices.

    Raises:
        InputError: `precision` is unknown.
    """
    if precision != "auto":
        known = Literal["fp32", "bf16", "fp16", "auto"]
        return str(parse_value("precision", precision, known))
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run matrix products in `precision` inside the block; the weights stay fp32."""
    if precision == "fp32":
        with without_autocast():
            yield
        return
    with torch.autocast(device.type, dtype=_DTYPES[precision]):
        yield
    # torch itself forgets the converted weights only where a caller's autocast ends.
    torch.clear_autocast_cache()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch a caller's `torch.autocast` off inside the block."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass(frozen=True)
class Halfway:
    """Outputs of the frozen part for a batch, in the place of pixels or tokens."""

    tower: SplitTower  # runs the rest
    rows: Tensor  # [n, width], flat
    tokens: Tokens | None = None  # of these rows; None for images

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, rows: Any) -> Halfway:
        """Pick rows by anything that indexes a tensor."""
        tokens = None if self.tokens is None else self.tokens.index(rows)
        return Halfway(self.tower, self.rows[rows], tokens)

    __getitem__ = index

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def to(self, device: torch.device | str) -> Halfway:
        """Move to `device`."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return Halfway(self.tower, to_device(self.rows, device), tokens)

    def finish(self) -> Tensor:
        """Return the features [n, D], differentiable in the tuned blocks."""
        return self.tower.upper(self)


class SplitTower:
    """The `"image"` or the `"text"` tower in two parts; `InputError` if `tune` freezes no block.

    The frozen part outputs `width` numbers for an image or text.
    """

    def __init__(self, model: DualEncoder, tower: str, tune: str) -> None:
        self._model = model
        self._tower = tower
        parts = model.image_parts() if tower == "image" else model.text_parts()
        tuned = len(parts.blocks)
        if tune == "projections":
            tuned = 0
        elif tune.startswith("last:"):
            tuned = int(tune.removeprefix("last:"))
        self._frozen: Sequence[Any] = parts.blocks[: max(0, len(parts.blocks) - tuned)]
        if not self._frozen:
            raise InputError(
                f"prefix_cache: with tune={tune!r} no block of the {tower} tower is frozen, so "
                "there is nothing to cache. Use 'last:N' with a smaller N, 'projections', or leave "
                "prefix_cache None."
            )
        two = torch.zeros(2, model.context_length, dtype=torch.int64, device=model.device)
        output = self._run_lower(self._pixels(2) if tower == "image" else Tokens(two))
        self._is_tuple = isinstance(output, tuple)
        found = output[0] if self._is_tuple else output
        # open_clip's transformers may have the batch second.
        self._axis = list(found.shape).index(2)
        self._shape = found.movedim(self._axis, 0).shape[1:]
        self.width = self._shape.numel()

    @torch.no_grad()
    def lower(self, given: Tensor | Tokens) -> Tensor:
        """Return what the frozen part outputs for pixels or tokens, [n, width] fp32."""
        output = self._run_lower(given)
        found = output[0] if self._is_tuple else output
        return found.movedim(self._axis, 0).reshape(-1, self.width).float()

    def upper(self, halfway: Halfway) -> Tensor:
        """Return the features [n, D] of outputs of the frozen part."""
        hidden = halfway.rows.reshape(-1, *self._shape).movedim(0, self._axis)
        output = (hidden,) if self._is_tuple else hidden
        with ExitStack() as stack:
            for block in self._frozen:
                stack.enter_context(replaced_forward(block, lambda *_, **__: output))
            if halfway.tokens is not None:
                return self._model.encode_text(halfway.tokens)
            # Of one picture, so that what comes before the blocks costs next to nothing.
            return self._model.encode_image(self._pixels(1))

    def _run_lower(self, given: Tensor | Tokens) -> Any:
        def end(_: nn.Module, __: Any, output: Any) -> None:
            raise _ReachedError(output)

        hook = self._frozen[-1].register_forward_hook(end)
        try:
            with torch.no_grad():
                if isinstance(given, Tensor):
                    self._model.encode_image(given)
                else:
                    self._model.encode_text(given)
        except _ReachedError as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise InputError(
            f"prefix_cache: the {self._tower} tower of {self._model.name} does not run its blocks "
            "one after the other. Leave prefix_cache None."
        )

    def _pixels(self, count: int) -> Tensor:
        return torch.zeros(count, 3, *self._model.image_size, device=self._model.device)


class _ReachedError(Exception):
    """Ends a forward pass; its argument is the output of a block."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own inside the block."""
    own = module.__dict__.get("forward")  # such as that of activation checkpointing
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
