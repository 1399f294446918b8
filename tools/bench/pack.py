"""Measures packing against a plain copy, tar, webdataset, mosaicml-streaming and MXNet's im2rec.

`python -m tools.bench.pack_peers FOLDER` installs the peers; `--peers FOLDER` then measures them
too. All variants pack the same images from a warm page cache, and each run ends when its files are
on the disk. What each wrote is read back: one that lost or changed an image fails.
"""

import argparse
import contextlib
import fnmatch
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from mpl_fast.untrusted import json_value
from tools.bench import limits, pack_files
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import ROOT, output_of
from tools.bench.pack_files import Data
from tools.bench.results import Json, Row, last_line, ratios, spread

TINY = {"rounds": 1, "gigabytes": 0.0005, "large_images": 20, "rows": 2000}
PEERS = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "im2rec": "mxnet"}  # packages
SCRIPT = "tools/bench/pack_peers.py"
SHORT_SIDE = 480
KEPT_SIDE = round(1.1 * SHORT_SIDE)  # our --min-shrink: what is hardly larger keeps its bytes
PHOTOGRAPH = 110_000  # bytes, about


class Variant(NamedTuple):
    """What is measured; `group` is also the folder that it reads, see `make_data`."""

    group: str
    command: str


MAKE_REC = "{python} tools/make_rec.py"
# 8 shards: of 250 MB at 2 GB of images; so that two workers share the work evenly.
PACK = MAKE_REC + " pack --labeled 10% --layout shared --shards 8 --out {out} --src {work}/"
SHRINK = f"--short-side {SHORT_SIDE} --quality 90"
OURS = {
    "none": ("pass", "--check none"),
    "header": ("pass", "--check header"),
    "decode": ("pass", "--check decode"),
    # Pictures that all have to be made smaller, and photographs as ImageNet has them.
    "480": ("short", SHRINK),
    "480-photos": ("photos", SHRINK),
}
WRITE = " " + SCRIPT + " write "
IM2REC = "{mxnet} -m mxnet.tools.im2rec {out}/train {work}/"
RESIZE = f" --resize {SHORT_SIDE} --quality 90"
VARIANTS = {
    "copy": Variant("pass", "{python}" + WRITE + "copy {work}/pass {out}"),
    "tar": Variant("pass", "tar -cf {out}/images.tar -C {work}/pass ."),
    "codecs-480": Variant("short", "{python}" + WRITE + "codecs {work}/short {out}"),
    "webdataset": Variant("pass", "{streams}" + WRITE + "webdataset {work}/pass {out}"),
    "mds": Variant("pass", "{streams}" + WRITE + "mds {work}/pass {out}"),
    "im2rec": Variant("pass", IM2REC + "pass --pass-through --num-thread 2"),
    "im2rec-480": Variant("short", IM2REC + "short" + RESIZE),
    "im2rec-480-photos": Variant("photos", IM2REC + "photos" + RESIZE),
    "verify": Variant("verify", MAKE_REC + " verify {work}/verify -j 1"),
    "verify-deep": Variant("verify", MAKE_REC + " verify {work}/verify -j 1 --deep"),
    "list": Variant("plan", PACK + "plan/members.tar --check none --dry-run"),
    "resplit": Variant(
        "plan", MAKE_REC + " resplit {work}/plan/pack --labeled 1% --split-seed {number}"
    ),
} | {
    f"ours-{name}-j{jobs}": Variant(group, f"{PACK}{group} {how} -j {jobs}")
    for name, (group, how) in OURS.items()
    for jobs in (1, 2)
}
BASES = {"pass": "copy", "short": "im2rec-480", "photos": "im2rec-480-photos"}
# (ours, other): the least ratio of speeds.
RATIOS = {
    (f"ours-{check}-j2", base): least
    for check in ("none", "decode")
    for base, least in (("copy", 1.0), ("im2rec", 2.0), ("webdataset", 5.0), ("mds", 5.0))
} | {
    ("ours-480-j1", "im2rec-480"): 3.0,
    ("ours-480-j2", "ours-480-j1"): 1.85,
    ("ours-480-j1", "codecs-480"): 0.9,
    ("ours-480-photos-j1", "im2rec-480-photos"): 3.0,
    ("ours-480-photos-j2", "ours-480-photos-j1"): 1.85,
}
TARGETS = {("list", "s"): 60.0, ("resplit", "s"): 10.0}
TARGETS |= {("verify", "MB/s"): 1000.0, ("verify-deep", "img/s"): 800.0}
MEMORY = 200e6 / 2**20  # MiB, of the largest process of our packing


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("pack", __doc__, arguments, measure, options, rounds=5, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    peers = "where pack_peers has installed them"
    add("--peers", type=Path, default=Path("runs/peers"), metavar="DIR", help=peers)
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
    # The data sets, a pack of each and one output.
    need = 3.3e9 * options.gigabytes + 2e6 * options.large_images + 3e3 * options.rows
    if (free := shutil.disk_usage(options.work).free) < need:
        raise OutputError(f"{options.work}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    report.claim = (
        f"median of at most {options.rounds} interleaved rounds; whole commands with their start, "
        "but copy, codecs, webdataset and mds without start, import and listing, and im2rec "
        "without making its list; warm page cache, synced to the disk within the time; MB are 10^6 "
        "bytes of images read, memory is that of the largest process with shared pages"
    )
    chosen = choose(options, report)
    # Containers set it; without compiled modules each process starts 0.07 s later.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix=".bench_pack_", dir=options.work) as folder:
        bench = Bench(options, Path(folder).resolve())
        print("tools.bench pack: making the data sets", file=sys.stderr, flush=True)
        bench.make_data({VARIANTS[name].group for name in chosen})
        runs = measure_all(bench, chosen, report)
    report.more["data"] = {group: data._asdict() for group, data in bench.data.items()}
    report.more["variants"] = [
        {"name": name, **VARIANTS[name]._asdict(), "runs": runs[name]} for name in chosen
    ]
    report.more["disk"] = {
        "filesystem": output_of("df", "--output=fstype", str(options.work)).split("\n")[-1],
        "kernel": platform.release().partition("-")[0],
        "tar": output_of("tar", "--version").split("\n")[0],
    }
    right = {name: runs[name] for name in chosen if name not in report.failed}
    best = {"pass": report.limits.best(limits.WRITE), "verify": report.limits.best(limits.CRC)}
    report.add(rows(right, bench.data, best))


def choose(options: argparse.Namespace, report: Report) -> list[str]:
    """The variants whose names match `--only` and that are installed. Raises `ConfigError`."""
    sites = [str(site) for site in options.peers.glob("*/lib/python*/site-packages")]
    found = {one.name: one.version for one in distributions(path=sites)}
    missing = [name for name, package in PEERS.items() if package not in found]
    report.skipped += [f"{name}: not installed, see tools.bench.pack_peers" for name in missing]
    report.more["peers"] = {name: found[name] for name in PEERS.values() if name in found}
    there = [name for name in VARIANTS if not name.startswith(tuple(missing))]
    patterns = options.only.split(",")
    chosen = [name for name in there if any(fnmatch.fnmatch(name, p) for p in patterns)]
    if not chosen:
        raise ConfigError(f"--only {options.only}: there are {', '.join(there)}")
    return chosen


class Bench:
    """The data sets in a temporary folder, and the commands that read them."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.out = options, work, work / "out"
        self.data: dict[str, Data] = {}  # of each group that has images
        peers = options.peers.resolve()
        self._places = {
            "python": sys.executable,
            "streams": peers / "streams/bin/python",
            "mxnet": peers / "mxnet/bin/python",
            "work": work,
        }

    def make_data(self, groups: set[str]) -> None:
        """What the variants of these groups read."""
        options, work, data = self.options, self.work, self.data
        archive, size = options.images, round(options.gigabytes * 1e9)
        if groups & {"pass", "verify"}:
            data["pass"] = pack_files.make_folders(archive, work / "pass", size)
        if "short" in groups:
            data["short"] = pack_files.make_mosaics(archive, work / "short", options.large_images)
        if "photos" in groups:
            size = options.large_images * PHOTOGRAPH
            data["photos"] = pack_files.make_folders(archive, work / "photos", size)
        if "verify" in groups:
            self._pack("pass", work / "verify")
            data["verify"] = data["pass"]
        if "plan" in groups:
            (work / "plan").mkdir()
            pack_files.make_members(work / "plan" / "members.tar", options.rows)
            self._pack("plan/members.tar", work / "plan" / "pack")

    def _pack(self, source: str, out: Path) -> None:
        found = self.execute(PACK + source + " --check none", out)
        if found["code"]:
            raise UserError(f"{source} cannot be packed: {last_line(found['printed'])}")

    def run(self, name: str, number: int) -> Json:
        """Runs a variant and returns its times; those of `SCRIPT` are by its own clock."""
        group, command = VARIANTS[name]
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if name.startswith("im2rec"):
            shutil.copy(self.work / f"{group}.lst", self.out / "train.lst")
        os.sync()
        # Into the page cache, each time anew: a virtual machine's host may take unused pages back
        # within a minute.
        for path in (self.work / group).rglob("*"):
            if path.is_file():
                path.read_bytes()
        found = self.execute(command, self.out, number)
        found["seconds"] = found["wall"]
        if not found["code"] and WRITE in command:
            found |= json_value(last_line(found["printed"]))
        return found

    def execute(self, command: str, out: Path, number: int = 0) -> Json:
        """What `pack_peers.run` prints of a command."""
        places = {**self._places, "out": out, "number": number}
        parts = [part.format(**places) for part in command.split()]
        runner = subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT, "run", out, *parts],
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=ROOT,
        )
        try:
            found: Json = json_value(runner.communicate()[0])
        except BaseException:  # its workers too; those of some would wait for ever
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGKILL)
                runner.wait()
                for _ in range(100):  # until the last is gone, and with it what it writes
                    os.killpg(runner.pid, 0)
                    time.sleep(0.05)
            raise
        return found

    def fault(self, name: str, found: Json) -> str:
        """What is wrong with a variant's output; empty if nothing is."""
        group, rows = VARIANTS[name].group, self.options.rows
        if found["code"]:
            return last_line(found["printed"])
        if name == "list":
            there = str(rows) in found["printed"].replace(",", "")
            return "" if there else f"{rows} is not in the plan"
        if name == "resplit":
            listing = self.work / "plan" / "pack" / "train_label.lst"
            lines = listing.read_bytes().count(b"\n")
            return "" if lines == round(rows / 100) else f"{lines} of {rows} rows are labeled"
        try:
            sides = pack_files.short_sides(self.out) if (self.out / "train.idx").exists() else None
        except (OSError, ValueError, struct.error) as error:
            return f"wrote what cannot be read ({error})"
        if group == "pass":
            wrong = pack_files.altered(self.out, self.work / group)
            return f"{len(wrong)} images are lost, changed or there twice" if wrong else ""
        return "" if sides is None else wrong_sides(name, sides, self.data[group])


def wrong_sides(name: str, sides: Sequence[int], given: Data) -> str:
    """What is wrong with images that were made smaller; empty if nothing is.

    Larger ones get `SHORT_SIDE`, or keep their size if they are hardly larger; im2rec enlarges.
    """
    smallest, largest = min(sides, default=0), max(sides, default=0)
    least, most = given.short_sides
    if name.startswith("im2rec"):
        right = smallest == largest == SHORT_SIDE
    else:
        right = smallest == min(SHORT_SIDE, least) and min(SHORT_SIDE, most) <= largest <= KEPT_SIDE
    if right and len(sides) == given.images:
        return ""
    return f"wrote {len(sides)} images with short sides {smallest} to {largest}, given {given}"


def measure_all(bench: Bench, chosen: Sequence[str], report: Report) -> dict[str, list[Json]]:
    """The runs of every variant, by name; one that is wrong is not run again."""
    done: dict[str, list[Json]] = {name: [] for name in chosen}

    def timer(name: str) -> None:
        if name in report.failed:
            return
        number = len(done[name]) + 1
        place = f"{number}/{bench.options.rounds}: {name}"
        print(f"tools.bench pack: {place}", file=sys.stderr, flush=True)
        found = bench.run(name, number)
        if wrong := bench.fault(name, found):
            report.fail(name, wrong)
        del found["printed"]
        done[name].append(found)

    report.interleaved({name: name for name in chosen}, timer, warmup=0)
    return done


def rows(
    runs: Mapping[str, Sequence[Json]], data: Mapping[str, Data], best: Mapping[str, float]
) -> list[Row]:
    """Seconds, rates and memory of each variant, then ratios within a round.

    `best`: bytes/s, by group: of writing, or for `verify` of its checksum.
    """
    made = []
    for name, found in runs.items():
        group = VARIANTS[name].group
        made += run_rows(name, found, data.get(group), best.get(group))
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    bases = {(name, BASES.get(VARIANTS[name].group, "")): None for name in runs}
    for (name, base), target in (bases | RATIOS).items():
        if name in seconds and base in seconds and name != base:
            label = f"{VARIANTS[name].group}: {name} / {base}"
            gain = ratios(seconds, base, name)
            made.append(Row(label, gain, "times", "higher", steady=True, target=target))
    return made


def run_rows(
    variant: str, runs: Sequence[Json], data: Data | None, limit: float | None
) -> list[Row]:
    """Of one variant, with the rates at which it read `data`, of at most `limit` bytes/s."""
    name = f"{VARIANTS[variant].group}: {variant}"
    seconds, wall, busy = ([run[key] for run in runs] for key in ("seconds", "wall", "cpu"))
    made = [Row(name, spread(seconds), "s", target=TARGETS.get((variant, "s")))]
    if wall != seconds:
        made.append(Row(f"{name}, whole command", spread(wall), "s"))
    if data:
        megabytes = data.bytes / 1e6
        rates = {"MB/s": (megabytes, seconds), "img/s": (data.images, seconds)}
        for unit, (amount, times) in (rates | {"img/CPU s": (data.images, busy)}).items():
            rate, target = spread([amount / s for s in times]), TARGETS.get((variant, unit))
            best = limit / 1e6 if limit and unit == "MB/s" else None
            made.append(Row(name, rate, unit, "higher", limit=best, target=target))
    most = MEMORY if variant.startswith("ours") else None
    peaks = spread([run["peak_mib"] for run in runs])
    return [*made, Row(f"{name}, memory", peaks, "MiB", target=most)]
