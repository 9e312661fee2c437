"""RetinaNet, Faster R-CNN and Mask R-CNN with a ConvMLP and a feature pyramid, of torchvision's parts alone.

The detectors are torchvision's own classes. They take images as a list of (c, h, w) from 0 to 1, and in training
targets as dicts of boxes, labels and, for Mask R-CNN, masks; they give losses in training and predictions in
evaluation. Resizing and ImageNet's mean and standard deviation are part of them.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from . import zoo
from .backbones import Freezable, check_choice, variant_settings
from .common.errors import suggest

FPN_DIM = 256


class ConvMLPWithFPN(Freezable, BackboneWithFPN):
    """Images to a pyramid of maps: (b, in_chans, h, w) -> dict of (b, 256, h/s, w/s), each s twice the one before.

    A backbone for any of torchvision's detectors. `body` is the ConvMLP, part by part: tokenizer, conv_stages,
    stages_0, stages_1, stages_2. Its four maps have strides 4, 8, 16 and 32, and are 64, 128, 256 and 512 channels wide
    for S and M, 96, 192, 384 and 768 for L. `fpn` makes '0' of the first one chosen, '1' of the next, and so on, then
    what `extra_blocks` adds.

    Args:
        arch: 'convmlp_s', 'convmlp_m' or 'convmlp_l'.
        pretrained: True for the published ImageNet weights, or the path or URL of a checkpoint, for the body.
        out_indices: Which of the four maps, in increasing order. What lies deeper than the last one is left out.
        extra_blocks: Adds coarser maps to the pyramid; None for torchvision's LastLevelMaxPool.
        frozen_stages: Parts of the body from the input that are not trained: -1 none, 0 the tokenizer, 1 also the
            convolution stage, 2 to 4 also the first to third Conv-MLP stage.
        norm_eval: Keep BatchNorm's statistics as they are in training; wise with one or two images a step.
        **kwargs: Arguments of `convmlp.ConvMLP`: in_chans, drop_path_rate, ...

    Raises:
        ValueError: an unknown variant, level or part.
        CheckpointError: the weights cannot be had, or do not fit the body.
        TypeError: unknown keyword.
    """

    def __init__(
        self,
        arch: str = "convmlp_s",
        pretrained: bool | str | os.PathLike = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        extra_blocks: ExtraFPNBlock | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        **kwargs: Any,
    ):
        variant_settings(arch)
        model = getattr(zoo, arch)(pretrained, classifier_head=False, **kwargs)
        check_choice(model, out_indices, frozen_stages)
        chosen = [model.feature_info[i] for i in out_indices]
        parts = {name.replace(".", "_"): part for name, part in model.parts().items()}  # module names have no dots
        super().__init__(
            nn.Sequential(OrderedDict(parts)),
            return_layers={info["module"].replace(".", "_"): str(i) for i, info in enumerate(chosen)},
            in_channels_list=[info["num_chs"] for info in chosen],
            out_channels=FPN_DIM,
            extra_blocks=extra_blocks,
        )
        self.freeze(self.get_submodule("body").children(), frozen_stages, norm_eval)


def retinanet(
    arch: str = "convmlp_s",
    num_classes: int = 91,
    pretrained: bool | str | os.PathLike = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet (Lin et al. 2017) on the three coarser maps, with P6 and P7 made of the last: strides 8 to 128.

    Other pyramids, input channels or depths of ConvMLP: give torchvision's class a `ConvMLPWithFPN` of your own. Its
    arguments are also the others here.

    Args:
        num_classes: Classes with the background, which is label 0: 91 for COCO, 2 for one kind of object.
        **kwargs: Arguments of torchvision's class: min_size, max_size, score_thresh, anchor_generator, ...

    Raises:
        ValueError: an unknown variant or part, or less than two classes.
        CheckpointError: the weights cannot be had, or do not fit the ConvMLP.
        TypeError: unknown keyword.
    """
    _check_arguments(RetinaNet, num_classes, kwargs)
    extra_blocks = LastLevelP6P7(variant_settings(arch)["dims"][-1], FPN_DIM)
    backbone = ConvMLPWithFPN(arch, pretrained, (1, 2, 3), extra_blocks, frozen_stages, norm_eval)
    return RetinaNet(backbone, num_classes, **kwargs)


def faster_rcnn(
    arch: str = "convmlp_s",
    num_classes: int = 91,
    pretrained: bool | str | os.PathLike = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN (Ren et al. 2015) on all four maps and a fifth at stride 64. Arguments as for `retinanet`."""
    _check_arguments(FasterRCNN, num_classes, kwargs)
    backbone = ConvMLPWithFPN(arch, pretrained, frozen_stages=frozen_stages, norm_eval=norm_eval)
    return FasterRCNN(backbone, num_classes, **kwargs)


def mask_rcnn(
    arch: str = "convmlp_s",
    num_classes: int = 91,
    pretrained: bool | str | os.PathLike = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    **kwargs: Any,
) -> MaskRCNN:
    """Mask R-CNN (He et al. 2017) on all four maps and a fifth at stride 64. Arguments as for `retinanet`."""
    _check_arguments(MaskRCNN, num_classes, kwargs)
    backbone = ConvMLPWithFPN(arch, pretrained, frozen_stages=frozen_stages, norm_eval=norm_eval)
    return MaskRCNN(backbone, num_classes, **kwargs)


def _check_arguments(detector: type[nn.Module], num_classes: int, kwargs: dict[str, Any]) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes counts the background too, so it must be at least 2, got {num_classes=}")
    # torchvision itself would ignore a keyword that it does not know
    known = {**signature(detector).parameters, **signature(GeneralizedRCNNTransform).parameters}
    for name in kwargs.keys() - known.keys():
        raise TypeError(f"{detector.__name__} has no argument {name!r}{suggest(name, known)}")
