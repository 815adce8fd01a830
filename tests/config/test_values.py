"""Values that no run can use are refused by key, with the file or flag that has them."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small_run import Command

from lightning_moe.config.check import RANGES, is_nullable
from lightning_moe.config.compose import Layer, compose
from lightning_moe.config.schema import Schema
from lightning_moe.errors import UserError
from lightning_moe.training.parse import build_parser, parse

LAUGHS = "x0: &0 [1, 1]\n" + "\n".join(f"x{i}: &{i} [*{i - 1}, *{i - 1}, *{i - 1}]" for i in range(1, 30))
PARSER = build_parser("fit")
TYPES = Schema(PARSER).types
CONFIGURED_BY_CLASS = ("trainer.accelerator", "trainer.strategy")  # null means the default


def refusal(key: str, value: Any) -> str:
    """Return the message for a value that a file gives a key; empty if it is taken."""
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    try:
        parse([*compose([], "experiment/quickstart"), Layer(Path("mine.yaml"), tree)])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", [key for key, typehint in TYPES.items() if not is_nullable(typehint)])
def test_null_is_for_nullable_keys(key: str) -> None:
    message = refusal(key, None)
    assert message.startswith((f"{key}=null (mine.yaml): must be ", f"{key}=None (mine.yaml)"))


@pytest.mark.parametrize("key", list(RANGES))
def test_numbers_outside_of_the_range(key: str) -> None:
    low, high = RANGES[key]
    for value in (low - 1, high * 10 + 1, 2**63, math.inf, math.nan):
        outside = not low <= value <= high  # NaN, too
        if outside and (isinstance(value, int) or "float" in str(TYPES[key])):
            message = refusal(key, value)
            assert message.startswith(f"{key}="), value
            assert "must be" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a\0b", "control character"), ("a\x1b[0m", "control character"), ("a\ud800b", "UTF-8"), ("x" * 200_000, "most")],
)
@pytest.mark.parametrize(
    "key", ["tracking.experiment_name", "data.cache_dir", "trainer.strategy", "data.tokenizer.file"]
)
def test_texts_that_no_file_takes(key: str, text: str, problem: str) -> None:
    message = refusal(key, text)
    assert message.startswith(f"{key}=")
    assert problem in message
    assert len(message) < 400


@pytest.mark.parametrize("value", [[3, math.inf], [1, math.nan], [1, 10**40]])
def test_numbers_in_a_list(value: list[float]) -> None:
    assert "model.decoder.num_experts_per_token" in refusal("model.decoder.num_experts_per_token", value)


def test_arguments_of_a_class() -> None:
    routing = {"class_path": "lightning_moe.routing.ExpertThreshold", "init_args": {"ema_decay": None}}
    assert refusal("model.routing", routing).startswith("model.routing.init_args.ema_decay=")
    routing["init_args"] = {"ema_decay": math.nan}
    assert "model.routing.init_args.ema_decay=nan (mine.yaml)" in refusal("model.routing", routing)


@pytest.mark.parametrize("class_path", ["..", "1", ".", "os.system", "os..path", "lightning_moe.nothing.X", "a b"])
def test_wrong_class_paths(class_path: str) -> None:
    assert "model.routing" in refusal("model.routing", {"class_path": class_path})


def test_devices_as_text() -> None:
    assert "trainer.devices='1000000000'" in refusal("trainer.devices", "1000000000")


def test_a_flag_is_named(command: Command) -> None:
    code, _, err = command("fit", "--config=small", "--trainer.max_steps=-1")
    assert (code, err) == (2, "error: trainer.max_steps=-1 (the command line): must be at least 1\n")


@pytest.mark.parametrize(("flag", "problem"), [("--seed=--", "--seed: "), ("--ckpt_path=", "--ckpt_path: is empty")])
def test_flags_without_a_value(flag: str, problem: str, command: Command) -> None:
    code, _, err = command("generate", "--ckpt_path=x", flag)
    assert code == 2
    assert problem in err


@pytest.mark.parametrize("argument", ["caf\udce9", "a\0b"])
def test_arguments_that_are_not_utf8(argument: str, command: Command) -> None:
    code, _, err = command("generate", "--ckpt_path=x", "--prompt", argument)
    assert code == 2
    assert "argument=" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run_name: !!python/object/apply:os.system [touch escaped]", "line 1: has the tag"),
        ("tracking: {tags: {a: !!binary aGk=}}", "line 1: has the tag"),
        ("a: &a [*a]", "line 1: the alias *a lies in its own anchor"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels deep"),
        (LAUGHS, "more than 100,000 values"),
        ("a: " + "1" * 11_000_000, "characters"),
        ("9" * 5000, "line 1: has a value of 5,000 characters"),
        ("run_name: \xff", "YAML"),
    ],
)  # fmt: skip
def test_yaml_that_does_more_than_hold_values(text: str, problem: str, command: Command, workplace: Path) -> None:
    (workplace / "bad.yaml").write_bytes(text.encode("latin-1"))
    code, _, err = command("fit", "--config=bad.yaml")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "bad.yaml: cannot be read as YAML" in err
    assert problem in err
    assert not (workplace / "escaped").exists()


def test_aliases_that_repeat_a_value_are_taken(command: Command, workplace: Path) -> None:
    decoder = "&d {hidden_size: 32}"
    (workplace / "good.yaml").write_text(f"model: {{decoder: {decoder}}}\ntracking: {{tags: {{a: &t x, b: *t}}}}\n")
    code, out, err = command("fit", "--config=good.yaml", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["tracking"]["tags"] == {"a": "x", "b": "x"}


def test_interpolations_in_a_circle(command: Command, workplace: Path) -> None:
    (workplace / "circle.yaml").write_text("data: {seed: '${seed_everything}'}\nseed_everything: ${data.seed}\n")
    code, _, err = command("fit", "--config=small", "--config=circle.yaml")
    assert code == 2
    assert "circle.yaml): interpolations refer to it in a circle" in err
