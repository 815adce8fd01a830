"""A compose file as Compose reads it, and what is wrong with it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "docker"
OWN_IMAGE = "lightning_moe:"
#: what our files use of https://github.com/compose-spec/compose-spec; anything else is taken for a slip
TOP_KEYS = {"name", "services", "volumes"}
SERVICE_KEYS = {"image", "build", "init", "cap_drop", "security_opt", "command", "environment", "volumes", "ports"} | {
    "depends_on",
    "healthcheck",
    "restart",
    "shm_size",
    "stop_grace_period",
    "deploy",
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries"}
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|KEY")
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\}|)")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: twice: {', '.join(sorted(twice))}")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> dict[str, Any]:
    """The content, with merges (``<<``) done and variables as they stand."""
    content: dict[str, Any] = yaml.load(text, _StrictLoader)
    return {key: value for key, value in content.items() if not key.startswith("x-")}


def interpolate(content: Any, variables: Mapping[str, str]) -> Any:
    """Every ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}`` replaced; an empty value counts as none.

    Raises:
        ValueError: a variable without value and default.
    """
    if isinstance(content, dict):
        return {key: interpolate(value, variables) for key, value in content.items()}
    if isinstance(content, list):
        return [interpolate(value, variables) for value in content]
    return _VARIABLE.sub(lambda match: _value(match, variables), content) if isinstance(content, str) else content


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    dollar, name, kind, text = match.groups()
    if dollar:
        return "$"
    if name is None:
        raise ValueError(f"{match.string!r}: a variable is written ${{NAME}}, a dollar sign $$")
    if value := variables.get(name):
        return value
    if kind != "-":
        raise ValueError(f"{name}: {text or 'has no value'}")
    return str(text)


def read_env(text: str) -> dict[str, str]:
    """Names and values of an env file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def problems(content: dict[str, Any], example: Mapping[str, str]) -> list[str]:
    """What is wrong with a compose file.

    Args:
        content: of `parse`.
        example: variables of ``.env.example``.
    """
    services = content["services"]
    found = [f"unknown key {key}" for key in content.keys() - TOP_KEYS]
    used = {match[2]: match[3] == "?" for text in _texts(content) for match in _VARIABLE.finditer(text) if match[2]}
    found += [f"{name}: not in .env.example" for name in used.keys() - example.keys()]
    found += [f"{name}: in .env.example, but nothing uses it" for name in example.keys() - used.keys()]
    found += [f"{name}: has a value in .env.example" for name, needed in used.items() if needed and example.get(name)]
    for name, service in services.items():
        found += [f"{name}: {problem}" for problem in _service_problems(service, content)]
    return found


def _service_problems(service: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    yield from (f"unknown key {key}" for key in service.keys() - SERVICE_KEYS)
    for port in service.get("ports", []):
        if not re.fullmatch(r"127\.0\.0\.1:(\d+|\$\{\w+:-\d+\}):\d+", str(port)):
            yield f"port {port}: not bound to 127.0.0.1"
    health, needs = service.get("healthcheck"), service.get("depends_on", {})
    if health is None and not any(need.get("condition") == "service_healthy" for need in needs.values()):
        yield "neither a health check nor waits for one"
    if health is not None and health.keys() != HEALTH_KEYS:
        yield f"healthcheck: has {sorted(health)}, not {sorted(HEALTH_KEYS)}"
    for other in needs:
        if "healthcheck" not in content["services"].get(other, {}):
            yield f"depends_on {other}: has no health check"
    for name, value in service.get("environment", {}).items():
        if not isinstance(value, str):
            yield f"{name}: {value!r} is not text"
        elif SECRET_NAME.search(name) and not re.fullmatch(r"\$\{\w+:\?[^}]+\}", value):
            yield f"{name}: a secret in the file"
    for text in _texts(service):
        for password in re.findall(r"://[^/@\s]*?:((?:\$\{[^}]*\}|[^@/\s])+)@", text):
            if not re.fullmatch(r"\$\{\w+:\?[^}]+\}", password):
                yield f"{text}: a secret in the file"
    image = str(service.get("image", ""))
    if not image.startswith(OWN_IMAGE) and not is_pinned(image):
        yield f"image {image}: not pinned to a release"
    for volume in service.get("volumes", []):
        source = volume_source(volume)
        if source.startswith("."):
            if not (FOLDER / source).is_file():
                yield f"volume {source}: no such file"
        elif source not in content["volumes"]:
            yield f"volume {source}: not declared"


def volume_source(volume: str) -> str:
    """The file or the named volume, with the defaults of variables."""
    return str(interpolate(volume, {})).partition(":")[0]


def is_pinned(image: str) -> bool:
    """Whether an image's tag names one release."""
    return bool(re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w.-]+)?", image))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)
    elif isinstance(content, str):
        yield content
