"""The fault campaign: python -m tools.faults --out DIR [--kills N] [--minutes M] [--only NAMES]"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpl_fast.errors import ConfigError, run_command

KINDS = ("kills", "packing", "commands", "faults", "elastic", "soak")
DESCRIPTION = """Kills training and packing at random, many times, and compares how each ends with
one that nobody has stopped, bit for bit; injects signals, full disks, lost terminals and the like,
and checks exit codes and what is printed too; runs every named fault, which is a test; compares the
accuracy of runs whose number of ranks changes with that of others; and trains for many tiny steps
while memory, open files and threads must not grow. All on CPUs, with digits.

Each finished case is a line of DIR/cases.jsonl: the same command goes on after any stop.
DIR/result.json has the counts and every case that failed, whose log and run stay in DIR. The exit
code is 1 if any has failed."""


def main() -> int:
    """Runs what is missing of the campaign."""
    options = _options()
    # These import torch: --help must not wait for it.
    from tests import tiny_run
    from tools.faults import commands, elastic, named, packing, soak, training
    from tools.faults.cases import Campaign

    wanted = [name.strip() for name in options.only.split(";") if name.strip()]
    kinds = [kind for kind in KINDS if kind in wanted or not wanted]
    faults = [name for name in wanted if name not in KINDS]
    if unknown := [name for name in faults if name not in named.faults()]:
        known = f"{', '.join(KINDS)}, or first cells of rows of {named.DOCUMENT}"
        raise ConfigError(f"--only {unknown[0]}: give any of {known}")
    recipes = tuple(options.recipes.split(",")) if options.recipes else training.RECIPES
    if unknown := [name for name in recipes if name not in tiny_run.ALGORITHMS]:
        raise ConfigError(f"--recipes {unknown[0]}: give any of {', '.join(tiny_run.ALGORITHMS)}")
    campaign = Campaign(options.out.resolve(), options.minutes)
    ends = time.monotonic() + 60 * options.minutes
    rec = campaign.out / "digits" / "rec"
    if {"kills", "commands", "soak"} & {*kinds} and not (rec / "manifest.json").exists():
        tiny_run.make_rec(rec.parent)
    (campaign.out / "runs").mkdir(exist_ok=True)
    (campaign.out / "references").mkdir(exist_ok=True)
    if "packing" in kinds:
        packing.run_packing(campaign, options.kills, options.seed)
    if "kills" in kinds:
        training.run_kills(campaign, rec, options.kills, options.seed, options.ranks, recipes)
    if "commands" in kinds:
        commands.run_commands(campaign, rec)
    if "faults" in kinds or faults:
        named.run_named(campaign, faults)
    if "elastic" in kinds:
        elastic.run_elastic(campaign, options.elastic_seeds)
    if "soak" in kinds:
        steps = options.soak_steps
        campaign.run(f"soak {steps}", lambda: soak.soak(campaign.out, rec, steps, ends))
    result = campaign.result()
    for kind, counted in result["counts"].items():
        print(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in counted.items()))
    print(campaign.out / "result.json")
    return 1 if result["failed"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.faults",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the campaign")
    add("--kills", type=int, default=200, metavar="N", help="of training, and of packing (200)")
    add("--minutes", type=float, default=1e6, metavar="M", help="begin no case after so many")
    more = f"{';'.join(KINDS)}, or first cells of rows of docs/reliability.md (all)"
    add("--only", default="", metavar="NAMES", help=more)
    add(
        "--ranks",
        type=_counts,
        default="1,2",
        metavar="LIST",
        help="of runs that are killed (1,2)",
    )
    add("--recipes", default="", metavar="LIST", help="of runs that are killed (eight)")
    add("--elastic-seeds", type=int, default=5, metavar="N", help="runs of each kind (5)")
    add("--soak-steps", type=int, default=20_000, metavar="N", help="20000")
    add("--seed", type=int, default=0, metavar="N", help="draws what is killed, and when (0)")
    options = parser.parse_args()
    for name in ("kills", "elastic_seeds", "soak_steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1")
    return options


def _counts(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"give numbers such as 1,2, not {text}")
    return tuple(map(int, counts))


if __name__ == "__main__":
    run_command("tools.faults", main, "interrupted: the same command goes on")
