"""What an input consists of: a base command line, and changes of its arguments and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz_keys import PROCESS_COUNTS
from fuzz_values import FILES, Value, nest


class Mutation:
    """A change of a command line or of a file in its folder."""

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        """Change the files, and return the changed arguments."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...]:
        """Return what an error about it may name: keys, flags, files."""
        raise NotImplementedError

    def wants_many_processes(self) -> bool:
        return False


@dataclass(frozen=True)
class SetKey(Mutation):
    """A configuration key with a value, in a file or as a flag."""

    key: str
    value: Value
    in_file: bool

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        if self.in_file or self.value.flag is None:
            path = folder / f"key{len(list(folder.glob('key*.yaml')))}.yaml"
            path.write_text(nest(self.key, self.value.yaml), encoding="utf-8")
            return [*argv, f"--config={path.name}"]
        return [*argv, f"--{self.key}={self.value.flag}"]

    def names(self) -> tuple[str, ...]:
        parts = [part for part in self.key.split(".")[-2:] if part != "init_args"]
        return (*parts, "key0", "key1", "key2", *_content(self.value))

    def wants_many_processes(self) -> bool:
        return self.key in PROCESS_COUNTS and _is_huge(self.value)


@dataclass(frozen=True)
class SetClass(Mutation):
    """A class-valued key with one of its classes and a value of an argument."""

    key: str
    class_path: str
    argument: str | None
    value: Value
    in_list: bool

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        arguments = "" if self.argument is None else f"{json.dumps(self.argument)}: {self.value.yaml}"
        entry = f"{{class_path: {self.class_path}, init_args: {{{arguments}}}}}"
        path = folder / f"class{len(list(folder.glob('class*.yaml')))}.yaml"
        path.write_text(nest(self.key, f"[{entry}]" if self.in_list else entry), encoding="utf-8")
        return [*argv, f"--config={path.name}"]

    def names(self) -> tuple[str, ...]:
        short = self.class_path.rpartition(".")[2]
        return (*filter(None, [self.argument, short, self.key]), "class0", "class1", "class2", *_content(self.value))


@dataclass(frozen=True)
class SetFlag(Mutation):
    """A flag of a command with a value, or its argument (flag ""), or a flag without a value (`None`)."""

    flag: str
    value: str | None

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        if not self.flag:
            kept = [word for word in argv[1:] if word.startswith("-")]
            return [argv[0], *kept, *([] if self.value is None else [self.value])]
        return [*argv, self.flag if self.value is None else f"{self.flag}={self.value}"]

    def names(self) -> tuple[str, ...]:
        return (self.flag.removeprefix("--") or "file", *([self.value[:40]] if self.value else []))

    def wants_many_processes(self) -> bool:
        return self.flag in PROCESS_COUNTS and self.value is not None and _is_huge(Value("", self.value))


def _content(value: Value) -> Iterator[str]:
    """Yield the text of a value if it is long enough to recognise: a path, for example."""
    inside = value.yaml.strip("[]\"'")[:40]
    if len(inside) > 2:
        yield inside


def _is_huge(value: Value) -> bool:
    return (value.flag or "").isdigit() and int(value.flag or "") > 4096


@dataclass(frozen=True)
class SetCommand(Mutation):
    """Another word in the place of the command."""

    value: str

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        return [self.value, *argv[1:]]

    def names(self) -> tuple[str, ...]:
        return ("command",)


@dataclass(frozen=True)
class OddYaml(Mutation):
    """A file of `FILES`: as ``--config``, or in the place of a command's file.

    Args:
        name: name in `FILES`.
        target: file to replace; `None` for a file of its own.
    """

    name: str
    target: str | None = None

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        content = FILES[self.name]
        if callable(content):
            content = content(folder)
        path = folder / (self.target or "odd.yaml")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*argv, "--config=odd.yaml"] if self.target is None else argv

    def names(self) -> tuple[str, ...]:
        return (Path(self.target or "odd.yaml").name, "chain", "other.yaml", "wide")


@dataclass(frozen=True)
class Node(Mutation):
    """A value inside a JSON, JSON Lines or YAML file.

    Args:
        file: path of the file.
        place: number of the node, modulo the number of nodes.
        change: ``replace``, ``remove``, ``rename`` or ``add``.
        value: new value, as YAML; JSON files get the nearest JSON.
    """

    file: str
    place: int
    change: str
    value: Value

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        path = folder / self.file
        source = path.read_text(encoding="utf-8")
        if self.file.endswith(".jsonl"):
            lines = source.splitlines()
            index = self.place % len(lines)
            lines[index] = self._changed(json.loads(lines[index]))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif self.file.endswith(".json"):
            path.write_text(self._changed(json.loads(source)), encoding="utf-8")
        else:
            data, mark = yaml.safe_load(source), "FUZZED"
            changed = change_node(data, self.place, self.change, mark)
            path.write_text(yaml.safe_dump(changed, sort_keys=False).replace(mark, self.value.yaml), encoding="utf-8")
        return argv

    def _changed(self, data: Any) -> str:
        mark = "FUZZED"
        text = json.dumps(change_node(data, self.place, self.change, mark))
        return text.replace(json.dumps(mark), _as_json(self.value))

    def names(self) -> tuple[str, ...]:
        return (Path(self.file).name, *self.file.split("/")[:1])


def _as_json(value: Value) -> str:
    special = {".nan": "NaN", ".inf": "Infinity", "-.inf": "-Infinity"}
    if value.yaml in special:
        return special[value.yaml]
    try:
        return json.dumps(yaml.safe_load(value.yaml))
    except (yaml.YAMLError, TypeError):
        return json.dumps(value.yaml)


def nodes(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in nested data."""
    if isinstance(data, dict):
        for key in data:
            yield data, key
            yield from nodes(data[key])
    elif isinstance(data, list):
        for index in range(len(data)):
            yield data, index
            yield from nodes(data[index])


def change_node(data: Any, place: int, change: str, value: Any) -> Any:
    """Change a node of nested data in place, and return the data; data without nodes is replaced."""
    found = list(nodes(data))
    if len(found) > 600:  # of a tokenizer: its structure rather than its vocabulary
        found = found[:300] + found[-300:]
    if not found:
        return value
    container, key = found[place % len(found)]
    if change == "remove":
        del container[key]
    elif change == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif change == "add" and isinstance(container, dict):
        container["fuzzed_key"] = value
    else:
        container[key] = value
    return data


#: content → name of what is written in the place of a file
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "an empty line": b"\n",
    "null": b"null\n",
    "a list": b"[]\n",
    "a list of numbers": b"[1, 2]\n",
    "an empty mapping": b"{}\n",
    "a text": b'"x"\n',
    "a number": b"3\n",
    "NaN": b"NaN\n",
    "bytes": bytes(range(256)),
    "zeros": bytes(4096),
    "half": b'{"a": ',
    "deep": b"[" * 100_000,
    "a long number": b"9" * 5000,
    "a surrogate": b'"\\udcff"',
    "two values": b"{} {}",
}


@dataclass(frozen=True)
class WholeFile(Mutation):
    """A file with other content (a name of `CONTENTS`), cut in half, or replaced by an odd file."""

    file: str
    content: str

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        path = folder / self.file
        if self.content in CONTENTS:
            path.write_bytes(CONTENTS[self.content])
        elif self.content == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif self.content == "missing":
            path.unlink()
        else:
            path.unlink()
            if self.content == "folder":
                path.mkdir()
            else:
                path.symlink_to(os.path.relpath(folder / "odd" / self.content, path.parent))
        return argv

    def names(self) -> tuple[str, ...]:
        return (Path(self.file).name, *self.file.split("/")[:1])


BAD_OBJECTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "-1": lambda: -1,
    "10**30": lambda: 10**30,
    "nan": lambda: float("nan"),
    "True": lambda: True,
    "text": lambda: "x",
    "surrogate": lambda: "\udcff",
    "[]": list,
    "{}": dict,
    "[None]": lambda: [None],
    "{1: 2}": lambda: {1: 2},
    "tensor": lambda: torch.zeros(3, 2, 1),
    "bool tensor": lambda: torch.ones((), dtype=torch.bool),
    "nan tensor": lambda: torch.full((16, 16), float("nan")),
    "empty tensor": lambda: torch.empty(0),
    "class": lambda: {"class_path": "os.system", "init_args": {}},
}


@dataclass(frozen=True)
class CheckpointNode(Mutation):
    """A value inside a checkpoint, whose checksums are right again.

    Args:
        file: path of the checkpoint.
        section: key of the checkpoint to look in; "" for all of it.
        place: number of the node in the section, modulo their number.
        change: ``replace``, ``remove``, ``rename``, ``add``, or ``section`` to replace all of it.
        value: name in `BAD_OBJECTS`.
    """

    file: str
    section: str
    place: int
    change: str
    value: str

    def apply(self, folder: Path, argv: list[str]) -> list[str]:
        path = folder / self.file
        checkpoint = torch.load(path, weights_only=True)
        value = BAD_OBJECTS[self.value]()
        if self.change == "section":
            checkpoint[self.section or "fuzzed"] = value
        elif self.section:
            checkpoint[self.section] = change_node(checkpoint[self.section], self.place, self.change, value)
        else:
            change_node(checkpoint, self.place, self.change, value)
        torch.save(checkpoint, path)
        return argv

    def names(self) -> tuple[str, ...]:
        return (Path(self.file).name, "checkpoint", "ckpt_path", "model.")


@dataclass(frozen=True)
class Input:
    """A command line.

    Args:
        argv: base command line.
        mutations: changes of it.
    """

    argv: tuple[str, ...]
    mutations: tuple[Mutation, ...]

    def apply(self, folder: Path) -> list[str] | None:
        """Make the files and return the arguments; `None` if two changes exclude each other."""
        argv = list(self.argv)
        for mutation in self.mutations:
            file = getattr(mutation, "file", None)
            if file is not None and not (folder / file).is_file():  # a pipe by now, whose reading would not end
                return None
            try:
                argv = mutation.apply(folder, argv)
            except Exception:  # a file that an earlier change took away or made unreadable
                return None
        return argv
