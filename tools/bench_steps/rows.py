"""Rows of a report out of what was measured: times, rates, ratios with their targets."""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from tools.bench.clock import Spread, ratio, spread
from tools.bench.report import Row
from tools.bench_steps.contestants import PLAIN, PLAIN_AMP
from tools.bench_steps.measure import Found
from tools.bench_steps.setting import Setting

HOPPER = ("H100", "H200")
BEST = "best of ours"


class Scene(NamedTuple):
    """What is needed to tell which targets hold: they are for certain machines and sizes."""

    setting: Setting
    recipe: str
    forwards: float  # passes of one image in a step
    gpu: str  # its name, or empty
    smoke: bool

    @property
    def hopper(self) -> bool:
        """Whether the targets for an H100 hold."""
        return not self.smoke and any(name in self.gpu for name in HOPPER)

    @property
    def on_cpu(self) -> bool:
        """Whether the targets for a CPU hold."""
        return not self.smoke and not self.gpu and self.setting.model == "wrn_28_2"


def rows(found: Found, scene: Scene) -> list[Row]:
    """Everything about a recipe."""
    made = [*_steps(found, scene), *_rates(found, scene)]
    made += [*_against_plain(found, scene), *_split(found, scene), *_per_pass(found, scene)]
    return [*made, *_phases(found, scene), *_memory(found, scene)]


def best(found: Found, only: str = "ours") -> str | None:
    """Whose step is the shortest of those with this beginning."""
    mine = [name for name in found.seconds if name.startswith(only)]
    return min(mine, key=lambda name: median(found.seconds[name]), default=None)


def _steps(found: Found, scene: Scene) -> Iterator[Row]:
    for name, times in found.seconds.items():
        small = scene.setting.model == "wrn_28_2" and scene.setting[1:4] == (64, 7, 32)
        wanted = scene.hopper and small and name == best(found) and scene.recipe == "mpl"
        milliseconds = spread([1e3 * s for s in times])
        yield Row(
            _name(scene, f"{name}: step"), milliseconds, "ms", target=15.0 if wanted else None
        )


def _rates(found: Found, scene: Scene) -> Iterator[Row]:
    images = scene.setting.distinct
    for name, times in found.seconds.items():
        large = scene.setting.model == "resnet50" and scene.setting.mu == 7
        wanted = scene.hopper and large and name == best(found) and scene.recipe == "mpl"
        rate, target = spread([images / s for s in times]), 1000.0 if wanted else None
        what = "images" if name.startswith("one pass") else "distinct images"
        yield Row(_name(scene, f"{name}: {what}"), rate, "img/s", "higher", target=target)


def _against_plain(found: Found, scene: Scene) -> Iterator[Row]:
    """How many times faster each of ours is; the plain step runs on the GPU with its AMP."""
    for plain in (PLAIN, PLAIN_AMP):
        if plain not in found.seconds:
            continue
        for name in found.seconds:
            if name.startswith("ours"):
                yield _speedup(found, scene, plain, name, f"{plain} / {name}")
        if one := best(found):
            target = _whole_target(scene, plain)
            yield _speedup(found, scene, plain, one, f"{plain} / {BEST}", target)
        if (one := best(found, "ours fp32 compiled")) and plain == PLAIN:
            target = 1.3 if scene.on_cpu else None
            name = f"{plain} / {BEST} in fp32"
            yield _speedup(found, scene, plain, one, name, target)


def _whole_target(scene: Scene, plain: str) -> float | None:
    if scene.on_cpu and plain == PLAIN:
        return 2.5
    if scene.hopper and plain == PLAIN_AMP:
        return {"resnet50": 2.5, "wrn_28_2": 4.0}.get(scene.setting.model)
    return None


def _split(found: Found, scene: Scene) -> Iterator[Row]:
    """How many times faster it is to normalize the weak views by themselves."""
    for name in found.seconds:
        joint = name.replace("split", "joint")
        if joint != name and joint in found.seconds:
            wanted = scene.recipe == "mpl" and scene.hopper
            target = 1.25 if wanted else None
            yield _speedup(found, scene, joint, name, f"{joint} / split", target)


def _per_pass(found: Found, scene: Scene) -> Iterator[Row]:
    """A step's time over that of its passes, of which a supervised image makes three."""
    for name, times in found.seconds.items():
        how = name.removeprefix("ours ").rpartition(" ")[0]
        alone = found.seconds.get(f"one pass {how}")
        if alone is None or not name.endswith("joint"):
            continue
        image = 3.0 * scene.setting.distinct
        shares = [t / (scene.forwards * s / image) for t, s in zip(times, alone, strict=True)]
        target = 1.05 if scene.hopper and scene.recipe == "mpl" else None
        what = f"{name}: step / its {scene.forwards:.0f} passes"
        yield Row(_name(scene, what), spread(shares), "x", steady=not scene.smoke, target=target)


def _phases(found: Found, scene: Scene) -> Iterator[Row]:
    for name, parts in found.phases.items():
        for phase, times in parts.items():
            milliseconds = spread([1e3 * s for s in times])
            yield Row(_name(scene, f"{name}, phase: {phase}"), milliseconds, "ms")


def _memory(found: Found, scene: Scene) -> Iterator[Row]:
    for name, peak in found.memory.items():
        gigabytes = Spread(peak / 1e9, peak / 1e9, peak / 1e9, 1)
        yield Row(_name(scene, f"{name}: peak memory"), gigabytes, "GB")


def _speedup(
    found: Found, scene: Scene, slow: str, fast: str, name: str, target: float | None = None
) -> Row:
    times = ratio(found.seconds, slow, fast)
    return Row(_name(scene, name), times, "x", "higher", not scene.smoke, target=target)


def _name(scene: Scene, what: str) -> str:
    return f"{scene.recipe}, {what}"
