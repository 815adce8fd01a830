"""What is logged of the loads, against a recount of the recorded masks."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.foreign_module import LENGTH, ForeignModule, MemoryLogger, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair

from lightning_moe.callbacks import LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice


class Masks(pl.Callback):
    """Masks [n, E] of every micro-batch and layer, and |cutoff − threshold| after the last."""

    def __init__(self) -> None:
        self.train: list[list[np.ndarray]] = []
        self.val: list[list[np.ndarray]] = []
        self.deviation: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        self.train.append(_masks(pl_module))
        states = [layer.state for layer in pl_module.layers()]
        if "cutoff" in states[0]:
            self.deviation.append([(s["cutoff"] - s["threshold"]).abs().mean().item() for s in states])

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        self.val.append(_masks(pl_module))


def _masks(pl_module: ForeignModule) -> list[np.ndarray]:
    return [layer.record.selection.mask.flatten(0, 1).numpy() for layer in pl_module.layers()]


def train(
    rule: RoutingRule, accumulate: int = 1, log_every_n_steps: int = 1, **options: bool
) -> tuple[MemoryLogger, Masks, LoadBalance]:
    logger, masks, balance = MemoryLogger(), Masks(), LoadBalance(**options)
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate(), masks, balance],
        logger=logger,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=log_every_n_steps,
        num_sanity_val_steps=0,
    )
    val = global_batches(2)
    val[1]["labels"][3:, 5:] = -100
    trainer.fit(ForeignModule(rule), micro_batches(global_batches(4), accumulate), micro_batches(val))
    return logger, masks, balance


def recount(masks: list[np.ndarray]) -> dict[str, float]:
    mask = np.concatenate(masks)
    load, fanout = mask.sum(0), mask.sum(1)
    return {
        "max_load": load.max() / load.mean(),
        "load_cv": load.std() / load.mean(),
        "dead_experts": (load == 0).sum(),
        "fanout_mean": fanout.mean(),
        "fanout_0_share": (fanout == 0).mean(),
        "fanout_1_share": (fanout == 1).mean(),
        "fanout_2plus_share": (fanout >= 2).mean(),
    }


@pytest.mark.parametrize(("accumulate", "log_every_n_steps"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_training_values_are_those_of_the_steps_since_the_last_logging(accumulate: int, log_every_n_steps: int) -> None:
    logger, masks, _ = train(ExpertThreshold(capacity_factor=None), accumulate, log_every_n_steps)
    steps = [step for step, values in logger.logged.items() if "routing/max_load" in values]
    assert steps == list(range(log_every_n_steps - 1, 4, log_every_n_steps))
    for step in steps:
        end = (step + 1) * accumulate
        window = masks.train[end - log_every_n_steps * accumulate : end]
        layers = [recount([batch[layer] for batch in window]) for layer in range(2)]
        logged = logger.logged[step]
        for name in layers[0]:
            values = [layer[name] for layer in layers]
            over_layers = {"max_load": max, "load_cv": max, "dead_experts": sum}.get(name, np.mean)(values)
            assert logged[f"routing/{name}"] == pytest.approx(over_layers, rel=1e-5), name
            for layer, value in zip(("layer_01", "layer_02"), values, strict=True):
                assert logged[f"routing/{layer}/{name}"] == pytest.approx(value, rel=1e-5)
        deviation = masks.deviation[end - 1]
        assert logged["routing/cutoff_deviation"] == pytest.approx(max(deviation), rel=1e-4, abs=1e-7)
        assert logged["routing/layer_02/cutoff_deviation"] == pytest.approx(deviation[1], rel=1e-4, abs=1e-7)


def test_evaluation_values_leave_padding_out() -> None:
    logger, masks, balance = train(ExpertThreshold())
    [values] = [values for values in logger.logged.values() if "val_routing/max_load" in values]
    counted = np.ones((8, LENGTH), dtype=bool)
    counted[3:, 5:] = False
    for layer in range(2):
        valid = [masks.val[0][layer], masks.val[1][layer][counted.flatten()]]
        for name, value in recount(valid).items():
            assert values[f"val_routing/layer_{layer + 1:02d}/{name}"] == pytest.approx(value, rel=1e-5), name
        load = np.concatenate(valid).sum(0)
        np.testing.assert_allclose(balance.evaluation_load[layer], load / load.mean(), rtol=1e-6)
    assert "val_routing/cutoff_deviation" not in values  # a training batch's


def test_capacity_rates_and_each_experts_load_are_logged_on_demand() -> None:
    logger, masks, _ = train(ExpertThreshold(capacity_factor=0.1), per_layer=False, per_expert=True)
    logged = logger.logged[3]
    assert {"routing/saturation_rate", "routing/starvation_rate"} <= logged.keys()
    assert "routing/layer_01/max_load" not in logged
    load = masks.train[3][1].sum(0)
    for expert in range(4):
        relative = load[expert] / load.mean()
        assert logged[f"routing/layer_02/load/expert_{expert:02d}"] == pytest.approx(relative, rel=1e-5)


class Routers(pl.Callback):
    """Logits [n, E] of the second MoE layer and its thresholds, of every micro-batch, before the step changes them."""

    def __init__(self) -> None:
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: ForeignModule) -> None:
        layer = pl_module.layers()[1]
        thresholds = layer.state["threshold"].double().numpy(force=True).copy()
        self.seen.append((layer.record.logits.double().flatten(0, 1).numpy(), thresholds))

    def statistics(self, micro_batches: int) -> dict[str, float]:
        """Those of the last micro-batches together."""
        logits = np.concatenate([logits for logits, _ in self.seen[-micro_batches:]])
        chosen = np.concatenate([logits > thresholds for logits, thresholds in self.seen[-micro_batches:]])
        gates = 1 / (1 + np.exp(-logits))
        return {"logit_std": logits.std(), "gate_std": gates.std(), "raw_fanout_mean": chosen.sum(-1).mean()}


def test_spread_of_the_router_and_what_thresholds_alone_would_choose() -> None:
    logger = MemoryLogger()
    warmups = (ThresholdWarmup(steps=2), 4), (ThresholdWarmup(tokens=10**9), 1)
    for capacity, (warmup, batches) in zip((0.1, None), warmups, strict=True):  # capacity acts; warm-up
        routers = Routers()
        callbacks = [warmup, RoutingStateUpdate(), routers, LoadBalance()]
        trainer = make_trainer(callbacks, logger=logger, log_every_n_steps=1)
        trainer.fit(ForeignModule(ExpertThreshold(capacity_factor=capacity)), micro_batches(global_batches(batches)))
        logged = logger.logged[batches - 1]
        for name, value in routers.statistics(1).items():
            assert logged[f"routing/layer_02/{name}"] == pytest.approx(value, rel=1e-4), name


def statistics_of(accumulate: int, world_size: int = 1, rank: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """The router statistics logged at the fourth of four steps, and those of this rank's part of it."""
    logger, routers = MemoryLogger(), Routers()
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate(), routers, LoadBalance()],
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        strategy="auto" if world_size == 1 else "ddp",
        devices=world_size,
    )
    module = ForeignModule(ExpertThreshold(capacity_factor=None))
    trainer.fit(module, micro_batches(global_batches(4), accumulate, rank, world_size))
    own = routers.statistics(accumulate)
    return {name: logger.logged.get(3, {}).get(f"routing/layer_02/{name}") for name in own}, own


def test_router_statistics_are_of_the_whole_step_on_all_ranks(gloo_pair: GlooPair) -> None:
    """One process has the step in one micro-batch; the others see parts of it that differ."""
    _, expected = statistics_of(1)
    assert statistics_of(4)[0] == pytest.approx(expected, rel=1e-4)
    for accumulate in (1, 2):
        (logged, own), _ = gloo_pair.run(statistics_of, [(accumulate, 2, rank) for rank in (0, 1)])
        assert logged == pytest.approx(expected, rel=1e-4)
        assert all(abs(own[name] - expected[name]) > 1e-3 * expected[name] for name in own)


def test_rules_without_thresholds_have_no_deviation_and_the_dense_model_no_values() -> None:
    logged = train(TokenChoice())[0].logged[0]
    assert "routing/max_load" in logged
    assert "routing/cutoff_deviation" not in logged
    logger, module = MemoryLogger(), ForeignModule(None)
    make_trainer([LoadBalance(), RoutingStateUpdate()], logger=logger).fit(module, micro_batches(global_batches(2)))
    assert not [name for values in logger.logged.values() for name in values if "routing" in name]


def test_layers_are_named_by_their_block() -> None:
    module = ForeignModule(ExpertThreshold(), num_layers=4, num_dense_layers=2)
    assert list(named_moe_layers(module)) == ["layer_02", "layer_03"]
    twice = torch.nn.ModuleDict(
        {"encoder": ForeignModule(ExpertThreshold()), "decoder": ForeignModule(ExpertThreshold())}
    )
    names = named_moe_layers(twice)
    assert len(names) == 4
    assert len({id(layer) for layer in names.values()}) == 4
    alone = torch.nn.ModuleDict({"moe": module.layers()[0]})
    assert list(named_moe_layers(alone)) == ["layer_00"]


@pytest.mark.parametrize("rule", [ExpertThreshold(), TokenChoice()], ids=lambda rule: type(rule).__name__)
def test_a_single_expert_has_a_load_in_every_layer(rule: RoutingRule) -> None:
    """torchmetrics makes a single number of a tensor with one element."""
    logger, balance = MemoryLogger(), LoadBalance(per_expert=True)
    trainer = make_trainer([RoutingStateUpdate(), balance], logger=logger, log_every_n_steps=1)
    module = ForeignModule(rule, num_experts=1)
    trainer.fit(module, micro_batches(global_batches(2)), micro_batches(global_batches(2)))
    used = [layer.record.selection.mask.any() for layer in module.layers()]
    assert balance.evaluation_load is not None
    assert balance.evaluation_load.tolist() == [[float(some)] for some in used]
    assert logger.logged[1]["routing/layer_01/load/expert_00"] == 1
