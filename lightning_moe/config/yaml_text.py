"""YAML in which chosen keys and values are the text that was typed: a run named ``007`` is not the number 7."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from enum import Enum
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lightning_moe.redaction import redact_all


def load_yaml(path: Path, texts: Collection[str] = (), keyed_by_text: Collection[str] = ()) -> Any:
    """Read a YAML file as an OmegaConf container; null stays null, even where values are text.

    Args:
        path: path of the file, in UTF-8.
        texts: dotted keys whose values are text; ``*`` matches any part.
        keyed_by_text: dotted keys of mappings whose own keys are text.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        yaml.YAMLError, OmegaConfBaseException: its content is not YAML.
    """
    source = path.read_text(encoding="utf-8")
    if any(pattern.rpartition(".")[2] in source for pattern in (*texts, *keyed_by_text)):
        nodes = _text_nodes(yaml.compose(source, Loader=yaml.SafeLoader), "", texts, keyed_by_text)
        spans = {(node.start_mark.index, node.end_mark.index): node.value for node in nodes}
        for (start, end), value in sorted(spans.items(), reverse=True):
            if source[start] not in "&*!":  # an anchor, alias or tag says more than the text
                source = source[:start] + json.dumps(value) + source[end:]
    return OmegaConf.load(StringIO(source))


def dump_yaml(data: Any, allow_unicode: bool = True) -> str:
    """Return plain data as YAML that every reader here takes for the same data.

    PyYAML writes the text ``1e5`` without quotes, because it is no number in YAML 1.1; OmegaConf and jsonargparse would
    read a number.
    """
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode))


def redacted_yaml(text: str) -> str:
    """Return YAML without the passwords of URLs. Text without any stays as it is; otherwise comments are lost."""
    data = yaml.safe_load(text)
    redacted = redact_all(data)
    if redacted == data:
        return text
    header = "".join(line for line in text.splitlines(keepends=True)[:1] if line.startswith("#"))
    return header + dump_yaml(redacted)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    pass


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    like_a_number = re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if like_a_number else None)


_Dumper.add_representer(str, _represent_text)
# members of enumerations, such as Lightning's Interval.step
_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _text_nodes(
    node: yaml.Node | None, dotted: str, texts: Collection[str], keyed_by_text: Collection[str]
) -> Iterator[yaml.ScalarNode]:
    """Yield the unquoted scalars that are text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.style is None and _matches(dotted, keyed_by_text):
                yield key
            yield from _text_nodes(value, f"{dotted}.{key.value}" if dotted else key.value, texts, keyed_by_text)
    elif isinstance(node, yaml.ScalarNode) and _matches(dotted, texts) and node.style is None and not _is_null(node):
        yield node


def _is_null(node: yaml.ScalarNode) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _matches(dotted: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(dotted, pattern) for pattern in patterns)
