"""`fasterase find`: from the name of a concept to a folder of sets."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fasterase
from fasterase.cli.command import Command
from fasterase.errors import InputError
from fasterase.files import check_creatable


@dataclass(frozen=True)
class Find(Command):
    r"""Find the pairs of a concept in a corpus, by captions and pictures.

    > Concept

    Args:
        concept: what to find, in words, or several wordings and synonyms.
        images: example images: files, or one folder.
        not_about: wordings of what else the words may mean.
        picture_alone: also forget pairs whose caption does not name the concept, but whose picture
            is as near as those of captions that do.

    > Model and pairs

    Args:
        model: the model to be erased, as for `fasterase unlearn`.
        model_name: open_clip's name of the architecture of a model that is a checkpoint file.
        data: the corpus, in any form that `fasterase unlearn --forget` takes.
        image_key: column or tar entry of the image, if it has none of the usual names.
        text_key: column or tar entry of the caption, if it has none of the usual names.
        max_pairs: judge a sample of so many pairs. `none`: all.
        seed: of the sample, and of which pairs are unseen.

    > Output

    Args:
        output_dir: folder of the sets, of `review.html` and of the features of all pairs.
        reference_cache: another folder of the features, for `fasterase unlearn` too.
        precision: compute dtype of the towers, as for `fasterase unlearn`.
        device: where to run, such as `cuda:0`. `none`: the best available device.
        num_workers: processes that load and decode pairs, or `auto`.
        progress: say how far it is.

    Examples:
      fasterase find --model ViT-B-32/laion2b_s34b_b79k --data pairs.csv --concept octopus \
          --output_dir sets
      fasterase find --model ViT-B-32/laion2b_s34b_b79k --data 'shards/{000..099}.tar' \
          --concept 'guide dog' 'seeing-eye dog' --not_about 'hot dog' --output_dir sets

    Open sets/review.html, correct decisions, and save decisions.csv into the folder: `fasterase
    unlearn --found sets` takes it over. Run the same command again after an interruption to go on.
    """

    needs = ("model", "data", "concept", "output_dir")
    concept: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    not_about: list[str] = field(default_factory=list)
    picture_alone: bool = False
    model: str | None = None
    model_name: str | None = None
    data: str | None = None
    image_key: str | None = None
    text_key: str | None = None
    max_pairs: int | None = None
    seed: int = 0
    output_dir: str | None = None
    reference_cache: str | None = None
    precision: str = "auto"
    device: str | None = None
    num_workers: int | Literal["auto"] = 0
    progress: bool = True

    def run(self, **fields: Any) -> None:
        from fasterase.progress import launched_rank

        flags = dict(vars(self))
        model, data, folder = (flags.pop(name) for name in ("model", "data", "output_dir"))
        where = f"--output_dir={folder!r}"
        check_creatable(Path(folder), argument=where)
        self._check_concept(Path(folder), where)
        flags["images"] = self.images[0] if len(self.images) == 1 else self.images or None
        flags["not_about"] = self.not_about or None
        flags["reference_cache"] = self.reference_cache or Path(folder) / "reference"
        found = fasterase.find(model, data, flags.pop("concept"), **flags)
        if launched_rank() != 0:
            return
        found.save(folder)
        words = ["--model", model, "--found", folder]
        if self.reference_cache is not None:
            words += ["--reference_cache", self.reference_cache]
        page = Path(folder) / "review.html"
        print(f"{found!r}\nLook at {page}, and save decisions.csv beside it.")
        print(f"Next: fasterase unlearn {shlex.join(words)} --output_dir RUN")

    def _check_concept(self, folder: Path, argument: str) -> None:
        """Refuse a folder of another search, whose decisions.csv would be taken for this one's."""
        file = folder / "found.json"
        if file.is_file():
            other = json.loads(file.read_text(encoding="utf-8"))["concept"]
            if other != self.concept:
                raise InputError(
                    f"{argument} holds what was found of {', '.join(other)}. Give another folder."
                )
