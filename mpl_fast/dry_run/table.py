"""The text of a dry run: a paragraph for each property of the run."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from mpl_fast.config import RunConfig
from mpl_fast.dry_run.estimate import Memory, has_fixed_teacher, learners, step_flops
from mpl_fast.dry_run.network import NetworkCost
from mpl_fast.dry_run.roofline import Forecast
from mpl_fast.training.console import duration, quantity
from mpl_fast.training.rows import StepRows

WIDTH, INDENT = 100, 14  # columns of a line, and of the name before each paragraph


@dataclass(frozen=True)
class Plan:
    """Everything that is printed about a run."""

    config: RunConfig
    world: int
    device: str
    """Name of a rank's device; empty if this machine does not have it."""
    device_bytes: int
    """Of its memory that a run may use; 0 for the CPU."""
    bf16: bool
    cost: NetworkCost
    rows: StepRows
    """Of one rank."""
    memory: Memory
    checkpoint: int
    """Bytes."""
    records: int
    """Images in a pass over the split that `epochs` is about."""
    validation: int
    """Images."""
    rate: float
    """FLOP/s measured with this network on this device; 0 if the device is not here."""
    timed: int
    """Images in the measured pass."""
    forecast: Forecast | None = None
    """Of a GPU that is not here."""
    remedies: tuple[str, ...] = ()
    """What would fit the device's memory."""
    price: float = 0.0
    """Of a GPU for an hour; 0: unknown."""

    @property
    def flops(self) -> int:
        """Of one rank's step."""
        return step_flops(self.rows, self.cost)

    @property
    def seconds(self) -> float:
        """Of a step; 0 if unknown."""
        return self.flops / self.rate if self.rate else 0.0

    @property
    def evaluations(self) -> int:
        """Passes over the validation images."""
        every = self.config.eval_every
        return 1 + (self.config.steps - 1) // every if every else 1


def table(plan: Plan) -> str:
    """A paragraph for each name."""
    paragraphs = {
        "recipe": plan.config.recipe,
        "network": _network(plan),
        "ranks": _ranks(plan),
        "a step": _images(plan),
        "its passes": _passes(plan),
        "length": _length(plan),
        "operations": _operations(plan),
        "memory": _memory(plan),
        "checkpoint": f"{quantity(plan.checkpoint, 'B')} each, "
        f"{plan.config.checkpoint_keep} are kept",
        "time": _time(plan),
        "decoding": _decoding(plan),
    }
    if plan.forecast:
        paragraphs["a step takes"] = _parts(plan.forecast)
        paragraphs["cost"] = _cost(plan, plan.forecast)
    lines = [
        textwrap.fill(f"{name:<{INDENT}}{text}", WIDTH, subsequent_indent=" " * INDENT)
        for name, text in paragraphs.items()
    ]
    return "\n".join(["dry run: nothing is trained or written", *lines])


def _network(plan: Plan) -> str:
    algorithm = plan.config.algorithm
    count = len(learners(algorithm))
    each = " each" if count > 1 else ""
    fixed = ", and a teacher, counted as another of it" if has_fixed_teacher(algorithm) else ""
    return (
        f"{count} x {plan.config.model.name}, {quantity(plan.cost.parameters)} trained "
        f"parameters{each}{fixed}, {plan.config.data.image_size}-pixel images"
    )


def _ranks(plan: Plan) -> str:
    where = plan.device or "a GPU that this machine does not have"
    nodes = plan.forecast.machine.nodes if plan.forecast else 1
    where += f" on {nodes} nodes" if nodes > 1 else ""
    precision = "bfloat16" if plan.bf16 else "float32"
    return f"{plan.world} x {where}, {precision}, compile {plan.config.compile}"


def _images(plan: Plan) -> str:
    config, world = plan.config, plan.world
    unlabeled = config.unlabeled_images
    parts = f", in {config.microbatches} parts" if config.microbatches > 1 else ""
    return (
        f"{config.labeled_batch:,} labeled + {unlabeled:,} unlabeled images, "
        f"{config.labeled_batch // world:,} + {unlabeled // world:,} on a rank{parts}"
    )


def _passes(plan: Plan) -> str:
    rows = plan.rows
    tangent = f", {rows.tangent:,} in forward mode" if rows.tangent else ""
    return (
        f"on a rank {rows.forward:,} images forward, {rows.backward:,} backward{tangent}; "
        f"the largest has {rows.largest:,}"
    )


def _length(plan: Plan) -> str:
    config = plan.config
    only = config.algorithm.labeled_only
    batch, of = (config.labeled_batch, "labeled") if only else (config.unlabeled_batch, "unlabeled")
    epochs = config.steps * batch / plan.records
    return f"{config.steps:,} steps, {_count(epochs)} passes over {plan.records:,} {of} images"


def _operations(plan: Plan) -> str:
    forwards = plan.flops / plan.cost.forward
    a_labeled = forwards * plan.world / plan.config.labeled_batch
    total = plan.flops * plan.world
    return (
        f"{quantity(total, 'FLOP')} a step, {a_labeled:.1f} forward passes "
        f"({quantity(plan.cost.forward, 'FLOP')} each) for a labeled image; "
        f"{quantity(total * plan.config.steps, 'FLOP')} in all"
    )


def _memory(plan: Plan) -> str:
    parts = [
        f"{name.replace('_', ' ')} {quantity(size, 'B')}"
        for name, size in plan.memory._asdict().items()
        if size
    ]
    total = sum(plan.memory)
    have = plan.device_bytes
    of = f" of {quantity(have, 'B')}" if have else ""
    remedies = "; ".join(plan.remedies) or "lower the batches"
    over = f"; TOO MUCH: {remedies}" if have and total > have else ""
    libraries = "Python, PyTorch and DALI" if plan.device == "cpu" else "CUDA, NCCL and DALI"
    take = "take"
    if plan.forecast:
        take += f", for which {quantity(plan.forecast.machine.card.memory - have, 'B')} are assumed"
    return (
        f"{quantity(total, 'B')} on a rank{of} at the peak ({', '.join(parts)}), besides what "
        f"{libraries} {take}{over}"
    )


def _time(plan: Plan) -> str:
    if plan.forecast:
        return (
            f"{_range([step.total for step in plan.forecast.steps], _seconds)} a step, "
            f"{_range(_totals(plan, plan.forecast), duration)} with evaluations, computed and not "
            "measured: between the best rates that others have reached on such GPUs and about half "
            "of them, if the input pipeline keeps up"
        )
    if not plan.rate:
        return "unknown: this machine does not have the device, so the network was not timed"
    validating = plan.validation * plan.cost.forward / plan.world / plan.rate
    total = plan.config.steps * plan.seconds + plan.evaluations * validating
    return (
        f"roughly {_seconds(plan.seconds)} a step, {duration(total)} with evaluations, if all went "
        f"at the {quantity(plan.rate, 'FLOP/s')} that this network just reached here in a few "
        f"seconds, forward and backward on {plan.timed} images, not compiled"
    )


def _decoding(plan: Plan) -> str:
    images = plan.config.images
    if plan.forecast:
        rates = [images / step.total for step in reversed(plan.forecast.steps)]
        on_a_rank = _range([rate / plan.world for rate in rates], _count)
        return f"{_range(rates, _count)} images/s ({on_a_rank} on a rank) at these speeds"
    if not plan.rate:
        return f"{images:,} images a step; the images/s needed are these divided by its seconds"
    rate = images / plan.seconds
    return (
        f"{_count(rate)} images/s ({_count(rate / plan.world)} on a rank) at that speed; "
        f"at another, {images:,} divided by the seconds of a step"
    )


def _parts(forecast: Forecast) -> str:
    parts = {
        "networks": [step.passes for step in forecast.steps],
        "updates": [step.updates for step in forecast.steps],
        "exchange that is not overlapped": [step.exchange for step in forecast.steps],
        "launching by the host in parallel": [step.host for step in forecast.steps],
    }
    return ", ".join(f"{name} {_range(values, _seconds)}" for name, values in parts.items())


def _cost(plan: Plan, forecast: Forecast) -> str:
    hours = [seconds * plan.world / 3600 for seconds in _totals(plan, forecast)]
    money = ""
    if plan.price:
        prices = _range([plan.price * number for number in hours], _count)
        money = f", {prices} at {plan.price:g} a GPU-hour"
    days = _range([number / plan.world / 24 for number in hours], _count)
    return f"{_range(hours, _count)} GPU-hours in {days} days{money}"


def _totals(plan: Plan, forecast: Forecast) -> list[float]:
    """Seconds of the run at both bounds."""
    return [
        plan.config.steps * step.total + plan.evaluations * evaluation
        for step, evaluation in zip(forecast.steps, forecast.evaluations, strict=True)
    ]


def _range(values: list[float], shown: Callable[[float], str]) -> str:
    """``LOW to HIGH``, or one if both are printed alike."""
    low, high = (shown(value) for value in values)
    return low if low == high else f"{low} to {high}"


def _seconds(value: float) -> str:
    rounded = float(f"{value:.2g}")  # or 0.0996 would be 1e+02 ms
    if rounded < 0.1:
        return f"{rounded * 1000:.2g} ms"
    return f"{rounded:.2g} s" if rounded < 10 else f"{value:,.0f} s"


def _count(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"
