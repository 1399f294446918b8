"""tools/make_rec.py run again after an end: finished shards stay, what changed is packed again."""

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.packing.packs import (
    hashes,
    identities,
    image_tree,
    names,
    pack,
    read_split,
    refuse,
    run,
)

from tests.packing.stopped_packs import SLOW, SlowPack, make_slow_tree

Identity = dict[str, tuple[int, int]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def common(tree: Path) -> tuple[object, ...]:
    return ("--src", tree / "train", "--labeled", 6, "--shards", 4)


def shard_of(key: str, fresh: Path) -> str:
    """Return the shard of a finished pack that holds an image."""
    (row,) = [row for row in read_split(fresh, "train") if row[2] == key]
    for path in sorted(fresh.glob("train-*.idx")):
        if any(line.startswith(f"{row[0]}\t") for line in path.read_text().splitlines()):
            return f"{path.stem}.rec"
    raise AssertionError(f"{key} is in no shard")


@pytest.fixture
def stopped(tree: Path, tmp_path: Path) -> tuple[Path, str, Identity]:
    """A pack of which all but one shard are finished: an image was damaged, and is mended now."""
    image, out = tree / "train" / "bee" / "3.jpg", tmp_path / "out"
    fresh = pack(*common(tree), out=tmp_path / "fresh")
    content = image.read_bytes()
    image.write_bytes(b"words" + bytes(len(content) - 5))
    assert "bee/3.jpg: neither JPEG" in refuse(*common(tree), "--out", out, status=4)
    image.write_bytes(content)
    kept = identities((out / ".pack").glob("*.rec"))
    missing = shard_of("bee/3.jpg", fresh)
    assert set(kept) == {path.name for path in fresh.glob("*.rec")} - {missing}
    return out, missing, kept


def packed_again(out: Path, kept: Identity) -> set[str]:
    now = identities(out.glob("*.rec"))
    return {name for name in now if now[name] != kept.get(name)}


def test_finished_shards_stay(
    stopped: tuple[Path, str, Identity], tree: Path, tmp_path: Path
) -> None:
    out, missing, kept = stopped
    assert names(out) == {".lock", ".pack"}
    done = run("pack", *common(tree), "--out", out)
    assert done.stderr == ""
    assert packed_again(out, kept) == {missing}
    assert hashes(out) == hashes(pack(*common(tree), "--force", out=tmp_path / "fresh"))


def test_damaged_shards_are_packed_again(
    stopped: tuple[Path, str, Identity], tree: Path, tmp_path: Path
) -> None:
    out, missing, kept = stopped
    first, second = sorted(kept)[:2]
    flipped = bytearray((out / ".pack" / first).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (out / ".pack" / first).write_bytes(flipped)
    (out / ".pack" / f"{second}.done").write_bytes(b"PK\3\4 damaged")
    run("pack", *common(tree), "--out", out)
    assert packed_again(out, kept) == {first, second, missing}
    assert hashes(out) == hashes(pack(*common(tree), "--force", out=tmp_path / "fresh"))


def test_other_options_lose_nothing_unasked(
    stopped: tuple[Path, str, Identity], tree: Path, tmp_path: Path
) -> None:
    out, missing, kept = stopped
    other = ("--src", tree / "train", "--labeled", 6, "--shards", 2, "--quality", 80)
    line = refuse(*other, "--out", out, status=3)
    assert (
        "holds an unfinished pack with other options (shards was 4, now 2, quality was 90, " in line
    )
    assert "3 of its 3 finished shards would be lost; go on with those, choose another" in line
    assert identities((out / ".pack").glob("*.rec")) == kept
    # Another draw and another way to treat bad images change no shard.
    options = ("--src", tree / "train", "--labeled", 9, "--shards", 4, "--on-bad", "skip")
    done = run("pack", *options, "--out", out)
    assert done.stderr == ""
    assert packed_again(out, kept) == {missing}
    assert len(read_split(out, "train_label")) == 9
    assert hashes(out) == hashes(pack(*options, "--force", out=tmp_path / "fresh"))


def test_force_drops_shards_of_other_options(
    stopped: tuple[Path, str, Identity], tree: Path, tmp_path: Path
) -> None:
    out = stopped[0]
    other = ("--src", tree / "train", "--labeled", 6, "--shards", 2)
    run("pack", *other, "--out", out, "--force")
    assert hashes(out) == hashes(pack(*other, "--force", out=tmp_path / "fresh"))


def test_only_shards_with_changed_images_are_packed_again(
    stopped: tuple[Path, str, Identity], tree: Path, tmp_path: Path
) -> None:
    out, missing, kept = stopped
    image = next(
        path for path in (tree / "train" / "ant").iterdir()
        if shard_of(f"ant/{path.name}", tmp_path / "fresh") != missing
    )  # fmt: skip
    old = image.read_bytes()
    image.write_bytes(old[:-2] + b"  " + old[-2:])  # no longer by more than moves no shard's border
    changed = shard_of(f"ant/{image.name}", tmp_path / "fresh")
    done = run("pack", *common(tree), "--out", out)
    assert f"warning: 1 of 3 finished shards are packed again: {changed}" in done.stderr
    assert packed_again(out, kept) == {changed, missing}
    assert hashes(out) == hashes(pack(*common(tree), "--force", out=tmp_path / "fresh"))
    rows = {row[2]: row[3] for row in read_split(out, "train")}
    assert rows[f"ant/{image.name}"] == image.read_bytes()


def test_changed_archive_is_read_anew(tree: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "train.tar", tmp_path / "out"
    options = ("--src", archive, "--labeled", 6, "--shards", 4, "--out", out)
    (tree / "train" / "bee" / "3.jpg").write_bytes(b"words")
    subprocess.run(["tar", "-C", tree / "train", "-cf", archive, "."], check=True)
    refuse(*options, status=4)
    kept = identities((out / ".pack").glob("*.rec"))
    assert len(kept) == 3
    archive.write_bytes(archive.read_bytes())  # another time: any image may be another one
    done = run("pack", *options, status=4)
    assert "warning: 3 of 3 finished shards are packed again" in done.stderr
    now = identities((out / ".pack").glob("*.rec"))
    assert {name for name in now if now[name] != kept[name]} == set(kept)


@pytest.fixture(scope="module")
def slow_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slow_tree(tmp_path_factory.mktemp("slow") / "tree")


@pytest.fixture
def running(slow_tree: Path, tmp_path: Path) -> Iterator[SlowPack]:
    pack = SlowPack(("--src", slow_tree, *SLOW), tmp_path / "out")
    yield pack
    pack.kill()


def image_to_come(running: SlowPack, tree: Path) -> Path:
    """Return an image of a shard that is not begun."""
    query = """SELECT file, path FROM shards JOIN records ON records.id
               BETWEEN first_id AND first_id + shards.records - 1 ORDER BY shards.bytes"""
    with closing(sqlite3.connect(running.work / "records.sqlite")) as table:
        rows = table.execute(query).fetchall()
    begun = {path.name.partition(".")[0] for path in running.work.glob("train-*")}
    path: str = next(path for file, path in rows if Path(file).stem not in begun)
    return tree / path


def test_image_that_vanishes_meanwhile(running: SlowPack, slow_tree: Path, tmp_path: Path) -> None:
    image = image_to_come(running, slow_tree)
    aside = image.rename(tmp_path / "aside.jpg")
    (line,) = running.wait()
    aside.rename(image)
    assert running.process.returncode == 4
    key = f"{image.parent.name}/{image.name}"
    reason = "No such file or directory; it was there when planned"
    assert line == f"make_rec: error: {key}: {image}: {reason}"
    out = tmp_path / "out"
    assert names(out) == {".lock", ".pack"}
    kept = identities(running.work / name for name in running.done())
    run("pack", "--src", slow_tree, *SLOW, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert hashes(out) == hashes(pack("--src", slow_tree, *SLOW, "-j", 2, out=tmp_path / "fresh"))


def test_image_that_changes_meanwhile(running: SlowPack, slow_tree: Path, tmp_path: Path) -> None:
    image = image_to_come(running, slow_tree)
    changed = image.read_bytes().replace(f"{int(image.stem):08}".encode(), b"another ")
    image.write_bytes(changed)
    (line,) = running.wait()
    assert running.process.returncode == 4
    key = f"{image.parent.name}/{image.name}"
    assert line == (
        f"make_rec: error: {key}: {image} changed while it was being packed (or since it was "
        "planned); pack again"
    )
    out = tmp_path / "out"
    kept = identities(running.work / name for name in running.done())
    run("pack", "--src", slow_tree, *SLOW, "--out", out)
    assert kept.items() <= identities(out.glob("*.rec")).items()
    assert {row[2]: row[3] for row in read_split(out, "train")}[key] == changed
