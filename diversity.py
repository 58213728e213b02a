"""Diversity of the semantic features (Section 4.2.2, Eq. 13-15): how similar the features of one image are.

    python diversity.py                                   the bundled model: means and spread over classes and seeds
    python diversity.py --heatmap trouser --out S.png     the matrix S of one class (Eq. 14) as a picture
    python diversity.py --ckpt runs/train/ema-*.pt > curve.csv    of train.py --keep-every (Figure 4a)

The table on stdout is CSV. `similarity` is the mean |S_ij| over i != j (Eq. 15), smaller is more diverse; `released` is
the release's measure, the mean of all of S, diagonal and signs included. The features are the AR Transformer's output
before the second position embedding, for MRAR those of the whole chain. Those of 1-step AR are a function of the class
alone: no seed changes them.
"""

import argparse
import csv
import sys

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from model import load_checkpoint
from vae import DEMO_MODEL, atomic_write, bounded, class_index, derive_seed, per_image_noise, pick_device, run_main


def similarity(features):
    """S = A A^T (Eq. 14) of the L2-normalised features A (Eq. 13): [..., K, D] -> float64 [..., K, K] in [-1, 1]."""
    A = torch.nn.functional.normalize(features.double(), dim=-1)
    return A @ A.transpose(-1, -2)


def mean_abs_offdiagonal(S):
    """Eq. 15 of S [..., K, K] -> [...]: mean |S_ij| over i != j, "excluding self-similarities"."""
    return S.abs()[..., ~torch.eye(S.shape[-1], dtype=torch.bool, device=S.device)].mean(-1)


@torch.no_grad()
def chain_features(model, labels, seed):
    """Features of the whole chain for labels [B] -> [B, cond_tokens, width]; MRAR draws the references."""
    randn, refs = per_image_noise(seed, labels.tolist(), labels.device), model.config.refs
    return model.ar(labels, model.sample(labels, refs - 1, noise_sampler=randn) if refs > 1 else None)


def measure(model, args):
    """Eq. 15, and the release's mean of all of S, for every seed and class -> float64 [2, seeds, classes]."""
    rows, batches = [], torch.arange(model.config.num_classes, device=args.device).split(args.batch_size)
    for seed in [derive_seed(args.seed, i) for i in range(args.seeds if model.config.refs > 1 else 1)]:
        matrices = (similarity(chain_features(model, y, seed)) for y in batches)
        rows.append(torch.cat([torch.stack([mean_abs_offdiagonal(S), S.mean((-1, -2))]) for S in matrices], dim=1))
    return torch.stack(rows, dim=1).cpu().numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, bounded(int, 1)
    add("--ckpt", nargs="+", default=[str(DEMO_MODEL)], help="checkpoints (default: the bundled model)")
    add("--seeds", type=count, default=4, help="chains drawn for each class, MRAR only (default: 4)")
    add("--seed", type=bounded(int, 0), default=0, help="(default: 0)")
    add("--per-class", action="store_true", help="a row for each class too")
    add("--heatmap", metavar="CLASS", help="write S of this class (index or name) to --out")
    add("--out", default="runs/similarity.png", help="picture of --heatmap (default: %(default)s)")
    add("--batch-size", type=count, default=64, help="chains drawn at once (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = parser.parse_args()
    args.device = pick_device(args.device)

    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["step", "checkpoint", "similarity", "over_classes", "over_seeds", "released"])
    for ckpt in tqdm(args.ckpt, unit="checkpoint"):
        model = load_checkpoint(ckpt, args.device)
        names = model.info.get("classes") or [str(i) for i in range(model.config.num_classes)]
        label = class_index("--heatmap", args.heatmap, names, len(names)) if args.heatmap else None
        (values, released), step = measure(model, args), model.info.get("step", 0)
        numbers = values.mean(), values.mean(0).std(), values.std(0).mean(), released.mean()
        table.writerow([step, ckpt, *(f"{x:.4f}" for x in numbers)])
        for name, v, r in zip(names, values.T, released.T) if args.per_class else ():
            table.writerow([step, name, f"{v.mean():.4f}", "", f"{v.std():.4f}", f"{r.mean():.4f}"])
    if args.heatmap:
        S = similarity(chain_features(model, torch.tensor([label], device=args.device), derive_seed(args.seed, 0)))[0]
        grey = Image.fromarray(((S + 1) * 127.5).round().byte().cpu().numpy())
        picture = ImageOps.colorize(grey, black=(30, 60, 160), mid="white", white=(180, 20, 30))
        picture = ImageOps.scale(picture, -(-512 // len(S)), Image.Resampling.NEAREST)  # at least 512 pixels a side
        atomic_write(args.out, lambda f: picture.save(f, "PNG", optimize=True))
        print(f"wrote S of {names[label]} to {args.out}: -1 blue, 0 white, 1 red", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
