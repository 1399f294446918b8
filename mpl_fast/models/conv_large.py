"""ConvLarge: the 13-layer network of the Π-model, Mean Teacher and MetaSemi, for small images."""

from torch import Tensor, nn


class ConvLarge(nn.Module):
    """Nine convolutions, two poolings and a linear layer (arXiv 1610.02242, 1703.01780): 3.1
    million weights.

    As in MetaSemi's PyTorch code: batch norm where the papers have weight normalization with
    mean-only batch norm, half of the *channels* dropped after each pooling where Mean Teacher drops
    single values, no Gaussian noise on the input, PyTorch's default initialization. `dropout` is
    additional, on the pooled features, and is 0 in the literature. Images ``(N, 3, H, W)`` need
    at least 12 pixels a side.
    """

    SLOPE = 0.1
    DROPPED = 0.5

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _layer(3, 128),
            _layer(128, 128),
            _layer(128, 128),
            nn.MaxPool2d(2),
            nn.Dropout2d(self.DROPPED),
            _layer(128, 256),
            _layer(256, 256),
            _layer(256, 256),
            nn.MaxPool2d(2),
            nn.Dropout2d(self.DROPPED),
            _layer(256, 512, padding=0),
            _layer(512, 256, size=1, padding=0),
            _layer(256, 128, size=1, padding=0),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)  # (N, 128, H / 4 - 2, W / 4 - 2)
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer; timm's name for this method."""
        return self.head


def _layer(before: int, after: int, *, size: int = 3, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, size, padding=padding, bias=False),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(ConvLarge.SLOPE),
    )
