"""The output folder never shows a half-written file or a mixture of two packs as complete."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mpl_fast.data.manifest import FORMAT, file_names
from mpl_fast.errors import OutputError
from mpl_fast.packing.publish.out_folder import OutFolder, open_out_folder

OLD = ["train-100000-of-200000.rec", "train_label.rec", "train_unlabel.rec", "val.rec"]
NEW = ["train-00000-of-00002.rec", "train-00001-of-00002.rec", "val.rec"]
OTHERS = ["classes.txt", "manifest.json", "records.sqlite", "train.idx", "train.lst"]
FOREIGN = [
    *("my_val.rec", "notes.txt", "old.rec", "test.rec", "train", "train-1-of-2.rec", "train.txt"),
    *("val.rec.gz", "vals.idx"),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def put(folder: OutFolder, shards: list[str], text: str) -> None:
    """Write a whole pack into the work folder, every file but the manifest with text in it."""
    split = {"idx": "train.idx", "idx_sha256": "", "lst": "train.lst", "lst_sha256": ""}
    stored = {
        "format": FORMAT,
        "text": text,
        "classes": {"sha256": ""},
        "shards": [{"file": name} for name in shards],
        "splits": {"train": split},
        "table": "records.sqlite",
        "table_sha256": "",
    }
    for name in file_names(stored):
        (folder.work / name).write_text(text)
    (folder.work / "manifest.json").write_text(json.dumps(stored))


def publish(root: Path, shards: list[str], text: str) -> None:
    with open_out_folder(root) as folder:
        put(folder, shards, text)
        folder.publish()


def require_whole(root: Path, shards: list[str], text: str) -> None:
    """Check that root holds this pack and nothing of another."""
    assert names(root) == sorted([*OTHERS, *shards])
    assert json.loads((root / "manifest.json").read_text())["text"] == text
    assert {(root / name).read_text() for name in names(root) if name != "manifest.json"} == {text}


def test_manifest_that_names_files_outside_is_not_published(tmp_path: Path) -> None:
    root = tmp_path / "rec"
    publish(root, OLD, "old")
    outside = tmp_path / "train.rec"
    outside.write_text("another's")
    message = r"manifest\.json: damaged, names \.\./\.\./train\.rec"
    with pytest.raises(OutputError, match=message), open_out_folder(root) as folder:
        put(folder, NEW, "new")
        manifest = folder.work / "manifest.json"
        manifest.write_text(manifest.read_text().replace(NEW[0], "../../train.rec"))
        folder.publish()
    assert outside.read_text() == "another's"
    assert (root / "manifest.json").exists()


def test_publish_replaces_the_old_pack_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path, OLD, "old")
    require_whole(tmp_path, OLD, "old")
    for name in FOREIGN:
        (tmp_path / name).write_text("the user's own")
    with open_out_folder(tmp_path) as folder:
        assert folder.pack_files() == sorted([*OTHERS, *OLD])
        put(folder, NEW, "new")
        folder.publish()
    for name in FOREIGN:
        assert (tmp_path / name).read_text() == "the user's own"
        (tmp_path / name).unlink()
    require_whole(tmp_path, NEW, "new")


def stop_at_rename(root: Path, number: int, patch: pytest.MonkeyPatch) -> None:
    """Publish a new pack over an old one; stop, as SIGKILL does, before the rename of a number."""
    publish(root, OLD, "old")
    original, calls = Path.replace, itertools.count()

    def replace(self: Path, target: Path) -> Path:
        if next(calls) == number:
            raise KeyError
        return original(self, target)

    with patch.context() as patched, pytest.raises(KeyError), open_out_folder(root) as folder:
        put(folder, NEW, "new")
        patched.setattr(Path, "replace", replace)
        folder.publish()


@pytest.mark.parametrize("number", range(8))
def test_publish_cut_short_is_finished_by_the_next_run(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_rename(tmp_path, number, monkeypatch)
    before = names(tmp_path)
    assert "manifest.json" not in before  # it looks unfinished
    refused = pytest.raises(OutputError, match=r"first run: make_rec.py finish /")
    with refused, open_out_folder(tmp_path, shared=True):  # as for a part
        pass
    assert names(tmp_path) == before
    with open_out_folder(tmp_path) as folder:
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert folder.pack_files() == sorted([*OTHERS, *NEW])
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    require_whole(tmp_path, NEW, "new")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_within_publish_comes_too_late(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def stop_and_replace(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), number)
        return original(self, target)

    stopped: list[int] = []
    before = signal.signal(number, lambda number, frame: stopped.append(number))
    try:
        with open_out_folder(tmp_path) as folder:
            put(folder, NEW, "new")
            os.kill(os.getpid(), number)
            assert stopped == [number]
            monkeypatch.setattr(Path, "replace", stop_and_replace)
            folder.publish()
            os.kill(os.getpid(), number)  # up to the end
        assert stopped == [number]
        require_whole(tmp_path, NEW, "new")
        os.kill(os.getpid(), number)
        assert stopped == [number, number]  # and afterwards it is handled again
    finally:
        signal.signal(number, before)


def test_error_keeps_finished_shards_and_nothing_else(tmp_path: Path) -> None:
    kept = ["a.rec", "a.rec.done", "records.sqlite", "spool-1.images", "spool-2.tar"]
    gone = ["b.rec", "b.rec.tmp", "plan.new", "plan.new.found", "train.idx", "spool-2.tar.tmp"]
    gone += ["part-1-of-2.lock", "classes.txt"]
    with pytest.raises(KeyError), open_out_folder(tmp_path) as folder:
        for name in (*kept, *gone):
            (folder.work / name).write_text(name)
        raise KeyError
    assert names(tmp_path) == [".pack"]
    assert names(tmp_path / ".pack") == sorted(kept)
    with open_out_folder(tmp_path) as folder:
        assert folder.finished() == ["a.rec"]
        assert (folder.work / "a.rec").read_text() == "a.rec"
        folder.clear_work()
        assert folder.finished() == names(folder.work) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize(("there", "extra"), [(True, []), (False, []), (False, ["notes.txt"])])
def test_failure_removes_only_a_new_folder(tmp_path: Path, there: bool, extra: list[str]) -> None:
    root = tmp_path / "some" / "out"
    if there:
        root.mkdir(parents=True)
    with pytest.raises(KeyError), open_out_folder(root) as folder:
        (folder.work / "val.rec").write_text("half")
        for name in extra:
            (root / name).write_text("the user's own")
        raise KeyError
    assert root.exists() == (there or bool(extra))
    if root.exists():
        assert names(root) == extra


def test_part_leaves_the_work_of_others(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_out_folder(tmp_path / "out", shared=True) as folder:
        (folder.work / "b.rec.tmp").write_text("of another part")
        raise KeyError
    assert names(tmp_path / "out" / ".pack") == ["b.rec.tmp"]


def test_lock_of_a_name(tmp_path: Path) -> None:
    with (
        open_out_folder(tmp_path, shared=True) as one,
        open_out_folder(tmp_path, shared=True) as other,
    ):
        with one.locked("part-1-of-2", "busy"):
            with (
                pytest.raises(OutputError, match=f"^{tmp_path}: it is busy$"),
                other.locked("part-1-of-2", "it is busy"),
            ):
                pass
            with other.locked("part-2-of-2", "busy"), other.locked("plan"):
                pass
        with other.locked("part-1-of-2", "busy"):
            pass


def test_space(tmp_path: Path) -> None:
    with open_out_folder(tmp_path) as folder:
        folder.require_space(1)
        with pytest.raises(OutputError, match=r"1152921504.61 GB needed, .* GB free"):
            folder.require_space(1 << 60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text(""), "File exists"),
        (lambda path: (path.mkdir(), (path / ".lock").mkdir()), "Is a directory"),
        (lambda path: (path.mkdir(), (path / ".pack").write_text("")), "File exists"),
    ],
)
def test_folder_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=f"out.*: {message}"), open_out_folder(tmp_path / "out"):
        pass
