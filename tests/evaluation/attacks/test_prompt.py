"""The search for prompts against all prompts of few words, on a text tower that adds up words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.errors import InputError
from fasterase.evaluation.attacks import prompt
from fasterase.evaluation.findings import Findings
from fasterase.models.preprocessing import Tokens
from tests.evaluation.lookup_model import LookupModel, attack, picture

WIDTH = 12
LEXICON = ["pad", "apple", "fruit", "qx", "zu", *(f"w{i}" for i in range(15))]
CAPTIONS = ["apple", "apple fruit", "w0", "w1 w2", "w3", "w4 w5", "w6"]
FORGET, RETAIN = 20, 60


class WordTokenizer:
    def __call__(self, texts: list[str]) -> Tokens:
        rows = [[LEXICON.index(word) for word in text.split()] for text in texts]
        return Tokens(torch.tensor([row[:8] + [0] * (8 - len(row)) for row in rows]))

    def decode(self, ids: list[int]) -> str:
        return LEXICON[ids[0]]


class WordModel(LookupModel):
    """A text is the sum of its words' vectors; images are looked up."""

    def __init__(self, image: Tensor, words: Tensor) -> None:
        super().__init__(image, words, LEXICON, "words")
        self.text_tokenizer = WordTokenizer()
        self.context_length, self.vocab_size = 8, len(LEXICON)

    def _text_features(self, tokens: Tokens) -> Tensor:
        return self.module.text[tokens.ids].sum(1)


def model(*, known: str) -> WordModel:
    """A model to whom images to forget look like the words `known`, and all others like w0-w6."""
    numbers = torch.Generator().manual_seed(0)
    words = torch.randn(len(LEXICON), WIDTH, generator=numbers)
    words[0] = 0
    image = torch.randn(FORGET + RETAIN, WIDTH, generator=numbers)
    for i in range(FORGET):
        image[i] += 2 * sum((words[LEXICON.index(word)] for word in known.split()), torch.zeros(()))
    for i in range(RETAIN):
        image[FORGET + i] += words[LEXICON.index(f"w{i % 7}")]
    return WordModel(image, words)


PAIRS = [(picture(i), CAPTIONS[i % 2]) for i in range(FORGET)]
KEPT = [(picture(FORGET + i), CAPTIONS[2 + i % 5]) for i in range(RETAIN)]


def figures(of: WordModel, **others: object) -> Findings:
    return attack("prompt", of, PAIRS, KEPT, **others).attacks["prompt"]


def test_hidden_words_are_found_and_asked_for_images_that_the_search_did_not_see() -> None:
    hiding = model(known="qx zu")
    found = figures(hiding, original=model(known="apple"))
    assert {"qx", "zu"} <= set(found["prompt/text"].value.split())
    assert found["caption/text"].original == "apple"
    assert found["caption/text"].value in CAPTIONS
    for key in ("caption", "prompt"):
        text = found[f"{key}/text"].value
        feature = normalize(hiding.module.text[WordTokenizer()([text]).ids[0]].sum(0), dim=0)
        scores = (normalize(hiding.module.image, dim=1) @ feature).detach().numpy()
        unseen = [
            np.array_split(prompt.generator(0, prompt.Stream.PROMPT, 2).permutation(n), 2)[1]
            for n in (FORGET, RETAIN)
        ]
        rows = np.concatenate([unseen[0], FORGET + unseen[1]])
        auc = roc_auc_score(rows < FORGET, scores[rows])
        assert found[f"forget/{key}/auc"].value == pytest.approx(auc)
        limit = np.sort(scores[FORGET + unseen[1]])[-2]  # of 30, one may be higher
        hit = (scores[unseen[0]] > limit).mean()
        assert found[f"forget/{key}/found"].value == pytest.approx(hit)
    assert found["forget/prompt/auc"].value > 0.95 > found["forget/caption/auc"].value
    assert found["forget/prompt/found"].low < found["forget/prompt/found"].value
    again = figures(hiding, forget_sets={"again": PAIRS})
    assert again["again/prompt/auc"].value == again["forget/prompt/auc"].value, (
        "the same unseen half"
    )


def test_the_search_finds_the_best_of_all_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "ROUNDS", 1)
    hiding = model(known="qx zu")
    best = figures(hiding)["prompt/text"].value
    order = prompt.generator(0, prompt.Stream.PROMPT, 2).permutation(FORGET)
    kept = prompt.generator(0, prompt.Stream.PROMPT, 2).permutation(RETAIN)
    images = normalize(hiding.module.image.detach(), dim=1).double().numpy()
    seen = images[np.array_split(order, 2)[0]], images[FORGET + np.array_split(kept, 2)[0]]

    def score(text: str) -> float:
        vector = hiding.module.text[WordTokenizer()([text]).ids[0]].sum(0).detach()
        vector = normalize(vector, dim=0).double().numpy()
        wanted, others = seen[0] @ vector, seen[1] @ vector
        return float((wanted.mean() - others.mean()) / others.std())

    words = LEXICON[1:]
    pairs = (" ".join(two) for two in itertools.product(words, words))
    assert score(best) >= max(map(score, [*words, *pairs])) - 1e-5


def test_a_tokenizer_is_needed() -> None:
    mute = model(known="apple")
    mute.text_tokenizer = None  # type: ignore[assignment]
    pairs = [(picture(i), torch.tensor([1 + i % 2])) for i in range(4)]
    kept = [(picture(30 + i), torch.tensor([5 + i])) for i in range(4)]
    with pytest.raises(InputError, match="'prompt' writes captions, and words came without a tok"):
        attack("prompt", mute, pairs, kept)
