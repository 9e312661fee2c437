"""Sources, checks and loaders of classification data."""

import os
import random
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from convmlp.classification.loaders import EvalBatches, TrainBatches, make_loader, seed_all
from convmlp.classification.options import parse_options
from convmlp.classification.process import Process
from convmlp.classification.sources import DigitsSource, check_classes, open_source, relabel
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
    options = parse_options(["--batch-size", "4", *arguments, str(root)])
    options.num_classes = options.num_classes or 3
    return options


def loader_for(root, *arguments, train=True, rank=0, world_size=1):
    options = options_for(root, *arguments)
    process = Process(torch.device("cpu"), rank, rank, world_size)
    return make_loader(open_source(options, train), options, CONFIG, process, train)


def batches_of(loader, epoch, first=0):
    loader.start(epoch, first)
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


# --- batches


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
    ranks = [EvalBatches(n_images, 3, rank, world_size) for rank in range(world_size)]
    assert sorted(i for rank in ranks for batch in rank for i in batch.indices) == list(range(n_images))
    assert all(len(list(rank)) == len(rank) for rank in ranks)


# --- keyed randomness


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


def test_twenty_thousand_draws_of_the_recipes_augmentation_pass():
    transform = create_transform(16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", use_prefetcher=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    random.seed(0)
    np.random.seed(0)
    for _ in range(20_000):
        assert transform(image).shape == (3, 16, 16)


# --- sources


def test_digits_are_held_out_in_equal_shares_and_never_trained_on():
    train, held_out = DigitsSource(train=True), DigitsSource(train=False)
    assert (len(train), len(held_out)) == (1437, 360)
    assert min(np.bincount(held_out.targets)) >= 34
    assert held_out.class_names == [str(i) for i in range(10)]
    assert np.array_equal(held_out.images, DigitsSource(train=False).images)
    image, target = held_out.load(0)
    assert image.size == (8, 8) and target == held_out.targets[0]


@pytest.mark.parametrize("names", [("train", "val"), ("train", "validation"), ("training", "valid")])
def test_image_folders_are_found_under_their_usual_names(make_pictures, names):
    root = make_pictures(splits={names[0]: 4, names[1]: 2})
    options = options_for(root)
    train, val = open_source(options, True), open_source(options, False)
    assert (len(train), len(val)) == (12, 6)
    assert check_classes(train, val, parse_options([])) == ["digit0", "digit1", "digit2"]
    assert train.load(11)[1] == 2 and train.name(11).endswith(".png")


def test_tar_files_hold_the_same_pictures_as_their_folders(pictures, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as archive:
            archive.add(pictures / split, arcname=".")
    ours, theirs = (batches_of(loader_for(r, "--no-aug", "--workers", "2"), 0) for r in (tars, pictures))
    assert_equal_batches(ours, theirs)
    assert open_source(options_for(tars), True).class_names == ["digit0", "digit1", "digit2"]


def test_hugging_face_folders_are_read(pictures):
    train = open_source(options_for(pictures / "train", "--dataset", f"hfds/{pictures}"), True)
    assert len(train) == 24 and train.class_names == ["digit0", "digit1", "digit2"]
    image, target = train.load(23)
    assert image.size == (36, 36) and target == 2


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


def write_mnist(folder, images, labels, prefix):
    folder.mkdir(parents=True, exist_ok=True)
    header = np.array([0x00000803, *images.shape], dtype=">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([0x00000801, len(labels)], dtype=">i4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def test_torchvision_datasets_with_a_train_flag_are_read(tmp_path):
    source = DigitsSource(train=False)
    for prefix in ("train", "t10k"):
        write_mnist(
            tmp_path / "MNIST" / "raw", np.kron(source.images, np.ones((3, 3), np.uint8)), source.targets, prefix
        )
    options = options_for(tmp_path, "--dataset", "tv-MNIST", "--num-classes", "10")
    train = open_source(options, True)
    assert len(train) == 360 and len(train.class_names) == 10
    batches = list(loader_for(tmp_path, "--dataset", "tv-MNIST", "--workers", "0", train=False))
    assert len(batches) == 90 and batches[0][0].shape == (4, 3, 32, 32)


def test_torchvision_datasets_with_splits_are_read_under_synonyms(make_pictures):
    root = make_pictures("country211", splits={"train": 3, "valid": 2, "test": 1}).parent
    for name in ("validation", "val", "valid"):
        options = options_for(root, "--dataset", "tv-Country211", "--val-split", name)
        assert len(open_source(options, False)) == 6
    assert len(open_source(options_for(root, "--dataset", "tv-Country211", "--val-split", "test"), False)) == 3
    with pytest.raises(RunError, match="no split 'nope'"):
        open_source(options_for(root, "--dataset", "tv-Country211", "--val-split", "nope"), False)


def test_classes_are_numbered_by_name_alone(make_pictures):
    root = make_pictures(classes=(0, 1, 2), splits={"train": 2, "val": 1})
    for split in ("train", "val"):
        for digit, name in enumerate(("b", "A", "a")):  # A and a are ties of timm's sorting key
            (root / split / f"digit{digit}").rename(root / split / name)
    script = "from convmlp.classification import sources, options as o; import sys;"
    script += "s = sources.open_source(o.parse_options([sys.argv[1]]), True); print(s.class_names, s.load(0)[1])"
    for seed in ("0", "1", "2", "3"):
        command = [sys.executable, "-c", script, str(root)]
        shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert shown.stdout == "['A', 'a', 'b'] 0\n", shown.stderr


def test_hidden_folders_are_passed_over_and_many_formats_read(make_pictures):
    root = make_pictures()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    for i, extension in enumerate(("bmp", "webp", "tif", "gif", "ppm")):
        picture = sorted((root / "train" / "digit1").iterdir())[i]
        Image.open(picture).convert("L").save(picture.with_suffix(f".{extension}"))
        Image.open(picture).save(root / "train" / ".ipynb_checkpoints" / picture.name)
        picture.unlink()
    train = open_source(options_for(root), True)
    assert len(train) == 24 and train.class_names == ["digit0", "digit1", "digit2"]
    assert sum(len(targets) for _, targets in batches_of(loader_for(root, "--workers", "0"), 0)) == 24


def test_a_class_map_orders_classes_and_says_which_folders_it_leaves_out(pictures, tmp_path, caplog):
    (tmp_path / "map.txt").write_text("digit2\ndigit0\n")
    source = open_source(options_for(pictures, "--class-map", str(tmp_path / "map.txt")), True)
    assert source.class_names == ["digit2", "digit0"] and len(source) == 16
    assert "lacks 1 folders" in caplog.text and "digit1" in caplog.text


def test_sixteen_bit_pictures_are_scaled_to_eight(make_pictures):
    root = make_pictures()
    picture = sorted((root / "val" / "digit0").iterdir())[0]
    grey = np.asarray(Image.open(picture)).astype(np.uint16)
    Image.fromarray(grey * 257).save(picture)
    plain = make_pictures("plain")
    ours, theirs = (next(iter(loader_for(r, "--workers", "0", train=False)))[0] for r in (root, plain))
    torch.testing.assert_close(ours, theirs)


def test_a_source_can_take_the_class_numbers_of_a_checkpoint(make_pictures):
    source = open_source(options_for(make_pictures(classes=(1, 2))), True)
    relabelled = relabel(source, ["digit2", "digit0", "digit1"], "best.pth")
    assert (source.load(0)[1], source.load(15)[1]) == (0, 1)
    assert (relabelled.load(0)[1], relabelled.load(15)[1]) == (2, 0)
    assert relabel(source, ["digit1", "digit2"], "best.pth") is source
    with pytest.raises(RunError, match="best.pth does not know the class digit2 of the data"):
        relabel(source, ["digit1", "digit7"], "best.pth")


# --- mistakes in the data


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "tv-CIFAR11"], "no dataset CIFAR11; did you mean CIFAR10?"),
        (["--dataset", "tv-cifar10"], "no dataset cifar10; did you mean CIFAR10?"),
        (["--dataset", "tv-CIFAR10"], "--download"),
        (["--dataset", "tv-FakeData"], "neither train= nor split="),
        (["--dataset", "digits"], "did you mean sklearn-digits?"),
        (["--train-split", "nope"], "no nope folder"),
        (["--batch-size", "64"], "--batch-size 64 is larger than the data: 24 images"),
        (["--aa", "nonsense"], "nonsense"),
        (["--class-map", "nowhere.txt"], "no such --class-map: nowhere.txt"),
        (["--dataset", "tv-Kinetics"], "cannot open Kinetics"),
        (["--dataset", "hfds/nowhere/at/all"], "cannot open --dataset hfds/nowhere/at/all"),
    ],
)
def test_data_that_is_not_there_is_an_error_with_the_way_out(pictures, arguments, message):
    with pytest.raises(RunError) as error:
        loader_for(pictures, *arguments)
    assert message in str(error.value)


def test_missing_folders_are_named(tmp_path):
    for root, message in ((tmp_path / "nope", "no such data folder"), (tmp_path, "no train folder in")):
        with pytest.raises(RunError, match=message):
            open_source(options_for(root), True)
    with pytest.raises(RunError, match="no data folder"):
        open_source(parse_options([]), True)


def test_pictures_outside_class_folders_are_refused(pictures):
    picture = next((pictures / "train" / "digit0").iterdir())
    picture.rename(pictures / "train" / "loose.png")
    with pytest.raises(RunError, match="holds images beside its class folders"):
        open_source(options_for(pictures), True)


def test_class_folders_of_one_name_are_refused(pictures):
    for name in ("digit0", "digit1"):
        (pictures / "train" / name).rename(pictures / "train" / "parked")
        (pictures / "train" / name).mkdir()
        (pictures / "train" / "parked").rename(pictures / "train" / name / "small")
    with pytest.raises(RunError, match="two class folders in .* have one name: "):
        open_source(options_for(pictures), True)


def test_a_broken_tar_file_is_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"nothing like a tar file" * 100)
    with pytest.raises(RunError, match="cannot read .*train.tar"):
        open_source(options_for(tmp_path), True)


def test_empty_class_folders_are_named(pictures):
    (pictures / "train" / "digit9").mkdir()
    with pytest.raises(RunError, match="class folder .*digit9 holds no images"):
        open_source(options_for(pictures), True)


def test_classes_must_agree_between_train_val_and_num_classes(make_pictures):
    root = make_pictures()
    for picture in (root / "val" / "digit2").iterdir():
        picture.unlink()
    (root / "val" / "digit2").rmdir()
    train, val = (open_source(options_for(root), is_train) for is_train in (True, False))
    with pytest.raises(RunError, match="training data has 3 classes, the validation data 2; .* digit2"):
        check_classes(train, val, parse_options([]))
    with pytest.raises(RunError, match="--num-classes is 7, but the data has 3"):
        check_classes(train, train, parse_options(["--num-classes", "7"]))
    with pytest.raises(RunError, match="give --num-classes"):
        check_classes(SimpleNamespace(class_names=[]), SimpleNamespace(class_names=[]), parse_options([]))


@pytest.fixture
def damaged(pictures):
    """The pictures with one of them cut short in both splits, and the names of the two."""
    names = []
    for split in ("train", "val"):
        picture = sorted((pictures / split / "digit1").iterdir())[2]
        picture.write_bytes(picture.read_bytes()[:60])
        names.append(str(picture))
    return pictures, *names


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_pictures_are_replaced_in_training_and_named(damaged, workers):
    root, name, _ = damaged
    loader = loader_for(root, "--workers", workers)
    batches = batches_of(loader, 0)
    assert [len(targets) for _, targets in batches] == [4] * 6
    assert len(loader.unreadable) == 1 and loader.unreadable[0].startswith(name)


def test_unreadable_pictures_are_left_out_of_evaluation_and_named(damaged):
    root, _, name = damaged
    loader = loader_for(root, "--workers", "1", train=False)
    assert sum(len(targets) for _, targets in loader) == 14
    assert loader.unreadable[0].startswith(name)


def test_a_whole_class_that_cannot_be_read_is_left_out_of_evaluation(make_pictures):
    root = make_pictures(splits={"train": 4, "val": 24})
    for picture in (root / "val" / "digit0").iterdir():
        picture.write_bytes(b"")
    loader = loader_for(root, "--workers", "0", "--validation-batch-size", "12", train=False)
    assert sum(len(targets) for _, targets in loader) == 48 and len(loader.unreadable) == 24


def test_an_unreadable_picture_stops_the_run_when_asked_to(damaged):
    root, name, _ = damaged
    with pytest.raises(RunError, match="unreadable image .*--on-bad-image skip") as error:
        batches_of(loader_for(root, "--on-bad-image", "stop", "--workers", "1"), 0)
    assert name in str(error.value)


def test_a_folder_of_unreadable_pictures_ends_with_an_error(make_pictures):
    root = make_pictures(classes=(0, 1), splits={"train": 8, "val": 1})
    for picture in root.glob("train/*/*.png"):
        picture.write_bytes(b"not a picture")
    with pytest.raises(RunError, match="images in a row cannot be read"):
        batches_of(loader_for(root, "--num-classes", "2", "--workers", "0"), 0)
