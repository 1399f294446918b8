"""The shard jobs as tasks of a local Ray."""

import sys
from pathlib import Path

import pytest

from mpl_fast.errors import UserError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.write.ray_engine import run_ray
from mpl_fast.packing.write.workers import Jobs
from tests.packing.packs import hashes, image_tree, names, pack, refuse


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def test_ray_packs_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 4)
    here = pack(*common, out=tmp_path / "here")
    there = pack(*common, "--engine", "ray", out=tmp_path / "there")
    assert hashes(there) == hashes(here)


def test_error_of_a_task_is_one_line_and_finished_shards_stay(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    image = tree / "train" / "ant" / "1.jpg"
    image.write_bytes(image.read_bytes()[:200])
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 4, "--out", tmp_path / "out")
    line = refuse(*common, "--engine", "ray", status=4)
    assert str(image) in line
    assert len(list((tmp_path / "out" / ".pack").glob("*.rec.done"))) == 3
    assert names(tmp_path / "out") == {".lock", ".pack"}


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    jobs = Jobs(tmp_path, [], ImageOptions(), 1)
    with pytest.raises(UserError, match=r"pip install 'mpl_fast\[ray\]'"):
        run_ray(jobs, lambda images, size: None)
