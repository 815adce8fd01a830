"""One language of flags: one meaning, one flag; one flag, one meaning. Read from the real parsers of all commands."""

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import jsonargparse
import pytest

import benchmarks.__main__ as benchmarks
from lightning_moe.cli.main import COMMANDS, main
from lightning_moe.tracking import __main__ as tracking

#: whose options are the configuration's keys; those with a dot are not looked at
CONFIGURED = ("fit", "validate", "test", "predict", "prepare")
REQUIRED = "required"
#: option of several commands → metavar, beginning of its help text, and its default in each command
SHARED: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "--batch_size": (
        "B",
        "sequences in a batch",
        {"analyze": 8, "audit": 8, "generate": 32, "replay": 8, "validate --model": 8},
    ),
    "--ckpt_path": (
        "PATH",
        "checkpoint to read: a file, a sharded folder, or an export",
        dict.fromkeys(CONFIGURED)
        | dict.fromkeys(("analyze", "audit", "calibrate", "generate", "replay"))  # or --model
        | dict.fromkeys(("convert", "export"), REQUIRED),
    ),
    "--config": ("FILE", "configuration", dict.fromkeys(CONFIGURED) | {"study": [], "sweep": []}),
    "--device": (
        None,
        "torch device that the model runs on",
        dict.fromkeys(("analyze", "audit", "calibrate", "dial", "generate", "replay", "validate --model"), "cpu")
        | {"benchmarks": None},
    ),
    "--dtype": (
        None,
        "with --model, dtype of its weights",
        dict.fromkeys(("analyze", "audit", "calibrate", "dial", "generate", "replay", "validate --model"), "auto"),
    ),
    "--experiment_name": ("NAME", "MLflow experiment", {"compare": None, "tracking": None}),
    "--max_tokens": (
        "N",
        "number of tokens to read at most, 0 for all",
        {"analyze": 32768, "calibrate": 524288, "dial": 65536, "validate --model": 65536},
    ),
    "--model": (
        "DIR_OR_NAME",
        "released model of the transformers library, or thresholds for one",
        dict.fromkeys(("analyze", "audit", "calibrate", "generate", "replay"))
        | dict.fromkeys(("dial", "validate --model"), REQUIRED),
    ),
    "--name": ("NAME", "name, instead of the file's", {"study": None, "sweep": None}),
    "--no_mlflow": (None, "do not log the results to MLflow", {"analyze": False, "compare": False}),
    "--num_experts_per_token": ("K", "", dict.fromkeys(("calibrate", "dial"))),
    "--output": ("PATH", "checkpoint or export to write", dict.fromkeys(("convert", "export"), REQUIRED)),
    "--output_dir": (
        "DIR",
        "folder to write",
        dict.fromkeys(CONFIGURED, "runs")
        | {"analyze": None, "benchmarks": None, "calibrate": REQUIRED, "compare": None, "dial": REQUIRED},
    ),
    "--overwrite": (None, "replace what an earlier call", dict.fromkeys(("analyze", "convert", "export"), False)),
    "--precision": (
        None,
        "precision that the model computes in, in the trainer's words",
        dict.fromkeys(("benchmarks", "generate", "replay")),
    ),
    "--seed": (None, "random seed", {"audit": 1, "calibrate": 1, "generate": 1}),
    "--sequence_length": (
        "S",
        "tokens per sequence",
        {"analyze": None, "audit": None, "benchmarks": None, "calibrate": None, "dial": None, "validate --model": None},
    ),
    "--text": (
        "FILE",
        "file with your own text, UTF-8",
        {"analyze": [], "audit": None, "calibrate": None, "dial": None, "validate --model": []},
    ),
    "--tokenizer": (
        "FILE",
        "tokenizer.json (default: that of the export, or of the run)",
        dict.fromkeys(("analyze", "audit", "calibrate", "dial", "export", "generate", "validate --model")),
    ),
    "--tracking_uri": ("URI", "MLflow's store", {"compare": None, "tracking": None, "ui": None}),
    "--trust_remote_code": (
        None,
        "with --model, run code that comes with it",
        dict.fromkeys(("analyze", "audit", "calibrate", "dial", "generate", "replay", "validate --model"), False),
    ),
    "--workers": ("N", "", {"prepare": ..., "study": 1, "sweep": 1}),
}
#: of commands that take several
NAMED = {"--ckpt_path": "[NAME=]PATH", "--model": "[NAME=]PATH", "--text": "[NAME=]PATH"}
#: options that one command alone has
OWN = {
    "analyze": "--ablation_tokens --compare_num_experts_per_token --pools --regret_routes --regret_tokens",
    "audit": "--phase",
    "benchmarks": "--compare --hidden_size --num_experts --num_layers --num_tokens --preset "
    "--max_seconds --rounds --routing --suite --threads --vocab_size",
    "calibrate": "--balanced --with_model",
    "compare": "--allow --baseline --filter",
    "generate": "--inference_num_experts_per_token --max_new_tokens --prompt --prompt_file --save_routes "
    "--show_routing --stop --temperature --top_k --top_p",
    "plan": "--expert_parallel_size --gpu --hours --mfu --num_gpus --price",
    "prepare": "--shard_size",
    "replay": "--routes",
    "study": "--page --report",
    "ui": "--port",
    "validate --model": "--inference_num_experts_per_token",
}
#: what a command takes without a flag
POSITIONAL = {"compare": "runs", "study": "file", "sweep": "file", "tracking": "run_dir"}
PARSERS = [*COMMANDS, "validate --model", "benchmarks", "tracking"]


class Found(BaseException):
    """Ends a command when it has made its parser."""


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser with which a command reads its arguments."""

    def found(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        raise Found(parser)

    run: dict[str, Callable[[], object]] = {"benchmarks": lambda: benchmarks.run([]), "tracking": tracking.main}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", found)
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", found)
        patch.setattr(jsonargparse.ArgumentParser, "parse_object", found)
        with pytest.raises(Found) as raised:
            run.get(command, lambda: main([*command.split(), "x"]) if " " in command else main([command]))()
    parser: argparse.ArgumentParser = raised.value.args[0]
    return parser


def options(command: str) -> dict[str, argparse.Action]:
    """A command's options and arguments; of the configuration's keys the plain ones alone."""
    found = {(action.option_strings or [action.dest])[-1]: action for action in parser_of(command)._actions}
    groups = {flag.split(".")[0] for flag in found if "." in flag}
    return {
        flag: action
        for flag, action in found.items()
        if flag.split(".")[0] not in {*groups, "--help", "--print_config"}
    }


@pytest.mark.parametrize("command", PARSERS)
def test_a_command_has_these_options(command: str) -> None:
    expected = {flag for flag, (_, _, defaults) in SHARED.items() if command in defaults}
    expected |= {*OWN.get(command, "").split(), *POSITIONAL.get(command, "").split()}
    if command in CONFIGURED:
        expected |= {"--run_name", "--seed_everything"}
    assert set(options(command)) == expected


def of_several(command: str) -> set[str]:
    """Options of a command that may be given several times, each with a name."""
    return {"analyze": set(NAMED), "validate --model": {"--text"}}.get(command, set())


@pytest.mark.parametrize("flag", SHARED)
def test_an_option_means_the_same_everywhere(flag: str) -> None:
    metavar, meaning, defaults = SHARED[flag]
    for command, default in defaults.items():
        action = options(command)[flag]
        assert default is ... or (REQUIRED if action.required else action.default) == default, command
        if command not in CONFIGURED:
            assert action.metavar == (NAMED.get(flag, metavar) if flag in of_several(command) else metavar), command
            assert str(action.help).startswith(meaning), command


@pytest.mark.parametrize("command", [command for command in PARSERS if command not in CONFIGURED])
def test_no_other_spelling_of_a_flag_is_taken(command: str) -> None:
    assert not parser_of(command).allow_abbrev
    assert all(len(action.option_strings) <= 1 for action in options(command).values())
