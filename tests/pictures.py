"""Properties that every figure must have."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from gptjax.plots.token_boxes import FONT_SIZE

PIXEL = 1.0  # text is placed on whole pixels


def box_colors(figure):
    """Colors of the boxes of a token figure, in the order of the text."""
    return [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]


def box_texts(figure):
    """Texts of a token figure, its title first."""
    return [text.get_text() for text in figure.axes[0].texts]


def undrawn_labels(figure):
    """Labels of ticks outside the view of their axis."""
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not (axis.get_visible() and low <= tick.get_loc() <= high):
                yield from (tick.label1, tick.label2)


def assert_nothing_is_cut_off(figure):
    FigureCanvasAgg(figure).draw()
    hidden = {*map(id, undrawn_labels(figure))}
    texts = [x for x in figure.findobj(Text) if x.get_text() and x.get_visible()]
    inside = figure.bbox.padded(PIXEL)
    for text in [text for text in texts if id(text) not in hidden]:
        place = text.get_window_extent()
        assert inside.x0 <= place.x0 <= place.x1 <= inside.x1, text
        assert inside.y0 <= place.y0 <= place.y1 <= inside.y1, text


def assert_boxes_contain_their_texts(figure):
    """No two boxes overlap, and each text lies in a box."""
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    boxes = [patch.get_window_extent().padded(-0.01) for patch in axes.patches]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for text in axes.texts[1:]:
        place = text.get_window_extent()
        middle = (place.y0 + place.y1) / 2
        wide = [box.padded(PIXEL) for box in boxes]
        if text.get_fontsize() == FONT_SIZE:  # ids are below their box
            wide = [box for box in wide if box.y0 <= middle <= box.y1]
        assert any(box.x0 <= place.x0 and place.x1 <= box.x1 for box in wide), text
