"""The options of classification.py, typed, in groups.

`Options` is all groups in one, so a function names the group that it needs and is given the options. Each option is
stated once: its name, type, default, help and range. Names are those of timm's training script wherever it has the
option, so that its recipes carry over.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from .groups import (
    AREAS,
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_EACH,
    RATIOS,
    SHARE,
    Group,
    flag_of,
    keywords,
    number_or_auto,
    numbers,
    option,
    require,
)

NOT_STORED = {"config", "check_data", "resume", "eval", "overwrite"}
NOT_STREAMED = {"checkpoint_interval", "mixup_off_epoch", "on_bad_image", "balanced_sampling", "aug_repeats"}


@dataclass(frozen=True)
class Run(Group):
    """what to do"""

    config: str | None = option(None, "a YAML file, or one of `convmlp configs`", "FILE|NAME", flags="-c")
    recipe: Literal["auto", "finetune", "scratch", "probe"] | None = option(
        None, "choose defaults by the images; auto: finetune if there are weights, else scratch; probe: the head alone"
    )
    check_data: bool = option(False, "only look at the images: counts, sizes, unreadable ones, duplicates")
    eval: str | None = option(
        None, "only evaluate this checkpoint or exported file; its own settings are the defaults", "FILE"
    )
    resume: str | None = option(None, "continue a run: auto takes the folder's newest checkpoint", "auto|FILE")
    overwrite: bool = option(False, "replace an earlier run in the output folder")
    output: str | None = option(None, "where runs go, by default output; with --eval beside the checkpoint", "DIR")
    experiment: str | None = option(None, "folder of this run in --output; by default the config or model", "NAME")


@dataclass(frozen=True)
class Data(Group):
    """data"""

    data_dir: str | None = option(None, "the same as DATA", "DIR|FILE")
    dataset: str = option("", "'' image folder, CSV or tar, tv-NAME torchvision, hfds/NAME, wds/, sklearn-digits")
    train_split: str = option("train", "", "NAME")
    val_split: str = option("validation", "val, valid and validation stand for each other", "NAME")
    val_share: float = option(0.2, "what validates of images that are not divided yet", "F", SHARE)
    download: bool = option(False, "let a tv- dataset download itself", flags="--dataset-download")
    multi_label: bool = option(False, "any number of labels an image: cells such as cat;dog in the table that DATA is")
    class_map: str | None = option(None, "text file of class names in the order of their numbers", "FILE")
    num_classes: int | None = option(None, "auto takes the data's", "N|auto", type=number_or_auto)
    input_key: str | None = option(None, "image field of an hfds or wds dataset", "NAME")
    target_key: str | None = option(None, "label field of an hfds or wds dataset", "NAME")
    train_num_samples: int | None = option(None, "images in a wds training set that does not say so itself", "N")
    val_num_samples: int | None = option(None, "likewise for validation", "N")
    balanced_sampling: bool = option(False, "draw the classes equally often, and as many images an epoch as there are")
    on_bad_image: Literal["skip", "stop"] = option("skip", "an unreadable image is named and skipped")
    workers: int | None = option(None, "loader processes; by default its cores, up to 8", "N", NOT_NEGATIVE, flags="-j")
    pin_mem: bool = option(True, "pinned memory for copies to a GPU")

    @property
    def streamed(self) -> bool:
        """Whether the images come one after the other, in an order that is not ours."""
        return self.dataset.partition("/")[0].lower() in ("wds", "tfds", "hfids")


@dataclass(frozen=True)
class Model(Group):
    """model"""

    model: str = option("convmlp_s", "any timm model, ours among them", "NAME")
    pretrained: bool = option(False, "start from the published ImageNet weights")
    initial_checkpoint: str | None = option(None, "start from these weights; the head may have other classes", "FILE")
    freeze: int = option(
        0, "do not train the first N stages (ConvMLP: tokenizer, convolutions, ...)", "N", NOT_NEGATIVE
    )
    drop: float = option(0.0, "dropout before the head", "P", BELOW_ONE)
    drop_path: float | None = option(None, "stochastic depth; by default the model's (ConvMLP 0.1)", "P", BELOW_ONE)
    gp: str | None = option(None, "global pooling: avg, max, avgmax", "POOL")
    model_kwargs: dict[str, Any] = option({}, "arguments of the model: conv_stage=False", "KEY=VALUE", type=keywords)
    grad_checkpointing: bool = option(False, "recompute activations to save memory")
    use_ema: bool = option(True, "--eval and --initial-checkpoint prefer averaged weights")


@dataclass(frozen=True)
class Images(Group):
    """image size and normalisation; by default the model's"""

    img_size: int | None = option(None, "", "PX", POSITIVE)
    in_chans: Literal[1, 3] = option(3, "1 reads images as greyscale")
    mean: list[float] | None = option(None, "one value or one a channel; blanks may separate", "M[,M,M]", type=numbers)
    std: list[float] | None = option(None, "", "S[,S,S]", POSITIVE_EACH, type=numbers)
    interpolation: str | None = option(None, "for evaluation: bilinear, bicubic, ...", "NAME")
    crop_pct: float | None = option(None, "evaluation crop over resized image", "F", POSITIVE)
    crop_mode: Literal["center", "squash", "border"] | None = option(None, "evaluation crop")

    @property
    def mode(self) -> str:
        """Pillow's name for the channels that images are read in."""
        return "L" if self.in_chans == 1 else "RGB"


@dataclass(frozen=True)
class Machine(Group):
    """machine"""

    device: str = option("auto", "auto (cuda, else mps, else cpu), or a device")
    amp: bool = option(True, "mixed precision; by default in training, not with --eval")
    amp_dtype: Literal["auto", "bfloat16", "float16"] = option("auto", "auto: bfloat16 where it is native")
    channels_last: bool = option(True, "memory layout; the faster one")
    compile: bool = option(False, "torch.compile; the first step then takes up to a minute")
    sync_bn: bool = option(False, "BatchNorm over all GPUs")
    find_unused_parameters: bool = option(
        False, "for models that leave weights out; lets 3 or more processes resume bit for bit"
    )
    dist_bn: Literal["reduce", "broadcast", ""] = option("reduce", "BatchNorm statistics after an epoch")
    seed: int = option(42, range=NOT_NEGATIVE)


@dataclass(frozen=True)
class Schedule(Group):
    """schedule"""

    epochs: int = option(300, "of the schedule: without --cooldown-epochs and a prefixed warm-up", "N", POSITIVE)
    batch_size: int = option(128, "images a process and step", "N", POSITIVE, flags="-b")
    validation_batch_size: int | None = option(None, "by default the training batch", "N", POSITIVE)
    grad_accum_steps: int = option(1, "steps whose gradients make one update", "N", POSITIVE)
    sched: str = option("cosine", "cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau, none")
    lr: float = option(5e-4, "learning rate; not scaled by batch size or processes", range=NOT_NEGATIVE)
    min_lr: float = option(1e-5, range=NOT_NEGATIVE)
    warmup_lr: float = option(1e-6, range=NOT_NEGATIVE)
    warmup_epochs: int = option(5, "the rate rises; a fifth of --epochs if not shorter than these", "N", NOT_NEGATIVE)
    warmup_prefix: bool = option(True, "the schedule begins after the warm-up, whose epochs come on top of --epochs")
    early_stop: int = option(0, "end after N epochs without a better --eval-metric; 0 never", "N", NOT_NEGATIVE)
    cooldown_epochs: int = option(0, "epochs at --min-lr after the schedule", "N", NOT_NEGATIVE)
    patience_epochs: int = option(10, "for plateau", "N", NOT_NEGATIVE)
    decay_epochs: float = option(90, "for step, wsd, rsqrt", "N", POSITIVE)
    decay_milestones: list[float] = option([90, 180, 270], "for multistep", "N,N", type=numbers)
    decay_rate: float = option(0.1, "for step, multistep, plateau; the power for poly")

    @property
    def eval_batch_size(self) -> int:
        """Images a process and step of an evaluation."""
        return self.validation_batch_size or self.batch_size

    @property
    def shortened_warmup(self) -> int:
        """--warmup-epochs, or a fifth of --epochs where they would fill it: at least one, but none of a single one."""
        if self.warmup_epochs < self.epochs:
            return self.warmup_epochs
        return max(1, self.epochs // 5) if self.epochs > 1 else 0


@dataclass(frozen=True)
class Optimizer(Group):
    """optimizer and loss"""

    opt: str = option("adamw", "any optimizer of timm")
    opt_eps: float | None = option(None)
    opt_betas: list[float] | None = option(None, nargs=2)
    opt_kwargs: dict[str, Any] = option({}, "arguments of the optimizer: nesterov=False", "KEY=VALUE", type=keywords)
    momentum: float = option(0.9)
    weight_decay: float = option(0.05)
    layer_decay: float | None = option(None, "learning rate factor from a layer to the one before it", "F")
    clip_grad: float | None = option(None, "clip gradients", "X", POSITIVE)
    clip_mode: Literal["norm", "value", "agc"] = option("norm")
    smoothing: float = option(0.1, "label smoothing", range=BELOW_ONE)
    bce_loss: bool = option(False, "binary cross-entropy of each class")
    bce_target_thresh: float | None = option(None, "with --bce-loss: targets above it are 1, others 0", "X", FRACTION)
    bce_sum: bool = option(False, "with --bce-loss: sum over the classes, not their mean")
    class_weights: str | None = option(
        None,
        "weights of the classes in the loss: auto, by inverse frequency, or a file of lines class,weight",
        "auto|FILE",
    )
    model_ema: bool = option(False, "keep and evaluate a moving average of the weights")
    model_ema_decay: float = option(0.9998, range=BELOW_ONE)
    model_ema_warmup: bool = option(False, "let the decay rise to its value")
    kd_model: str | None = option(None, "distil from this timm model's logits (pretrained, or --kd-checkpoint)", "NAME")
    kd_checkpoint: str | None = option(None, "weights of the teacher", "FILE")
    kd_weight: float = option(1.0, "weight of the distillation loss beside the task's")
    kd_temperature: float = option(1.0, range=POSITIVE)


@dataclass(frozen=True)
class Augmentation(Group):
    """augmentation"""

    aug: bool = option(True, "--no-aug: resize and crop only")
    scale: list[float] = option([0.08, 1.0], "area of the random crop", range=AREAS, nargs=2)
    ratio: list[float] = option([3 / 4, 4 / 3], "aspect ratio of the random crop", range=RATIOS, nargs=2)
    train_interpolation: str = option("random", "random, bilinear, bicubic, ...")
    hflip: float = option(0.5, "", "P", FRACTION)
    vflip: float = option(0.0, "", "P", FRACTION)
    color_jitter: float = option(0.4, "without --aa")
    aa: str | None = option(None, "rand-m9-mstd0.5-inc1, augmix-..., 3a, original, ...", "POLICY")
    grayscale_prob: float = option(0.0, "", "P", FRACTION)
    gaussian_blur_prob: float = option(0.0, "", "P", FRACTION)
    aug_repeats: int = option(0, "N differently augmented copies of each image of an epoch; 0 one", "N", NOT_NEGATIVE)
    reprob: float = option(0.0, "random erasing", "P", FRACTION)
    remode: Literal["const", "rand", "pixel"] = option("pixel")
    recount: int = option(1, range=POSITIVE)
    mixup: float = option(0.0, "", "ALPHA", NOT_NEGATIVE)
    cutmix: float = option(0.0, "", "ALPHA", NOT_NEGATIVE)
    cutmix_minmax: list[float] | None = option(None, range=AREAS, nargs=2)
    mixup_prob: float = option(1.0, "", "P", FRACTION)
    mixup_switch_prob: float = option(0.5, "cutmix rather than mixup, if both are on", "P", FRACTION)
    mixup_mode: Literal["batch", "pair", "elem"] = option("batch")
    mixup_off_epoch: int = option(0, "no mixup from this epoch on; 0 never", "N", NOT_NEGATIVE)

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix blend images and targets."""
        return self.aug and (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None)


@dataclass(frozen=True)
class Records(Group):
    """records"""

    checkpoint_interval: int = option(0, "also save within epochs; 0 at their ends", "STEPS", NOT_NEGATIVE)
    checkpoint_minutes: float = option(10, "also save when this time has passed; 0 never", "MINUTES", NOT_NEGATIVE)
    skip_nonfinite: int = option(
        0, "leave out up to N updates with NaN or infinity; by default the first ends the run", "N", NOT_NEGATIVE
    )
    log_interval: int = option(50, "log lines where there is no terminal", "STEPS", POSITIVE)
    eval_metric: Literal["auto", "top1", "top5", "balanced_accuracy", "macro_f1", "map", "loss"] = option(
        "auto",
        "what makes an epoch the best; auto: map for --multi-label, balanced_accuracy of uneven classes, else top1",
    )
    log_tensorboard: bool = option(False)
    log_wandb: bool = option(False)
    log_mlflow: bool = option(False, "where MLFLOW_TRACKING_URI says, by default in this folder")
    wandb_project: str | None = option(None, "", "NAME")


@dataclass(frozen=True)
class Options(Run, Data, Model, Images, Machine, Schedule, Optimizer, Augmentation, Records):
    """All options of a call; what cannot go together is checked here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            rule = f"{name} takes one value or one a channel ({self.in_chans}), got {values}"
            require(values is None or len(values) in (1, self.in_chans), rule)
        require(not (self.eval and self.resume), "--eval evaluates and --resume trains: give one of them")
        rule = "--check-data only looks at the images: it does not go with --eval or --resume"
        require(not (self.check_data and (self.eval or self.resume)), rule)
        rule = f"--train-split and --val-split are both {self.val_split}: what is trained on cannot validate"
        require(self.eval or self.train_split != self.val_split, rule)
        rule = "--recipe counts the images first, and streamed data cannot be counted: give a config, -c FILE"
        require(not (self.recipe and self.streamed), rule)
        if self.multi_label:
            self._check_multi_label()
        require(self.multi_label or self.eval_metric != "map", "--eval-metric map is for --multi-label")
        require(self.kd_model or not self.kd_checkpoint, "--kd-checkpoint needs --kd-model")
        bce = self.bce_loss or (self.bce_target_thresh is None and not self.bce_sum)
        require(bce, "--bce-target-thresh and --bce-sum need --bce-loss")
        require(self.amp or self.amp_dtype == "auto", "--amp-dtype needs --amp")
        rule = f"mixup and cutmix need an even --batch-size, got {self.batch_size}"
        require(not (self.mixes and self.batch_size % 2), rule)
        has_keys = self.streamed or self.dataset.lower().startswith("hfds/")
        rule = "--input-key and --target-key are for hfds and wds"
        require(has_keys or not (self.input_key or self.target_key), rule)
        for each in fields(self):
            value, flag = getattr(self, each.name), flag_of(each.name)
            changed = self.streamed and each.name in NOT_STREAMED and value != each.default
            require(not changed, f"{flag if value is True else f'{flag} {value}'} does not work with streamed data")

    def _check_multi_label(self) -> None:
        require(not self.dataset, f"--multi-label needs a CSV or Parquet file, not --dataset {self.dataset}")
        others = {"mixup or cutmix": self.mixes, "--class-weights": self.class_weights, "--kd-model": self.kd_model}
        others |= {"--balanced-sampling": self.balanced_sampling, "--recipe probe": self.recipe == "probe"}
        for name, given in others.items():
            require(not given, f"--multi-label does not go with {name}")
        metrics = ("auto", "map", "macro_f1", "loss")
        rule = f"--multi-label takes --eval-metric {', '.join(metrics)}, got {self.eval_metric}"
        require(self.eval_metric in metrics, rule)

    def stored(self) -> dict[str, Any]:
        """What args.yaml and checkpoints keep: plain values that make a config again."""
        names = [each.name for group in GROUPS for each in fields(group)]
        stored = {name: getattr(self, name) for name in names if name not in NOT_STORED}
        # The other recipes are nothing but settings, which stand here themselves
        return stored | {"recipe": self.recipe if self.recipe == "probe" else None}


GROUPS: tuple[type[Group], ...] = Options.__bases__
