"""Training on a pack whose validation images were drawn from the training images."""

from pathlib import Path

from mpl_fast.data.manifest import read_manifest
from tests.packing.packs import pack
from tests.tiny_run import arguments, rows, train_here, write_digits


def test_it_trains_and_evaluates(tmp_path: Path) -> None:
    write_digits(tmp_path, train=60, val=0)
    sources = ("--src", tmp_path / "train", "--val", "20%", "--labeled", "10")
    rec = pack(*sources, out=tmp_path / "rec")
    counts = {name: split.records for name, split in read_manifest(rec).splits.items()}
    assert counts == {"train": 48, "labeled": 10, "unlabeled": 48, "val": 12}
    run = arguments(tmp_path / "run", rec)
    done = train_here(*run, "--steps", "2", "--eval-every", "2", "--checkpoint-every", "2")
    assert done.returncode == 0, done.stderr
    (top1,) = (row["eval/top1"] for row in rows(tmp_path / "run") if "eval/top1" in row)
    assert (top1 * 12 / 100).is_integer()
