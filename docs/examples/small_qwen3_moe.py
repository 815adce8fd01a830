"""Train a small Mixture-of-Experts model of a released family, and save it as a `transformers` folder.

    python docs/examples/small_qwen3_moe.py FOLDER

takes about five minutes on two CPU cores. The folder then stands for a released model in everything that
`lightning_moe` does with one. Architecture and file format are those of `transformers`. The text (the standard library
of Python) and the tokenizer are ours, so nothing is downloaded.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightning_moe.data import StandardLibrary, TextDataModule, TokenizerConfig
from lightning_moe.data.tokenizer import END_OF_TEXT

CONTEXT, EXPERTS, CHOSEN = 256, 16, 4
WINDOWS_PER_STEP = 8
LEARNING_RATE, WARMUP_STEPS = 4e-3, 40
BALANCE_WEIGHT = 0.01  # of the load-balancing loss, as for OLMoE (arXiv 2409.02060)
BIAS_STEP = 0.002  # per optimizer step, of the biases that DeepSeek-V3 has instead of that loss (arXiv 2408.15664)

COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "num_experts_per_tok": CHOSEN,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 32},
    "olmoe": {"num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 320,  # of the dense first layer: as much as four experts and the shared one
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
    },
}


def make_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return an untrained model: 16 experts per layer, of which 4 see a token; 128 channels, 4 layers."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {**COMMON, **FAMILIES[family], **ids, "vocab_size": len(tokenizer)}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(balance_by_bias)
    return model


def balance_by_bias(router: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise the bias of experts that got fewer tokens than the mean in this batch, and lower the others'."""
    if router.training:
        load = torch.bincount(output[2].flatten(), minlength=EXPERTS).float()
        router.e_score_correction_bias += BIAS_STEP * (load.mean() - load).sign()


def make_tokenizer(data: TextDataModule) -> PreTrainedTokenizerFast:
    """Return the data's tokenizer for transformers; it begins each text with `<|endoftext|>`, as the data do."""
    backend = tokenizers.Tokenizer.from_str(data.tokenizer.to_text())
    start = (END_OF_TEXT, data.tokenizer.end_of_text_id)
    backend.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def share_of_learning_rate(step: int, steps: int) -> float:
    """Rise linearly to 1 during the warmup, then fall linearly to 0."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(steps - WARMUP_STEPS, 1), 1.0)


def train(model: PreTrainedModel, data: TextDataModule, steps: int) -> Iterator[tuple[int, float, float]]:
    """Train with AdamW; after each step, yield its number, the loss in nats per token and the balancing loss."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_learning_rate(step, steps))
    model.train()
    for step, batch in zip(range(1, steps + 1), data.train_dataloader(), strict=False):
        output = model(batch["input_ids"], output_router_logits=True, use_cache=False)
        loss = cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
        balance = getattr(output, "aux_loss", None)  # the number of chosen experts if all get equally many tokens
        total = loss if balance is None else loss + BALANCE_WEIGHT * balance
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item(), float("nan") if balance is None else balance.item()


@torch.no_grad()
def validation_loss(model: PreTrainedModel, data: TextDataModule) -> float:
    """Return nats per token of the held-out documents."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in data.val_dataloader():
        labels = batch["labels"].flatten()
        logits = model(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
        total += cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        tokens += int((labels != -100).sum())
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="new folder for the model")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of 2048 tokens")
    parser.add_argument("--seed", type=int, default=1, help="random seed of weights and training order")
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"{options.folder} exists already. Name a new folder.")

    torch.manual_seed(options.seed)
    data = TextDataModule(
        corpus=StandardLibrary(),
        tokenizer=TokenizerConfig(vocab_size=4096),
        sequence_length=CONTEXT,
        global_batch_size=WINDOWS_PER_STEP,
        validation_fraction=0.05,
        seed=options.seed,
    )
    data.prepare_data()
    data.setup("fit")
    tokenizer = make_tokenizer(data)
    model = make_model(options.family, tokenizer)
    embedding = model.get_input_embeddings().weight.numel()
    print(f"{options.family}: {model.num_parameters() - embedding:,} parameters and {embedding:,} in the embedding")

    began, curve = time.monotonic(), []
    for step, loss, balance in train(model, data, options.steps):
        if step % 20 == 0 or step == options.steps:
            curve.append({"step": step, "loss": loss, "balance": balance, "seconds": time.monotonic() - began})
            print(f"step {step}: loss {loss:.3f}, balance {balance:.2f}, {curve[-1]['seconds']:.0f} s", flush=True)
    loss = validation_loss(model, data)
    print(f"validation loss {loss:.4f} nats per token")

    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    record = {
        "family": options.family,
        "seed": options.seed,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": data.describe(),
        "validation_loss": loss,
        "curve": curve,
    }
    (options.folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
