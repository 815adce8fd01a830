"""The real parser with the packaged files: what composes, what is printed, and how mistakes are answered."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small_run import Command

from lightning_moe.config.compose import conf_root, load_layers, merge, walk

FRAGMENTS = sorted(p.relative_to(conf_root()).with_suffix("").as_posix() for p in conf_root().rglob("*.yaml"))
STRATEGY = "lightning_moe.training.strategy.FullyShardedStrategy"
EXPERIMENTS = [name for name in FRAGMENTS if name.startswith("experiment/")]


def printed(command: Command, *args: str) -> dict[str, Any]:
    code, out, err = command("fit", *args, "--print_config")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_packaged_file_says_what_the_parser_then_has(name: str, command: Command) -> None:
    config = dict(walk(printed(command, "--config", name)))
    given = merge(load_layers(conf_root() / f"{name}.yaml"))
    for key, value in walk(given):
        if not isinstance(value, dict) and not str(value).startswith("${"):
            assert config[key] == value, key


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "experiment/quickstart"])
def test_no_experiment_inherits_a_setting_of_the_quickstart_by_accident(name: str) -> None:
    own = {key for key, _ in walk(merge(load_layers(conf_root() / f"{name}.yaml")))}
    quickstart = merge(load_layers(conf_root() / "experiment/quickstart.yaml"))
    meant = {"seed_everything", "data.seed"}
    parents = ["model.routing", "data.corpus", "trainer.strategy"]
    if "model.pretrained" in own:
        parents.append("model.decoder")  # the released model decides it, and config.yaml leaves it out
    for key, value in walk(quickstart):
        replaced = any(key.startswith(f"{parent}.") for parent in parents)
        assert isinstance(value, dict) or key in own | meant or replaced, f"{name} leaves {key} to the quickstart"


@pytest.mark.parametrize(
    ("name", "normalized"), [("routing/token_choice_aux", True), ("experiment/paper_d12_tc_aux", False)]
)
def test_each_configuration_of_the_auxiliary_loss_says_its_form(name: str, normalized: bool) -> None:
    """The paper's loss is not normalised over the experts (its section 5.2)."""
    routing = merge(load_layers(conf_root() / f"{name}.yaml"))["model"]["routing"]
    assert routing["class_path"] == "lightning_moe.routing.TokenChoiceAuxLoss"
    assert routing["init_args"] == {"aux_loss_coef": 0.001, "normalized": normalized}


@pytest.mark.parametrize("name", ["experiment/paper_d12_dense", "experiment/paper_d20_et"])
def test_the_flags_that_help_shows_mean_the_files(name: str, command: Command) -> None:
    code, out, _ = command("fit", "--config", name, "--help")
    assert code == 0
    flags = shlex.split(out.rpartition("as flags:")[2])
    assert printed(command, *flags) == printed(command, "--config", name)


def test_help_all_shows_types_defaults_and_meanings(command: Command) -> None:
    code, out, _ = command("predict", "--help", "all", "--config", "routing/token_choice")
    assert code == 0
    assert "usage: python -m lightning_moe predict" in out
    assert all(f"--{key} " in out for key in ("model.decoder.rope_theta", "trainer.max_steps", "data.num_workers"))


def test_one_seed_rules_weights_and_data_order(command: Command) -> None:
    assert printed(command, "--seed_everything=7")["data"]["seed"] == 7
    assert printed(command, "--seed_everything=7", "--data.seed=3")["data"]["seed"] == 3


def test_no_arguments_mean_the_quickstart_and_every_default_is_printed(command: Command) -> None:
    config = printed(command)
    quickstart = merge(load_layers(conf_root() / "experiment/quickstart.yaml"))
    assert config["trainer"]["max_steps"] == quickstart["trainer"]["max_steps"]
    assert config["trainer"]["gradient_clip_val"] is None
    assert config["trainer"]["num_sanity_val_steps"] == 0
    assert config["model"]["decoder"]["rope_theta"] == 10000.0
    assert config["checkpoint"]["every_n_train_steps"] == 100
    assert (config["run_name"], config["ckpt_path"], config["output_dir"]) == (None, None, "runs")


def test_a_fragment_changes_its_part_of_the_quickstart_only(command: Command) -> None:
    plain, choice = printed(command), printed(command, "--config", "routing/token_choice")
    assert choice["model"].pop("routing")["class_path"] == "lightning_moe.routing.TokenChoice"
    assert plain["model"].pop("routing")["class_path"] == "lightning_moe.routing.ExpertThreshold"
    assert plain == choice


def test_flags_win_over_files_wherever_they_stand(command: Command, workplace: Path) -> None:
    (workplace / "wide.yaml").write_text("model: {decoder: {hidden_size: 96}}")
    before = printed(command, "--model.decoder.hidden_size=48", "--config", "wide")
    after = printed(command, "--config=wide.yaml", "--model.decoder.hidden_size", "48")
    assert before["model"]["decoder"]["hidden_size"] == after["model"]["decoder"]["hidden_size"] == 48


def test_interpolation_sees_defaults_other_files_and_flags(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_STEPS", "77")
    (workplace / "one.yaml").write_text(
        "model: {decoder: {hidden_size: 64, expert_hidden_size: '${model.decoder.hidden_size}'}}\n"
        "trainer: {max_steps: '${oc.env:SOME_STEPS}', min_steps: '${threshold_warmup.steps}'}\n"
    )
    (workplace / "two.yaml").write_text("threshold_warmup: {steps: 5}\nmodel: {decoder: {hidden_size: 96}}")
    files = ("--config", "one.yaml", "--config", "two.yaml")
    config = printed(command, *files)
    assert config["model"]["decoder"]["expert_hidden_size"] == 96
    assert (config["trainer"]["max_steps"], config["trainer"]["min_steps"]) == (77, 5)
    config = printed(command, *files, "--model.decoder.hidden_size=48", "--seed_everything=9")
    assert config["model"]["decoder"]["expert_hidden_size"] == 48
    assert config["data"]["seed"] == 9


def test_changing_the_class_by_flag_drops_the_old_arguments_silently(
    command: Command, recwarn: pytest.WarningsRecorder
) -> None:
    config = printed(command, "--model.routing=TokenChoiceAuxLoss", "--model.routing.aux_loss_coef=0.5")
    assert config["model"]["routing"]["init_args"]["aux_loss_coef"] == 0.5
    assert "ema_decay" not in config["model"]["routing"]["init_args"]
    assert not [w for w in recwarn if "init_args" in str(w.message)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.decoder.hiden_size=3"], "--model.decoder.hiden_size .*did you mean '--model.decoder.hidden_size'"),
        (["--hidden_size=3"], "unknown option --hidden_size .*did you mean '--model.decoder.hidden_size'"),
        (["--model.routing.ema_decy=0.5"], "did you mean '--model.routing.ema_decay'"),
        (
            ["--model.routing=TokenChoice", "--model.routing.ema_decay=0.5"],
            "--model.routing.ema_decay is no option of TokenChoice, which model.routing is here",
        ),
        (["--model.routing=ExpertTreshold"], "model.routing='ExpertTreshold' .*one of the classes .*ExpertThreshold"),
        (["--model.decoder.hidden_size=abc"], r"model.decoder.hidden_size='abc' \(the command line\): .*whole number"),
        (["--model.decoder.activation=gelu"], "model.decoder.activation='gelu' .*must be one of relu2, swiglu"),
        (["--model.decoder.vocab_size=3"], "model.decoder.vocab_size .*follows from data.tokenizer.vocab_size"),
        (["--model.decoder.hidden_size=${model.decoder.num_layerz}"], "did you mean 'model.decoder.num_layers'"),
        (["--trainer.use_distributed_sampler=true"], "unknown option --trainer.use_distributed_sampler"),
        (["--trainer.accelerator=gpuu"], "trainer: .*accelerator='gpuu'"),
        (["--seed_everything=-1"], "seed_everything='-1' .*must be a whole number, 0 or more"),
        (["--model.decoder.num_experts_per_token=100"], "model.decoder.num_experts_per_token=100.*at most num_experts"),
        (["--model.routing.capacity_factor=-1"], "^error: model.routing.capacity_factor=-1"),
        (
            ["--model.routing.warmup_pool=half"],
            "warmup_pool='half' .*must be one of sequence, micro_batch, global or a whole number$",
        ),
        (["--run_name=a/b"], "run_name='a/b': must be a plain folder name"),
        (["--config"], "--config: needs the name of a configuration file"),
        (["surplus"], "surplus"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_line(
    flags: list[str], message: str, command: Command, workplace: Path
) -> None:
    check_refusal(command, ["--config", "small", *flags], message)
    assert not list(workplace.glob("runs/*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "model: {decoder: {hiden_size: 3}}",
            "key 'model.decoder.hiden_size' in .*bad.yaml: .*'model.decoder.hidden_size'",
        ),
        ("model: {decodr: {hidden_size: 3}}", "key 'model.decodr' in .*bad.yaml: .*'model.decoder'"),
        ("modl: {decoder: {hidden_size: 3}}", "unknown key 'modl' in .*bad.yaml: did you mean 'model'"),
        ("trainer: {max_stepz: 3}", "unknown key 'trainer.max_stepz' in .*bad.yaml: did you mean 'trainer.max_steps'"),
        ("model: {routing: {ema_decay: 0.3}}", "did you mean 'model.routing.init_args.ema_decay'"),
        (
            "model: {routing: {class_path: ExpertThreshold, init_args: {ema_decy: 3}}}",
            "'model.routing.init_args.ema_decy' in .*bad.yaml: did you mean 'model.routing.init_args.ema_decay'",
        ),
        (
            "model: {routing: {class_path: ExpertThreshold, init_args: {ema_decay: abc}}}",
            r"model.routing.init_args.ema_decay='abc' \(.*bad.yaml\): must be a number",
        ),
        (
            "model: {routing: {class_path: ExpertTreshold}}",
            r"model.routing.class_path='ExpertTreshold' \(.*bad.yaml\): must be one of the classes .*ExpertThreshold",
        ),
        (
            f"trainer: {{strategy: {{class_path: {STRATEGY}, init_args: {{expert_size: 2}}}}}}",
            "'trainer.strategy.init_args.expert_size' .*did you mean 'trainer.strategy.init_args.expert_parallel_size'",
        ),
        ("trainer: {max_steps: 4.5}", r"trainer.max_steps=4.5 \(.*bad.yaml\): must be a whole number"),
        (
            "model: {decoder: {num_experts_per_token: [a]}}",
            r"num_experts_per_token=\['a'\] .*must be a number or a list",
        ),
        ("model: 3", r"model=3 \(.*bad.yaml\): must be a mapping of keys to values"),
        (
            "model: {decoder: {vocab_size: 5}}",
            r"model.decoder.vocab_size=5 \(.*bad.yaml\): follows from data.tokenizer",
        ),
    ],
)
def test_a_wrong_file_is_answered_in_one_line(content: str, message: str, command: Command, workplace: Path) -> None:
    (workplace / "bad.yaml").write_text(content)
    check_refusal(command, ["--config", "small", "--config", "bad.yaml"], message)
    assert not list(workplace.glob("runs/*"))


def check_refusal(command: Command, args: list[str], message: str) -> None:
    code, _, err = command("fit", *args)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(error) == 1
    assert "Traceback" not in err
    assert re.search(message, error[0]), error[0]


def test_debug_shows_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_MOE_DEBUG", "1")
    with pytest.raises(ValueError, match="did you mean"):
        command("fit", "--model.decoder.hiden_size=3")
