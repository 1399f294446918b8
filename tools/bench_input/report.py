"""Medians, and ratios to each peer of the same round."""

from collections.abc import Mapping, Sequence

from tools.bench.clock import spread
from tools.bench.report import Row
from tools.bench_input.clock import Key, Round
from tools.bench_input.contestants import Contestant

PEER = "torchvision-pil"
# On a CPU, times that peer's rate.
TARGETS = {("weak", "dali", PEER): 1.6, ("both", "dali-mpl", PEER): 1.3}


def rows(
    contestants: Sequence[Contestant], found: Mapping[Key, list[Round]], *, smoke: bool = False
) -> list[Row]:
    """Of each contestant its rate and CPU time, and the ratios of both to every peer's.

    A ratio is the median over the rounds, not a ratio of medians; of a `smoke` test it says nothing
    and has no target.
    """
    made = []
    for one in contestants:
        mine, name = found[one.task, one.name], f"{one.task}: {one.name}"
        rate = [turn.images_per_s for turn in mine]
        made.append(Row(name, spread(rate), "img/s", "higher"))
        made.append(Row(f"{name}, CPU", spread([turn.cpu_us for turn in mine]), "us/img"))
        for peer in contestants:
            if peer.peer and peer.task == one.task and not one.peer:
                made += _against(one, peer, mine, found[peer.task, peer.name], smoke)
    return made


def _against(
    one: Contestant,
    peer: Contestant,
    mine: Sequence[Round],
    theirs: Sequence[Round],
    smoke: bool,
) -> list[Row]:
    """How many times a peer's rate, and how many times less of the CPU."""
    pairs = list(zip(mine, theirs, strict=True))
    name = f"{one.task}: {one.name} against {peer.name}"
    target = None if smoke else TARGETS.get((one.task, one.name, peer.name))
    speed = spread([own.images_per_s / other.images_per_s for own, other in pairs])
    saving = spread([other.cpu_us / own.cpu_us for own, other in pairs])
    return [
        Row(name, speed, "x", "higher", not smoke, None, target),
        Row(f"{name}, CPU saved", saving, "x", "higher", not smoke),
    ]
