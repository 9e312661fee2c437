"""detection.py and segmentation.py: from the command line over a config to a run of mmengine."""

import errno
import re
import shlex
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger

from ..common.errors import RunError, plural
from ..common.files import lock_folder, remove_leftovers, was_restarted
from .checkpoints import find_checkpoints, newest_readable
from .configs import leaf_datasets, load_config
from .datasets import Request, adapt_to_data
from .machine import adapt_to_machine, on_main_process, start_processes
from .options import parse_options
from .runner import CarefulRunner

DRAWN_IMAGES = 50
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # such errors often name no file


def work(script: str, argv: list[str]) -> None:
    """Do what a command line of detection.py or segmentation.py asks for.

    Args:
        script: The name of the script, for messages.
        argv: The command line without it.

    Raises:
        RunError, Diverged, Stopped: see `common.command.run`, under which this runs.
    """
    warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")  # nothing here asks for it
    with ExitStack() as resources:
        options = parse_options(argv, script)
        cfg = load_config(options)
        launcher = start_processes(options.launcher, cfg)
        cfg = on_main_process(lambda: _check_data(cfg, options))
        if options.check_data:
            return
        cfg.launcher = launcher
        adapt_to_machine(cfg, options.amp)
        if options.test:
            cfg.load_from = options.test
        else:
            cfg = on_main_process(lambda: _prepare_folder(cfg, options, resources))
        if cfg.get("load_from") and "init_cfg" in cfg.model.get("backbone", {}):
            cfg.model.backbone.init_cfg = None  # the checkpoint has these weights, and their file may be out of reach
        if options.test:
            _test(cfg, options.show_dir)
        else:
            _train(cfg, options.show_dir, script)


def _check_data(cfg: Config, options: Namespace) -> Config:
    """Files and classes of the data set; what its check found goes to standard output."""
    request = Request(
        classes=options.classes,
        reduce_zero_label=options.reduce_zero_label,
        testing=bool(options.test),
        check="none" if options.skip_data_check else "all" if options.check_data else "sample",
    )
    table = adapt_to_data(cfg, request)
    if table:
        print(f"{table}\nThe data set is in order.")
    return cfg


def _prepare_folder(cfg: Config, options: Namespace, resources: ExitStack) -> Config:
    """Lock the work folder until the end of `resources`, and let the config name what the run in it starts from.

    Raises:
        RunError: another run is at work there, or has been, and the command line does not say what to do with it.
    """
    logger = MMLogger.get_current_instance()
    folder, resume = Path(cfg.work_dir), options.resume
    restarted = was_restarted(folder)
    resources.enter_context(lock_folder(folder))
    remove_leftovers(folder)
    earlier = find_checkpoints(folder)
    if restarted and (resume is None or earlier):
        logger.info("torchrun started the processes again: the run goes on from its newest checkpoint")
        resume = "auto"
    if resume == "auto":
        newest = newest_readable(folder, options.trust_checkpoint, logger)
        if newest:
            cfg.load_from, cfg.resume = str(newest), True
        elif earlier:
            raise RunError(f"no checkpoint in {folder} can be read; --overwrite starts anew")
        else:
            logger.info(f"nothing to resume in {folder}: the run starts from the beginning")
    elif resume:
        if earlier and Path(resume).resolve().parent != folder.resolve():
            raise RunError(f"{folder} holds another run than {resume}: --work-dir DIR keeps them apart")
        cfg.load_from, cfg.resume = resume, True
    elif earlier and not options.overwrite:
        raise RunError(f"{folder} holds a run: --resume continues it, --overwrite replaces it, or --work-dir DIR")
    elif earlier:
        for path in [*earlier, *folder.glob("best_*.pth"), *folder.glob("last_checkpoint")]:
            path.unlink()
    return cfg


def _build_runner(cfg: Config) -> CarefulRunner:
    try:
        return CarefulRunner.from_cfg(cfg)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise RunError(f"{cfg.filename} cannot be built: {error}") from error


def _test(cfg: Config, show_dir: str | None) -> None:
    """Evaluate the checkpoint of a config, and draw a few images from all over the data set into a folder."""
    if show_dir:
        hook = dict(type="DrawPredictions", folder=str(Path(show_dir).resolve()), limit=DRAWN_IMAGES)
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    _build_runner(cfg).test()


def _train(cfg: Config, show_dir: str | None, script: str) -> None:
    """Train, and say at the end where the best checkpoint is and how to test it."""
    runner = _build_runner(cfg)
    classes = next(iter(leaf_datasets(cfg).values()), ConfigDict()).get("metainfo", {}).get("classes")
    if classes:
        runner.logger.info(f"{plural(len(classes), 'class')}: {', '.join(classes)}")
    with _explained(runner):
        runner.train()
    checkpoint = _best_checkpoint(runner)
    if checkpoint is None or cfg.get("test_dataloader") is None:
        return
    config = Path(runner.work_dir) / Path(cfg.filename).name  # everything that the command line said is in there
    program = [script] if Path(script).is_file() else ["-m", "convmlp.openmmlab"]
    command = ["python", *program, str(config), "--classes", "config", "--test", str(checkpoint), "--show-dir"]
    runner.logger.info(f"test it: {shlex.join(command)} images")
    if show_dir:
        cfg = cfg.copy()
        cfg.load_from, cfg.resume = str(checkpoint), False
        _test(cfg, show_dir)


@contextmanager
def _explained(runner: CarefulRunner) -> Iterator[None]:
    """What ends a training run from outside, as an error that says how to go on."""
    folder = Path(runner.work_dir)
    try:
        yield
    except AssertionError as error:  # mmcv's
        unreadable = re.findall("failed to load image: (.*)", str(error))  # of a worker, its traceback quotes the code
        if not unreadable:
            raise
        message = f"cannot read the image {unreadable[-1]}; --check-data names all such; {runner.way_on}"
        raise RunError(message) from error
    except OSError as error:
        inside = error.filename and folder in Path(str(error.filename)).absolute().parents
        if not inside and (error.filename or error.errno not in FULL):
            raise
        raise RunError(f"cannot write {error.filename or folder}: {error.strerror}; {runner.way_on}") from error


def _best_checkpoint(runner: CarefulRunner) -> Path | None:
    """The best checkpoint of a run that is through, else the last; the log says which."""
    folder = Path(runner.work_dir)
    best = runner.message_hub.runtime_info.get("best_ckpt")
    if best:
        checkpoint = folder / Path(best).name  # the folder may have moved since
        runner.logger.info(f"best: {runner.message_hub.get_info('best_score'):.4g}, {checkpoint}")
        return checkpoint
    last = next(iter(find_checkpoints(folder)), None)
    if last:
        runner.logger.warning(f"no validation gave a score, so there is no best checkpoint; the last: {last}")
    return last
