"""The network of the CIFAR-10 speed records, for 32-pixel images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Principal colors (red, green, blue) and patterns of the 2x2 patches of natural images.
COLORS = ((0.425, -0.805, 0.415), (-0.705, -0.007, 0.709), (0.568, 0.594, 0.570))
PATTERNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
# Mean square of a patch along each color and pattern: 3,000 training images of CIFAR-10, normalized
# by channel.
SQUARES = (
    (0.18094, 0.00160, 0.00215, 0.00012),
    (0.78996, 0.00396, 0.00610, 0.00024),
    (10.13873, 0.34093, 0.40441, 0.05476),
)
EPSILON = 5e-4  # airbench's, without which noise of JPEG would be as large as what is seen


class Airbench(nn.Module):
    """Six 3x3 convolutions of 64, 256 and 256 channels: 2.0 million weights.

    After airbench94 (arXiv 2404.00498, KellerJordan/cifar10-airbench): a 2x2 convolution whose
    filters whiten patches and are not trained; three stages of convolution, max pooling,
    batch norm, GELU, convolution, batch norm, GELU; a max over what is left, and a linear layer
    without bias whose logits are divided by 9. Batch norms train a bias and no scale, convolutions
    begin as the identity where they can (Dirac). Unlike there, batch norm has PyTorch's momentum,
    the filters whiten natural images in general (`whitening_filters`), not the first training
    images, and have no bias: nothing is trained before the first 3x3 convolution, which saves a
    sixth of a step's time on a CPU. `dropout` is additional, on the pooled features. Images are
    ``(N, 3, H, W)``, at least 9 pixels a side.
    """

    WIDTHS = (64, 256, 256)
    SCALE = 1 / 9

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        filters = whitening_filters()
        self.whiten = nn.Conv2d(3, len(filters), 2, bias=False)
        self.whiten.weight.data = filters
        self.whiten.weight.requires_grad_(False)
        stages: list[nn.Module] = []
        before = len(filters)
        for width in self.WIDTHS:
            stages += [_conv(before, width), nn.MaxPool2d(2), _norm(width), nn.GELU()]
            stages += [_conv(width, width), _norm(width), nn.GELU()]
            before = width
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(before, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(F.gelu(self.whiten(images)))
        pooled = features.flatten(2).max(2).values
        logits: Tensor = self.head(self.dropout(pooled)) * self.SCALE
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer; timm's name for this method."""
        return self.head


def whitening_filters() -> Tensor:
    """(24, 3, 2, 2): twelve filters and their negatives. For patches of CIFAR-10's images the
    outputs have a mean square of 1 (0.2 in the finest pattern and color) and little correlation."""
    filters = torch.einsum("kc,mp->kmcp", torch.tensor(COLORS), torch.tensor(PATTERNS) / 2)
    scaled = filters / (torch.tensor(SQUARES) + EPSILON).sqrt()[:, :, None, None]
    positive = scaled.reshape(12, 3, 2, 2)
    return torch.cat((positive, -positive))


def _conv(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:before])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """With a scale of 1 that is not trained: PyTorch's batch norm on a GPU has no gradient of the
    bias where there is no scale."""
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm
