"""Predictions: of images of any kind, alone or in batches, and drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from convmlp.use.classifier import open_classifier
from convmlp.use.predict import Guess, draw_classes, predict


@pytest.fixture(scope="module")
def classifier(trained):
    return open_classifier(checkpoint=str(trained / "best.pth"), device="cpu")


def test_images_of_any_kind_are_predicted_together(make_classifier, tmp_path):
    photo = Image.fromarray(data.chelsea())
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("L").save(tmp_path / "grey.gif")
    photo.resize((1, 1)).save(tmp_path / "one.png")
    photo.resize((2000, 20)).save(tmp_path / "wide.png")
    paths = sorted(tmp_path.iterdir())
    predictions, unreadable = predict(paths, make_classifier(img_size=64), topk=3, batch_size=2)
    assert [p.path for p in predictions] == paths and unreadable == []
    assert all(len(p.best) == 3 and p.best[0].probability >= p.best[2].probability for p in predictions)
    assert predictions[3].size == (1, 1) and predictions[4].size == (2000, 20)


def test_a_batch_changes_nothing(classifier, digits):
    paths = sorted((digits / "val" / "one").iterdir())
    alone, together = (predict(paths, classifier, batch_size=n)[0] for n in (1, 4))
    for a, b in zip(alone, together, strict=True):
        first, second = (sorted(guess[::2] for guess in p.best) for p in (a, b))
        assert np.allclose(first, second, rtol=1e-4)


def test_one_path_one_image_and_sequences_of_both_are_classified(classifier, digits):
    path = sorted((digits / "val" / "two").iterdir())[0]
    with Image.open(path) as image:
        image.load()
    [expected], _ = predict([path], classifier)
    for images in (str(path), path, image, image.convert("RGB"), (path, image)):
        predictions, unreadable = predict(images, classifier)
        assert len(predictions) == (2 if isinstance(images, tuple) else 1) and unreadable == []
        for prediction in predictions:
            assert [guess.name for guess in prediction.best] == [guess.name for guess in expected.best]
            assert prediction.best[0].probability == pytest.approx(expected.best[0].probability, rel=1e-4)
        assert predictions[0].path == (None if isinstance(images, Image.Image) else path)


def test_the_temperature_of_a_checkpoint_makes_it_less_sure_and_it_can_abstain(trained, digits, tmp_path):
    paths = sorted((digits / "val" / "one").iterdir())
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    assert checkpoint["temperature"] != 1
    found = []
    for temperature in (1.0, 4.0):
        torch.save({**checkpoint, "temperature": temperature}, tmp_path / "it.pth")
        classifier = open_classifier(checkpoint=str(tmp_path / "it.pth"), device="cpu")
        found.append(predict(paths, classifier, min_confidence=0.9)[0])
    sure, unsure = ([each.best[0].probability for each in predictions] for predictions in found)
    odds = [np.log(p / (1 - p)) for p in (sure[0], unsure[0])]
    assert len(checkpoint["class_names"]) > 2 or odds[0] == pytest.approx(4 * odds[1], rel=1e-3)
    assert all(a > b for a, b in zip(sure, unsure, strict=True))
    for predictions in found:
        assert [each.abstained for each in predictions] == [each.best[0].probability < 0.9 for each in predictions]
    assert found[1][0].row()["abstained"] is True
    assert predict(paths[0], classifier)[0][0].row().keys() == {"image", "classes"}


def test_an_image_too_long_to_be_resized_is_unreadable_from_memory_too(classifier):
    predictions, unreadable = predict([Image.new("L", (3000, 2))], classifier)
    assert predictions == [] and "3000x2 px" in str(unreadable[0])


def test_the_drawing_names_its_classes_below_an_image_of_any_shape():
    best = [
        Guess(0, "a name that is far too long for any image to show in one line of it", 0.75),
        Guess(1, "b", 0.25),
    ]
    for size in ((8, 8), (300, 900), (4000, 50), (1, 1)):
        sheet = np.asarray(draw_classes(Image.new("RGB", size, "red"), best)).astype(int)
        assert max(sheet.shape) <= 1700
        bars = (sheet == (0xBC, 0xD9, 0xF0)).all(-1).sum(1)
        longest, shorter = bars.max(), bars[-sheet.shape[1] // 25]
        assert 0.6 < longest / sheet.shape[1] < 0.8 and shorter < longest / 2


def test_names_of_any_letters_are_drawn():
    image = Image.new("RGB", (300, 300))
    texts = [np.asarray(draw_classes(image, [Guess(0, name, 0.0)])) for name in ("Größe", "Gr__e", "жук")]
    assert all((a != b).any() for a, b in zip(texts, texts[1:], strict=False))
