"""Step batches and sweeps: workers, broken pairs, labels, errors."""

from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fasterase.errors import InputError
from fasterase.models.preprocessing import ImageTransform, TransformParts
from fasterase.pairs import processes
from fasterase.pairs.batches import step_batches, sweep
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.processes import count_workers
from fasterase.pairs.sampler import Sampler
from fasterase.parallel.ranks import Ranks
from tests.pairs.reading import PREPARE, resized, tokenizer, transform


def pairs(name, n, *, texts=None, bad=()):
    items = []
    for i in range(n):
        image = torch.full((3, 4, 4), float(i) + 100 * (name == "retain"))
        image[0, 0, 0] = float("nan") if i in bad else 0.0
        items.append((image, texts[i % len(texts)] if texts else f"{name} {i}"))
    return open_pairs(items, name=name)


def iterate(forget, retain, *, steps=(0, 7), augment=False, prepare=PREPARE, **options):
    sampler = Sampler(len(forget), len(retain), forget_batch_size=4, batch_size=6, seed=3)
    options |= {"first_step": steps[0], "last_step": steps[1], "augment_forget": augment}
    return step_batches(forget, retain, sampler, prepare, **options)


def load(*sources, workers=0, size=None, **options):
    return list(iterate(*sources, num_workers=workers, micro_batch_size=size, **options))


def pixels_of(batch):
    return torch.cat([part.pixels for part in batch.micro_batches])


def ids_of(batch):
    ids = [part.tokens.ids for part in batch.micro_batches]
    return torch.cat([torch.nn.functional.pad(each, (0, 6 - each.shape[1])) for each in ids])


def assert_same(one, other):
    assert one.step == other.step
    assert torch.equal(pixels_of(one), pixels_of(other))
    assert torch.equal(ids_of(one), ids_of(other))
    assert torch.equal(one.labels, other.labels)
    assert one.ids == other.ids
    assert one.skipped == other.skipped
    assert one.keys == other.keys
    assert np.array_equal(one.forget_rows, other.forget_rows)
    assert np.array_equal(one.retain_rows, other.retain_rows)


def test_rows_ids_pixels_and_tokens_belong_together():
    forget, retain = pairs("forget", 10), pairs("retain", 20)
    for batch in load(forget, retain):
        rows = [*batch.forget_rows, *batch.retain_rows]
        assert batch.n_forget == len(batch.forget_rows) <= 4
        assert len(rows) == len(pixels_of(batch)) == len(ids_of(batch)) == len(batch.labels)
        for i, row in enumerate(rows):
            source = forget if i < batch.n_forget else retain
            assert batch.ids[i] == source.id(int(row))
            assert torch.equal(pixels_of(batch)[i], source[int(row)].image)
            assert torch.equal(ids_of(batch)[i], tokenizer(source.texts(int(row))).ids[0])


class Noisy(Dataset):
    """A dataset with random augmentation from two generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = torch.rand(3, 4, 4) + np.random.rand()
        return noise + index, torch.tensor([index + 1])


@pytest.mark.parametrize(
    ("size", "workers", "first"),
    [
        (None, 2, 0),
        (None, 0, 3),
        (1, 0, 0),
        (1, 2, 0),
        (4, 0, 3),
        (4, 2, 0),
        (7, 2, 3),
        (100, 0, 0),
    ],
)
def test_micro_batches_workers_and_restarts_give_the_same_batches(pictures, size, workers, first):
    """Bit for bit: captions, broken pairs, augmentation, also of data that is random itself."""
    (pictures / "5.png").write_bytes(b"broken")
    table = pictures / "t.jsonl"
    table.write_text(
        "\n".join(f'{{"image": "{i}.png", "text": ["a{i}", "b{i}", "c{i}"]}}' for i in range(6))
    )
    forget, broken = open_pairs(table, name="forget"), pairs("retain", 20, bad=[2])
    retain = broken if first else open_pairs(Noisy(), name="retain")
    whole = load(forget, retain, augment=True)
    assert any(batch.skipped for batch in whole)
    assert {key[0] for batch in whole for key in batch.keys[: batch.n_forget]} == set("abc")
    others = load(forget, retain, augment=True, steps=(first, 7), size=size, workers=workers)
    for one, other in zip(whole[first:], others, strict=True):
        assert_same(one, other)
        assert len(one.micro_batches) == 1
        if size is not None:
            sizes = [len(part.ids) + len(part.skipped) for part in other.micro_batches]
            assert all(found == size for found in sizes[:-1])
            offsets = [part.offset for part in other.micro_batches]
            assert offsets == sorted(set(offsets))
            assert not any(offset % size for offset in offsets)
            assert one.skipped or offsets == [size * i for i in range(len(offsets))]


def test_every_caption_of_every_pair_is_drawn_in_the_long_run():
    texts = [[f"{row} {number}" for number in range(n)] for row, n in enumerate([1, 2, 3, 7])]
    forget, retain = pairs("forget", 4, texts=texts), pairs("retain", 6)
    seen = {
        drawn
        for batch in load(forget, retain, steps=(0, 60))
        for drawn in zip(batch.forget_rows.tolist(), batch.keys[: batch.n_forget], strict=True)
    }
    assert seen == {(row, text) for row, captions in enumerate(texts) for text in captions}


def test_only_forget_images_are_augmented():
    forget, retain = pairs("forget", 8), pairs("retain", 12)
    altered = 0
    for plain, changed in zip(
        load(forget, retain), load(forget, retain, augment=True), strict=True
    ):
        n = plain.n_forget
        before, after = pixels_of(plain), pixels_of(changed)
        assert torch.equal(before[n:], after[n:])
        altered += int((before[:n] != after[:n]).flatten(1).any(1).sum())
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
    (batch,) = load(forget, retain, steps=(0, 1))
    assert batch.n_forget == 0
    assert len(pixels_of(batch)) == 5
    broken = {*(f"forget[{i}]" for i in range(4)), "retain[1]"}
    assert {skip.id for skip in batch.skipped} == broken
    assert all("NaN" in skip.reason for skip in batch.skipped)
    assert 1 not in batch.retain_rows
    # Cut by what was drawn: every process then has the same number of micro-batches.
    (parted,) = load(forget, retain, steps=(0, 1), size=2)
    assert [part.offset for part in parted.micro_batches] == [4, 6, 8]
    assert sorted(len(part.ids) for part in parted.micro_batches) == [1, 2, 2]
    assert len(parted.skipped) == 5
    (empty,) = load(forget, pairs("retain", 2, bad=[0, 1]), steps=(0, 1))
    assert pixels_of(empty).shape == (0, 3, 4, 4)
    assert ids_of(empty).shape == (0, 6)
    assert len(empty.labels) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_input_errors_arrive_as_they_were_raised(workers):
    prepare = Preparer(None, None, (4, 4), 6, 1000)
    with pytest.raises(InputError) as caught:
        load(pairs("forget", 4), pairs("retain", 6), workers=workers, prepare=prepare)
    assert "`tokenizer`" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_random_dataset_leaves_the_global_generators_alone():
    noisy = open_pairs(Noisy(), name="retain")
    assert not noisy.stable
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(pairs("forget", 4), noisy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_stopping_early_leaves_no_workers():
    batches = iterate(pairs("forget", 4), pairs("retain", 6), steps=(0, 10**6), num_workers=2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_pictures_travel_as_uint8(pictures):
    """And so do their augmented views: a fourth of the bytes of floats."""
    table = pictures / "t.csv"
    table.write_text("filepath,title\n" + "\n".join(f"{i}.png,t{i}" for i in range(6)))
    source = open_pairs(table, name="forget")
    prepare = Preparer(
        ImageTransform(transform, TransformParts(resized)), tokenizer, (4, 4), 6, 1000
    )
    (batch,) = load(source, source, steps=(0, 1), augment=True, prepare=prepare)
    assert pixels_of(batch).dtype == torch.uint8
    (plain,) = load(source, source, steps=(0, 1))
    n = plain.n_forget
    normalised = prepare.image_transform.normalise(pixels_of(batch))
    torch.testing.assert_close(normalised[n:], pixels_of(plain)[n:])


@pytest.mark.parametrize("workers", [0, 2])
def test_sweep_reads_each_row_once_with_the_captions_wanted(workers):
    source = pairs("retain", 9, texts=[["a", "b"], "c", ["b", "d", "e"]], bad=[4])
    options = {"captions": "first", "batch_size": 2, "num_workers": workers}
    batches = list(sweep(source, [8, 0, 4, 5, 1], PREPARE, **options))
    assert [row for batch in batches for row in batch.rows] == [8, 0, 5, 1]
    assert [skip.id for batch in batches for skip in batch.skipped] == ["retain[4]"]
    captions = [caption for batch in batches for caption in batch.captions]
    assert captions == [(8, "b"), (0, "a"), (5, "b"), (1, "c")]
    assert [key for batch in batches for key in batch.new_keys] == ["b", "a", "c"]
    for batch in batches:
        if batch.new_keys:
            assert torch.equal(batch.tokens.ids, tokenizer(batch.new_keys).ids)
        for row, pixels, id in zip(batch.rows, batch.pixels, batch.ids, strict=True):
            assert id == f"retain[{row}]"
            assert torch.equal(pixels, source[int(row)].image)


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(1, 1, 0), (2, 1, 1), (16, 8, 1), (16, 32, 0), (96, 1, 16)]
)
def test_automatic_workers_share_the_cores_of_a_host(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(processes, "num_cpus", lambda: cores)
    host = SimpleNamespace(on_this_host=ranks)
    assert count_workers("auto", host) == workers
    assert count_workers(3, host) == 3


def drawn_ids(forget, retain, *, steps, ranks, workers):
    """The ids of each step's forget and retain pairs, of all ranks together."""
    found = [([], []) for _ in range(*steps)]
    for rank in range(ranks):
        place = Ranks()
        place.rank, place.world_size = rank, ranks
        sampler = Sampler(1000, 1000, forget_batch_size=60, batch_size=96, seed=7)
        options = {"first_step": steps[0], "last_step": steps[1], "micro_batch_size": 20}
        options |= {"augment_forget": False, "num_workers": workers, "ranks": place}
        for drawn, batch in zip(
            found, step_batches(forget, retain, sampler, PREPARE, **options), strict=True
        ):
            drawn[0].extend(batch.ids[: batch.n_forget])
            drawn[1].extend(batch.ids[batch.n_forget :])
    return found


def test_each_pair_is_seen_once_an_epoch_whatever_the_ranks_workers_and_restarts():
    sets = pairs("forget", 1000), pairs("retain", 1000)
    drawn = drawn_ids(*sets, steps=(0, 34), ranks=2, workers=2)
    for source, ids, epochs in zip(sets, zip(*drawn, strict=True), (2, 3), strict=True):
        whole = [id for step in ids for id in step]
        for epoch in range(epochs):
            seen = whole[1000 * epoch : 1000 * (epoch + 1)]
            assert sorted(seen) == sorted(source.every_id())
    for ranks, workers in ((1, 0), (1, 3), (3, 0), (3, 3)):
        assert drawn_ids(*sets, steps=(8, 14), ranks=ranks, workers=workers) == drawn[8:14]
