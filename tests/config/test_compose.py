"""Composition of configuration files, against flat dictionaries of dotted keys and hand-written results."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.config.compose import Layer, compose, conf_root, find_config, load_layers, merge, source_of
from lightning_moe.errors import UserError

LEAVES = st.integers() | st.lists(st.integers(), max_size=2) | st.none()
# branches b*, leaves l*: a key is always one or the other, so that flat dictionaries can be the reference
TREES = st.recursive(
    st.dictionaries(st.sampled_from(["l1", "l2", "l3"]), LEAVES, max_size=3),
    lambda children: st.dictionaries(st.sampled_from(["b1", "b2"]), children, max_size=2),
    max_leaves=8,
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def layer(data: dict[str, Any], path: str = "x.yaml") -> Layer:
    return Layer(Path(path), data)


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))


@given(st.lists(TREES, max_size=4))
def test_merge_is_last_writer_wins_on_dotted_keys(trees: list[dict[str, Any]]) -> None:
    expected: dict[str, Any] = {}
    for tree in trees:
        expected |= flatten(tree)
    assert flatten(merge([layer(tree) for tree in trees])) == expected


@given(st.lists(TREES, min_size=1, max_size=4))
def test_source_of_a_key_is_the_last_file_that_has_it(trees: list[dict[str, Any]]) -> None:
    layers = [layer(tree, f"{n}.yaml") for n, tree in enumerate(trees)]
    for key in flatten(merge(layers)):
        last = max(n for n, tree in enumerate(trees) if key in flatten(tree))
        assert source_of(key, layers) == Path(f"{last}.yaml")


def test_another_class_drops_the_arguments_of_the_one_below() -> None:
    below = layer({"routing": {"class_path": "pkg.ExpertThreshold", "init_args": {"ema_decay": 0.5}}})
    same = layer({"routing": {"class_path": "ExpertThreshold", "init_args": {"capacity_factor": 1}}})
    other = layer({"routing": {"class_path": "pkg.TokenChoice"}})
    assert merge([below, same])["routing"]["init_args"] == {"ema_decay": 0.5, "capacity_factor": 1}
    assert merge([below, other]) == {"routing": {"class_path": "pkg.TokenChoice"}}
    assert merge([below, layer({"routing": None}), other]) == {"routing": {"class_path": "pkg.TokenChoice"}}


def test_included_files_come_first_and_own_keys_win(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "base.yaml": {"a": 1, "b": {"x": 1, "y": 1}},
            "sub/two.yaml": {"include": ["../base"], "b": {"y": 2, "z": 2}},
            "top.yaml": {"include": ["sub/two.yaml", "routing/dense"], "b": {"z": 3}},
        },
    )
    merged = merge(load_layers(tmp_path / "top.yaml"))
    assert merged == {"a": 1, "b": {"x": 1, "y": 2, "z": 3}, "model": {"routing": None}}


def test_the_default_experiment_lies_below_all_files(tmp_path: Path) -> None:
    write(tmp_path, {"default.yaml": {"a": 1, "b": 1}, "one.yaml": {"b": 2, "c": 2}, "two.yaml": {"c": 3}})
    names = [str(tmp_path / name) for name in ("one.yaml", "two")]
    assert merge(compose(names, str(tmp_path / "default.yaml"))) == {"a": 1, "b": 2, "c": 3}


def test_a_file_of_the_working_directory_hides_a_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("routing/dense") == conf_root() / "routing/dense.yaml"
    write(tmp_path, {"routing/dense.yaml": {}})
    assert find_config("routing/dense").resolve() == tmp_path / "routing/dense.yaml"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top.yaml": {"include": ["gone"]}}, r"top\.yaml: include: configuration file 'gone' not found"),
        (
            {"top.yaml": {"include": ["b"]}, "b.yaml": {"include": ["top"]}},
            r"circle: \S+top\.yaml → \S+b\.yaml → \S+top",
        ),
        ({"top.yaml": {"include": ["top.yaml"]}}, r"circle: \S+top\.yaml → \S+top\.yaml"),
        ({"top.yaml": {"include": {"a": 1}}}, r"top\.yaml: include: must be a list of file names, found \{'a': 1\}"),
        ({"top.yaml": "- a"}, r"top\.yaml: must be a mapping of keys to values, found a list"),
        ({"top.yaml": "a: [1"}, r"top\.yaml: cannot be read as YAML: .* line 1"),
        ({"top.yaml": "a: 1\na: 2"}, r"top\.yaml: cannot be read as YAML: .*duplicate key a"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=message):
        load_layers(tmp_path / "top.yaml")


def test_a_missing_file_is_answered_with_the_nearest_packaged_one() -> None:
    with pytest.raises(UserError, match=r"'routing/token_chioce' not found.* did you mean 'routing/token_choice'\?"):
        find_config("routing/token_chioce")


def test_numbers_keep_their_type(tmp_path: Path) -> None:
    write(tmp_path, {"top.yaml": "a: 1e-3\nb: 1.0e-10\nc: 10\nd: '${a}'\n"})
    assert merge(load_layers(tmp_path / "top.yaml")) == {"a": 0.001, "b": 1e-10, "c": 10, "d": "${a}"}


def test_a_chain_of_includes_has_an_end(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.yaml": {"include": [f"{n + 1}.yaml"]} for n in range(60)} | {"60.yaml": {}})
    with pytest.raises(UserError, match=r"\.yaml: include: more than 50 files include each other in a row"):
        load_layers(tmp_path / "0.yaml")
    assert len(load_layers(tmp_path / "10.yaml")) == 51


def test_includes_that_multiply_have_an_end(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.yaml": {"include": [f"{n + 1}.yaml"] * 2} for n in range(40)} | {"40.yaml": {}})
    with pytest.raises(UserError, match=r"\.yaml: include: more than 1000 files are included"):
        load_layers(tmp_path / "0.yaml")
