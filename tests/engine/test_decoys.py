"""Made-up facts beside a link are held where the original has them, whatever the fact becomes."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fasterase.engine.decoys import BELOW, Decoys, find_margin
from fasterase.models.preprocessing import Tokens
from fasterase.objective import ForgetGroup, Objective, Strangers, weighted_erase_loss
from fasterase.parallel.ranks import ALONE, Ranks
from tests.tiny_model import LENGTH, SIZE, TinyModel, erase


def tokenizer(texts):
    """Words are tokens by their length, digits each one of their own, as in most tokenizers."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        word, _, number = text.rpartition(" ")
        digits = [20 + int(each) for each in number if each.isdigit()][: LENGTH - 1]
        ids[row, : 1 + len(digits)] = torch.tensor([1 + len(word) % 19, *digits])
    return Tokens(ids)


NUMBERS = [f"{n:03}" for n in torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:36]]
IMAGES = torch.randn(36, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@functools.cache
def learnt_weights():
    model = TinyModel()
    tokens = tokenizer([f"call {number}" for number in NUMBERS])
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-2)
    for _ in range(150):
        logits = 10 * model.encode_image(IMAGES) @ model.encode_text(tokens).T
        target = torch.arange(len(IMAGES))
        loss = torch.nn.functional.cross_entropy(logits, target)
        (loss + torch.nn.functional.cross_entropy(logits.T, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weights()


def learnt():
    """A model that has learnt whose numbers they are."""
    model = TinyModel()
    model.text_tokenizer = tokenizer
    model.module.load_state_dict(learnt_weights())
    return model


def pairs(rows, wording="call {}"):
    return [(IMAGES[row], wording.format(NUMBERS[row])) for row in rows]


@pytest.fixture
def seen(monkeypatch):
    """The decoys of each run in the test."""
    found, plain = [], Decoys.make.__func__

    def make(cls, *given):
        found.append(plain(cls, *given))
        return found[-1]

    monkeypatch.setattr(Decoys, "make", classmethod(make))
    return found


@pytest.fixture
def made(seen):
    run_link(max_steps=1)
    return seen[0]


def run_link(**settings):
    model = learnt()
    settings = {"erase": "link", "forget_augment": False, **settings}
    return erase(model, pairs(range(6)), pairs(range(6, 24)), **settings), model


pytestmark = pytest.mark.filterwarnings("ignore:verdict", "ignore:no verdict", "ignore:retain")


def test_their_captions_are_the_forget_sets_with_other_numbers(made):
    model = learnt()
    assert len(made.text) > 500
    texts = made.tokens.ids
    assert (texts[:, 0] == tokenizer(["call 123"]).ids[0, 0]).all()
    own = tokenizer([f"call {number}" for number in NUMBERS[:6]]).ids
    assert not any((texts == each).all(1).any() for each in own)
    (strangers,) = made.strangers
    torch.testing.assert_close(strangers.text, made.text.mean(0))
    images = model.encode_image(IMAGES[:6]) @ made.text.mean(0)
    others = model.encode_image(IMAGES[6:24])
    kind = others[others @ made.text.mean(0) >= images.median()]
    expected = torch.cat([model.encode_image(IMAGES[:6]), kind]).mean(0)
    torch.testing.assert_close(strangers.image, expected)


def engine_of(model):
    def call(pixels, tokens):
        return SimpleNamespace(image=None, text=model.encode_text(tokens))

    call.device = torch.device("cpu")
    call.upstream = lambda: torch.tensor(2.0)
    return call


class One(Ranks):
    """One of two ranks; what the other one gathers is made up of its own."""

    world_size = 2

    def __init__(self, rank):
        self.rank = rank

    def gather_rows(self, rows, counts):
        assert len(rows) == counts[self.rank]
        return [rows]


def test_held_ones_pull_back_by_how_far_they_have_moved(made):
    decoys, model = made, learnt()
    weight = model.module.text_projection.weight
    assert decoys.hold(engine_of(model), ALONE, 3) < 1e-10
    weight.grad = None
    with torch.no_grad():
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    moved = decoys.hold(engine_of(model), ALONE, 3)
    whole = weight.grad.clone()
    weight.grad = None
    every = (model.encode_text(decoys.tokens) - decoys.text).square().sum(1)
    assert moved > 1e-3
    assert abs(moved - every.mean()) < 4 * every.std() / len(decoys.text[:128]) ** 0.5
    # The engine averages over ranks, and their shares add up.
    for rank in range(2):
        decoys.hold(engine_of(model), One(rank), 3)
    torch.testing.assert_close(weight.grad / 2, whole)
    weight.grad = None
    (2.0 * decoys.weight * every.mean()).backward()
    cosine = torch.nn.functional.cosine_similarity(weight.grad.flatten(), whole.flatten(), dim=0)
    assert cosine > 0.9, "the gradient of the mean over all, by a sample"


def test_links_are_above_their_picture_with_other_facts_and_their_fact_with_other_pictures():
    numbers = torch.Generator().manual_seed(2)

    def unit(count):
        rows = torch.randn(count, 12, generator=numbers, dtype=torch.float64)
        return torch.nn.functional.normalize(rows, dim=1)

    image, text = unit(9), unit(9).requires_grad_()
    strangers = Strangers(unit(4).mean(0), unit(4).mean(0))
    objective = Objective(retain_weight=0.0, consistency_weight=0.0)
    groups = [ForgetGroup(slice(0, 9), strangers=strangers)]
    loss = weighted_erase_loss(
        image, text, 10.0, None, None, None, objective, n_forget=9, groups=groups
    )
    cosine = (image * text).sum(1)
    one = (cosine - image @ strangers.text).clamp_min(0).mean()
    other = (cosine - text @ strangers.image).clamp_min(0).mean()
    torch.testing.assert_close(loss.forget, 3 * (one + other).detach())
    expected = torch.autograd.grad(9 * (one + other), text)[0]
    torch.testing.assert_close(torch.autograd.grad(loss.total, text)[0], expected)


def test_facts_of_others_move_less(monkeypatch):
    """Those in no set; and the link is forgotten all the same."""
    before = learnt()
    tokens = tokenizer([f"call {number}" for number in NUMBERS])

    def moved(model):
        with torch.no_grad():
            text = model.encode_text(tokens)
            distance = (text - before.encode_text(tokens)).square().sum(1)
            return distance[24:].mean(), (model.encode_image(IMAGES) * text).sum(1)[:6].mean()

    _, model = run_link(lr=1e-2, max_steps=60)
    monkeypatch.setattr(Decoys, "make", classmethod(lambda *_: None))
    _, other = run_link(lr=1e-2, max_steps=60)
    (held, own), (free, _) = moved(model), moved(other)
    assert held < free / 2
    assert own < moved(before)[1] - 0.05


def test_a_pair_at_the_margin_has_nearly_the_mean_residue_of_strangers():
    numbers = torch.Generator().manual_seed(3)
    shift = torch.tensor([1.0, *[0.0] * 7])
    features, strangers, rivals = (
        torch.nn.functional.normalize(s * shift + torch.randn(n, 8, generator=numbers), dim=1)
        for s, n in ((0.5, 200), (1.0, 300), (0.0, 400))
    )
    mean = strangers.mean(0)
    margin = find_margin(features, strangers, rivals, mean)
    scores = features @ rivals.T
    own = features @ mean + margin
    residue = (own[:, None] > scores).float().mean(1).mean()
    of_strangers = ((features @ strangers.T)[:, :, None] > scores[:, None]).float().mean()
    assert abs(residue - (of_strangers - BELOW)) < 0.02


@pytest.mark.parametrize(
    ("wording", "settings"),
    [
        ("{}", {}),
        ("ring {}", {"floor": 0.2}),
        ("ring {}", {"forget_loss": "contrastive", "negatives": "joint"}),
        ("番号 {}", {}),
    ],
)
def test_there_are_none_where_they_would_say_nothing(wording, settings, seen):
    """Another floor or loss, and captions without spaces; the first case has some."""
    texts = [wording.format(number) for number in NUMBERS]
    sets = ([(IMAGES[row], texts[row]) for row in rows] for rows in (range(6), range(6, 24)))
    model = learnt()
    settings = {"max_steps": 1, "max_damage": 0.5, **settings}
    erase(model, *sets, erase="link", **settings)
    assert (seen[0] is None) == (wording != "{}")


def test_each_concept_has_its_own_and_nothing_to_keep_has_none(seen):
    forget = {"calls": pairs(range(3)), "rings": pairs(range(3, 6), "a ring {}")}
    result = erase(learnt(), forget, pairs(range(6, 24)), erase="link", max_steps=2)
    erase(learnt(), pairs(range(6)), [], erase="link", max_steps=1)
    assert len(seen[0].strangers) == 2
    assert not torch.equal(seen[0].strangers[0].text, seen[0].strangers[1].text)
    assert result.history[-1]["forget"] > 0
    assert seen[1] is None


def test_parts_of_any_size_have_the_gradient_of_the_whole(made):
    weight = (model := learnt()).module.text_projection.weight
    with torch.no_grad():
        weight += 0.1
    found = []
    for size in (128, 50):
        weight.grad = None
        replace(made, micro_batch_size=size).hold(engine_of(model), ALONE, 0)
        found.append(weight.grad)
    torch.testing.assert_close(*found)
