"""A copy of a released model's files, to put thresholds beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_moe.errors import UserError
from lightning_moe.hf.load import CONFIG
from lightning_moe.hf.sidecar import SIDECAR_FILE, STATE_FILE

#: weights in formats that `load_model` does not read, beside those that it does
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".ot")


def check_copy(name: str, output_dir: Path) -> None:
    """Refuse a copy for which the disk has no room, before the work.

    Args:
        name: folder or name of a model that was loaded.
        output_dir: folder to be written, which may be missing.

    Raises:
        UserError: with the arithmetic.
    """
    needed = sum(file.stat().st_size for file in _files(name))
    parent = next(path for path in output_dir.resolve().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"--with_model: the model's files have {needed / 2**30:.1f} GiB, but {parent} has {free / 2**30:.1f} GiB "
            "free. Thresholds alone, without --with_model, take a few kB."
        )


def copy_model(name: str, folder: Path) -> None:
    """Copy the files of a model into an existing folder; thresholds of it are left out.

    Args:
        name: folder or name of a model that was loaded.
        folder: folder to write into.
    """
    for file in _files(name):
        shutil.copyfile(file, folder / file.name)  # follows links, of which the cache of the Hub consists


def _files(name: str) -> list[Path]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        folder = Path(str(cached_file(name, CONFIG))).parent
    left_out = (SIDECAR_FILE, STATE_FILE)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in left_out]
    return [file for file in files if file.suffix not in OTHER_WEIGHTS]
