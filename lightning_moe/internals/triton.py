"""The check of a Triton kernel before it is used on a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kernel_works(
    what: str, instead: str, device: torch.device, results: Callable[[], Iterable[tuple[Tensor, Tensor, float]]]
) -> bool:
    """Return whether a kernel gives what torch gives on a device; warn, once per call, if it does not.

    Args:
        what: name of the kernel, for the warning.
        instead: what runs in its place, for the warning.
        device: device of the check.
        results: function that runs both on small inputs and gives (the kernel's result, torch's, tolerance relative to
            the largest value). Whatever it raises counts as a kernel that does not work.
    """
    try:
        for found, expected, tolerance in results():
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
            )
    except Exception as error:  # of an import, a compiler, a driver
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"The Triton kernel for {what} does not work on {device} ({type(error).__name__}: {reason}); {instead}.",
            stacklevel=3,
        )
        return False
    return True
