"""A folder of records is read only if every file matches the manifest."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.data.manifest import (
    FORMAT,
    check_texts,
    file_names,
    load_manifest,
    read_manifest,
    text_hashes,
)
from mpl_fast.errors import DataError
from tests.packing.small_pack import make_pack

FIRST, SECOND = "train-00000-of-00002", "train-00001-of-00002"
STEMS = ("train", "train_label", "train_unlabel", "val")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of training records, of which two are labeled, and one of validation."""
    return make_pack(
        tmp_path / "rec", shards={"train": [4, 4], "val": [3]}, labeled={0, 5}, skipped={2}
    ).root


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
    assert manifest.classes == ("ant", "bee", "cat")
    assert sorted(manifest.splits) == ["labeled", "train", "unlabeled", "val"]
    counts = {name: split.records for name, split in manifest.splits.items()}
    assert counts == {"train": 7, "labeled": 2, "unlabeled": 7, "val": 3}
    for name, stem in (("labeled", "train_label"), ("unlabeled", "train_unlabel")):
        split = manifest.splits[name]
        assert split.shards == (root / f"{FIRST}.rec", root / f"{SECOND}.rec")
        assert split.index == root / f"{stem}.idx"
        assert split.listing == root / f"{stem}.lst"
    assert manifest.splits["val"].shards == (root / "val.rec",)
    size = sum((root / f"{name}.rec").stat().st_size for name in (FIRST, SECOND))
    each = {name: split.record_bytes for name, split in manifest.splits.items()}
    assert each["labeled"] == each["train"] == size // 7  # of all records of the shards
    assert each["val"] == (root / "val.rec").stat().st_size // 3


def test_no_folder_or_no_finished_pack(root: Path) -> None:
    assert "none: no such folder of records; make one" in refusal(root / "none")
    assert "val.rec: no such folder" in refusal(root / "val.rec")
    assert refusal(root / ("x" * 300)).endswith("x: File name too long")
    (root / "empty").mkdir()
    assert "is empty: no manifest.json" in refusal(root / "empty")
    (root / "manifest.json").unlink()
    assert "has no manifest.json, so no finished pack" in refusal(root)


@pytest.mark.parametrize(
    "name",
    [f"{FIRST}.rec", f"{SECOND}.rec", "val.rec", "classes.txt"]
    + [f"{stem}.{kind}" for stem in STEMS for kind in ("idx", "lst")],
)
def test_missing_file(root: Path, name: str) -> None:
    (root / name).unlink()
    assert refusal(root) == f"{root / name}: No such file or directory; copy or pack it again"


def test_record_file_of_another_size(root: Path) -> None:
    path = root / f"{SECOND}.rec"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(root) == (
        f"{path}: {size - 4} bytes, the manifest has {size}; copy it again, or delete it and run "
        "the same pack command"
    )


@pytest.mark.parametrize("name", ["classes.txt", *(f"{stem}.idx" for stem in STEMS)])
def test_stale_text(root: Path, name: str) -> None:
    text = (root / name).read_text()
    (root / name).write_text(text.replace("0", "1").replace("ant", "cat"))
    assert refusal(root) == (
        f"{root / name}: does not match the manifest (stale or damaged); pack again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("[]", f"format 'list' is not {FORMAT!r}"),
        ("{}", f"format None is not {FORMAT!r}; pack with this version"),
        ('{"format": "mpl_fast.rec/1"}', f"format 'mpl_fast.rec/1' is not {FORMAT!r}"),
        (json.dumps({"format": FORMAT}), "damaged (KeyError: 'classes')"),
        (json.dumps({"format": FORMAT, "classes": 3}), "damaged (TypeError"),
    ],
)
def test_damaged_manifest(root: Path, text: str, message: str) -> None:
    (root / "manifest.json").write_text(text)
    assert f"manifest.json: {message}" in refusal(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stored: stored["splits"]["val"].update(shards=["gone.rec"]), "'gone.rec'"),
        (lambda stored: stored["splits"]["val"].update(shards=[]), "ZeroDivisionError"),
        (lambda stored: stored["splits"]["val"].pop("idx_sha256"), "'idx_sha256'"),
        (lambda stored: stored["shards"][0].pop("bytes"), "'bytes'"),
        (lambda stored: stored.update(splits=[1]), "AttributeError"),
        (lambda stored: stored.update(shards=3), "TypeError"),
        (
            lambda stored: stored["classes"].update(n=4),
            "classes.txt: 3 classes, the manifest has 4",
        ),
        (
            lambda stored: stored["classes"].update(titles=["Ameise"]),
            "damaged (TypeError: 1 titles for 3 classes); pack again",
        ),
    ],
)
def test_manifest_with_a_wrong_entry(
    root: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(root, edit)
    assert message in refusal(root)


def test_content_tells_records_and_splits_apart_wherever_they_lie(
    root: Path, tmp_path: Path
) -> None:
    content = read_manifest(root).content
    change(root, lambda stored: stored.update(created="another time", totals={"seconds": 7}))
    moved = root.rename(tmp_path / "moved")
    assert read_manifest(moved).content == content
    change(moved, lambda stored: stored["shards"][0].update(sha256="other"))
    contents = {content, read_manifest(moved).content}
    for number, labeled in enumerate([{0, 5}, {0, 4}]):  # no record is skipped
        folder = tmp_path / str(number)
        other = make_pack(folder, shards={"train": [4, 4], "val": [3]}, labeled=labeled)
        contents.add(read_manifest(other.root).content)
    assert len(contents) == 4


def test_names_and_hashes_of_all_files(root: Path) -> None:
    stored = load_manifest(root)
    listed, hashes = file_names(stored), text_hashes(stored)
    assert sorted([*listed, "manifest.json"]) == sorted(path.name for path in root.iterdir())
    assert set(hashes) == {name for name in listed if not name.endswith(".rec")}
    for name, sha256 in hashes.items():
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("name", ["train_label.lst", "val.lst", f"{SECOND}.idx", "records.sqlite"])
def test_files_that_training_does_not_read(root: Path, name: str) -> None:
    stored = load_manifest(root)
    check_texts(root, stored)
    path = root / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    read_manifest(root)
    with pytest.raises(DataError, match=f"{name}: does not match the manifest"):
        check_texts(root, stored)
    path.unlink()
    with pytest.raises(DataError, match=re.escape(f"{name}: No such file")):
        check_texts(root, stored)
