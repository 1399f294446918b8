"""`train.py --dry-run`: reads the manifest, measures the network on a few images, prints text."""

import torch
from torch import nn

from mpl_fast.config import RunConfig
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.distributed import DistEnv, local_rank, machines, ranks_of_launcher
from mpl_fast.dry_run import estimate
from mpl_fast.dry_run.network import measure, seconds_per_image
from mpl_fast.dry_run.table import Plan, table
from mpl_fast.training.auto import resolve
from mpl_fast.training.build import (
    build_network,
    check_batches,
    count_classes,
    resolve_epochs,
    uses_bf16,
)
from mpl_fast.training.rows import count
from mpl_fast.training.trial import check_training

TIMED = {"cuda": 64, "cpu": 8}  # maximum of images in the pass that is timed


def dry_run(config: RunConfig) -> int:
    """Prints the estimate of a run on rank 0, without communication between ranks or writes.

    Raises the `UserError` of training, except those about the run directory.
    """
    manifest = read_manifest(config.data.root)
    config = resolve_epochs(config, manifest)
    classes = count_classes(config, manifest)
    dist_env = _dist_env(config)
    check_batches(config, manifest, dist_env)
    check_training(config, classes, dist_env.world)
    config, _ = resolve(config, dist_env.device, machines())
    if dist_env.is_rank0:
        torch.manual_seed(config.seed)
        print(table(_plan(config, manifest, classes, dist_env)), flush=True)
    return 0


def _plan(config: RunConfig, manifest: Manifest, classes: int, dist_env: DistEnv) -> Plan:
    here = dist_env.device.type == "cpu" or torch.cuda.is_available()
    bf16, side = uses_bf16(config, dist_env.device), config.data.image_size
    device = dist_env.device if here else torch.device("cpu")
    setting = estimate.Setting(
        config.algorithm,
        labeled=config.labeled_batch // dist_env.world,
        unlabeled=config.unlabeled_images // dist_env.world,
        side=side,
        bf16=bf16,
        graphs=config.cuda_graphs != "off",
    )
    name, size = _name_and_bytes(device) if here else ("", 0)
    rows = count(
        config.algorithm,
        setting.labeled,
        setting.unlabeled,
        steps=config.steps,
        microbatches=config.microbatches,
    )
    compiled = config.compile != "off"
    cost = measure(_network(config, classes), side, device=device, bf16=bf16, compiled=compiled)
    timed, rate = max(2, min(TIMED[device.type], rows.largest)), 0.0
    if here:
        new = _network(config, classes)
        each = seconds_per_image(new, side, timed, device=device, bf16=bf16)
        rate = (cost.forward + cost.backward) / each
    return Plan(
        config=config,
        world=dist_env.world,
        device=name,
        device_bytes=size,
        bf16=bf16,
        cost=cost,
        rows=rows,
        memory=estimate.memory(setting, rows, cost),
        checkpoint=estimate.checkpoint_bytes(config.algorithm, cost),
        records=manifest.splits["unlabeled" if setting.unlabeled else "labeled"].records,
        validation=manifest.splits["val"].records,
        rate=rate,
        timed=timed,
    )


def _dist_env(config: RunConfig) -> DistEnv:
    """As `distributed.init` returns, without a process group, and for CUDA also without a GPU."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    return DistEnv(*ranks_of_launcher(), device)


def _network(config: RunConfig, classes: int) -> nn.Module:
    """The network of the run with random weights, which cost what pretrained ones do."""
    return build_network(config, classes, estimate.learners(config.algorithm)[0].dropout)


def _name_and_bytes(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "cpu", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory
