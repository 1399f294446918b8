"""CIFAR-10 by tools/make_rec.py: 60,000 images, and the same bytes on every way to them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.packing.pack_command import hashes, identities, pack, read_split, run

from mpl_fast.data.manifest import read_manifest
from tests.packing.stopped_packs import SlowPack


@pytest.fixture(scope="module")
def cifar(shared_data: Path) -> tuple[Any, ...]:
    archive = f"{shared_data / 'cifar10-jpeg.tar.xz'}"
    return ("--src", f"{archive}:train", "--val", f"{archive}:test", "--labeled", 4000,
            "--shards", 4)  # fmt: skip


@pytest.fixture(scope="module")
def by_one(cifar: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(*cifar, "-j", 1, out=tmp_path_factory.mktemp("cifar") / "out")


def test_every_image_is_there(by_one: Path) -> None:
    manifest = read_manifest(by_one)
    assert {name: split.records for name, split in manifest.splits.items()} == {
        "train": 50000, "labeled": 4000, "unlabeled": 50000, "val": 10000}  # fmt: skip
    assert manifest.classes[0] == "airplane"
    labels = Counter(row[1] for row in read_split(by_one, "train_label"))
    assert labels == dict.fromkeys(map(float, range(10)), 400)
    assert len({row[3] for row in read_split(by_one, "val")}) > 9990  # images, hardly any twice


def test_killed_and_resumed_by_two(cifar: tuple[Any, ...], by_one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = SlowPack(cifar, out, "-j", 1)
    running.kill()
    kept = identities(running.work / name for name in running.done())
    assert 1 <= len(kept) < 8
    run("pack", *cifar, "-j", 2, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert hashes(out) == hashes(by_one)


def test_parts(cifar: tuple[Any, ...], by_one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        run("pack", *cifar, "-j", 2, "--part", part, "--out", out)
    run("finish", out)
    assert hashes(out) == hashes(by_one)
