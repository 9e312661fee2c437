"""A linear probe: the head alone is trained, on features that are computed once."""

import logging
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..common.devices import autocast
from ..common.errors import RunError
from ..timm_models import TimmModel
from .loaders import Loader
from .losses import share_of_hits
from .trainer import Trainer

_logger = logging.getLogger(__name__)

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the squared weights; the one with the best validation is taken
ITERATIONS = 100


class ProbeTrainer(Trainer):
    """A run of one epoch, in which the head becomes the logistic regression of the features of all images.

    The images are not augmented, so the training loader is one of evaluation.
    """

    def train_epoch(self) -> tuple[dict[str, float], str]:
        """Fit the head; returns loss and accuracy, and in words how fast the features were computed."""
        head = self._timm_model().get_classifier()
        if not isinstance(head, nn.Linear):
            raise RunError(f"--recipe probe needs a model with one linear head; {self.options.model} has another")
        start = time.perf_counter()
        features, targets = self._features(self.train_loader, "features of the training images")
        pace = f"{len(features) / (time.perf_counter() - start):.0f} img/s"
        others = self._features(self.val_loader, "features of the validation images")
        if self.process.primary:
            found = fit_head(features, targets, *others, len(self.class_names))
            _logger.info(f"head fitted to {len(features)} features, penalty {found.penalty:g}")
            with torch.no_grad():
                head.weight.copy_(found.weight)
                head.bias.copy_(found.bias)
        self.process.broadcast(head)
        with torch.no_grad():
            logits, targets = head(features.to(head.weight)), targets.to(head.weight.device)
        self.batch = len(self.train_loader)
        hits = share_of_hits(logits, targets).item()
        return {"train_loss": F.cross_entropy(logits, targets).item(), "train_top1": 100 * hits}, pace

    def _timm_model(self) -> TimmModel:
        return self.model

    @torch.no_grad()
    def _features(self, loader: Loader, desc: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the images of all processes: what the head takes (n, dim), and the classes (n)."""
        model = self._timm_model().eval()
        found = []
        hidden = None if self.process.primary else True
        for images, targets in tqdm(loader, desc=desc, disable=hidden, leave=False, unit="batch"):
            with autocast(self.process.device, self.amp_dtype):
                features = model.forward_head(model.forward_features(images), pre_logits=True)
            found.append((features.float().cpu(), targets.cpu()))
        shares = self.process.gather(tuple(map(torch.cat, zip(*found, strict=True))))
        features, targets = map(torch.cat, zip(*shares, strict=True))
        return features, targets


class Head(NamedTuple):
    """A linear head (classes, dim), and the penalty that it was fitted with."""

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float


def fit_head(
    features: torch.Tensor, targets: torch.Tensor, val_features: torch.Tensor, val_targets: torch.Tensor, n_classes: int
) -> Head:
    """The logistic regression of features (n, dim) that is right on most of the validation features."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features = (features - mean) / std
    weight = torch.zeros(n_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    best, most_right = None, -1.0
    for penalty in PENALTIES:  # each starts where the stronger one before it ended

        def loss(penalty: float = penalty) -> torch.Tensor:
            weight.grad = bias.grad = None
            value = F.cross_entropy(features @ weight.T + bias, targets) + penalty * weight.square().sum()
            value.backward()
            return value

        torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe").step(loss)
        scaled = weight.detach() / std  # of features as they are
        head = Head(scaled, bias.detach() - scaled @ mean, penalty)
        right = (val_features @ head.weight.T + head.bias).argmax(1).eq(val_targets).sum().item()
        if right > most_right:
            best, most_right = head, right
    assert best is not None
    return best
