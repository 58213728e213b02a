"""Draw demo/steps.png and demo/evaluations.png, by the project's own commands: about 40 minutes on two cores.

python demo/curves.py          files go to runs/curves; what is there is not made again
"""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from vae import DEMO_DATA, plot  # noqa: E402

OUT = Path("runs/curves")


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
    main()
