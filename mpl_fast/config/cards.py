"""Peak rates of the GPUs that a dry run can be about, from NVIDIA's data sheets, without sparsity.

https://www.nvidia.com/en-us/data-center/ a100, h100, h200, l40s and hgx (for the B200). Where they
give the rates of Tensor Cores with 2:4 sparsity only, those are halved.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """One GPU; rates are per second."""

    name: str
    bf16: float
    """FLOP of bfloat16 products on Tensor Cores."""
    tf32: float
    """FLOP of float32 products, of which Tensor Cores use 19 bits."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes from or to its memory."""
    links: float
    """Bytes to the other GPUs of its node, one way: by NVLink, or by PCIe where there is none."""


CARDS = {
    "a100-40": Card("A100 SXM 40 GB", 312e12, 156e12, 40e9, 1.555e12, 300e9),
    "a100-80": Card("A100 SXM 80 GB", 312e12, 156e12, 80e9, 2.039e12, 300e9),
    "h100": Card("H100 SXM", 989e12, 494e12, 80e9, 3.35e12, 450e9),
    "h200": Card("H200 SXM", 989e12, 494e12, 141e9, 4.8e12, 450e9),
    "b200": Card("B200 SXM", 2250e12, 1125e12, 180e9, 8.0e12, 900e9),
    "l40s": Card("L40S", 362e12, 183e12, 48e9, 0.864e12, 32e9),
}
