"""`train.py --dry-run`: reads the manifest, measures the network on a few images, prints text."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mpl_fast.config import RunConfig
from mpl_fast.config.cards import CARDS, Card
from mpl_fast.config.dry_run import DryRunConfig
from mpl_fast.data.manifest import Manifest, Split, read_manifest
from mpl_fast.distributed import DistEnv, local_rank, machines, ranks_of_launcher
from mpl_fast.dry_run import estimate
from mpl_fast.dry_run.network import NetworkCost, measure, seconds_per_image
from mpl_fast.dry_run.remedies import remedies
from mpl_fast.dry_run.roofline import Job, Machine, forecast
from mpl_fast.dry_run.table import Plan, table
from mpl_fast.dry_run.trace import trace
from mpl_fast.training.auto import resolve, uses_bf16
from mpl_fast.training.build import build_network, check_batches, count_classes, resolve_epochs
from mpl_fast.training.rows import StepRows, count
from mpl_fast.training.trial import check_training

TIMED = {"cuda": 64, "cpu": 8}  # maximum of images in the pass that is timed
LIBRARIES = 5e9  # bytes of a card that CUDA, NCCL and DALI take; assumed


def dry_run(config: RunConfig, dry: DryRunConfig) -> int:
    """Prints the estimate of a run on rank 0, without communication between ranks or writes.

    Raises the `UserError` of training, except those about the run directory.
    """
    manifest = _manifest_of(dry.counts) if dry.records else read_manifest(config.data.root)
    config = resolve_epochs(config, manifest)
    classes = count_classes(config, manifest)
    dist_env = _dist_env(config, dry.ranks)
    check_batches(config, manifest, dist_env)
    check_training(config, classes, dist_env.world)
    if dist_env.is_rank0:
        torch.manual_seed(config.seed)
        print(table(_plan(config, manifest, classes, dist_env, dry)), flush=True)
    return 0


def _plan(
    given: RunConfig, manifest: Manifest, classes: int, dist_env: DistEnv, dry: DryRunConfig
) -> Plan:
    config, _ = resolve(given, dist_env.device, _nodes(dry))
    world, card = dist_env.world, CARDS.get(dry.card)
    here = not card and (dist_env.device.type == "cpu" or torch.cuda.is_available())
    bf16, side = uses_bf16(config, dist_env.device), config.data.image_size
    device = dist_env.device if here else torch.device("cpu")
    name, size = _name_and_bytes(device) if here else ("", 0)
    rows = _rows(config, world)
    compiled = config.compile != "off"
    cost = measure(_network(config, classes), side, device=device, bf16=bf16, compiled=compiled)
    timed, rate = max(2, min(TIMED[device.type], rows.largest)), 0.0
    if here:
        new = _network(config, classes)
        each = seconds_per_image(new, side, timed, device=device, bf16=bf16)
        rate = (cost.forward + cost.backward) / each
    plan = Plan(
        config=config,
        world=world,
        device=name,
        device_bytes=size,
        bf16=bf16,
        cost=cost,
        rows=rows,
        memory=_memory(config, world, cost, bf16),
        checkpoint=estimate.checkpoint_bytes(config.algorithm, cost),
        records=manifest.splits["unlabeled" if config.unlabeled_images else "labeled"].records,
        validation=manifest.splits["val"].records,
        rate=rate,
        timed=timed,
    )
    return _on_card(plan, given, card, manifest, classes, dist_env, dry) if card else plan


def _on_card(
    plan: Plan,
    given: RunConfig,
    card: Card,
    manifest: Manifest,
    classes: int,
    dist_env: DistEnv,
    dry: DryRunConfig,
) -> Plan:
    """The plan with the time on a card that is not here, and what would fit its memory."""
    config, world, bf16 = plan.config, plan.world, plan.bf16
    compiled, side = config.compile != "off", config.data.image_size
    network = _network(config, classes)
    norms = 0
    if config.model.norm == "sync":
        kind = nn.modules.batchnorm._BatchNorm
        norms = sum(isinstance(module, kind) for module in network.modules())
    passes = trace(network, side, bf16=bf16, compiled=compiled)
    job = Job(config, plan.rows, plan.cost, passes, bf16, norms)
    machine = Machine(card, world, _nodes(dry), dry.network_gbps * 1e9 / 8)
    have = int(card.memory - LIBRARIES)

    def bytes_of(changed: RunConfig, ranks: int) -> float:
        """On a rank. Raises `ConfigError` for a config that cannot be trained."""
        check_batches(changed, manifest, replace(dist_env, world=ranks))
        changed, _ = resolve(changed, dist_env.device, _nodes(dry))
        return sum(_memory(changed, ranks, plan.cost, bf16))

    return replace(
        plan,
        device=card.name,
        device_bytes=have,
        remedies=remedies(given, world, bytes_of, have) if sum(plan.memory) > have else (),
        forecast=forecast(job, machine, plan.validation),
        price=dry.price_per_gpu_hour,
    )


def _nodes(dry: DryRunConfig) -> int:
    return dry.nodes if dry.ranks else machines()


def _rows(config: RunConfig, world: int) -> StepRows:
    return count(
        config.algorithm,
        config.labeled_batch // world,
        config.unlabeled_images // world,
        steps=config.steps,
        microbatches=config.microbatches,
    )


def _memory(config: RunConfig, world: int, cost: NetworkCost, bf16: bool) -> estimate.Memory:
    """On each of `world` ranks."""
    setting = estimate.Setting(
        config.algorithm,
        labeled=config.labeled_batch // world,
        unlabeled=config.unlabeled_images // world,
        side=config.data.image_size,
        bf16=bf16,
        graphs=config.cuda_graphs != "off",
    )
    return estimate.memory(setting, _rows(config, world), cost)


def _manifest_of(counts: dict[str, int]) -> Manifest:
    """A manifest of records that are not here, of which only the numbers are known."""
    splits = {
        name: Split(counts[name], (), Path(), Path(), 0) for name in ("labeled", "unlabeled", "val")
    }
    classes = tuple(map(str, range(counts["classes"])))
    return Manifest(Path("--records"), classes, splits, content="")


def _dist_env(config: RunConfig, ranks: int) -> DistEnv:
    """As `distributed.init` returns, without a process group, and for CUDA also without a GPU.

    With `ranks`, one process is rank 0 of so many.
    """
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    rank, world = ranks_of_launcher()
    return DistEnv(rank, ranks or world, device)


def _network(config: RunConfig, classes: int) -> nn.Module:
    """The network of the run with random weights, which cost what pretrained ones do."""
    learner = estimate.learners(config.algorithm)[0]
    return build_network(config, classes, learner.dropout, drop_path=learner.drop_path)


def _name_and_bytes(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "cpu", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory
