"""mmengine's Runner, made to work without a GPU and to be careful with checkpoints."""

import signal
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..common.errors import CheckpointError, Diverged, RunError, Stopped
from ..common.files import write_atomically
from ..common.signals import StopRequest
from ..weights import extract_state_dict, list_differences, shorten
from .checkpoints import read_run_checkpoint
from .hooks import AverageHook, LateRemovalHook, StopHook, WatchHook, average_statistics
from .loops import ResumableEpochLoop, start_worker
from .machine import on_main_process

BACKBONE = "backbone."


class CarefulRunner(Runner):
    """A Runner whose checkpoints are read without running code, loaded completely or not at all, and written whole.

    Training that is asked to stop by a signal writes a checkpoint, and ends with `Stopped`.

    Config keys beyond those of Runner:
        channels_last: True for the channels_last memory layout, often faster with mixed precision.
        trust_checkpoint: True to read checkpoints that need pickle.
    """

    def __init__(self, **kwargs: Any):
        self.stop_request: StopRequest | None = None  # there while it trains
        self.stop_signal = 0
        self.last_saved: Path | None = None  # what a run can go on from
        self.resumed_from: Path | None = None
        self.stop_file: Path | None = None  # not one of those that CheckpointHook counts and removes
        self.validation_due = False
        super().__init__(**kwargs)
        for hook in (AverageHook(), WatchHook(), StopHook()):
            self.register_hook(hook)

    def register_hook(self, hook: Hook | dict, priority: str | int | None = None) -> None:
        if isinstance(hook, dict) and hook.get("type") in ("CheckpointHook", "mmengine.CheckpointHook"):
            hook = {**hook, "type": LateRemovalHook}
        super().register_hook(hook, priority)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        if isinstance(loop, dict) and (loop.get("type") == "EpochBasedTrainLoop" or loop.get("by_epoch")):
            loop = {key: value for key, value in loop.items() if key != "by_epoch"} | {"type": ResumableEpochLoop}
        return super().build_train_loop(loop)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return loader

    def train(self) -> nn.Module:
        """As in Runner.

        Raises:
            Stopped: it was asked to, and has written a checkpoint.
            Diverged: the numbers are no longer finite.
        """
        with StopRequest() as self.stop_request:
            return super().train()

    def stop_here(self, iteration: int, validating: bool = False) -> None:
        """End the run, with a checkpoint of all that it has done."""
        name = f"iter_{iteration}.pth"
        file = Path(self.work_dir) / name
        resumable = isinstance(self.train_loop, (ResumableEpochLoop, IterBasedTrainLoop))
        if resumable and (validating or self.last_saved != file):
            meta = {"epoch": self.epoch, "iter": iteration, "validation_due": validating}
            meta["remove_later"] = self.last_saved != file
            self.save_checkpoint(self.work_dir, name, meta=meta)
        where = f"in the validation after iteration {iteration}" if validating else f"after iteration {iteration}"
        raise Stopped(f"{signal.Signals(self.stop_signal).name}: stopped {where}; {self.way_on}")

    @property
    def way_on(self) -> str:
        """For the message that a run ends with."""
        return f"--resume continues from {self.last_saved or self.resumed_from or 'the beginning'}"

    def finish_validation(self) -> None:
        """The validation that the run was stopped in."""
        self.logger.info(f"validation after iteration {self.iter}, which the run was stopped in")
        self.val_loop.run()
        meta = {"epoch": self.epoch, "iter": self.iter, "remove_later": self.stop_file is not None}
        self.save_checkpoint(self.work_dir, f"iter_{self.iter}.pth", meta=meta)

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """As in Runner, but an operator that exists in no deterministic form is a warning, not the end."""
        super().set_randomness(seed, diff_rank_seed, deterministic)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.cfg.get("channels_last"):
            model = model.to(memory_format=torch.channels_last)
        return super().wrap_model(model_wrapper_cfg, model)

    @property
    def _testing(self) -> bool:
        return isinstance(self._test_loop, BaseLoop)  # until it runs, it is a config

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, revise_keys: Any = None
    ) -> dict[str, Any]:
        """Load weights: all of them to test or resume; to start from them, at least all of the backbone.

        The other arguments are Runner's, and change nothing: the file is read to the CPU and held to the rule above.

        Raises:
            CheckpointError: the file cannot be read, or does not fit; with the names of what differs.
        """
        checkpoint = read_run_checkpoint(filename, bool(self.cfg.get("trust_checkpoint")))
        self._loaded_meta = checkpoint.get("meta") or {}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        weights = extract_state_dict(checkpoint, use_ema=False, name=filename)
        self._check_classes(checkpoint, filename)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        own = model.state_dict()
        differences = list_differences(weights, own)
        starting = not self._testing and not self._resume
        fatal = [text for text in differences if text.startswith(BACKBONE)] if starting else differences
        if fatal:
            raise CheckpointError(f"{filename} does not fit the model: {shorten(fatal)}")
        if differences:
            self.logger.warning(
                f"{filename}: parts of the model start from their initialisation: {shorten(differences)}"
            )
        fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
        self._has_loaded = True
        self.logger.info(f"loaded {len(fitting)} tensors from {filename}")
        return checkpoint

    def _check_classes(self, checkpoint: dict[str, Any], filename: str) -> None:
        """A test, or more training, with other classes than those trained would give figures without a meaning."""
        if not self._testing and not self._resume:
            return
        meta = checkpoint.get("meta") or {}
        trained = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")  # the second: mmdet 2, mmseg 0
        loader = self.test_dataloader if self._testing else self.train_dataloader
        present = loader.dataset.metainfo.get("classes")
        if trained and list(trained) != list(present):
            differing = [f"{a} / {b}" for a, b in zip_longest(trained, present, fillvalue="nothing") if a != b]
            raise CheckpointError(
                f"{filename} was trained for other classes ({len(trained)}) than this run has ({len(present)}): "
                f"{', '.join(differing[:3])}; --classes FILE chooses classes"
            )

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As in Runner; also at the place within an epoch, and in the validation, where the run was stopped."""
        super().resume(filename, *args, **kwargs)
        meta, loop = self._loaded_meta, self.train_loop
        sampler = loop.dataloader.batch_sampler.sampler
        if hasattr(sampler, "seed") and not self._randomness_cfg.get("diff_rank_seed"):
            sampler.seed = self.seed  # it was built before the seed of the checkpoint was known
        self.resumed_from = Path(filename)
        if meta.get("remove_later") and self.resumed_from.resolve().parent == Path(self.work_dir).resolve():
            self.stop_file = self.resumed_from
        self.validation_due = bool(meta.get("validation_due")) and self.val_loop is not None
        if not meta.get("images_done") or not isinstance(loop, ResumableEpochLoop):
            return
        if meta.get("images_in_all") == len(loop.dataloader.dataset):
            loop.batches_done = meta["images_done"] // loop.images_per_step
            of = f"{loop.batches_done} of {len(loop.dataloader)} batches"
            self.logger.info(f"epoch {self.epoch + 1} goes on after {of}")
        else:
            self.logger.warning(f"the data set has changed, so epoch {self.epoch + 1} begins anew")

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **kwargs: Any) -> None:
        """As in Runner, but of all processes' statistics, and the file takes its name when it is complete.

        Raises:
            RunError: it cannot be written; in all processes.
            Diverged: the weights are not finite.
        """
        average_statistics(self.model)
        meta = {**(kwargs.pop("meta", None) or {})}
        if isinstance(self.train_loop, ResumableEpochLoop):
            meta["images_done"] = self.train_loop.batches_done * self.train_loop.images_per_step
            meta["images_in_all"] = len(self.train_loop.dataloader.dataset)
        save = super().save_checkpoint
        file = Path(out_dir) / filename

        def save_as(path: Path) -> None:
            save(str(path.parent), path.name, file_client_args, meta=meta, **kwargs)

        def write() -> None:
            if not Path(self.work_dir).is_dir():
                raise RunError(f"cannot write {file}: the output folder is gone")
            try:
                write_atomically(file, save_as)
            except Diverged:
                raise
            except (RunError, OSError) as error:
                raise RunError(f"{error}; {self.way_on}") from error

        on_main_process(write)
        if kwargs.get("save_optimizer", True):  # one of the best has none
            self.last_saved = file
            served, self.stop_file = self.stop_file, file if meta.get("remove_later") else None
            if served and is_main_process() and served.resolve() != file.resolve():
                served.unlink(missing_ok=True)
