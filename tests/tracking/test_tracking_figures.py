"""The heat map of the load."""

import numpy as np
import pytest
import torch

from lightning_moe.tracking import load_figure


def test_cells_are_load_over_the_layers_mean():
    load = torch.tensor([[10, 20, 30, 40], [0, 0, 4, 0], [0, 0, 0, 0]])
    axes, bar = load_figure(load, layers=[1, 2, 5], title="a title").axes

    (image,) = axes.get_images()
    expected = np.array([[0.4, 0.8, 1.2, 1.6], [0, 0, 4, 0], [np.nan] * 4])
    np.testing.assert_allclose(np.ma.filled(image.get_array().astype(float), np.nan), expected)
    assert image.norm([0.0, 1.0, 2.0]).tolist() == [0.0, 0.5, 1.0]  # the middle of the colours is balance
    marks = {text.get_position(): text.get_text() for text in axes.texts}
    assert marks == {(0, 1): "×", (1, 1): "×", (2, 1): "4.0", (3, 1): "×"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "5"]
    assert (axes.get_ylabel(), axes.get_title()) == ("layer", "a title")
    assert axes.get_xlabel() == "expert (×: no tokens)"
    assert bar.get_ylabel() == "tokens / mean of the layer"


def test_below_and_above_differ_for_every_eye():
    """Blue against red: told apart by brightness order with protanopia and deuteranopia, unlike green against red."""
    axes, _ = load_figure(torch.tensor([[0.2, 1.0, 1.8]])).axes
    image = axes.get_images()[0]
    below, balanced, above = image.cmap(image.norm([0.2, 1.0, 1.8]))[:, :3]
    assert below[2] > below[0]
    assert above[0] > above[2]
    assert balanced.min() > 0.9


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (3, 8), (11, 16), (19, 64)])
def test_it_can_be_drawn_at_every_size_of_interest(layers: int, experts: int):
    figure = load_figure(torch.rand(layers, experts) + 0.5)
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba()).std() > 0
    font = min((text.get_fontsize() for text in figure.axes[0].get_xticklabels()), default=0)
    assert font >= 8


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"load has shape \(4,\)"):
        load_figure(torch.ones(4))
    with pytest.raises(ValueError, match="2 layer names for 3 rows"):
        load_figure(torch.ones(3, 4), layers=[1, 2])


def test_it_leaves_no_global_state():
    from matplotlib._pylab_helpers import Gcf

    before = list(Gcf.figs)
    load_figure(torch.ones(2, 4))
    assert list(Gcf.figs) == before
