"""Whether ``torch.compile`` can work on a device."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


def why_not_compiled(device: torch.device) -> str | None:
    """Return what keeps ``torch.compile`` from working on a CUDA device, or from paying on another one.

    Triton, which generates the kernels, builds its launcher with a C compiler and Python's headers, and needs compute
    capability 7.0.

    Returns:
        `None` if nothing does.
    """
    if device.type != "cuda":
        return "it pays on CUDA devices only"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"it needs compute capability 7.0 or more, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "it needs a C compiler: gcc or clang on PATH, or the environment variable CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"it needs Python's headers: there is no Python.h in {sysconfig.get_path('include')}"
    return None
