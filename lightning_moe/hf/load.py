"""Loading a released model from a folder in the format of the transformers library. Nothing in it is ever written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.hf.model import TransformersLM
from lightning_moe.hf.sidecar import is_sidecar, read_sidecar, use_sidecar
from lightning_moe.trust import is_file_name

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}
ORIGIN_KEY = "lightning_moe"  # of config.json, in a folder that `export` wrote
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROOM = 0.2  # of the weights, for the passes


def open_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    max_sequence_length: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[TransformersLM, str]:
    """Load a model, with thresholds if the folder holds some.

    Args:
        name: model as in `load_model`, or folder of thresholds that belong to one (`hf.sidecar`).
        dtype: as in `load_model`, like all that follow.
        device: torch device.
        max_sequence_length: bound on the tokens of context.
        trust_remote_code: whether code that comes with the model may be executed.

    Returns:
        The model, and the name of the model itself, whose tokenizer is its own.

    Raises:
        UserError: as `load_model`, or the thresholds belong to another model.
    """
    folder = Path(name).expanduser()
    if not is_sidecar(folder):
        return load_model(name, dtype, device, max_sequence_length, trust_remote_code), name
    sidecar = read_sidecar(folder)
    own = str(folder) if (folder / CONFIG).is_file() else sidecar.model
    lm = load_model(own, dtype, device, max_sequence_length, trust_remote_code)
    use_sidecar(lm, sidecar)
    return lm, own


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    max_sequence_length: int | None = None,
    trust_remote_code: bool = False,
) -> TransformersLM:
    """Load a model with its routers as they were released.

    Args:
        name: folder with ``config.json`` and safetensors files, or name of such a model in the local cache or on the
            Hugging Face Hub.
        dtype: dtype of the weights; `None` for that of the files.
        device: torch device.
        max_sequence_length: bound on the tokens of context; `None` for the model's own.
        trust_remote_code: whether code that comes with the model may be executed.

    Raises:
        UserError: it is no such model, shards are missing, it is quantised, too large for the memory, dense, or of a
            structure that is not known.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("--model needs the transformers library: pip install -e '.[hf]' in a checkout") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_device(device)
    folder = Path(name).expanduser()
    if folder.exists():
        check_folder(folder)
        name = str(folder)
    elif ("/" in name.strip("/") and name.count("/") > 1) or name.startswith((".", "~", "/")):
        raise UserError(f"--model {name}: there is no such folder.")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, by what is wrong
        nowhere = "" if folder.exists() else "there is no such folder, and no model of this name was found: "
        raise UserError(f"--model {name}: {nowhere}{_reason(error)}") from None
    method = getattr(config, "quantization_config", None)
    if method:
        kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise UserError(
            f"--model {name}: its weights are quantised ({kind}), so its experts cannot be run pair by pair. "
            "Give a version in bf16 or fp32."
        )
    if folder.exists():
        check_size(folder, dtype, device)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:
        raise UserError(f"--model {name}: {_reason(error)}") from None
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing or loading["mismatched_keys"]:
        wrong = missing or [str(key[0]) for key in loading["mismatched_keys"]]
        raise UserError(
            f"--model {name}: {len(wrong)} weights are missing or of another shape than its config.json says, "
            f"{wrong[0]} among them."
        )
    return TransformersLM(model.to(device), name, max_sequence_length)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have, before anything is loaded.

    Raises:
        UserError: it has no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model, or not all of it.

    Raises:
        UserError: it says what is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"--model {folder}: is a file; give the folder that holds {CONFIG} (a checkpoint of this "
            "package goes to --ckpt_path)."
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"--model {folder}: has no {CONFIG}, so it holds no model of the transformers library.")
    if ORIGIN_KEY in json_object(folder / CONFIG):
        raise UserError(f"--model {folder}: is an export of this package; give it to --ckpt_path.")
    files = weight_files(folder)
    if not files:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f" ({others[0]} is a pickle, which is never read)" if others else ""
        raise UserError(f"--model {folder}: has neither {WEIGHTS} nor {INDEX}{found}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"--model {folder}: {len(missing)} of {len(files)} shards are missing, {missing[0]} among them."
        )


def json_object(file: Path) -> dict[str, Any]:
    """Read a file of a model's folder that holds a JSON object.

    Raises:
        UserError: it does not.
    """
    return read_json(file, dict[str, Any])


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, whether or not they exist; empty if none is known."""
    if (folder / INDEX).is_file():
        names = json_object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(is_file_name(name) for name in names.values()):
            raise UserError(f"--model {folder}: {INDEX}: weight_map: must name files of this folder.")
        return [folder / name for name in sorted(set(names.values()))]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


def check_size(folder: Path, dtype: torch.dtype | None, device: str) -> None:
    """Refuse a model that does not fit into the memory, before anything is loaded.

    Raises:
        UserError: with the arithmetic; or a file is no safetensors file.
    """
    parameters, needed = 0, 0
    for file in weight_files(folder):
        for tensor in read_header(file).values():
            count = 1
            for size in tensor["shape"]:
                count *= int(size)
            parameters += count
            needed += count * BYTES.get(dtype or STORED.get(tensor["dtype"], torch.float32), 4)
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        there, what = torch.cuda.mem_get_info(device)[0], f"{device} has"
    else:
        there, what = psutil.virtual_memory().available, "this machine has"
    if needed * (1 + ROOM) > there:
        raise UserError(
            f"--model {folder}: {parameters:,} parameters take {needed / 2**30:.1f} GiB, and the passes a fifth "
            f"of that again, but {what} {there / 2**30:.1f} GiB free. Give a smaller --dtype, or another --device."
        )


def read_header(file: Path) -> dict[str, Any]:
    """Return name → dtype and shape of the tensors in a safetensors file.

    Raises:
        UserError: it is no such file, or is cut off.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 2**27:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {file.stat().st_size:,} bytes instead of {8 + length + end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"--model {file.parent}: {file.name} is no whole safetensors file: {error}") from None
    return dict(header)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
