"""Draw curves.

    python demo/curves.py runs/train            losses of a run's log.csv, as loss.png beside it
    python demo/curves.py runs/a runs/b         of several runs in one picture, runs/curves/loss.png
    python demo/curves.py                       demo/steps.png and demo/evaluations.png

The last one runs the project's own commands, about 40 minutes on two cores. Their files go to
runs/curves; repeated, it makes only what is not there yet.
"""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO, UserError, atomic_write, make_parser, run_main  # noqa: E402
from vae import DEMO_DATA  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

OUT = Path("runs/curves")
COLORS = ("#1f5fa8", "#c8391f", "#2a8a3e", "#8450b0", "#b07a10", "#555555")


def ticks(high):
    """4 to 9 round numbers from 0 to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if high < 9 * s * power)
    return step * np.arange(high // step + 1)


def plot(curves, path, xlabel, ylabel, width=640, height=400):
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
        color = COLORS[i % len(COLORS)]
        draw.line([(to_x(a), to_y(b)) for a, b in zip(x, y)], color, width=2)
        draw.text((right, 6 + 18 * i), name, color, font, "ra")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def plot_losses(runs):
    """Draw the training losses and, of runs with --holdout, the held-out losses."""
    curves = {}
    for folder in runs:
        with open(folder / "log.csv") as f:
            rows = list(csv.DictReader(f))
        for name, column in (("training loss", "loss"), ("held-out loss", "holdout_loss")):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                name = name if len(runs) == 1 else f"{folder}: {name}"
                curves[name] = list(zip(*points))
    if not curves:
        raise UserError(f"{runs[0]}/log.csv: no losses yet; the first one is of step 50")
    path = runs[0] / "loss.png" if len(runs) == 1 else OUT / "loss.png"
    plot(curves, path, "step", "loss")
    print(f"wrote {path}")


def run(line):
    """Run a command of the project and return what it prints."""
    print(line)
    script, *flags = line.split()
    command = [sys.executable, DEMO.parent / script, *flags]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def distance(name, flags):
    """Frechet distance of 500 samples, in the features of demo/features.pt."""
    samples = OUT / f"{name}.npz"
    result = OUT / f"{name}.json"
    if not samples.exists():
        run(f"sample.py --num 500 --out {samples} {flags}")
    if not result.exists():
        net = DEMO / "features.pt"
        run(f"fid.py --samples {samples} --ref {DEMO_DATA} --net {net} --json {result}")
    return json.loads(result.read_text())["frechet_distance"]


def plot_steps():
    """Similarity and distance as stage 1 goes on (Figure 4a)."""
    folder = OUT / "train"
    if not (folder / "ema-0001600.pt").exists():
        resume = "--resume" if (folder / "last.pt").exists() else ""
        run(f"train.py --out {folder} --keep-every 400 --sample-every 0 {resume}")
    checkpoints = sorted(folder.glob("ema-*.pt"))
    table = run(f"diversity.py --ckpt {' '.join(map(str, checkpoints))}")
    rows = list(csv.DictReader(io.StringIO(table)))
    steps = [int(row["step"]) for row in rows]
    similarity = [float(row["similarity"]) for row in rows]
    tenths = [distance(path.stem, f"--ckpt {path}") / 10 for path in checkpoints]
    curves = {"similarity (Eq. 15)": (steps, similarity), "distance / 10": (steps, tenths)}
    plot(curves, DEMO / "steps.png", "step of stage 1", "similarity, distance / 10")


def plot_evaluations():
    """Distance over the steps of both samplers, of the bundled model."""
    curves = {}
    for sampler, counts in (
        ("euler-maruyama", (12, 25, 100)),
        ("adams-bashforth", (5, 8, 12, 25)),
    ):
        flags = f"--sampler {sampler} --steps"
        values = [distance(f"{sampler}-{n}", f"{flags} {n}") for n in counts]
        curves[sampler] = (counts, values)
    plot(curves, DEMO / "evaluations.png", "sampler steps per image", "Frechet distance")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of training runs")
    args = parser.parse_args()
    if args.runs:
        plot_losses(args.runs)
    else:
        plot_steps()
        plot_evaluations()


if __name__ == "__main__":
    run_main(main)
