"""A folder of records is only read when every file is the one its manifest tells of."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.data.manifest import check_texts, load_manifest, read_manifest
from mpl_fast.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with one split of two shards, as packing writes it."""
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    (tmp_path / "a.rec").write_bytes(bytes(40))
    (tmp_path / "b.rec").write_bytes(bytes(80))
    (tmp_path / "train_label.idx").write_text("0\t0\n1\t40\n2\t80\n")
    (tmp_path / "train_label.lst").write_text("0\t0\tant/0\n1\t0\tant/1\n2\t1\tbee/0\n")
    split = {
        "records": 3,
        "idx": "train_label.idx",
        "idx_sha256": sha256(tmp_path / "train_label.idx"),
        "lst": "train_label.lst",
        "shards": [
            {"file": "a.rec", "bytes": 40, "records": 1},
            {"file": "b.rec", "bytes": 80, "records": 2},
        ],
    }
    stored = {
        "format": "mpl_fast.rec/2",
        "classes": {"n": 2, "sha256": sha256(tmp_path / "classes.txt")},
        "splits": {"labeled": split},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(stored))
    return tmp_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    stored = json.loads((root / "manifest.json").read_text())
    edit(stored)
    (root / "manifest.json").write_text(json.dumps(stored))


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_manifest(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_folder(root: Path) -> None:
    manifest = read_manifest(str(root))
    assert manifest.root == root
    assert manifest.classes == ("ant", "bee")
    assert list(manifest.splits) == ["labeled"]
    split = manifest.splits["labeled"]
    assert split.records == 3
    assert split.shards == (root / "a.rec", root / "b.rec")
    assert split.index == root / "train_label.idx"
    assert split.listing == root / "train_label.lst"


def test_no_folder(root: Path) -> None:
    assert "none: no such folder of records; make one" in refusal(root / "none")
    assert "a.rec: no such folder" in refusal(root / "a.rec")
    assert refusal(root / ("x" * 300)).endswith("x: File name too long")
    (root / "empty").mkdir()
    assert "is empty: no manifest.json" in refusal(root / "empty")


def test_unfinished_pack(root: Path) -> None:
    (root / "manifest.json").unlink()
    assert "has no manifest.json, so no finished pack" in refusal(root)


@pytest.mark.parametrize("name", ["a.rec", "train_label.idx", "train_label.lst", "classes.txt"])
def test_missing_file(root: Path, name: str) -> None:
    (root / name).unlink()
    assert f"{name}: No such file or directory; copy or pack it again" in refusal(root)


def test_record_file_of_another_size(root: Path) -> None:
    (root / "b.rec").write_bytes(bytes(76))
    assert refusal(root).endswith("b.rec: 76 bytes, the manifest has 80; copy or pack it again")


@pytest.mark.parametrize("name", ["train_label.idx", "classes.txt"])
def test_stale_text(root: Path, name: str) -> None:
    (root / name).write_text((root / name).read_text().replace("0", "1").replace("ant", "cat"))
    assert f"{name}: does not match the manifest (stale or damaged)" in refusal(root)


def test_counts_that_disagree(root: Path) -> None:
    change(root, lambda stored: stored["splits"]["labeled"].update(records=4))
    assert "train_label.idx: 3 lines for 4 records" in refusal(root)
    change(root, lambda stored: stored["splits"]["labeled"].update(records=3))
    change(root, lambda stored: stored["splits"]["labeled"]["shards"][1].update(records=1))
    assert "train_label.idx: 3 lines for 3 records" in refusal(root)
    change(root, lambda stored: stored["classes"].update(n=3))
    assert "classes.txt: 2 classes, the manifest has 3" in refusal(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("[]", "format 'list' is not 'mpl_fast.rec/2'"),
        ("{}", "format None is not"),
        ('{"format": "mpl_fast.rec/2"}', "format 'mpl_fast.rec/2' is not"),
        ('{"format": "mpl_fast.rec/2"}', "damaged (KeyError: 'classes')"),
        ('{"format": "mpl_fast.rec/2", "classes": 3}', "damaged (TypeError"),
    ],
)
def test_damaged_manifest(root: Path, text: str, message: str) -> None:
    (root / "manifest.json").write_text(text)
    assert f"manifest.json: {message}" in refusal(root)


def test_content_tells_records_apart_wherever_they_lie(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = read_manifest(root).content
    change(root, lambda stored: stored.update(created="another time"))
    moved = root.rename(tmp_path_factory.mktemp("moved") / "rec")
    assert read_manifest(moved).content == content
    change(moved, lambda stored: stored["splits"]["labeled"]["shards"][0].update(sha256="other"))
    assert read_manifest(moved).content != content


def test_texts_that_training_does_not_read(root: Path) -> None:
    listing, index = root / "train_label.lst", root / "a.idx"
    index.write_text("0\t0\n")

    def add_hashes(stored: dict[str, Any]) -> None:
        split = stored["splits"]["labeled"]
        split["lst_sha256"] = sha256(listing)
        split["shards"][0].update(idx="a.idx", idx_sha256=sha256(index))

    change(root, add_hashes)
    check_texts(root, load_manifest(root))
    for path in (listing, index):
        before = path.read_text()
        path.write_text(before.replace("0", "1"))
        read_manifest(root)
        with pytest.raises(DataError, match=f"{path.name}: does not match the manifest"):
            check_texts(root, load_manifest(root))
        path.write_text(before)
