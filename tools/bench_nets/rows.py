"""Times of a network's contestants as rows, beside the limits of the machine."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from tools.bench.clock import Spread, ratio, spread
from tools.bench.limits import copies, products
from tools.bench.report import Row
from tools.bench_nets.contestants import BASE, BEST, Contestant
from tools.bench_nets.setting import Setting
from tools.bench_nets.work import Work

TARGET, TARGET_NETWORK, TARGET_GPUS = 3000.0, ("resnet50", 224), ("H100", "H200")


class Limits(NamedTuple):
    """Of the machine: FLOP/s in each precision, and bytes/s; and its GPU's name."""

    fp32: Spread
    bf16: Spread
    copy: Spread
    gpu: str | None = None

    def flops(self, *, bf16: bool) -> float:
        """The best FLOP/s that was seen."""
        return (self.bf16 if bf16 else self.fp32).high


def limits(device: torch.device, *, small: bool) -> Limits:
    """Measures them."""
    fp32, bf16 = (products(device, t, small=small) for t in (torch.float32, torch.bfloat16))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Limits(fp32, bf16, copies(device, small=small), gpu)


def told(found: Limits) -> dict[str, dict[str, float]]:
    """The limits, for people and for JSON."""
    scaled = {
        "fp32 product, TFLOP/s": _scaled(found.fp32, 1e-12),
        "bf16 product, TFLOP/s": _scaled(found.bf16, 1e-12),
        "copy, GB/s": _scaled(found.copy, 1e-9),
    }
    return {name: one._asdict() for name, one in scaled.items()}


def work_rows(setting: Setting, work: Work) -> list[Row]:
    """Counts that no time is in."""
    rows = [_count(f"{setting.label}: arithmetic", work.flops / 1e9, "GFLOP/img")]
    for name, itemsize in (("fp32", 4), ("bf16", 2)):
        moved = work.bytes(itemsize, setting.batch)
        if moved is not None:
            rows.append(_count(f"{setting.label}: memory, {name}", moved / 1e6, "MB/img"))
    return rows


def peak_row(setting: Setting, one: Contestant, peak: int) -> Row:
    """What a step takes of the GPU's memory."""
    return _count(f"{setting.label}: {one.name}, peak memory", peak / 2**20, "MiB")


def time_rows(
    setting: Setting, one: Contestant, times: Mapping[str, list[float]], work: Work, limits: Limits
) -> list[Row]:
    """Images a second, milliseconds, FLOP/s, and how many times faster than the first one."""
    seconds, name = times[one.name], f"{setting.label}: {one.name}"
    rates = spread([setting.batch * setting.steps / t for t in seconds])
    limit = roof(work, setting.batch, limits, bf16=one.bf16)
    flops = limits.flops(bf16=one.bf16) / 1e12
    rows = [
        Row(name, rates, "img/s", "higher", limit=limit, target=target(setting, one, limits.gpu)),
        Row(f"{name}, step", spread([1e3 * t / setting.steps for t in seconds]), "ms"),
        Row(f"{name}, speed", _scaled(rates, work.flops / 1e12), "TFLOP/s", "higher", limit=flops),
    ]
    if one.name != BASE.name and BASE.name in times:
        gain = ratio(times, BASE.name, one.name)
        rows.append(Row(f"{name} / {BASE.name}", gain, "times", "higher", steady=True))
    return rows


def roof(work: Work, batch: int, limits: Limits, *, bf16: bool) -> float:
    """Images a second if arithmetic or memory, whichever takes longer, were always at its best."""
    compute = limits.flops(bf16=bf16) / work.flops
    moved = work.bytes(2 if bf16 else 4, batch)
    return compute if moved is None else min(compute, limits.copy.high / moved)


def target(setting: Setting, one: Contestant, gpu: str | None) -> float | None:
    """The project's, for what training uses on the GPUs that it was set for."""
    known = gpu is not None and any(name in gpu for name in TARGET_GPUS)
    meant = one == BEST and (setting.model, setting.image_size) == TARGET_NETWORK
    return TARGET if known and meant else None


def _count(name: str, value: float, unit: str) -> Row:
    return Row(name, spread([value]), unit, steady=True)


def _scaled(found: Spread, factor: float) -> Spread:
    return Spread(found.median * factor, found.low * factor, found.high * factor, found.n)
