"""``prepare``: encode a corpus once, so that ``fit`` with the same data settings starts at once."""

from __future__ import annotations

import time

from lightning_moe.processes import usable_cores
from lightning_moe.training.request import read_request

OPTIONS = {
    "--workers N": "processes that encode (default: one per usable core)",
    "--shard_size N": "characters of text in a shard; a kill costs one at most",
}


def run(command: str, args: list[str]) -> None:
    """Encode the corpus of an experiment's ``data``, or check every byte of existing data; print what it is.

    Raises:
        UserError: bad configuration, corpus or tokenizer; prepared data that is damaged.
    """
    request = read_request(command, args, OPTIONS)
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveInt

    from lightning_moe.data import TextDataModule
    from lightning_moe.data.prepare import SHARD_SIZE
    from lightning_moe.training.parse import build_parser, parse

    parser = build_parser(command)  # all options of `fit`, so that one line of flags serves both
    parser.add_argument("--workers", type=PositiveInt, default=usable_cores(), help="prepare: Processes that encode.")
    parser.add_argument(
        "--shard_size",
        type=PositiveInt,
        default=SHARD_SIZE,
        help="prepare: Characters of text in a shard; a kill costs one at most. Does not change what is read.",
    )
    config = parse(request.layers, request.flags, parser).config
    data_parser = ArgumentParser(exit_on_error=False)
    data_parser.add_class_arguments(TextDataModule, "data")
    data: TextDataModule = data_parser.instantiate(data_parser.parse_object({"data": config.data.as_dict()})).data
    there = data.directory.exists()
    started = time.monotonic()
    store = data.prepare(config.workers, config.shard_size)
    store.check(everything=True)
    data.setup("validate")
    print(f"{'found' if there else 'prepared'}, and every byte checked, in {time.monotonic() - started:.1f} s")
    for split in store.manifest["splits"]:
        counts, shards = store.counts(split), len(store.shards(split))
        print(
            f"{split:<12}{counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes of text, "
            f"{shards} shard{'' if shards == 1 else 's'}"
        )
    print(f"{'tokenizer':<12}{data.tokenizer.fingerprint} ({data.vocab_size:,} tokens)")
    print(f"{'folder':<12}{store.directory}")
