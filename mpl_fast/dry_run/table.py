"""The text of a dry run: a paragraph for each property of the run."""

import textwrap
from dataclasses import dataclass

from mpl_fast.config import RunConfig
from mpl_fast.dry_run.estimate import Memory, step_flops
from mpl_fast.dry_run.network import NetworkCost
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
    """Its memory; 0 for the CPU."""
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

    @property
    def flops(self) -> int:
        """Of one rank's step."""
        return step_flops(self.rows, self.cost)

    @property
    def seconds(self) -> float:
        """Of a step; 0 if unknown."""
        return self.flops / self.rate if self.rate else 0.0


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
        "checkpoint": f"{_amount(plan.checkpoint)}B each, {plan.config.checkpoint_keep} are kept",
        "time": _time(plan),
        "decoding": _decoding(plan),
    }
    lines = [
        textwrap.fill(f"{name:<{INDENT}}{text}", WIDTH, subsequent_indent=" " * INDENT)
        for name, text in paragraphs.items()
    ]
    return "\n".join(["dry run: nothing is trained or written", *lines])


def _network(plan: Plan) -> str:
    count = len({"teacher", "student"} & set(vars(plan.config.algorithm))) or 1
    each = " each" if count > 1 else ""
    return (
        f"{count} x {plan.config.model.name}, {quantity(plan.cost.parameters)} trained "
        f"parameters{each}, {plan.config.data.image_size}-pixel images"
    )


def _ranks(plan: Plan) -> str:
    where = plan.device or "a GPU that this machine does not have"
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
        f"{_amount(total)}FLOP a step, {a_labeled:.1f} forward passes ({_amount(plan.cost.forward)}"
        f"FLOP each) for a labeled image; {_amount(total * plan.config.steps)}FLOP in all"
    )


def _memory(plan: Plan) -> str:
    parts = [
        f"{name.replace('_', ' ')} {_amount(size)}B"
        for name, size in plan.memory._asdict().items()
        if size
    ]
    total = sum(plan.memory)
    have = plan.device_bytes
    of = f" of {_amount(have)}B" if have else ""
    over = "; TOO MUCH: lower the batches" if have and total > have else ""
    libraries = "Python, PyTorch and DALI" if plan.device == "cpu" else "CUDA, NCCL and DALI"
    return (
        f"{_amount(total)}B on a rank{of} at the peak ({', '.join(parts)}), besides what "
        f"{libraries} take{over}"
    )


def _time(plan: Plan) -> str:
    if not plan.rate:
        return "unknown: this machine does not have the device, so the network was not timed"
    validating = plan.validation * plan.cost.forward / plan.world / plan.rate
    every = plan.config.eval_every
    evaluations = 1 + (plan.config.steps - 1) // every if every else 1
    total = plan.config.steps * plan.seconds + evaluations * validating
    return (
        f"roughly {_seconds(plan.seconds)} a step, {duration(total)} with evaluations, if all went "
        f"at the {_amount(plan.rate)}FLOP/s that this network just reached here in a few seconds, "
        f"forward and backward on {plan.timed} images, not compiled"
    )


def _decoding(plan: Plan) -> str:
    images = plan.config.images
    if not plan.rate:
        return f"{images:,} images a step; the images/s needed are these divided by its seconds"
    rate = images / plan.seconds
    return (
        f"{_count(rate)} images/s ({_count(rate / plan.world)} on a rank) at that speed; "
        f"at another, {images:,} divided by the seconds of a step"
    )


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _amount(value: float) -> str:
    """Three digits, a space and an SI prefix: ``4.09 G``."""
    for letter, size in zip("EPTGMk", (1e18, 1e15, 1e12, 1e9, 1e6, 1e3), strict=True):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "
