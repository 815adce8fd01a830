"""Tables as text, Markdown and CSV; figures as PNG."""

import csv
import json
import math
import struct

import pytest

from lightning_moe.report.figures import grid, layer_ticks, panel_grid, png, shared_legend
from lightning_moe.report.tables import csv_table, json_numbers, markdown_table, text_table


def test_text_is_left_and_numbers_are_right() -> None:
    rows = [["name", "loss", "note"], ["a", "10.25", ""], ["longer", "3.5", "best"]]
    assert text_table(rows, right=(1,), indent="  ").split("\n") == [
        "  name     loss  note",
        "  a       10.25",
        "  longer    3.5  best",
    ]
    with pytest.raises(ValueError, match="zip"):
        text_table([["a", "b"], ["a"]])


def test_a_markdown_table_has_a_head_and_equal_lines() -> None:
    assert markdown_table([["a", "bc"], ["Δ long", "1"]]).split("\n") == [
        "| a      | bc |",
        "| ------ | -- |",
        "| Δ long | 1  |",
    ]


def test_numbers_survive_the_csv() -> None:
    rows = [{"a": 0.1 + 0.2, "b": 'x, "y"\n'}, {"a": None, "c": 3}]
    read = list(csv.DictReader(csv_table(rows).splitlines(keepends=True)))
    assert float(read[0]["a"]) == 0.1 + 0.2
    assert read[0]["b"] == rows[0]["b"]
    assert (read[1]["a"], read[1]["c"]) == ("", "3")
    assert csv_table([], ["a", "b"]) == "a,b\n"
    assert csv_table([{"b": 1}], ["a", "b"]) == "a,b\n,1\n"


def test_json_gets_no_nan() -> None:
    value = {"a": [math.nan, 1.5, {"b": (math.inf, "NaN")}], "c": None}
    assert json.dumps(json_numbers(value), allow_nan=False) == '{"a": [null, 1.5, {"b": [null, "NaN"]}], "c": null}'


def test_a_figure_becomes_a_png_of_its_size() -> None:
    figure, [[axes]] = grid(1, 1, 4.6, 2.6)
    axes.set_title("title", fontsize=30)
    image = png(figure)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert (width, height) == (pytest.approx(750, rel=0.05), pytest.approx(450, rel=0.05))  # 5 × 3 inches at 150 dpi
    assert axes.title.get_fontsize() == 10


def test_panels_fill_rows_and_hide_the_rest() -> None:
    figure, axes = panel_grid(5, 3, 1, 1)
    assert (len(axes), len(figure.axes)) == (5, 6)
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    assert tuple(figure.get_size_inches()) == pytest.approx((3.4, 2.4))
    assert len(panel_grid(2, 3, 1, 1)[0].axes) == 2


def test_a_shared_legend_names_each_line_once() -> None:
    figure, [axes] = grid(1, 2, 1, 1)
    for axis in axes:
        axis.plot([0, 1], label="a")
    axes[1].plot([0, 1], label="b")
    shared_legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_ticks_of_layers_are_thinned() -> None:
    _, [[axes]] = grid(1, 1, 1, 1)
    layer_ticks(axes.xaxis, [f"layer_{number:02d}" for number in range(2, 7)], most=3, first=1)
    assert axes.get_xticks().tolist() == [1, 3, 5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["02", "04", "06"]
