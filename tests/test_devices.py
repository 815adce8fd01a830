"""GPUs are found by the names that their drivers print, and none is taken for another one."""

from pathlib import Path

import pytest
import torch

from lightning_moe.devices import DEVICES, device_that_prints, find_device
from lightning_moe.errors import UserError

PRINTED = {
    "Tesla T4": "T4",
    "Tesla V100-SXM2-32GB": "V100",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA A40": "A40",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000-Ada",
    "NVIDIA GeForce RTX 3090": "RTX-3090",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA GeForce RTX 5090": "RTX-5090",
    "AMD Instinct MI300X": "MI300X",
}
UNKNOWN = (
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce GTX 1080",
    "NVIDIA A2",
    "NVIDIA H20",
    "",
)


@pytest.mark.parametrize(("printed", "name"), PRINTED.items())
def test_a_printed_name_finds_its_device_alone(printed: str, name: str) -> None:
    assert device_that_prints(printed) is DEVICES[name]
    assert [other for other, device in DEVICES.items() if device_that_prints(printed) is device] == [name]


@pytest.mark.parametrize("printed", UNKNOWN)
def test_slices_of_cards_and_other_cards_are_unknown(printed: str) -> None:
    assert device_that_prints(printed) is None


def test_rates_are_those_of_lightnings_table() -> None:
    """Where that one has dense rates; it is another reading of the same documents."""
    from lightning.fabric.utilities.throughput import _CUDA_FLOPS

    same = {"A100": "a100", "H100": "h100 sxm", "H100-PCIe": "h100 pcie", "L4": "l4", "L40": "l40", "A10": "a10g"}
    for ours, theirs in same.items():
        assert find_device(ours).half_flops == pytest.approx(_CUDA_FLOPS[theirs][torch.bfloat16], rel=0.01)
    assert all(device.float_flops < device.half_flops for device in DEVICES.values())
    with pytest.raises(UserError, match=r"--gpu 'H10': .* did you mean 'H100'"):
        find_device("H10")


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parent.parent / "docs/plan.md").read_text()
    for name, device in DEVICES.items():
        rates = [f"{value:g}" for value in (device.half_flops / 1e12, device.float_flops / 1e12, device.memory / 1e9)]
        assert f"| {name} | {' | '.join(rates)} | {device.source} |" in text
