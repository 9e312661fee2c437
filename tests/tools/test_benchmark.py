"""The benchmark: what it compares, that its processes take turns and leave nothing behind, and what it writes."""

import contextlib
import fcntl
import functools
import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import benchmark
import peers
import psutil
import pytest
import speed_report
import timm
import torch
import workloads
from benchmark import Worker, take_turns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from PIL import Image
from rich.console import Console
from torch import nn
from tqdm import tqdm
from workloads import Variant

from convmlp import deploy
from convmlp.common import packages
from convmlp.common.command import INTERRUPTED, MISTAKE, run
from convmlp.common.errors import RunError
from convmlp.use import info

ROOT = Path(__file__).resolve().parents[2]


def call(words: str) -> int:
    return run("benchmark.py", lambda: benchmark.work(words.split()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """A run of the command on small images: what it printed, its JSON, and where its plot is."""
    folder = tmp_path_factory.mktemp("benchmark")
    words = "convmlp_s pure_mlp_s --modes folded --dtypes float32 --batch-sizes 2 --img-size 32 --device cpu "
    words += f"--seconds 0.02 --rounds 2 --threads 1 --json {folder}/found.json --plot {folder}/speed"
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as said:
        assert call(words) == 0
    found = json.loads((folder / "found.json").read_text())
    return {"shown": shown.getvalue(), "said": said.getvalue(), "call": words, "plot": folder / "speed.png", **found}


# What is compared


def planned(words: str, device: str = "cpu") -> tuple[list[list[Variant]], list[str]]:
    options = benchmark.make_parser().parse(words.split())
    benchmark.check(options)
    return benchmark.plan(options, torch.device(device))


def pairs_of(group: list[Variant]) -> list[tuple[str, str]]:
    return [(variant.mode, variant.dtype) for variant in group if variant.mode]


def test_the_base_comes_first_even_when_nobody_asked_for_it():
    groups, _ = planned("--modes folded --dtypes bfloat16")
    assert pairs_of(groups[0]) == [("eager", "float32"), ("folded", "bfloat16")]


def test_matrix_products_in_each_number_format_take_turns_with_the_variants():
    groups, _ = planned("--modes folded --dtypes bfloat16")
    products = [variant.dtype for variant in groups[0] if not variant.model]
    assert products == ["float32", "bfloat16"]


def test_variants_of_a_model_and_batch_size_take_turns_only_with_each_other():
    groups, _ = planned("convmlp_s resnet50 --modes eager --dtypes float32 --batch-sizes 1 8")
    found = [{(variant.model, variant.batch_size) for variant in group if variant.mode} for group in groups]
    assert found == [{("convmlp_s", 1)}, {("convmlp_s", 8)}, {("resnet50", 1)}, {("resnet50", 8)}]


def test_what_a_mode_cannot_do_is_left_out_and_named():
    groups, left_out = planned("--modes onnxruntime --dtypes float32 bfloat16")
    assert pairs_of(groups[0]) == [("eager", "float32"), ("onnxruntime", "float32")]
    assert left_out == ["onnxruntime bfloat16: it does not compute in bfloat16"]


@pytest.fixture
def without_openvino(monkeypatch):
    find = packages.importlib.util.find_spec
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def test_a_mode_whose_package_is_missing_is_left_out(without_openvino):
    groups, left_out = planned("--dtypes float32")
    assert not any(mode == "openvino" for mode, _ in pairs_of(groups[0]))
    assert "openvino float32: pip install openvino" in left_out


def test_a_mode_asked_for_whose_package_is_missing_is_an_error(without_openvino):
    with pytest.raises(RunError, match="--modes openvino needs a missing package: pip install openvino"):
        planned("--modes openvino")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convmlp_x", "unknown --model convmlp_x; did you mean convmlp_s?"),
        ("nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("--modes foldd", "argument --modes: invalid choice: 'foldd'"),
        ("--dtypes float8", "argument --dtypes: invalid choice: 'float8'"),
        ("--modes onnxruntime --dtypes bfloat16 --device cpu", "nothing is left to compare: onnxruntime bfloat16"),
        ("--batch-sizes 0", "argument --batch-sizes: must be a positive integer, got 0"),
        ("--seconds 0", "argument --seconds: must be a positive number, got 0"),
        ("--seconds inf", "argument --seconds: must be a positive number, got inf"),
        ("--rounds many", "argument --rounds: must be a positive integer, got many"),
        ("--device cuda:99", "--device cuda:99"),
        ("--threads 99999", "--threads 99999 is more than this machine has"),
        ("--img-size 16", "--img-size must be at least 32, got 16"),
        ("--json {folder}", "cannot write {folder}: it is a folder"),
        ("--plot {folder}/x.xyz", "cannot write a figure as {folder}/x.xyz"),
        ("pure_mlp_s --plot {folder}/x", "--plot: no published accuracy is known of pure_mlp_s"),
        ("--peer", "unknown option --peer; did you mean --peers?"),
    ],
)
def test_a_wrong_call_is_told_in_one_line_before_the_work_begins(words, message, tmp_path, capsys):
    assert call(words.format(folder=tmp_path)) == MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and message.format(folder=tmp_path) in err
    assert err.startswith("benchmark.py: error: ") and err.count("\n") == 1


# Published accuracies


@pytest.mark.parametrize("name", peers.PEERS)
def test_published_accuracies_belong_to_weights_that_timm_has(name):
    assert name in timm.list_pretrained(f"{name.partition('.')[0]}.*")
    assert peers.published(name) == (name, peers.PEERS[name])


def test_published_accuracies_are_found_by_the_names_that_users_type():
    assert peers.published("convmlp_s.in1k") == ("convmlp_s", 76.8)
    assert peers.published("convmlp_m_classification") == ("convmlp_m", 79.0)
    assert peers.published("resnet50") == ("resnet50.a1_in1k", 80.38)
    assert all(peers.published(name) for name in peers.SIMILAR)
    assert [peers.published(name) for name in ("pure_mlp_s", "resnet18", "my.pth")] == [None, None, None]


# Turns


class Recorder(Worker):
    """Takes turns without a process, and writes them down."""

    def __init__(self, name: str, record: list[str]):
        super().__init__(Variant("cpu", 1, model=name, mode="eager"))
        self.record = record

    def start(self) -> None:
        pass

    def ask(self, seconds: float | None) -> None:
        self.record.append(self.variant.model if seconds else self.variant.model.upper())


def test_every_second_round_goes_backwards(monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    record: list[str] = []
    take_turns([Recorder(name, record) for name in "abc"], 3, 1.0, tqdm(disable=True))
    assert "".join(record) == "ABCabccbaabc"


def worker_with(mode: str, turns: list[list[float]], model: str = "convmlp_s", **facts) -> Worker:
    return Worker(Variant("cpu", 1, model=model, mode=mode, batch_size=4), facts, turns)


def test_numbers_are_medians_and_the_ratio_is_taken_round_by_round():
    base = worker_with("eager", [[0.2, 0.2], [0.8, 0.8], [0.3, 0.3]], macs=1_000_000)
    fast = worker_with("folded", [[0.1, 0.1], [0.2, 0.2], [0.1, 0.1]])
    products = worker_with("", [[0.2, 0.1]], "", operations=1e9)
    [_, row] = speed_report.make_rows([products, base, fast])
    assert row["images_per_s"] == pytest.approx(40)
    assert row["ms_per_batch"] == pytest.approx(100)
    assert row["ratio"] == pytest.approx(3)  # of 2, 4 and 3: that a round was slow for both does not matter
    assert row["spread"] == pytest.approx(0.75)
    assert row["gflops"] == pytest.approx(2 * 4 * 1e6 / 0.1 / 1e9)
    assert row["gflops_of_products"] == pytest.approx(10) and row["share"] == pytest.approx(row["gflops"] / 10)


# Processes


@pytest.fixture
def worker():
    made = Worker(Variant("cpu", 1))
    made.start()
    yield made
    made.pool.shutdown()


def test_a_process_that_is_killed_says_so(worker):
    os.kill(worker.pool.submit(os.getpid).result(), signal.SIGKILL)
    worker.ask(None)
    assert worker.facts == {"failed": "its process was killed, perhaps because memory ran out"}
    worker.ask(1.0)
    assert worker.turns == []


@pytest.mark.slow
def test_a_variant_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    broken = Worker(Variant("cpu", 1, dtype="int3"))
    sound = Worker(Variant("cpu", 1))
    take_turns([broken, sound], 1, 0.01, tqdm(disable=True))
    assert "int3" in broken.facts["failed"] and broken.turns == [] and len(sound.turns) == 1
    base = worker_with("eager", [[0.1]])
    failed = worker_with("folded", [], failed=broken.facts["failed"])
    rows = speed_report.make_rows([base, failed])
    assert list(speed_report.make_table(rows).columns[-1].cells) == ["", f"failed: {broken.facts['failed']}"]


@pytest.mark.slow
def test_an_interrupted_benchmark_writes_what_it_measured_and_leaves_no_process(tmp_path):
    words = "convmlp_s --modes folded --dtypes float32 --batch-sizes 1 2 --img-size 32 --threads 1 --seconds 0.05 "
    words += f"--rounds 400 --device cpu --json {tmp_path}/found.json"
    terminal, ours = os.openpty()  # there is a progress bar on a terminal only
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # which has lines and columns
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), *words.split()]
    streams = {"stdout": subprocess.PIPE, "stderr": ours}
    parent = subprocess.Popen(command, text=True, start_new_session=True, **streams)
    os.close(ours)
    said = b""
    while b"round 3 of" not in said:
        said += os.read(terminal, 4096)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGTERM)  # which does what Ctrl-C does
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode == INTERRUPTED and "interrupted: 2 of 4 variants were measured" in out
    assert os.read(terminal, 2**16).endswith(b"benchmark.py: interrupted\r\n")
    os.close(terminal)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["interrupted"] and [row["mode"] for row in found["results"]] == ["eager", "folded"]
    assert all(len(row["turns_ms"]) >= 2 for row in found["results"])
    assert len(children) > 2 and psutil.wait_procs(children, timeout=30)[1] == []


def test_an_interruption_keeps_the_rows_that_are_there(monkeypatch, capsys, tmp_path):
    asked: list[str] = []

    class Interrupted(Recorder):
        def __init__(self, variant: Variant):
            super().__init__(variant.model, asked)
            self.variant = variant

        def ask(self, seconds: float | None) -> None:
            super().ask(seconds)
            if len(asked) == 8:  # three are prepared and measured once: the second round has begun
                raise KeyboardInterrupt
            if seconds:
                self.turns.append([0.1])
            else:
                self.facts = {"operations": 1e9, "macs": 1e6, "before_mb": 1.0, "input_size": [3, 32, 32]}

    monkeypatch.setattr(benchmark, "PAUSE", 0)
    monkeypatch.setattr(benchmark, "Worker", Interrupted)
    words = f"--modes folded --dtypes float32 --batch-sizes 1 2 --rounds 3 --device cpu --json {tmp_path}/found.json"
    assert call(words) == INTERRUPTED
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["interrupted"]
    assert [(row["mode"], len(row["turns_ms"])) for row in found["results"]] == [("eager", 1), ("folded", 2)]
    out, err = capsys.readouterr()
    assert "interrupted: 2 of 4 variants were measured" in out and err.endswith("benchmark.py: interrupted\n")


# What comes out


@pytest.mark.slow
def test_each_variant_has_its_numbers(measured):
    rows = {(row["model"], row["mode"]): row for row in measured["results"]}
    assert list(rows) == list(itertools.product(("convmlp_s", "pure_mlp_s"), ("eager", "folded")))
    for row in rows.values():
        assert "failed" not in row
        assert (row["dtype"], row["batch_size"]) == ("float32", 2)
        assert row["input_size"] == [3, 32, 32] and len(row["turns_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(2000 / row["ms_per_batch"])
        assert row["gflops"] == pytest.approx(2 * row["macs"] * row["images_per_s"] / 1e9)
        assert row["share"] == row["gflops"] / row["gflops_of_products"] > 0 and row["difference"] < 1e-4
        assert row["peak_mb"] >= row["before_mb"] > 1
    assert rows["convmlp_s", "eager"]["ratio"] == 1 and rows["convmlp_s", "eager"]["top1"] == 76.8


@pytest.mark.slow
def test_the_json_names_the_machine_and_the_call(measured):
    assert measured["command"] == ["benchmark.py", *measured["call"].split()]
    assert measured["machine"]["processor"] and measured["machine"]["versions"]["torch"] == torch.__version__
    assert measured["interrupted"] is False


@pytest.mark.slow
def test_the_table_shows_each_variant_and_what_it_is_measured_against(measured):
    lines = [line.split() for line in measured["shown"].splitlines()]
    assert [line[:3] for line in lines if "float32" in line][0] == ["convmlp_s", "eager", "float32"]
    assert sum("float32" in line for line in lines) == 4
    assert "matrix products" in measured["shown"] and "random" in measured["shown"]


@pytest.mark.slow
def test_the_plot_is_an_image_and_models_that_it_leaves_out_are_named(measured):
    with Image.open(measured["plot"]) as image:
        assert image.format == "PNG" and min(image.size) > 400
    assert "not in the plot, because no published accuracy is known: pure_mlp_s\n" in measured["said"]


def made_up(model: str, speed: float, batch_size: int = 1) -> list[dict]:
    modes = (("eager", "float32", 1), ("openvino", "bfloat16", 2.5))
    weights, top1 = peers.published(model) or (model, None)
    common = {"model": model, "batch_size": batch_size, "input_size": [3, 224, 224]}
    common |= {"weights": weights, "top1": top1}
    return [{**common, "mode": m, "dtype": d, "images_per_s": speed * k} for m, d, k in modes]


SPEEDS = [25, 17, 9, 6.5, 16.3, 28.7, 15, 24.5, 12.5, 110, 85, 62]


def labels_of(figure) -> list[Annotation]:
    return [label for panel in figure.axes for label in panel.findobj(Annotation)]


def test_labels_of_the_plot_keep_apart():
    models = ["convmlp_s", "convmlp_m", "convmlp_l", *peers.SIMILAR]
    rows = [row for model, speed in zip(models, SPEEDS, strict=True) for row in made_up(model, speed)]
    figure = speed_report.speed_figure(rows, "a machine")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    [panel] = figure.axes
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in labels_of(figure)]
    assert len(boxes) == len(models)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(panel.bbox.x1 < box.x0 and box.x1 < figure.bbox.x1 for box in boxes)


def test_the_plot_joins_eager_and_fastest_mode_in_a_panel_for_each_batch_size():
    rows = [*made_up("resnet50", 20), *made_up("resnet50", 40, batch_size=8)]
    figure = speed_report.speed_figure(rows, "")
    lines = [[list(line.get_xdata()) for line in panel.lines if len(line.get_xdata()) == 2] for panel in figure.axes]
    assert lines == [[[20, 50]], [[40, 100]]]
    assert [panel.get_xscale() for panel in figure.axes] == ["log", "log"]
    assert [label.get_text() for label in labels_of(figure)] == 2 * ["resnet50.a1_in1k (openvino bfloat16)"]


def test_the_table_says_what_took_long_and_what_lost_precision():
    row = {**made_up("convmlp_s", 20)[1], "prepared_in_s": 35.0, "difference": 0.2, "backend": "inductor"}
    [note] = speed_report.make_table([row]).columns[-1].cells
    assert note == "inductor, ready after 35 s, logits differ by 0.2 of the largest"


def test_the_table_takes_names_and_reasons_as_they_are():
    row = {**made_up("my[/red].pth", 20)[0], "failed": "no kernel for [2, 3] [/bold]"}
    console = Console(width=200, file=io.StringIO())
    console.print(speed_report.make_table([row]))
    shown = console.file.getvalue()
    assert "my[/red].pth" in shown and "no kernel for [2, 3] [/bold]" in shown


# What is measured


def tiny(mode: str, dtype: str = "float32") -> Variant:
    return Variant("cpu", 1, model="convmlp_s", mode=mode, dtype=dtype, batch_size=2, img_size=32)


def test_random_models_have_statistics_that_do_something_and_are_the_same_in_every_process():
    model, x, _ = workloads.open_model(tiny("eager"))
    again, same, _ = workloads.open_model(tiny("eager"))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.running_mean.any() and (norm.running_var != 1).any() for norm in norms)
    assert torch.equal(model(x), again(same))


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [
        ("eager", "float32", 0),
        ("eager", "bfloat16", 0.1),
        pytest.param("compiled", "float32", 1e-5, marks=pytest.mark.slow),
        ("prepared", "float32", 1e-5),
        ("prepared", "bfloat16", 0.1),
        ("channels-last", "float32", 1e-5),
        ("folded", "float32", 1e-5),
        ("folded", "bfloat16", 0.1),
    ],
)
def test_each_mode_computes_what_the_model_does(mode, dtype, tolerance, monkeypatch):
    # What compilers do is not what is tested here
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    prepare = deploy.prepare
    monkeypatch.setattr(deploy, "prepare", lambda model, **settings: prepare(model, **settings | {"backend": "eager"}))
    run, facts = workloads.prepare_inference(tiny(mode, dtype))
    assert facts["difference"] <= tolerance and (dtype == "float32" or facts["difference"] > 0)
    assert facts.get("backend") == ("eager" if mode == "prepared" else None)
    assert run().shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["onnxruntime", "openvino"])
def test_other_runtimes_compute_what_the_model_does(mode):
    _, facts = workloads.prepare_inference(tiny(mode))
    assert facts["backend"] == mode and 0 < facts["difference"] < 1e-4


@pytest.mark.parametrize("mode", ["eager", "channels-last", "folded"])
def test_modes_differ_in_layout_and_in_folding(mode):
    run = workloads.apply_mode(mode, *workloads.open_model(tiny(mode))[:2], torch.float32)
    kernel = next(module.weight for module in run.func.modules() if isinstance(module, nn.Conv2d))
    for tensor in (kernel, *run.args):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (mode != "eager")
    assert any(isinstance(module, nn.BatchNorm2d) for module in run.func.modules()) == (mode != "folded")


def test_a_measurement_is_the_time_of_each_call():
    facts = workloads.prepare(Variant("cpu", 1))
    times, peak = workloads.measure(0.05)
    assert min(times) > 0 and facts["operations"] == 2 * 1024**3
    assert peak >= facts["before_mb"] > 1


def test_scores_of_ours_are_those_of_info():
    assert {name: peers.published(name)[1] for name in info.PUBLISHED} == {
        name: scores["ImageNet"] for name, scores in info.PUBLISHED.items()
    }
