"""Step batches and sweeps: workers, broken pairs, labels, errors."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fasterase.errors import InputError
from fasterase.models.dual_encoder import Tokens
from fasterase.pairs.batches import Sampler, step_batches, sweep
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import Preparer


def transform(image):
    values = np.asarray(image.resize((4, 4)), dtype=np.float32)
    return torch.from_numpy(values.copy()).permute(2, 0, 1) / 255


def tokenizer(texts):
    ids = torch.zeros(len(texts), 6, dtype=torch.long)
    for row, text in enumerate(texts):
        codes = torch.tensor([ord(c) for c in text[:6]])
        ids[row, : len(codes)] = codes
    return Tokens(ids, None)


PREPARE = Preparer(transform, tokenizer, (4, 4), 6, 1000)


def pairs(name, n, *, texts=None, bad=()):
    items = []
    for i in range(n):
        image = torch.full((3, 4, 4), float(i) + 100 * (name == "retain"))
        image[0, 0, 0] = float("nan") if i in bad else 0.0
        items.append((image, texts[i % len(texts)] if texts else f"{name} {i}"))
    return open_pairs(items, name=name)


def load(forget, retain, *, steps=(0, 7), workers=0, augment=False, seed=3, prepare=PREPARE):
    sampler = Sampler(len(forget), len(retain), forget_batch_size=4, batch_size=6, seed=seed)
    return list(
        step_batches(
            forget,
            retain,
            sampler,
            prepare,
            first_step=steps[0],
            last_step=steps[1],
            augment=augment,
            seed=seed,
            num_workers=workers,
        )
    )


def assert_same(one, other):
    assert one.step == other.step
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.tokens.ids, other.tokens.ids)
    assert torch.equal(one.labels, other.labels)
    assert one.ids == other.ids
    assert one.skipped == other.skipped
    for rows in ("forget_rows", "retain_rows", "forget_captions", "retain_captions"):
        assert np.array_equal(getattr(one, rows), getattr(other, rows))


def test_rows_ids_pixels_and_tokens_belong_together():
    forget, retain = pairs("forget", 10), pairs("retain", 20)
    for batch in load(forget, retain):
        rows = [*batch.forget_rows, *batch.retain_rows]
        assert batch.n_forget == len(batch.forget_rows) <= 4
        assert len(rows) == len(batch.pixels) == len(batch.tokens.ids) == len(batch.labels)
        for i, row in enumerate(rows):
            source = forget if i < batch.n_forget else retain
            assert batch.ids[i] == source.id(int(row))
            assert torch.equal(batch.pixels[i], source[int(row)].image)
            assert torch.equal(batch.tokens.ids[i], tokenizer(source.texts(int(row))).ids[0])


def test_workers_and_restarts_give_the_same_batches(pictures):
    """Bit for bit: file images, several captions, broken pairs, augmentation."""
    (pictures / "5.png").write_bytes(b"broken")
    table = pictures / "t.jsonl"
    table.write_text(
        "\n".join(f'{{"image": "{i}.png", "text": ["a{i}", "b{i}", "c{i}"]}}' for i in range(6))
    )
    forget, retain = open_pairs(table, name="forget"), pairs("retain", 20, bad=[2])
    alone = load(forget, retain, augment=True)
    for one, other in zip(alone, load(forget, retain, augment=True, workers=2), strict=True):
        assert_same(one, other)
    for one, other in zip(alone[3:], load(forget, retain, augment=True, steps=(3, 7)), strict=True):
        assert_same(one, other)
    assert any(batch.skipped for batch in alone)
    assert {c for batch in alone for c in batch.forget_captions} == {0, 1, 2}


def test_every_caption_of_every_pair_is_drawn_in_the_long_run():
    texts = [[f"{row} {number}" for number in range(n)] for row, n in enumerate([1, 2, 3, 7])]
    forget, retain = pairs("forget", 4, texts=texts), pairs("retain", 6)
    seen = {
        drawn
        for batch in load(forget, retain, steps=(0, 60))
        for drawn in zip(batch.forget_rows.tolist(), batch.forget_captions.tolist(), strict=True)
    }
    assert seen == {(row, n) for row, captions in enumerate(texts) for n in range(len(captions))}


def test_only_forget_images_are_augmented():
    forget, retain = pairs("forget", 8), pairs("retain", 12)
    altered = 0
    for plain, changed in zip(
        load(forget, retain), load(forget, retain, augment=True), strict=True
    ):
        n = plain.n_forget
        assert torch.equal(plain.pixels[n:], changed.pixels[n:])
        altered += int((plain.pixels[:n] != changed.pixels[:n]).flatten(1).any(1).sum())
    assert altered > 0


def test_equal_captions_share_a_label_across_both_sets():
    batch = load(pairs("forget", 4, texts=["x", "y"]), pairs("retain", 6, texts=["y", "z"]))[0]
    texts = [("x", "y")[row % 2] for row in batch.forget_rows]
    texts += [("y", "z")[row % 2] for row in batch.retain_rows]
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            assert (batch.labels[i] == batch.labels[j]) == (one == other)


def test_broken_pairs_are_left_out_and_named():
    forget, retain = pairs("forget", 4, bad=range(4)), pairs("retain", 6, bad=[1])
    batch = load(forget, retain, steps=(0, 1))[0]
    assert batch.n_forget == 0
    assert len(batch.pixels) == 5
    assert {skip.id for skip in batch.skipped} == {
        "forget[0]",
        "forget[1]",
        "forget[2]",
        "forget[3]",
        "retain[1]",
    }
    assert all("NaN" in skip.reason for skip in batch.skipped)
    assert 1 not in batch.retain_rows


def test_a_wholly_broken_batch_is_empty():
    batch = load(pairs("forget", 2, bad=[0, 1]), pairs("retain", 2, bad=[0, 1]), steps=(0, 1))[0]
    assert batch.pixels.shape == (0, 3, 4, 4)
    assert batch.tokens.ids.shape == (0, 6)
    assert len(batch.labels) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_input_errors_arrive_as_they_were_raised(workers):
    prepare = Preparer(None, None, (4, 4), 6, 1000)
    with pytest.raises(InputError) as caught:
        load(pairs("forget", 4), pairs("retain", 6), workers=workers, prepare=prepare)
    assert "`tokenizer`" in str(caught.value)
    assert "Traceback" not in str(caught.value)


class Noisy(Dataset):
    """A dataset with random augmentation from three generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = torch.rand(3, 4, 4) + np.random.rand()
        return noise + index, torch.tensor([index + 1])


def test_a_random_dataset_repeats_and_leaves_the_global_generators_alone():
    noisy = open_pairs(Noisy(), name="retain")
    assert not noisy.stable
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load(pairs("forget", 4), noisy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    for one, other in zip(first, load(pairs("forget", 4), noisy, workers=2), strict=True):
        assert_same(one, other)


def test_stopping_early_leaves_no_workers():
    forget, retain = pairs("forget", 4), pairs("retain", 6)
    sampler = Sampler(4, 6, forget_batch_size=4, batch_size=6, seed=0)
    batches = step_batches(
        forget,
        retain,
        sampler,
        PREPARE,
        first_step=0,
        last_step=10**6,
        augment=False,
        seed=0,
        num_workers=2,
    )
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_sweep_reads_each_row_once_with_the_captions_wanted(workers):
    source = pairs("retain", 9, texts=[["a", "b"], "c", ["b", "d", "e"]], bad=[4])
    rows = [8, 0, 4, 5, 1]
    wanted = np.array([[8, 0], [8, 2], [0, 1], [5, 0], [1, 0], [4, 0]])
    batches = list(sweep(source, rows, wanted, PREPARE, batch_size=2, num_workers=workers))
    assert [row for batch in batches for row in batch.rows] == [8, 0, 5, 1]
    assert [skip.id for batch in batches for skip in batch.skipped] == ["retain[4]"]
    captions = [caption for batch in batches for caption in batch.captions]
    assert captions == [(8, 0, "b"), (8, 2, "e"), (0, 1, "b"), (5, 0, "b"), (1, 0, "c")]
    assert [key for batch in batches for key in batch.new_keys] == ["b", "e", "c"]
    for batch in batches:
        assert torch.equal(batch.tokens.ids, tokenizer(batch.new_keys).ids)
        for row, pixels, id in zip(batch.rows, batch.pixels, batch.ids, strict=True):
            assert id == f"retain[{row}]"
            assert torch.equal(pixels, source[int(row)].image)


def test_sweep_takes_all_captions_by_default():
    source = pairs("retain", 3, texts=[["a", "b"], "c", ["b", "d", "e"]])
    batches = list(sweep(source, range(3), None, PREPARE, batch_size=8))
    assert [key for batch in batches for _, _, key in batch.captions] == list("abcbde")
    assert [key for batch in batches for key in batch.new_keys] == list("abcde")
