"""Random SIGKILLs of packing: the pack has the bytes of one that nobody has stopped."""

import hashlib
import json
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from mpl_fast.untrusted import json_value
from tests.tiny_run import ROOT, environment, write_digits
from tools.faults.cases import Campaign, Case
from tools.faults.processes import descendants, ended, kill, orphans, started

IMAGES = 600
MOST = 4  # kills of one case
TARGETS = ("launcher", "worker", "all")


def run_packing(campaign: Campaign, most: int, seed: int) -> None:
    """Cases until there are as many SIGKILLs, or the time is over."""
    number = 0
    while campaign.kills("packing") < most and not campaign.time_is_over:
        name = f"pack {number:04d}"
        campaign.run(name, partial(one_case, campaign.out, name, seed))
        number += 1


def one_case(out: Path, name: str, seed: int) -> Case:
    """Kills a pack at random moments, lets it end, and compares every file."""
    began, faults, kills = time.monotonic(), list[str](), 0
    drawn = random.Random(f"{seed} {name}")
    images = out / "images"
    if not (images / "done").exists():
        shutil.rmtree(images, ignore_errors=True)
        write_digits(images, train=IMAGES, val=60)
        (images / "done").touch()
    expected, seconds = reference(out)
    folder = out / "packs" / name.replace(" ", "_")
    log = folder.parent / f"{folder.name}.log"
    folder.parent.mkdir(exist_ok=True)
    moments = []
    for _ in range(drawn.randint(1, MOST)):
        process = started(command(images, folder), log, environment())
        moments.append(seconds * drawn.random())
        time.sleep(moments[-1])
        if process.poll() is not None:
            continue
        family = descendants(process.pid)
        target = drawn.choice(TARGETS)
        targets = {"launcher": [process.pid], "worker": family[-1:], "all": [process.pid, *family]}
        kills += bool(kill(targets[target] or [process.pid]))
        if target != "worker" and (left := orphans(family)):
            faults.append(f"{len(left)} processes outlived a kill of the {target}")
        ended(process)
    code = ended(started(command(images, folder), log, environment()))
    if code != 0:
        faults.append(f"the pack ended with {code}")
    else:
        found = digests(folder)
        faults += [f"{file} differs" for file in expected | found
                   if expected.get(file) != found.get(file)]  # fmt: skip
    if not faults:
        shutil.rmtree(folder)
        log.unlink()
    outcome = "failed" if faults else "passed"
    took = time.monotonic() - began
    return Case(name, "packing", outcome, took, kills, "; ".join(faults), {"moments": moments})


def command(images: Path, folder: Path) -> list[str]:
    """What a user types."""
    line = [sys.executable, ROOT / "tools" / "make_rec.py", "pack", "--quiet", "-j", "2"]
    line += ["--src", images / "train", "--val", images / "val", "--labeled", "40", "--shards", "4"]
    return [str(part) for part in (*line, "--short-side", "12", "--out", folder)]


def reference(out: Path) -> tuple[dict[str, str], float]:
    """Digests of the pack without a stop, and how long it took."""
    folder, file = out / "references" / "pack", out / "references" / "pack_seconds"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        process = started(
            command(out / "images", folder), folder.parent / "pack.log", environment()
        )
        if (code := ended(process)) != 0:
            raise RuntimeError(f"the pack without a stop ended with {code}")
        file.write_text(str(time.monotonic() - began))
    return digests(folder), float(file.read_text())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of a folder; of the manifest without its dates and seconds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            content = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json_value(content)
                manifest["created"], manifest["totals"]["seconds"] = "", 0
                content = json.dumps(manifest).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found
