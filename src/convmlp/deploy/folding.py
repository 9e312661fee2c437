"""BatchNorm folded into the convolutions before it."""

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with each BatchNorm that follows a convolution folded into that convolution.

    Folded are neighbours in an `nn.Sequential`, which are all that ConvMLP has; the BatchNorm becomes an identity, so
    that indices stay. Logits differ from those of the model by rounding, below 1e-5 of the largest in float32.
    """
    model = copy.deepcopy(model).eval()
    for sequential in [*model.modules()]:
        if not isinstance(sequential, nn.Sequential) or type(sequential).forward is not nn.Sequential.forward:
            continue
        for i, (conv, norm) in enumerate(pairwise(sequential)):
            # nobody knows what else a subclass does: timm's have an activation, or standardise their weights
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                sequential[i], sequential[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity().eval()
    return model
