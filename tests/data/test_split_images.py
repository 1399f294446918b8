"""Images by their place in a split are those that the evaluation loader yields there."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.errors import DataError
from tests.data.numbered_images import VAL, eval_loader, levels


def test_order_labels_and_bytes_are_those_of_the_loader(manifest: Manifest) -> None:
    """The red channel of each image is its number."""
    images = SplitImages(manifest.splits["val"])
    assert len(images) == len(set(images.ids)) == VAL
    place = 0
    for batch, labels, count in eval_loader(manifest):
        for level, label in zip(levels(batch[:count]), labels[:count].tolist(), strict=True):
            picture = np.asarray(Image.open(io.BytesIO(images.image(place))))
            assert abs(float(picture[..., 0].mean()) - level) < 2
            assert images.labels[place] == label
            place += 1
    assert place == VAL


def test_a_sparse_split(tiny_rec: Path) -> None:
    """The labeled split lists some of the records; each name has the file that was packed."""
    images = SplitImages(read_manifest(tiny_rec).splits["labeled"])
    assert len(images) == 20
    for place, name in enumerate(images.names):
        packed = tiny_rec.parent / "images" / "train" / name
        assert images.image(place) == packed.read_bytes()
        assert images.labels[place] == int(name[0])


def test_files_that_do_not_belong_together(tiny_rec: Path) -> None:
    splits = read_manifest(tiny_rec).splits
    mixed = replace(splits["val"], listing=splits["labeled"].listing)
    with pytest.raises(DataError, match="does not list the records"):
        SplitImages(mixed)
