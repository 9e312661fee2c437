"""The benchmark: what it compares, that its processes take turns and leave nothing behind, and what it writes."""

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from PIL import Image
from rich.console import Console
from torch import nn

from convmlp import cli, deploy
from convmlp.benchmark import comparison, networks, turns, worker
from convmlp.benchmark.loading import compare_loading
from convmlp.benchmark.plot import speed_figure
from convmlp.benchmark.report import make_table, sections
from convmlp.benchmark.turns import Contestant, Worker, WorkerFailed, prepare_all, take_turns
from convmlp.benchmark.variants import PEERS, PEERS_PUBLISHED, TRAINING, make_plan, published_top1
from convmlp.classification.loading_speed import RECIPE, Loading
from convmlp.classification.options import parse_options
from convmlp.common.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
LIGHT = ["convmlp.benchmark.worker", "openvino"]  # it starts in a moment, for it imports no PyTorch


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """A run of the command on small pictures: what it printed, its JSON, and where its plot is."""
    folder = tmp_path_factory.mktemp("benchmark")
    call = "benchmark convmlp_s --modes onnxruntime openvino --dtypes float32 --batch-sizes 2 --img-size 64 "
    call += f"--seconds 0.05 --rounds 2 --threads 1 --json {folder}/found.json --plot {folder}/speed.png"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main(call.split()) == 0
    found = json.loads((folder / "found.json").read_text())
    return {"shown": shown.getvalue(), "call": call, "plot": folder / "speed.png", **found}


# What is compared


def variants_of(plan) -> list[tuple[str, str]]:
    return [(variant.mode, variant.dtype) for variant in plan.groups[0]]


def test_the_base_line_comes_first_even_when_nobody_asked_for_it():
    plan = make_plan(["convmlp_s"], modes=["folded"], dtypes=["bfloat16"], device="cpu")
    assert variants_of(plan) == [("eager", "float32"), ("folded", "bfloat16")]


def test_variants_of_a_model_and_batch_size_take_turns_with_each_other_alone():
    plan = make_plan(["convmlp_s", "resnet50"], modes=["eager"], dtypes=["float32"], batch_sizes=[1, 8], device="cpu")
    groups = [{(variant.model, variant.batch_size) for variant in group} for group in plan.groups]
    assert groups == [{("convmlp_s", 1)}, {("convmlp_s", 8)}, {("resnet50", 1)}, {("resnet50", 8)}]


def test_what_a_mode_cannot_do_is_left_out_and_said():
    plan = make_plan(["convmlp_s"], modes=["onnxruntime"], dtypes=["float32", "bfloat16"], device="cpu")
    assert variants_of(plan) == [("eager", "float32"), ("onnxruntime", "float32")]
    assert plan.left_out == ["onnxruntime bfloat16: it has no convolutions in bfloat16"]


@pytest.fixture
def without_openvino(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def test_a_mode_whose_package_is_missing_is_not_offered(without_openvino):
    plan = make_plan(["convmlp_s"], device="cpu")
    assert not any(mode == "openvino" for mode, _ in variants_of(plan))
    assert "openvino: pip install openvino" in plan.left_out


def test_a_mode_asked_for_whose_package_is_missing_is_a_mistake(without_openvino):
    with pytest.raises(RunError, match="--modes openvino needs a missing package: pip install openvino"):
        make_plan(["convmlp_s"], modes=["openvino"], device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("convmlp_x", "unknown --model convmlp_x; did you mean convmlp_s?"),
        ("nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("--modes foldd", "unknown --modes foldd; did you mean folded?"),
        ("--train --modes onnxruntime", "unknown --modes onnxruntime"),
        ("--dtypes float8", "unknown --dtypes float8; did you mean float32?"),
        ("--train --dtypes float16 --device cpu", "nothing is left to compare: eager float16"),
        ("--modes onnxruntime --dtypes bfloat16 --device cpu", "nothing is left to compare: onnxruntime bfloat16"),
        ("--batch-sizes 0", "argument --batch-sizes: is a whole number from 1 on, got 0"),
        ("--seconds 0", "argument --seconds: is a number of seconds above 0, got 0"),
        ("--seconds inf", "argument --seconds: is a number of seconds above 0, got inf"),
        ("--rounds many", "argument --rounds: is a whole number from 1 on, got many"),
        ("--device cuda:99", "--device cuda:99"),
        ("--threads 99999", "--threads 99999 is more than this machine has"),
        ("--img-size 16", "--img-size lies between 32 and"),
        ("--json {folder}", "cannot write {folder}: it is a folder"),
        ("--plot {folder}/x.xyz", "cannot write a figure as {folder}/x.xyz"),
        ("pure_mlp_s --plot {folder}/x", "--plot: no accuracy is known to be published of pure_mlp_s"),
        ("--data {folder}", "--data is for --loading"),
        ("--workers 2", "--workers is for --loading"),
        ("--loading --peers", "--peers is for models"),
        ("--loading --threads 1", "--threads is for models"),
        ("--loading convmlp_s", "--loading takes no model, got convmlp_s"),
    ],
)
def test_a_wrong_call_is_told_in_one_line_before_work_begins(call, message, tmp_path, capsys):
    code = cli.main(["benchmark", *call.format(folder=tmp_path).split()])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message.format(folder=tmp_path) in err and err.startswith("convmlp: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", PEERS_PUBLISHED)
def test_published_accuracies_are_of_weights_that_timm_has(name):
    assert name in timm.list_pretrained(f"{name.partition('.')[0]}.*")
    assert published_top1(name) == PEERS_PUBLISHED[name]


def test_published_accuracies_are_found_by_the_names_that_users_type():
    assert [published_top1(name) for name in ("convmlp_s", "convmlp_m_classification", "resnet50")] == [
        76.8,
        79.0,
        80.38,
    ]
    assert all(published_top1(name) for name in PEERS)
    assert published_top1("pure_mlp_s") is None and published_top1("resnet18") is None


def test_random_models_have_statistics_that_do_something_and_are_the_same_in_every_process():
    spec = {"model": "convmlp_s", "img_size": 32, "batch_size": 2, "device": "cpu", "threads": 1}
    model, x = networks.open_network(spec, torch.device("cpu"))
    again, same = networks.open_network(spec, torch.device("cpu"))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.running_mean.any() and (norm.running_var != 1).any() for norm in norms)
    assert torch.equal(model(x), again(same))


# Turns


class Recorder(Contestant):
    """Takes turns without a process, and writes them down."""

    def __init__(self, title: str, record: list[str]):
        super().__init__(title, [], {"threads": 1})
        self.record = record

    def take_turn(self, seconds: float) -> None:
        self.record.append(self.title)


def test_every_second_round_goes_backwards(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)
    record: list[str] = []
    take_turns([Recorder(name, record) for name in "abc"], 3, 1.0, lambda what: None)
    assert "".join(record) == "abccbaabc"


def test_who_failed_has_no_more_turns(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)
    record: list[str] = []
    contestants = [Recorder(name, record) for name in "abc"]
    contestants[1].failed = "no compiler"
    take_turns(contestants, 2, 1.0, lambda what: None)
    assert "".join(record) == "acca"


def test_figures_are_medians_and_the_ratio_is_taken_round_by_round():
    plan = make_plan(["convmlp_s"], modes=["folded"], dtypes=["float32"], batch_sizes=[4], device="cpu")
    base, fast = (
        Contestant("", [], {"threads": 1}, {"macs": 1_000_000, "prepared_in_s": 1.0}, turns=calls)
        for calls in ([[0.2, 0.2], [0.8, 0.8], [0.3, 0.3]], [[0.1, 0.1], [0.2, 0.2], [0.1, 0.1]])
    )
    row = comparison._row(plan.groups[0][1], fast, base)
    assert row["images_per_s"] == pytest.approx(40)
    assert row["ms_per_batch"] == pytest.approx(100)
    assert row["ratio"] == pytest.approx(3)  # of 2, 4 and 3: that a round was slow for both does not matter
    assert row["spread"] == pytest.approx(0.75)
    assert row["gflops"] == pytest.approx(2 * 4 * 1e6 / 0.1 / 1e9)


def test_what_a_training_step_computes_counts_three_times():
    plan = make_plan(["convmlp_s"], TRAINING, modes=["eager"], dtypes=["float32"], batch_sizes=[4], device="cpu")
    base = Contestant("", [], {"threads": 1}, {"macs": 1_000_000, "prepared_in_s": 1.0}, turns=[[0.1]])
    assert comparison._row(plan.groups[0][0], base, base)["gflops"] == pytest.approx(6 * 4 * 1e6 / 0.1 / 1e9)


# Processes


def test_a_process_that_is_killed_says_so():
    worker = Worker(LIGHT, 1)
    worker.listen()
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="killed, perhaps for want of memory"):
        worker.ask("prepare")
    worker.close()


def test_what_a_process_cannot_do_it_says_and_goes_on():
    worker = Worker(LIGHT, 1)
    worker.listen()
    for _ in range(2):
        with pytest.raises(WorkerFailed, match="KeyError: 'dtype'"):
            worker.ask("prepare")
    worker.close()


def test_a_process_that_cannot_start_tells_its_last_words():
    worker = Worker(["convmlp.benchmark.worker", "nothing"], 1)
    with pytest.raises(WorkerFailed, match="ended with code 1: KeyError: 'nothing'"):
        worker.listen()
    worker.close()


def test_a_process_ends_with_the_one_that_started_it():
    code = f"from convmlp.benchmark.turns import Worker\nworker = Worker({LIGHT}, 1)\nworker.listen()\n"
    code += "print(worker._process.pid, flush=True)\ninput()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs([child], timeout=20)[1] == []


def test_ctrl_c_leaves_no_process_behind():
    code = "import signal, sys\nfrom convmlp.cli import main\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *"benchmark --modes folded --batch-sizes 1 --threads 1".split()]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen(command, text=True, start_new_session=True, **streams)
    children: list[psutil.Process] = []
    while not children:
        assert parent.poll() is None, parent.communicate()[1]
        time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 130 and err.endswith("convmlp: interrupted\n")
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_variant_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)
    plan = make_plan(["convmlp_s"], modes=["folded"], dtypes=["float32"], batch_sizes=[1], device="cpu")
    record: list[str] = []
    base = Recorder("base", record)
    base.turns, base.about = [[0.1]], {"prepared_in_s": 1.0, "peak_mb": 300.0}
    broken = Contestant("broken", LIGHT, {"threads": 1})
    prepare_all([broken], lambda what: None)
    take_turns([broken, base], 2, 1.0, lambda what: None)
    rows = [comparison._row(variant, own, base) for variant, own in zip(plan.groups[0], (base, broken), strict=True)]
    assert record == ["base", "base"]
    assert list(make_table(rows).columns[-1].cells) == ["", "failed: KeyError: 'dtype'"]


# What comes out


def test_each_variant_has_its_figures(measured):
    rows = {row["mode"]: row for row in measured["results"]}
    assert list(rows) == ["eager", "onnxruntime", "openvino"]
    for row in rows.values():
        assert "failed" not in row
        assert (row["model"], row["dtype"], row["batch_size"], row["top1"]) == ("convmlp_s", "float32", 2, 76.8)
        assert row["input_size"] == [3, 64, 64] and row["calls"] >= 2 and len(row["turns_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(2000 / row["ms_per_batch"])
        assert row["gflops"] == pytest.approx(2 * row["macs"] * row["images_per_s"] / 1e9)
        [rate] = measured["matrix_products"]
        assert row["share"] == pytest.approx(row["gflops"] / rate["gflops"])
        assert row["peak_mb"] > row["before_mb"] > 1
    assert rows["eager"]["ratio"] == 1


def test_each_variant_computes_what_the_model_does(measured):
    assert max(row["difference"] for row in measured["results"]) < 1e-4


def test_the_memory_of_a_runtime_holds_no_pytorch(measured):
    before = {row["mode"]: row["before_mb"] for row in measured["results"]}
    assert max(before["onnxruntime"], before["openvino"]) < before["eager"] / 2


def test_the_json_tells_machine_and_call(measured):
    assert measured["command"] == ["convmlp", *measured["call"].split()]
    assert measured["machine"]["processor"] and measured["machine"]["versions"]["torch"] == torch.__version__
    assert measured["settings"] == {"device": "cpu", "threads": 1, "img_size": 64, "rounds": 2, "seconds": 0.05}


def test_the_table_shows_each_variant_and_what_it_is_measured_against(measured):
    lines = [line.split() for line in measured["shown"].splitlines()]
    assert [line[:3] for line in lines if "float32" in line][0] == ["convmlp_s", "eager", "float32"]
    assert sum("float32" in line for line in lines) >= 3
    assert "matrix products" in measured["shown"] and "random" in measured["shown"]


def test_the_plot_is_a_picture(measured):
    with Image.open(measured["plot"]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


def made_up(model: str, speed: float, batch_size: int = 1) -> list[dict]:
    modes = (("eager", "float32", 1), ("openvino", "bfloat16", 2.5))
    common = {"task": "inference", "model": model, "batch_size": batch_size, "input_size": [3, 224, 224]}
    common["top1"] = published_top1(model)
    return [{**common, "mode": m, "dtype": d, "images_per_s": speed * k} for m, d, k in modes]


SPEEDS = [25, 17, 9, 6.5, 16.3, 28.7, 15, 24.5, 12.5, 110, 85, 62]


def test_labels_of_the_plot_keep_apart():
    models = ["convmlp_s", "convmlp_m", "convmlp_l", *PEERS]
    rows = [row for model, speed in zip(models, SPEEDS, strict=True) for row in made_up(model, speed)]
    figure = speed_figure(rows, "a machine")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    [panel] = figure.axes
    labels = [child for child in panel.get_children() if isinstance(child, Annotation)]
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in labels]
    assert len(labels) == len(models)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(panel.bbox.x0 < box.x0 and box.x1 < panel.bbox.x1 for box in boxes)


def test_the_plot_joins_plain_and_fastest_mode_in_a_panel_for_each_batch_size():
    rows = [*made_up("convmlp_s", 20), *made_up("convmlp_s", 40, batch_size=8)]
    figure = speed_figure(rows, "")
    lines = [[list(line.get_xdata()) for line in panel.lines if len(line.get_xdata()) == 2] for panel in figure.axes]
    assert lines == [[[20, 50]], [[40, 100]]]
    assert [panel.get_xscale() for panel in figure.axes] == ["log", "log"]
    texts = [text.get_text() for text in figure.axes[0].findobj(Annotation)]
    assert texts == ["convmlp_s (openvino bf16)"]


def test_a_model_whose_accuracy_nobody_published_is_not_on_the_plot():
    figure = speed_figure([*made_up("convmlp_s", 20), *made_up("pure_mlp_s", 30)], "")
    assert len(figure.axes[0].findobj(Annotation)) == 1


def test_the_table_says_what_took_long_and_what_lost_precision():
    row = {**made_up("convmlp_s", 20)[1], "prepared_in_s": 35.0, "difference": 0.2, "backend": "inductor"}
    [note] = make_table([row]).columns[-1].cells
    assert note == "inductor, ready after 35 s, logits differ by 0.2 of the largest"


def test_the_table_takes_names_and_reasons_as_they_are():
    row = {**made_up("my[/red].pth", 20)[0], "failed": "no kernel for [2, 3] [/bold]"}
    console = Console(width=200, file=io.StringIO())
    console.print(make_table([row]))
    shown = console.file.getvalue()
    assert "my[/red].pth" in shown and "no kernel for [2, 3] [/bold]" in shown


# What is measured


SPEC = {"model": "convmlp_s", "dtype": "float32", "img_size": 32, "batch_size": 2, "device": "cpu", "threads": 1}


@pytest.mark.parametrize(("module", "name"), [builder.split(":") for builder in worker.BUILDERS.values()])
def test_every_kind_of_process_has_its_builder(module, name):
    assert callable(getattr(importlib.import_module(module, "convmlp.benchmark"), name))


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [
        ("eager", "float32", 0),
        ("eager", "bfloat16", 0.1),
        ("amp", "bfloat16", 0.1),
        ("compiled", "float32", 1e-5),
        ("prepared", "float32", 1e-5),
        ("prepared", "bfloat16", 0.1),
        ("channels-last", "float32", 1e-5),
        ("folded", "float32", 1e-5),
        ("folded", "bfloat16", 0.1),
    ],
)
def test_each_mode_computes_what_the_model_does(mode, dtype, tolerance, monkeypatch):
    # what compilers do is not what is tested here
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(deploy, "prepare", functools.partial(deploy.prepare, backend="eager"))
    subject = networks.build_inference({**SPEC, "mode": mode, "dtype": dtype})
    assert subject.about["difference"] <= tolerance and (dtype == "float32" or subject.about["difference"] > 0)
    assert subject.about.get("backend") == ("eager" if mode == "prepared" else None)
    assert min(subject.measure(0.01)) > 0


@pytest.mark.parametrize("mode", ["eager", "channels-last", "folded"])
def test_modes_differ_in_layout_and_in_folding(mode):
    model, x = networks.open_network(SPEC, torch.device("cpu"))
    run = networks.INFERENCE_MODES[mode](model, x, torch.float32, {})
    kernel = next(module.weight for module in run.func.modules() if isinstance(module, nn.Conv2d))
    for tensor in (kernel, *run.args):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (mode != "eager")
    assert any(isinstance(module, nn.BatchNorm2d) for module in run.func.modules()) == (mode != "folded")


@pytest.mark.parametrize("mode", ["eager", "channels-last", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_changes_weights_and_their_average(mode, dtype, monkeypatch):
    seen = []
    average = networks.ModelEmaV3
    monkeypatch.setattr(
        networks, "ModelEmaV3", lambda *args, **kwargs: seen.append(average(*args, **kwargs)) or seen[0]
    )
    opened = []
    open_network = networks.open_network
    monkeypatch.setattr(networks, "open_network", lambda *args: opened.append(open_network(*args)) or opened[0])
    subject = networks.build_training({**SPEC, "mode": mode, "dtype": dtype})
    model, first = opened[0][0], seen[0].module
    before = [parameter.clone() for parameter in (model.head.weight, first.head.weight)]
    subject.run()
    assert not torch.equal(model.head.weight, before[0]) and not torch.equal(first.head.weight, before[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_own_pictures_are_loaded_from_a_folder_with_or_without_splits(workers, pictures):
    for folder, count in ((pictures, 24), (pictures / "val", 15)):
        loading = Loading({"folder": str(folder), "img_size": 32, "device": "cpu", "threads": 1, "workers": workers})
        assert loading.about["pictures"] == count
        assert min(loading.measure(0.01)) > 0


def test_loading_alone_is_measured_on_a_core_and_with_workers(capsys):
    call = "benchmark --loading --img-size 32 --seconds 0.01 --rounds 1 --workers 1"
    assert cli.main(call.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip()[:8] for line in lines if "core" in line or "worker" in line] == ["one core", "1 worker"]


def test_a_folder_that_is_not_there_is_a_mistake():
    plan = make_plan(["convmlp_s"], device="cpu")
    with pytest.raises(RunError, match="no such data folder: nowhere"):
        compare_loading(plan, "nowhere")


def test_a_folder_without_pictures_is_a_mistake(tmp_path):
    with pytest.raises(RunError, match=str(tmp_path)):
        Loading({"folder": str(tmp_path), "img_size": 32, "device": "cpu", "threads": 1, "workers": 0})


def test_beside_training_steps_it_is_said_how_many_cores_must_load():
    plan = make_plan(["convmlp_s"], TRAINING, modes=["eager"], dtypes=["float32"], device="cpu")
    rows = [{**row, "prepared_in_s": 1.0} for row in made_up("convmlp_s", 100)]
    loaded = [{"workers": n, "pictures": 64, "img_size": 224, "images_per_s": rate} for n, rate in ((0, 50), (2, 90))]
    notes = sections(plan, rows, [], loaded, was_busy=False)[-1][1]
    assert notes[-1].startswith("a core loads 50 images/s") and notes[-1].endswith("250 images/s, takes 5 cores")


def test_loading_augments_as_the_recipe_does():
    recipe = parse_options(["-c", str(ROOT / "configs/classification/_base_/imagenet.yml")])
    ours = parse_options(RECIPE.split())
    keys = "aug scale ratio train_interpolation hflip vflip color_jitter aa reprob remode recount mixup cutmix "
    keys += "cutmix_minmax mixup_prob mixup_switch_prob mixup_mode smoothing"
    assert {key: getattr(ours, key) for key in keys.split()} == {key: getattr(recipe, key) for key in keys.split()}
