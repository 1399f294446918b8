"""MPL-pytorch's step written out with plain tensors and no module, optimizer or loss of anybody.

K1 to K7 of its main.py: labeled and consistency loss of the teacher, hard labels of the weak view,
student's update, average, labeled loss of the moved student, h = new - old, teacher's update.
"""

import math
from typing import Any

import torch
from torch import Tensor

Net = dict[str, Tensor]  # weights with gradient, and statistics without
BASE: dict[str, Any] = {
    "D": 5, "H": 8, "C": 4, "BL": 5, "mu": 2, "steps": 6, "total_steps": 6, "warmup": 2, "wait": 1,
    "t_lr": 0.1, "s_lr": 0.2, "momentum": 0.9, "nesterov": True, "wd": 1e-3, "ls": 0.1, "T": 0.8,
    "thr": 0.35, "lam": 3.0, "uda_steps": 4, "ema": 0.9, "clip": 1e9,
}  # fmt: skip


def recorded(seed: int = 0, **changed: Any) -> dict[str, Any]:
    """A file's content: random weights and batches, and four runs of them."""
    cfg = {**BASE, **changed}
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    D, H, C, L, U = cfg["D"], cfg["H"], cfg["C"], cfg["BL"], cfg["BL"] * cfg["mu"]
    nets = {
        name: [0.8 * draw(H, D), 0.3 * draw(H), 0.8 * draw(C, H), 0.3 * draw(C)]
        for name in ("teacher", "student")
    }
    batches = []
    for _ in range(cfg["steps"]):
        xw = draw(U, D)
        y = torch.randint(C, (L,), generator=g)
        batches.append({"xl": draw(L, D), "y": y, "xw": xw, "xs": xw + 0.5 * draw(U, D)})
    runs = {
        f"bn={norm},sign={sign}": run(cfg, nets, batches, norm, sign)
        for norm in (False, True)
        for sign in ("kekmodel", "correct")
    }
    content: dict[str, Any] = _listed(
        {"cfg": cfg, "data": {**nets, "batches": batches}, "runs": runs}
    )
    return content


def run(
    cfg: dict[str, Any],
    nets: dict[str, list[Tensor]],
    batches: list[Net],
    norm: bool,
    sign: str,
) -> dict[str, Any]:
    """Log and last weights of one run."""
    teacher, student = (_net(nets[n], norm) for n in ("teacher", "student"))
    average = {k: v.detach().clone() for k, v in student.items()}
    velocity: list[Net] = [{}, {}]
    log = [
        step(
            cfg,
            batch,
            t,
            (teacher, student, average),
            velocity,
            1.0 if sign == "kekmodel" else -1.0,
        )
        for t, batch in enumerate(batches)
    ]
    nets_after = {"teacher_final": teacher, "student_final": student, "ema_final": average}
    return {"log": log, **nets_after}


def step(
    cfg: dict[str, Any],
    batch: Net,
    t: int,
    nets: tuple[Net, Net, Net],
    velocity: list[Net],
    sign: float,
) -> dict[str, Any]:
    """One step; the three networks change in place."""
    teacher, student, average = nets
    L, U = cfg["BL"], cfg["BL"] * cfg["mu"]
    z = forward(teacher, torch.cat([batch["xl"], batch["xw"], batch["xs"]]))  # K1
    z_l, z_w, z_s = z.split([L, U, U])
    t_loss_l = ce(z_l, one_hot(batch["y"], cfg["C"]), cfg["ls"])
    q = (z_w.detach() / cfg["T"]).softmax(1)  # K2
    sure, label = q.max(1)
    mask = (sure >= cfg["thr"]).double()
    t_loss_u = (mask * -(q * z_s.log_softmax(1)).sum(1)).mean()
    ramp = min(1.0, (t + 1) / cfg["uda_steps"]) if cfg["uda_steps"] else 1.0
    w = cfg["lam"] * ramp

    s_l, s_s = forward(student, torch.cat([batch["xl"], batch["xs"]])).split([L, U])  # K3
    old = ce(s_l.detach(), one_hot(batch["y"], cfg["C"]), 0.0)
    s_loss = ce(s_s, one_hot(label, cfg["C"]), cfg["ls"])
    s_lr, t_lr = cfg["s_lr"] * rate(cfg, t, cfg["wait"]), cfg["t_lr"] * rate(cfg, t, 0)
    s_norm = descend(cfg, student, s_loss, s_lr, velocity[1])  # K4
    for key, value in average.items():
        new_value = student[key].detach()
        moved = value.mul(cfg["ema"]) + (1.0 - cfg["ema"]) * new_value
        average[key] = moved if student[key].requires_grad else new_value.clone()

    with torch.no_grad():
        new = ce(forward(student, batch["xl"]), one_hot(batch["y"], cfg["C"]), 0.0)  # K5
    h = sign * (new - old)  # K6
    t_loss_mpl = h * ce(z_s, one_hot(z_s.detach().argmax(1), cfg["C"]), 0.0)  # K7
    t_loss = t_loss_l + w * t_loss_u + t_loss_mpl
    t_norm = descend(cfg, teacher, t_loss, t_lr, velocity[0])
    row = {
        "step": t, "s_lr": s_lr, "t_lr": t_lr, "uda_weight": w, "mask": mask.mean(), "hard": label,
        "t_loss_l": t_loss_l, "t_loss_u": t_loss_u, "s_loss_l_old": old, "s_loss": s_loss,
        "s_grad_norm": s_norm, "s_loss_l_new": new, "dot_product": h, "t_loss_mpl": t_loss_mpl,
        "t_loss": t_loss, "t_grad_norm": t_norm,
    }  # fmt: skip
    for name, net in zip(("teacher", "student", "ema"), nets, strict=True):
        flat = torch.cat([net[k].reshape(-1) for k, p in teacher.items() if p.requires_grad])
        row[f"{name}_sum_sumsq"] = torch.stack([flat.sum(), (flat * flat).sum()])
    return row


def forward(net: Net, x: Tensor) -> Tensor:
    """Logits; batch norm by the batch, whose running statistics move by 0.001."""
    hidden = x @ net["fc1.weight"].T + net["fc1.bias"]
    if "bn1.weight" in net:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
        free = (var * len(x) / (len(x) - 1)).detach()
        net["bn1.running_mean"] = 0.999 * net["bn1.running_mean"] + 0.001 * mean.detach()
        net["bn1.running_var"] = 0.999 * net["bn1.running_var"] + 0.001 * free
        net["bn1.num_batches_tracked"] = net["bn1.num_batches_tracked"] + 1
        hidden = (hidden - mean) / (var + 1e-5).sqrt() * net["bn1.weight"] + net["bn1.bias"]
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    return hidden @ net["fc2.weight"].T + net["fc2.bias"]


def descend(cfg: dict[str, Any], net: Net, loss: Tensor, lr: float, velocity: Net) -> Tensor:
    """Clipped SGD with momentum; returns the norm before clipping."""
    names = [k for k, p in net.items() if p.requires_grad]
    gradient = dict(zip(names, torch.autograd.grad(loss, [net[k] for k in names]), strict=True))
    norm = torch.stack([(g * g).sum() for g in gradient.values()]).sum().sqrt()
    factor = min(1.0, cfg["clip"] / (float(norm) + 1e-6)) if cfg["clip"] else 1.0
    for key in names:
        g = factor * gradient[key]
        if "bn" not in key:
            g = g + cfg["wd"] * net[key].detach()
        v = velocity[key] = cfg["momentum"] * velocity.get(key, torch.zeros(())) + g
        move = g + cfg["momentum"] * v if cfg["nesterov"] else v
        net[key] = (net[key].detach() - lr * move).requires_grad_()
    return norm


def rate(cfg: dict[str, Any], t: int, wait: int) -> float:
    """Share of the peak learning rate."""
    first: int = wait + cfg["warmup"]
    if t < wait:
        return 0.0
    if t < first:
        return t / first
    progress: float = (t - first) / max(1, cfg["total_steps"] - first)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def ce(z: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy with smoothed distributions."""
    target = (1.0 - label_smoothing) * target + label_smoothing / z.shape[1]
    return -(target * (z - z.logsumexp(1, keepdim=True))).sum(1).mean()


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Float64 rows."""
    return torch.eye(classes, dtype=torch.float64)[label]


def _net(first: list[Tensor], norm: bool) -> Net:
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    net = {k: v.clone().requires_grad_() for k, v in zip(names, first, strict=True)}
    if norm:
        one, zero = torch.ones_like(net["fc1.bias"]), torch.zeros_like(net["fc1.bias"])
        net |= {
            "bn1.weight": one.clone().requires_grad_(),
            "bn1.bias": zero.clone().requires_grad_(),
        }
        net |= {"bn1.running_mean": zero.clone(), "bn1.running_var": one.clone()}
        net["bn1.num_batches_tracked"] = torch.tensor(0)
    return net


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_listed(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value
