"""Batches and their keyed random draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from convmlp.classification.batches import EvalDataset, TrainBatches, eval_batches, seed_all


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
