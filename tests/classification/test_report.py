"""Report of a run: its figures, its page, and the page in a browser."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from convmlp.classification.report import WRITTEN

from .conftest import SMALL, TINY, call_main


@pytest.fixture(scope="module")
def figures(trained):
    return json.loads((trained.folder / "report.json").read_text())


def test_the_figures_are_those_of_the_other_files(trained, figures):
    for name in WRITTEN:
        assert (trained.folder / name).exists() or name == "split.csv", name  # the images came divided
    rows = list(csv.DictReader((trained.folder / "summary.csv").read_text().splitlines()))
    assert [float(row["train_top1"]) for row in rows] == pytest.approx(
        [row["train_top1"] for row in figures["history"]]
    )
    best = rows[figures["best_epoch"]]
    assert figures["metrics"]["top1"] == pytest.approx(float(best["eval_top1"]))
    assert sum(map(sum, figures["confusion"])) == figures["validation_images"] == 15
    assert [each["training_images"] for each in figures["classes"]] == [8, 8, 8]
    per_class = csv.DictReader((trained.folder / "per_class.csv").read_text().splitlines())
    for row, each in zip(per_class, figures["classes"], strict=True):
        assert (row["class"], int(row["images"]), int(row["right"])) == (each["class"], each["images"], each["right"])
    checkpoint = torch.load(trained.folder / "best.pth", weights_only=True)
    assert checkpoint["temperature"] == figures["calibration"]["temperature"]
    assert sum(each["images"] for each in figures["calibration"]["bins"]) == 15
    assert (figures["smallest_side"], figures["median_side"], figures["largest_side"]) == (36, 36, 36)


def test_the_command_repeats_the_run(trained, figures, tmp_path):
    words = figures["command"].split()
    assert words[:3] == ["convmlp", "train", "-c"]
    code, said = call_main(*words[2:], "--output", tmp_path)
    assert code == 0, said
    again = torch.load(tmp_path / words[-1] / "best.pth", weights_only=True)
    first = torch.load(trained.folder / "best.pth", weights_only=True)
    assert all(torch.equal(again["state_dict"][name], weight) for name, weight in first["state_dict"].items())


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_the_page_needs_no_other_file_and_shows_images_with_where_the_model_looked(trained):
    text = (trained.folder / "report.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", re.sub(r"data:image/[^\"]*", "", text))
    for title in ("Data", "Training", "Classes", "How sure it is", "How it was made"):
        assert title in page.words
    assert "by Grad-CAM" in page.words and 'alt="where the model looked"' in text


def test_names_of_classes_and_files_are_text_and_not_markup(trained, make_pictures, tmp_path):
    data = make_pictures(splits={"train": 4, "val": 2})
    for split in ("train", "val"):
        (data / split / "digit0").rename(data / split / "<b>bold & co")
    code, said = call_main(*SMALL, *TINY, "--epochs", "1", "--output", tmp_path, "--experiment", "<i>x", data)
    assert code == 0, said
    text = (tmp_path / "<i>x" / "report.html").read_text()
    assert "&lt;b&gt;bold &amp; co" in text and "<b>bold" not in text and "<i>x" not in text


def test_wrong_labels_are_found_and_shown(make_pictures, tmp_path):
    """A light and a dark class, which are learned at once; one image of each lies in the folder of the other."""
    for split, n_images in {"train": 16, "val": 8}.items():
        for name, grey in {"dark": 40, "light": 210}.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(n_images):
                Image.new("L", (32, 32), grey + 3 * i + (split == "val")).save(folder / f"{name}{i}.png")
    shutil.move(tmp_path / "data/val/dark/dark3.png", tmp_path / "data/val/light/dark3.png")
    words = [*SMALL, *TINY, "--epochs", "6", "--lr", "3e-3", "--output", tmp_path, "--experiment", "run"]
    code, said = call_main(*words, "--color-jitter", "0", tmp_path / "data")
    assert code == 0, said
    first = next(csv.DictReader((tmp_path / "run" / "suspicious.csv").read_text().splitlines()))
    assert first["path"].endswith("val/light/dark3.png")
    assert (first["label"], first["suggested"], first["split"]) == ("light", "dark", "val")
    assert float(first["suggested_probability"]) > float(first["label_probability"])
    assert "validation: labelled light" in (tmp_path / "run" / "report.html").read_text()


def test_several_labels_an_image_have_a_page_too(tmp_path):
    rows = []
    for i in range(24):
        Image.new("L", (32, 32), 10 * i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'a;b' if i % 2 else 'b'},{'val' if i % 3 == 0 else 'train'}")
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    words = [*SMALL, *TINY, "--multi-label", "--output", tmp_path, "--experiment", "run"]
    code, said = call_main(*words, tmp_path / "labels.csv")
    assert code == 0, said
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "mAP, %" in page.words and "threshold" in page.words and "How sure it is" not in page.words


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options, service) as opened:
        yield opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_the_page(browser, trained, width, theme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(f"file://{trained.folder / 'report.html'}")
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    back, text = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => +c.match(/\\d+/)[0])"
    )
    assert (back > 200 and text < 60) if theme == "light" else (back < 60 and text > 200)
    assert browser.get_log("browser") == []
