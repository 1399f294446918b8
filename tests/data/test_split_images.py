"""Images by their place in a split are those that the evaluation loader yields there."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.errors import DataError
from mpl_fast.inference.images import open_images
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


@pytest.mark.parametrize("line", ["", "3", "a\t0\tx", "100\tb\tx", "100\t1", "\udcff"])
@pytest.mark.parametrize("kind", ["listing", "index"])
def test_damaged_lines(line: str, kind: str, tiny_rec: Path, tmp_path: Path) -> None:
    """Of the .lst, which has no checksum, and of the .idx, should it change later."""
    split = read_manifest(tiny_rec).splits["val"]
    before = getattr(split, kind).read_text().splitlines()
    damaged = tmp_path / "damaged"
    damaged.write_text("\n".join([line, *before[1:], ""]), "utf-8", "surrogateescape")
    given: dict[str, Any] = {kind: damaged}
    with pytest.raises(DataError, match="does not list the records"):
        SplitImages(replace(split, **given))


@pytest.mark.parametrize("label", [-2, 10, 1 << 24])
def test_a_label_of_no_class_is_one_line(label: int, tiny_rec: Path, tmp_path: Path) -> None:
    """Where labels are shown by name."""
    manifest = read_manifest(tiny_rec)
    line = f"^{tiny_rec}: label {label} is not that of a class, 0 to 9: .*make_rec.py verify"
    with pytest.raises(DataError, match=line):
        manifest.class_text(label)
    rec = Path(shutil.copytree(tiny_rec, tmp_path / "rec"))
    listing = read_manifest(rec).splits["labeled"].listing
    number, _, name = listing.read_text().partition("\n")[0].split("\t")
    listing.write_text(f"{number}\t{label}\t{name}\n{listing.read_text().partition(chr(10))[2]}")
    with pytest.raises(DataError, match=f"label {label} is not that of a class"):
        open_images(f"{rec}:labeled", tmp_path, print)
