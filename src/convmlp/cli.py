"""The console command `convmlp`: one verb a function. Each imports what it needs when it runs."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import __version__
from .errors import RunError, suggest
from .files import check_writable, make_folder, write_atomically

EXIT_CODES = "exit codes: 0 done, 1 some pictures were left out, 2 a mistake in the call or a file, 3 a bug"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The verbs with their options; `--help` of each is its manual."""
    parser = _Parser(
        prog="convmlp",
        description="Use ConvMLP, or any model of timm: predict, look inside, export.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"convmlp {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
        return sub

    sub = verb("predict", _predict, "Classify pictures; with --config, detect or segment what is on them.")
    add = sub.add_argument
    add("pictures", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="files, folders, or patterns in quotes")
    add("--model", metavar="NAME", help="a ConvMLP or any other model of timm; convmlp_s without a checkpoint")
    add("--checkpoint", metavar="FILE|URL", help="trained weights; those of classification.py know their model")
    add("--class-map", metavar="FILE", help="class names, one a line, for weights that do not tell theirs")
    add("--topk", type=positive, metavar="N", help="how many classes to name (5)")
    add("--config", metavar="FILE", help="config of the detector or segmentor that --checkpoint is of")
    add("--score-threshold", type=share, metavar="P", help="leave out detections below (0.3)")
    add("--trust-checkpoint", action="store_true", help="with --config: read by pickle, which may run code")
    add("--batch-size", type=positive, metavar="N", help="pictures at once (16)")
    add("--json", metavar="FILE", help="write the result as JSON; - is the screen")
    add("--csv", metavar="FILE", help="write the result as CSV; - is the screen")
    add("--save-dir", metavar="DIR", help="draw the result into copies of the pictures")
    _add_machine(sub)

    sub = verb("visualize", _visualize, "Draw feature maps, class activation maps or first filters of models.")
    add = sub.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a picture; filters need none")
    add("--models", nargs="+", default=["convmlp_s"], metavar="MODEL", help="timm names or checkpoints, a row each")
    add("--kind", choices=["features", "cam", "filters"], default="features", help="cam is Grad-CAM")
    add("--classes", nargs="+", metavar="NAME|N", help="what cam looks for; by default what the model finds")
    add("--out", metavar="FILE", help="by default KIND.png")
    _add_pretrained(sub)
    _add_machine(sub)

    sub = verb("export", _export, "Write a model for other programs, and check the file against PyTorch.")
    add = sub.add_argument
    add("source", metavar="CHECKPOINT|MODEL", help="a checkpoint, or a timm name")
    add("--model", metavar="NAME", help="the timm name of a checkpoint that does not tell its model")
    add("--format", choices=["onnx", "torch-export", "torchscript", "safetensors"], default="onnx")
    add("--output", metavar="PATH", help="file, or folder for safetensors; by default named by the model")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--dynamic", action="store_true", help="any batch and image size, not just one image of the model's own size")
    add("--fold", action="store_true", help="fold BatchNorm into the convolutions")
    add("--half", action="store_true", help="float16")
    add("--opset", type=positive, metavar="N", help="of ONNX; by default PyTorch's")
    add("--class-map", metavar="FILE", help="class names, one a line, for weights that do not tell theirs")
    add("--img-size", type=positive, metavar="PX", help="side of the square the model sees")
    _add_pretrained(sub)

    sub = verb("info", _info, "Parameters, multiply-adds, activations, published scores; the layers of one model.")
    add = sub.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default all of ours")
    add("--img-size", type=positive, metavar="PX", help="side of the square the model sees")
    add("--layers", action="store_true", help="the layers of several models")
    add("--depth", type=positive, metavar="N", help="how deep into the layers (2)")
    add("--markdown", action="store_true", help="tables for a README")

    sub = verb("benchmark", _benchmark, "Measure how fast models infer or train, and pictures load, on this machine.")
    add = sub.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default convmlp_s")
    add("--peers", action="store_true", help="also models of timm whose accuracy is similar")
    add("--train", action="store_true", help="training steps instead of inference")
    add("--loading", action="store_true", help="loading of training pictures, alone or beside --train")
    modes = "eager (in float32 always there, as base line), amp, channels-last, folded, compiled, prepared, "
    modes += "onnxruntime, openvino; with --train eager, channels-last, fused, compiled, each of which adds to the one "
    modes += "before (all that this machine can)"
    add("--modes", nargs="+", metavar="MODE", help=modes)
    dtypes = "float32, bfloat16, float16 (float32 and bfloat16 where they are native; on CUDA all)"
    add("--dtypes", nargs="+", metavar="DTYPE", help=dtypes)
    batches = "images at once (1 8, on a GPU 1 128; with --train 16, on a GPU 128)"
    add("--batch-sizes", nargs="+", type=positive, metavar="N", help=batches)
    add("--threads", type=positive, metavar="N", help="of the processor; by default PyTorch's choice")
    add("--rounds", type=positive, default=5, metavar="N", help="turns that each variant takes (5)")
    add("--seconds", type=duration, default=1.0, metavar="S", help="length of a turn (1)")
    add("--data", metavar="DIR", help="pictures for --loading, CLASS/IMAGE; by default pieces of two photographs")
    add("--workers", type=positive, metavar="N", help="processes for --loading; by default the cores, up to 8")
    add("--json", metavar="FILE", help="write all that was found as JSON; - is the screen")
    add("--plot", metavar="FILE", help="draw published accuracy against measured speed")
    _add_machine(sub)

    sub = verb("configs", _configs, "List the configs that come with the package, or copy them to change them.")
    sub.add_argument("--copy", metavar="DIR", help="into this new folder")

    verb("doctor", _doctor, "What is installed, whether it works, and the pip line for what is missing.")

    sub = verb("completion", _completion, "Print what completes this command in a shell.")
    sub.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _add_machine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--img-size", type=positive, metavar="PX", help="side of the square the model sees")
    sub.add_argument("--device", default="auto", metavar="NAME", help="auto (cuda, else mps, else cpu), or a device")


def _add_pretrained(sub: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    sub.add_argument("--pretrained", action=switch, default=True, help="published weights; or random ones")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is a whole number from 1 on, got {text}")
    return int(text)


def duration(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"is a number of seconds above 0, got {text}")
    return number


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"lies between 0 and 1, got {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """The command; see EXIT_CODES."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of its ten attempts
    try:
        options = parse(argv)
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except RunError as error:
        if debug:
            raise
        _say(f"convmlp: error: {error}")
        return 2
    except ModuleNotFoundError as error:
        if debug or not error.name or error.name.startswith("convmlp"):
            raise
        module = error.name.partition(".")[0]
        from .doctor import MODULES

        package = next((p for p, m in MODULES.items() if m == module), module)
        _say(f"convmlp: error: {module} is missing: pip install {package} (convmlp doctor names all that is)")
        return 2
    except KeyboardInterrupt:
        _say("convmlp: interrupted")
        return 130
    except BrokenPipeError:  # such as `convmlp predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a full disk
        if debug:
            raise
        _say(f"convmlp: error: {error}")
        return 2
    except Exception as error:
        if debug:
            raise
        _say(f"convmlp: bug: {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)")
        return 3


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a call.

    Raises:
        RunError: an unknown verb or option (the nearest is offered), or a bad value.
    """
    parser = build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise RunError(f"unknown verb {argv[0]}{suggest(argv[0], verbs) or '; there are ' + ', '.join(verbs)}")
    options, unknown = parser.parse_known_args(argv)
    options.argv = argv
    if unknown and not unknown[0].startswith("-"):
        raise RunError(f"unexpected argument {unknown[0]}; pictures and models stand together, before the options")
    if unknown:
        names = [name for action in verbs[options.verb]._actions for name in action.option_strings]
        raise RunError(f"unknown option {unknown[0]}{suggest(unknown[0].split('=')[0], names)}")
    return options


def _predict(options: argparse.Namespace) -> int:
    from . import results
    from .pictures import find_pictures

    paths = list(dict.fromkeys(path for place in options.pictures for path in find_pictures(place)))
    for file in (options.json, options.csv):
        if file and file != "-":
            check_writable(Path(file))
    if options.json and options.json == options.csv:
        raise RunError(f"--json and --csv cannot both be {options.json}")
    if options.save_dir is not None:
        make_folder(Path(options.save_dir))
        inputs = {path.resolve() for path in paths}
        for name in results.drawn_names(paths):
            if (Path(options.save_dir) / name).resolve() in inputs:
                raise RunError(f"--save-dir {options.save_dir} holds the pictures themselves: {name} would be replaced")
    rows, unreadable = (_predict_objects if options.config else _predict_classes)(options, paths)

    _write(options.json, lambda file: results.write_json(file, rows, unreadable))
    _write(options.csv, lambda file: results.write_csv(file, rows))
    if "-" not in (options.json, options.csv) and rows:
        _show(results.make_table(rows))
    if options.save_dir:
        _say(f"{len(rows)} pictures drawn in {options.save_dir}")
    for error in unreadable:
        _say(f"skipped: {error}")
    if unreadable:
        _say(f"{len(unreadable)} of {len(paths)} pictures were left out")
    return 1 if unreadable else 0


Found = tuple[list[dict[str, Any]], Sequence[Exception]]


def _predict_classes(options: argparse.Namespace, paths: list[Path]) -> Found:
    _refuse(options, ("score_threshold", "trust_checkpoint"), "is for detection and segmentation: --config FILE")

    from . import predict
    from .classifier import open_classifier
    from .pictures import read_picture
    from .results import drawn_names

    classifier = open_classifier(
        options.model,
        options.checkpoint,
        device=options.device,
        img_size=options.img_size,
        class_map=options.class_map,
    )
    topk, batch_size = options.topk or predict.TOPK, options.batch_size or predict.BATCH_SIZE
    predictions, unreadable = predict.predict(paths, classifier, topk, batch_size, progress=True)
    names = dict(zip(paths, drawn_names(paths), strict=True))
    for prediction in predictions if options.save_dir else []:
        drawn = predict.draw(read_picture(prediction.path), prediction.best)
        write_atomically(Path(options.save_dir) / names[prediction.path], drawn.save)
    small = [p for p in predictions if min(p.size) < predict.SMALLEST_SEEN]
    if small:
        (width, height), side = small[0].size, classifier.data_config["input_size"][-1]
        example = f"{small[0].path}, {width}x{height} px"
        _say(f"enlarged to {side} px: {len(small)} of {len(paths)} pictures, such as {example}")
    return [prediction.row() for prediction in predictions], unreadable


def _predict_objects(options: argparse.Namespace, paths: list[Path]) -> Found:
    _refuse(options, ("model", "class_map", "img_size", "topk", "batch_size"), "is for classifiers, not for --config")
    if not options.checkpoint:
        raise RunError("--config needs the trained weights: --checkpoint FILE")

    from mmengine.logging import MMLogger
    from tqdm import tqdm

    MMLogger.get_current_instance().setLevel(logging.WARNING)  # its news would stand among the results
    from .openmmlab import drawing, inference
    from .pictures import read_picture
    from .results import drawn_names

    model = inference.open_model(options.config, options.checkpoint, options.device, options.trust_checkpoint)
    if model.library == "mmseg":
        _refuse(options, ("score_threshold",), "is for detection, and this is a segmentor")
    threshold = inference.SCORE_THRESHOLD if options.score_threshold is None else options.score_threshold
    rows: list[dict[str, Any]] = []
    unreadable: list[RunError] = []
    hidden = None if len(paths) > 1 else True
    for path, name in zip(tqdm(paths, unit="picture", leave=False, disable=hidden), drawn_names(paths), strict=True):
        try:
            image = read_picture(path)
            [result] = inference.predict(model, [image])
        except RunError as error:
            unreadable.append(error)
            continue
        rows.append({"picture": str(path), **inference.to_json(result, model.class_names, threshold)})
        if options.save_dir:
            drawn = drawing.draw(model, image, result, threshold)
            write_atomically(Path(options.save_dir) / name, drawn.save)
    return rows, unreadable


def _refuse(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Options that would change nothing are mistakes."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise RunError(f"--{name.replace('_', '-')} {reason}")


def _visualize(options: argparse.Namespace) -> None:
    out = Path(options.out or f"{options.kind}.png")
    out = out if out.suffix else out.with_suffix(".png")
    check_writable(out)
    if not options.image and options.kind != "filters":
        raise RunError(f"--kind {options.kind} needs a picture: convmlp visualize IMAGE, before --models")
    if options.kind == "filters" and (options.image or options.img_size):
        raise RunError("--kind filters shows what the models are made of: it takes no picture and no --img-size")
    if options.classes and options.kind != "cam":
        raise RunError("--classes is for --kind cam")

    from . import visualize
    from .classifier import open_any
    from .figures import check_format, save_figure
    from .pictures import read_picture

    check_format(out)
    if options.kind == "filters":
        draw = visualize.filter_figure
    elif options.kind == "features":
        draw = partial(visualize.feature_figure, read_picture(options.image))
    else:
        draw = partial(visualize.cam_figure, read_picture(options.image), wanted=options.classes or ())
    classifiers = [
        open_any(model, pretrained=options.pretrained, device=options.device, img_size=options.img_size)
        for model in options.models
    ]
    save_figure(draw(classifiers), out)
    _say(f"drawn: {out}")


def _export(options: argparse.Namespace) -> None:
    from .classifier import open_any, open_classifier
    from .export import SUFFIXES, export

    settings = dict(pretrained=options.pretrained, device="cpu", img_size=options.img_size, class_map=options.class_map)
    if options.model:
        classifier = open_classifier(options.model, options.source, **settings)
    else:
        classifier = open_any(options.source, **settings)
    report = export(
        classifier,
        options.output or classifier.model.pretrained_cfg["architecture"] + SUFFIXES[options.format],
        options.format,
        dynamic=options.dynamic,
        fold=options.fold,
        half=options.half,
        opset=options.opset,
        overwrite=options.overwrite,
    )
    shapes = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(report.shapes))
    dtype = str(report.dtype).removeprefix("torch.")
    _say(f"written: {report.path} ({report.size / 1e6:.1f} MB, {dtype})")
    differences = f"{report.absolute:.1e}, {report.relative:.1e} of the largest"
    _say(f"compared with PyTorch on {shapes} (batch x height x width): logits differ by at most {differences}")


def _info(options: argparse.Namespace) -> None:
    from . import info
    from .classifier import open_any

    if options.depth and not options.layers and len(options.models) != 1:
        raise RunError("--depth is for the layers of one model, or of several with --layers")
    rows = []
    for model in options.models or info.OURS:
        classifier = open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
        size = classifier.data_config["input_size"]
        rows.append((model, info.measure(classifier.model, size), size[-1]))
    if options.layers or len(options.models) == 1:
        for name, cost, _ in rows:
            _show(info.layer_table(cost, options.depth or 2, options.markdown), f"{name}:" if len(rows) > 1 else "")
    _show(info.cost_table(rows, options.markdown))
    if not options.models:
        _show(info.downstream_table(options.markdown))
        print("Scores as published by the paper: top-1 in per cent; COCO box and mask AP; ADE20K mIoU.")


def _benchmark(options: argparse.Namespace) -> None:
    with_models = options.train or not options.loading
    plot = Path(options.plot) if options.plot else None
    plot = plot.with_suffix(".png") if plot and not plot.suffix else plot
    for file in (options.json if options.json != "-" else None, plot):
        if file:
            check_writable(Path(file))
    if not options.loading:
        _refuse(options, ("data", "workers"), "is for --loading")
    if not with_models:
        for_models = ("modes", "dtypes", "batch_sizes", "threads", "peers", "plot")
        _refuse(options, for_models, "is for models: leave out --loading")
        if options.models:
            raise RunError(f"--loading takes no model, got {options.models[0]}; with --train it does")

    from tqdm import tqdm

    from .benchmark import comparison, loading, report, variants
    from .benchmark.plot import speed_figure
    from .figures import check_format, save_figure

    if plot:
        check_format(plot)
    models = [*(options.models or ["convmlp_s"]), *(variants.PEERS if options.peers else ())]
    plan = variants.make_plan(
        models,
        variants.TRAINING if options.train else variants.INFERENCE,
        modes=options.modes,
        dtypes=options.dtypes,
        batch_sizes=options.batch_sizes,
        img_size=options.img_size,
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    if plot and not any(variants.published_top1(model) for model in models):
        raise RunError(f"--plot: no accuracy is known to be published of {', '.join(models)}; --peers adds some")
    was_busy = report.is_busy()
    steps = comparison.count_steps(plan) if with_models else 0
    steps += loading.count_steps(plan) if options.loading else 0
    _say(f"{steps} steps of {options.seconds:g} s, or more where something is made ready")
    with tqdm(total=steps, leave=False, disable=None, unit="step") as bar:

        def tell(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        loaded = loading.compare_loading(plan, options.data, options.workers, tell) if options.loading else []
        rows, rates = comparison.compare(plan, tell) if with_models else ([], [])

    content = report.as_json(["convmlp", *options.argv], was_busy, plan, rows, rates, loaded)
    _write(options.json, lambda file: report.write_json(file, content))
    if options.json != "-":
        for table, notes in report.sections(plan, rows, rates, loaded, was_busy):
            _show(table, whole=True)
            print(*notes, sep="\n")
    if with_models and not comparison.best_of(rows):
        raise RunError(f"no variant could be measured: {rows[0]['failed']}")
    if plot:
        save_figure(speed_figure(rows, report.describe_machine(plan)), plot)
        _say(f"drawn: {plot}")


def _configs(options: argparse.Namespace) -> None:
    from .config_files import copy_configs, list_configs, title

    if options.copy is not None:
        print(f"{copy_configs(Path(options.copy))} files copied to {options.copy}")
        return
    configs = list_configs()
    width = max(len(str(config)) for config in configs)
    for config in configs:
        print(f"{config!s:{width}}  {title(config)}")


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    healthy, missing = True, False
    for title, findings in doctor.examine():
        print(f"{title}")
        for finding in findings:
            mend = f"  ->  {finding.mend}" if finding.mend and finding.state != doctor.GOOD else ""
            print(f"  {finding.state:8}{finding.subject:36}{finding.detail}{mend}")
            healthy &= finding.state != doctor.BROKEN
            missing |= finding.state in (doctor.MISSING, doctor.UNFIT)
    what_works = "what is missing is needed only for what its title says" if missing else "everything is there"
    print(f"healthy: {what_works}" if healthy else "not healthy: see BROKEN above")
    return 0 if healthy else 1


def _completion(options: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(build_parser(), options.shell))


def _write(place: str | None, write: Callable[[TextIO], None]) -> None:
    """Write a result into a file, or onto the screen if that is what `place` says."""
    if place == "-":
        write(sys.stdout)
    elif place:

        def fill(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                write(file)

        write_atomically(Path(place), fill)
        _say(f"written: {place}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _show(table: Any, title: str = "", whole: bool = False) -> None:
    """Print a table of rich, never narrower than its content needs; `whole`: in a narrow terminal, too."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() and not whole else 400, highlight=False)
    console.width = max(console.width, console.measure(table).minimum)
    with console.capture() as text:  # rich itself would end the program where nobody reads on
        console.print(*filter(None, [title, table]), sep="\n")
    sys.stdout.write(text.get())
