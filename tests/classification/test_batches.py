"""Batches and their keyed random draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from convmlp.classification.batches import (
    Batch,
    EvalDataset,
    TrainBatches,
    TrainDataset,
    count_earlier,
    eval_batches,
    seed_all,
)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_global_batch_of_a_shuffled_epoch(world_size):
    ranks = [list(TrainBatches(50, 12 // world_size, 7, rank, world_size)) for rank in range(world_size)]
    alone = list(TrainBatches(50, 12, 7, 0, 1))
    together = [sum((share.indices for share in shares), []) for shares in zip(*ranks, strict=True)]
    assert together == [batch.indices for batch in alone]
    assert len({i for batch in together for i in batch}) == 48


def test_epochs_are_shuffled_differently_and_continue_anywhere():
    batches = TrainBatches(40, 8, 0, 0, 1)
    batches.start(3)
    whole = list(batches)
    batches.start(3, 2)
    assert list(batches) == whole[2:]
    batches.start(4)
    assert [b.indices for b in batches] != [b.indices for b in whole]


UNEVEN = np.repeat([0, 1, 3], [40, 15, 5])


def test_a_balanced_epoch_has_as_many_images_of_each_class_and_uses_all_before_one_comes_again():
    batches = TrainBatches(60, 6, 0, 0, 1, targets=UNEVEN)
    indices = [i for batch in batches for i in batch.indices]
    counts = np.bincount(indices, minlength=60)
    assert len(indices) == 60 and np.bincount(UNEVEN[indices]).tolist() == [20, 20, 0, 20]
    assert {*counts[:40]} == {0, 1} and {*counts[40:55]} == {1, 2} and {*counts[55:]} == {4}
    assert indices != sorted(indices, key=lambda i: UNEVEN[i])  # the classes are mixed
    batches.start(1)
    assert [i for batch in batches for i in batch.indices] != indices


@pytest.mark.parametrize("n_images", [7, 8])
def test_a_balanced_epoch_has_its_length_where_the_classes_do_not_divide_it(n_images):
    targets = np.arange(n_images) % 3
    counts = [
        np.bincount(targets[TrainBatches(n_images, n_images, seed, 0, 1, targets=targets).batch(0, 0).indices])
        for seed in range(9)
    ]
    assert {sum(each) for each in counts} == {n_images} and {max(each) - min(each) for each in counts} == {1}
    assert len({tuple(each) for each in counts}) == 3  # no class is the one that always has more


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_balanced_epoch_is_shared_by_the_ranks_and_continues_anywhere(world_size):
    ranks = [TrainBatches(60, 12 // world_size, 7, rank, world_size, targets=UNEVEN) for rank in range(world_size)]
    alone = TrainBatches(60, 12, 7, 0, 1, targets=UNEVEN)
    alone.start(2, 3)
    for rank in ranks:
        rank.start(2, 3)
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert whole.indices == sum((share.indices for share in shares), [])
        assert whole.repetitions == sum((share.repetitions for share in shares), [])


def test_repeated_augmentation_keeps_the_length_and_the_order_of_the_epoch():
    plain, repeated = TrainBatches(50, 10, 3, 0, 1), TrainBatches(50, 10, 3, 0, 1, repeats=3)
    order = [i for batch in plain for i in batch.indices]
    assert [i for batch in repeated for i in batch.indices] == [i for i in order[:17] for _ in range(3)][:50]
    assert repeated.batch(0, 0).repetitions == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(plain) == len(repeated) and not any(sum((batch.repetitions for batch in plain), []))


def test_earlier_ones_are_counted():
    assert count_earlier(np.array([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def test_each_repetition_of_an_image_is_augmented_in_its_own_way():
    class Source:
        def __len__(self):
            return 2

        def load(self, index):
            return Image.new("RGB", (1, 1)), 0

    dataset = TrainDataset(Source(), lambda image: np.full((1, 1, 1), random.randrange(256), np.uint8), "RGB", seed=0)
    drawn = [dataset.__getitems__(Batch(0, 0, [0, 0, 1], [0, n, 0]))[0].flatten().tolist() for n in (1, 2, 1)]
    assert drawn[0] == drawn[2] and drawn[0][1] != drawn[1][1] and len({*drawn[0]}) == 3
    seed_all(0, "image", 0, 1)
    assert drawn[0][2] == random.randrange(256)  # the key of an image that comes once


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n_images", [1, 13, 16])
def test_evaluation_sees_every_image_once_over_the_ranks(n_images, world_size):
    ranks = [eval_batches(n_images, 3, rank, world_size) for rank in range(world_size)]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(n_images))
    assert all(len(list(rank)) == len(rank) for rank in ranks)


@pytest.mark.slow
def test_twenty_thousand_draws_of_the_recipes_augmentation_pass():
    transform = create_transform(16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", use_prefetcher=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    random.seed(0)
    np.random.seed(0)
    for _ in range(20_000):
        assert transform(image).shape == (3, 16, 16)


def test_transparent_images_lie_on_white_in_training_too():
    class Source:
        class_names = ["red"]

        def __len__(self):
            return 1

        def load(self, index):
            return Image.new("RGBA", (4, 4), (200, 0, 0, 0)), 0

        def name(self, index):
            return "red"

    dataset = EvalDataset(Source(), np.array, "RGB")
    images, targets, unreadable = dataset.__getitems__([0])
    assert images.shape[-1] == 3 and (images == 255).all() and targets.tolist() == [0] and not unreadable


def test_the_key_seeds_apples_gpus_too(monkeypatch):
    seeds = []
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.manual_seed", seeds.append)
    for key in ("a", "b", "a"):
        seed_all(0, key)
    assert seeds[0] == seeds[2] != seeds[1]


def test_the_key_alone_decides_what_is_drawn():
    draws = []
    for key in ("a", "b", "a"):
        seed_all(0, key)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[2] and all(x != y for x, y in zip(draws[0], draws[1], strict=True))
