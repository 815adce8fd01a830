"""jsonargparse's private names do what `internals.jsonargparse` says."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser

from lightning_moe.internals.jsonargparse import typed_arguments


@dataclass
class Inner:
    count: int = 1


class Outer:
    def __init__(self, inner: Inner | None = None, rate: float | None = None) -> None: ...


def test_every_argument_has_its_type() -> None:
    parser = ArgumentParser()
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--plain", type=int)
    parser.add_argument("--union", type=int | str)
    parser.add_class_arguments(Outer, "outer")
    parser.add_class_arguments(Inner, "group")
    found = typed_arguments(parser)
    assert found.pop("plain") is int
    assert found == {"union": int | str, "outer.inner": Inner | None, "outer.rate": float | None, "group.count": int}
