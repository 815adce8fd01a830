"""Bad values of configuration keys and flags, and bad texts of configuration files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONG = "x" * 5000
#: a class or function that a wrong class path may name
CLASS_PATHS = ("..", "1", ".", "os.system", "os", "lightning_moe.nothing.X", "lightning_moe", "builtins.print", "")


@dataclass(frozen=True)
class Value:
    """A value as it is written in a YAML file, and as an argument (`None`: no command line can hold it)."""

    yaml: str
    flag: str | None


def text(value: str) -> Value:
    return Value(json.dumps(value), None if "\0" in value else value)


def plain(value: str, flag: str | None = None) -> Value:
    return Value(value, value if flag is None else flag)


VALUES: tuple[Value, ...] = (
    *map(
        plain,
        ("null", "0", "-1", "1", "true", "false", "[]", "[null]", "[1, a]", "[[]]", "{}", "{a: 1}", "{1: 2}"),
    ),
    *map(
        plain, ("2147483648", "9223372036854775808", "-9223372036854775809", str(10**30), "1e400", "-1e400", "1e-400")
    ),
    *map(plain, ("0.5", "1e5", "0x10", "0o7", "1_000", "2026-07-21", "007", "1:30", "yes", "~")),
    plain(".nan", "nan"),
    plain(".inf", "inf"),
    plain("-.inf", "-inf"),
    plain("${oc.env:MISSING}"),
    plain("${a.b}"),
    plain("'${'", "${"),
    plain("${seed_everything}"),
    plain("${data}"),
    *map(text, ("", " ", "7", "1e400", "nan", "a\0b", "\udcff", "a\x1b[2Jb", "a\nb\tc", "\x7f", "\u202e", "é" * 130)),
    *map(text, (LONG, "x" * 260, "../x", "a/b", "~nobody_has_this_home/x", "%s", "{}", "a=b", "-", "--", "*", "NaN")),
    *map(text, CLASS_PATHS),
    plain("!!python/object/apply:os.system [touch PWNED]"),
    plain("!!binary aGVsbG8="),
    plain("!!set {a, b}"),
    plain("{class_path: os.system}"),
    plain("{class_path: null}"),
    plain("{class_path: [], init_args: 3}"),
    plain("{init_args: {}}"),
)


def nest(key: str, yaml: str) -> str:
    """Return a YAML text in flow style with a value at a dotted key."""
    for name in reversed(key.split(".")):
        yaml = f"{{{json.dumps(name)}: {yaml}}}"
    return f"{yaml}\n"


def laughs() -> str:
    lines = ["l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines) + "\n"


def chain(folder: Path, length: int) -> str:
    for number in range(length):
        text = f"include: [chain{number + 1}.yaml]\n" if number + 1 < length else "seed_everything: 3\n"
        (folder / f"chain{number}.yaml").write_text(text)
    return "include: [chain0.yaml]\n"


def circle(folder: Path) -> str:
    (folder / "other.yaml").write_text("include: [odd.yaml]\n")
    return "include: [other.yaml]\n"


def wide(folder: Path) -> str:
    """Write files that include the next one twice: 2^24 files are to be read."""
    for number in range(24):
        (folder / f"wide{number}.yaml").write_text(f"include: [wide{number + 1}.yaml, wide{number + 1}.yaml]\n")
    (folder / "wide24.yaml").write_text("seed_everything: 3\n")
    return "include: [wide0.yaml]\n"


Content = str | bytes | Callable[[Path], str]
#: content of a YAML file, by name; a function writes further files first
FILES: dict[str, Content] = {
    "apply at a key": "run_name: !!python/object/apply:os.system [touch PWNED]\n",
    "apply at the top": "!!python/object/apply:os.system [touch PWNED]\n",
    "python name": "model: {routing: !!python/name:os.system }\n",
    "binary": "output_dir: !!binary aGVsbG8=\n",
    "binary number": "data: {sequence_length: !!binary aGVsbG8=}\n",
    "set": "trainer: !!set {a, b}\n",
    "set as list": "tracking: {tags: !!set {a, b}}\n",
    "omap": "trainer: !!omap [max_steps: 1]\n",
    "timestamp": "tracking: {experiment_name: !!timestamp 2026-07-21}\n",
    "bad int": "seed_everything: !!int a\n",
    "unknown tag": "seed_everything: !nothing 3\n",
    "cyclic mapping": "model: &a {decoder: *a}\n",
    "cyclic list": "trainer: {callbacks: &a [*a]}\n",
    "cyclic top": "&a {model: *a}\n",
    "unknown alias": "model: *nothing\n",
    "billion laughs": laughs(),
    "billion laughs at a key": laughs() + "tracking: {tags: {a: *l9}}\n",
    "deep lists": "trainer: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep mappings": "model: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n",
    "deep but not closed": "{" * 5000,
    "deep blocks": "".join(f"{' ' * n}a:\n" for n in range(600)),
    "cyclic include": "include: [odd.yaml]\n",
    "circle of includes": circle,
    "chain of includes": lambda folder: chain(folder, 1500),
    "wide includes": wide,
    "include nothing": "include: [missing.yaml]\n",
    "include text": "include: odd.yaml\n",
    "include number": "include: [1]\n",
    "include null": "include: null\n",
    "include folder": "include: [text]\n",
    "include device": "include: [odd/zero]\n",
    "include fifo": "include: [odd/fifo]\n",
    "include long": f"include: [{LONG}]\n",
    "include NUL": 'include: ["a\\0b"]\n',
    "duplicate keys": "run_name: a1\nrun_name: b1\n",
    "duplicate deep keys": "data: {sequence_length: 16, sequence_length: 8}\n",
    "not UTF-8": b"run_name: \xff\xfe\n",
    "UTF-16": "run_name: abc\n".encode("utf-16"),
    "byte order mark": "run_name: abc\n".encode("utf-8-sig"),
    "NUL": b"run_name: a\0b\n",
    "zeros": bytes(1000),
    "control": b"run_name: a\x01b\n",
    "surrogate": 'run_name: "\\udcff"\n',
    "surrogate key": '"\\udcff": 1\n',
    "empty": "",
    "comments": "# nothing\n",
    "null": "null\n",
    "list": "- run_name: a\n",
    "text": "hello\n",
    "number": "3\n",
    "tabs": "run_name:\n\t- a\n",
    "not closed": "run_name: 'a\n",
    "two documents": "run_name: a\n---\nrun_name: b\n",
    "directive": "%YAML 9.9\n---\nrun_name: a\n",
    "number key": "1: 2\n",
    "null key": "null: 2\n",
    "boolean key": "true: 2\n",
    "list key": "? [a, b]\n: 2\n",
    "mapping key": "? {a: b}\n: 2\n",
    "number key inside": "trainer: {1: 2}\n",
    "null key inside": "model: {null: 2}\n",
    "list key inside": "data: {? [a] : 2}\n",
    "empty key": '"": 1\n',
    "dotted key": '"data.sequence_length": 8\n',
    "dots": '"..": 1\n',
    "merge number": "<<: 1\n",
    "merge list": "<<: [1, 2]\n",
    "merge mapping": "a: &a {max_steps: 1}\ntrainer: {<<: *a}\n",
    "interpolation at itself": "seed_everything: ${seed_everything}\n",
    "interpolations in a circle": "seed_everything: ${data.seed}\ndata: {seed: '${seed_everything}'}\n",
    "interpolated mapping": "trainer: ${data}\n",
    "resolver": "run_name: '${oc.create:{a: 1}}'\n",
    "null section": "model: null\n",
    "null sections": "trainer: null\ndata: null\n",
    "list section": "trainer: [1]\n",
    "text section": "data: small.yaml\n",
    "number section": "tracking: 3\n",
    "class from file": "model: {routing: small.yaml}\n",
    "class as list": "model: {routing: [ExpertChoice]}\n",
    "long key": f"{LONG}: 1\n",
    "missing value": "data: {tokenizer: {file: '???'}}\n",
    "huge number": f"seed_everything: {'9' * 5000}\n",
}
