"""A small trained model, for exports: what `transformers` makes of it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.foreign_module import LENGTH, VOCABULARY, global_batches, make_trainer, micro_batches, tiny_config
from torch import Tensor

from lightning_moe.callbacks import RoutingStateUpdate
from lightning_moe.module import LanguageModel
from lightning_moe.optim import ScheduleConfig
from lightning_moe.routing import RoutingRule


def trained(rule: RoutingRule | None, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    module = LanguageModel(tiny_config(**options), rule, schedule=ScheduleConfig(adamw_warmup_steps=1))
    make_trainer([RoutingStateUpdate()]).fit(module, micro_batches(global_batches(4)))
    return module.eval()


def checkpoint_of(module: LanguageModel) -> dict[str, Any]:
    return {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict(), "global_step": 4}


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def text(batch: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
