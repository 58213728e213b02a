"""The curves of demo/curves.py."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))
from curves import draw_similarity, draw_verdicts, plot, ticks  # noqa: E402
from verdicts import by_claim, compare  # noqa: E402

BLUE = (0x1F, 0x5F, 0xA8)
OURS = (0x7A, 0xA6, 0xD8)
THEIRS = (0xC9, 0xC9, 0xC9)
RED = (0xC8, 0x39, 0x1F)


def pixels(path, color):
    """(rows, columns) of the pixels of this colour."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    return np.nonzero((picture == color).all(-1))


def write_log(folder, losses):
    folder.mkdir(parents=True)
    lines = [f"{50 * i},{loss}" for i, loss in enumerate(losses, 1)]
    (folder / "log.csv").write_text("\n".join(["step,loss,holdout_loss", *lines]))


@pytest.mark.parametrize("high", [1e-9, 0.0304, 1, 1.21, 3, 59, 500, 1600, 999_999])
def test_ticks_are_a_few_round_numbers_that_fill_the_axis(high):
    values = ticks(high)
    assert 4 <= len(values) <= 9 and values[0] == 0
    assert 0.7 * high < values[-1] <= high * (1 + 1e-9)
    assert all(len(f"{x:.6e}".split("e")[0].rstrip("0.")) <= 3 for x in values)  # 1.5, not 1.25


def test_each_curve_has_its_own_colour_and_none_runs_through_the_names(tmp_path):
    x = np.arange(100)
    flat = (x, np.full(100, 2.0))  # the highest there is: just below the names
    plot({"a": (x, x / 50)}, tmp_path / "one.png", "step", "loss")
    plot({"a": (x, x / 50), "b": flat}, tmp_path / "two.png", "step", "loss")
    assert len(pixels(tmp_path / "one.png", BLUE)[0]) > 200
    assert len(pixels(tmp_path / "one.png", RED)[0]) == 0
    rows, columns = pixels(tmp_path / "two.png", RED)
    curve = rows[columns < 300]
    name = rows[rows < curve.min() - 5]
    assert len(curve) > 200 and len(np.unique(curve)) <= 3
    assert name.size > 5 and name.max() < curve.min() - 20  # headroom, and the name above it


@pytest.mark.parametrize(
    "x,y",
    [
        ([7], [0.5]),
        ([7], [0]),
        ([1, 2, 3], [3, 3, 3]),
        ([1, 2, 3], [0, 0, 0]),
        ([1, 1e6], [1e-9, 0]),
    ],
    ids=["one point", "one zero", "constant", "zeros", "tiny"],
)
def test_short_and_constant_curves_are_drawn(tmp_path, x, y):
    plot({"a": (x, y)}, tmp_path / "p.png", "step", "loss")
    assert Image.open(tmp_path / "p.png").size == (640, 400)


def test_the_bars_of_a_comparison_have_its_proportions(tmp_path):
    values = {"MRAR, cfg 1, image 3": [1.0, 1.0, 1.0], "stage 1, cfg 1": [2.0, 2.1, 1.9]}
    table = {
        ("mrar", setting, str(seed), "distance"): value
        for setting, row in values.items()
        for seed, value in enumerate(row)
    }
    path = tmp_path / "verdicts.png"
    draw_verdicts(compare(by_claim(table)), path)
    widths = [np.bincount(pixels(path, color)[0]).max() for color in (OURS, THEIRS)]
    assert widths[0] / widths[1] == pytest.approx(0.5, abs=0.02)
    draw_verdicts([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_eq_15_of_each_run_is_drawn_over_the_steps_and_paler_centred(tmp_path):
    table = {}
    for seed in ("0", "1"):
        for step in (400, 800, 1200):
            setting = f"lr 0.001, step {step}"
            table["steps", setting, seed, "similarity (Eq. 15)"] = 0.5 + 0.3 * int(seed)
            table["steps", setting, seed, "centred"] = 0.2
    draw_similarity(by_claim(table), tmp_path)
    picture = tmp_path / "claims-steps-similarity.png"
    first, second, centred = (
        np.bincount(pixels(picture, color)[0]).argmax() for color in (BLUE, RED, (0xEF, 0xA8, 0x99))
    )
    assert (centred - second) / (centred - first) == pytest.approx(0.6 / 0.3, abs=0.05)


def test_losses_of_one_run_and_of_two_become_a_picture(tmp_path, command):
    write_log(tmp_path / "runs" / "a", ["0.9,", "0.8,0.7", "0.7,0.6"])
    write_log(tmp_path / "runs" / "b", ["0.5,", "0.4,", "0.3,"])
    out, _ = command("demo/curves.py runs/a")
    assert "wrote runs/a/loss.png" in out
    one = tmp_path / "runs" / "a" / "loss.png"
    assert len(pixels(one, BLUE)[0]) > 200  # the training loss
    assert len(pixels(one, RED)[0]) > 200  # the held-out loss
    out, _ = command("demo/curves.py runs/a runs/b")
    assert "wrote runs/curves/loss.png" in out
    green = pixels(tmp_path / "runs" / "curves" / "loss.png", (0x2A, 0x8A, 0x3E))
    blue = pixels(tmp_path / "runs" / "curves" / "loss.png", BLUE)
    assert green[0].max() > blue[0].max()  # the run b has the lower loss


@pytest.mark.parametrize(
    "folder,message",
    [("runs/none", "runs/none/log.csv: No such file"), ("runs/new", "log.csv: no losses yet")],
)
def test_a_run_without_losses_is_refused_in_one_line(tmp_path, command, folder, message):
    write_log(tmp_path / "runs" / "new", [])
    _, err = command(f"demo/curves.py {folder}", expect=2)
    assert message in err.splitlines()[-1]
