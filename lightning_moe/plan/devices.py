"""Published peak rates and memory of GPUs: dense matrix products, no sparsity."""

from __future__ import annotations

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
    """

    half_flops: float
    float_flops: float
    memory: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the FLOP/s under a ``trainer.precision``."""
        return self.float_flops if precision.startswith("32") else self.half_flops


#: known GPUs by name; prices are not in it
DEVICES = {
    "T4": Device(65e12, 8.1e12, 16e9, "NVIDIA T4 datasheet (fp16)"),
    "V100": Device(125e12, 15.7e12, 32e9, "NVIDIA V100 datasheet, SXM2 (fp16)"),
    "A10": Device(125e12, 31.2e12, 24e9, "NVIDIA A10 datasheet"),
    "A100-40": Device(312e12, 19.5e12, 40e9, "NVIDIA A100 datasheet"),
    "A100": Device(312e12, 19.5e12, 80e9, "NVIDIA A100 datasheet"),
    "L4": Device(121e12, 30.3e12, 24e9, "NVIDIA L4 datasheet (half of the rate with sparsity)"),
    "L40S": Device(362e12, 91.6e12, 48e9, "NVIDIA L40S datasheet"),
    "H100": Device(989.4e12, 66.9e12, 80e9, "NVIDIA H100 architecture white paper, SXM5"),
    "H100-PCIe": Device(756e12, 51.2e12, 80e9, "NVIDIA H100 architecture white paper, PCIe"),
    "H200": Device(989.4e12, 66.9e12, 141e9, "NVIDIA H200 datasheet, SXM (half of the rate with sparsity)"),
    "RTX-3090": Device(71e12, 35.6e12, 24e9, "NVIDIA Ampere GA102 white paper (fp32 accumulation)"),
    "RTX-4090": Device(165.2e12, 82.6e12, 24e9, "NVIDIA Ada white paper (fp32 accumulation)"),
    "MI250X": Device(383e12, 47.9e12, 128e9, "AMD Instinct MI250X datasheet (both dies)"),
    "MI300X": Device(1307.4e12, 163.4e12, 192e9, "AMD Instinct MI300X datasheet"),
}


def find_device(name: str) -> Device:
    """Find a device of the table by its name, in upper or lower case.

    Raises:
        UserError: it is not in the table.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu {name!r}: not in the table: {did_you_mean(name.upper(), DEVICES, 'known are')}")
    return known[name.lower()]
