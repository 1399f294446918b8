"""The shard jobs as tasks of a local Ray."""

import sys
from pathlib import Path

import pytest

from mpl_fast.errors import UserError
from mpl_fast.packing.write.ray_engine import run_ray
from tests.packing.packs import hashes, image_tree, names, pack, refuse, run


@pytest.mark.nightly
@pytest.mark.slow
def test_ray_packs_the_same_bytes(tmp_path: Path) -> None:
    """After an error of one task, which is one line: finished shards stay."""
    pytest.importorskip("ray")
    tree, out = image_tree(tmp_path), tmp_path / "out"
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 4)
    image = tree / "train" / "ant" / "1.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    line = refuse(*common, "--engine", "ray", "--out", out, status=4)
    assert str(image) in line
    assert len(list((out / ".pack").glob("*.rec.done"))) == 7
    assert names(out) == {".lock", ".pack"}
    image.write_bytes(content)
    run("pack", *common, "--engine", "ray", "--out", out)
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "here"))


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    common = ("--src", image_tree(tmp_path) / "train", "--labeled", 6, "--out", tmp_path / "out")
    run("pack", *common, "--engine", "ray", "--part", "8/8")  # a part without shards
    with pytest.raises(UserError, match=r"pip install 'mpl_fast\[ray\]'"):
        run_ray([], lambda images, size: None)
