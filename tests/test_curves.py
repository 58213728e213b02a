"""The curves of demo/curves.py."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))
from curves import plot, plot_losses  # noqa: E402


def test_plot_draws_each_curve_in_its_own_colour(tmp_path):
    x = np.arange(100)
    curves = {"a": (x, 1 + np.sin(x / 9)), "b": (x, x / 50)}  # the first curve is blue, the second red
    plot({"a": curves["a"]}, tmp_path / "one.png", "step")
    plot(curves, tmp_path / "two.png", "step")
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    blue = [(picture[..., 2] > picture[..., 0] + 100).sum() for picture in (one, two)]
    red = [(picture[..., 0] > picture[..., 2] + 100).sum() for picture in (one, two)]
    assert min(blue) > 500 and red[0] == 0 and red[1] > 500


@pytest.mark.parametrize(
    "x,y",
    [([7], [0.5]), ([7], [0]), ([1, 2, 3], [3, 3, 3]), ([1, 2, 3], [0, 0, 0]), ([1, 1e6], [1e-9, 0])],
    ids=["one point", "one zero", "constant", "zeros", "tiny"],
)
def test_plot_draws_short_and_constant_curves(tmp_path, x, y):
    plot({"a": (x, y)}, tmp_path / "p.png", "step")
    assert Image.open(tmp_path / "p.png").size == (640, 400)


def test_losses_of_a_run_become_a_picture(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,holdout_loss\n1,0.9,\n2,0.8,0.7\n3,0.7,\n")
    plot_losses(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
    assert (picture[..., 2] > picture[..., 0] + 100).sum() > 300  # blue: the training loss
