"""Which objects does an open-vocabulary detector find in pictures?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fasterase.errors import InputError, import_extra
from fasterase.models.huggingface import load_weights, read_config

MODEL_TYPES = ("owlvit", "owlv2")


class Detector:
    """OWL-ViT or OWLv2 of transformers.

    Args:
        source: folder or hub id, such as `"google/owlv2-base-patch16-ensemble"`.
        queries: object -> text that asks for it.
        device: where to run it.
        batch_size: pictures at once.
    """

    def __init__(
        self, source: str, queries: Mapping[str, str], *, device: torch.device, batch_size: int
    ) -> None:
        transformers = import_extra("transformers", "diffusion", "The diffusion check")
        online = not Path(source).is_dir()
        config = read_config(source, name=source, online=online)
        if config.model_type not in MODEL_TYPES:
            raise InputError(
                f"--detector={source!r} is a {config.model_type!r} model; one of "
                f"{', '.join(MODEL_TYPES)} is needed, such as 'google/owlv2-base-patch16-ensemble'."
            )
        kind = transformers.AutoModelForZeroShotObjectDetection
        self._model: Any = load_weights(kind, source, config, name=source, online=online)
        try:
            self._processor: Any = transformers.AutoProcessor.from_pretrained(
                source, local_files_only=not online
            )
        except Exception as error:
            raise InputError(
                f"--detector={source!r}: its processor cannot be loaded: {error}"
            ) from error
        self._model.to(device, torch.float32).eval()
        self._queries = dict(queries)
        self._device = device
        self._batch_size = batch_size

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Return, for each picture, object -> score of the surest box of that object.

        A box belongs to the object whose query fits it best. An object without a box has 0.
        """
        found = []
        texts = list(self._queries.values())
        for start in range(0, len(pictures), self._batch_size):
            batch = list(pictures[start : start + self._batch_size])
            inputs = self._processor(
                text=[texts] * len(batch), images=batch, truncation=True, return_tensors="pt"
            ).to(self._device)
            boxes = self._processor.post_process_grounded_object_detection(
                self._model(**inputs), threshold=0.0
            )
            found += [self._best(each["labels"], each["scores"]) for each in boxes]
        return found

    def _best(self, labels: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
        """Return object -> highest of the `scores` [b] of boxes with its number in `labels` [b]."""
        best = torch.zeros(len(self._queries), device=scores.device)
        best.scatter_reduce_(0, labels, scores.float(), "amax")
        return dict(zip(self._queries, best.tolist(), strict=True))
