"""Pictures: which side is which, true proportions, outlines in the colours of the legend."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from glmae_ray.pictures import draw_planes, plane_boxes, three_planes

SHAPE, SPACING, AT = (10, 24, 30), (4.0, 1.0, 0.5), (3, 17, 22)
CALM = {"title": "t", "windows": [(0.0, 1.0)], "structures": {}}


def cut(array):
    """What the three boxes through `AT` hold."""
    boxes = plane_boxes(AT, SHAPE)
    return [array[..., *(slice(*ends) for ends in zip(*box, strict=True))] for box in boxes]


def planes(volume, label=None):
    return three_planes(cut(volume), None if label is None else cut(label), spacing=SPACING)


def rendered(figure):
    """(rows, columns, 3) of the picture, from its top left."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def drawn_part(figure, column):
    """The pixels of one plane."""
    pixels = rendered(figure)
    x0, y0, x1, y1 = figure.axes[column].get_window_extent().extents.round().astype(int)
    return pixels[len(pixels) - y1 : len(pixels) - y0, x0:x1]


def test_planes_are_those_through_the_voxel():
    volume = np.random.default_rng(0).random((2, *SHAPE))
    axial, coronal, sagittal = planes(volume)
    np.testing.assert_array_equal(axial.pixels, volume[:, 3])
    np.testing.assert_array_equal(coronal.pixels, volume[:, :, 17])
    np.testing.assert_array_equal(sagittal.pixels, volume[:, :, :, 22])


@pytest.mark.parametrize(
    ("corner", "column", "vertical", "horizontal"),
    [
        ((3, -4, -4), 0, "top", "left"),  # anterior and right in the axial plane
        ((3, 3, 3), 0, "bottom", "right"),
        ((-2, 17, -4), 1, "top", "left"),  # superior and right in the coronal plane
        ((-2, -4, 22), 2, "top", "left"),  # superior and anterior in the sagittal plane
        ((1, 3, 22), 2, "bottom", "right"),
    ],
)
def test_the_patients_right_and_front_are_on_the_left(corner, column, vertical, horizontal):
    volume = np.zeros((1, *SHAPE))
    volume[0][corner] = 1.0
    part = drawn_part(draw_planes(planes(volume), **CALM), column)
    # White as a voxel, so not the letters.
    rows, columns = np.nonzero(part.min(axis=2) > 250)
    assert (rows.mean() < part.shape[0] / 2) == (vertical == "top")
    assert (columns.mean() < part.shape[1] / 2) == (horizontal == "left")


def test_proportions_are_those_of_the_patient():
    figure = draw_planes(planes(np.zeros((1, *SHAPE))), **CALM)
    rendered(figure)
    sizes = [axis.get_window_extent() for axis in figure.axes]
    mm = [(24, 15), (40, 15), (40, 24)]  # height, width
    for size, (height, width) in zip(sizes, mm, strict=True):
        assert size.height / size.width == pytest.approx(height / width, rel=0.01)
    # One scale for all three.
    assert sizes[2].width / sizes[0].width == pytest.approx(24 / 15, rel=0.03)


def test_structures_that_show_are_outlined_in_the_colour_of_the_legend():
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 16:20, 21:27] = 3
    label[8, 0, 0] = 5
    structures = {"liver": 3, "speck": 5, "absent": 9}
    figure = draw_planes(
        planes((label == 3).astype(float)[np.newaxis], label), **{**CALM, "structures": structures}
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["liver"]
    colour = np.array(to_rgb(legend.get_lines()[0].get_color())) * 255
    for column in range(3):
        part = drawn_part(figure, column)
        outline = np.argwhere(np.abs(part - colour).max(axis=2) < 60)
        inside = np.argwhere(part.min(axis=2) > 250)
        assert len(outline) > 20
        np.testing.assert_allclose(outline.mean(axis=0), inside.mean(axis=0), atol=5)


def test_every_channel_has_a_row_and_its_own_window():
    volume = np.zeros((3, *SHAPE))
    figure = draw_planes(planes(volume), **{**CALM, "windows": [(0, 1), (-5, 7)]})
    limits = [axis.images[0].get_clim() for axis in figure.axes]
    assert limits == [(0, 1)] * 3 + [(-5, 7)] * 3
    assert "channel 1" in figure.axes[3].get_title()


def test_many_structures_fit_under_the_planes():
    label = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 120
    structures = {f"structure number {n}": n for n in range(1, 120)}
    figure = draw_planes(planes(np.zeros((1, *SHAPE)), label), **{**CALM, "structures": structures})
    rendered(figure)
    (legend,) = figure.legends
    assert len(legend.get_texts()) > 100
    extent = legend.get_window_extent()
    assert extent.y0 >= 0
    assert extent.x0 >= 0
    assert min(axis.get_window_extent().y0 for axis in figure.axes) >= extent.y1


def test_a_prediction_is_outlined_in_dashes_beside_the_labels():
    labels, predicted = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    labels[1:9, 10:20, 12:26], predicted[1:9, 10:20, 8:22] = 1, 1
    volume = np.zeros((1, *SHAPE))
    given = three_planes(cut(volume), cut(labels), spacing=SPACING, predicted=cut(predicted))
    figure = draw_planes(given, title="t", windows=[(0.0, 1.0)], structures={"liver": 1})
    solid, dashed = figure.axes[0].collections
    ends = [line.get_paths()[0].get_extents().x0 for line in (solid, dashed)]
    assert ends[0] < ends[1]  # X runs to the left
    assert (solid.get_linestyle()[0][1], dashed.get_linestyle()[0][1] is None) == (None, False)
