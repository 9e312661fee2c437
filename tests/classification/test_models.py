"""Models of a run: their starting weights, their teachers, their arguments."""

import csv
from itertools import pairwise

import pytest
import timm
import torch

from convmlp import ConvMLP, convmlp_s
from convmlp.backbones import hold
from convmlp.classification.models import build_optimizer, build_schedule, first_stages
from convmlp.classification.options import parse_options
from convmlp.common.errors import RunError

from .conftest import ROOT

KWARGS = dict(blocks=(1, 1, 1), dims=(8, 16, 32), mlp_ratios=(1, 1, 1), channels=8, n_conv_blocks=1, final_norm=True)
STILL = ["--epochs", "1", "--lr", "0", "--min-lr", "0", "--warmup-lr", "0"]


def read(path):
    return torch.load(path, weights_only=True)


def rows_of(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_weights_from_a_file_keep_everything_but_a_head_of_other_classes(run, tmp_path):
    torch.manual_seed(1)
    source = ConvMLP(**KWARGS, num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "seven.pth")
    code, said, folder = run("--initial-checkpoint", str(tmp_path / "seven.pth"), *STILL)
    assert code == 0 and "has 7 classes, the data 3: the head starts afresh" in said
    weights = read(folder / "last.pth")["state_dict"]
    name = "stages.1.blocks.0.channel_mlp1.fc1.weight"
    torch.testing.assert_close(weights[name], source.state_dict()[name])
    assert weights["head.weight"].shape == (3, 32)


def test_a_head_of_other_classes_is_not_kept_for_their_number(run, trained, make_pictures):
    arguments = ["--initial-checkpoint", str(trained.folder / "best.pth"), *STILL]
    code, said, same = run(*arguments, experiment="same")
    assert code == 0 and "starts afresh" not in said
    others = make_pictures("others", classes=(4, 5, 6))
    code, said, new = run(*arguments, experiment="new", data=others)
    assert code == 0 and "knows other classes (digit0, digit1, digit2, ...) than the data has" in said
    heads = [read(f / "last.pth")["state_dict"]["head.weight"] for f in (same, new)]
    original = read(trained.folder / "best.pth")["state_dict"]["head.weight"]
    torch.testing.assert_close(heads[0], original)
    assert not torch.allclose(heads[1], original)


def test_a_fine_tuning_config_starts_from_the_published_weights_in_the_cache(run, tmp_path, monkeypatch):
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    source = convmlp_s()
    torch.save(source.state_dict(), cache / "convmlp_s_imagenet.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = ROOT / "configs" / "classification" / "finetuned" / "convmlp_s_flowers102.yml"
    arguments = ["-c", str(config), "--dataset", "", "--num-classes", "3", "--cooldown-epochs", "0"]
    code, said, folder = run(*arguments, *STILL, model=[])
    assert code == 0, said
    name = "stages.0.blocks.0.connect.weight"
    torch.testing.assert_close(read(folder / "best.pth")["state_dict"][name], source.state_dict()[name])


def test_a_teacher_is_distilled_from(run, tmp_path):
    torch.manual_seed(0)
    checkpoint = str(tmp_path / "teacher.pth")
    torch.save(convmlp_s(num_classes=3).state_dict(), checkpoint)
    losses = {}
    for weight in ("0", "100"):
        arguments = ["--kd-model", "convmlp_s", "--kd-checkpoint", checkpoint, "--kd-weight", weight, *STILL]
        code, said, folder = run(*arguments, experiment=f"kd{weight}")
        assert code == 0, said
        losses[weight] = float(rows_of(folder)[0]["train_loss"])
    assert losses["100"] > losses["0"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--amp", "--amp-dtype", "bfloat16", "--clip-grad", "1", "--layer-decay", "0.8"],
        ["--grad-checkpointing", "--no-channels-last", "--opt", "lamb", "--sched", "step"],
        ["--in-chans", "1", "--opt", "sgd", "--clip-grad", "0.02", "--clip-mode", "agc", "--gp", "max"],
        ["--crop-mode", "squash", "--drop-path", "0", "--eval-metric", "loss", "--opt-betas", "0.8", "0.9"],
        ["--bce-loss", "--bce-target-thresh", "0.2", "--aug-repeats", "3", "--aa", "3a", "--class-weights", "auto"],
        ["--in-chans", "1", "--aa", "3a", "--grayscale-prob", "0.5", "--gaussian-blur-prob", "0.5", "--mixup", "0.5"],
        ["--opt", "sgd", "--opt-kwargs", "nesterov=False", "--balanced-sampling", "--freeze", "1"],
        ["--model", "test_resnet", "--model-ema", "--model-ema-warmup", "--smoothing", "0"],
    ],
)
def test_options_reach_a_run_that_learns_something(run, arguments):
    code, said, folder = run(*arguments, **({"model": []} if "--model" in arguments else {}))
    assert code == 0, said
    rows = rows_of(folder)
    assert len(rows) == 2 and float(rows[1]["train_loss"]) != float(rows[0]["train_loss"])


def test_frozen_stages_stay_as_they_are_to_the_bit_and_the_others_learn(run, tmp_path):
    torch.manual_seed(1)
    source = ConvMLP(**KWARGS, num_classes=3)
    torch.save(source.state_dict(), tmp_path / "three.pth")
    code, said, folder = run("--initial-checkpoint", str(tmp_path / "three.pth"), "--freeze", "3", "--drop", "0.1")
    assert code == 0, said
    weights = read(folder / "last.pth")["state_dict"]
    for name, value in source.state_dict().items():
        frozen = name.startswith(("tokenizer.", "conv_stages.", "stages.0."))
        assert frozen == torch.equal(weights[name], value) or name.endswith("num_batches_tracked"), name
    code, said, _ = run("--resume", "auto", "--freeze", "3", "--epochs", "3")
    assert code == 0, said
    code, said, _ = run("--resume", "auto", "--freeze", "1", "--epochs", "4")
    assert code == 2 and "does not fit this run" in said


def test_the_first_stages_are_the_parts_of_a_convmlp():
    for count in range(6):
        model = ConvMLP(**KWARGS).train()
        hold(first_stages(model, count))
        for number, part in enumerate(model.parts().values()):
            assert {module.training for module in part.modules()} == {number >= count}
            assert {weight.requires_grad for weight in part.parameters()} == {number >= count}
        assert model.training and model.head.weight.requires_grad
    with pytest.raises(RunError, match="--freeze 6: the model has 5 stages"):
        first_stages(model, 6)


def test_stages_of_other_models_are_frozen_with_their_statistics():
    model = timm.create_model("test_resnet").train()
    hold(first_stages(model, 2))
    assert (
        not next(model.conv1.parameters()).requires_grad and not model.bn1.training and not model.layer1[0].bn1.training
    )
    assert model.layer2[0].conv1.weight.requires_grad and model.layer2[0].bn1.training and model.fc.training
    with pytest.raises(RunError, match="--freeze 1: Linear does not tell its stages"):
        first_stages(torch.nn.Linear(1, 1), 1)


def test_arguments_reach_the_optimizer_by_name():
    model = torch.nn.Linear(1, 1)
    arguments = ["--opt", "adamw", "--opt-kwargs"]
    optimizer = build_optimizer(parse_options([*arguments, "amsgrad=True", "fused=False"]), model, torch.device("cpu"))
    assert optimizer.defaults["amsgrad"] and not optimizer.defaults["fused"]
    for text, message in {"lr=1": "--opt-kwargs lr: that has an option of its own", "x=1": "argument 'x'"}.items():
        with pytest.raises(RunError, match=message):
            build_optimizer(parse_options([*arguments, text]), model, torch.device("cpu"))


def rates(updates_per_epoch, *arguments):
    """The learning rate of each update of a run and the one after them, and its epochs."""
    options = parse_options([*arguments, "--lr", "0.1", "--min-lr", "0.001", "--warmup-lr", "0.0001"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    scheduler, epochs = build_schedule(options, "top1", optimizer, updates_per_epoch)
    values = [optimizer.param_groups[0]["lr"]]
    for update in range(1, epochs * updates_per_epoch + 1):
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values, epochs


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly"])
def test_the_rate_joins_the_schedule_without_a_jump_and_ends_at_its_end(sched):
    arguments = ["--epochs", "10", "--warmup-epochs", "4", "--sched", sched, "--decay-rate", "1"]
    values, epochs = rates(20, *arguments)
    assert epochs == 14 and values[0] == 0.0001 and values[-1] == pytest.approx(0.001)
    assert max(values) == pytest.approx(0.1, rel=0.01) and values.index(max(values)) in (79, 80, 81)
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.003


def test_without_the_prefix_the_warm_up_hides_the_beginning_of_the_schedule():
    values, epochs = rates(20, "--epochs", "10", "--warmup-epochs", "4", "--no-warmup-prefix")
    assert epochs == 10 and values[79] - values[80] > 0.01 and values[-1] == pytest.approx(0.001)


def test_a_warm_up_that_is_too_long_is_shortened_with_a_word(caplog):
    values, epochs = rates(2, "--epochs", "10", "--warmup-epochs", "12")
    assert "--warmup-epochs 12 is not shorter than --epochs 10: the warm-up takes 2 epochs" in caplog.text
    assert epochs == 12 and values.index(max(values)) == 4
    caplog.clear()
    assert rates(2, "--epochs", "10", "--warmup-epochs", "9")[1] == 19 and not caplog.text


def test_without_a_schedule_there_is_no_warm_up(caplog):
    options = parse_options(["--sched", "none", "--epochs", "3"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert build_schedule(options, "top1", optimizer, 2) == (None, 3) and not caplog.text


def test_arguments_of_the_model_are_kept_with_it(run):
    from .conftest import TINY

    switches = [*TINY[:-1], "conv_stage=False,conv_downsample=False,spatial_connect=False"]
    code, said, folder = run("--epochs", "1", model=switches)
    assert code == 0, said
    best = read(folder / "best.pth")
    assert best["args"]["model_kwargs"]["spatial_connect"] is False
    assert "tokenizer.projection.weight" in best["state_dict"]
    top1 = float(rows_of(folder)[0]["eval_top1"])
    code, said, _ = run("--eval", str(folder / "best.pth"), model=[])
    assert code == 0 and f"top-1 {top1:.2f} %" in said
    assert run("--resume", "auto", model=switches).code == 0 and len(rows_of(folder)) == 2
