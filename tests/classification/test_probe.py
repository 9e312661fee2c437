"""The linear probe: the head becomes the logistic regression of features that stay as they are."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from convmlp.classification.probe import fit_head

from .conftest import TINY, call_main


def test_the_head_is_the_logistic_regression_of_the_features():
    features, targets = load_digits(return_X_y=True)
    features = torch.tensor(features, dtype=torch.float32)
    targets = torch.tensor(targets)
    head = fit_head(features[:1000], targets[:1000], features[1000:], targets[1000:], 10)
    right = (features[1000:] @ head.weight.T + head.bias).argmax(1).eq(targets[1000:]).float().mean().item()
    scaled = (features - features[:1000].mean(0)) / features[:1000].std(0).clamp(min=1e-6)
    peer = LogisticRegression(C=1 / (2 * head.penalty * 1000), max_iter=1000).fit(scaled[:1000], targets[:1000])
    assert abs(right - np.mean(peer.predict(scaled[1000:]) == targets[1000:].numpy())) < 0.01 and right > 0.88


def test_a_probe_changes_the_head_alone_and_leaves_a_run(images, tmp_path, no_figures):
    words = ["--recipe", "probe", "--no-pretrained", *TINY, "--workers", "0", "--output", tmp_path, "--seed", "3"]
    code, said = call_main(*words, "--experiment", "probe", images)
    assert code == 0 and "head fitted to 24 features" in said
    probed = torch.load(tmp_path / "probe" / "best.pth", weights_only=True)
    code, said = call_main(
        *words,
        "--recipe",
        "scratch",
        "--epochs",
        "1",
        "--lr",
        "0",
        "--min-lr",
        "0",
        "--warmup-epochs",
        "0",
        "--experiment",
        "same",
        images,
    )
    assert code == 0, said
    start = torch.load(tmp_path / "same" / "best.pth", weights_only=True)["state_dict"]
    weights = {name for name, value in start.items() if "running" not in name and "num_batches" not in name}
    changed = {name for name in weights if not torch.equal(start[name], probed["state_dict"][name])}
    assert changed == {"head.weight", "head.bias"}
    assert probed["history"][0]["eval_top1"] > 100 / 3
