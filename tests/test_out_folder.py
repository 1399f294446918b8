"""The output folder never shows a half-written file or a mixture of two packs as complete."""

from pathlib import Path

import pytest

from mpl_fast.data.out_folder import OutFolder, OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def write(folder: OutFolder, files: list[str], text: str) -> None:
    for name in files:
        folder.write_text(name, text)


def test_publish_replaces_the_old_pack(tmp_path: Path) -> None:
    for files in (["a.txt", "val.rec", "val.idx"], ["train_label.rec", "val.idx"]):
        with OutFolder(tmp_path) as folder:
            write(folder, [*files, "manifest.json"], " ".join(files))
            folder.publish(files)
    assert names(tmp_path) == ["a.txt", "manifest.json", "train_label.rec", "val.idx"]
    assert (tmp_path / "manifest.json").read_text() == "train_label.rec val.idx"


def test_publish_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    with OutFolder(tmp_path) as folder:
        write(folder, ["val.rec", "manifest.json"], "old")
        folder.publish(["val.rec"])
    with pytest.raises(FileNotFoundError), OutFolder(tmp_path) as folder:
        write(folder, ["val.rec", "manifest.json"], "new")
        folder.publish(["val.rec", "val.idx"])  # there is no val.idx
    assert names(tmp_path) == ["val.rec"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".val-00000-of-00002.rec.tmp", ".spool-0.tmp", ".other.tmp", "val.rec.tmp"):
        (tmp_path / name).write_text("left behind")
    with OutFolder(tmp_path):
        assert names(tmp_path) == [".other.tmp", "val.rec.tmp"]


def test_failure_removes_only_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(KeyError), OutFolder(tmp_path / name) as folder:
            write(folder, ["val.rec"], "half")
            raise KeyError
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == []


def test_space(tmp_path: Path) -> None:
    with OutFolder(tmp_path) as folder:
        folder.require_space(1)
        with pytest.raises(OutputError, match=r"1152921504.61 GB needed, .* GB free"):
            folder.require_space(1 << 60)


def test_lock(tmp_path: Path) -> None:
    writing = pytest.raises(OutputError, match="another make_rec is writing here")
    with OutFolder(tmp_path), writing, OutFolder(tmp_path):
        pass
    with OutFolder(tmp_path):
        pass
