"""Published peak rates and memory of GPUs: dense matrix products, no sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_moe.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Device:
    """Peak rates and memory of one kind of GPU.

    Args:
        half_flops: FLOP/s of dense bf16 products with fp32 accumulation (fp16 where there is no bf16).
        float_flops: FLOP/s in fp32 outside of the tensor cores.
        memory: bytes as sold (10⁹ per gigabyte).
        source: document of the vendor.
        prints: regular expression of the whole name that the driver gives, as ``torch.cuda.get_device_name`` prints it.
    """

    half_flops: float
    float_flops: float
    memory: float
    source: str
    prints: str

    def peak(self, precision: str) -> float:
        """Return the FLOP/s under a ``trainer.precision``."""
        return self.float_flops if precision.startswith("32") else self.half_flops


#: Known GPUs by name; prices are not in it. Patterns are of whole names, so that a slice of a card (MIG) or a laptop's
#: version, which have other rates, are unknown rather than wrong.
DEVICES = {
    "T4": Device(65e12, 8.1e12, 16e9, "NVIDIA T4 datasheet (fp16)", r"(Tesla|NVIDIA) T4"),
    "V100": Device(
        125e12, 15.7e12, 32e9, "NVIDIA V100 datasheet, SXM2 (fp16)", r"(Tesla|NVIDIA) V100-SXM\d(-\d+GB)?(-LS)?"
    ),
    "A10": Device(125e12, 31.2e12, 24e9, "NVIDIA A10 datasheet", "NVIDIA A10"),
    "A10G": Device(70e12, 31.5e12, 24e9, "NVIDIA A10G datasheet (Amazon)", "NVIDIA A10G"),
    "A30": Device(165e12, 10.3e12, 24e9, "NVIDIA A30 datasheet", "NVIDIA A30"),
    "A40": Device(149.7e12, 37.4e12, 48e9, "NVIDIA A40 datasheet", "NVIDIA A40"),
    "A100-40": Device(312e12, 19.5e12, 40e9, "NVIDIA A100 datasheet", r"(NVIDIA )?A100-(SXM\d|PCI[eE])-40GB"),
    "A100": Device(312e12, 19.5e12, 80e9, "NVIDIA A100 datasheet", r"NVIDIA A100(-SXM\d-80GB| 80GB PCI[eE])"),
    "L4": Device(121e12, 30.3e12, 24e9, "NVIDIA L4 datasheet (half of the rate with sparsity)", "NVIDIA L4"),
    "L40": Device(181e12, 90.5e12, 48e9, "NVIDIA L40 datasheet", "NVIDIA L40"),
    "L40S": Device(362e12, 91.6e12, 48e9, "NVIDIA L40S datasheet", "NVIDIA L40S"),
    "H100": Device(
        989.4e12, 66.9e12, 80e9, "NVIDIA H100 architecture white paper, SXM5", "NVIDIA H100( 80GB HBM3|-SXM5-80GB)"
    ),
    "H100-PCIe": Device(
        756e12, 51.2e12, 80e9, "NVIDIA H100 architecture white paper, PCIe", "NVIDIA H100( 80GB)? PCI[eE]"
    ),
    "H100-NVL": Device(
        835e12, 60e12, 94e9, "NVIDIA H100 datasheet, NVL (half of the rate with sparsity)", "NVIDIA H100 NVL"
    ),
    "H200": Device(
        989.4e12, 66.9e12, 141e9, "NVIDIA H200 datasheet, SXM (half of the rate with sparsity)", "NVIDIA H200"
    ),
    "H200-NVL": Device(
        835e12, 60e12, 141e9, "NVIDIA H200 datasheet, NVL (half of the rate with sparsity)", "NVIDIA H200 NVL"
    ),
    "GH200": Device(
        989.4e12, 66.9e12, 96e9, "NVIDIA GH200 datasheet, HBM3 (half of the rate with sparsity)", "NVIDIA GH200 480GB"
    ),
    "B200": Device(
        2250e12, 75e12, 180e9, "NVIDIA HGX B200 datasheet, an eighth (half of the rate with sparsity)", "NVIDIA B200"
    ),
    "GB200": Device(
        2500e12, 80e12, 186e9, "NVIDIA GB200 NVL72 datasheet, per GPU (half of the rate with sparsity)", "NVIDIA GB200"
    ),
    "RTX-A6000": Device(154.8e12, 38.7e12, 48e9, "NVIDIA Ampere GA102 white paper (fp32 accumulation)", r".*RTX A6000"),
    "RTX-6000-Ada": Device(
        364.2e12, 91.1e12, 48e9, "NVIDIA RTX 6000 Ada datasheet (a quarter of fp8 with sparsity)",
        "NVIDIA RTX 6000 Ada Generation",
    ),
    "RTX-3090": Device(
        71e12, 35.6e12, 24e9, "NVIDIA Ampere GA102 white paper (fp32 accumulation)", "(NVIDIA )?GeForce RTX 3090"
    ),
    "RTX-4080": Device(
        97.5e12, 48.7e12, 16e9, "NVIDIA Ada white paper (fp32 accumulation)", "NVIDIA GeForce RTX 4080"
    ),
    "RTX-4090": Device(
        165.2e12, 82.6e12, 24e9, "NVIDIA Ada white paper (fp32 accumulation)", "NVIDIA GeForce RTX 4090"
    ),
    "RTX-5080": Device(
        112.6e12, 56.3e12, 16e9, "NVIDIA RTX Blackwell white paper (fp32 accumulation)", "NVIDIA GeForce RTX 5080"
    ),
    "RTX-5090": Device(
        209.5e12, 104.8e12, 32e9, "NVIDIA RTX Blackwell white paper (fp32 accumulation)", "NVIDIA GeForce RTX 5090"
    ),
    "MI250X": Device(
        191.5e12, 23.95e12, 64e9, "AMD Instinct MI250X datasheet (one of two dies, a device of its own in torch)",
        r"AMD Instinct MI250X( / MI250)?",
    ),
    "MI300X": Device(1307.4e12, 163.4e12, 192e9, "AMD Instinct MI300X datasheet", r"AMD Instinct MI300X( .*)?"),
}  # fmt: skip


def find_device(name: str) -> Device:
    """Find a device of the table by its name, in upper or lower case.

    Raises:
        UserError: it is not in the table.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu {name!r}: not in the table: {did_you_mean(name.upper(), DEVICES, 'known are')}")
    return known[name.lower()]


def device_that_prints(name: str) -> Device | None:
    """Find a device by the name that its driver gives, such as ``NVIDIA A100-SXM4-80GB``; `None` if it is unknown."""
    return next((device for device in DEVICES.values() if re.fullmatch(device.prints, name)), None)
