"""Diversity of the semantic features (Section 4.2.2, Eq. 13-15): how alike the AR Transformer's features of one image are.

    python diversity.py                                   the bundled model: mean over classes and seeds, and the spread of both
    python diversity.py --heatmap trouser --out S.png     the matrix S of one class (Eq. 14) as a picture
    python diversity.py --ckpt runs/train/ema-*.pt --csv curve.csv --fid demo/fashion_mnist_10k.npz --net demo/features.pt    Figure 4a

Smaller is more diverse. The features are the AR Transformer's output before the second position embedding, for MRAR those of the whole
chain. In 1-step AR they are a function of the class alone: no seed changes them, so there is nothing to spread over but the classes.
"""
import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from model import load_checkpoint, sampling_settings
from vae import DEMO_MODEL, check_out, class_index, pick_device, positive, run, seed_of, whole, write_whole


def similarity(features):
    """S = A A^T of Eq. 14, A the L2-normalised features (Eq. 13): [..., K, D] -> [..., K, K] in [-1, 1], float64."""
    A = torch.nn.functional.normalize(features.double(), dim=-1)
    return A @ A.transpose(-1, -2)


def cosine_similarity(S, released=False):
    """Eq. 15 of S [..., K, K] -> [...]: the mean |S_ij| over i != j, "excluding self-similarities"; smaller is more diverse.

    The release's number is the mean of all of S instead: the diagonal included, no absolute value.
    """
    K = S.shape[-1]
    if released:
        return S.mean((-1, -2))
    return (S.abs().sum((-1, -2)) - S.diagonal(dim1=-2, dim2=-1).abs().sum(-1)) / (K * (K - 1))


@torch.no_grad()
def features(model, labels, seed, settings):
    """The AR Transformer's features of the whole chain for labels [B] -> [B, cond_tokens, width]; MRAR draws the references it needs."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda x: torch.randn(x.shape, generator=generator).to(labels.device)  # noqa: E731
    refs = model.config.refs
    references = model.sample(labels, refs - 1, noise_sampler=randn, **settings) if refs > 1 else None
    return model.ar(labels, references)


def measure(model, classes, args):
    """Eq. 15 for every seed and class: float64 array [seeds, classes] (one seed for 1-step AR, whose features have no noise in them)."""
    settings, values = sampling_settings(model.config, model.info.get("size")), []
    for seed in range(args.seeds if model.config.refs > 1 else 1):
        row = []
        for first in range(0, len(classes), args.batch_size):
            labels = torch.tensor(classes[first : first + args.batch_size], device=args.device)
            S = similarity(features(model, labels, seed_of(args.seed, seed, first), settings))
            row.append(cosine_similarity(S, args.released).cpu().numpy())
        values.append(np.concatenate(row))
    return np.stack(values)


def distance(ckpt, args):
    """The FID of fid.py for `--num` samples of a checkpoint, by running sample.py and fid.py as a user would."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        samples, result = f"{folder}/samples.npz", f"{folder}/fid.json"
        net = ["--net", args.net] if args.net else []
        for command in ([here / "sample.py", "--ckpt", ckpt, "--num", args.num, "--out", samples], [here / "fid.py", "--samples", samples, "--ref", args.fid, *net, "--json", result]):
            if subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"--fid: {Path(command[0]).name} failed on {ckpt}, as it says above")
        return json.loads(Path(result).read_text())["fid"]


def heatmap(S, path):
    """S [K, K] as a picture: -1 blue, 0 white, 1 red; at least 512 pixels a side."""
    S = S.cpu().numpy()[..., None]
    red, blue = np.array([180, 20, 30]), np.array([30, 60, 160])
    rgb = 255 + np.where(S > 0, S * (red - 255), -S * (blue - 255))
    picture, zoom = Image.fromarray(rgb.round().astype(np.uint8)), -(-512 // len(S))
    picture = picture.resize((len(S) * zoom, len(S) * zoom), Image.Resampling.NEAREST)
    write_whole(path, lambda f: picture.save(f, format="PNG"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[str(DEMO_MODEL)], help="checkpoints, e.g. those that train.py --keep-every kept (default: the bundled model)")
    add("--seeds", type=positive, default=4, help="chains drawn for each class, MRAR only (default: 4)")
    add("--seed", type=whole, default=0, help="(default: 0)")
    add("--released", action="store_true", help="the release's definition: mean of S, diagonal included, no absolute value")
    add("--per-class", action="store_true", help="a row for each class too")
    add("--heatmap", metavar="CLASS", help="write S of this class (index or name) to --out")
    add("--out", default="runs/similarity.png", help="picture of --heatmap (default: %(default)s)")
    add("--csv", help="also write the table to this file")
    add("--fid", metavar="REF", help="also measure the samples' distance to this reference, by sample.py and fid.py")
    add("--net", help="with --fid: the feature network (default: fid.py's)")
    add("--num", type=positive, default=1000, help="with --fid: samples a checkpoint (default: 1000)")
    add("--batch-size", type=positive, default=64, help="chains drawn at once (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = parser.parse_args()
    for flag, path in (("--out", args.out), ("--csv", args.csv)):
        if path:
            check_out(flag, path)
    args.device = pick_device(args.device)

    rows = []
    for ckpt in tqdm(args.ckpt, unit="checkpoint", disable=len(args.ckpt) == 1):
        model = load_checkpoint(ckpt, args.device)
        names = model.info.get("classes") or [str(i) for i in range(model.config.num_classes)]
        label = class_index("--heatmap", args.heatmap, names, len(names)) if args.heatmap else None
        values = measure(model, list(range(len(names))), args)
        row = dict(checkpoint=ckpt, step=model.info.get("step", ""), similarity=f"{values.mean():.4f}", over_classes=f"{values.mean(0).std():.4f}", over_seeds=f"{values.std(0).mean():.4f}")
        if args.fid:
            row["distance"] = f"{distance(ckpt, args):.4f}"
        rows.append(row)
        if args.per_class:
            rows += [dict(row, checkpoint=f"  {name}", similarity=f"{v.mean():.4f}", over_classes="", over_seeds=f"{v.std():.4f}") for name, v in zip(names, values.T)]
    rows.sort(key=lambda row: row["step"] if isinstance(row["step"], int) else 0)
    widths = {k: max(len(k), *(len(str(row.get(k, ""))) for row in rows)) for k in rows[0]}
    for row in [{k: k for k in widths}] + rows:
        print("  ".join(str(row.get(k, "")).ljust(w) if k == "checkpoint" else str(row.get(k, "")).rjust(w) for k, w in widths.items()))
    print(f"mean {'of S, the release' + chr(39) + 's definition' if args.released else '|S_ij| over i != j (Eq. 15)'}, and its standard deviation over classes and over {args.seeds} seeds")
    if model.config.refs == 1:
        print("1-step AR: the features are a function of the class alone, so nothing varies over seeds")
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_whole(args.csv, lambda f: f.write(text.getvalue().encode()))
        print(f"wrote {args.csv}")
    if args.heatmap:
        S = similarity(features(model, torch.tensor([label], device=args.device), args.seed, sampling_settings(model.config, model.info.get("size"))))[0]
        heatmap(S, args.out)
        print(f"wrote S of {names[label]} to {args.out}: -1 blue, 0 white, 1 red")


if __name__ == "__main__":
    run(main)
