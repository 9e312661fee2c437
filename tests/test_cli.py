"""The console command: real verbs on real pictures, and what they write."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits

import convmlp.timm_models  # noqa: F401
from convmlp import classification, cli
from convmlp.common.errors import RunError
from convmlp.use.classifier import Classifier, open_any, open_classifier
from convmlp.use.export import export
from convmlp.use.info import measure
from convmlp.use.predict import Guess, draw, predict
from convmlp.use.results import drawn_names
from convmlp.use.visualize import activation_map, feature_figure, feature_maps, filter_figure, first_filters

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["one", "three", "two"]


def convmlp_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run the installed command as a user would."""
    command = [str(Path(sys.executable).with_name("convmlp")), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """train/CLASS/*.png and val/CLASS/*.png of real digits, 36x36."""
    root = tmp_path_factory.mktemp("digits")
    content = load_digits()
    for digit, name in zip((1, 3, 2), CLASSES, strict=True):
        for number, i in enumerate(np.flatnonzero(content.target == digit)[:30]):
            folder = root / ("train" if number < 20 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((content.images[i] * 15).astype("uint8"))
            picture.resize((36, 36)).save(folder / f"{name}{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """The folder of a short run of classification.py on the digits, grey, with a switch of the model set."""
    output = tmp_path_factory.mktemp("output")
    call = f"--output {output} --experiment run --model convmlp_s --model-kwargs spatial_connect=False --img-size 40 "
    call += "--in-chans 1 --epochs 3 --warmup-epochs 0 --batch-size 10 --hflip 0 --lr 1e-3 --workers 0 --mean 0.4 "
    call += f"--std 0.3 --crop-pct 1.0 --color-jitter 0 --scale 0.8 1.0 {digits}"
    assert classification.main(call.split()) == 0
    return output / "run"


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture
def make_classifier() -> Callable[..., Classifier]:
    def make(name: str = "convmlp_s", **kwargs) -> Classifier:
        torch.manual_seed(0)
        return open_classifier(name, pretrained=False, device="cpu", **kwargs)

    return make


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Run a verb that must end with exit code 2 and one line on standard error; returns the line."""

    def run(*arguments: object) -> str:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert err.startswith("convmlp: error: ") and err.count("\n") == 1
        return err

    return run


# The command


def test_help_lists_the_verbs_and_waits_for_no_library():
    code = (
        "import sys\nfrom convmlp.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print({'torch', 'timm', 'PIL', 'matplotlib', 'rich'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for verb in ("predict", "visualize", "export", "info", "benchmark", "doctor", "completion"):
        assert f"\n    {verb}" in run.stdout
    assert run.stdout.endswith("set()\n")


def test_the_installed_command_tells_its_version():
    run = convmlp_command("--version")
    assert (run.returncode, run.stdout) == (0, f"convmlp {convmlp.__version__}\n")


@pytest.mark.parametrize("verb", ["predict", "visualize", "export", "info", "benchmark", "doctor", "completion"])
def test_every_verb_has_a_manual(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0 and f"convmlp {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("predct cat.png", "unknown verb predct; did you mean predict?"),
        ("predict", "the following arguments are required: IMAGE"),
        ("predict x.png --topkk 3", "unknown option --topkk; did you mean --topk?"),
        ("predict x.png --topk 0", "argument --topk: is a whole number from 1 on, got 0"),
        ("predict x.png --topk many", "argument --topk: is a whole number from 1 on, got many"),
        ("predict nowhere.png", "no such picture, folder or pattern: nowhere.png"),
        ("predict {empty}", "no pictures in the folder {empty}"),
        ("predict {photo} --model convmlp_x", "unknown --model convmlp_x; did you mean convmlp_"),
        ("predict {photo} --model pure_mlp_s", "there are no published weights"),
        ("predict {photo} --checkpoint nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("predict {photo} --checkpoint {photo}", "chelsea.png is truncated, not a checkpoint"),
        ("predict {photo} --device cuda:99", "--device cuda:99"),
        ("predict {photo} --device tpu", "unknown --device tpu"),
        ("predict {photo} --img-size 16", "--img-size is 32 px or more, got 16"),
        ("predict {photo} --config x.py", "--config needs the trained weights"),
        ("predict {photo} --config x.py --checkpoint x.pth --topk 3", "--topk is for classifiers"),
        ("predict {photo} --config x.py --checkpoint x.pth", "no such config: x.py"),
        ("predict {photo} --score-threshold 0.5", "--score-threshold is for detection and segmentation"),
        ("predict {photo} --json {photo}/x.json", "cannot write into the output folder {photo}"),
        ("predict {photo} --csv {empty}", "cannot write {empty}: it is a folder"),
        ("predict {photo} --save-dir {photo}", "cannot write into the output folder {photo}"),
        ("predict {photo} --json - --csv -", "--json and --csv cannot both be -"),
        ("predict {photo} --json x --csv x", "--json and --csv cannot both be x"),
        ("predict {photo} --topk 1 b.jpg", "unexpected argument b.jpg"),
        ("predict {photo} --score-threshold high", "--score-threshold: lies between 0 and 1, got high"),
        ("info convmlp_s convmlp_m --depth 3", "--depth is for the layers of one model"),
        ("visualize {photo} --kind filters", "takes no picture"),
        ("visualize", "--kind features needs a picture"),
        ("visualize nowhere.png --no-pretrained", "nowhere.png: No such file"),
        ("visualize {photo} --models convmlp_s rsnet50 --no-pretrained", "unknown --model rsnet50; did you mean"),
        ("visualize {photo} --classes cat", "--classes is for --kind cam"),
        ("visualize {photo} --kind cam --classes tabbby --no-pretrained", "knows no class tabbby; did you mean tabby?"),
        ("visualize {photo} --no-pretrained --out {empty}/x.xyz", "x.xyz: its suffix is one of"),
        ("info convmlp_xx", "unknown --model convmlp_xx"),
        ("info nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("export convmlp_s --no-pretrained --format onx", "invalid choice: 'onx'"),
        ("export convmlp_s --no-pretrained --output {empty}", "{empty}"),
        ("completion fish", "invalid choice: 'fish'"),
    ],
)
def test_a_mistake_is_one_line(call, message, fails, photo, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"photo": photo, "empty": tmp_path / "empty"}
    assert message.format(**names) in fails(*call.format(**names).split())


def test_debug_shows_where_a_mistake_comes_from():
    run = convmlp_command("predict", "nowhere.png", "--debug")
    assert "Traceback" in run.stderr and run.returncode != 0
    assert "Traceback" not in convmlp_command("predict", "nowhere.png").stderr


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, fails, photo):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    error = fails("visualize", photo, "--kind", "cam", "--no-pretrained", "--img-size", 64)
    assert "pytorch_grad_cam is missing: pip install grad-cam" in error


def test_completion_is_a_script_that_the_shell_takes():
    script = convmlp_command("completion", "bash").stdout
    shell = subprocess.run(["bash", "-c", f"{script}\ncomplete -p convmlp"], capture_output=True, text=True, timeout=60)
    assert shell.returncode == 0 and shell.stdout.startswith("complete ")
    assert "predict" in script and "--save-dir" in script


# predict


def test_predict_finds_what_evaluation_finds(trained, digits, tmp_path):
    run = convmlp_command(
        "predict", digits / "val", "--checkpoint", trained / "best.pth", "--json", tmp_path / "x.json"
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["predictions"]
    assert len(rows) == 30 and {c["name"] for c in rows[0]["classes"]} == set(CLASSES)
    right = sum(Path(row["picture"]).parent.name == row["classes"][0]["name"] for row in rows)
    with open(trained / "per_class.csv", newline="") as file:
        evaluated = sum(int(row["right"]) for row in csv.DictReader(file))
    assert right == evaluated > 10
    assert all(abs(sum(c["probability"] for c in row["classes"]) - 1) < 1e-5 for row in rows)
    table = [line for line in run.stdout.splitlines() if "%" in line]
    assert len(table) == 90 and str(digits / "val" / "one") in table[0]


def test_predict_writes_tables_and_drawings_and_passes_over_what_is_no_picture(trained, digits, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((digits / "val" / "two").iterdir())[:2]
    for i, path in enumerate(good):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "drawn"
    call = ["predict", folder, "--checkpoint", trained / "best.pth", "--topk", 2]
    run = convmlp_command(*call, "--csv", "-", "--save-dir", out)
    assert run.returncode == 1
    assert f"skipped: {folder / 'broken.jpg'}: not a picture\n1 of 3 pictures were left out\n" in run.stderr
    rows = list(csv.DictReader(run.stdout.splitlines()))
    assert [(row["picture"], row["rank"]) for row in rows] == [
        (str(folder / f"{i}.png"), r) for i in "01" for r in "12"
    ]
    assert all(row["name"] == CLASSES[int(row["index"])] for row in rows)
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png"]
    with Image.open(out / "0.png") as drawn, Image.open(good[0]) as picture:
        assert drawn.width >= 384 and drawn.height > drawn.width
        shown = np.asarray(drawn)[: drawn.width]
        assert len(np.unique(shown)) <= len(np.unique(np.asarray(picture)))  # enlarged without smoothing


def test_pictures_of_any_kind_are_predicted_together(make_classifier, tmp_path):
    classifier = make_classifier(img_size=64)
    photo = Image.fromarray(data.chelsea())
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("L").save(tmp_path / "grey.gif")
    photo.resize((1, 1)).save(tmp_path / "one.png")
    photo.resize((2000, 20)).save(tmp_path / "wide.png")
    paths = sorted(tmp_path.iterdir())
    predictions, unreadable = predict(paths, classifier, topk=3, batch_size=2)
    assert [p.path for p in predictions] == paths and unreadable == []
    assert all(len(p.best) == 3 and p.best[0].probability >= p.best[2].probability for p in predictions)
    assert predictions[3].size == (1, 1) and predictions[4].size == (2000, 20)


def test_a_batch_changes_nothing(make_classifier, digits):
    classifier = make_classifier(img_size=64)
    paths = sorted((digits / "val" / "one").iterdir())
    alone, together = (predict(paths, classifier, 1000, batch_size=n)[0] for n in (1, 4))
    for a, b in zip(alone, together, strict=True):
        first, second = (sorted(guess[::2] for guess in p.best) for p in (a, b))
        assert np.allclose(first, second, rtol=1e-4)


def test_the_drawing_names_its_classes_below_a_picture_of_any_shape():
    best = [
        Guess(0, "a name that is far too long for any picture to show in one line of it", 0.75),
        Guess(1, "b", 0.25),
    ]
    for size in ((8, 8), (300, 900), (4000, 50), (1, 1)):
        sheet = np.asarray(draw(Image.new("RGB", size, "red"), best)).astype(int)
        assert max(sheet.shape) <= 1700
        bars = (sheet == (0xBC, 0xD9, 0xF0)).all(-1).sum(1)
        longest, shorter = bars.max(), bars[-sheet.shape[1] // 25]
        assert 0.6 < longest / sheet.shape[1] < 0.8 and shorter < longest / 2


def test_drawings_of_pictures_of_one_name_do_not_overwrite_each_other():
    names = [*("x/a.png", "y/a.png", "y/b.png", "y/b.jpg", "y_a.png"), *("a/b_c.png", "a_b/c.png", "x/c.png", "A.png")]
    paths = [Path(name) for name in names]
    names = drawn_names(paths)
    assert len({name.lower() for name in names}) == len(paths) and all(
        name.endswith(".png") and "/" not in name for name in names
    )
    assert drawn_names([Path("x/a.jpg"), Path("y/b.png")]) == ["a.png", "b.png"]


def test_the_pictures_themselves_are_never_replaced(trained, digits, tmp_path, fails):
    original = sorted((digits / "val" / "one").iterdir())[0].read_bytes()
    (tmp_path / "own.png").write_bytes(original)
    call = ("predict", tmp_path, "--checkpoint", trained / "best.pth", "--save-dir", tmp_path)
    assert "own.png would be replaced" in fails(*call)
    assert (tmp_path / "own.png").read_bytes() == original


def test_what_is_no_file_is_written_into_and_a_link_stays(trained, digits, tmp_path, capsys):
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    call = ["predict", str(digits / "val" / "one"), "--checkpoint", str(trained / "best.pth"), "--csv"]
    assert cli.main([*call, str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").read_text().startswith("picture,rank")
    assert cli.main([*call, "/dev/null"]) == 0 and Path("/dev/null").is_char_device()
    capsys.readouterr()


def test_names_of_any_letters_are_drawn_and_written(trained, digits, tmp_path):
    strange = tmp_path / os.fsdecode(b"caf\xe9.png")
    strange.write_bytes(sorted((digits / "val" / "one").iterdir())[0].read_bytes())
    call = ["predict", tmp_path, "--checkpoint", trained / "best.pth", "--json", "-"]
    run = convmlp_command(*call)
    assert run.returncode == 0, run.stderr
    assert Path(json.loads(run.stdout)["predictions"][0]["picture"]) == strange
    texts = [
        np.asarray(draw(Image.new("RGB", (300, 300)), [Guess(0, name, 0.0)])) for name in ("Größe", "Gr__e", "жук")
    ]
    assert all((a != b).any() for a, b in zip(texts, texts[1:], strict=False))


def test_output_that_nobody_takes_is_no_bug(trained, digits):
    command = f"'{Path(sys.executable).with_name('convmlp')}' predict '{digits / 'val' / 'one'}' --checkpoint "
    command += f"'{trained / 'best.pth'}'"
    for rest, code, message in (
        (">&-", 0, ""),
        ("--csv - > /dev/full", 2, "No space left"),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
    ):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        call = ["bash", "-c", f"{command} {rest}"]
        run = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == code and message in run.stderr and "bug" not in run.stderr, (rest, run)


def test_weights_that_give_no_numbers_are_an_error(trained, digits, tmp_path, fails):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    checkpoint["state_dict"]["head.bias"].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.pth")
    assert "not finite" in fails("predict", digits / "val" / "one", "--checkpoint", tmp_path / "nan.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", "abc"),
        ("class_names", [1, 2, 3]),
        ("class_names", {"one": 1}),
        ("args", ["--model"]),
        ("args", {"model_kwargs": "x=1"}),
        ("data_config", [1, 2]),
        ("data_config", {"mean": [0.5]}),
        ("data_config", {"input_size": [1, 40, 40], "interpolation": "cubic"}),
    ],
)
def test_a_checkpoint_that_says_odd_things_is_refused(key, value, trained, digits, tmp_path, fails):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    torch.save({**checkpoint, key: value}, tmp_path / "odd.pth")
    error = fails("predict", digits / "val" / "one", "--checkpoint", tmp_path / "odd.pth")
    assert "odd.pth" in error and key in error


# Opening a classifier


def test_a_training_checkpoint_tells_everything(trained):
    classifier = open_classifier(checkpoint=str(trained / "best.pth"))
    assert classifier.class_names == CLASSES
    assert list(classifier.data_config["input_size"]) == [1, 40, 40] and classifier.image_mode == "L"
    assert list(classifier.data_config["mean"]) == [0.4] and classifier.data_config["crop_pct"] == 1.0
    assert not any("connect" in name for name, _ in classifier.model.named_modules() if "norm" not in name)
    assert not classifier.model.training


def test_a_checkpoint_of_another_model_is_refused(trained):
    with pytest.raises(RunError, match="is of convmlp_s, not of --model convmlp_m"):
        open_classifier("convmlp_m", str(trained / "best.pth"))


def test_bare_weights_of_ours_are_recognised(tmp_path):
    model = timm.create_model("convmlp_m", num_classes=7, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    classifier = open_any(str(tmp_path / "mine.pth"))
    assert classifier.name == "convmlp_m" and len(classifier.class_names) == 7 and classifier.image_mode == "L"
    x = torch.randn(1, 1, 64, 64)
    assert classifier.model(x).equal(model.eval()(x))


def test_a_published_file_is_normalised_in_its_own_way(tmp_path):
    model = timm.create_model("convmlp_s", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "convmlp_s_cifar10.pth")
    classifier = open_any(str(tmp_path / "convmlp_s_cifar10.pth"))
    assert classifier.data_config["mean"] == (0.4914, 0.4822, 0.4465) and classifier.data_config["crop_pct"] == 1.0


def test_weights_of_any_timm_model_open_by_its_name(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(RunError, match="does not tell its model: --model NAME"):
        open_any(str(tmp_path / "resnet.pth"))
    (tmp_path / "names.txt").write_text("cat\ndog\nNew York\n")
    classifier = open_classifier("resnet10t", str(tmp_path / "resnet.pth"), class_map=str(tmp_path / "names.txt"))
    assert classifier.class_names == ["cat", "dog", "New York"]
    x = torch.randn(1, 3, 64, 64)
    assert classifier.model(x).equal(model(x))


def test_models_of_one_image_size_open_at_the_size_they_were_trained_with(digits, tmp_path):
    call = f"--output {tmp_path} --experiment vit --model vit_tiny_patch16_224 --img-size 64 --epochs 1 "
    call += f"--warmup-epochs 0 --batch-size 10 --workers 0 {digits}"
    assert classification.main(call.split()) == 0
    path = str(tmp_path / "vit" / "best.pth")
    classifier = open_any(path, device="cpu")
    assert predict([digits / "val" / "one" / p for p in os.listdir(digits / "val" / "one")], classifier)[1] == []
    with pytest.raises(RunError, match="works at its own 64 px alone"):
        open_any(path, img_size=96)


def test_models_of_one_image_size_can_be_built_for_another(make_classifier):
    classifier = make_classifier("mixer_s32_224", img_size=64)
    assert measure(classifier.model, classifier.data_config["input_size"]).macs > 0


def test_a_folder_of_hugging_face_is_opened_by_its_own_path(trained, tmp_path):
    own = open_classifier(checkpoint=str(trained / "best.pth"))
    export(own, tmp_path / "folder", "safetensors")
    x = torch.randn(2, 1, 40, 40)
    for path in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
        classifier = open_any(str(path))
        assert classifier.class_names == CLASSES and classifier.data_config["crop_pct"] == 1.0
        assert classifier.model(x).equal(own.model(x))


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_last_name_needs_no_line_of_its_own_behind_it(end, trained, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc" + end)
    classifier = open_classifier(checkpoint=str(trained / "best.pth"), class_map=str(tmp_path / "names.txt"))
    assert classifier.class_names == ["a", "b", "c"]


def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, trained):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(RunError, match="names 2 classes, .*best.pth has 3"):
        open_classifier(checkpoint=str(trained / "best.pth"), class_map=str(tmp_path / "names.txt"))


def test_a_detector_needs_its_config(tmp_path):
    torch.save({"state_dict": {"backbone.tokenizer.block.0.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    with pytest.raises(RunError, match="name its config too, --config FILE"):
        open_any(str(tmp_path / "detector.pth"))


def test_imagenet_classes_have_their_names(make_classifier):
    names = make_classifier().class_names
    assert len(names) == 1000 and names[281] == "tabby, tabby cat"


# visualize


def test_feature_maps_are_those_of_the_model(make_classifier, photo):
    classifier = make_classifier()
    with Image.open(photo) as image:
        maps = feature_maps(image, classifier)
        x = classifier.preprocess([image])
    with torch.inference_mode():
        expected = classifier.model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert all(np.array_equal(a, b[0].numpy()) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("mixer_s32_224", [(512, 7, 7)] * 4),
        ("pure_mlp_s", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("swin_tiny_patch4_window7_224", [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]),
    ],
)
def test_any_model_of_timm_shows_four_stages(make_classifier, photo, name, shapes):
    fixed = "224" in name
    classifier = make_classifier(name, **({} if fixed else {"img_size": 64}))
    with Image.open(photo) as image:
        assert [m.shape for m in feature_maps(image, classifier)] == shapes
        heat = activation_map(image, classifier, 3)
    assert heat.shape == ((224, 224) if fixed else (64, 64)) and 0 <= heat.min() <= heat.max() <= 1


def test_the_activation_map_is_grad_cam(make_classifier, photo):
    classifier = make_classifier(img_size=128)
    with Image.open(photo) as image:
        heat = activation_map(image, classifier, 281)
        x = classifier.preprocess([image])
    maps = []
    hook = classifier.model.stages[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    logit = classifier.model(x)[0, 281]
    hook.remove()
    gradient = torch.autograd.grad(logit, maps[0])[0]
    cam = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1)[0].relu().detach().numpy()
    assert cam.max() > 0
    coarse = np.asarray(Image.fromarray(heat).resize((4, 4), Image.Resampling.BOX))
    assert np.corrcoef(coarse.ravel(), cam.ravel())[0, 1] > 0.97
    assert np.unravel_index(coarse.argmax(), (4, 4)) == np.unravel_index(cam.argmax(), (4, 4))


def test_filters_are_the_kernels_of_the_first_convolution(make_classifier):
    for name, shape in (("convmlp_s", (32, 3, 3, 3)), ("pure_mlp_s", (64, 4, 4, 3)), ("resnet18", (64, 7, 7, 3))):
        classifier = make_classifier(name)
        filters = first_filters(classifier)
        weight = next(p for p in classifier.model.parameters() if p.ndim == 4)
        assert filters.shape == shape and np.array_equal(filters.transpose(0, 3, 1, 2), weight.detach().numpy()[:64])


def test_the_figure_has_a_row_for_each_model(make_classifier, photo):
    classifiers = [make_classifier(name, img_size=64) for name in ("convmlp_s", "resnet10t")]
    with Image.open(photo) as image:
        figure = feature_figure(image, classifiers)
    assert [row.get_suptitle() for row in figure.subfigs] == [
        "convmlp_s (random weights)",
        "resnet10t (random weights)",
    ]
    for row in figure.subfigs:
        assert [bool(axis.images) for axis in row.axes] == [True] * 5
        sheet = row.axes[1].images[0].get_array()
        assert sheet.shape[1] > sheet.shape[0]  # four columns, three rows
        assert len(np.unique(sheet.reshape(-1, 4), axis=0)) > 100
    assert len(filter_figure(classifiers).axes) == 2


@pytest.mark.parametrize("kind", ["features", "cam", "filters"])
def test_visualize_writes_a_picture(trained, photo, tmp_path, kind):
    models = [trained / "best.pth", "resnet10t"]
    pictures = [] if kind == "filters" else [photo, "--img-size", 96]
    call = ["visualize", *pictures, "--kind", kind, "--no-pretrained", "--models", *models]
    run = convmlp_command(*call, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", f"drawn: {kind}.png\n")
    with Image.open(tmp_path / f"{kind}.png") as figure:
        assert figure.width > 500 and figure.height > 300
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 100


# info


def test_the_tables_of_the_readme_are_those_of_info():
    run = convmlp_command("info", "--markdown")
    assert run.returncode == 0, run.stderr
    readme = [" ".join(line.split()) for line in (ROOT / "README.md").read_text().splitlines()]
    rows = [" ".join(line.split()) for line in run.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 13
    assert [row for row in rows if row not in readme and "---" not in row] == []


def test_info_measures_any_model(capsys):
    assert cli.main(["info", "resnet18", "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "11 689 512" in out and "1.814 G" in out and "2.48 M" in out  # as timm's results table has them
    layer4 = next(line.split() for line in out.splitlines() if "layer4" in line)
    assert layer4[:8] == ["layer4", "Sequential", "512", "x", "7", "x", "7", "32"]


def test_activations_of_attention_are_the_same_fused_or_not(monkeypatch):
    fused = measure(timm.create_model("vit_tiny_patch16_224"), (3, 224, 224))
    monkeypatch.setattr("timm.layers.attention.use_fused_attn", lambda *args, **kwargs: False)
    plain = measure(timm.create_model("vit_tiny_patch16_224"), (3, 224, 224))
    assert fused.activations == plain.activations and fused.macs == plain.macs


def test_measuring_leaves_a_model_in_training_as_it_was():
    model = timm.create_model("convmlp_s").train()
    strides = {layer.name: layer.stride for layer in measure(model, (3, 100, 100)).layers}
    assert model.training and model.norm.training
    assert [strides[name] for name in ("tokenizer", "conv_stages", "stages.0", "stages.2")] == [4, 8, 16, 32]


def test_layers_add_up_to_the_model(capsys):
    assert cli.main(["info", "convmlp_s", "--depth", "1", "--markdown"]) == 0
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    layers = [line for line in lines if len(line) == 6][2:]
    assert [line[0].strip() for line in layers] == [
        *("tokenizer", "conv_stages", "stages.0", "stages.1", "stages.2", "norm", "head")
    ]
    assert sum(int(line[4].replace(" ", "")) for line in layers) == 9_022_920
    assert abs(sum(float(line[5].split()[0]) for line in layers) - 2385.3) < 0.5
    assert [line[3].strip() for line in layers] == ["4", "8", "16", "32", "32", "32", ""]


def test_info_of_a_checkpoint_is_of_its_own_classes_and_size(trained, capsys):
    assert cli.main(["info", str(trained / "best.pth"), "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "40 px" in out and "8 997 576" not in out and "head" in out


# doctor


def installed(folder: Path, name: str, version: str) -> None:
    """Metadata of a package, as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


RUN_DOCTOR = "from convmlp.cli import main\nsys.exit(main(['doctor']))"


def doctor(*folders: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path[:0] = {[str(f) for f in folders]}\n{RUN_DOCTOR}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_doctor_finds_this_installation_healthy():
    run = convmlp_command("doctor")
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    for subject in ("Python", "cpu", "torch", "torchvision", "timm", "onnxruntime", "convmlp_l"):
        assert f"ok      {subject} " in run.stdout
    assert "BROKEN" not in run.stdout and "\nhealthy: " in run.stdout


def test_doctor_names_a_wrong_version_and_two_packages_in_each_others_way(tmp_path):
    installed(tmp_path, "timm", "0.4.12")
    installed(tmp_path, "mmcv", "2.1.0")
    run = doctor(tmp_path)
    assert run.returncode == 1 and "not healthy" in run.stdout
    lines = {line.split()[1]: line for line in run.stdout.splitlines() if "BROKEN" in line and len(line.split()) > 3}
    assert "0.4.12, but >=1.0.31 is needed  ->  pip install 'timm>=1.0.31'" in lines["timm"]
    mmcv = next(line for line in lines.values() if "mmcv" in line)
    assert "bring the same modules" in mmcv and "pip uninstall -y" in mmcv


def test_doctor_names_what_is_missing_and_what_does_not_import(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')")
    installed(tmp_path, "onnxscript", "0.1")
    hide = "import importlib.metadata as m\nv = m.version\ndef version(name):\n    if name == 'shtab':\n"
    hide += "        raise m.PackageNotFoundError(name)\n    return v(name)\nm.version = version\n"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{hide}{RUN_DOCTOR}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "missing shtab                                 ->  pip install 'shtab'".split() in [
        line.split() for line in run.stdout.splitlines()
    ]
    broken = next(line for line in run.stdout.splitlines() if "BROKEN  onnx " in line)
    assert "libfoo.so" in broken and "pip install 'onnx>=1.17'" in broken
    unfit = next(line for line in run.stdout.splitlines() if "onnxscript " in line)
    assert unfit.split()[:4] == ["unfit", "onnxscript", "0.1,", "but"]  # of a part that is not installed whole


# torch.hub


def test_torch_hub_loads_the_checkout_without_installing_it(tmp_path):
    code = f"""
import sys
sys.path = [p for p in sys.path if not p.endswith("main/src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
import torch
model = torch.hub.load({str(ROOT)!r}, "convmlp_s", source="local", num_classes=3)
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape), sys.modules["convmlp"].__file__)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout == f"(2, 3) {ROOT / 'src' / 'convmlp' / '__init__.py'}\n", run.stderr
