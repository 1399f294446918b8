"""A frozen trunk: only the classifier head learns, batch norm keeps its pretrained statistics."""

import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.models.head import head_prefixes


def freeze(network: nn.Module) -> None:
    """Leaves a gradient to the classifier head alone, and fixes every other batch norm.

    Dropout stays as it is. The names in `state_dict` stay too, so a checkpoint of a frozen network
    fits the free one.
    """
    head = head_prefixes(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    for name, module in [*network.named_modules()]:
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and not f"{name}.".startswith(head):
            network.set_submodule(name, FrozenNorm(module))


class FrozenNorm(nn.Module):
    """Batch norm in evaluation mode for good, whatever `train` says.

    Not one of PyTorch's batch norms by type, on purpose: who makes those use the batch's own
    statistics must pass this one by. What timm puts into a norm (its activation) is taken over.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        for name, follower in norm.named_children():
            self.add_module(name, follower)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
        for follower in self.children():
            x = follower(x)
        return x
