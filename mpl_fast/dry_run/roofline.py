"""Time of a step on a GPU that is not here, between two bounds.

Each kernel takes the longer of its FLOPs and its bytes at shares of the card's peak rates (Williams
et al., Roofline, CACM 2009). The optimistic shares are the best that others have measured, the
pessimistic ones about half of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from mpl_fast.config import RunConfig
from mpl_fast.config.cards import Card
from mpl_fast.dry_run.estimate import PRODUCTS_OF_A_TANGENT, learners, moments
from mpl_fast.dry_run.network import NetworkCost
from mpl_fast.dry_run.trace import Kernel, Passes
from mpl_fast.training.rows import StepRows

OTHER_LAUNCHES = 50  # of an update: losses, optimizer, statistics (tests/null_gpu/launches.json)
FLAT = 6  # times that a gradient is read or written to be exchanged as one tensor: in, /, out


@dataclass(frozen=True)
class Bound:
    """What a GPU and its host reach."""

    compute: float
    """Share of the peak FLOP/s."""
    memory: float
    """Share of the memory's peak bandwidth."""
    links: float
    """Share of the links' and the network's peak bandwidth."""
    kernel: float
    """Seconds that any kernel takes."""
    launch: float
    """Seconds of the host for a launch, unless it is part of a CUDA graph."""


# compute: products of 4 to 15 thousand rows reach 0.87 on an A100, 0.80 on an H100 and 0.78 on a
# B200; links: NCCL's ring 0.78 on an A100, 0.82 on an H200 (stas00/ml-engineering, compute and
# network). memory, kernel: Triton's pointwise kernels on an H100 (pytorch/ao, roofline_utils.py).
# launch: assumed.
BOUNDS = (Bound(0.87, 0.92, 0.82, 2e-6, 5e-6), Bound(0.40, 0.50, 0.40, 4e-6, 15e-6))


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in nodes of equal size."""

    card: Card
    ranks: int
    nodes: int
    network: float
    """Bytes a second from one node to the others."""


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    passes: float
    """Through the networks."""
    updates: float
    """Optimizer, weight average, and copies of gradients for the exchange."""
    exchange: float
    """Between ranks, apart from what passes hide."""
    host: float
    """Of launches; the GPU waits for the host if it takes longer than all the others."""

    @property
    def total(self) -> float:
        """Of all."""
        return max(self.passes + self.updates, self.host) + self.exchange


@dataclass(frozen=True)
class Job:
    """What each rank does in a step."""

    config: RunConfig
    rows: StepRows
    cost: NetworkCost
    passes: Passes
    bf16: bool


class Forecast(NamedTuple):
    """Between the optimistic and the pessimistic bound, in this order."""

    machine: Machine
    steps: list[Step]
    evaluations: list[float]
    """Seconds of one pass over the validation images."""


def forecast(job: Job, machine: Machine, validation: int) -> Forecast:
    """For a run that evaluates on so many images."""
    images = validation / machine.ranks
    batch = min(images, job.config.eval_batch / machine.ranks)
    forward = job.passes.forward
    evaluations = [
        images / batch * pass_seconds(forward, batch, job.bf16, machine.card, bound)
        for bound in BOUNDS
    ]
    return Forecast(machine, [step_seconds(job, machine, b) for b in BOUNDS], evaluations)


def step_seconds(job: Job, machine: Machine, bound: Bound) -> Step:
    """Time of a step, without the input pipeline."""
    rows, cost, (forward, backward) = job.rows, job.cost, job.passes

    def seconds(kernels: list[Kernel], images: int, passes: int) -> float:
        each = images / max(passes, 1)
        return passes * pass_seconds(kernels, each, job.bf16, machine.card, bound)

    back = seconds(backward, rows.backward, rows.backward_passes)
    tangent = PRODUCTS_OF_A_TANGENT * seconds(forward, rows.tangent, rows.tangent_passes)
    exchanges = (rows.updates + rows.gradients) * (machine.ranks > 1)
    exchange = exchanges * all_reduce_seconds(cost.trained_bytes, machine, bound)
    moved = update_bytes(job)
    if job.config.grad_sync == "ddp":
        exchange = max(0.0, exchange - back)
    else:
        moved += FLAT * exchanges * cost.trained_bytes
    return Step(
        passes=seconds(forward, rows.forward, rows.forward_passes) + back + tangent,
        updates=moved / (machine.card.bandwidth * bound.memory),
        exchange=exchange,
        host=launches(job) * bound.launch,
    )


def pass_seconds(
    kernels: list[Kernel], images: float, bf16: bool, card: Card, bound: Bound
) -> float:
    """Time of one pass over so many images."""
    flops = (card.bf16 if bf16 else card.tf32) * bound.compute
    bandwidth = card.bandwidth * bound.memory
    return sum(
        max(
            kernel.flops * images / flops,
            (kernel.bytes * images + kernel.fixed) / bandwidth,
            kernel.launches * bound.kernel,
        )
        for kernel in kernels
    )


def all_reduce_seconds(size: int, machine: Machine, bound: Bound) -> float:
    """Time of a sum of `size` bytes over all ranks, as NCCL does it: reduced within each node, then
    between nodes, each GPU its share, then copied within each node."""
    nodes, gpus = machine.nodes, machine.ranks // machine.nodes
    inside = 2 * (gpus - 1) / gpus * size / machine.card.links
    between = 2 * (nodes - 1) / nodes * size / machine.network
    return (inside + between) / bound.links


def update_bytes(job: Job) -> float:
    """Bytes that optimizers and averages move in a step: an update reads the gradient for its norm
    and again, reads and writes weights and moments; an average reads two tensors, writes one."""
    cost, rows, found = job.cost, job.rows, 0.0
    trained = learners(job.config.algorithm)
    for learner in trained:
        updates = rows.updates / len(trained)
        found += updates * (4 + 2 * moments(learner)) * cost.trained_bytes
        found += 3 * cost.bytes * (learner.ema > 0)
    return found


def launches(job: Job) -> int:
    """Launches of the host in a step."""
    rows = job.rows
    graphs = job.config.cuda_graphs
    if graphs == "step":
        return 1
    counts = (
        (job.passes.forward, rows.forward_passes + PRODUCTS_OF_A_TANGENT * rows.tangent_passes),
        (job.passes.backward, rows.backward_passes),
    )
    each = [1 if graphs == "model" else sum(k.launches for k in some) for some, _ in counts]
    found = sum(a * passes for a, (_, passes) in zip(each, counts, strict=True))
    return found + OTHER_LAUNCHES * rows.updates
