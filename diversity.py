"""Diversity of the semantic features (Section 4.2.2, Eq. 13-15): how alike those of one chain are.

    python diversity.py                                    the bundled model
    python diversity.py --ckpt runs/train/ema-*.pt > curve.csv    of --keep-every (Figure 4a)

The table on stdout is CSV. `similarity` is the mean |S_ij| over i != j (Eq. 15), smaller is more
diverse; `centred` is Eq. 15 of the features less their mean (`measure`); `released` is that of the
release, the mean of all of S, diagonal and signs included. The features are the AR Transformer's
output before the second position embedding, for MRAR those of the whole chain. Those of 1-step AR
are a function of the class alone: no seed changes them.
"""

import csv
import sys

# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, bounded, load_checkpoint, make_parser, per_image_noise, pick_device
from model import run_main

import torch
import torch.nn.functional as F
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
    """Means over classes and seeds of Eq. 15, of Eq. 15 centred, and of the release's measure.

    A vector common to all features raises every S_ij, but to the decoder it is a bias:
    added to all keys it leaves the softmax as it is, added to all values it shifts the result.
    `centred` takes it off: the mean over the classes and positions of one seed.
    """
    classes = torch.tensor(model.info["counts"], device=device).nonzero()[:, 0]
    rows = []
    for seed in range(seeds):
        parts = [chain_features(model, labels, seed).cpu() for labels in classes.split(64)]
        mean = torch.cat(parts).mean((0, 1))
        for features in parts:
            S = similarity(features)
            centred = mean_abs_offdiagonal(similarity(features - mean))
            rows.append(torch.stack([mean_abs_offdiagonal(S), centred, S.mean((-1, -2))]))
    return torch.cat(rows, dim=1).mean(1).tolist()


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[DEMO_MODEL], help="models (default: the bundled one)")
    add("--seeds", type=bounded(int, 1), default=4, help="chains per class, MRAR only (default: 4)")
    args = parser.parse_args()
    device = pick_device(args.device)

    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["step", "checkpoint", "similarity", "centred", "released"])
    for ckpt in tqdm(args.ckpt, unit="checkpoint"):
        model = load_checkpoint(ckpt, device)
        measures = measure(model, args.seeds if model.config.refs > 1 else 1, device)
        step = model.info.get("step", 0)
        table.writerow([step, ckpt, *(f"{value:.4f}" for value in measures)])


if __name__ == "__main__":
    run_main(main)
