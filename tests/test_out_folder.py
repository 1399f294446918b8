"""The output folder never shows a half-written file or a mixture of two packs as complete."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from mpl_fast.errors import OutputError
from mpl_fast.packing.out_folder import OutFolder


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
    assert names(tmp_path) == [".manifest.json.tmp", "val.rec"]


NEW = ["train_label.rec", "val.idx", "val.lst", "val.rec"]


def cut_publish_short(root: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish files of a new pack over an old one, and stop as SIGKILL does after `renames`."""
    with OutFolder(root) as folder:
        write(folder, ["val.rec", "train_label.idx", "manifest.json"], "{}")
        folder.publish(["val.rec", "train_label.idx"])
    shards = [{"file": "train_label.rec"}, {"file": "val.rec"}]
    split = {"idx": "val.idx", "lst": "val.lst", "shards": shards}
    replace, calls = Path.replace, itertools.count()

    def fail_in_time(self: Path, target: Path) -> Path:
        if next(calls) == renames:
            raise KeyError
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyError), OutFolder(root) as folder:
        write(folder, [*NEW, "classes.txt"], "new")
        folder.write_text("manifest.json", json.dumps({"splits": {"val": split}}))
        patched.setattr(Path, "replace", fail_in_time)
        folder.publish(["classes.txt", *NEW])


@pytest.mark.parametrize("renames", range(6))
def test_publish_cut_short_is_finished_by_the_next_run(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_publish_short(tmp_path, renames, monkeypatch)
    assert "manifest.json" not in names(tmp_path)
    with OutFolder(tmp_path) as folder:
        assert folder.holdings() == ["classes.txt", "manifest.json", *NEW]
    assert names(tmp_path) == ["classes.txt", "manifest.json", *NEW]
    assert {(tmp_path / name).read_text() for name in NEW} == {"new"}
    assert "splits" in (tmp_path / "manifest.json").read_text()


def test_manifest_cut_short_is_no_publish(tmp_path: Path) -> None:
    for name, text in ((".manifest.json.tmp", '{"splits": {'), (".val.rec.tmp", "")):
        (tmp_path / name).write_text(text)
    with OutFolder(tmp_path):
        assert names(tmp_path) == []


def test_temporary_files_that_lack_one_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_publish_short(tmp_path, 1, monkeypatch)
    (tmp_path / ".val.idx.tmp").unlink()
    with OutFolder(tmp_path):
        assert "manifest.json" not in names(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_within_publish_comes_too_late(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def stop_and_replace(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), number)
        return replace(self, target)

    stopped: list[int] = []
    before = signal.signal(number, lambda number, frame: stopped.append(number))
    try:
        with OutFolder(tmp_path) as folder:
            write(folder, ["val.rec", "manifest.json"], "new")
            monkeypatch.setattr(Path, "replace", stop_and_replace)
            folder.publish(["val.rec"])
        assert stopped == []
        assert names(tmp_path) == ["manifest.json", "val.rec"]
        os.kill(os.getpid(), number)
        assert stopped == [number]  # and afterwards it is heard again
    finally:
        signal.signal(number, before)


def test_names_of_many_shards(tmp_path: Path) -> None:
    for name in ("val-00000-of-00001.rec", "val-100000-of-100001.rec", "val-0-of-1.rec"):
        (tmp_path / name).write_text("")
    (tmp_path / ".val-100000-of-100001.rec.tmp").write_text("")
    with OutFolder(tmp_path) as folder:
        assert folder.holdings() == ["val-00000-of-00001.rec", "val-100000-of-100001.rec"]
    assert ".val-100000-of-100001.rec.tmp" not in names(tmp_path)


def test_folder_with_an_impossible_name(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="xxx: File name too long"),
        OutFolder(tmp_path / ("x" * 300)),
    ):
        pass


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
