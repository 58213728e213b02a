"""Stage 4: FID, Inception Score, precision and recall of samples (the measures of Tables 1-3).

    python fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz
        against ADM's reference batch, as the release
    python fid.py --samples train/ --image-size 256 --save-stats stats.npz
        statistics of a large set, for --ref stats.npz
    python fid.py --samples samples.npz --ref SRC --net demo/features.pt
        in the features of another network: distances, not FID

Samples and reference are folders of images or .npz files of uint8 images (arr_0 or images). A
TorchScript file is a program that runs when it is loaded: name only networks that you trust.
"""

import os
import sys
from collections import Counter
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import UserError, atomic_write, bounded, fetch, make_parser, pick_device, run_main
from model import sha256_prefix, shorten, user_file, write_json
from vae import Images

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)


# -------------------------------------------------------------------------------- the measures
def mean_and_covariance(n, total, outer):
    """Mean [D] and unbiased covariance [D, D] of n features.

    total  their sum [D], float64
    outer  the sum of their outer products [D, D], float64: a large set needs no more memory
    """
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017).

    mu     [D], float64
    sigma  [D, D], symmetric, float64

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2. Its error is 1e-6 of
    the traces for singular covariances too (fewer images than features), unlike a matrix root's.
    """
    cross = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return distance.clamp_min(0).item()


def inception_score(p):
    """exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016), the mean over ten parts.

    p  class probabilities [N, K]

    E_x KL = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y). The parts are torch-fidelity's.
    """
    n = len(p)
    order = np.random.RandomState(2020).permutation(n)
    scores = []
    for i in range(10):
        part = p[order[i * n // 10 : (i + 1) * n // 10]].double()
        p_y = part.mean(0)
        kl = torch.xlogy(part, part).sum(1).mean() - torch.xlogy(p_y, p_y).sum()
        scores.append(kl.exp().item())
    return np.mean(scores)


def precision_recall(samples, reference, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019), both in [0, 1].

    samples    features [N, D], N > k
    reference  features [M, D], M > k

    A set's manifold is the union of balls around its points, each reaching to the k-th nearest
    other point of the set. Precision is the part of the samples in the reference's manifold, recall
    the part of the reference in the samples'.
    """
    center = reference.double().mean(0)  # distances do not depend on it, their rounding does
    a = samples.double() - center
    b = reference.double() - center
    slack = 1e-6 * torch.cat([a, b]).norm(dim=1).max()  # copies lie in each other's balls

    def part_inside(x, points):
        """The part of x in the manifold of the points."""
        radii = []
        for block in tqdm(points.split(256), desc="precision and recall"):
            nearest = torch.cdist(block, points).topk(k + 1, largest=False).values
            radii.append(nearest[:, k])  # nearest[:, 0] is the point itself
        radii = torch.cat(radii) + slack
        inside = [(torch.cdist(block, points) <= radii).any(1) for block in x.split(256)]
        return torch.cat(inside).double().mean().item()

    return part_inside(a, b), part_inside(b, a)


# -------------------------------------------------------------------------------- features
def load_net(path, shape, device):
    """(network of a TorchScript file that is called like NVIDIA's Inception, its D).

    net(x, return_features=True)  features [N, D] of images x uint8 [N, 3, H, W]
    net(x, no_output_bias=True)   class probabilities [N, K]
    shape                         (H, W) of the images to measure
    """
    with user_file(path, "TorchScript feature network"), torch.inference_mode():
        net = torch.jit.load(str(path), map_location=device).eval()
        image = torch.zeros(1, 3, *shape, dtype=torch.uint8, device=device)
        features = net(image, return_features=True)
        total = net(image, no_output_bias=True).sum()
        if not abs(total - 1) < 1e-2:  # NaN is not
            raise ValueError(f"of a black image it gives probabilities of sum {total:.3g}")
    return net, features.shape[1]


@torch.inference_mode()
def extract(net, images, workers, device, keep):
    """(class probabilities [N, K], features [N, D] or, without `keep`, None, their mean and
    covariance) of all images, on the CPU, float32 and float64."""
    features = []
    probs = []
    total = outer = 0.0
    # Arrays, unlike tensors, travel without shared memory.
    loader = DataLoader(images, 64, num_workers=workers, collate_fn=np.stack)
    # TorchScript would spend its first calls on profiling itself.
    with torch.jit.optimized_execution(False):
        for x in tqdm(loader, unit="batch", desc=f"features of {images.path}"):
            x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device)
            f = net(x, return_features=True).float().cpu()
            total += f.double().sum(0)
            outer += f.double().T @ f.double()
            if keep:
                features.append(f)
            probs.append(net(x, no_output_bias=True).float().cpu())
    if not torch.isfinite(outer).all():
        raise UserError(f"{images.path}: the network gives features that are not finite")
    features = torch.cat(features) if keep else None
    return torch.cat(probs), features, mean_and_covariance(len(images), total, outer)


def class_names(images):
    """Class of each image, the first folder of its name; [] without classes."""
    names = [name.replace(os.sep, "/").partition("/") for name in images.names]
    return [folder for folder, slash, _ in names if folder and slash]


# -------------------------------------------------------------------------------- the stage
def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--samples", required=True, help="images: a folder (any depth), or F.npz")
    add("--ref", help="images, ADM's reference batch, or statistics of --save-stats")
    add("--net", help="feature network, TorchScript (default: NVIDIA's Inception)")
    add("--json", help="also write the numbers to this file")
    add("--save-stats", help="write mean and covariance of the samples' features to this .npz")
    add("--image-size", type=bounded(int, 1), help="crop all images to N x N pixels")
    add("--workers", type=bounded(int, 0), default=0, help="processes to read images (default: 0)")
    args = parser.parse_args()
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise UserError(f"--save-stats {args.save_stats}: must end in .npz, for --ref to read it")
    device = pick_device(args.device)

    # -------- samples and network
    samples = Images(args.samples, args.image_size, labelled=False)
    path = args.net or fetch(INCEPTION, "inception-2015-12-05.pt")
    net, width = load_net(path, samples.shape, device)
    network = sha256_prefix(Path(path).read_bytes())
    made_with = f"network {network} and images of {samples.shape} px"

    # -------- reference: statistics, images or both (ADM's batches: statistics of more images)
    reference = args.ref
    stats = None
    if args.ref and args.ref.endswith(".npz"):
        with user_file(args.ref, ".npz of images or statistics"), np.load(args.ref) as data:
            if "mu" in data and "sigma" in data:
                stats = [torch.from_numpy(data[k]).double() for k in ("mu", "sigma")]
                # ADM's files name no network: their features are Inception's, of uncropped images.
                unnamed = "other features" if args.net or args.image_size else made_with
                theirs = str(data.get("network", unnamed))
                if not {"arr_0", "images"} & set(data):
                    reference = None
    if stats:
        shapes = [x.shape for x in stats]
        total = stats[0].sum() + stats[1].sum()
        if shapes != [(width,), (width, width)] or not total.isfinite():
            raise UserError(f"--ref {args.ref}: not mean and covariance of {width} finite features")
        if theirs != made_with:
            raise UserError(
                f"--ref {args.ref}: statistics of {theirs}, not of {made_with}; make them again: "
                "--save-stats, with this --net and --image-size"
            )
    if reference:
        height, width = samples.shape
        reference = Images(args.ref, height if height == width else None, labelled=False)
        if reference.shape != samples.shape:
            raise UserError(
                f"--ref {args.ref}: {reference.shape} px, the samples {samples.shape}: "
                "--image-size N"
            )
    for images in (samples, reference):
        if images and len(images) < 10:
            raise UserError(f"{images.path}: has {len(images)} images; 10 or more are needed")

    # -------- features and measures
    # Precision and recall alone need the features, and images to compare with.
    keep = reference is not None
    p, features, (mu, sigma) = extract(net, samples, args.workers, device, keep)
    result = {"score" if args.net else "inception_score": inception_score(p)}
    if reference:
        _, ref_features, ref_stats = extract(net, reference, args.workers, device, keep)
        stats = stats or ref_stats
        result["precision"], result["recall"] = precision_recall(features, ref_features)
    if stats:
        result["frechet_distance" if args.net else "fid"] = frechet_distance(mu, sigma, *stats)
    known = getattr(net, "classes", [])  # of demo/train_features.py
    labels = class_names(samples)
    if labels and set(labels) <= set(known):  # matched by name
        right = [known[k] == label for k, label in zip(p.argmax(1), labels)]
        result["accuracy"] = np.mean(right)

    ref_labels = class_names(reference) if reference else []
    if labels and ref_labels:
        ours = Counter(labels)
        theirs = Counter(ref_labels)
        # {class: its part of the samples, of the reference}
        shares = {k: (ours[k] / len(labels), theirs[k] / len(ref_labels)) for k in ours | theirs}
        off = {k: abs(a - b) + (a * b == 0) for k, (a, b) in shares.items()}  # absent: over 1
        if sum(off.values()) > 0.1:
            k = max(off, key=off.get)
            print(
                f"warning: the sets differ in their classes, which counts as distance: {k} is "
                f"{shares[k][0]:.1%} of the samples, {shares[k][1]:.1%} of the reference",
                file=sys.stderr,
            )

    # -------- results
    name = args.net or "Inception"
    print(
        f"{args.samples}: {len(samples):,} images of {samples.shape} px, in the features of {name}"
    )
    for key, value in result.items():
        print(f"  {key:24}{value:10.4f}")
    if known and "accuracy" not in result:
        print(f"{name} was trained on {shorten(known)}; of other images its numbers mean little")
    if args.ref and len(samples) < 10_000:
        print(
            "warning: the distance of fewer than 10,000 samples is biased upwards", file=sys.stderr
        )
    if args.save_stats:
        atomic_write(args.save_stats, lambda f: np.savez(f, mu=mu, sigma=sigma, network=made_with))
        print(f"wrote the statistics of {args.samples} to {args.save_stats}")
    if args.json:
        result.update(network=network, samples=args.samples, reference=args.ref)
        write_json(args.json, dict(result, num_samples=len(samples)))


if __name__ == "__main__":
    run_main(main)
