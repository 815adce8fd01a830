"""Tiny `transformers` tokenizers of the three kinds that released models have, trained on this repository's text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["byte_level", "nfc", "metaspace"]

VOCABULARY = 512
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
_DOCS = Path(__file__).parents[2] / "docs"


def make_tokenizer(kind: TokenizerKind = "byte_level") -> PreTrainedTokenizerFast:
    """Return a tokenizer of 512 tokens.

    - "byte_level": byte-level BPE with `<|endoftext|>`, as of OLMoE and gpt-oss; nothing is put before a text.
    - "nfc": the same after a Unicode NFC normalizer, as of Qwen: decoding does not give every text back.
    - "metaspace": BPE over characters with spaces as U+2581 and bytes for unknown characters, as of Mixtral: it begins
      every text with `<s>` and a space, and ends documents with `</s>`.
    """
    if kind == "metaspace":
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_metaspace()),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(nfc=kind == "nfc")),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> list[str]:
    return [(_DOCS / name).read_text(encoding="utf-8") for name in ("routing.md", "data.md")]


@cache
def _byte_level(nfc: bool) -> str:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    return str(backend.to_str())


@cache
def _metaspace() -> str:
    specials = ["<unk>", "<s>", "</s>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(specials) - len(in_bytes), limit_alphabet=80, show_progress=False
    )
    learner.train_from_iterator(_texts(), trainer)
    learned = json.loads(learner.to_str())["model"]
    # The bytes are ordinary tokens, not added ones, so they join the vocabulary after the training.
    tokens = [*specials, *in_bytes, *learned["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(specials)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return str(backend.to_str())
