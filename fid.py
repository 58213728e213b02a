"""Stage 4: FID, Inception Score, precision and recall of samples (the measures of Tables 1-3).

    python fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz   against ADM's batch, as the paper
    python fid.py --samples train/ --image-size 256 --save-stats stats.npz      statistics once; then --ref stats.npz
    python fid.py --samples samples.npz --ref SRC --net demo/features.pt        in another network's features (not FID)

Samples and reference are folders of images or .npz files of uint8 images (arr_0 or images). A TorchScript file is a
program that runs when it is loaded: name only networks that you trust.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import readable
from vae import Images, atomic_write, bounded, fetch, pick_device, run_main, sha256_prefix

INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


# ---------------------------------------------------------------------------------------------- the measures
def mean_and_covariance(features):
    """Mean [D] and unbiased covariance [D, D], float64, of features [N, D]."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017); mu [D], sigma [D, D] symmetric, float64.

    The trace of the root is the sum of the singular values of R1^T R2, where R R^T = S. Unlike a matrix square root
    these are exact for singular covariances too (fewer images than features).
    """

    def root(sigma):  # root @ root.T = sigma
        values, vectors = torch.linalg.eigh(sigma)
        return vectors * values.clamp_min(0).sqrt()

    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp_min(0).item()


def inception_score(p):
    """exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016) of probabilities p [N, K]: mean and deviation of ten parts.

    E_x KL = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y). The parts are torch-fidelity's.
    """
    n, order, scores = len(p), np.random.RandomState(2020).permutation(len(p)), []
    for i in range(10):
        part = p[order[i * n // 10 : (i + 1) * n // 10]].double()
        p_y = part.mean(0)
        scores.append((torch.xlogy(part, part).sum(1).mean() - torch.xlogy(p_y, p_y).sum()).exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def precision_recall(samples, reference, k=3, device="cpu"):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [N, D] and [M, D], N, M > k, in [0, 1].

    A set's manifold is the union of balls around its points, each reaching to the k-th nearest other point of the set.
    Precision is the part of the samples in the reference's manifold, recall the part of the reference in the samples'.
    """
    center = reference.mean(0, dtype=torch.float64)  # distances do not depend on it, their rounding does
    samples, reference = ((x.double() - center).to(device) for x in (samples, reference))
    slack = 1e-6 * max(x.norm(dim=1).max() for x in (samples, reference))  # so that copies lie in each other's balls
    block = max(1, 2**24 // max(len(samples), len(reference)))

    def part_inside(x, points):  # the part of x in the manifold of the points
        rows = tqdm(points.split(block), desc="precision and recall")  # below, k + 1: the nearest is the point itself
        radii = torch.cat([torch.cdist(r, points).topk(k + 1, largest=False).values[:, -1] for r in rows]) + slack
        inside = [(torch.cdist(r, points) <= radii).any(1) for r in x.split(block)]
        return torch.cat(inside).double().mean().item()

    return part_inside(samples, reference), part_inside(reference, samples)


# ---------------------------------------------------------------------------------------------- features
def load_net(path, device):
    """TorchScript network: images x uint8 [N, 3, H, W] -> net(x, return_features=True) [N, D], and
    net(x, no_output_bias=True), class probabilities [N, K]. Returns (net, D)."""
    with readable(path, "TorchScript feature network"):
        net = torch.jit.load(str(path), map_location=device).eval()
        with torch.inference_mode():
            image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)
            _, (_, width) = net(image, no_output_bias=True).shape, net(image, return_features=True).shape
    return net, width


def extract(net, images, args, **output):
    """net(x, **output) of all images -> float32 [N, D] on the CPU."""
    loader = torch.utils.data.DataLoader(images, args.batch_size, num_workers=args.workers)
    batches = tqdm(loader, unit="batch", desc=f"{', '.join(output)} of {images.path}")
    x = torch.cat([net(x.permute(0, 3, 1, 2).contiguous().to(args.device), **output).float().cpu() for x in batches])
    if not x.isfinite().all():
        raise ValueError(f"{images.path}: the network gives numbers that are not finite")
    return x


def open_reference(path, samples, network, width):
    """(Images brought to the samples' size, (mu [D], sigma [D, D])) of --ref, None for what it has not."""
    stats = None  # ADM's reference batches have both: the statistics are of more images than the batch
    if path.endswith(".npz") and Path(path).is_file():
        with readable(path, ".npz of images or statistics"), np.load(path, allow_pickle=False) as data:
            has_images = "arr_0" in data or "images" in data
            if "mu" in data or not has_images:
                mu, sigma = stats = tuple(torch.from_numpy(data[k].astype(np.float64)) for k in ("mu", "sigma"))
                made_by = str(data["network"])[:16] if "network" in data else network  # ADM's files name no network
                if made_by != network or mu.shape != (width,) or sigma.shape != (width, width):
                    raise ValueError("statistics of another network; make new ones with --save-stats and this --net")
                if not (mu.isfinite().all() and sigma.isfinite().all()):
                    raise ValueError("mu or sigma is not finite")
            if not has_images:
                return None, stats
    shape = samples.shape
    images = Images(path, shape[0] if shape[0] == shape[1] else None, labelled=False)
    if images.shape != shape:
        raise ValueError(f"--ref {path}: {images.shape} px, the samples {shape}; --image-size N crops both to N x N")
    return images, stats


# ---------------------------------------------------------------------------------------------- command
def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, bounded(int, 1)
    add("--samples", metavar="S", required=True, help="images: a folder (any depth), or F.npz as sample.py writes it")
    add("--ref", metavar="R", help="what to compare with: images, ADM's reference batch, or statistics of --save-stats")
    add("--net", metavar="FILE", help="feature network, TorchScript (default: NVIDIA's Inception, fetched once)")
    add("--json", metavar="FILE", help="also write the numbers to this file")
    add("--save-stats", metavar="F.npz", help="write mean and covariance of the samples' features: a --ref for later")
    add("--image-size", type=count, metavar="N", help="crop all images to N x N (default: the samples' size)")
    add("--batch-size", type=count, default=64, help="images at once (default: 64)")
    add("--workers", type=bounded(int, 0), default=0, help="processes that read images (default: 0, this one)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = parser.parse_args()
    if not (args.ref or args.save_stats):
        raise ValueError("--ref: give a reference (or --save-stats F.npz, to write the samples' statistics)")
    if args.ref and not Path(args.ref).exists():
        raise ValueError(f"--ref {args.ref}: no such file or folder")
    return args


def main():
    args = parse()
    samples = Images(args.samples, args.image_size, labelled=False)
    args.device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # its rounding shows in FID
    net_path = args.net or fetch(INCEPTION, Path(torch.hub.get_dir()) / "transdiff" / Path(INCEPTION).name)
    (net, width), network = load_net(net_path, args.device), sha256_prefix(Path(net_path).read_bytes())
    reference, stats = open_reference(args.ref, samples, network, width) if args.ref else (None, None)
    for images in (samples, reference or samples):
        if len(images) < 10:
            raise ValueError(f"{images.path}: has {len(images)} images; the measures need 10 or more")

    # TorchScript would spend its first calls on profiling itself
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        features = extract(net, samples, args, return_features=True)
        p = extract(net, samples, args, no_output_bias=True)
        ref_features = extract(net, reference, args, return_features=True) if reference else None
    mu, sigma = mean_and_covariance(features)
    if args.save_stats:
        arrays = dict(mu=mu.numpy(), sigma=sigma.numpy(), network=np.array(network))
        atomic_write(args.save_stats, lambda f: np.savez(f, **arrays))
        print(f"wrote the statistics of {args.samples} to {args.save_stats}")
    result = dict(zip(("inception_score", "inception_score_std"), inception_score(p)))
    if args.ref:
        stats = stats or mean_and_covariance(ref_features)
        result["frechet_distance" if args.net else "fid"] = frechet_distance(mu, sigma, *stats)
    if reference:
        result["precision"], result["recall"] = precision_recall(features, ref_features, device=args.device)
    if hasattr(net, "classes") and 1 < len(samples.classes) <= len(net.classes):  # of demo/train_features.py
        result["accuracy"] = (p.argmax(1).numpy() == samples.labels).mean().item()

    print(
        f"{args.samples}: {len(samples):,} images of {samples.shape} px, in the features of {args.net or 'Inception'}"
    )
    for name, value in result.items():
        print(f"  {name:24}{value:10.4f}")
    if len(samples) < 10_000:
        print("fid.py: warning: a distance of fewer than 10,000 samples is biased upwards", file=sys.stderr)
    if args.json:
        result |= dict(network=network, samples=args.samples, reference=args.ref, num_samples=len(samples))
        atomic_write(args.json, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run_main(main)
