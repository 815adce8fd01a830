"""The LightningModule: what it logs, what its hyperparameters rebuild, which checkpoints it refuses."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import (
    LENGTH,
    VOCABULARY,
    MemoryLogger,
    global_batches,
    make_trainer,
    micro_batches,
    tiny_config,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.model import next_token_loss
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertChoice, ExpertThreshold, RoutingRule, TokenChoice, TokenChoiceAuxLoss

TOKEN_BYTES = torch.arange(VOCABULARY) % 5


class Batches(pl.LightningDataModule):
    """The same validation batches, with padding, for validation and test."""

    token_bytes = TOKEN_BYTES

    def __init__(self, steps: int, accumulate: int) -> None:
        super().__init__()
        self.steps, self.accumulate = steps, accumulate
        self.evaluation = global_batches(3)
        self.evaluation[2]["labels"][1:] = -100

    def train_dataloader(self) -> DataLoader:
        return micro_batches(global_batches(self.steps), self.accumulate)

    def val_dataloader(self) -> DataLoader:
        return micro_batches(self.evaluation)

    def test_dataloader(self) -> DataLoader:
        return micro_batches(self.evaluation)

    def predict_dataloader(self) -> DataLoader:
        return micro_batches(self.evaluation)


def make_module(rule: RoutingRule | None = TokenChoice(), **options: object) -> LanguageModel:  # noqa: B008
    return LanguageModel(tiny_config(**options), rule, OptimizerConfig(), ScheduleConfig(adamw_warmup_steps=1))


def fit(
    module: LanguageModel, steps: int = 3, accumulate: int = 1, **options: object
) -> tuple[pl.Trainer, MemoryLogger, Batches]:
    logger, data = MemoryLogger(), Batches(steps, accumulate)
    callbacks = [ThresholdWarmup(), RoutingStateUpdate()]
    trainer = make_trainer(callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=accumulate, **options)
    trainer.fit(module, datamodule=data)
    return trainer, logger, data


def test_training_loss_is_the_mean_over_all_accumulation_steps() -> None:
    """Not the last micro-batch's; the auxiliary loss apart."""
    losses: list[float] = []

    class Recording(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                losses.append(next_token_loss(self(batch["input_ids"]), batch["labels"]).mean().item())
            return super().training_step(batch, batch_idx)

    module = Recording(
        tiny_config(), TokenChoiceAuxLoss(aux_loss_coef=0.5), OptimizerConfig(), ScheduleConfig(adamw_warmup_steps=1)
    )
    _, logger, _ = fit(module, steps=3, accumulate=2)
    for step in range(3):
        mean = sum(losses[2 * step : 2 * step + 2]) / 2
        assert logger.logged[step]["train/loss"] == pytest.approx(mean, rel=1e-6)
        assert logger.logged[step]["train/aux_loss"] > 0.4  # about 0.5 per MoE layer


@torch.no_grad()
def test_evaluation_is_over_all_tokens_and_no_padding() -> None:
    module = make_module(ExpertThreshold())
    trainer, logger, data = fit(module)
    nll = tokens = text_bytes = 0.0
    module.eval()
    for batch in data.evaluation:
        loss = next_token_loss(module(batch["input_ids"]), batch["labels"]).double()
        valid = batch["labels"] != -100
        nll, tokens = nll + loss[valid].sum().item(), tokens + valid.sum().item()
        text_bytes += TOKEN_BYTES[batch["labels"][valid]].sum().item()
    [logged] = [values for values in logger.logged.values() if "val/loss" in values]
    [tested] = trainer.test(module, datamodule=data, verbose=False)
    for stage, values in (("val", logged), ("test", tested)):
        assert values[f"{stage}/loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert values[f"{stage}/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
        assert values[f"{stage}/bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)


@torch.no_grad()
def test_prediction_gives_loss_and_fanout_of_every_position() -> None:
    module = make_module(ExpertThreshold())
    trainer, _, data = fit(module)
    [prediction, *_] = trainer.predict(module, datamodule=data)
    batch = data.evaluation[0]
    module.eval()
    torch.testing.assert_close(prediction["loss"], next_token_loss(module(batch["input_ids"]), batch["labels"]))
    fanout = sum((layer.record.logits > layer.state["threshold"]).sum(-1) for layer in module.decoder.moe_layers())
    assert torch.equal(prediction["fanout"], fanout)
    assert prediction["fanout"].shape == (8, LENGTH)
    assert torch.equal(prediction["labels"], batch["labels"])


RULES = [
    None,
    TokenChoice(),
    TokenChoiceAuxLoss(0.3),
    ExpertChoice(pool="sequence"),
    ExpertThreshold(capacity_factor=None),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_hyperparameters_of_a_checkpoint_rebuild_the_module(tmp_path: Path, rule: RoutingRule | None) -> None:
    module = LanguageModel(
        tiny_config(activation="swiglu", num_key_value_heads=1),
        rule,
        OptimizerConfig(muon_lr=0.01),
        ScheduleConfig(adamw_warmup_steps=1),
    )
    trainer, _, _ = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)  # plain data: no pickled classes
    again = LanguageModel.from_hyperparameters(checkpoint["hyper_parameters"])
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert again.decoder.config == module.decoder.config
    assert again.optimizer_config == module.optimizer_config
    assert again.schedule_config == module.schedule_config
    assert [layer.rule for layer in again.decoder.moe_layers()] == [rule] * (0 if rule is None else 2)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH))
    assert torch.equal(again.eval()(tokens), module.eval()(tokens))
    for name, buffer in module.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)


@pytest.mark.parametrize(
    ("rule", "options", "named"),
    [
        (TokenChoice(), {"hidden_size": 32}, [r"model\.decoder\.hidden_size: checkpoint 16, this model 32"]),
        (
            TokenChoice(),
            {"num_experts": 8, "activation": "swiglu"},
            ["num_experts: checkpoint 4, this model 8", "activation: checkpoint 'relu2', this model 'swiglu'"],
        ),
        (ExpertChoice(), {}, [r"model\.routing: checkpoint '.*TokenChoice', this model '.*ExpertChoice'"]),
        (None, {}, [r"model\.routing: checkpoint '.*TokenChoice', this model None"]),
    ],
    ids=["size", "two_keys", "rule", "dense"],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_what_differs(
    tmp_path: Path, rule: RoutingRule | None, options: dict[str, object], named: list[str]
) -> None:
    trainer, _, _ = fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for message in named:
        with pytest.raises(UserError, match=message):
            make_trainer([]).fit(
                make_module(rule, **options), micro_batches(global_batches(1)), ckpt_path=tmp_path / "a.ckpt"
            )


def test_what_changes_no_weight_may_differ(tmp_path: Path) -> None:
    trainer, _, _ = fit(make_module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = make_module(activation_checkpointing=True, max_sequence_length=2 * LENGTH)
    trainer = make_trainer([], max_epochs=2)
    trainer.fit(other, datamodule=Batches(3, 1), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert trainer.global_step == 6


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match="not written by lightning_moe"):
        make_module().on_load_checkpoint({"state_dict": {}})


def test_the_module_generates() -> None:
    tokens = make_module().generate(torch.zeros(2, 3, dtype=torch.int64), 4, seed=1)
    assert tokens.shape == (2, 7)
