"""The header of each configuration names its cost, and the command that computed it."""

import re
import shlex
from pathlib import Path

import pytest

from mpl_fast.config.command_line import dry_run_of, parse
from tests.tiny_run import ROOT

# Made for CPUs: what they cost there is measured.
FOR_CPUS = {"ablation_cifar_cpu", *(f"demo_{recipe}" for recipe in ("supervised", "uda", "mpl"))}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COST = re.compile(
    r"Cost: +[\d.,]+ to [\d.,]+ GPU-hours on \d+ [A-Z]\w+, [\d.]+ [GM]B of memory each; computed, "
    r"not measured, if the input pipeline keeps up, by "
    r"(?P<command>python mpl_fast/train.py .*? --records \S+)"
)


def header(config: Path) -> str:
    """The comment before the keys, as one line."""
    lines = config.read_text().split("\nrecipe:")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if c.stem not in FOR_CPUS], ids=lambda c: c.stem
)
def test_the_cost_is_beside_the_command_that_computes_it(config: Path) -> None:
    found = COST.search(header(config))
    assert found
    _, script, *argv = shlex.split(found["command"])
    assert (ROOT / script).exists()
    dry = dry_run_of(argv)
    assert dry and dry.card and dry.counts
    assert f" on {dry.ranks} {dry.card.upper()}, " in found[0]
    assert f"--config configs/{config.name} " in found["command"]
    assert parse([*argv[:1], str(config), *argv[2:]]).device == "cuda"


def test_those_for_cpus_exist() -> None:
    assert {config.stem for config in CONFIGS} >= FOR_CPUS
