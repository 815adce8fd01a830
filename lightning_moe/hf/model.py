"""A released model under the interface of our own decoder, so that every command can run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.hf.layer import TransformersLayer
from lightning_moe.hf.structure import PROBE_TOKENS, TOLERANCES, find_blocks
from lightning_moe.model import CausalLM, DecoderLoss, DecoderOutput, ModelSize, replay
from lightning_moe.model.loss_head import IGNORED, chunked_next_token_loss
from lightning_moe.routing import RoutingRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersLM(CausalLM):
    """A causal language model of the transformers library whose MoE layers can route by any rule.

    Fresh from a released model it computes exactly what that model computes.

    Args:
        model: the model; it is put into ``eval()``, and hooks are added to its routers and experts.
        where: name of the model, for messages.
        max_sequence_length: bound on the tokens of context below the model's own; `None` for the model's.

    Attributes:
        model: the model.
        moe: MoE layers by the number of their block.

    Raises:
        UserError: the model is dense, or of a structure that is not known.
    """

    def __init__(self, model: PreTrainedModel, where: str = "model", max_sequence_length: int | None = None) -> None:
        super().__init__()
        self.model = model
        model.eval()
        self.text_config = model.config.get_text_config()
        self._context = int(getattr(self.text_config, "max_position_embeddings", 0) or 2048)
        if max_sequence_length is not None:
            self._context = min(self._context, max_sequence_length)
        layers = [TransformersLayer(block) for block in find_blocks(model, self.vocab_size, where)]
        self.moe = nn.ModuleDict({_number(layer.path, index): layer for index, layer in enumerate(layers)})
        if len(self.moe) < len(layers):
            raise UserError(f"--model {where}: two of its MoE layers are in one block, which is not supported.")
        self.moe.to(model.device)
        model.base_model.register_forward_pre_hook(self._take_batch_shape, with_kwargs=True)
        self.eval()
        self._head = self._plain_head()
        self._check_pairs(where)

    def route_by(self, rule: RoutingRule, num_experts_per_token: float) -> None:
        """Let every MoE layer route by a rule, with a new routing state.

        Raises:
            UserError: the rule does not fit the layers.
        """
        for layer in self.layers:
            layer.route_by(rule, num_experts_per_token)

    @contextmanager
    def as_released(self) -> Iterator[None]:
        """Let all layers route as the model was released, inside this context."""
        try:
            for layer in self.layers:
                layer.released_routing = True
            yield
        finally:
            for layer in self.layers:
                layer.released_routing = False

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the MoE layers. The released model stays in ``eval()``, without dropout or router noise."""
        super().train(mode)
        self.model.eval()
        return self

    def double(self) -> Self:
        """Turn the weights to float64, for `audit`; experts then run one by one, in the family's own code."""
        self.model.set_experts_implementation("eager")
        return super().double()

    def named_layers(self) -> list[tuple[str, TransformersLayer]]:
        """Return the MoE layers from bottom to top, each with the number of its block."""
        return [(name, layer) for name, layer in self.moe.items() if isinstance(layer, TransformersLayer)]

    @property
    def layers(self) -> list[TransformersLayer]:
        """The MoE layers from bottom to top."""
        return [layer for _, layer in self.named_layers()]

    @property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def max_sequence_length(self) -> int:
        return self._context

    @property
    def size(self) -> ModelSize:
        total = sum(parameter.numel() for parameter in self.model.parameters())
        inactive = sum(
            layer.state.num_experts * layer.parameters_per_expert * (1 - layer.state.rate) for layer in self.layers
        )
        active = round(total - inactive)
        embedding, head = next(self.model.get_input_embeddings().parameters()), self.model.get_output_embeddings()
        look_up = 0 if head is not None and head.weight is embedding else embedding.numel()
        config = self.text_config
        heads = config.num_attention_heads
        width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        attentions = sum(type(module).__name__.endswith("Attention") for module in self.model.modules())
        return ModelSize(total, active, 6 * (active - look_up) + 6 * attentions * width * self._context)

    def new_cache(self, batch_size: int, length: int | None = None) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.text_config)

    def forward(
        self, input_ids: Tensor, cache: Any = None, last_only: bool = False, labels: Tensor | None = None
    ) -> DecoderOutput | DecoderLoss:
        start = 0 if cache is None else int(cache.get_seq_length())
        if start + input_ids.shape[1] > self._context:
            raise UserError(f"{start + input_ids.shape[1]} tokens of context: the model's context is {self._context}.")
        if labels is not None and self._head is not None:
            head, _, softcap = self._head
            best = torch.full_like(labels, IGNORED) if self.predicts and not torch.is_grad_enabled() else None
            total, token_loss = chunked_next_token_loss(self.features(input_ids), head, labels, softcap, predicted=best)
            return DecoderLoss(total / labels.numel(), token_loss, self.aux_loss(), best)
        output = self.model(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        logits = output.logits.float()
        if labels is None:
            return DecoderOutput(logits, self.aux_loss())
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        best = logits.argmax(-1).where(labels != IGNORED, IGNORED) if self.predicts else None
        return DecoderLoss(loss.mean(), loss.detach(), self.aux_loss(), best)

    def features(self, input_ids: Tensor) -> Tensor:
        """Compute what `to_logits` takes: int64 [B, S] → [B, S, D]; the logits themselves if the head is no matrix."""
        if self._head is None:
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits
        hidden: Tensor = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden / self._head[1]

    def to_logits(self, features: Tensor) -> Tensor:
        """Compute logits fp32 [..., V] from a part of what `features` returned."""
        if self._head is None:
            return features.float()
        head, _, softcap = self._head
        logits = F.linear(features, head).float()
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _take_batch_shape(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the layers how many sequences of how many tokens a pass has: routers see one row of tokens."""
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        shape = (args[0] if tokens is None else tokens).shape
        for layer in self.layers:
            layer.batch_shape = (shape[0], shape[1])

    def aux_loss(self) -> Tensor | None:
        """Return the sum of the rule's auxiliary losses in the last training pass; `None` for none."""
        losses = [layer.aux_loss for layer in self.layers if layer.aux_loss is not None]
        return torch.stack(losses).sum() if losses and self.training else None

    def _plain_head(self) -> tuple[Tensor, float, float | None] | None:
        """Return the head's weight, the divisor of its input and the soft cap, if these give the model's logits.

        Then the loss is computed without ever holding all logits, as for our own decoder.
        """
        head, config = self.model.get_output_embeddings(), self.text_config
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return None
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        ids = self.probe()
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = F.linear(hidden / divisor, head.weight).float()
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        same = _alike(found, expected, TOLERANCES.get(hidden.dtype, 2e-2))
        return (head.weight, divisor, softcap) if same else None

    def probe(self) -> Tensor:
        """Return random tokens, int64 [2, 32 at most], for passes that look at the model."""
        generator = torch.Generator().manual_seed(2)
        shape = (2, min(PROBE_TOKENS // 2, self._context))
        return torch.randint(self.vocab_size, shape, generator=generator).to(self.model.device)

    def _check_pairs(self, where: str) -> None:
        """Prove that the model gives the same when its own choice goes through our gates and pairs."""
        ids = self.probe()
        with torch.no_grad():
            expected = self(ids).logits
            masks = [layer.record.selection.mask for layer in self.layers if layer.record is not None]
            with replay(self, masks):
                found = self(ids).logits
        if not _alike(found, expected, 5 * TOLERANCES.get(self.model.dtype, 2e-2)):
            worst = float((found - expected).abs().max())
            raise UserError(
                f"--model {where}: its MoE layers do not compute a weighted sum of their experts: with the same "
                f"experts and weights, one pair at a time, its logits differ by up to {worst:.2g}."
            )


def _number(path: str, index: int) -> str:
    numbers = [part for part in path.split(".") if part.isdigit()]
    return numbers[-1] if numbers else str(index)


def _alike(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by little, in relation to the spread of the second."""
    return bool((found - expected).abs().max() <= tolerance * expected.std().clamp_min(1e-6) * 10)
