"""What a forward pass could remember for the next one: everything in the model that is not a result.

A rule may write into its buffers, into an attribute of itself or of its class, into a variable of its file, or draw
random numbers. Each of these lets one pass depend on another, and comparisons of later passes may then see nothing: a
rule that sets its thresholds from the first batch is the same in all passes after it.
"""

from __future__ import annotations

import hashlib
import random
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.audit.findings import REST_OF_MODEL, STATE, Finding
from lightning_moe.model import CausalLM, RoutedLayer
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import Phase, RoutingRule

OF_TORCH = set(vars(nn.Module())) - {"training"}  # its books: parameters, buffers, hooks
Memory = dict[tuple[str, str], str]


def memory(decoder: CausalLM) -> Memory:
    """Return a digest of everything that a pass could leave behind, by place and name.

    The places are the MoE layers and ``rest of model``. It covers all attributes, parameters and buffers of every
    module, the routing rules with their classes and the variables of the files that define them, and the generators of
    random numbers.
    """
    layers = named_moe_layers(decoder)
    place_of = {module: place for place, layer in layers.items() for module in layer.modules()}
    name_of = {module: name for layer in layers.values() for name, module in layer.named_modules()}
    found: Memory = {}
    for path, module in decoder.named_modules():
        place, name = place_of.get(module, REST_OF_MODEL), name_of.get(module, path)
        for key, value in _attributes(module):
            found[place, f"{name}.{key}".lstrip(".")] = _digest(value)
    around = {kind: {key: _digest(value) for key, value in _around(kind)} for kind in map(_rule_class, layers.values())}
    for place, layer in layers.items():
        found |= {(place, key): digest for key, digest in around[_rule_class(layer)].items()}
    found[REST_OF_MODEL, "random numbers"] = _digest([torch.get_rng_state(), *_cuda_generators(), random.getstate()])
    return found


def state_findings(
    decoder: CausalLM, changed: Mapping[str, tuple[str, ...]], phase: Phase, shape: tuple[int, int]
) -> Iterator[Finding]:
    """Yield one finding of the check ``state`` for each place: what a pass over ``shape`` tokens changed there."""
    for place in (*named_moe_layers(decoder), REST_OF_MODEL):
        names = changed.get(place, ())
        yield Finding(STATE, place, phase, frozenset({shape}), num_changed=int(bool(names)), changed_state=names)


def changes(before: Memory, after: Memory) -> dict[str, tuple[str, ...]]:
    """Return the names of what differs, by place."""
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {place: tuple(name for at, name in differing if at == place) for place, _ in differing}


def _attributes(module: nn.Module) -> Iterable[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    results = module.results if isinstance(module, RoutedLayer) else frozenset()
    for key, value in vars(module).items():
        if key not in OF_TORCH and key not in results:
            yield key, value


def _rule_class(layer: RoutedLayer) -> type[RoutingRule]:
    return type(layer.rule)


def _around(rule_class: type[RoutingRule]) -> Iterable[tuple[str, Any]]:
    """Yield what belongs to no module: the attributes of the rule's classes, and the variables of their files."""
    for kind in rule_class.__mro__:
        if kind.__module__ not in ("builtins", "abc"):
            yield f"class {kind.__name__}", vars(kind)
            yield f"variables of {kind.__module__}", _variables(sys.modules.get(kind.__module__))


def _variables(module: ModuleType | None) -> dict[str, Any]:
    values = {} if module is None else vars(module)
    plain = (int, float, str, bytes, bytearray, Tensor, list, dict, set, tuple)
    return {key: value for key, value in values.items() if isinstance(value, plain) and not key.startswith("__")}


def _cuda_generators() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(value, set()):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterable[Any]:
    """Yield bytes that differ if two values differ. Objects of which nothing is known count by their identity."""
    if value is None or isinstance(value, int | float | complex | str | bytes | bytearray):
        yield f"{type(value).__name__} {value!r};".encode(errors="surrogatepass")
        return
    if id(value) in seen:  # a circle, or seen under another name
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        if value.device.type != "meta":
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            yield b"%d" % zlib.crc32(content.data)  # five times as fast as a cryptographic digest
    elif isinstance(value, nn.Module | type | ModuleType | BuiltinFunctionType):
        yield f"{type(value).__name__} {id(value)};".encode()  # modules are visited by themselves
    elif isinstance(value, FunctionType | MethodType):
        yield f"function {id(getattr(value, '__code__', value))};".encode()
        cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
        for inner in (*(cell.cell_contents for cell in cells), vars(value), value.__defaults__):
            yield from _parts(inner, seen)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _parts(key, seen)
            yield from _parts(inner, seen)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value))).encode(errors="surrogatepass")
    elif isinstance(value, Collection):  # lists, deques, arrays
        yield f"{type(value).__name__} {len(value)};".encode()
        for inner in value:
            yield from _parts(inner, seen)
    else:
        yield type(value).__name__.encode()
        yield from _parts(getattr(value, "__dict__", id(value)), seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
