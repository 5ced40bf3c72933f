"""How fast a process decodes pictures, and what that means beside the compute of a GPU."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.images import decode_image, to_rgb
from fasterase.pairs.processes import MOST_PROCESSES

# Of the JPEGs that are decoded for the measurement, as photographs of web corpora have it.
PHOTO = (640, 480)
_SECONDS = 0.5


def measure_decoding(model: DualEncoder) -> float:
    """Return how many JPEGs a process decodes and prepares for `model` in a second of one core.

    Takes about a second.
    """
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
    smooth = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 8, smooth.shape)
    photo = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    transform, (height, width) = model.image_transform, model.image_size
    done, started = -1, 0.0
    # The first one is not counted: libraries load what they need. CPU time, since others may be
    # using the machine.
    while done < 1 or time.process_time() - started < _SECONDS:
        picture = to_rgb(decode_image(file.getvalue(), id="photo"), id="photo")
        if transform is None:
            np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        else:
            transform.pixels(picture)
        done += 1
        if not done:
            started = time.process_time()
    return done / (time.process_time() - started)


@dataclass(frozen=True)
class Feeding:
    """How a GPU gets its pairs."""

    images_per_second: float  # that a process decodes
    pairs_per_second: float  # that a GPU trains on; NaN if that is not known
    asked: int  # processes per GPU that load, as the settings have it; 0: the training one
    is_measured: bool  # on this machine, or told

    @property
    def needed(self) -> int:
        """Processes with which loading keeps up."""
        if math.isnan(self.pairs_per_second):
            return 1
        return max(1, math.ceil(self.pairs_per_second / self.images_per_second))

    @property
    def workers(self) -> int:
        """Processes per GPU to load with: those asked for, or as many as are needed and of use."""
        return self.asked or min(self.needed, MOST_PROCESSES)

    def hours(self, pairs: int, gpu_hours: float, gpus: int, *, workers: int) -> float:
        """Return the wall clock of a job of so many pairs and GPU-hours.

        Workers load while the GPU computes; without one (0), the two take turns.
        """
        loading = pairs / (self.images_per_second * max(1, workers) * gpus) / 3600
        return max(loading, gpu_hours / gpus) if workers else loading + gpu_hours / gpus

    def describe(self) -> str:
        """Say which of the two binds, and what to do about it."""
        measured = "measured on a core here" if self.is_measured else "as given"
        size = f"{PHOTO[0]} x {PHOTO[1]} JPEGs, " if self.is_measured else ""
        rate = f"{self.images_per_second:,.0f} images/s per worker ({size}{measured})"
        if math.isnan(self.pairs_per_second):
            return f"Loading: {rate}."
        train = f"a GPU trains on {self.pairs_per_second:,.0f} pairs/s"
        if self.workers >= self.needed:
            enough = f"--num_workers {self.needed} is enough."
            return f"Compute binds: {train}, and loading gives {rate}. {enough}"
        missing = 1 - self.workers * self.images_per_second / self.pairs_per_second
        if self.needed <= MOST_PROCESSES:
            advice = f"Give --num_workers {self.needed}, and as many cores"
        else:
            advice = f"{self.needed} on as many cores would keep up, or smaller pictures"
        return (
            f"Loading binds: {rate}, and {train}, which waits {missing:.0%} of the time with "
            f"{self.workers}. {advice}."
        )


def describe_hours(hours: float) -> str:
    """Return `42 s`, `31.5 min` or `4.2 h`."""
    if math.isnan(hours):
        return "unknown"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:,.1f} h"
