import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from vlmem_jax.demo import charts
from vlmem_jax.demo.charts import Bar


def svg(text: str) -> ET.Element:
    return ET.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL).group())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 970, [0, 200, 400, 600, 800, 1000]),
        (-0.02, 0.05, [-0.02, 0, 0.02, 0.04, 0.06]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, ticks):
    assert charts._ticks(low, high) == pytest.approx(ticks)


def test_a_curve_goes_down_where_its_numbers_do():
    root = svg(charts.line_chart({"loss": [(0, 2.0), (50, 1.0), (100, 0.5)]}, {"start": 0}, "nats"))
    points = [tuple(map(float, pair.split(","))) for pair in root.find("polyline").get("points").split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[1][1] < points[2][1]  # y grows downwards


def test_a_bar_is_as_high_as_its_share():
    root = svg(charts.bar_chart([Bar("a", 0.5, 0.4, 0.6), Bar("b <x>", 1.0, 0.9, 1.0)], 0.1))
    half, whole = (float(bar.get("height")) for bar in root.findall("rect"))
    assert whole == pytest.approx(2 * half, abs=0.01)
    assert "b <x>" in [text.text for text in root.findall("text")]


def test_heat_colours_the_heaviest_cell_most():
    root = svg(charts.heat(Image.new("L", (8, 8)), np.array([[0.0, 0.2], [0.4, 0.1]]), most=0.4))
    assert [float(cell.get("opacity")) for cell in root.findall("rect")] == pytest.approx(
        [0.0, 0.425, 0.85, 0.2125], abs=1e-3
    )


def test_a_chart_without_numbers_says_so():
    assert "Nothing" in charts.line_chart({"loss": []}, {}, "nats")
