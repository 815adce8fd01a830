"""``calibrate``: set a checkpoint's thresholds from the quantiles of its router's scores on text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.cli.arguments import at_least, command_parser, refuse_unwritable
from lightning_moe.errors import UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER, CONFIG_FILE, LAST_CHECKPOINT

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lightning_moe.calibrate import Measurement, Target
    from lightning_moe.data import TextDataModule, Tokenizer
    from lightning_moe.data.sharded_tokens import ShardedTokens

DESCRIPTION = """\
Set the thresholds of a checkpoint to the exact quantiles of its router's scores on text, layer by layer, and write the
result as a run's folder of its own. A rule that chooses by thresholds (expert threshold, expert choice, and those
derived from them) stays and may get another number of experts per token. One that takes the top-k (token choice)
becomes expert threshold with the same experts. A dense model is upcycled: its networks are cut into shared and routed
experts, with new routers.

Text: the training text of the checkpoint's run, or --text, cut into windows; every second one is for calibration, the
others show how far the experts' loads are from their target on text that was not used. For a checkpoint outside of a
run's folder give --text and --tokenizer."""

BATCH_SIZE = 16  # windows
REPORT_FILE = "calibration.json"


def run(command: str, args: list[str]) -> None:
    """Write the new checkpoint; print loss and loads before and after.

    Raises:
        UserError: the checkpoint, the text, the tokenizer or the output cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    from tqdm import tqdm

    from lightning_moe.calibrate import calibrate, measure, target_model
    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.loading import rule_name, to_device
    from lightning_moe.training.quiet import quiet

    quiet()
    ckpt_path, output = Path(options.ckpt_path), Path(options.output)
    if output.exists():
        raise UserError(f"--output {output}: exists, and nothing is overwritten; give another folder.")
    refuse_unwritable(output, "--output")
    checkpoint = read_verified(ckpt_path)
    source = to_device(LanguageModel.from_checkpoint(checkpoint), options.device).decoder
    rates = options.num_experts_per_token
    target = target_model(
        checkpoint["hyper_parameters"],
        checkpoint["state_dict"],
        rates[0] if rates is not None and len(rates) == 1 else rates,
        options.seed,
    )
    decoder = to_device(target.model, options.device).decoder
    length = source.config.max_sequence_length
    tokens, validation = _text(options, ckpt_path, checkpoint)
    windows = _Windows.spread(tokens, length, 2 * options.num_tokens)
    if len(windows.starts) < 2:
        raise UserError(f"the text has {len(tokens)} tokens: calibration takes at least two windows of {length + 1}.")
    text, unused = (replace(windows, starts=windows.starts[first::2]) for first in (0, 1))
    measured = {"other windows of it": unused}
    if validation is not None:
        measured["validation text"] = _Windows.spread(validation, length, options.num_tokens // 4)
    num_tokens = len(text.starts) * length
    print(f"{ckpt_path}: {rule_name(checkpoint)} -> {type(next(decoder.moe_layers()).rule).__name__}")
    print(f"calibrated on {num_tokens:,} tokens of {options.text or 'its training text'}")
    num_batches = 2 * sum(map(len, measured.values())) + len(list(decoder.moe_layers())) * len(text)
    with tqdm(total=num_batches, desc="calibrating", unit="batch", leave=False) as progress:

        def read(batches: Iterable[Tensor]) -> Iterator[Tensor]:
            for batch in batches:
                yield batch
                progress.update()

        before = {name: measure(source, read(batches)) for name, batches in measured.items()}
        calibrate(decoder, lambda: (batch[:, :-1] for batch in read(text)))
        after = {name: measure(decoder, read(batches)) for name, batches in measured.items()}
    print()
    print(_table(before, after))
    _write(output, ckpt_path, checkpoint, target, _report(options, num_tokens, before, after))
    print(f"\ncheckpoint   {output / 'checkpoints' / 'last.ckpt'}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("--ckpt_path", required=True, metavar="PATH", help="the checkpoint, or the folder of an export")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write: as of a run")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: the run's training text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the run's)")
    parser.add_argument(
        "--num_tokens", type=at_least(1), default=524_288, metavar="N", help="tokens to calibrate on (default: 524288)"
    )
    parser.add_argument(
        "--num_experts_per_token",
        type=float,
        nargs="+",
        metavar="K",
        help="the new mean number of experts per token, one value or one per MoE layer (default: as trained)",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--seed", type=int, default=1, help="of the routers of an upcycled dense model (default: 1)")
    return parser


def _text(
    options: argparse.Namespace, ckpt_path: Path, checkpoint: dict[str, Any]
) -> tuple[np.ndarray | ShardedTokens, ShardedTokens | None]:
    """Token ids for calibration, and of the run's validation text where there is a run."""
    import numpy as np

    from lightning_moe.checkpoints.exported import bundled_tokenizer
    from lightning_moe.data import Tokenizer
    from lightning_moe.runs.loading import check_tokenizer, run_data

    data: TextDataModule | None = None
    tokenizer_file = options.tokenizer or bundled_tokenizer(ckpt_path)
    if tokenizer_file is not None:
        if options.text is None:
            raise UserError(f"tokenizer {tokenizer_file}: it encodes --text; give that too.")
        tokenizer: Tokenizer = Tokenizer.load(tokenizer_file)
    else:
        data = run_data(ckpt_path, "--text and --tokenizer")
        tokenizer = data.tokenizer
    check_tokenizer(tokenizer, checkpoint, "--tokenizer, and --text")
    if options.text is not None:
        try:
            text = Path(options.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {options.text}: {error}") from None
        tokens: np.ndarray | ShardedTokens = np.array(tokenizer.encode(text), dtype=np.int64)
    else:
        assert data is not None
        tokens = data.store.tokens("train")
    return tokens, None if data is None else data.store.tokens("validation")


@dataclass(frozen=True)
class _Windows:
    """Batches int64 [B, length + 1] of the windows that begin at ``starts``, read anew with each iteration."""

    tokens: np.ndarray | ShardedTokens
    length: int
    starts: list[int]

    @classmethod
    def spread(cls, tokens: np.ndarray | ShardedTokens, length: int, num_tokens: int) -> _Windows:
        """Evenly over the whole text, about ``num_tokens`` in all."""
        there = (len(tokens) - 1) // length
        wanted = min(there, max(2, round(num_tokens / length)))
        return cls(tokens, length, [int(index * there / wanted) * length for index in range(wanted)])

    def __len__(self) -> int:
        return -(-len(self.starts) // BATCH_SIZE)

    def __iter__(self) -> Iterator[Tensor]:
        import numpy as np
        import torch

        for first in range(0, len(self.starts), BATCH_SIZE):
            rows = [self.tokens[start : start + self.length + 1] for start in self.starts[first : first + BATCH_SIZE]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def _table(before: dict[str, Measurement], after: dict[str, Measurement]) -> str:
    losses = [("loss in nats per token", "before", "after")]
    losses += [(name, f"{before[name].loss:.4f}", f"{found.loss:.4f}") for name, found in after.items()]
    loads: list[tuple[str, ...]] = [
        ("experts per token over target, and the expert farthest from it", "before", "", "after", "")
    ]
    for name, found in after.items():
        for layer in range(len(found.usage)):
            cells = [
                cell
                for measured in (before[name], found)  # a dense source has no loads
                for cell in (
                    (f"{measured.fanout[layer]:.3f}", f"{measured.worst[layer]:.1%}") if measured.usage else "--"
                )
            ]
            loads.append((f"MoE layer {layer}, {name}", *cells))
    return f"{_aligned(losses)}\n\n{_aligned(loads)}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _report(
    options: argparse.Namespace, num_tokens: int, before: dict[str, Measurement], after: dict[str, Measurement]
) -> dict[str, Any]:
    def plain(found: Measurement) -> dict[str, Any]:
        usage = [layer.tolist() for layer in found.usage]
        return {"loss": found.loss, "num_tokens": found.num_tokens, "usage": usage}

    return {
        "ckpt_path": options.ckpt_path,
        "text": options.text or "the run's training text",
        "num_tokens": num_tokens,
        "num_experts_per_token": options.num_experts_per_token,
        "before": {name: plain(found) for name, found in before.items()},
        "after": {name: plain(found) for name, found in after.items()},
    }


def _write(output: Path, ckpt_path: Path, checkpoint: dict[str, Any], target: Target, report: dict[str, Any]) -> None:
    """The folder of a run: checkpoint, configuration (where the source has one), report."""
    import torch
    import yaml

    from lightning_moe.atomic import atomic_folder
    from lightning_moe.runs.folder import run_of_checkpoint

    state = {name: value.cpu() for name, value in target.model.state_dict().items()}
    changed = {**checkpoint, "state_dict": state, "hyper_parameters": target.hyper_parameters}
    if not target.same_parameters:  # to start from with --model.init_from, not to resume
        changed = {name: value for name, value in changed.items() if name not in ("optimizer_states", "lr_schedulers")}
    config = None
    if (folder := run_of_checkpoint(ckpt_path)) is not None:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        sizes = {**config["model"]["decoder"], **target.hyper_parameters["decoder"]}
        linked = ("vocab_size", "max_sequence_length")  # these follow from `data`
        config["model"]["decoder"] = {name: value for name, value in sizes.items() if name not in linked}
        config["model"]["routing"] = target.hyper_parameters["routing"]
        config["run_name"], config["output_dir"] = output.name, str(output.parent)
    try:
        with atomic_folder(output) as new:
            if config is not None:
                (new / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            (new / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
            (new / CHECKPOINT_FOLDER).mkdir()
            torch.save(changed, new / CHECKPOINT_FOLDER / LAST_CHECKPOINT)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from error
