"""Draw the losses of training runs; claims.py draws its pictures with the other functions.

python demo/curves.py                   losses of runs/train, from its log.csv, as loss.png there
python demo/curves.py runs/a runs/b     of several runs in one picture, runs/curves/loss.png
"""

import csv
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import UserError, atomic_write, make_parser, run_main  # noqa: E402
from verdicts import deviation, mean_and  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

# Of log.csv. The last two, of runs with --holdout: EMA weights, images held out and as many trained
# on.
COLUMNS = dict(loss="training loss", holdout_loss="held-out loss", seen_loss="seen images' loss")
CURVES = (  # of claims.csv: claim, metric
    ("autoguidance", "distance"),
    ("references", "gain"),
)
COLORS = ("#1f5fa8", "#c8391f", "#2a8a3e", "#8450b0", "#b07a10", "#555555")
PALE = ("#9dc3ec", "#efa899", "#9ed3aa", "#cdb0e4", "#e0c184", "#bbbbbb")

BAR_COLORS = ("#7aa6d8", "#c9c9c9")  # the setting that the claim says is better, the other
VERDICT_COLORS = {"yes": "#2a8a3e", "no": "#c8391f", "cannot tell": "#555555"}


def ticks(high):
    """4 to 9 round numbers from 0 to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if high < 9 * s * power)
    return step * np.arange(high // step + 1)


def plot(curves, path, xlabel, ylabel, colors=COLORS, width=640, height=400):
    """Draw curves {name: (x, y)} as a PNG: linear axes from 0, the names above them."""
    high_x = max(max(x) for x, _ in curves.values()) or 1
    high_y = 1.1 * max(max(y) for _, y in curves.values()) or 1
    left = 60
    right = width - 20
    top = 20 + 18 * len(curves)
    bottom = height - 40

    def to_x(x):
        return left + x / high_x * (right - left)

    def to_y(y):
        return bottom - y / high_y * (bottom - top)

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for x in ticks(high_x):
        draw.line([to_x(x), top, to_x(x), bottom], "#dddddd")
        draw.text((to_x(x), bottom + 4), f"{x:g}", "black", font, "ma")
    for y in ticks(high_y):
        draw.line([left, to_y(y), right, to_y(y)], "#dddddd")
        draw.text((left - 6, to_y(y)), f"{y:g}", "black", font, "rm")
    draw.text((right, height - 4), xlabel, "black", font, "rd")
    draw.text((8, top - 8), ylabel, "black", font, "ld")
    for i, (name, (x, y)) in enumerate(curves.items()):
        color = colors[i % len(colors)]
        points = [(to_x(a), to_y(b)) for a, b in zip(x, y)]
        draw.line(points, color, width=2)
        for a, b in points[-1:]:  # a log of one row has no line
            draw.ellipse([a - 3, b - 3, a + 3, b + 3], color)
        draw.text((right, 6 + 18 * i), name, color, font, "ra")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def draw_curves(tables, folder):
    """Curves of means over seeds: of 1-step AR only the control, of a chain the last image.

    tables  {claim: {setting: {metric: {seed: value}}}}
    """
    # "NAME, cfg 2, image 3": the name of the curve, that of the x axis, and x.
    pattern = r"(?!stage 1)(.*)(cfg|step) (\d+)(?:, (?:real, )?image 3)?"
    for claim, metric in CURVES:
        curves = {}
        for setting, cells in tables.get(claim, {}).items():
            match = re.fullmatch(pattern, setting)
            values = cells.get(metric)
            if match and values:
                name = match[1].strip(", ") or metric
                x, y = curves.setdefault(name, ([], []))
                x.append(float(match[3]))
                y.append(np.mean(list(values.values())))
                xlabel = match[2]
        if curves:
            plot(curves, folder / f"claims-{claim}-{metric.split()[0]}.png", xlabel, metric)


def draw_similarity(tables, folder):
    """Eq. 15 and, paler, Eq. 15 centred, over the steps of each run of `steps`."""
    curves = {}
    for setting, cells in tables.get("steps", {}).items():
        match = re.fullmatch("(.*), step (.*)", setting)
        if match:
            for metric in ("similarity (Eq. 15)", "centred"):
                for seed, value in cells[metric].items():
                    name = f"{match[1]}, seed {seed}"
                    x, y = curves.setdefault(metric, {}).setdefault(name, ([], []))
                    x.append(float(match[2]))
                    y.append(value)
    if curves:
        full = curves["similarity (Eq. 15)"]
        pale = {f"{name}, centred": curve for name, curve in curves["centred"].items()}
        n = len(full)
        path = folder / "claims-steps-similarity.png"
        plot(full | pale, path, "step", "Eq. 15", COLORS[:n] + PALE[:n], height=560)


def draw_verdicts(results, path, width=900):
    """Draw the comparisons of several seeds: means as bars, deviations as lines, and the verdicts.

    results  of verdicts.compare. Each comparison has a scale of its own.
    """
    results = [result for result in results if len(result.seeds) > 1]
    if not results:
        return
    line = 15
    block = 3 * line + 12
    left = 400  # of the bars; the names end before
    right = width - 150  # of the longest one; its figures follow
    picture = Image.new("RGB", (width, 10 + block * len(results)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for i, result in enumerate(results):
        top = 6 + block * i
        comparison = result.comparison
        color = VERDICT_COLORS[result.verdict]
        draw.text((8, top), comparison.claim, "black", ImageFont.load_default(14), "la")
        draw.text((width - 8, top), result.verdict, color, ImageFont.load_default(14), "ra")
        sides = [(comparison.better, result.ours)]
        if comparison.other is not None:
            sides.append((comparison.other, result.theirs))
        means = [np.mean(values) for _, values in sides]
        deviations = [deviation(values) for _, values in sides]
        high = max(np.add(means, deviations))
        low = min(0, *np.subtract(means, deviations))

        def to_x(value):
            return left + (value - low) / (high - low) * (right - left)

        for k, (name, values) in enumerate(sides):
            y = top + 10 + line * (k + 1)  # the middle of the bar
            mean = means[k]
            ends = [to_x(mean - deviations[k]), to_x(mean + deviations[k])]
            draw.text((left - 8, y), name, "black", font, "rm")
            start, end = sorted([to_x(0), to_x(mean)])
            draw.rectangle([start, y - 5, end, y + 5], BAR_COLORS[k])
            draw.line([ends[0], y, ends[1], y], "black", 1)
            for x in ends:
                draw.line([x, y - 4, x, y + 4], "black", 1)
            text = mean_and(values, deviation)
            draw.text((ends[1] + 8, y), text, "black", font, "lm")
        draw.line([8, top + block - 4, width - 8, top + block - 4], "#dddddd")
    picture = picture.quantize(64)  # colours: a quarter of the size
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def plot_losses(runs):
    """Draw the losses of logs."""
    curves = {}
    for folder in runs:
        with open(folder / "log.csv") as f:
            rows = list(csv.DictReader(f))
        for column, name in COLUMNS.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                name = name if len(runs) == 1 else f"{folder}: {name}"
                curves[name] = list(zip(*points))
    if not curves:
        raise UserError(f"{runs[0]}/log.csv: no losses yet; the first one is of step 50")
    folder = runs[0] if len(runs) == 1 else Path("runs/curves")
    path = folder / "loss.png"
    plot(curves, path, "step", "loss")
    print(f"wrote {path}")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    default = [Path("runs/train")]
    add("runs", nargs="*", type=Path, default=default, help="folders of runs (default: runs/train)")
    plot_losses(parser.parse_args().runs)


if __name__ == "__main__":
    run_main(main)
