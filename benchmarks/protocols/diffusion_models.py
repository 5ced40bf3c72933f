"""The models of the diffusion check: what draws pictures, and what finds objects in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.protocols.text_encoder import TextTower, build_text_encoder
from fasterase.errors import InputError, import_extra
from fasterase.models.huggingface import load_weights, read_config

CLASS = "StableDiffusionPipeline"
# An original whose hidden states differ by more is another model; fp16 differs by less.
SAME = 0.05
MODEL_TYPES = ("owlvit", "owlv2")


class TextToImage:
    """A Stable Diffusion 1 or 2 that draws with the text encoder that it is told to use.

    Without the safety checker, whose black pictures would count as pictures without the concept.
    On GPUs in fp16. `own` is the pipeline's own text encoder, a transformers `CLIPTextModel`.
    """

    def __init__(
        self, source: str, *, device: torch.device, steps: int, guidance: float, batch_size: int
    ) -> None:
        diffusers = import_extra("diffusers", "diffusion", "The diffusion check")
        transformers = import_extra("transformers", "diffusion", "The diffusion check")
        pipeline = diffusers.StableDiffusionPipeline
        try:
            found = pipeline.load_config(source)["_class_name"]
            if found != CLASS:
                raise InputError(f"--pipeline={source!r} is a {found}; {CLASS} is needed.")
            self._pipeline = pipeline.from_pretrained(
                source,
                dtype=torch.float16 if device.type == "cuda" else torch.float32,
                safety_checker=None,
                requires_safety_checker=False,
            )
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"--pipeline={source!r}: diffusers could not load it: {error}. Give a folder in "
                "its format (model_index.json, unet, vae, text_encoder, ...), or the id of one on "
                "the hub."
            ) from error
        self.own: Any = self._pipeline.text_encoder
        if not isinstance(self.own, transformers.CLIPTextModel):
            raise InputError(
                f"--pipeline={source!r}: its text encoder is a {type(self.own).__name__}; a "
                "CLIPTextModel is needed, as in Stable Diffusion 1 and 2."
            )
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        self._batch_size = batch_size

    def fit(self, tower: TextTower, prompts: Sequence[str], *, argument: str) -> Any:
        """Return a text encoder for the pipeline with the weights of `tower`."""
        built = build_text_encoder(tower, self.own, argument=argument)
        if tower.tokenize is not None:
            for prompt, theirs in zip(prompts, tower.tokenize(prompts).ids.tolist(), strict=True):
                ours = self._tokenize([prompt], padding=False)[0].tolist()
                if ours != theirs[: len(ours)]:
                    raise InputError(
                        f"{argument}: {prompt!r} is {theirs[: len(ours)]} to the tokenizer of "
                        f"{tower.name} and {ours} to the pipeline's, so the text encoder would "
                        "read other words. Erase from the CLIP that the pipeline was trained with."
                    )
        return built

    def check_same(self, encoder: Any, prompts: Sequence[str], *, argument: str) -> None:
        """Refuse an original that is not the pipeline's own text encoder."""
        furthest = max(self.distances(encoder, prompts))
        if furthest > SAME:
            raise InputError(
                f"{argument}: it is not the CLIP that the pipeline was trained with: the hidden "
                f"states of a prompt differ by {furthest:.0%} of their distance to those of the "
                "empty prompt. What is erased from it says nothing about this pipeline."
            )

    def distances(self, encoder: Any, prompts: Sequence[str]) -> list[float]:
        """Return how far each prompt's hidden states are from those of the pipeline's own encoder.

        In units of their distance to those of the empty prompt: 0 is unmoved.
        """
        own = self._hidden_states(self.own, ["", *prompts])
        moved = (self._hidden_states(encoder, prompts) - own[1:]).flatten(1).norm(dim=1)
        return (moved / (own[1:] - own[:1]).flatten(1).norm(dim=1)).tolist()

    def draw(self, encoder: Any, prompt: str, seeds: Sequence[int]) -> Iterator[Image.Image]:
        """Yield one picture per seed. Seeds fix the latents, on every device, for any encoder."""
        self._pipeline.text_encoder = encoder
        for start in range(0, len(seeds), self._batch_size):
            batch = seeds[start : start + self._batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in batch]
            prompts = [prompt] * len(batch)
            yield from self._pipeline(prompts, generator=generators, **self._settings).images

    @torch.no_grad()
    def _hidden_states(self, encoder: Any, prompts: Sequence[str]) -> Tensor:  # [n, L, width] fp32
        ids = self._tokenize(prompts, padding="max_length").to(encoder.device)
        return encoder(ids).last_hidden_state.float()

    def _tokenize(self, prompts: Sequence[str], *, padding: bool | str) -> Tensor:  # [n, L]
        tokenizer = self._pipeline.tokenizer
        return tokenizer(
            list(prompts),
            padding=padding,
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids


class Detector:
    """OWL-ViT or OWLv2 of transformers; `queries`: object -> text that asks for it."""

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
            for each in boxes:
                best = torch.zeros(len(texts), device=each["scores"].device)
                best.scatter_reduce_(0, each["labels"], each["scores"].float(), "amax")
                found.append(dict(zip(self._queries, best.tolist(), strict=True)))
        return found
