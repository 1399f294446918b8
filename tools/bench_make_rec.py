"""Measures packing against a plain copy, tar, webdataset, mosaicml-streaming and MXNet's im2rec.

`--prepare FOLDER` installs the peers, each in an environment of its own; `--peers FOLDER` then
measures them too. All contestants run one after the other, then all again (`--repetitions`), on the
same images in a warm page cache. Every run ends when its files are on the disk. What each wrote is
read back and counted: a contestant that lost or changed an image is marked as wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

from tools.bench_rec import images
from tools.bench_rec.apart import apart
from tools.bench_rec.contestants import (
    NUMBER,
    OUT,
    PEERS,
    SHORT_SIDE,
    TOOLS,
    Bench,
    Contestant,
    all_contestants,
    im2rec_tool,
    pack_command,
)
from tools.bench_rec.counts import Counts, count_folders
from tools.bench_rec.machine import describe_machine
from tools.bench_rec.peers import prepare, versions
from tools.bench_rec.report import markdown, table

FULL = {"repetitions": 5, "gigabytes": 2.0, "large_images": 2000, "rows": 1281167}
QUICK = {"repetitions": 1, "gigabytes": 0.05, "large_images": 200, "rows": 20000}
WATCHED = ("ours-none-j2", "ours-decode-j2", f"ours-{SHORT_SIDE}-j2")  # their memory is looked at
PHOTOGRAPH = 110_000  # bytes, about
# What the contestants of a group read.
READ = {"pass": ["images"], "short": ["large"], "photos": ["photographs"], "verify": ["pack"]}
READ |= {"plan": ["members.tar", "members.pack"], "start": []}
INTERRUPTED = 130
Json = dict[str, Any]


def main() -> int:
    """Return 1 when a contestant failed or wrote something wrong."""
    options = _options()
    if options.prepare:
        prepare(options.prepare)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.work.mkdir(parents=True, exist_ok=True)
    _require_space(options)
    found = versions(options.peers) if options.peers else {}
    try:
        with tempfile.TemporaryDirectory(prefix="bench_make_rec.", dir=options.work) as folder:
            result = measure_all(Bench(options, Path(folder).resolve(), found, {}))
    except KeyboardInterrupt:
        _say("interrupted, the temporary data is removed")
        return INTERRUPTED
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(result))
    print(table(result))
    return int(any(row["wrong"] for row in result["rows"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--prepare", type=Path, metavar="FOLDER", help="install the peers there, and end")
    add("--peers", type=Path, metavar="FOLDER", help="where --prepare has installed them")
    add("--images", type=Path, metavar="TAR", help="archive of photographs (JPEG), needed")
    add("--work", type=Path, default=Path("runs"), help="folder on the disk to measure (runs)")
    add("--out", type=Path, default=Path("runs/bench_make_rec.json"), help="JSON file")
    add("--markdown", type=Path, metavar="FILE", help="write the table for docs/ there, too")
    add("--quick", action="store_true", help="a look whether all works: small data, once")
    add("--repetitions", type=int, metavar="N", help="of every contestant (5)")
    add("--gigabytes", type=float, metavar="X", help="of images to pack as they are (2)")
    add("--large-images", type=int, metavar="N", help="to pack with short side 480 (2000)")
    add("--rows", type=int, metavar="N", help="images in the tar that is listed (1281167)")
    add("--classes", type=int, default=100, metavar="N", help="class folders (100)")
    add("--im2rec-threads", default="1,2,4", metavar="N,...", help="that it is tried with (1,2,4)")
    add("--only", default="*", metavar="NAME,...", help="contestants, such as copy,ours-*")
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.prepare and not (options.images and options.images.is_file()):
        parser.error("--images: give a tar file with JPEG photographs")
    return options


def _require_space(options: argparse.Namespace) -> None:
    """End when the disk is too small for the data sets, a pack of each and one output."""
    need = 3.3e9 * options.gigabytes + 2e6 * options.large_images + 3e3 * options.rows
    free = shutil.disk_usage(options.work).free
    if free < need:
        where = f"bench_make_rec: {options.work}"
        raise SystemExit(f"{where}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def measure_all(bench: Bench) -> Json:
    """Make the data sets, run every contestant as often as asked; return what the JSON holds."""
    patterns, repetitions = bench.options.only.split(","), bench.options.repetitions
    everyone = all_contestants(bench)
    chosen = [c for c in everyone if any(fnmatch.fnmatch(c.name, one) for one in patterns)]
    if not chosen:
        raise SystemExit(f"bench_make_rec: --only {bench.options.only}: nobody has such a name")
    make_data(bench, chosen)
    rows = [_row(bench, contestant) for contestant in chosen]
    for number in range(1, repetitions + 1):
        for contestant, row in zip(chosen, rows, strict=True):
            if not row["wrong"]:
                _say(f"{number}/{repetitions}: {contestant.name}")
                measure(bench, contestant, number, row)
    for contestant, row in zip(chosen, rows, strict=True):
        if contestant.name in WATCHED and not row["wrong"]:
            _say(f"memory: {contestant.name}")
            row["memory"] = watch(bench, contestant)
    settings = (*FULL, "classes", "only")
    return {
        "machine": describe_machine(bench.folder),
        "peers": bench.versions,
        "left_out": [name for name, package in PEERS.items() if package not in bench.versions],
        "settings": {name: getattr(bench.options, name) for name in settings},
        "data": {name: counts._asdict() for name, counts in bench.data.items()},
        "rows": rows,
    }


def make_data(bench: Bench, chosen: list[Contestant]) -> None:
    """Make the data sets that the chosen contestants need."""
    options, folder = bench.options, bench.folder
    groups, tar = {c.group for c in chosen}, bench.folder / "members.tar"
    if groups & {"pass", "verify"}:
        _say("making the images")
        size = round(options.gigabytes * 1e9)
        apart(images.make_folders, options.images, folder / "images", size, options.classes)
        bench.data["images"] = apart(count_folders, folder / "images")
    if "short" in groups:
        _say("making the large images")
        amount, classes = options.large_images, options.classes
        apart(images.make_mosaics, options.images, folder / "large", amount, classes)
        bench.data["large"] = apart(count_folders, folder / "large")
    if "photos" in groups:
        size = options.large_images * PHOTOGRAPH
        apart(images.make_folders, options.images, folder / "photographs", size, options.classes)
        bench.data["photographs"] = apart(count_folders, folder / "photographs")
    if "verify" in groups:
        _call(bench, pack_command(folder / "images", folder / "pack", "--check", "none"))
    if "plan" in groups:
        _say("making the tar of many members")
        apart(images.make_members, tar, options.rows)
        bench.data["members"] = Counts(options.rows, 0, 0, (0, 0))
    if any(c.name == "resplit" for c in chosen):
        _call(bench, pack_command(tar, folder / "members.pack", "--check", "none"))
    for listed in {c.given for c in chosen if c.given}:
        listed.mkdir()
        source = listed.with_suffix("")
        _call(bench, [*im2rec_tool(bench), listed / "train", source, "--list", "--recursive"])


def measure(bench: Bench, contestant: Contestant, number: int, row: Json) -> None:
    """Run a contestant once, from a quiet disk and a warm cache, and add the run to its row."""
    out = _fresh_folder(bench, contestant)
    # Each time anew: a virtual machine's host may take unused pages back within a minute.
    for name in READ[contestant.group]:
        _read_all(bench.folder / name)
    run, exit_code, printed = execute(_filled(contestant.command, out, number), out)
    row["runs"].append(run)
    row["wrong"] = _last_line(printed) if exit_code else contestant.check(out, printed)
    if row["wrong"]:
        _say(f"WRONG: {contestant.name}: {row['wrong']}")


def watch(bench: Bench, contestant: Contestant) -> Json:
    """Return the peak memory of a contestant's process and of its largest worker, in MiB."""
    out = _fresh_folder(bench, contestant)
    watcher = [sys.executable, str(TOOLS / "bench_rec" / "watch.py")]
    _, exit_code, printed = execute([*watcher, *_filled(contestant.command, out, 0)], out)
    memory: Json = {} if exit_code else json.loads(_last_line(printed))
    return memory


def execute(command: list[str], out: Path) -> tuple[Json, int, str]:
    """Run a command until its output is on the disk; return the run, exit code and its words.

    The run's `seconds` are `wall`, unless the command prints its own. `inside`, where it is known,
    is without the command's start: from our manifest, or printed.
    """
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            for path in sorted(out.rglob("*")):
                _sync(path)
        except BaseException:
            _end(process)
            raise
        wall = time.perf_counter() - began
        log.seek(0)
        printed = log.read().decode(errors="replace")
    run = {
        "seconds": wall,
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,  # of the largest process
    }
    manifest = out / "manifest.json"
    if manifest.exists():
        run["inside"] = json.loads(manifest.read_text())["totals"]["seconds"]
    if command[1].endswith("write.py") and not process.returncode:
        run |= json.loads(_last_line(printed))
    return run, process.returncode, printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and its workers; the workers of some would wait for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):  # until the last is gone, and with it what it writes
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def _row(bench: Bench, contestant: Contestant) -> Json:
    """Return a row without runs; the command is shown without the folders of this machine."""
    shown = " ".join(map(str, contestant.command))
    places = [(sys.executable, "python"), (bench.folder, "WORK"), (f"{TOOLS.parent}/", "")]
    if bench.options.peers:
        places.append((bench.options.peers, "PEERS"))
    for place, name in places:
        shown = shown.replace(str(place), name)
    return {
        "name": contestant.name,
        "group": contestant.group,
        "command": shown,
        "wrong": "",
        "runs": [],
    }


def _fresh_folder(bench: Bench, contestant: Contestant) -> Path:
    """Return an empty output folder; nothing is left for the disk to write from the run before."""
    out = bench.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in contestant.given.iterdir() if contestant.given else ():
        shutil.copy(file, out)
    os.sync()
    return out


def _filled(command: list[Any], out: Path, number: int) -> list[str]:
    return [str(part).replace(OUT, str(out)).replace(NUMBER, str(number)) for part in command]


def _call(bench: Bench, command: list[Any]) -> None:
    """Run a command that is not measured; end when it fails."""
    _, exit_code, printed = execute(_filled(command, bench.folder, 0), bench.folder / "out")
    if exit_code:
        raise SystemExit(f"bench_make_rec: {' '.join(map(str, command))}: {_last_line(printed)}")


def _last_line(printed: str) -> str:
    return (printed.strip().splitlines() or ["no word"])[-1]


def _read_all(root: Path) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for path in (root, *root.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    print(f"bench_make_rec: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
