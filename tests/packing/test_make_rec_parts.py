"""Several make_rec.py that pack parts of one folder, then `finish`: the bytes of a single run."""

import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.packing.packs import (
    command_line,
    environment,
    hashes,
    identities,
    jpeg,
    image_tree,
    manifest_of,
    names,
    pack,
    read_split,
    refuse,
    run,
)

from tests.packing.stopped_packs import run_meddled


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def start(*arguments: object) -> subprocess.Popen[str]:
    line, pipe = command_line(*arguments), subprocess.PIPE
    return subprocess.Popen(line, env=environment(), stdout=pipe, stderr=pipe, text=True)


def archive_of(tree: Path) -> tuple[Any, ...]:
    """Compress the tree; return options that pack it into 3 + 3 shards."""
    archive = tree.parent / "all.tar.gz"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "train", "val"], check=True)
    return ("--src", f"{archive}:train", "--val", f"{archive}:val", "--labeled", 6, "--shards", 3)


def test_parts_are_the_pack(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    fresh = pack(*common, out=tmp_path / "fresh")
    done = run("pack", *common, "--part", "2/2", "--out", out)
    assert done.stdout.splitlines() == [
        "part 2/2: 3 shards are written", "3 shards of other parts are missing"]  # fmt: skip
    assert names(out) == {".lock", ".pack"}
    line = refuse(out, command="finish", status=4)
    assert line.endswith(
        "3 shards of the plan are not there: train-00000-of-00003.rec, "
        "train-00002-of-00003.rec, val-00001-of-00003.rec; pack them (every part), then finish"
    )
    line = refuse(*common[:-1], 2, "--part", "1/2", "--out", out, status=3)
    assert "the parts of this pack have other options (shards was 3, now 2)" in line
    kept = identities((out / ".pack").glob("*.rec"))
    assert len(kept) == 3
    told = json.loads(run("pack", *common, "--part", "2/2", "--json", "--out", out).stdout)
    assert (told["part"], set(told["shards"])) == ("2/2", set(kept))
    assert len(told["shards_missing"]) == 3
    done = run("pack", *common, "--part", "1/2", "--out", out)
    assert done.stdout.endswith(f"every shard is there; now: make_rec.py finish {out}\n")
    assert done.stderr == ""  # the archive was unpacked once
    stored = json.loads(run("finish", out, "--json").stdout)
    assert stored == manifest_of(out)
    assert hashes(out) == hashes(fresh)
    now = identities(out.glob("*.rec"))
    assert {name: now[name] for name in kept} == kept
    before = identities(out.iterdir())
    assert json.loads(run("finish", out, "--json").stdout) == {"already_complete": True, **stored}
    assert "already complete" in run("pack", *common, "--part", "1/2", "--out", out).stdout
    line = refuse(*common[:-1], 4, "--part", "1/2", "--out", out, status=3)
    assert "holds a finished pack; choose another --out, or --force" in line
    assert identities(path for path in out.iterdir() if path.name in before) == before


def test_parts_at_the_same_time(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    # 6 shards in 8 parts: two have nothing to do.
    parts = [
        subprocess.Popen(
            command_line("pack", *common, "--part", f"{number}/8", "-j", 1, "--out", out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for number in (1, 2, 3, 4, 5, 6, 7, 8)
    ]
    errors = [part.communicate(timeout=60)[1] for part in parts]
    assert [part.returncode for part in parts] == [0] * 8, errors
    assert sum("unpacking" in text for text in errors) == 1
    assert run("finish", out).stdout.splitlines()[1] == "labeled: 6 records, 2 a class, 3 shards"
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


def test_part_that_is_busy_or_damaged(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    for part in ("1/2", "2/2"):
        run("pack", *common, "--part", part, "--out", out)
    work = out / ".pack"
    with (work / "part-1-of-2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refuse(*common, "--part", "1/2", "--out", out, status=3)
    assert "part 1/2 is being packed by another make_rec" in line
    kept = identities(work.glob("*.rec"))
    shard = work / "train-00000-of-00003.rec"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (work / "train-00002-of-00003.rec.done").write_bytes(b"PK\3\4")
    assert "train-00002-of-00003.rec" in refuse(out, command="finish", status=4)
    run("pack", *common, "--part", "1/2", "--out", out)
    now = identities(work.glob("*.rec"))
    assert {name for name in now if now[name] != kept[name]} == {
        "train-00000-of-00003.rec", "train-00002-of-00003.rec"}  # fmt: skip
    run("finish", out)
    assert hashes(out) == hashes(pack(*common, out=tmp_path / "fresh"))


@pytest.mark.parametrize("remedy", ["mend", "remove", "skip"])
def test_part_with_a_bad_image_has_a_way_out(tree: Path, tmp_path: Path, remedy: str) -> None:
    out, image = tmp_path / "out", tree / "train" / "bee" / "3.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:100])
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 4, "--out", out)
    failed = []
    for part in ("1/2", "2/2"):
        process = start("pack", *common, "--part", part)
        told = process.communicate(timeout=60)[1]
        if process.returncode:
            failed.append(part)
            line = told.splitlines()[-1]
            assert process.returncode == 4
            assert "bee/3.jpg" in line
            assert "run this part with --force" in line
    assert len(failed) == 1
    more: tuple[object, ...] = ("--on-bad", "skip") if remedy == "skip" else ()
    if remedy == "mend":
        image.write_bytes(content)
    elif remedy == "remove":
        image.unlink()
    run("pack", *common, *more, "--part", failed[0], "--force")
    if remedy != "skip":  # sizes are others, so are the borders of shards
        run("pack", *common, "--part", "1/2")
        run("pack", *common, "--part", "2/2")
    run("finish", out)
    fresh = pack(*common[:-2], *more, out=tmp_path / "fresh")
    assert hashes(out) == hashes(fresh)


def test_parts_of_another_number_wait_for_each_other(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 4, "--out", out)
    running = [start("pack", *common, "--part", part) for part in ("1/1", "1/2", "2/2", "1/3")]
    for process in running:
        assert process.wait(timeout=60) == 0, process.communicate()[1]
    run("finish", out)
    assert hashes(out) == hashes(pack(*common[:-2], out=tmp_path / "fresh"))


def test_finish_refuses_what_was_skipped_by_another_wish(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tree / "train" / "bee" / "3.jpg").write_bytes(b"words")
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 2, "--out", out)
    run("pack", *common, "--on-bad", "skip", "--part", "1/1")
    refuse(*common, status=4)
    line = refuse(out, command="finish", status=4)
    assert "with --on-bad skip lack 1 images: " in line
    assert "bee/3.jpg" in line
    assert not (out / "manifest.json").exists()


def test_finish_that_is_stopped_goes_on(tree: Path, tmp_path: Path) -> None:
    common, out = archive_of(tree), tmp_path / "out"
    fresh = pack(*common, out=tmp_path / "fresh")
    for part in ("1/2", "2/2"):
        run("pack", *common, "--part", part, "--out", out)
    done = run_meddled("full", "val.lst", "finish", out)
    assert (done.returncode, names(out)) == (3, {".lock", ".pack"})
    assert done.stderr == f"make_rec: error: {out}: No space left on device\n"
    run("pack", *common, "--part", "1/2", "--out", out)  # every shard is kept
    done = run_meddled("SIGKILL", 3, "finish", out)
    assert "manifest.json" not in names(out)
    line = refuse(*common, "--part", "1/2", "--out", out, "--force", status=3)
    assert f"first run: make_rec.py finish {out}" in line
    run("finish", out)
    assert hashes(out) == hashes(fresh)


def test_source_that_changes_between_the_parts(tree: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "out", tree / "train" / "bee" / "3.jpg"
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 2, "--out", out)
    run("pack", *common, "--part", "1/2")
    kept = identities((out / ".pack").glob("*.rec"))
    in_second = "bee/3.jpg" in {row[2] for row in rows_of_second(tree, tmp_path)}
    image.write_bytes(jpeg(1, 12))
    part = "2/2" if in_second else "1/2"
    if in_second:
        line = refuse(*common, "--part", part, status=4)
        assert f"bee/3.jpg: {image} changed" in line
    # A run over all plans anew, and keeps what is the same.
    run("pack", *common)
    rows = {row[2]: row[3] for row in read_split(out, "train")}
    assert rows["bee/3.jpg"] == jpeg(1, 12)
    now = identities(out.glob("*.rec"))
    assert (now["train-00000-of-00002.rec"] == kept["train-00000-of-00002.rec"]) == in_second


def rows_of_second(tree: Path, tmp_path: Path) -> list[tuple[int, float, str, bytes]]:
    common = ("--src", tree / "train", "--labeled", 6, "--shards", 2)
    rows = read_split(pack(*common, out=tmp_path / "fresh"), "train")
    return rows[manifest_of(tmp_path / "fresh")["shards"][1]["first_id"] :]
