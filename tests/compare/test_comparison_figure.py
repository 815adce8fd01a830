"""The figure of a comparison, whose labels can be as long as the keys in which its groups differ."""

import io

from matplotlib.image import imread

from lightning_moe.compare.groups import Group
from lightning_moe.compare.report import figure, rows
from lightning_moe.compare.runs import FinishedRun


def width(label: str) -> int:
    groups = [Group(name, {1: FinishedRun("a", {}, {"loss": 3.0, "layers": {}})}) for name in (label, "token_choice")]
    return imread(io.BytesIO(figure(rows(groups, groups[0]), groups[0]))).shape[1]


def test_long_labels_are_wrapped_and_do_not_widen_the_figure() -> None:
    details = ", ".join(f"a_setting_{number}=0.0{number}" for number in range(12))
    assert width(f"expert_threshold ({details})") < 1.3 * width("expert_threshold with its default keys")
