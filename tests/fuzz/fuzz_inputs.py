"""The inputs, drawn by hypothesis."""

from __future__ import annotations

import shlex
from typing import Any

from fuzz_keys import CONFIGURED, PATH_FLAGS, PATH_KEYS, Key, flags, keys
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
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

#: command lines that work; a command may have several
BASES: tuple[tuple[str, ...], ...] = tuple(
    tuple(shlex.split(line))
    for line in (
        "fit --config=small.yaml --run_name=new",
        "fit --ckpt_path=last --run_name=a --trainer.max_steps=2",
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
        "ui --tracking_uri=sqlite:///missing.db --port=0",
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
VALUE = st.sampled_from(VALUES)
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
PATH = st.sampled_from(PATHS)


def key_mutations() -> SearchStrategy[Mutation]:
    """Values of keys, of classes' arguments, and paths of keys."""

    @st.composite
    def draw_key(draw: DrawFn) -> Mutation:
        key: Key = draw(st.sampled_from(keys()))
        if key.classes and draw(st.integers(0, 3)):
            # this package's own classes as often as all the others
            own = [c for c in key.classes if c[0].startswith("lightning_moe.")]
            class_path, arguments = draw(st.sampled_from(own if own and draw(st.booleans()) else key.classes))
            argument = draw(st.sampled_from((None, *arguments))) if arguments else None
            return SetClass(key.name, class_path, argument, draw(VALUE), key.in_list)
        return SetKey(key.name, draw(VALUE), draw(st.booleans()))

    @st.composite
    def draw_path(draw: DrawFn) -> Mutation:
        path = draw(PATH)
        if draw(st.integers(0, 4)) == 0:
            corpus, value = "lightning_moe.data.LocalFiles", Value(f"[{text(path).yaml}]", None)
            return SetClass("data.corpus", corpus, "paths", value, False)
        return SetKey(draw(st.sampled_from(PATH_KEYS)), text(path), draw(st.booleans()))

    odd = st.builds(OddYaml, st.sampled_from(sorted(FILES)))
    return st.one_of(draw_key(), draw_key(), draw_path(), odd)


def flag_mutations(command: str) -> SearchStrategy[Mutation]:
    """Values of a command's flags; paths for those that are paths."""

    @st.composite
    def draw_flag(draw: DrawFn) -> Mutation:
        flag, takes_value = draw(st.sampled_from(flags(command)))
        if not takes_value:
            return SetFlag(flag, draw(st.sampled_from((None, "3", ""))))
        is_path = flag in PATH_FLAGS or not flag
        value = draw(PATH if is_path and draw(st.integers(0, 3)) else st.sampled_from(FLAG_VALUES))
        return SetFlag(flag, value if not flag or draw(st.integers(0, 9)) else None)

    return draw_flag()


def file_mutations(folder: str, files: tuple[str, ...], more: tuple[Value, ...] = ()) -> SearchStrategy[Mutation]:
    """Values inside files, and whole files."""
    contents = (*CONTENTS, "cut", "missing", "folder", "fifo", "zero", "full", "dangling", "loop", "socket")
    names = st.sampled_from([f"{folder}{name}" for name in files])
    readable = st.sampled_from([f"{folder}{name}" for name in files if name.endswith(("json", "jsonl", "yaml"))])
    values = st.one_of(VALUE, st.sampled_from(more)) if more else VALUE
    node = st.builds(Node, readable, st.integers(0, 599), st.sampled_from(NODE_CHANGES), values)
    return st.one_of(node, node, node, st.builds(WholeFile, names, st.sampled_from(contents)))


def checkpoint_mutations(file: str) -> SearchStrategy[Mutation]:
    changes = st.sampled_from((*NODE_CHANGES, "section"))
    node = st.builds(
        CheckpointNode,
        st.just(file),
        st.sampled_from(SECTIONS),
        st.integers(0, 99),
        changes,
        st.sampled_from(sorted(BAD_OBJECTS)),
    )
    contents = (*CONTENTS, "cut", "missing", "folder", "fifo", "zero", "full", "dangling", "loop", "socket")
    return st.one_of(node, node, node, node, st.builds(WholeFile, st.just(file), st.sampled_from(contents)))


def mutations(base: tuple[str, ...]) -> SearchStrategy[Mutation]:
    """All changes that a base command line may get."""
    command, words = base[0], " ".join(base)
    choices: list[SearchStrategy[Any]] = [flag_mutations(command)]
    if command in CONFIGURED:
        choices += [key_mutations(), key_mutations()]
    if command in OF_RUNS and (CKPT in words or "ckpt_path=last" in words):
        choices += [checkpoint_mutations(CKPT), file_mutations("runs/a/", RUN_FILES)]
    if "exported" in words:
        choices.append(file_mutations("exported/", EXPORT_FILES))
    if command in ("sweep", "study"):
        file = f"{command}.yaml"
        own = file_mutations("", (file,), SPACES)
        choices += [own, own, st.builds(OddYaml, st.sampled_from(sorted(FILES)), st.sampled_from((file, None)))]
    if command == "compare":
        choices.append(file_mutations("runs/a/", (*RUN_FILES, "summary.json", "summary.json")))
    return st.one_of(*choices)


@st.composite
def inputs(draw: DrawFn) -> Input:
    """A base command line with one to three changes; mostly one."""
    base = draw(st.sampled_from((*BASES, *BASES[:2], BASES[0])))
    if draw(st.integers(0, 199)) == 0:
        return Input(base, (SetCommand(draw(st.sampled_from(FLAG_VALUES))),))
    count = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return Input(base, tuple(draw(mutations(base)) for _ in range(count)))
