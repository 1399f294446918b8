"""The device that a benchmark measures, with PyTorch's switches as training sets them."""

import torch

from mpl_fast.errors import ConfigError

NAMES = ("auto", "cpu", "cuda")


def chosen(name: str) -> torch.device:
    """One of `NAMES`; auto is CUDA where there is a GPU.

    Float32 products may use TF32 and cuDNN looks for its fastest convolutions, as in training; both
    stay so. Raises `ConfigError` for cuda where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu, or auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
