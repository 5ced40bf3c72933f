"""`fasterase.find`: judge the pairs of a corpus by caption and picture, and make sets of them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from fasterase.encode import PairEncoder
from fasterase.engine.loss import loss_products
from fasterase.engine.model_state import best_device, borrowed, resolve_device
from fasterase.errors import InputError
from fasterase.finder.decisions import NEARER_SHARE, Decision, Limits, decide_all
from fasterase.finder.found import Found
from fasterase.finder.witnesses import (
    NamedPairs,
    Queries,
    fold,
    read_captions,
    sample,
    scarce_words,
    score_pictures,
)
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import resolve_precision
from fasterase.models.load import load_model
from fasterase.numerals import counted
from fasterase.option_values import parse_count, parse_value
from fasterase.original.features import OriginalFeatures, cache_folder, feature_key
from fasterase.pairs.open import open_pairs
from fasterase.pairs.processes import count_workers
from fasterase.pairs.read_files import IMAGE_ENDINGS
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import Ranks, join_ranks, launched_device
from fasterase.progress import say, speaking

# Captions to keep that hold the meaning of a word which the concept's name shares.
ENOUGH_CAPTIONS = 20
LISTED = 10  # words in a warning


def find(
    model: nn.Module | DualEncoder | str | os.PathLike[str],
    source: Any,
    concept: str | Sequence[str],
    *,
    images: Any = None,
    not_about: str | Sequence[str] | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
    picture_alone: bool = False,
    tokenizer: Any = None,
    preprocess: Any = None,
    model_name: str | None = None,
    image_key: str | None = None,
    text_key: str | None = None,
    reference_cache: str | os.PathLike[str] | None = None,
    precision: str = "auto",
    device: str | None = None,
    num_workers: int | Literal["auto"] = 0,
    progress: bool = True,
) -> Found:
    """Find the pairs of a concept in a corpus: `forget, retain = find(model, source, "octopus")`.

    Two witnesses judge each pair. Its caption names the concept or not. Its picture is near to it
    or not, by similarity under the model, as a rank among the corpus's own pairs
    (`fasterase.finder.decisions`); no cosine is a threshold. Both testify: `forget`. Neither:
    `retain`. One: `unsure`, in neither set. Near-duplicate pictures stay together. Every fifth
    picture to forget is `unseen`, for judging only; the kept pairs nearest to the concept are
    `neighbours`. docs/finding.md shows the way from there to an erased model.

    Each pair is encoded once, into a cache that `unlearn` reuses (`reference_cache`) and from which
    an interrupted call goes on. In several processes every one makes the same call, and gets the
    same result. Of each pair a score and two bytes are held in memory.

    Args:
        model: the model to be erased, as for `fasterase.unlearn`.
        source: the corpus, in any form that `unlearn` takes. Captions must be strings.
        concept: what to find, in words, or several wordings and synonyms.
        images: example images: a folder, or a list of paths, PIL images or tensors.
        not_about: wordings of what else the words may mean. A caption with one of them does not
            count as naming the concept, nor does a picture count that is nearer to one of them.
        max_pairs: judge a sample of so many pairs, drawn with `seed`; those whose captions name the
            concept, or share words with its name, come first. Others are in no set.
        seed: of the sample, and of which pairs are unseen.
        picture_alone: put also pairs in `forget` whose caption does not name the concept, but whose
            picture is as near as those of captions that do.
        tokenizer, preprocess, model_name: see `fasterase.unlearn`.
        image_key, text_key: columns of tables, keys of dicts and fields of tar samples.
        reference_cache: folder of the features, to be given to `unlearn` too; None: they are
            forgotten.
        precision: compute dtype of the towers, as in `UnlearnConfig`.
        device: such as `"cuda:0"`; None: where the model is, or the best for one given by name.
        num_workers: processes that load and decode pairs; see `UnlearnConfig`.
        progress: say how far it is.

    Raises:
        InputError: an argument is unusable, or no pair can be read.
    """
    wordings = parse_wordings("concept", concept)
    others = [] if not_about is None else parse_wordings("not_about", not_about)
    if not wordings:
        raise InputError("concept is empty. Say in words what to find, such as 'octopus'.")
    max_pairs = None if max_pairs is None else parse_count("max_pairs", max_pairs, least=1)
    seed = parse_count("seed", seed, least=0)
    parse_value("precision", precision, Literal["auto", "fp32", "bf16", "fp16"])
    count_workers(num_workers)
    keys: dict[str, Any] = {"image_key": image_key, "text_key": text_key}
    with speaking(progress), join_ranks() as ranks, torch.inference_mode(False):
        with ranks.raising_together():
            dual = load_model(
                model, tokenizer=tokenizer, preprocess=preprocess, model_name=model_name
            )
            pairs = open_pairs(source, name="source", **keys)
            examples = None if images is None else _open_examples(images, wordings[0])
            is_named = isinstance(model, str | os.PathLike)
            home = (launched_device() or best_device()) if is_named else dual.device
            target = resolve_device(device, default=home)
        began = time.monotonic()
        captions = ranks.on_first(lambda: read_captions(pairs, wordings, others))
        rows = sample(captions, max_pairs, seed)
        named = int(captions.named.sum())
        say(f"captions read: {named:,} of {len(pairs):,} pairs name {wordings[0]}", since=began)
        cache = None if reference_cache is None else os.fspath(reference_cache)
        with borrowed(dual, device=target), cache_folder(cache, None, ranks) as folder:
            encoder = PairEncoder(
                dual,
                precision=resolve_precision(precision, target),
                ledger=SkipLedger(len(rows), max_skipped=1.0),
                num_workers=count_workers(num_workers, ranks),
                progress=progress and ranks.is_first,
                ranks=ranks,
            )
            queries = _encode_queries(encoder, wordings, examples, others)
            fingerprint = dual.fingerprint()
            is_half = target.type == "cuda" and loss_products(encoder.precision) == "fp16"
            key = feature_key(fingerprint, encoder.precision)
            original = OriginalFeatures(encoder, folder, key, is_half=is_half)
            codes, scores, limits = _judge(
                original, pairs, rows, captions, queries, picture_alone, ranks, seed
            )
    facts = {
        "concept": wordings,
        "not_about": others,
        "example images": len(queries.examples),
        "model": dual.public_name,
        "fingerprint": fingerprint,
        "pairs": len(pairs),
        "digest": pairs.digest(),
        "max_pairs": max_pairs,
        "seed": seed,
        "picture_alone": picture_alone,
        "limits": {"nearer share": NEARER_SHARE, **limits._asdict()},
    }
    corpus = {"source": _absolute(source), **keys} if _is_path(source) else None
    found = Found(pairs, codes, scores, captions.named, facts, corpus)
    if ranks.is_first:
        _warn(found, wordings)
    return found


def _judge(
    original: OriginalFeatures,
    pairs: PairTable,
    rows: np.ndarray,
    captions: NamedPairs,
    queries: Queries,
    picture_alone: bool,
    ranks: Ranks,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, Limits]:
    """Return the decision on each pair of the source, its score (NaN: not judged), the limits."""
    began = time.monotonic()
    original.encode(pairs, rows)
    say(f"encoded: {counted(len(rows), 'pair')}", since=began)
    pictures = score_pictures(
        original, pairs, rows, captions.named[rows], queries, ranks=ranks, seed=seed
    )
    scores = np.full(len(pairs), np.nan, np.float32)
    scores[rows] = pictures.scores
    rows = rows[~np.isnan(pictures.scores)]
    nearest = np.searchsorted(rows, pictures.nearest_captions)
    own = scores[rows], captions.named[rows], nearest
    codes = np.full(len(pairs), Decision.UNJUDGED, np.uint8)
    # One decides for all: others may round differently.
    codes[rows], limits = ranks.on_first(
        lambda: decide_all(original, pairs, rows, *own, picture_alone=picture_alone, seed=seed)
    )
    return codes, scores, limits


def _encode_queries(
    encoder: PairEncoder,
    wordings: Sequence[str],
    examples: PairTable | None,
    others: Sequence[str],
) -> Queries:
    nothing = torch.empty(0, encoder.model.embed_dim)
    shown = nothing
    if examples is not None:
        every = np.arange(len(examples))
        shown = encoder.pairs(examples, every, description="example images").image
    return Queries(encoder.texts(wordings), shown, encoder.texts(others) if others else nothing)


def _warn(found: Found, wordings: Sequence[str]) -> None:
    """Warn of what the sets lack."""
    counts, lacks = found.counts, []
    if not counts["forget"]:
        lacks.append(
            "forget is empty: no pair's caption and picture both show it. Give further wordings or "
            "example images, or decide on unsure pairs: found.review('review.html')"
        )
    elif not counts["unseen"]:
        lacks.append("unseen is empty: there is one picture to forget, apart from its copies")
    scarce = scarce_words(found.retain, wordings, ENOUGH_CAPTIONS)
    if scarce:
        few = sorted(scarce, key=lambda word: scarce[word])[:LISTED]
        listed = ", ".join(f"{word} ({scarce[word]})" for word in few)
        lacks.append(
            f"few captions to keep (how many) have words that the name shares with other things: "
            f"{listed}. Add such pairs to the corpus, or these words may lose their meaning"
        )
    if lacks:
        warnings.warn(f"find {', '.join(wordings)}: {'. '.join(lacks)}.", stacklevel=3)


def parse_wordings(argument: str, given: str | Iterable[str]) -> list[str]:
    """Return distinct wordings; `InputError` names the argument if one is no text."""
    every = [given] if isinstance(given, str) else list(given)
    for each in every:
        if not isinstance(each, str) or not each.strip():
            raise InputError(
                f"{argument}: expected words, such as 'octopus', or a list of wordings; found "
                f"{each!r}."
            )
    return list({fold(each).strip(): each.strip() for each in every}.values())


def _open_examples(images: Any, caption: str) -> PairTable:
    if _is_path(images):
        folder = Path(images).expanduser()
        files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        images = [file for file in files if file.suffix.lower() in IMAGE_ENDINGS]
        if not images:
            raise InputError(
                f"images: {folder} is no image, nor a folder of some ({', '.join(IMAGE_ENDINGS)})."
            )
    elif isinstance(images, Image.Image):
        images = [images]
    pairs = [(os.path.abspath(each) if _is_path(each) else each, caption) for each in images]
    return open_pairs(pairs, name="images")


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _absolute(source: Any) -> str:
    """Return a path that other working folders reach; patterns and addresses stay as they are."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else path
