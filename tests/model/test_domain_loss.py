"""The loss per domain of a real model and real text, against a loop over documents; and where nothing is logged."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign_module import MemoryLogger, make_trainer
from helpers.gloo_pair import GlooPair
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.data import LocalFiles, TextDataModule, TokenizerConfig
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold

LENGTH = 16
PAIR = ("code", "prose")


def text_of(folder: Path, domains: tuple[str, ...] = PAIR, documents: int = 60) -> TextDataModule:
    """Text of each domain in words of its own."""
    paths = {}
    for number, domain in enumerate(domains):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefgh"[number:], k=3)) for _ in range(50)]
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        paths[domain] = [str(folder / str(number))]
        for document in range(documents):
            content = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            (folder / f"{number}/{document:02}.txt").write_text(content)
    return TextDataModule(
        LocalFiles(paths),
        TokenizerConfig(vocab_size=300),
        sequence_length=LENGTH,
        global_batch_size=8,
        validation_fraction=0.2,
        validation_batch_size=4,
        cache_dir=str(folder / "cache"),
    )


def make_module() -> LanguageModel:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=300, max_sequence_length=LENGTH, hidden_size=16, num_layers=2, num_attention_heads=2, num_experts=4
    )
    rule, schedule = ExpertThreshold(), ScheduleConfig(adamw_warmup_steps=1)
    module = LanguageModel(config, rule, OptimizerConfig(), schedule)
    for name, parameter in module.named_parameters():  # an untrained model would give every token the same loss
        if "unembedding" in name or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return module


def domain_losses(metrics: dict[str, Any], stage: str = "val") -> dict[str, float]:
    start = f"{stage}/domain_loss/"
    return {name.removeprefix(start): float(value) for name, value in metrics.items() if name.startswith(start)}


def validate(data: TextDataModule, **options: Any) -> dict[str, float]:
    """All that is logged."""
    [values] = make_trainer([], **options).validate(make_module(), datamodule=data, verbose=False)
    return dict(values)


@torch.no_grad()
def reference(module: LanguageModel, data: TextDataModule, windows: int | None = None) -> dict[str, float]:
    """Two loops: the losses of all windows in float64, then their mean over the tokens of each domain's documents."""
    module.eval()
    tokens, documents = data.store.tokens("validation").tolist(), data.store.documents("validation")
    losses: list[float | None] = [None]  # of each token; nothing predicts the first
    for start in range(0, len(tokens) - 1, LENGTH):
        window = torch.tensor(tokens[start : start + LENGTH + 1])
        log_probabilities = log_softmax(module(window[None, :-1])[0].double(), -1)
        losses += [-log_probabilities[i, label].item() for i, label in enumerate(window[1:].tolist())]
    seen = len(tokens) if windows is None else 1 + windows * LENGTH
    of_domain: dict[str, list[float]] = {}
    for start, end, domain in zip(
        documents["start"], [*documents["start"][1:], len(tokens)], documents["domain"], strict=True
    ):
        found = [loss for loss in losses[start : min(end, seen)] if loss is not None]
        if found:
            of_domain.setdefault(domain, []).extend(found)
    return {domain: sum(found) / len(found) for domain, found in of_domain.items()}


def test_each_domain_has_the_mean_over_its_tokens(tmp_path: Path) -> None:
    data = text_of(tmp_path)
    values = validate(data)
    expected = reference(make_module(), data)
    assert expected.keys() == set(PAIR)
    assert abs(expected["code"] - expected["prose"]) > 0.01
    assert domain_losses(values) == pytest.approx(expected, rel=1e-5)
    assert min(expected.values()) < values["val/loss"] < max(expected.values())
    [tested] = make_trainer([]).test(make_module(), datamodule=data, verbose=False)
    assert domain_losses(tested, "test") == domain_losses(values)


def validate_on_a_rank(folder: Path, limit: int | float) -> dict[str, float]:
    return validate(text_of(folder), devices=2, strategy="ddp", limit_val_batches=limit)


def test_two_processes_log_what_one_logs(tmp_path: Path, gloo_pair: GlooPair) -> None:
    data = text_of(tmp_path)
    alone = validate(data)
    for values in gloo_pair.run(validate_on_a_rank, [(tmp_path, 1.0)] * 2):
        assert domain_losses(values) == pytest.approx(domain_losses(alone), rel=1e-6)
        assert domain_losses(values) == pytest.approx(reference(make_module(), data), rel=1e-5)
    # two batches of 4 windows on one process are the first 8 windows, as is one batch on each of two
    limited = domain_losses(validate(data, limit_val_batches=2))
    for values in gloo_pair.run(validate_on_a_rank, [(tmp_path, 1)] * 2):
        assert domain_losses(values) == pytest.approx(limited, rel=1e-6)


def test_a_domain_that_a_limited_validation_did_not_reach_is_not_logged(tmp_path: Path) -> None:
    data = text_of(tmp_path)
    values = validate(data, limit_val_batches=1)
    expected = reference(make_module(), data, windows=4)
    assert expected.keys() == {"code"}  # the files of a domain lie together
    assert domain_losses(values) == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_domain_logs_its_loss_once(tmp_path: Path) -> None:
    values = validate(text_of(tmp_path, ("code",)))
    assert "val/loss" in values
    assert domain_losses(values) == {}


def test_domains_with_any_name_are_logged(tmp_path: Path) -> None:
    data = text_of(tmp_path, ("c++ / [1]", "c__", "..", "проза"), documents=30)
    found, expected = domain_losses(validate(data)), reference(make_module(), data)
    parts = {"c__": "c__", "c++ / [1]": "c______1_", "..": "_.", "проза": "проза"}
    assert found == pytest.approx({parts[domain]: loss for domain, loss in expected.items()}, rel=1e-5)


def test_another_text_has_its_own_domains(tmp_path: Path) -> None:
    """One module, one trainer; domains, others, one alone, and loaders that are given."""
    module, trainer = make_module(), make_trainer([])
    first, other = text_of(tmp_path / "first"), text_of(tmp_path / "other", ("songs", "verse", "work"))
    alone = text_of(tmp_path / "alone", ("all",))

    def found(**source: Any) -> set[str]:
        [values] = trainer.validate(module, verbose=False, **source)
        return set(domain_losses(values))

    assert found(datamodule=first) == set(PAIR)
    assert found(datamodule=other) == {"songs", "verse", "work"}
    assert found(dataloaders=first.val_dataloader()) == set(PAIR)  # though the trainer keeps the last data module
    assert found(datamodule=alone) == set()
    rows = [{key: batch[key] for key in ("input_ids", "labels")} for batch in first.val_dataloader()]
    assert found(dataloaders=DataLoader(rows, batch_size=None)) == set()
    assert found(datamodule=first) == set(PAIR)


def test_validations_inside_of_a_fit_do_not_add_up(tmp_path: Path) -> None:
    data, logger = text_of(tmp_path), MemoryLogger()
    module = make_module()
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate()], logger=logger, max_epochs=-1, max_steps=4, val_check_interval=2
    )
    trainer.fit(module, datamodule=data)
    validated = [values for values in logger.logged.values() if "val/loss" in values]
    assert [domain_losses(values).keys() for values in validated] == [set(PAIR)] * 2
    assert domain_losses(validated[1]) == pytest.approx(reference(module, data), rel=1e-5)
    assert domain_losses(validated[0]) != pytest.approx(domain_losses(validated[1]), rel=1e-3)
