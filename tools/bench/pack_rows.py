"""Rows of the packing benchmark: seconds, rates, memory, ratios to others, and targets."""

from collections.abc import Mapping, Sequence
from statistics import median

from tools.bench.pack_readers import Counts
from tools.bench.pack_variants import GROUPS, Variant
from tools.bench.results import Json, Row, ratios, spread

BEST_IM2REC = "im2rec at its best"  # of the numbers of threads
RATIOS = {
    (f"ours-{check}-j2", base): least
    for check in ("none", "decode")
    for base, least in (("copy", 1.0), (BEST_IM2REC, 2.0), ("webdataset", 5.0), ("mds", 5.0))
} | {
    ("ours-480-j1", "im2rec-480"): 3.0,
    ("ours-480-j2", "ours-480-j1"): 1.85,
    ("ours-480-j1", "codecs-480"): 0.9,
    ("ours-480-photos-j1", "im2rec-480-photos"): 3.0,
    ("ours-480-photos-j2", "ours-480-photos-j1"): 1.85,
}  # (ours, other): the least ratio of speeds
TARGETS = {("list", "s"): 60.0, ("resplit", "s"): 10.0}
TARGETS |= {("verify", "MB/s"): 1000.0, ("verify-deep", "img/s"): 800.0}
MEMORY = 200e6 / 2**20  # MiB, of the largest process of our packing


def rows(
    variants: Sequence[Variant], runs: Mapping[str, Sequence[Json]], data: Mapping[str, Counts]
) -> list[Row]:
    """Seconds, rates and memory of each variant, then ratios within a round."""
    made = []
    for one in variants:
        counts = data.get(GROUPS[one.group].data, Counts(0, 0, 0, (0, 0)))
        made += run_rows(one, runs[one.name], counts)
    seconds = {one.name: [run["seconds"] for run in runs[one.name]] for one in variants}
    tried = [found for name, found in seconds.items() if name.startswith("im2rec-n")]
    if tried:
        seconds[BEST_IM2REC] = min(tried, key=median)
    groups = {one.name: one.group for one in variants}
    bases = {(name, GROUPS[group].base): None for name, group in groups.items()}
    for (name, base), target in (bases | RATIOS).items():
        if name in seconds and base in seconds and name != base:
            label = f"{groups[name]}: {name} / {base}"
            gain = ratios(seconds, base, name)
            made.append(Row(label, gain, "times", "higher", steady=True, target=target))
    return made


def run_rows(variant: Variant, runs: Sequence[Json], counts: Counts) -> list[Row]:
    """Of one variant, whose images and their bytes are `counts`."""
    name = f"{variant.group}: {variant.name}"
    seconds = [run["seconds"] for run in runs]
    made = [Row(name, spread(seconds), "s", target=TARGETS.get((variant.name, "s")))]
    for part, key in (("whole command", "wall"), ("without start", "inside")):
        others = [run[key] for run in runs if key in run]
        if others and others != seconds:
            made.append(Row(f"{name}, {part}", spread(others), "s"))
    for amount, unit in ((counts.bytes / 1e6, "MB/s"), (counts.images, "img/s")):
        if amount:
            target = TARGETS.get((variant.name, unit))
            rates = spread([amount / s for s in seconds])
            made.append(Row(name, rates, unit, "higher", target=target))
    busy = [run["cpu"] for run in runs]
    if counts.images and all(busy):
        rates = spread([counts.images / cpu for cpu in busy])
        made.append(Row(name, rates, "img/CPU s", "higher"))
    ours = variant.written and variant.name.startswith("ours")
    peaks = spread([run["peak_mib"] for run in runs])
    return [*made, Row(f"{name}, memory", peaks, "MiB", target=MEMORY if ours else None)]
