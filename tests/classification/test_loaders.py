"""Loaders: reproducible from a position alone, whatever cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from convmlp.classification.batches import seed_all
from convmlp.classification.loaders import make_loader
from convmlp.classification.options import parse_options
from convmlp.classification.process import Process
from convmlp.classification.sources import open_source
from convmlp.common.errors import RunError

RECIPE = ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--mixup", "0.8", "--cutmix", "1"]
CONFIG = dict(
    input_size=[3, 32, 32],
    mean=[0.5] * 3,
    std=[0.5] * 3,
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)


def options_for(root, *arguments):
    return parse_options(["--batch-size", "4", *arguments, str(root)])


def loader_for(root, *arguments, train=True, rank=0, world_size=1):
    options = options_for(root, *arguments)
    process = Process(torch.device("cpu"), rank, rank, world_size)
    return make_loader(open_source(options, train), options, CONFIG, process, options.num_classes or 3, train)


def batches_of(loader, epoch, first=0):
    loader.start(epoch, first)
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_draws_do_not_depend_on_workers_history_or_the_global_random_state(pictures):
    reference = batches_of(loader_for(pictures, *RECIPE, "--workers", "0"), epoch=1)
    loader = loader_for(pictures, *RECIPE, "--workers", "2")
    seed_all("something else")
    first_epoch = batches_of(loader, epoch=0)
    assert_equal_batches(batches_of(loader, epoch=1), reference)
    assert_equal_batches(batches_of(loader, epoch=1, first=3), reference[3:])
    assert not torch.equal(first_epoch[0][0], reference[0][0])


def test_seed_changes_the_draws(pictures):
    ours = batches_of(loader_for(pictures, "--workers", "0"), 0)
    theirs = batches_of(loader_for(pictures, "--workers", "0", "--seed", "43"), 0)
    assert not torch.equal(ours[0][0], theirs[0][0])


def test_mixup_stops_at_its_epoch_in_live_workers_too(pictures):
    loader = loader_for(pictures, "--mixup", "1", "--mixup-off-epoch", "1", "--workers", "1", "--smoothing", "0")
    mixed = torch.cat([targets for _, targets in batches_of(loader, 0)])
    plain = torch.cat([targets for _, targets in batches_of(loader, 1)])
    assert ((mixed > 0).sum(1) > 1).any()
    assert ((plain > 0).sum(1) == 1).all()


def test_random_erasing_changes_batches_the_same_way_each_time(pictures):
    arguments = ("--no-aug", "--workers", "0")
    plain = batches_of(loader_for(pictures, *arguments), 0)
    loader = loader_for(pictures, "--workers", "0", "--reprob", "1", "--scale", "1", "1", "--ratio", "1", "1")
    erased = batches_of(loader, 0)
    assert_equal_batches(batches_of(loader, 0), erased)
    assert not torch.equal(erased[0][0], plain[0][0])


def test_webdataset_shards_are_streamed(pictures, tmp_path):
    import webdataset

    for split in ("train", "val"):
        files = sorted((pictures / split).glob("*/*.png"))
        with webdataset.TarWriter(str(tmp_path / f"{split}-0000.tar")) as shard:
            for path in files:
                label = int(path.parent.name[-1])
                shard.write({"__key__": path.stem, "png": path.read_bytes(), "cls": label})
    arguments = ("--dataset", "wds/", "--train-split", "train-{0000..0000}.tar", "--val-split", "val-{0000..0000}.tar")
    arguments += ("--train-num-samples", "24", "--val-num-samples", "15", "--num-classes", "3", "--workers", "1")
    loader = loader_for(tmp_path, *arguments, train=False)
    targets = torch.cat([targets for _, targets in loader])
    assert sorted(targets.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    training = batches_of(loader_for(tmp_path, *arguments), 0)
    assert training and training[0][0].shape == (4, 3, 32, 32)
    with pytest.raises(RunError, match="cannot resume within an epoch"):
        loader_for(tmp_path, *arguments).start(0, 2)


@pytest.mark.parametrize(("workers", "times"), [("0", 0), ("1", 1)])
def test_freed_memory_is_given_back_before_workers_are_forked(pictures, monkeypatch, workers, times):
    """They would keep it as long as they live, while this process needs it again."""
    forked = []
    monkeypatch.setattr(
        "convmlp.classification.loaders.return_freed_memory", lambda: forked.append(loader._loader._iterator)
    )
    loader = loader_for(pictures, "--workers", workers, train=False)
    for _ in range(2):
        assert sum(len(targets) for _, targets in loader) > 0
    assert forked == [None] * times


def test_sixteen_bit_images_are_scaled_to_eight(make_pictures):
    root = make_pictures()
    image_file = sorted((root / "val" / "digit0").iterdir())[0]
    grey = np.asarray(Image.open(image_file)).astype(np.uint16)
    Image.fromarray(grey * 257).save(image_file)
    plain = make_pictures("plain")
    ours, theirs = (next(iter(loader_for(r, "--workers", "0", train=False)))[0] for r in (root, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def damaged(pictures):
    """The pictures with one of them cut short in both splits, and the names of the two."""
    names = []
    for split in ("train", "val"):
        image_file = sorted((pictures / split / "digit1").iterdir())[2]
        image_file.write_bytes(image_file.read_bytes()[:60])
        names.append(str(image_file))
    return pictures, *names


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_are_replaced_in_training_and_named(damaged, workers):
    root, name, _ = damaged
    loader = loader_for(root, "--workers", workers)
    batches = batches_of(loader, 0)
    assert [len(targets) for _, targets in batches] == [4] * 6
    assert len(loader.unreadable) == 1 and loader.unreadable[0].startswith(name)


def test_unreadable_images_are_left_out_of_evaluation_and_named(damaged):
    root, _, name = damaged
    loader = loader_for(root, "--workers", "1", train=False)
    assert sum(len(targets) for _, targets in loader) == 14
    assert loader.unreadable[0].startswith(name)


def test_a_whole_class_that_cannot_be_read_is_left_out_of_evaluation(make_pictures):
    root = make_pictures(splits={"train": 4, "val": 24})
    for image_file in (root / "val" / "digit0").iterdir():
        image_file.write_bytes(b"")
    loader = loader_for(root, "--workers", "0", "--validation-batch-size", "12", train=False)
    assert sum(len(targets) for _, targets in loader) == 48 and len(loader.unreadable) == 24


def test_an_unreadable_image_stops_the_run_when_asked_to(damaged):
    root, name, _ = damaged
    with pytest.raises(RunError, match="unreadable image .*--on-bad-image skip") as error:
        batches_of(loader_for(root, "--on-bad-image", "stop", "--workers", "1"), 0)
    assert name in str(error.value)


def test_a_folder_of_unreadable_images_ends_with_an_error(make_pictures):
    root = make_pictures(classes=(0, 1), splits={"train": 8, "val": 1})
    for image_file in root.glob("train/*/*.png"):
        image_file.write_bytes(b"not a image_file")
    with pytest.raises(RunError, match="images in a row cannot be read"):
        batches_of(loader_for(root, "--num-classes", "2", "--workers", "0"), 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "64"], "--batch-size 64 is larger than the data: 24 images"),
        (["--aa", "nonsense"], "nonsense"),
        (["--train-interpolation", "cubic"], "timm does not know this --aa or --train-interpolation"),
    ],
)
def test_batches_that_cannot_be_made_are_an_error_with_the_way_out(images, arguments, message):
    with pytest.raises(RunError) as error:
        loader_for(images, *arguments)
    assert message in str(error.value)


def test_a_training_batch_knows_its_images(images):
    loader = loader_for(images, "--workers", "0")
    names = [name for number in range(len(loader)) for name in loader.names(0, number)]
    assert sorted(names) == sorted(map(str, images.glob("train/*/*.png"))) and loader.names(1, 0) != names[:4]
