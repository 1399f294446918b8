"""The step of each algorithm in plain PyTorch, from its definition, for networks without dropout.

Each returns the values that the step must log. Of this project they use only the configs, schedules
included, and the draws of mixup.
"""

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mpl_fast.batch import Batch
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    NoisyStudentConfig,
    RolePlayConfig,
    SMPLConfig,
    UDAConfig,
)
from mpl_fast.config.algorithms import ramped
from mpl_fast.learner import Learner, rng

SEED = 11  # of drawn numbers
Values = dict[str, Tensor]
Logits = tuple[Tensor, Tensor, Tensor]  # of the labeled, weak and strong images


class PlainLearner:
    """A learner's network with SGD and a weight average, on the CPU."""

    def __init__(self, learner: Learner) -> None:
        self.config, self.steps = learner.config, learner.steps
        self.network, self.average = (
            copy.deepcopy(learner.network).cpu().train() for _ in range(2)
        )
        self.velocity: Values = {
            name: learner.optimizer.state[parameter]
            .get("momentum_buffer", torch.zeros_like(parameter))
            .to("cpu", copy=True)
            for name, parameter in learner.network.named_parameters()
        }

    def trained(self, t: int) -> dict[str, nn.Parameter]:
        """All parameters, or those of the last of the layers in a sequence."""
        last = f"{len(list(self.network.children())) - 1}."
        delayed = t < self.config.delay_steps + self.config.trunk_delay_steps
        only = last if delayed and self.config.trunk_delay_steps else ""
        return {n: p for n, p in self.network.named_parameters() if n.startswith(only)}

    def moved(self, loss: Tensor, t: int) -> tuple[Values, Values]:
        """Weights and momentum after a step, as functions of what the loss depends on."""
        config, named = self.config, self.trained(t)
        gradient = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        norm = float(torch.cat([g.detach().flatten() for g in gradient]).norm())
        limit = config.max_grad_norm
        clipping = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        weights, velocity = dict(self.network.named_parameters()), dict(self.velocity)
        for (name, p), g in zip(named.items(), gradient, strict=True):
            g = clipping * g + config.weight_decay * p.detach() * (p.ndim > 1)
            velocity[name] = config.momentum * self.velocity[name] + g
            ahead = g + config.momentum * velocity[name] if config.nesterov else velocity[name]
            weights[name] = p.detach() - config.lr_at(t, self.steps) * ahead
        return weights, velocity

    @torch.no_grad()
    def step(self, loss: Tensor, t: int) -> None:
        with torch.enable_grad():
            weights, velocity = self.moved(loss, t)
        self.velocity = {name: v.detach() for name, v in velocity.items()}
        for name, p in self.network.named_parameters():
            p.copy_(weights[name])

    @torch.no_grad()
    def end_step(self, t: int) -> None:
        decay = min(self.config.ema, (1 + t) / (10 + t))
        for a, p in zip(self.average.parameters(), self.network.parameters(), strict=True):
            a.mul_(decay).add_(p, alpha=1 - decay)
        for a, b in zip(self.average.buffers(), self.network.buffers(), strict=True):
            if b.is_floating_point():
                a.mul_(decay).add_(b, alpha=1 - decay)


def labeled_loss(network: nn.Module, data: Batch, weights: Values | None = None) -> Tensor:
    """Cross-entropy without dropout, normalized by these images."""
    evaluated = copy.deepcopy(network).eval()
    for module in evaluated.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    logits: Tensor = functional_call(evaluated, weights or {}, (data.labeled,))
    return F.cross_entropy(logits, data.labels)


def soft_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row with smoothed probabilities ``(N, C)``."""
    target = (1 - smoothing) * target + smoothing / logits.shape[-1]
    return -(target * logits.log_softmax(-1)).sum(-1)


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(labels, like.shape[-1]).to(like.dtype)


def view_logits(network: nn.Module, data: Batch, bn_batches: str) -> Logits:
    """Normalized together, or the weak images apart."""
    images, sizes = (data.labeled, data.weak, data.strong), [len(data.labeled), len(data.weak)]
    if bn_batches == "joint":
        z_l, z_w, z_s = network(torch.cat(images)).split([*sizes, sizes[1]])
    else:
        z_w = network(data.weak)
        z_l, z_s = network(torch.cat(images[::2])).split(sizes)
    return z_l, z_w, z_s


def right_and_known(label: Tensor, data: Batch) -> Tensor:
    known = data.truth != -1
    return torch.stack([(label[known] == data.truth[known]).sum(), known.sum()]).double()


def uda_loss(
    logits: Logits, data: Batch, consistency: ConsistencyConfig, smoothing: float, t: int
) -> tuple[Tensor, Values]:
    z_l, z_w, z_s = logits
    target = (z_w.detach() / consistency.temperature).softmax(-1)
    mask = (target.amax(-1) >= consistency.threshold).double()
    labeled = F.cross_entropy(z_l, data.labels, label_smoothing=smoothing)
    if consistency.measure == "cosine":
        sharp = z_s.softmax(-1)
        distance = (mask * (1 - F.cosine_similarity(sharp, target, dim=-1))).mean()
    else:
        distance = (mask * soft_loss(z_s, target)).mean()
    loss = labeled + ramped(consistency.weight, consistency.ramp, t) * distance
    values = {"loss/labeled": labeled, "loss/consistency": distance, "mask_rate": mask.mean()}
    return loss, {**values, "accuracy/pseudo": right_and_known(z_w.argmax(-1), data)}


def uda(config: UDAConfig, learner: PlainLearner, data: Batch, t: int) -> Values:
    logits = view_logits(learner.network, data, config.bn_batches)
    loss, values = uda_loss(logits, data, config.consistency, config.label_smoothing, t)
    learner.step(loss, t)
    return values


class FixMatchState:
    """The moving averages of alignment and of adaptive thresholds."""

    def __init__(self, classes: int) -> None:
        self.labels, self.predictions, self.by_class = (
            torch.full((classes,), 1 / classes, dtype=torch.float64) for _ in range(3)
        )
        self.confidence = torch.tensor(1 / classes, dtype=torch.float64)


def fixmatch(
    config: FixMatchConfig, learner: PlainLearner, data: Batch, t: int, state: FixMatchState
) -> Values:
    if config.targets == "average":
        z_w = copy.deepcopy(learner.average).eval()(data.weak)
        images, sizes = [data.labeled, data.strong], [len(data.labeled), len(data.strong)]
        z_l, z_s = learner.network(torch.cat(images)).split(sizes)
    else:
        z_l, z_w, z_s = view_logits(learner.network, data, config.bn_batches)
    probability, decay = z_w.detach().softmax(-1), config.average_decay
    if config.alignment:
        share = one_hot(data.labels, z_l).mean(0)
        state.labels = decay * state.labels + (1 - decay) * share
        state.predictions = decay * state.predictions + (1 - decay) * probability.mean(0)
        probability = probability * state.labels / state.predictions
        probability = probability / probability.sum(-1, keepdim=True)
    confidence, label = probability.max(-1)
    threshold = torch.tensor(config.threshold, dtype=torch.float64)
    if config.thresholds == "adaptive":
        state.confidence = decay * state.confidence + (1 - decay) * confidence.mean()
        state.by_class = decay * state.by_class + (1 - decay) * probability.mean(0)
        threshold = (state.by_class / state.by_class.max() * state.confidence)[label]
    mask = (confidence >= threshold).double()
    labeled = F.cross_entropy(z_l, data.labels, label_smoothing=config.label_smoothing)
    target = one_hot(label, z_s)
    if config.labels == "soft":
        sharp = probability ** (1 / config.temperature)
        target = sharp / sharp.sum(-1, keepdim=True)
    # The mean is over all images, confident or not.
    unlabeled = (mask * soft_loss(z_s, target)).mean()
    learner.step(labeled + config.weight * unlabeled, t)
    return {
        "loss/labeled": labeled,
        "loss/consistency": unlabeled,
        "mask_rate": mask.mean(),
        "confidence": confidence.mean(),
        "accuracy/pseudo": right_and_known(label, data),
    }


def noisy_student(
    config: NoisyStudentConfig, teacher: nn.Module, learner: PlainLearner, data: Batch, t: int
) -> Values:
    z_l, z_s = learner.network(torch.cat([data.labeled, data.strong])).split(
        [len(data.labeled), len(data.strong)]
    )
    taught = teacher.eval()(data.weak).detach()
    confidence, label = taught.softmax(-1).max(-1)
    mask = (confidence >= config.threshold).double()
    labeled = F.cross_entropy(z_l, data.labels, label_smoothing=config.label_smoothing)
    if config.labels == "soft":
        rows = soft_loss(z_s, (taught / config.temperature).softmax(-1))
    else:
        rows = soft_loss(z_s, one_hot(label, z_s), config.label_smoothing)
    student = (mask * rows).mean()
    learner.step(labeled + config.weight * student, t)
    return {
        "loss/labeled": labeled,
        "loss/student": student,
        "mask_rate": mask.mean(),
        "confidence": confidence.mean(),
        "accuracy/labeled": (z_l.argmax(-1) == data.labels).double().mean(),
        "accuracy/pseudo": right_and_known(label, data),
    }


def mpl(
    config: MPLConfig, teacher: PlainLearner, student: PlainLearner, data: Batch, t: int
) -> Values:
    """With feedback off, difference or exact, of which the last is autograd through the student's
    step."""
    kept = len(data.labels) - round(len(data.labels) * config.held_out)
    own = data._replace(labeled=data.labeled[:kept], labels=data.labels[:kept])
    held_out = data
    if config.held_out:
        held_out = data._replace(labeled=data.labeled[kept:], labels=data.labels[kept:])
    logits = view_logits(teacher.network, own, config.bn_batches)
    z = logits[1] if config.pseudo == "weak" else logits[2]
    exact = config.feedback == "exact"
    label = z.softmax(-1) if exact else one_hot(z.argmax(-1), z)
    taken = (z.detach().softmax(-1).amax(-1) >= config.label_threshold).double()

    rows = soft_loss(student.network(data.strong), label, config.label_smoothing)
    student_loss = (taken * rows).mean()
    old = labeled_loss(student.network, held_out)
    new = labeled_loss(student.network, held_out, student.moved(student_loss, t)[0])
    term = new if exact else (old - new).detach() * (taken * soft_loss(logits[2], label)).mean()
    loss, values = uda_loss(logits, own, config.consistency, config.label_smoothing, t)
    weight = ramped(config.feedback_weight, config.feedback_ramp, t)
    teacher.step(loss if config.feedback == "off" else loss + weight * term, t)
    student.step(student_loss, t)
    values["accuracy/pseudo"] = right_and_known(z.argmax(-1), data)
    values |= {"loss/student": student_loss, "loss/student_labeled": new}
    return values | ({"feedback": old - new} if config.feedback == "difference" else {})


def google(
    config: MPLConfig, teacher: PlainLearner, student: PlainLearner, data: Batch, t: int
) -> Values:
    """The student learns soft labels of the strong view. The teacher learns by UDA alone, whose
    ramp begins at 0: the feedback has no gradient."""
    logits = view_logits(teacher.network, data, "joint")
    z = student.network(torch.cat([data.strong, data.labeled]))[: len(data.strong)]
    target = logits[2].detach().softmax(-1)
    student_loss = soft_loss(z, target, config.label_smoothing).mean()
    student.step(student_loss, t)
    loss, values = uda_loss(logits, data, config.consistency, config.label_smoothing, t - 1)
    teacher.step(loss, t)
    return values | {"loss/student": student_loss}


def smpl(config: SMPLConfig, learner: PlainLearner, data: Batch, t: int) -> Values:
    """Feedback exact is autograd through the first update to its labels, and from the network's
    present labels to its weights."""
    exact = config.feedback == "exact"
    z = copy.deepcopy(learner.network)(data.weak).detach()
    label = z.softmax(-1).requires_grad_() if exact else one_hot(z.argmax(-1), z)
    student_loss = soft_loss(learner.network(data.strong), label, config.label_smoothing).mean()
    old = labeled_loss(learner.network, data)
    new = labeled_loss(learner.network, data, learner.moved(student_loss, t)[0])
    by_labels = torch.autograd.grad(new, label)[0] if exact else None
    learner.step(student_loss, t)

    logits = view_logits(learner.network, data, "joint")
    loss, values = uda_loss(logits, data, config.consistency, config.label_smoothing, t)
    if by_labels is not None:
        term = (by_labels * logits[1].softmax(-1)).sum()
    else:
        present = one_hot(logits[1].argmax(-1), z)
        term = (old - new).detach() * soft_loss(logits[2], present).mean()
    weight = ramped(config.feedback_weight, config.feedback_ramp, t)
    learner.step(loss if config.feedback == "off" else loss + weight * term, t)
    values |= {"loss/student": student_loss, "loss/student_labeled": new}
    return values | ({"feedback": old - new} if config.feedback == "difference" else {})


def corrected_labels(
    network: nn.Module, data: Batch, rate: float, trained: Collection[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Labels after a step along the gradient of the labeled loss, through the network's own step of
    rate 1 down mean ||f - y||^2, at y = f; and the labeled loss. None: all weights take that step.

    The published step, rate * 2 J g, is U times this meta-gradient.
    """
    evaluated = copy.deepcopy(network).eval()
    weights = {n: p for n, p in evaluated.named_parameters() if trained is None or n in trained}
    f = evaluated(data.weak).softmax(-1)
    y = f.detach().requires_grad_()
    consistency = (f - y).square().sum(-1).mean()
    gradients = torch.autograd.grad(consistency, list(weights.values()), create_graph=True)
    moved = {name: p - g for (name, p), g in zip(weights.items(), gradients, strict=True)}
    loss = F.cross_entropy(functional_call(evaluated, moved, (data.labeled,)), data.labels)
    (meta,) = torch.autograd.grad(loss, y)
    left = (y.detach() - len(data.weak) * rate * meta).clamp_min(0.0)
    return left / left.sum(-1, keepdim=True), loss.detach()


def metasemi(config: MetaSemiConfig, learner: PlainLearner, data: Batch, t: int) -> Values:
    """KL divergence of mixed images, or cross-entropy of labeled ones, and squared differences of
    the unlabeled ones; in training mode, in this order."""
    rate = config.label_rate or learner.config.lr_at(t, learner.steps)
    y, labeled = corrected_labels(learner.network, data, rate, learner.trained(t))
    if config.mixup:
        images, target = mixed(data, y, config.mixup, t)
        z = learner.network(images)
        fit = F.kl_div(z.log_softmax(-1), target, reduction="batchmean")
        entropy = torch.special.entr(target).sum(-1).mean()
    else:
        fit = F.cross_entropy(learner.network(data.labeled), data.labels)
        entropy = torch.zeros(())
    consistency = (learner.network(data.weak).softmax(-1) - y).square().sum(-1).mean()
    learner.step(fit + ramped(config.weight, config.ramp, t) * consistency, t)
    return {
        "loss/labeled": labeled,
        "loss/fit": fit + entropy,
        "loss/consistency": consistency,
        "confidence": y.amax(-1).mean(),
        "accuracy/pseudo": right_and_known(y.argmax(-1), data),
    }


def mixed(data: Batch, labels: Tensor, alpha: float, t: int) -> tuple[Tensor, Tensor]:
    """Unlabeled image i with labeled image i modulo their number."""
    share = rng.beta(len(data.weak), alpha, seed=SEED, step=t, device=torch.device("cpu"))
    images, targets = [], []
    for i, a in enumerate(share.tolist()):
        j = i % len(data.labels)
        images.append(a * data.labeled[j] + (1 - a) * data.weak[i])
        targets.append(a * one_hot(data.labels[j], labels) + (1 - a) * labels[i])
    return torch.stack(images), torch.stack(targets)


def step(
    config: AlgorithmConfig,
    learners: dict[str, PlainLearner],
    data: Batch,
    t: int,
    teacher: nn.Module | None = None,
    state: FixMatchState | None = None,
) -> Values:
    """The step of a config; `teacher`: a fixed one; `state`: of FixMatch, changed in place."""
    first, *others = learners.values()
    second = others[0] if others else first
    match config:
        case RolePlayConfig() if (t // config.swap_every) % 2:
            return mpl(config, second, first, data, t)
        case MPLConfig(feedback="parity_google"):
            return google(config, first, second, data, t)
        case MPLConfig():
            return mpl(config, first, second, data, t)
        case UDAConfig():
            return uda(config, first, data, t)
        case FixMatchConfig():
            assert state is not None
            return fixmatch(config, first, data, t, state)
        case NoisyStudentConfig():
            assert teacher is not None
            return noisy_student(config, teacher, first, data, t)
        case SMPLConfig():
            return smpl(config, first, data, t)
        case MetaSemiConfig():
            return metasemi(config, first, data, t)
    raise AssertionError(config)
