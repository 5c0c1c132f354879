"""What the makers of GPUs say of them: the peaks that time and memory are set beside.

Sources: NVIDIA's data sheets of A100 (nvidia-a100-datasheet-us-nvidia-1758950), H100, H200 and DGX B200, which give a
peak with structured sparsity where they have a star: half of it here, but for the A100's, which is given without.
Memory is what CUDA reports on such a GPU, in 2^30 bytes; the sheets' 80, 141 and 180 GB are what is built in. Network
cards are those of DGX A100, H100, H200 and B200: one of 200 (A100) or 400 Gbit/s for each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of GPU; rates are in operations or bytes per second.

    Attributes:
        name: What it is called.
        flops: Products of dense matrices in bfloat16 or float16, a multiply-add counted as two operations.
        memory_gib: Memory that CUDA reports, in GiB.
        memory_bandwidth: Bytes that it reads or writes of that memory.
        nvlink_bandwidth: Bytes to and from the other GPUs of a node, both directions together; 0 without NVLink.
        network_bandwidth: Bytes to other nodes, one direction, by the network card that is meant for this GPU.
    """

    name: str
    flops: float
    memory_gib: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float


_H100 = Device(
    name="H100 SXM",
    flops=989e12,
    memory_gib=79.1,
    memory_bandwidth=3.35e12,
    nvlink_bandwidth=900e9,
    network_bandwidth=50e9,
)

DEVICES = {
    "a100": Device(
        name="A100 SXM 80 GB",
        flops=312e12,
        memory_gib=79.1,
        memory_bandwidth=2.039e12,
        nvlink_bandwidth=600e9,
        network_bandwidth=25e9,
    ),
    "h100": _H100,
    "h200": replace(_H100, name="H200 SXM", memory_gib=139.7, memory_bandwidth=4.8e12),
    "b200": Device(
        name="B200",
        flops=2250e12,
        memory_gib=178.3,
        memory_bandwidth=8e12,
        nvlink_bandwidth=1800e9,
        network_bandwidth=50e9,
    ),
}
"""Name, as an option takes it -> the GPU, in the form that sits in a node of eight."""

_PEAKS: tuple[tuple[tuple[str, ...], float | None], ...] = (
    (("MIG",), None),  # a part of a GPU
    (("H100", "PCIE"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H200", "NVL"), 835e12),
    (("GB200",), 2500e12),
    (("GH200",), 989e12),
    *(((key.upper(),), device.flops) for key, device in DEVICES.items()),
)
"""Words of what CUDA calls a GPU -> its `Device.flops`; the first line whose words it has all counts."""


def peak_flops(name: str) -> float | None:
    """Return the `Device.flops` of a GPU, by what CUDA calls it ("NVIDIA H100 80GB HBM3"); None where not known."""
    words = name.upper().replace("-", " ").split()
    return next((peak for wanted, peak in _PEAKS if all(word in words for word in wanted)), None)
