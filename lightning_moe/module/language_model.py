"""The LightningModule: loss, metrics, optimizer. The callbacks update the routing state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_moe.checkpoints.content import check_weights
from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.hf.healing import Healing
from lightning_moe.hf.pretrained import PretrainedConfig
from lightning_moe.internals.lightning import attached_trainer
from lightning_moe.metrics.domain_loss import DomainLossMetric
from lightning_moe.metrics.language_modeling import LanguageModelingMetric
from lightning_moe.model import (
    CausalLM,
    Decoder,
    DecoderConfig,
    DecoderLoss,
    check_memory,
    generate,
    inference_num_experts_per_token,
    model_size,
)
from lightning_moe.model.compilation import why_not_compiled
from lightning_moe.model.routed_layer import HOW_TO_UPDATE
from lightning_moe.module.from_checkpoint import build, check_architecture, decoder_or_pretrained
from lightning_moe.module.losses import StepLosses
from lightning_moe.module.sharding import number_by_parameters, shard
from lightning_moe.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    clip_by_global_norm,
    global_norm,
)
from lightning_moe.optim.schedule import use_settings
from lightning_moe.routing import ExpertThreshold, RoutingRule, rule_from_config
from lightning_moe.user_paths import user_path

Batch = dict[str, Tensor]


class LanguageModel(pl.LightningModule):
    """A decoder under a routing rule, trained on next-token loss; or a released model that is healed.

    It logs means over the global batch: ``train/loss`` (cross-entropy, nats per token) and, if there are any,
    ``train/aux_loss`` of rule or router and ``train/distillation_loss``. Of an evaluation it logs ``val/…`` or
    ``test/…`` ``loss``, ``perplexity`` and ``bits_per_byte`` (the last if the data module offers ``token_bytes``), and
    ``domain_loss/<domain>`` if the text has several domains.

    Args:
        decoder: sizes and options of the decoder; of a released model only ``max_sequence_length`` counts.
        routing: rule of every MoE layer; null for the dense model of the same active FLOPs.
        optimizer: rules and rates, see `OptimizerConfig`.
        schedule: learning-rate schedule, see `ScheduleConfig`.
        compile: whether ``torch.compile`` compiles the blocks in training and evaluation. ``auto`` compiles on CUDA
            devices if Triton and a C compiler are there, and goes on uncompiled, with a warning, if the compiler fails.
            On a CPU true needs a C++ compiler. Decoding with the cache stays as it is.
        init_from: checkpoint or export whose weights and routing state ``fit`` starts from; optimizer, steps and data
            start afresh. To continue a run, give ``ckpt_path`` instead.
        inference_num_experts_per_token: experts per token in ``validate``, ``test`` and ``predict`` (a mean for
            threshold rules), one value or one per MoE layer; null routes as trained. See
            `model.inference_num_experts_per_token`. Not for ``fit``.
        pretrained: released model that is trained in place of a decoder made here, see `PretrainedConfig`. Checkpoints
            then hold what is trained, the routing state, and the model's name and digest, not the model.
    """

    def __init__(
        self,
        decoder: DecoderConfig = DecoderConfig(),  # noqa: B008 - frozen
        routing: RoutingRule | None = ExpertThreshold(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        compile: bool | Literal["auto"] = "auto",
        init_from: str | None = None,
        inference_num_experts_per_token: float | list[float] | None = None,
        pretrained: PretrainedConfig = PretrainedConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.compile_blocks = compile
        self.init_from = None if init_from is None else str(user_path(init_from, "model.init_from"))
        self.inference_num_experts_per_token = inference_num_experts_per_token
        self._inference_routing = ExitStack()
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.healing: Healing | None = None
        self.decoder: CausalLM
        if pretrained.path is None:
            self.size = model_size(decoder, routing)
            if torch.get_default_device().type == "cpu":
                check_memory(self.size)
            self.decoder = Decoder(decoder, routing)
            self.flops_per_token = self.size.flops_per_token  # read by the Throughput callback
        else:
            if compile is True:
                raise UserError("model.compile=true: the layers of a released model are not compiled; leave it at auto")
            self.compile_blocks = False
            self.healing = Healing(pretrained, routing, decoder.max_sequence_length)
            self.decoder = self.healing.lm
            self.size, self.flops_per_token = self.decoder.size, self.healing.flops_per_token
        self.save_hyperparameters(
            {
                "decoder": dataclasses.asdict(decoder) if self.healing is None else self.healing.sizes,
                "pretrained": None if self.healing is None else self.healing.description,
                "routing": None if routing is None else routing.to_config(),
                "optimizer": dataclasses.asdict(optimizer),
                "schedule": dataclasses.asdict(schedule),
            },
            logger=False,  # the command line records the whole composed configuration
        )
        self.evaluation = LanguageModelingMetric()  # of the running validation or test
        self.domain_loss: DomainLossMetric | None = None  # of the same; `None` if its text has no domains
        self._losses = StepLosses()
        self._group_settings: list[dict[str, Any]] = []  # of the optimizer's parameter groups, as configured

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str = "cpu"
    ) -> LanguageModel:
        """Build the model of a checkpoint of any kind, with weights and routing state, in ``eval()``.

        Raises:
            UserError: the checkpoint cannot be read, or its weights do not fit its configuration.
        """
        path = Path(checkpoint_path)
        return cls.from_checkpoint(read_checkpoint(path), str(path)).to(map_location)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> LanguageModel:
        """Build the model from the content of a checkpoint.

        Args:
            checkpoint: content, as `read_checkpoint` returns it.
            where: file of the checkpoint, for messages.

        Raises:
            UserError: its weights do not fit its configuration.
        """
        return build(cls.from_hyperparameters, checkpoint, where)

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Mapping[str, Any]) -> LanguageModel:
        """Build the module that a checkpoint's ``hyper_parameters`` describe."""
        decoder, pretrained = decoder_or_pretrained(hyperparameters)
        return cls(
            decoder,
            rule_from_config(hyperparameters["routing"]),
            OptimizerConfig(**hyperparameters["optimizer"]),
            ScheduleConfig(**hyperparameters["schedule"]),
            pretrained=pretrained,
        )

    def configure_model(self) -> None:
        """Compile the blocks; under FSDP2 (``ModelParallelStrategy``) shard parameters over the data-parallel ranks.

        If the strategy has a mesh for experts (``FullyShardedStrategy.expert_mesh``), they are distributed over it.
        """
        self._compile()
        if self.init_from is not None and attached_trainer(self) and not isinstance(self.decoder, FSDPModule):
            self._load_initial_weights(self.init_from)
        mesh = self.device_mesh if attached_trainer(self) else None
        if mesh is None or isinstance(self.decoder, FSDPModule):
            return
        assert isinstance(self.decoder, Decoder)  # `training.layout` refuses others
        shard(self.decoder, mesh, self._expert_mesh)

    def _compile(self) -> None:
        """Compile the blocks if it was asked for, or by default if it works and pays on the device, and say so."""
        if self.compile_blocks is False or not isinstance(self.decoder, Decoder) or self.decoder.compiled:
            return
        if self.compile_blocks == "auto":
            device = self.trainer.strategy.root_device if attached_trainer(self) else next(self.parameters()).device
            reason = why_not_compiled(device)
            if reason is not None:
                if device.type == "cuda":
                    rank_zero_info(f"The blocks are not compiled, which is slower: {reason}.")
                return
        rank_zero_info("Compiling the blocks; the first steps of training and of validation take longer.")
        self.decoder.compile_blocks(or_eager=self.compile_blocks == "auto")

    def _load_initial_weights(self, path: str) -> None:
        """Load the weights for a ``fit`` from its first step on; a resumed run has weights of its own."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.ckpt_path is not None:
            return
        try:
            checkpoint = read_checkpoint(Path(path))
            self.check_architecture(Path(path), checkpoint)
            check_weights(self.state_dict(), checkpoint["state_dict"], path)
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error
        self.load_state_dict(checkpoint["state_dict"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute next-token logits fp32 [B, S, V] from int64 [B, S]."""
        logits: Tensor = self.decoder(input_ids).logits
        return logits

    def on_fit_start(self) -> None:
        if self.inference_num_experts_per_token is not None:
            raise UserError(
                f"model.inference_num_experts_per_token={self.inference_num_experts_per_token}: for validate, test and "
                "predict; fit trains for model.decoder.num_experts_per_token."
            )
        rules = {layer.rule for layer in self.decoder.moe_layers() if layer.rule.updates_state}
        if rules and not any(getattr(one, "updates_routing_state", False) for one in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.callbacks has none that updates the routing state, which {type(rules.pop()).__name__} needs: "
                f"it would route as at the start for ever. {HOW_TO_UPDATE}"
            )

    def on_train_start(self) -> None:
        """Train with the configured rates and decays, where Lightning has restored those of the checkpoint."""
        [optimizer], [schedule] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        differing = use_settings(optimizer, schedule.scheduler, self._group_settings)  # type: ignore[arg-type]
        if differing:
            rates = "; ".join(f"{name} {before:.4g} → {now:.4g}" for name, (before, now) in differing.items())
            rank_zero_info(f"Learning rates from step {self.trainer.global_step} on: {rates}")

    def on_validation_start(self) -> None:
        self._inference_routing.enter_context(
            inference_num_experts_per_token(self.decoder, self.inference_num_experts_per_token)
        )
        # Made anew, from the loader that gives the batches: the next text may have other domains.
        loader = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        domains = getattr(loader, "domain_names", ())
        self.domain_loss = DomainLossMetric(domains).to(self.device) if domains else None

    def on_validation_end(self) -> None:
        self._inference_routing.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        input_ids, labels = batch["input_ids"], batch["labels"]
        output = (self.decoder if self.healing is None else self.healing.loss)(input_ids, labels=labels)
        assert isinstance(output, DecoderLoss)
        return self._losses.add(output)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log means over all accumulation steps and ranks, instead of the last micro-batch's losses."""
        for name, mean in self._losses.take().items():
            self.log(f"train/{name}", mean)
        if (self.trainer.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._log_optimization(optimizer)

    def _log_optimization(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping, the largest learning rate of each rule, and the tokens seen so far."""
        self.log("train/gradient_norm", global_norm(self.parameters(), self._expert_mesh is not None))
        for rule in dict.fromkeys(group["rule"] for group in optimizer.param_groups):
            rates = [group["lr"] for group in optimizer.param_groups if group["rule"] == rule]
            self.log(f"train/{rule}_learning_rate", max(rates))
        data = getattr(attached_trainer(self), "datamodule", None)
        if isinstance(data, TextDataModule):
            tokens = (data.position + data.global_batch_size) * data.sequence_length  # with those of this step
            self.log("train/tokens_seen", torch.tensor(tokens, dtype=torch.float64))  # fp32 is exact to 2²⁴ only

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        token_loss = self.decoder(batch["input_ids"], labels=batch["labels"]).token_loss
        token_bytes = getattr(getattr(attached_trainer(self), "datamodule", None), "token_bytes", None)
        if token_bytes is not None:
            token_bytes = token_bytes.to(self.device)
        self.evaluation.update(token_loss, batch["labels"], token_bytes)
        if self.domain_loss is not None:
            self.domain_loss.update(token_loss, batch["domains"])

    def on_validation_epoch_end(self) -> None:
        stage, values = "test" if self.trainer.testing else "val", self.evaluation.compute()
        self.evaluation.reset()
        if self.domain_loss is not None:
            values |= self.domain_loss.compute()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss")

    # `test` is `validate` under another name
    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``labels`` int64, ``loss`` fp32 in nats and ``fanout`` int64, summed over layers, all [B, S]."""
        loss = self.decoder(batch["input_ids"], labels=batch["labels"]).token_loss
        fanout = torch.zeros_like(batch["labels"])
        for layer in self.decoder.moe_layers():
            assert layer.record is not None
            fanout += layer.record.selection.mask.sum(-1)
        return {"labels": batch["labels"], "loss": loss, "fanout": fanout}

    def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Sample a continuation of int64 [B, S]; see `model.generate`."""
        return generate(self.decoder, prompt.to(self.device), max_new_tokens, **options)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        exact = str(self.trainer.precision) in ("32-true", "64-true")
        routers = () if self.healing is None else self.healing.routers
        optimizer = build_optimizer(self.decoder, self.optimizer_config, torch.float32 if exact else None, routers)
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise UserError("trainer.max_steps=-1: the learning-rate schedule needs the number of steps of the run.")
        schedule = self.schedule_config
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few steps of any configuration
            schedule = schedule.cut_to(int(total_steps))
        scheduler = build_schedule(optimizer, schedule, int(total_steps))
        self._group_settings = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, or by our own norm for parameters on two meshes, which Lightning's cannot take."""
        if gradient_clip_val and gradient_clip_algorithm != "value" and self._expert_mesh is not None:
            clip_by_global_norm(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        number_by_parameters(self, self.decoder, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another architecture by naming what differs, before torch compares tensors."""
        check_architecture(checkpoint.get("hyper_parameters", {}), dict(self.hparams))

    def check_architecture(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Refuse as `on_load_checkpoint` does, with the file's name in the message."""
        try:
            self.on_load_checkpoint(checkpoint)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def _expert_mesh(self) -> DeviceMesh | None:
        return getattr(self.trainer.strategy, "expert_mesh", None)
