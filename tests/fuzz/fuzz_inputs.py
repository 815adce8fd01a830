"""The inputs, each from its number.

hypothesis drew 743 different changes among 1,897, and 49 of 108 keys: it varies what it has drawn, which finds the
border of a fault, but not many faults.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from random import Random

from fuzz_keys import CONFIGURED, PATH_FLAGS, PATH_KEYS, flags, keys
from fuzz_mutations import (
    BAD_OBJECTS,
    CONTENTS,
    CheckpointNode,
    Input,
    Mutation,
    Node,
    OddYaml,
    SetClass,
    SetCommand,
    SetFlag,
    SetKey,
    WholeFile,
)
from fuzz_place import CKPT, ODD_FILES
from fuzz_values import FILES, VALUES, Value, text

#: command lines that work; a command may have several
BASES: tuple[tuple[str, ...], ...] = tuple(
    tuple(shlex.split(line))
    for line in (
        "fit --config=small.yaml --run_name=new",
        "fit --config=small.yaml --ckpt_path=last --run_name=a --trainer.max_steps=2",
        f"validate --ckpt_path={CKPT}",
        f"test --ckpt_path={CKPT}",
        f"predict --ckpt_path={CKPT}",
        "prepare --config=small.yaml --workers=1",
        f"analyze --ckpt_path={CKPT} --no_mlflow --max_tokens=64 --batch_size=2 --pools=1 --output_dir=found",
        f"analyze --ckpt_path={CKPT} --no_mlflow --max_tokens=64 --batch_size=2 --text=own.txt "
        "--tokenizer=tokenizer.json --overwrite --compare_num_experts_per_token=1",
        f"generate --ckpt_path={CKPT} --prompt=line --max_new_tokens=3",
        "generate --ckpt_path=exported --prompt_file=prompts.txt --max_new_tokens=3",
        f"audit --ckpt_path={CKPT} --batch_size=2",
        "audit --ckpt_path=exported --batch_size=2 --text=own.txt",
        f"calibrate --ckpt_path={CKPT} --output_dir=calibrated --max_tokens=64",
        f"calibrate --ckpt_path={CKPT} --output_dir=calibrated --max_tokens=64 --text=own.txt",
        f"convert --ckpt_path={CKPT} --output=converted.safetensors",
        "convert --ckpt_path=exported --output=converted.ckpt",
        f"export --ckpt_path={CKPT} --output=exported --overwrite",
        f"export --ckpt_path={CKPT} --output=exported2 --tokenizer=tokenizer.json",
        "plan --config=small.yaml",
        "sweep sweep.yaml",
        "study study.yaml",
        "study study.yaml --report",
        "compare runs/a runs/b --no_mlflow --output_dir=compared",
        "ui --tracking_uri=sqlite:///missing.db --port=5077",
    )
)
REFUSED_BASES = (BASES[-1], BASES[-3])  # no store to show, and no finished run to report
RUN_FILES = (
    "config.yaml",
    "summary.json",
    "metrics.jsonl",
    "tracking.jsonl",
    "tokenizer.json",
    "segments.json",
    "mlflow_run.json",
)
EXPORT_FILES = ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json")
#: commands that read a run's folder through its checkpoint
OF_RUNS = ("fit", "validate", "test", "predict", "analyze", "generate", "audit", "calibrate", "convert", "export")
SECTIONS = ("", "state_dict", "hyper_parameters", "loops", "callbacks", "optimizer_states", "TextDataModule")
NODE_CHANGES = ("replace", "replace", "replace", "remove", "rename", "add")
#: values for the nodes of sweeps and studies, beside `VALUES`
SPACES = tuple(
    Value(yaml, None)
    for yaml in (
        "{float: [.nan, 1.0]}",
        "{float: [0.1, .inf]}",
        "{float: [-.inf, .inf]}",
        "{float: [0.9, 0.1]}",
        "{float: [1e400, 1e401]}",
        "{float: [0.1, 0.5], step: 0}",
        "{float: [0.1, 0.5], step: -1}",
        "{float: [0.1, 0.5], step: .nan}",
        "{float: [0.1, 0.5], log: 3}",
        "{float: [0.1, 0.5], step: 1e-300}",
        "{int: [1, 1000000000000000000000000000000]}",
        "{int: [0, 9223372036854775807]}",
        "{int: [true, false]}",
        "{int: [1, 4], step: 1.5}",
        "{float: [a, b]}",
        "{float: 3}",
        "{float: []}",
        "{choices: []}",
        "{choices: 3}",
        "{choices: [a, a]}",
        "{choices: [.nan, .nan]}",
        "{choices: [1, true]}",
        "{choices: [null, x]}",
        "{choices: {a: {}, b: 3}}",
        "{choices: {a: null, b: {}}}",
        "{float: [0.1, 0.5], int: [1, 2]}",
        "{float: [0.1, 0.5], when: 3}",
        "{float: [0.1, 0.5], when: {a: b}}",
        "{name: TPESampler, seed: -1}",
        "{name: TPESampler, seed: a}",
        "{name: TPESampler, n_startup_trials: -5}",
        "{name: GridSampler}",
        "{name: PartialFixedSampler}",
        "{name: CmaEsSampler, x0: 3}",
        "{name: NSGAIISampler, population_size: 0}",
        "{name: NSGAIISampler, population_size: 1e400}",
        "{name: QMCSampler, qmc_type: x}",
        "{name: nothing}",
        "{name: BaseSampler}",
        "{name: os.system}",
        "{name: RandomSampler, nothing: 1}",
        "{name: PercentilePruner, percentile: 1000}",
        "{name: PercentilePruner}",
        "{name: HyperbandPruner, reduction_factor: 0}",
        "{name: SuccessiveHalvingPruner, min_resource: -1}",
        "{name: ThresholdPruner}",
        "{name: WilcoxonPruner, p_threshold: 9}",
        "sqlite:////nowhere/at/all.db",
        "sqlite:///odd/fifo",
        "postgresql://u:p@localhost:1/x",
        "redis://",
        "not a url",
        "mysql://x",
        "{val/loss: minimise}",
        "{'': minimize}",
        "{1: minimize}",
        "[1, 1]",
        "[-1]",
        "[18446744073709551616]",
        "[.nan, .nan]",
        "[.inf]",
        "[0.01, 1e400]",
        "[0.02, 0.01]",
    )
)
FLAG_VALUES = tuple(value.flag for value in VALUES if value.flag is not None)
PATHS = (
    *(f"odd/{name}" for name in ODD_FILES),
    "text",
    "own.txt",
    "missing/missing",
    "own.txt/x",
    "n" * 300,
    "a/" * 2500,
    "",
    ".",
    "runs",
    "runs/a",
    "runs/a/config.yaml",
    CKPT,
    "exported",
    "tokenizer.json",
    "\udcff",
    "*",
    "**",
    "~nobody_has_this_home",
    "x=odd/fifo",
    "=",
    "a\nb",
)
#: what replaces whole files
CONTENT_NAMES = (*CONTENTS, "cut", "missing", "folder", "fifo", "zero", "full", "dangling", "loop", "socket")


def key_mutation(random: Random) -> Mutation:
    """Return a value of a key or of a class's argument, a path of a key, or an odd file."""
    kind = random.choice(("key", "key", "key", "path", "file"))
    if kind == "file":
        return OddYaml(random.choice(sorted(FILES)))
    if kind == "path":
        path = text(random.choice(PATHS))
        if random.random() < 0.2:
            value = Value(f"[{path.yaml}]", None)
            return SetClass("data.corpus", "lightning_moe.data.LocalFiles", "paths", value, False)
        return SetKey(random.choice(PATH_KEYS), path, random.random() < 0.5)
    known = [key for key in keys() if key.classes] if random.random() < 0.25 else keys()
    key, value = random.choice(known), random.choice(VALUES)
    if not key.classes or random.random() < 0.3:
        return SetKey(key.name, value, random.random() < 0.5)
    # this package's own classes as often as all the others
    own = [found for found in key.classes if found[0].startswith("lightning_moe.")]
    class_path, arguments = random.choice(own if own and random.random() < 0.5 else key.classes)
    argument = random.choice((None, *arguments, *arguments, *arguments))
    return SetClass(key.name, class_path, argument, value, key.in_list)


def flag_mutation(random: Random, command: str) -> Mutation:
    """Return a value of one of a command's flags; mostly a path for those that are paths."""
    flag, takes_value = random.choice(flags(command))
    if not takes_value:
        return SetFlag(flag, random.choice((None, "3", "")))
    is_path = flag in PATH_FLAGS or not flag
    value = random.choice(PATHS if is_path and random.random() < 0.75 else FLAG_VALUES)
    return SetFlag(flag, value if not flag or random.random() < 0.95 else None)


def file_mutation(random: Random, files: Sequence[str], more: tuple[Value, ...] = ()) -> Mutation:
    """Return a value inside a file, or another whole file."""
    file = random.choice(files)
    if random.random() < 0.25 or not file.endswith(("json", "jsonl", "yaml")):
        return WholeFile(file, random.choice(CONTENT_NAMES))
    values = more if more and random.random() < 0.5 else VALUES
    return Node(file, random.randrange(600), random.choice(NODE_CHANGES), random.choice(values))


def checkpoint_mutation(random: Random, file: str) -> Mutation:
    """Return a value inside a checkpoint, or another whole file."""
    if random.random() < 0.15:
        return WholeFile(file, random.choice(CONTENT_NAMES))
    change = random.choice((*NODE_CHANGES, "section"))
    bad = random.choice(sorted(BAD_OBJECTS))
    return CheckpointNode(file, random.choice(SECTIONS), random.randrange(100), change, bad)


def mutation(random: Random, base: tuple[str, ...]) -> Mutation:
    """Return a change that fits a base command line."""
    command, words = base[0], " ".join(base)
    choices: list[Callable[[], Mutation]] = [lambda: flag_mutation(random, command)]
    if command in CONFIGURED:
        choices += [lambda: key_mutation(random)] * (4 if command in ("fit", "plan") else 2)
    if command in OF_RUNS and (CKPT in words or "ckpt_path=last" in words):
        run_files = [f"runs/a/{name}" for name in RUN_FILES]
        choices += [lambda: checkpoint_mutation(random, CKPT), lambda: file_mutation(random, run_files)]
    if "exported" in words:
        choices.append(lambda: file_mutation(random, [f"exported/{name}" for name in EXPORT_FILES]))
    if command in ("sweep", "study"):
        file = f"{command}.yaml"
        choices += [lambda: file_mutation(random, [file], SPACES)] * 3
        choices.append(lambda: OddYaml(random.choice(sorted(FILES)), random.choice((file, None))))
    if command == "compare":
        names = [f"runs/a/{name}" for name in (*RUN_FILES, "summary.json", "summary.json")]
        choices += [lambda: file_mutation(random, names)] * 2
    return random.choice(choices)()


def make_input(number: int, seed: int = 0) -> Input:
    """Return the input of a number: a base command line with one to three changes, mostly one."""
    random = Random(f"{seed} {number}")
    base = random.choice((*BASES, *BASES[:2], BASES[0], BASES[0]))
    if random.random() < 0.005:
        return Input(base, (SetCommand(random.choice(FLAG_VALUES)),))
    return Input(base, tuple(mutation(random, base) for _ in range(random.choice((1, 1, 1, 2, 3)))))
