"""The dry run itself: reads the data's manifest, tries the network on a few images, and tells."""

import os

import torch
from torch import nn

from mpl_fast import models
from mpl_fast.config import RunConfig
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.distributed import DistEnv
from mpl_fast.dry_run import estimate
from mpl_fast.dry_run.network import measure, seconds_per_image
from mpl_fast.dry_run.rows import count
from mpl_fast.dry_run.table import Plan, table
from mpl_fast.training.build import check_batches, count_classes, resolve_epochs, uses_bf16

PROBED = {"cuda": 64, "cpu": 8}  # images in the pass that is timed, at the most


def dry_run(config: RunConfig) -> int:
    """Prints what the run would take, on rank 0; no rank waits for another and nothing is written.

    Raises `UserError` where training would, as far as can be told without the run directory.
    """
    manifest = read_manifest(config.data.root)
    config = resolve_epochs(config, manifest)
    classes = count_classes(config, manifest)
    dist_env = _place(config)
    check_batches(config, manifest, dist_env)
    if dist_env.is_rank0:
        torch.manual_seed(config.seed)
        print(table(_plan(config, manifest, classes, dist_env)), flush=True)
    return 0


def _plan(config: RunConfig, manifest: Manifest, classes: int, dist_env: DistEnv) -> Plan:
    here = dist_env.device.type == "cpu" or torch.cuda.is_available()
    bf16, side = uses_bf16(config, dist_env.device), config.data.image_size
    device = dist_env.device if here else torch.device("cpu")
    labeled = config.labeled_batch // dist_env.world
    unlabeled = config.unlabeled_images // dist_env.world
    rows = count(
        config.algorithm,
        labeled,
        unlabeled,
        steps=config.steps,
        microbatches=config.microbatches,
    )
    compiled = config.compile != "off"
    cost = measure(_network(config, classes), side, device=device, bf16=bf16, compiled=compiled)
    probed, rate = max(2, min(PROBED[device.type], rows.largest)), 0.0
    if here:
        new = _network(config, classes)
        each = seconds_per_image(new, side, probed, device=device, bf16=bf16)
        rate = (cost.forward + cost.backward) / each
    graphs = config.cuda_graphs != "off"
    setting = estimate.Setting(config.algorithm, labeled, unlabeled, side, bf16, graphs)
    return Plan(
        config=config,
        world=dist_env.world,
        device=_name(dist_env.device) if here else "",
        device_bytes=_bytes(dist_env.device) if here else 0,
        bf16=bf16,
        cost=cost,
        rows=rows,
        flops=estimate.step_flops(rows, cost),
        memory=estimate.memory(setting, rows, cost),
        checkpoint=estimate.checkpoint_bytes(config.algorithm, cost),
        records=manifest.splits["unlabeled" if unlabeled else "labeled"].records,
        validation=manifest.splits["val"].records,
        rate=rate,
        probed=probed,
    )


def _place(config: RunConfig) -> DistEnv:
    """Where this process would train; other ranks are not asked."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    return DistEnv(rank, world, torch.device(device))


def _network(config: RunConfig, classes: int) -> nn.Module:
    """As it would be trained, but for its weights: pretrained ones cost what random ones do."""
    learner = estimate.learners(config.algorithm)[0]
    model = config.model
    return models.build(
        model.name, classes, learner.dropout, model.norm_momentum, frozen=model.frozen
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)
