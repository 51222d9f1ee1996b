"""Charts of means and deviations."""

from __future__ import annotations

from itertools import pairwise

from PIL import Image

from scripts.line_charts import COLOURS, HEIGHT, SCALE, line_charts

NAN = float("nan")
BLUE, ORANGE = ((0x25, 0x63, 0xA8), (0xB4, 0x54, 0x1A))


def places(image: Image.Image, colour: tuple[int, ...], left: int = 0) -> set[tuple[int, int]]:
    """Where a colour is, to the right of a column and below the legend."""
    pixels = image.load()
    assert pixels is not None
    width, height = image.size
    return {
        (x, y) for x in range(left, width) for y in range(160, height) if pixels[x, y] == colour
    }


def test_each_line_is_drawn_in_its_colour_and_what_is_not_finite_is_left_out() -> None:
    points = {"a": [(1, [1.0, 2.0]), (2, [NAN])], "b": [(1, [100.0]), (2, [900.0])]}
    drawn = line_charts([{"loss": points}, {"empty": {"a": []}}], "depth")
    first, second = places(drawn, BLUE), places(drawn, ORANGE)
    assert first
    assert second
    assert max(x for x, _ in first) < max(x for x, _ in second) - 100, "a has no second point"
    assert COLOURS[:2] == ("#2563a8", "#b4541a")


def test_charts_side_by_side_share_their_vertical_axis() -> None:
    small, large = [(1, [1.0]), (2, [1.0])], [(1, [2.0]), (2, [2.0])]
    together = line_charts([{"one": {"a": small}, "two": {"b": large}}], "depth")
    heights = [max(y for _, y in places(together, colour)) for colour in (BLUE, ORANGE)]
    assert heights[0] - heights[1] > 0.8 * HEIGHT * SCALE
    apart = line_charts([{"one": {"a": small}}, {"two": {"b": large}}], "depth")
    tops = [min(y for _, y in places(apart, colour)) for colour in (BLUE, ORANGE)]
    assert tops[1] - tops[0] > HEIGHT * SCALE, "each in the middle of its own"


def test_values_far_apart_have_a_logarithmic_axis() -> None:
    drawn = line_charts([{"loss": {"a": [(1, [1.0]), (2, [10.0]), (3, [100.0])]}}], "depth")
    lowest: dict[int, int] = {}
    for x, y in places(drawn, BLUE, left=130):
        lowest[x] = max(y, lowest.get(x, 0))
    first, last = min(lowest), max(lowest)
    heights = [lowest[first + (last - first) * part // 4] for part in range(1, 4)]
    steps = [before - after for before, after in pairwise(heights)]
    assert abs(steps[0] - steps[1]) <= 0.1 * steps[0], "a straight line"


def test_ticks_and_notes_are_written() -> None:
    lines = {"loss": {"a": [(4, [1.0]), (16, [2.0])]}}
    plain = line_charts([lines], "depth")
    ticked = line_charts([lines], "depth", {4: "4\n20 updates"})
    noted = line_charts([lines], "depth", notes=["a at 4: 2 of 3 runs"])
    assert plain.size == ticked.size
    assert plain.tobytes() != ticked.tobytes()
    assert noted.size[1] > plain.size[1]
