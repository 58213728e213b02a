"""Draw curves.

python demo/curves.py runs/train    the losses in log.csv of a run, as loss.png beside it
python demo/curves.py               demo/steps.png and demo/evaluations.png, by the project's own commands: about 40
                                    minutes on two cores; files go to runs/curves; what is there is not made again
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from vae import DEMO_DATA, atomic_write, run_main  # noqa: E402

OUT = Path("runs/curves")


def plot(curves, path, xlabel, width=640, height=400):
    """Draw curves {name: (x, y)} as a PNG: linear axes from 0, with ticks and a legend."""
    high = [max(np.max(curve[i]) for curve in curves.values()) or 1 for i in (0, 1)]
    left, right, top, bottom = 60, width - 15, 15, height - 40
    to_x, to_y = lambda x: left + x / high[0] * (right - left), lambda y: bottom - y / high[1] * (bottom - top)
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(picture)
    for x, y in np.outer(np.linspace(0, 1, 6), high):
        draw.line([to_x(x), top, to_x(x), bottom], "#dddddd")
        draw.text((to_x(x), bottom + 4), f"{x:.4g}", "black", font, "ma")
        draw.line([left, to_y(y), right, to_y(y)], "#dddddd")
        draw.text((left - 6, to_y(y)), f"{y:.2g}", "black", font, "rm")
    draw.text((right, height - 4), xlabel, "black", font, "rd")
    for i, (name, (x, y)) in enumerate(curves.items()):
        color = ("#1f5fa8", "#c8391f", "#2a8a3e", "#8450b0")[i % 4]
        draw.line([(to_x(a), to_y(b)) for a, b in zip(x, y)], color, width=2)
        draw.text((right - 8, top + 6 + 18 * i), name, color, font, "ra")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def plot_losses(run):
    """Draw the training loss and, of a run with --holdout, the held-out loss."""
    with open(run / "log.csv") as f:
        rows, curves = list(csv.DictReader(f)), {}
    for name, column in (("training loss", "loss"), ("held-out loss", "holdout_loss")):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            curves[name] = list(zip(*points))
    plot(curves, run / "loss.png", "step")
    print(f"wrote {run / 'loss.png'}")


def run(line):
    """Run a command of the project and return what it prints."""
    script, *flags = line.split()
    print(line)
    return subprocess.run([sys.executable, ROOT / script, *flags], check=True, stdout=subprocess.PIPE, text=True).stdout


def distance(name, flags):
    """Frechet distance of 500 samples, in the features of demo/features.pt."""
    samples, result = OUT / f"{name}.npz", OUT / f"{name}.json"
    if not result.exists():
        run(f"sample.py --num 500 --out {samples} {flags}")
        net = ROOT / "demo" / "features.pt"
        run(f"fid.py --samples {samples} --ref {DEMO_DATA} --net {net} --json {result}")
    return json.loads(result.read_text())["frechet_distance"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a training run")
    args = parser.parse_args()
    if args.run:
        return plot_losses(args.run)
    if not (OUT / "train" / "last.pt").exists():
        run(f"train.py --out {OUT}/train --keep-every 400 --sample-every 0")
    checkpoints = sorted((OUT / "train").glob("ema-*.pt"))
    table = run(f"diversity.py --ckpt {' '.join(map(str, checkpoints))}")
    rows = sorted(csv.DictReader(io.StringIO(table)), key=lambda row: int(row["step"]))
    steps = [int(row["step"]) for row in rows]
    distances = [distance(f"step-{step}", f"--ckpt {OUT}/train/ema-{step:07d}.pt") for step in steps]
    similarity = [float(row["similarity"]) for row in rows]
    curves = {"similarity (Eq. 15)": (steps, similarity), "distance / 10": (steps, [d / 10 for d in distances])}
    plot(curves, ROOT / "demo" / "steps.png", "steps of stage 1")

    curves = {}
    for sampler, counts in (("euler-maruyama", (12, 25, 100)), ("adams-bashforth", (5, 8, 12, 25))):
        values = [distance(f"{sampler}-{n}", f"--sampler {sampler} --steps {n}") for n in counts]
        curves[sampler] = (counts, values)
    plot(curves, ROOT / "demo" / "evaluations.png", "network evaluations an image")


if __name__ == "__main__":
    run_main(main)
