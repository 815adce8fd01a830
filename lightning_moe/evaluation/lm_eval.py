"""A checkpoint as a model of lm-evaluation-harness, registered as ``lightning_moe``.

Every text is scored as the beginning of a document: ``<|endoftext|>`` goes before it, as in training. Routing is
causal, so neither padding nor the other texts of a batch change a score.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lightning_moe.checkpoints.read import read_verified
from lightning_moe.errors import UserError
from lightning_moe.model import complete, next_token_loss
from lightning_moe.module import LanguageModel
from lightning_moe.runs.loading import check_tokenizer, to_device, tokenizer_of

DEFAULT_NEW_TOKENS = 256

#: context and continuation as token ids; the context has at least one
Pair = tuple[list[int], list[int]]


@register_model("lightning_moe")
class LightningMoE(TemplateLM):  # type: ignore[misc] # the harness is untyped
    """A decoder that answers the three requests of the harness.

    Args:
        ckpt_path: path of the checkpoint.
        tokenizer: path of a ``tokenizer.json``; `None` takes that of the export, or of the checkpoint's run.
        batch_size: texts in a batch.
        device: torch device; `None` is the CPU.

    Raises:
        UserError: the checkpoint, tokenizer, device or batch size cannot be used.
    """

    def __init__(
        self,
        ckpt_path: str,
        tokenizer: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size!r}: must be a whole number from 1 on.")
        self.batch_size = int(batch_size)
        path = Path(ckpt_path)
        checkpoint = read_verified(path)
        self.decoder = to_device(LanguageModel.from_checkpoint(checkpoint, str(path)), device or "cpu").decoder
        self.codec = tokenizer_of(path, checkpoint, tokenizer, "tokenizer=FILE")
        check_tokenizer(self.codec, checkpoint, "tokenizer=FILE")
        self.max_length = self.decoder.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        return self.codec.end_of_text_id

    @property
    def tokenizer_name(self) -> str:
        return self.codec.fingerprint  # names the harness's cache of answers

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, which begin with ``<|endoftext|>`` unless ``add_special_tokens`` is false."""
        start = [] if add_special_tokens is False else [self.eot_token_id]
        return [*start, *self.codec.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of texts in nats; each token is scored once, in windows of the model's context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Return for each pair the log-likelihood of the continuation in nats, and whether it is the greedy one.

        A context that does not fit loses its beginning.
        """
        self._warn_of_shortened(
            sum(len(context) + len(rest) > self.max_length + 1 for context, rest in pairs), len(pairs)
        )
        answers = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        device = self.decoder.device
        for start in tqdm(range(0, len(order), self.batch_size), desc="batches", disable=disable_tqdm):
            rows = [index for index in order[start : start + self.batch_size] if pairs[index][1]]
            if not rows:
                continue
            inputs, labels = [], []
            for index in rows:
                context, continuation = pairs[index]
                if len(continuation) > self.max_length:
                    raise UserError(
                        f"a continuation of {len(continuation)} tokens does not fit into the model's context of "
                        f"{self.max_length}: leave the task out, or train with a longer data.sequence_length."
                    )
                ids = torch.tensor([*context, *continuation][-self.max_length - 1 :])
                inputs.append(ids[:-1])
                labels.append(ids[1:].clone())
                labels[-1][: -len(continuation)] = -100
            batch = pad_sequence(inputs, batch_first=True).to(device)
            targets = pad_sequence(labels, batch_first=True, padding_value=-100).to(device)
            logits = self.decoder(batch).logits
            scores = -next_token_loss(logits, targets).double().sum(1)
            greedy = ((logits.argmax(-1) == targets) | (targets == -100)).all(1)
            for index, score, is_greedy in zip(rows, scores.tolist(), greedy.tolist(), strict=True):
                answers[index] = (score, is_greedy)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context, up to one of its ``until`` strings.

        A context that does not fit together with ``max_gen_toks`` loses its beginning, but keeps half of the model's
        context; then fewer tokens are generated.
        """
        groups: dict[Any, list[tuple[int, str]]] = defaultdict(list)
        shortened = 0
        for index, request in enumerate(requests):
            context, options = request.args
            wanted = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            text = self._tail(context, max(self.max_length - wanted, self.max_length // 2) - 1)
            shortened += text != context
            room = self.max_length - len(self.tok_encode(text))
            groups[repr(options), min(wanted, room)].append((index, text))
        self._warn_of_shortened(shortened, len(requests))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm) as progress:
            for (_, new_tokens), members in groups.items():
                options = requests[members[0][0]].args[1]
                for start in range(0, len(members), self.batch_size):
                    rows = members[start : start + self.batch_size]
                    for (index, _), text in zip(rows, self._continue(rows, new_tokens, options), strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update(len(rows))
        return answers

    def _continue(self, rows: Sequence[tuple[int, str]], new_tokens: int, options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        completions = complete(
            self.decoder,
            self.codec,
            [text for _, text in rows],
            new_tokens,
            stop=[text for text in stop if text],
            temperature=temperature,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
        )
        return [completion.text for completion in completions]

    def _warn_of_shortened(self, number: int, total: int) -> None:
        if number:
            warnings.warn(
                f"{number} of {total} contexts are longer than the model's {self.max_length} tokens and lose their "
                "beginning, as is usual in the harness: the scores are those of the shortened texts.",
                stacklevel=3,
            )

    def _tail(self, text: str, room: int) -> str:
        """Return the end of a text that encodes to at most ``room`` tokens."""
        ids, kept = self.codec.encode(text), room
        while len(ids) > room:  # the cut may fall into a word, whose rest takes other tokens
            text = self.codec.decode_bytes(ids[-kept:] if kept > 0 else []).decode(errors="ignore")
            ids, kept = self.codec.encode(text), kept - 1
        return text
