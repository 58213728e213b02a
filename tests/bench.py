"""Images per second in training and sampling, beside a plain eager version of the same mathematics.

    python tests/bench.py                       size B on a CPU, in minutes
    python tests/bench.py --size L --batch-size 16 --sample-batch-size 64 --steps 100    on a GPU
                                                of 80 GB: it holds two optimisers
    python tests/bench.py --only memory         memory that training needs, by count
    python tests/bench.py --only attention      attention kernels of training
    python tests/bench.py --only loader         latents per second of synthetic caches, cold and warm

Our version and the plain one take turns in one process, on the same weights and inputs. A ratio is
of two neighbouring runs; its median and range are over the rounds.

The plain version does what the released code does. It copies c for each draw, computes the keys and
values of c anew for each draw and step, casts the weights at each step, computes the modulation for
each sample, and in training decodes the images of a chain one after the other. It uses torch's own
attention everywhere, a for-loop optimiser and a for-loop EMA, and compiles nothing.

TFLOP/s   multiplications and additions of the matrix products and attentions of our version,
          forward and backward, as torch.utils.flop_counter counts them, by our time: work that is
          saved counts for nothing
ceiling   the fastest product of two square matrices of the same dtype in this run
GB        peak memory during our version, of this process (CPU, Linux) or of torch (CUDA), with
          weights, EMA weights and both optimisers
"""

import argparse
import copy
import dataclasses
import functools
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as ours  # noqa: E402
from model import SIZES, TransDiff, autocast, bounded, cast_weights, euler_maruyama  # noqa: E402
from model import make_parser, part_paths, pick_device, pick_dtype, run_main  # noqa: E402
from model import write_json  # noqa: E402
from train import Chains, make_optimizer, memory_per_chain  # noqa: E402
from train import parallelize, update_ema  # noqa: E402
from vae import PART, LatentCache  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

ROW = "{:14}{:>10}{:>10}{:>8}{:>14}{:>9}{:>12}{:>7}"
DTYPES = dict(bf16=torch.bfloat16, fp32=torch.float32)
BATCH_MUL = {1: 4, 4: 2}  # refs -> draws of (t, noise) per image, Appendix B


def count_flops(config, batch_mul):
    """Floating-point operations of one chain, forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, config.refs, *config.latent_shape)
        labels = torch.empty(1, dtype=torch.int64)
        TransDiff(config).loss(latents, labels, batch_mul=batch_mul).backward()
    return counter.get_total_flops()


def ceiling(device, dtype):
    """Floating-point operations per second of the best square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(8))


def clock(f, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def process_memory(field):
    """GB of this process: VmHWM, the peak, or RssAnon, without pages of files. None: not Linux."""
    path = Path("/proc/self/status")
    found = path.exists() and re.search(rf"{field}:\s+(\d+)", path.read_text())
    return int(found[1]) / 1e6 if found else None


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak memory in GB since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return process_memory("VmHWM")


# -------------------------------------------------------------------------------- the plain version
def plain_attention(q, k, v, heads, mask=None, dropout=0.0):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


def plain_loss(model, latents, labels, batch_mul):
    c = model.encode(labels, latents[:, :-1])
    tokens = model.config.tokens_per_image
    losses = []
    for k in range(latents.shape[1]):
        x = latents[:, k].repeat(batch_mul, 1, 1, 1)
        t = torch.randn(len(x), device=x.device).sigmoid()
        eps = torch.randn_like(x)
        x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * eps
        v = model.velocity(x_t, t, c[:, : (k + 1) * tokens].repeat(batch_mul, 1, 1))
        losses.append((v.float() - (eps - x)).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def plain_sample(model, labels, refs, steps, cfg):
    null = torch.full_like(labels, model.config.num_classes)
    noise = torch.randn(len(labels), *model.config.latent_shape, device=labels.device)
    chain = noise[:, None][:, :0]
    for _ in range(refs):
        c = torch.cat([model.encode(labels, chain), model.encode(null, chain)])

        def velocity(x, t):
            t = torch.full((2 * len(x),), t, device=x.device)
            v, v_null = model.velocity(torch.cat([x, x]), t, c).float().chunk(2)
            return v_null + cfg * (v - v_null)

        x = euler_maruyama(velocity, noise, steps)
        chain = torch.cat([chain, x[:, None]], dim=1)
    return chain


@torch.no_grad()
def plain_update_ema(ema, model, decay):
    for p, q in zip(ema.parameters(), model.parameters()):
        p.mul_(decay).add_(q, alpha=1 - decay)


# -------------------------------------------------------------------------------- what is timed
def training(model, args, device, dtype):
    """(ours, plain, operations of ours, images): one optimiser step each."""
    config = model.config
    batch_mul = BATCH_MUL[config.refs]
    latents = torch.randn(args.batch_size, config.refs, *config.latent_shape, device=device)
    labels = torch.arange(args.batch_size, device=device) % config.num_classes
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    fused_optimizer = make_optimizer(model, 1e-6)
    loop_optimizer = torch.optim.AdamW(
        model.parameters(), 1e-6, betas=(0.9, 0.95), foreach=False, fused=False
    )
    # The same weights in other modules: compiled ones, if any.
    forward = parallelize(
        copy.deepcopy(model, {id(p): p for p in model.parameters()}), args.compile
    )

    def step(loss, optimizer, update):
        with autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(ema, model, 0.9999)

    def fast():
        step(lambda: forward(latents, labels, batch_mul=batch_mul), fused_optimizer, update_ema)

    def plain():
        loss = functools.partial(plain_loss, model, latents, labels, batch_mul)
        step(loss, loop_optimizer, plain_update_ema)

    operations = args.batch_size * count_flops(config, batch_mul)
    return fast, plain, operations, args.batch_size * config.refs


def sampling(model, args, device, dtype):
    """(ours, plain, operations of ours, images): a batch of chains each, guided."""
    model.eval().requires_grad_(False)
    refs = model.config.refs
    labels = torch.arange(args.sample_batch_size, device=device) % model.config.num_classes
    cast = cast_weights(copy.deepcopy(model), dtype)

    def fast():
        with torch.inference_mode(), autocast(device, dtype):
            cast.sample(labels, steps=args.steps, cfg=1.3, sampler="euler-maruyama", null_refs=True)

    def plain():
        with torch.inference_mode(), autocast(device, dtype):
            plain_sample(model, labels, refs, args.steps, 1.3)

    with FlopCounterMode(display=False) as counter:
        fast()
    return fast, plain, counter.get_total_flops(), args.sample_batch_size


def compare(kind, refs, args, device, dtype, top):
    """Measure training or sampling of chains of `refs` images, and print a row."""
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SIZES[args.size], refs=refs)).to(device)
    prepare = training if kind == "train" else sampling
    fast, plain, operations, images = prepare(model, args, device, dtype)
    our_attention = ours.attention
    pairs = []
    for _ in range(1 + args.rounds):
        reset_peak(device)
        seconds = clock(fast, device)
        peak = peak_memory(device)
        ours.attention = plain_attention
        pairs.append((seconds, clock(plain, device)))
        ours.attention = our_attention
    pairs = pairs[1:]  # the first round warms up
    ratios = [b / a for a, b in pairs]
    seconds, plain_seconds = (statistics.median(times) for times in zip(*pairs))
    rate = operations / seconds
    columns = [
        f"{kind} {'1-step' if refs == 1 else 'MRAR'}",
        f"{images / seconds:.3g}",
        f"{images / plain_seconds:.3g}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f}",
        f"{rate / 1e12:.3f}",
        f"{rate / top:.0%}",
        f"{peak:.1f}" if peak else "-",
    ]
    print(ROW.format(*columns), flush=True)


# -------------------------------------------------------------------------------- memory
def kept(config, batch, batch_mul):
    """Bytes that a loss of `batch` chains in bf16 keeps for its backward pass, without those of the
    parameters."""
    model = TransDiff(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # alive: no other storage gets its address
        return x

    latents = torch.randn(batch, config.refs, *config.latent_shape)
    labels = torch.zeros(batch, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = model(latents, labels, batch_mul=batch_mul)
    total = sum(s.nbytes() for s in storages.values())
    del loss
    return total


def kept_by_a_chain(config, batch_mul):
    """Bytes kept for one more chain, from models of one and of two blocks of each kind: all blocks
    keep the same."""

    def measure(ar_depth, dit_depth):
        short = dataclasses.replace(config, ar_depth=ar_depth, dit_depth=dit_depth)
        return kept(short, 2, batch_mul) - kept(short, 1, batch_mul)

    one = measure(1, 1)
    ar = (config.ar_depth - 1) * (measure(2, 1) - one)
    dit = (config.dit_depth - 1) * (measure(1, 2) - one)
    return one + ar + dit


def count_memory(sizes):
    """Print the operations of training and the memory it needs.

    30 bytes per parameter: 20 of float32 weights, gradients, two moments of AdamW and EMA weights,
    10 at the end of a compiled backward pass under DDP (gradients before they are in its buckets,
    weights in bf16, buffers). And the activations of an eager step with fused attention, as on a
    GPU, counted and by the formula of train.py; torch.compile keeps less.
    """

    def without_dropout(q, k, v, heads, mask=None, dropout=0.0):
        return plain_attention(q, k, v, heads, mask)  # fused attention keeps no dropout mask

    ours.attention = without_dropout
    row = "{:12}{:>16}{:>16}{:>12}{:>12}{:>26}"
    heads = ("TFLOP per chain", "weights etc.", "a chain", "by formula")
    print(row.format("", *heads, "chains at once in 80 GB"))
    for size in sizes:
        for refs, batch_mul in BATCH_MUL.items():
            config = dataclasses.replace(SIZES[size], refs=refs)
            with torch.device("meta"):
                states = 30 * sum(p.numel() for p in TransDiff(config).parameters())
            chain = kept_by_a_chain(config, batch_mul)
            columns = [
                f"{size} {'1-step' if refs == 1 else 'MRAR'}",
                f"{count_flops(config, batch_mul) / 1e12:.2f}",
                f"{states / 1e9:.1f} GB",
                f"{chain / 1e9:.2f} GB",
                f"{memory_per_chain(config, batch_mul) / 1e9:.2f} GB",
                int((72e9 - states) // chain),
            ]
            print(row.format(*columns), flush=True)


# -------------------------------------------------------------------------------- the loader
def write_random_cache(folder, n, shape):
    """Make a latent cache of n images of random moments."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((PART, *shape), dtype=np.float32).astype(np.float16)
    for i, path in enumerate(part_paths(folder, -(-n // PART))):
        np.save(path, moments[: n - i * PART])
    np.save(folder / "labels.npy", np.arange(n) % 1000)
    write_json(folder / "names.json", [f"{k % 1000}/{k}" for k in range(n)])
    info = dict(classes=[str(k) for k in range(1000)], vae_digest="", images="")
    record = dict(shape=[n, *shape], scale=1.0, info=info)
    write_json(folder / "cache.json", record)


def forget(folder):
    """Drop the files of a folder from the system's memory (Linux)."""
    for path in Path(folder).iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading_rate(chains, workers, steps):
    """Latents per second of train.py's loader."""
    batches = iter(DataLoader(chains, None, sampler=steps, num_workers=workers))
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return (len(steps) - 4) * chains.batch_size / (time.perf_counter() - start)


def count_loading():
    """Print the rates of caches of random numbers: read from the disk, from memory with no worker
    and with two."""
    row = "{:26}{:>12}{:>12}{:>12}{:>12}{:>14}"
    print(row.format("", "start-up s", "cold", "warm", "2 workers", "MB of memory"))
    xs = (2, 16, 8, 8)
    kl16 = (2, 32, 16, 16)
    for name, n, shape in (
        ("XS, 20,000", 20_000, xs),
        ("XS, 200,000", 200_000, xs),
        ("KL-16, 20,000", 20_000, kl16),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write_random_cache(Path(folder), n, shape)
            start = time.perf_counter()
            chains = Chains(LatentCache(folder), np.arange(n), refs=1, batch_size=256, seed=0)
            chains[0]
            startup = time.perf_counter() - start
            forget(folder)
            cold = loading_rate(chains, 0, range(14))
            rates = [cold, *(loading_rate(chains, workers, range(204)) for workers in (0, 2))]
            rates = [f"{rate:,.0f}" for rate in rates]
            megabytes = 1000 * (process_memory("RssAnon") or 0)  # the system may take pages back
            print(row.format(name, f"{startup:.2f}", *rates, f"{megabytes:,.0f}"), flush=True)


# -------------------------------------------------------------------------------- attention
def formula(q, k, v, mask, p):
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), p) @ v


def attention_shapes(config, batch, batch_mul, device):
    """{name: (B, queries, keys, mask)} of the attentions of a training step."""
    ar, cross = ours.attention_masks(config, device)
    N = config.latent_size**2
    M = config.refs * batch_mul
    S = config.class_tokens + config.cond_tokens
    cross = cross.repeat_interleave(batch_mul * N, dim=0)
    if config.refs == 1:
        ar = cross = None
    return dict(
        AR=(batch, S, S, ar),
        DiT=(batch * M, N, N, None),
        cross=(batch, M * N, config.cond_tokens, cross),
    )


def check_attention(size, device, dtype):
    """Print the kernel that torch picks for each attention of a training step, and what it does.

    ms, formula   forward and backward, with the size's dropout, of the kernel and of the formula
    dropped       part of the weights that dropout of 0.1 drops
    finite        whether all gradients of large scores are finite
    """
    fused = F.scaled_dot_product_attention
    row = "{:14}{:>22}{:>10}{:>10}{:>10}{:>8}"
    print(f"{size}, {device.type}, {dtype}, torch {torch.__version__}")
    print(row.format("", "kernel", "ms", "formula", "dropped", "finite"))
    for refs, batch in ((1, 8), (4, 2)):
        config = dataclasses.replace(SIZES[size], refs=refs)
        shapes = attention_shapes(config, batch, BATCH_MUL[refs], device)
        for name, (B, Q, K, mask) in shapes.items():
            depth = config.width // config.heads
            inputs = [
                torch.randn(B, config.heads, n, depth, device=device, dtype=DTYPES[dtype])
                for n in (Q, K, K)
            ]
            q, k, v = (x.requires_grad_() for x in inputs)
            kernel = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, config.dropout)).name
            columns = []
            for f in (fused, formula):

                def step():
                    f(q, k, v, mask, config.dropout).sum().backward()

                columns.append(f"{1e3 * min(clock(step, device) for _ in range(4)):.2f}")
            kept_weights = fused(q, k, torch.ones_like(v), mask, 0.1).double().mean().item()
            grads = torch.autograd.grad(fused(30 * q, k, v, mask, 0.1).sum(), (q, k, v))
            finite = all(g.isfinite().all() for g in grads)
            columns += [f"{1 - 0.9 * kept_weights:.4f}", "yes" if finite else "NO"]
            print(row.format(f"{name} refs {refs}", kernel, *columns), flush=True)


# -------------------------------------------------------------------------------- command
def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    only = ["train", "sample", "memory", "loader", "attention"]
    add("--size", choices=SIZES, help="(default: B; for memory B, L and H)")
    add("--batch-size", type=count, default=2, help="chains of a training step (default: 2)")
    add("--sample-batch-size", type=count, default=1, help="chains drawn at once (default: 1)")
    add("--steps", type=count, default=10, help="of the sampler (default: 10; the paper's is 100)")
    add("--rounds", type=count, default=3, help="pairs (default: 3)")
    add("--only", choices=only, help="(default: train and sample)")
    add("--dtype", choices=["bf16", "fp32"], help="(default: bf16 where the hardware has it)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile of ours (default: on CUDA)",
    )
    args = parser.parse_args()
    if args.only == "loader":
        return count_loading()
    if args.only == "memory":
        return count_memory([args.size] if args.size else ["B", "L", "H"])
    args.size = args.size or "B"
    device = pick_device(args.device)
    dtype = args.dtype or pick_dtype(device, SIZES[args.size].width)
    if args.only == "attention":
        return check_attention(args.size, device, dtype)
    if args.compile is None:
        args.compile = device.type == "cuda"
    top = ceiling(device, dtype)
    threads = torch.get_num_threads()
    print(f"{args.size}, {device.type}, {dtype}, {threads} threads, torch {torch.__version__}")
    print(f"ceiling {top / 1e12:.3f} TFLOP/s; chains: {args.batch_size} in training")
    print(f"and {args.sample_batch_size} in sampling, {args.steps} steps, guided")
    heads = ("images/s", "plain", "ratio", "range", "TFLOP/s", "of ceiling", "GB")
    print(ROW.format("", *heads))
    for kind in ("train", "sample"):
        for refs in BATCH_MUL:
            if args.only in (None, kind):
                compare(kind, refs, args, device, dtype, top)


if __name__ == "__main__":
    run_main(main)
