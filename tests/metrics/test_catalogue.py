"""The catalogue of metrics against what training logs, and the tables and charts that follow from it."""

import re
import subprocess
import sys
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import VOCABULARY, MemoryLogger, global_batches, make_trainer, micro_batches, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_moe.callbacks import LoadBalance, RoutingStateUpdate, ThresholdWarmup, Throughput
from lightning_moe.metrics.catalogue import CATALOGUE, domain_parts, parse, shown_in
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoiceAuxLoss
from lightning_moe.tracking.files import RESERVED_METRIC_NAMES, is_valid_name
from lightning_moe.tracking.view import CHARTS, COLUMNS


class RandomText(pl.LightningDataModule):
    """Random tokens of two bytes each; the text of the evaluation has two domains."""

    token_bytes = torch.full((VOCABULARY,), 2)

    def train_dataloader(self) -> DataLoader:
        return micro_batches(global_batches(24))

    def val_dataloader(self) -> DataLoader:
        [batch] = global_batches(1)
        loader = micro_batches([batch | {"domains": batch["labels"] % 2}])
        loader.domain_names = ("code", "prose")
        return loader

    test_dataloader = val_dataloader


#: logged with a `TextDataModule` only
#: logged by a distillation alone, see tests/cli/test_heal_command.py
OF_HEALING = {("train", None, "distillation_loss")}
OF_TEXT = {("train", None, "tokens_seen"), ("throughput", None, "data_wait_share")}


def train(rule: RoutingRule | None) -> set[str]:
    """Train, validate and test with everything on that logs; return the logged names."""
    logger = MemoryLogger()
    module = LanguageModel(tiny_config(), rule, OptimizerConfig(), ScheduleConfig(adamw_warmup_steps=1))
    warmup = ThresholdWarmup(steps=22, auto=True)  # later than the first window of the lag
    callbacks = [warmup, RoutingStateUpdate(), LoadBalance(per_expert=True), Throughput()]
    trainer = make_trainer(callbacks, logger=logger, log_every_n_steps=1, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=RandomText())
    trainer.test(module, datamodule=RandomText(), verbose=False)
    return {name for values in logger.logged.values() for name in values} - set(RESERVED_METRIC_NAMES) - {"epoch"}


@pytest.fixture(scope="module")
def logged() -> set[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_moe.callbacks.throughput._peak_flops", lambda *_: 1e12)  # that of a CPU is not known
        rules = [ExpertThreshold(capacity_factor=0.1), TokenChoiceAuxLoss(), None]
        return set().union(*map(train, rules))


def test_everything_that_is_logged_is_in_the_catalogue(logged: set[str]) -> None:
    assert [name for name in logged if parse(name) is None] == []


def test_everything_in_the_catalogue_is_logged(logged: set[str]) -> None:
    found = {(parsed.group, parsed.layer, parsed.metric.name) for name in logged if (parsed := parse(name))}
    for metric in CATALOGUE.values():
        layers = ["layer_01"] if metric.over_layers or metric.per_expert else []
        layers += [] if metric.per_expert else [None]
        expected = {(group, layer, metric.name) for group in metric.logged for layer in layers}
        assert expected - OF_TEXT - OF_HEALING <= found


@pytest.mark.parametrize(
    "name",
    [
        "loss", "train/los", "train/perplexity", "val/layer_01/loss", "routing/max_load/expert_01", "routing/load",
        "routing/load/expert", "val/domain_loss", "val/loss/code", "train/domain_loss/code", "val/domain_loss/a/b",
    ],
)  # fmt: skip
def test_a_name_that_nothing_logs_is_not_in_the_catalogue(name: str) -> None:
    assert parse(name) is None


def test_a_name_is_taken_apart() -> None:
    assert parse("val_routing/layer_03_1/dead_experts") == (
        "val_routing", "layer_03_1", CATALOGUE["dead_experts"], None,
    )  # fmt: skip
    assert parse("routing/layer_03/load/expert_07") == ("routing", "layer_03", CATALOGUE["load"], "expert_07")
    assert parse("val/loss") == ("val", None, CATALOGUE["loss"], None)
    assert parse("test/domain_loss/layer_1.2-ä") == ("test", None, CATALOGUE["domain_loss"], "layer_1.2-ä")


NAMES = st.one_of(st.text(max_size=300), st.text(alphabet="c_+#2 /.", max_size=4))


@given(st.lists(NAMES, max_size=8, unique=True))
def test_any_domain_becomes_part_of_a_name_of_its_own(domains: list[str]) -> None:
    parts = domain_parts(domains)
    assert len(set(parts)) == len(domains)
    for domain, part in zip(domains, parts, strict=True):
        name = f"test/domain_loss/{part}"
        assert is_valid_name(name)
        assert parse(name) == ("test", None, CATALOGUE["domain_loss"], part)
        if re.fullmatch(r"[\w-][\w.-]{,199}", domain):
            assert part == domain


def test_domains_that_would_share_a_name_are_told_apart() -> None:
    assert domain_parts(["code", "c++", "c__", "c##"]) == ["code", "c___2", "c__", "c___3"]
    assert domain_parts(["a b/c:d", "..", ".", "", "é" * 300]) == ["a_b_c_d", "_.", "_", "__2", "é" * 200]


TABLES = ("scores", "domains", "layers", "comparison", "study")


def test_tables_and_charts_show_what_they_did() -> None:
    tables = {name: [metric.name for metric in shown_in(name)] for name in TABLES}
    assert tables == {
        "scores": ["loss", "perplexity", "bits_per_byte"],
        "domains": ["domain_loss"],
        "layers": ["max_load", "dead_experts", "fanout_mean"],
        "comparison": ["loss", "bits_per_byte", "max_load", "fanout_mean", "flops_per_token", "tokens_per_second"],
        "study": ["loss", "bits_per_byte", "max_load", "fanout_mean"],
    }
    assert [column.split("`")[1] for column in COLUMNS] == [
        "routing", "seed", "sampled", "val/loss", "val/bits_per_byte", "val_routing/max_load",
        "throughput/tokens_per_second",
    ]  # fmt: skip
    charts = {"train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "routing/max_load"}
    charts |= {"val_routing/max_load", "throughput/tokens_per_second"}
    charts |= {"val/domain_loss/code", "train/gradient_norm", "train/muon_learning_rate", "train/tokens_seen"}
    names = [
        f"{group}/{metric.name}" + ("/code" if metric.per_domain else "")
        for metric in CATALOGUE.values()
        for group in metric.logged
    ]
    assert {name for name in names if re.search(CHARTS, name)} == charts
    used = Counter(table for metric in CATALOGUE.values() for table in metric.tables)
    assert set(used) == set(tables)  # no misspelt table


def test_values_are_printed_with_their_unit() -> None:
    assert CATALOGUE["loss"].text(3.14159) == "3.1416 nats per token"
    assert CATALOGUE["tokens_per_second"].text(12345.6) == "12,346"
    assert CATALOGUE["loss"].text(None) == "unknown"
    assert all(metric.text(0.5) for metric in CATALOGUE.values())


def test_tables_need_neither_torch_nor_matplotlib() -> None:
    modules = "lightning_moe.metrics.catalogue, lightning_moe.report.tables, lightning_moe.report.figures"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib', 'numpy'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
