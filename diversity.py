"""Diversity of the semantic features (Section 4.2.2, Eq. 13-15): how alike those of one image are.

    python diversity.py                                    the bundled model
    python diversity.py --heatmap trouser --out S.png      S of one class (Eq. 14) as a picture
    python diversity.py --ckpt runs/train/ema-*.pt > curve.csv    of --keep-every (Figure 4a)

The table on stdout is CSV. `similarity` is the mean |S_ij| over i != j (Eq. 15), smaller is more
diverse; `released` is the release's measure, the mean of all of S, diagonal and signs included. The
features are the AR Transformer's output before the second position embedding, for MRAR those of the
whole chain. Those of 1-step AR are a function of the class alone: no seed changes them.
"""

import csv
import sys

# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, atomic_write, bounded, class_index, load_checkpoint
from model import make_parser, per_image_noise, pick_device, run_main

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm


def similarity(features):
    """S = A A^T (Eq. 14) of the L2-normalised features A (Eq. 13).

    features  [..., K, D]
    Returns float64 [..., K, K] in [-1, 1].
    """
    A = F.normalize(features.cpu().double(), dim=-1)
    return A @ A.transpose(-1, -2)


def mean_abs_offdiagonal(S):
    """Eq. 15 of S [..., K, K] -> [...]: mean |S_ij| over i != j, "excluding self-similarities"."""
    different = ~torch.eye(S.shape[-1], dtype=torch.bool)
    return S.abs()[..., different].mean(-1)


@torch.no_grad()
def chain_features(model, labels, seed):
    """Features of the whole chain for labels [B] -> [B, cond_tokens, width]; draws references."""
    noise_sampler = per_image_noise(seed, labels.tolist())
    references = model.sample(labels, model.config.refs - 1, noise_sampler=noise_sampler)
    return model.ar(labels, references)


def measure(model, seeds, device):
    """Eq. 15, and the release's mean of all of S, of each class: two float64 [seeds, classes]."""
    classes = torch.arange(model.config.num_classes, device=device).split(64)
    ours = []
    released = []
    for seed in range(seeds):
        matrices = [similarity(chain_features(model, y, seed)) for y in classes]
        ours.append(torch.cat([mean_abs_offdiagonal(S) for S in matrices]))
        released.append(torch.cat([S.mean((-1, -2)) for S in matrices]))
    return torch.stack(ours), torch.stack(released)


def draw_heatmap(S, refs, path):
    """Write S [K, K] as a PNG of at least 512 px: -1 blue, 0 white, 1 red; lines between images."""
    zoom = -(-512 // len(S))
    grey = Image.fromarray(((S + 1) * 127.5).round().byte().numpy())
    picture = ImageOps.colorize(grey, black=(30, 60, 160), mid="white", white=(180, 20, 30))
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for k in range(1, refs):
        line = k * picture.width // refs
        draw.line([line, 0, line, picture.width], "black")
        draw.line([0, line, picture.width, line], "black")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[DEMO_MODEL], help="models (default: the bundled one)")
    add("--seeds", type=bounded(int, 1), default=4, help="chains per class, MRAR only (default: 4)")
    add("--heatmap", metavar="CLASS", help="write S of this class (index or name) to --out")
    add("--out", default="runs/similarity.png", help="picture of --heatmap (default: %(default)s)")
    args = parser.parse_args()
    device = pick_device(args.device)

    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["step", "checkpoint", "similarity", "over_classes", "over_seeds", "released"])
    for ckpt in tqdm(args.ckpt, unit="checkpoint"):
        model = load_checkpoint(ckpt, device)
        label = class_index("--heatmap", args.heatmap, model) if args.heatmap else None
        ours, released = measure(model, args.seeds if model.config.refs > 1 else 1, device)
        over_classes = ours.mean(0).std(correction=0)
        over_seeds = ours.std(0, correction=0).mean()
        numbers = [ours.mean(), over_classes, over_seeds, released.mean()]
        table.writerow([model.info.get("step", 0), ckpt, *(f"{x:.4f}" for x in numbers)])
    if args.heatmap:
        S = similarity(chain_features(model, torch.tensor([label], device=device), seed=0))[0]
        draw_heatmap(S, model.config.refs, args.out)
        print(f"wrote S of {args.heatmap} to {args.out}: -1 blue, 0 white, 1 red", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
