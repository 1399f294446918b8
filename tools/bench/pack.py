"""Measures packing against a plain copy, tar, webdataset, mosaicml-streaming and MXNet's im2rec.

`python -m tools.bench.pack_peers FOLDER` installs the peers; `--peers FOLDER` then measures them
too. All variants pack the same images from a warm page cache, and each run ends when its files are
on the disk. What each wrote is read back and counted: one that lost or changed an image fails.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from tools.bench import pack_data
from tools.bench.clock import interleaved
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import ROOT, output_of
from tools.bench.pack_peers import versions
from tools.bench.pack_readers import Counts, read_folders, tally
from tools.bench.pack_rows import rows
from tools.bench.pack_variants import (
    GROUPS,
    NUMBER,
    OUT,
    PEERS,
    Setting,
    Variant,
    all_variants,
    difference,
    im2rec_tool,
    pack_command,
)
from tools.bench.results import Json, last_line

TINY = {"rounds": 1, "gigabytes": 0.0005, "large_images": 20, "rows": 2000}
RUNNER = ROOT / "tools" / "bench" / "pack_run.py"
PHOTOGRAPH = 110_000  # bytes, about
INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`; 130 when interrupted, and then nothing is left on the disk."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run("pack", __doc__, arguments, measure, options, rounds=5, tiny=TINY)
    except KeyboardInterrupt:
        print("tools.bench pack: interrupted, the temporary data is removed", file=sys.stderr)
        return INTERRUPTED


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    add("--peers", type=Path, metavar="FOLDER", help="where pack_peers has installed them")
    add("--images", type=Path, metavar="TAR", help="archive of JPEG photographs, needed")
    add("--work", type=Path, default=Path("runs"), help="folder on the disk to measure (runs)")
    add("--gigabytes", type=float, default=2.0, metavar="X", help="to pack unchanged (%(default)s)")
    large = "to pack with short side 480 (%(default)s)"
    add("--large-images", type=at_least(1), default=2000, metavar="N", help=large)
    listed = "images in the tar that is listed (%(default)s)"
    add("--rows", type=at_least(1), default=1281167, metavar="N", help=listed)
    add("--only", default="*", metavar="NAME,...", help="variants, such as copy,ours-*")


def measure(options: argparse.Namespace, report: Report) -> None:
    """In a new folder in `--work`, which is removed."""
    if not options.smoke and not (options.images and options.images.is_file()):
        raise ConfigError("--images: give a tar file with JPEG photographs; --smoke makes some")
    with output_errors(options.work):
        options.work.mkdir(parents=True, exist_ok=True)
    require_space(options)
    found = versions(options.peers) if options.peers else {}
    report.claim = (
        f"median of at most {options.rounds} interleaved rounds; whole commands with their start, "
        "but copy, codecs, webdataset and mds without start, import and listing, and im2rec "
        "without making its list; warm page cache, synced to the disk within the time; MB are 10^6 "
        "bytes of images read, memory is that of the largest process with shared pages"
    )
    missing = [name for name, package in PEERS.items() if package not in found]
    report.skipped += [f"{name}: not installed, see tools.bench.pack_peers" for name in missing]
    with tempfile.TemporaryDirectory(prefix=".bench_pack_", dir=options.work) as folder:
        setting = Setting(options, Path(folder).resolve(), found, {})
        chosen = choose(all_variants(setting), options.only)
        make_data(setting, chosen)
        runs = measure_all(setting, chosen, report)
    report.more["data"] = {name: counts._asdict() for name, counts in setting.data.items()}
    report.more["variants"] = [described(setting, one) | {"runs": runs[one.name]} for one in chosen]
    report.more |= {"peers": found, "disk": describe_disk(options.work)}
    right = [one for one in chosen if one.name not in report.failed]
    report.add(rows(right, runs, setting.data))


def require_space(options: argparse.Namespace) -> None:
    """Raises `OutputError` if the data sets, a pack of each and one output would fill the disk."""
    need = 3.3e9 * options.gigabytes + 2e6 * options.large_images + 3e3 * options.rows
    free = shutil.disk_usage(options.work).free
    if free < need:
        raise OutputError(f"{options.work}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def choose(variants: Sequence[Variant], only: str) -> list[Variant]:
    """Those whose names match one of the patterns. Raises `ConfigError` if there are none."""
    patterns = only.split(",")
    found = [one for one in variants if any(fnmatch.fnmatch(one.name, p) for p in patterns)]
    if not found:
        raise ConfigError(f"--only {only}: there are {', '.join(one.name for one in variants)}")
    return found


def make_data(setting: Setting, chosen: Sequence[Variant]) -> None:
    """The data sets that the chosen variants need."""
    options, folder, data = setting.options, setting.folder, setting.data
    archive, images = options.images, folder / "images"
    groups, tar = {one.group for one in chosen}, folder / "members.tar"
    print_progress("making the data sets")
    if groups & {"pass", "verify"}:
        size = round(options.gigabytes * 1e9)
        pack_data.make_folders(archive, images, size)
        data["images"] = tally(read_folders(images))
    if "short" in groups:
        pack_data.make_mosaics(archive, folder / "large", options.large_images)
        data["large"] = tally(read_folders(folder / "large"))
    if "photos" in groups:
        size = options.large_images * PHOTOGRAPH
        pack_data.make_folders(archive, folder / "photographs", size)
        data["photographs"] = tally(read_folders(folder / "photographs"))
    if "verify" in groups:
        call(setting, pack_command(images, folder / "pack", "--check", "none"))
    if "plan" in groups:
        pack_data.make_members(tar, options.rows)
        data["members"] = Counts(options.rows, 0, 0, (0, 0))
    if any(one.name == "resplit" for one in chosen):
        call(setting, pack_command(tar, folder / "members.pack", "--check", "none"))
    for listed in {one.given for one in chosen if one.given}:
        listed.mkdir()
        source = listed.with_suffix("")
        call(setting, [*im2rec_tool(setting), listed / "train", source, "--list", "--recursive"])


def measure_all(
    setting: Setting, chosen: Sequence[Variant], report: Report
) -> dict[str, list[Json]]:
    """The runs of every variant, by name; one that is wrong is not run again."""
    done: dict[str, list[Json]] = {one.name: [] for one in chosen}

    def timer(one: Variant) -> None:
        if one.name in report.failed:
            return
        number = len(done[one.name]) + 1
        print_progress(f"{number}/{setting.options.rounds}: {one.name}")
        out = fresh_folder(setting, one)
        # Each time anew: a virtual machine's host may take unused pages back within a minute.
        for name in GROUPS[one.group].read:
            read_all(setting.folder / name)
        taken, printed = execute(filled(one.command, out, number), out)
        if not taken["code"] and one.own_clock:
            taken |= json.loads(last_line(printed))
        done[one.name].append(taken)
        if wrong := last_line(printed) if taken["code"] else difference(setting, one, out, printed):
            report.fail(one.name, wrong)

    options = setting.options
    interleaved(
        {one.name: one for one in chosen},
        timer,
        rounds=options.rounds,
        warmup=0,
        seed=options.seed,
        seconds=report.seconds_left(),
    )
    return done


def execute(command: Sequence[str], out: Path) -> tuple[Json, str]:
    """Runs a command until its output is on the disk; returns what pack_run.py found, and the log.

    `seconds` are `wall`, unless the command prints its own. `inside`, where our manifest has it, is
    without the command's start.
    """
    with tempfile.NamedTemporaryFile() as log:
        runner = subprocess.Popen(
            [sys.executable, "-I", "-S", RUNNER, out, log.name, *command],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            found: Json = json.loads(runner.communicate()[0])
        except BaseException:
            end(runner)
            raise
        printed = log.read().decode(errors="replace")
    found["seconds"] = found["wall"]
    manifest = out / "manifest.json"
    if manifest.exists():
        found["inside"] = json.loads(manifest.read_text())["totals"]["seconds"]
    return found, printed


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a command and its workers; the workers of some would wait for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):  # until the last is gone, and with it what it writes
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def call(setting: Setting, command: Sequence[Any]) -> None:
    """Runs a command that is not measured. Raises `UserError` if it fails."""
    found, printed = execute(filled(command, setting.folder, 0), setting.folder / "out")
    if found["code"]:
        raise UserError(f"{' '.join(map(str, command))}: {last_line(printed)}")


def fresh_folder(setting: Setting, variant: Variant) -> Path:
    """An empty output folder; nothing is left for the disk to write from the run before."""
    out = setting.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in variant.given.iterdir() if variant.given else ():
        shutil.copy(file, out)
    os.sync()
    return out


def read_all(root: Path) -> None:
    """Brings a file, or all of a folder, into the page cache."""
    buffer = memoryview(bytearray(1 << 20))
    for path in (root, *root.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def filled(command: Sequence[Any], out: Path, number: int) -> list[str]:
    """A command with its output folder and its number."""
    return [str(part).replace(OUT, str(out)).replace(NUMBER, str(number)) for part in command]


def described(setting: Setting, variant: Variant) -> Json:
    """Name, group and command, without the folders of this machine."""
    shown = " ".join(map(str, variant.command))
    places = [(sys.executable, "python"), (setting.folder, "WORK"), (f"{ROOT}/", "")]
    if setting.options.peers:
        places.append((setting.options.peers, "PEERS"))
    for place, name in places:
        shown = shown.replace(str(place), name)
    return {"name": variant.name, "group": variant.group, "command": shown}


def describe_disk(folder: Path) -> Json:
    """The file system of a folder, and what else packing depends on."""
    return {
        "filesystem": output_of("df", "--output=fstype", str(folder)).split("\n")[-1],
        "kernel": platform.release().partition("-")[0],
        "tar": output_of("tar", "--version").split("\n")[0],
    }


def print_progress(line: str) -> None:
    """On stderr."""
    print(f"tools.bench pack: {line}", file=sys.stderr, flush=True)
