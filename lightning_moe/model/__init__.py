"""The decoder in pure torch. It knows nothing of Lightning, and of routing only the interface of a rule."""

from lightning_moe.model.causal_lm import CausalLM, DecoderLoss, DecoderOutput, ModelSize
from lightning_moe.model.complete import Completion, Piece, complete, stream_text
from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.count import check_memory, model_size
from lightning_moe.model.decoder import Decoder, next_token_loss
from lightning_moe.model.generate import Chunk, generate, generate_stream
from lightning_moe.model.inference_experts import inference_num_experts_per_token
from lightning_moe.model.moe import MoELayer
from lightning_moe.model.moe_layers import in_phase, named_moe_layers, replay
from lightning_moe.model.routed_layer import RoutedLayer

__all__ = [
    "CausalLM",
    "Chunk",
    "Completion",
    "Decoder",
    "DecoderConfig",
    "DecoderLoss",
    "DecoderOutput",
    "MoELayer",
    "ModelSize",
    "Piece",
    "RoutedLayer",
    "check_memory",
    "complete",
    "generate",
    "generate_stream",
    "in_phase",
    "inference_num_experts_per_token",
    "model_size",
    "named_moe_layers",
    "next_token_loss",
    "replay",
    "stream_text",
]
