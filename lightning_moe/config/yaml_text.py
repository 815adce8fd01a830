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

LONGEST_YAML = 10_000_000  # characters
DEEPEST_YAML = 50
LONGEST_NUMBER = 4_000  # characters; Python reads no whole number of 4,301 digits
MOST_VALUES = 100_000
#: what plain YAML means without a tag, too
_PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq"))


def load_yaml(path: Path, texts: Collection[str] = (), keyed_by_text: Collection[str] = ()) -> Any:
    """Read a YAML file as an OmegaConf container; null stays null, even where values are text.

    Args:
        path: path of the file, in UTF-8.
        texts: dotted keys whose values are text; ``*`` matches any part.
        keyed_by_text: dotted keys of mappings whose own keys are text.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        yaml.YAMLError, OmegaConfBaseException: its content is not YAML, or more than `check_yaml` takes.
    """
    source = path.read_text(encoding="utf-8")
    check_yaml(source)
    if any(pattern.rpartition(".")[2] in source for pattern in (*texts, *keyed_by_text)):
        nodes = _text_nodes(yaml.compose(source, Loader=yaml.SafeLoader), "", texts, keyed_by_text)
        spans = {(node.start_mark.index, node.end_mark.index): node.value for node in nodes}
        for (start, end), value in sorted(spans.items(), reverse=True):
            if source[start] not in "&*!":  # an anchor, alias or tag says more than the text
                source = source[:start] + json.dumps(value) + source[end:]
    try:
        return OmegaConf.load(StringIO(source))
    except ValueError as error:  # a value that its tag does not fit, such as !!int a
        raise yaml.YAMLError(str(error)) from error


def check_yaml(source: str) -> None:
    """Refuse YAML that would build objects, or that grows without end when it is read.

    Raises:
        yaml.YAMLError: it has explicit tags, an alias inside its own anchor, or more depth or values than a
            configuration has; the message gives the line.
    """
    if len(source) > LONGEST_YAML:
        raise yaml.YAMLError(f"has {len(source):,} characters; {LONGEST_YAML:,} is the most")
    sizes: list[int] = []  # of the open mappings and lists: values inside, those of aliases too
    anchors: list[str | None] = []  # of the same
    known: dict[str, int] = {}
    for event in yaml.parse(source, Loader=yaml.SafeLoader):
        place = f"line {event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in ("!", *_PLAIN_TAGS):
            raise yaml.YAMLError(f"{place}: has the tag {tag!r}; write the value without a tag")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_NUMBER and not event.style:
            raise yaml.YAMLError(f"{place}: has a value of {len(event.value):,} characters; put a text in quotes")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            sizes.append(1)
            anchors.append(event.anchor)
            if len(sizes) > DEEPEST_YAML:
                raise yaml.YAMLError(f"{place}: is nested more than {DEEPEST_YAML} levels deep")
            continue
        size, anchor = 1, getattr(event, "anchor", None)
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            size, anchor = sizes.pop(), anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise yaml.YAMLError(f"{place}: the alias *{event.anchor} lies in its own anchor")
            size, anchor = known.get(event.anchor, 1), None
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor is not None:
            known[anchor] = size
        if sizes:
            sizes[-1] += size
        if size > MOST_VALUES or (sizes and sizes[-1] > MOST_VALUES):
            raise yaml.YAMLError(f"{place}: has more than {MOST_VALUES:,} values, those of aliases counted each time")


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
