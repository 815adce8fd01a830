"""``calibrate``: set a checkpoint's thresholds from the quantiles of its router's scores on text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.cli.arguments import add_shared, command_parser, home_path, read_text, real_number, refuse_existing
from lightning_moe.errors import UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER, CONFIG_FILE, LAST_CHECKPOINT
from lightning_moe.report.tables import text_table

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lightning_moe.calibrate import Measurement, Target
    from lightning_moe.data.sharded_tokens import ShardedTokens

DESCRIPTION = """\
Set the thresholds of a checkpoint to the exact quantiles of its router's scores on text, layer by layer, and write the
result as the folder of a run. A rule that chooses by thresholds (expert threshold, expert choice, and those derived
from them) stays and may get another number of experts per token. One that takes the top-k (token choice) becomes expert
threshold with the same experts. A dense model is upcycled: its networks are cut into shared and routed experts, with
new routers.

Text: the training text of the checkpoint's run, or --text, cut into windows. Every second window calibrates; the others
show how far the experts' loads are from their target on unused text. For a checkpoint outside of a run's folder, give
--text and --tokenizer."""

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
    from lightning_moe.runs.config import read_config
    from lightning_moe.runs.folder import run_of_checkpoint
    from lightning_moe.runs.loading import rule_name, to_device
    from lightning_moe.training.quiet import quiet

    quiet()
    ckpt_path, output_dir = options.ckpt_path, options.output_dir
    refuse_existing(output_dir)
    folder = run_of_checkpoint(ckpt_path)
    config = None if folder is None else read_config(folder)
    checkpoint = read_verified(ckpt_path)
    source = to_device(LanguageModel.from_checkpoint(checkpoint, str(ckpt_path)), options.device).decoder
    rates = options.num_experts_per_token
    target = target_model(
        checkpoint["hyper_parameters"],
        checkpoint["state_dict"],
        rates[0] if rates is not None and len(rates) == 1 else rates,
        options.seed,
    )
    decoder = to_device(target.model, options.device).decoder
    if not any(True for _ in decoder.moe_layers()):
        sizes = target.hyper_parameters["decoder"]
        raise UserError(
            f"--ckpt_path {ckpt_path}: has no MoE layer to calibrate: num_layers={sizes['num_layers']}, of which "
            f"num_dense_layers={sizes['num_dense_layers']} are dense"
        )
    length = source.max_sequence_length
    tokens, validation = _text(options, checkpoint)
    max_tokens = options.max_tokens or len(tokens)
    windows = _Windows.spread(tokens, length, 2 * max_tokens)
    if len(windows.starts) < 2:
        raise UserError(f"the text has {len(tokens)} tokens: calibration takes at least two windows of {length + 1}.")
    text, unused = (replace(windows, starts=windows.starts[first::2]) for first in (0, 1))
    measured = {"other windows of it": unused}
    if validation is not None:
        measured["validation text"] = _Windows.spread(validation, length, max_tokens // 4)
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
    _write(output_dir, config, checkpoint, target, _report(options, num_tokens, before, after))
    print(f"\ncheckpoint   {output_dir / CHECKPOINT_FOLDER / LAST_CHECKPOINT}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_shared(parser, "--ckpt_path", type=home_path, required=True)
    add_shared(parser, "--output_dir", ", as of a run", required=True)
    add_shared(parser, "--text", " (default: the run's training text)")
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--max_tokens", "; as many more show the loads on unused text", default=524_288)
    parser.add_argument(
        "--num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="+",
        metavar="K",
        help="new mean number of experts per token, one value or one per MoE layer (default: as trained)",
    )
    add_shared(parser, "--device")
    add_shared(parser, "--seed", " for the routers of an upcycled dense model")
    return parser


def _text(
    options: argparse.Namespace, checkpoint: dict[str, Any]
) -> tuple[np.ndarray | ShardedTokens, ShardedTokens | None]:
    """Return token ids for calibration, and those of the validation text if there is a run."""
    import numpy as np

    from lightning_moe.runs.loading import check_tokenizer, text_source

    tokenizer, data = text_source(options.ckpt_path, checkpoint, options.tokenizer, options.text is not None)
    check_tokenizer(tokenizer, checkpoint, "--tokenizer, and --text")
    if options.text is not None:
        ids = tokenizer.encode(read_text("--text", options.text))
        tokens: np.ndarray | ShardedTokens = np.array(ids, dtype=np.int64)
    else:
        assert data is not None
        tokens = data.store.tokens("train")
    return tokens, None if data is None else data.store.tokens("validation")


@dataclass(frozen=True)
class _Windows:
    """Batches int64 [B, length + 1] of the windows that begin at ``starts``; each iteration reads them anew."""

    tokens: np.ndarray | ShardedTokens
    length: int
    starts: list[int]

    @classmethod
    def spread(cls, tokens: np.ndarray | ShardedTokens, length: int, num_tokens: int) -> _Windows:
        """Spread windows evenly over the whole text, about ``num_tokens`` in all."""
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
    return "\n\n".join(text_table(table, right=range(1, 5)) for table in (losses, loads))


def _report(
    options: argparse.Namespace, num_tokens: int, before: dict[str, Measurement], after: dict[str, Measurement]
) -> dict[str, Any]:
    def plain(found: Measurement) -> dict[str, Any]:
        usage = [layer.tolist() for layer in found.usage]
        return {"loss": found.loss, "num_tokens": found.num_tokens, "usage": usage}

    return {
        "ckpt_path": str(options.ckpt_path),
        "text": options.text or "the run's training text",
        "num_tokens": num_tokens,
        "num_experts_per_token": options.num_experts_per_token,
        "before": {name: plain(found) for name, found in before.items()},
        "after": {name: plain(found) for name, found in after.items()},
    }


def _write(
    output_dir: Path,
    source: Mapping[str, Any] | None,
    checkpoint: dict[str, Any],
    target: Target,
    report: dict[str, Any],
) -> None:
    """Write the folder of a run: checkpoint, configuration (if the source has one), report."""
    import torch

    from lightning_moe.atomic import atomic_folder
    from lightning_moe.config.yaml_text import dump_yaml

    state = {name: value.cpu() for name, value in target.model.state_dict().items()}
    changed = {**checkpoint, "state_dict": state, "hyper_parameters": target.hyper_parameters}
    if not target.same_parameters:  # for --model.init_from, not for resuming
        changed = {name: value for name, value in changed.items() if name not in ("optimizer_states", "lr_schedulers")}
    config = None
    if source is not None:
        config = {**source}
        config["model"] = {**config["model"]}
        sizes = {**config["model"].get("decoder", {}), **target.hyper_parameters["decoder"]}
        linked = ("vocab_size", "max_sequence_length")  # these follow from `data`
        config["model"]["decoder"] = {name: value for name, value in sizes.items() if name not in linked}
        config["model"]["routing"] = target.hyper_parameters["routing"]
        config["run_name"], config["output_dir"] = output_dir.name, str(output_dir.parent)
    try:
        with atomic_folder(output_dir) as new:
            if config is not None:
                (new / CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
            (new / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
            (new / CHECKPOINT_FOLDER).mkdir()
            torch.save(changed, new / CHECKPOINT_FOLDER / LAST_CHECKPOINT)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
