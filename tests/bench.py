"""Images a second in training and sampling, beside a plain eager version of the same mathematics.

    python tests/bench.py                                                           size B on a CPU, in minutes
    python tests/bench.py --size L --batch-size 64 --sample-batch-size 64 --steps 100   on a GPU
    python tests/bench.py --only memory                                             memory that training needs, by count
    python tests/bench.py --only attention                                          attention kernels of training
    python tests/bench.py --only loader                                             latents a second of synthetic caches

Our version and the plain one take turns in one process, on the same weights and inputs. A ratio is of two neighbouring
runs; its median and range are over the rounds.

The plain version does what the released code does. It copies c for each draw, computes the keys and values of c anew
for each draw and step, casts the weights at each step, computes the modulation for each sample, and in training decodes
the images of a chain one after the other. It uses torch's own attention everywhere, a for-loop optimiser and a for-loop
EMA, and compiles nothing.

TFLOP/s   multiplications and additions of the matrix products and attentions of our version, forward and backward, as
          torch.utils.flop_counter counts them, by our time: work that is saved counts for nothing
ceiling   the fastest product of two square matrices of the same dtype in this run
GB        peak memory during our version, of this process (CPU, Linux) or of torch (CUDA), with weights, EMA weights and
          both optimisers
"""

import argparse
import copy
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as ours  # noqa: E402
from model import SIZES, TransDiff, euler_maruyama  # noqa: E402
from train import Chains, make_optimizer, update_ema  # noqa: E402
from vae import LatentCache, autocast, bounded, cast_weights, pick_device, pick_dtype, run_main  # noqa: E402


def ceiling(device, dtype):
    """Floating-point operations a second of the best square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(8))


def clock(f, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(device, reset=False):
    """Peak memory in GB since the last reset; None where it cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 1e9
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- the plain version


def plain_attention(q, k, v, heads, mask=None, dropout=0.0):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


def plain_loss(model, latents, labels, batch_mul):
    c, losses = model.encode(labels, latents[:, :-1]), []
    tokens = model.config.tokens_per_image
    for k in range(latents.shape[1]):
        x = latents[:, k].repeat(batch_mul, 1, 1, 1)
        t, eps = torch.randn(len(x), device=x.device).sigmoid(), torch.randn_like(x)
        x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * eps
        v = model.velocity(x_t, t, c[:, : (k + 1) * tokens].repeat(batch_mul, 1, 1))
        losses.append((v.float() - (eps - x)).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def plain_sample(model, labels, refs, steps, cfg):
    null, chain = torch.full_like(labels, model.config.num_classes), None
    noise = torch.randn(len(labels), *model.config.latent_shape, device=labels.device)
    for k in range(refs):
        c = torch.cat([model.encode(labels, chain), model.encode(null, chain)])

        def velocity(x, t):
            t = torch.full((2 * len(x),), t, device=x.device)
            v, v_null = model.velocity(torch.cat([x, x]), t, c).float().chunk(2)
            return v_null + cfg * (v - v_null)

        x = euler_maruyama(velocity, noise, steps)[:, None]
        chain = x if chain is None else torch.cat([chain, x], dim=1)
    return chain


@torch.no_grad()
def plain_update_ema(ema, model, decay):
    for p, q in zip(ema.parameters(), model.parameters()):
        p.mul_(decay).add_(q, alpha=1 - decay)


# ---------------------------------------------------------------------------------------------- what is measured


def training(model, batch, batch_mul, device, dtype, compile):
    """(ours, plain, operations of ours, images): one optimiser step each."""
    config = model.config
    latents = torch.randn(batch, config.refs, *config.latent_shape, device=device)
    labels = torch.arange(batch, device=device) % config.num_classes
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    fused_optimizer = make_optimizer(model, SimpleNamespace(lr=1e-6, weight_decay=0.02))
    loop_optimizer = torch.optim.AdamW(model.parameters(), 1e-6, betas=(0.9, 0.95), foreach=False, fused=False)
    forward = torch.compile(model) if compile else model

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
        step(lambda: plain_loss(model, latents, labels, batch_mul), loop_optimizer, plain_update_ema)

    with FlopCounterMode(display=False) as counter, autocast(device, dtype):
        model(latents, labels, batch_mul=batch_mul).backward()
    model.zero_grad(set_to_none=True)
    return fast, plain, counter.get_total_flops(), batch * config.refs


def sampling(model, batch, refs, steps, device, dtype, compile):
    """(ours, plain, operations of ours, images): a batch of chains each, guided."""
    model.eval().requires_grad_(False)
    labels = torch.arange(batch, device=device) % model.config.num_classes
    cast = cast_weights(copy.deepcopy(model), dtype)

    def fast():
        with torch.inference_mode(), autocast(device, dtype):
            cast.sample(labels, refs, steps=steps, cfg=1.3, cfg_below=1.0, sampler="euler-maruyama", null_refs=True)

    def plain():
        with torch.inference_mode(), autocast(device, dtype):
            plain_sample(model, labels, refs, steps, 1.3)

    with FlopCounterMode(display=False) as counter:
        fast()
    if compile:  # as sample.py does
        cast.decoder = torch.compile(cast.decoder, mode="reduce-overhead" if batch <= 8 else "default")
    return fast, plain, counter.get_total_flops(), batch


def kept(config, batch, batch_mul):
    """Bytes that a loss of `batch` chains in bf16 keeps for its backward pass, without those of the parameters."""
    model, storages = TransDiff(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept alive, so that no other storage gets its address
        return x

    latents = torch.randn(batch, config.refs, *config.latent_shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = model(latents, torch.zeros(batch, dtype=torch.int64), batch_mul=batch_mul)
    total = sum(s.nbytes() for s in storages.values())
    del loss
    return total


def kept_by_a_chain(config, batch_mul):
    """Bytes kept for one more chain, from models of one and of two blocks of each kind: all blocks keep the same."""

    def measure(ar_depth, dit_depth):
        short = dataclasses.replace(config, ar_depth=ar_depth, dit_depth=dit_depth)
        return kept(short, 2, batch_mul) - kept(short, 1, batch_mul)

    one = measure(1, 1)
    return one + (config.ar_depth - 1) * (measure(2, 1) - one) + (config.dit_depth - 1) * (measure(1, 2) - one)


def count_memory(sizes):
    """Print the operations of training and the memory it needs.

    20 bytes a parameter (float32 weights, gradients, two moments of AdamW, EMA weights), 10 at the end of a compiled
    backward pass under DDP (gradients before they are in its buckets, weights in bf16, buffers), and the activations
    of an eager step with fused attention, as on a GPU; torch.compile keeps less.
    """
    # without dropout: fused attention keeps no dropout mask
    ours.attention = lambda q, k, v, heads, mask=None, dropout=0.0: plain_attention(q, k, v, heads, mask)
    heads = ("TFLOP a chain", "weights etc.", "a chain", "chains at once in 80 GB")
    print("{:12}{:>16}{:>14}{:>12}{:>26}".format("", *heads))
    for size in sizes:
        for name, refs, batch_mul in (("1-step", 1, 4), ("MRAR", 4, 2)):
            config = dataclasses.replace(SIZES[size], refs=refs)
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = TransDiff(config)
                latents = torch.empty(1, refs, *config.latent_shape)
                model(latents, torch.empty(1, dtype=torch.int64), batch_mul=batch_mul).backward()
            states = 30 * sum(p.numel() for p in model.parameters())
            chain = kept_by_a_chain(config, batch_mul)
            print(
                f"{size + ' ' + name:12}{counter.get_total_flops() / 1e12:14.2f}{states / 1e9:11.1f} GB"
                f"{chain / 1e9:9.2f} GB{int((72e9 - states) // chain):26}",
                flush=True,
            )


def write_random_cache(folder, n, shape):
    """Make a latent cache of n images of random moments."""
    rng = np.random.default_rng(0)
    with open(f"{folder}/moments.bin", "wb") as f:
        for _ in range(0, n, 1000):
            f.write(rng.standard_normal((1000, *shape), dtype=np.float32).astype(np.float16).tobytes())
    np.save(f"{folder}/labels.npy", np.arange(n) % 1000)
    classes = [str(i) for i in range(1000)]
    record = dict(shape=[n, *shape], classes=classes, scale=1.0, image_size=256, vae="", vae_digest="")
    Path(folder, "cache.json").write_text(json.dumps(record))


def count_loading():
    """Print the latents a second of train.py's loader, with no worker and with two, of caches of random numbers."""
    print(f"{'':26}{'start-up s':>12}{'latents/s':>12}{'2 workers':>12}{'MB of memory':>14}")
    xs, kl16 = (2, 16, 8, 8), (2, 32, 16, 16)
    for name, n, shape in (("XS, 20,000", 20_000, xs), ("XS, 200,000", 200_000, xs), ("KL-16, 20,000", 20_000, kl16)):
        with tempfile.TemporaryDirectory() as folder:
            write_random_cache(folder, n, shape)
            start = time.perf_counter()
            cache = LatentCache(folder)
            chains = Chains(cache, 1, 256, seed=0)
            chains[0]
            startup, rates = time.perf_counter() - start, []
            for workers in (0, 2):
                batches = torch.utils.data.DataLoader(chains, None, sampler=range(204), num_workers=workers)
                batches = iter(batches)
                for _ in range(4):
                    next(batches)
                start = time.perf_counter()
                for _ in range(200):
                    next(batches)
                rates.append(200 * 256 / (time.perf_counter() - start))
            status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
            # without the pages of the file, which the system may take back
            megabytes = int((re.search(r"RssAnon:\s+(\d+)", status) or [0, 0])[1]) / 1000
            print(f"{name:26}{startup:12.2f}{rates[0]:12,.0f}{rates[1]:12,.0f}{megabytes:14,.0f}", flush=True)
            del batches, chains, cache


def check_attention(size, device, dtype):
    """Print the kernel that torch picks for each attention of a training step, and what it does.

    ms, formula   forward and backward, with the size's dropout, of the kernel and of the plain formula
    dropped       share of the weights that dropout of 0.1 drops
    finite        whether all gradients of large scores are finite
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # as train.py does
    fused = F.scaled_dot_product_attention

    def formula(q, k, v, mask, p):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return F.dropout((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1), p) @ v

    print(f"{size}, {device.type}, {dtype}, torch {torch.__version__}")
    print(f"{'':14}{'kernel':>22}{'ms':>10}{'formula':>10}{'dropped':>10}{'finite':>8}")
    for refs, batch_mul, batch in ((1, 4, 8), (4, 2, 2)):
        config = dataclasses.replace(SIZES[size], refs=refs)
        N, M, S = config.latent_size**2, refs * batch_mul, config.class_tokens + config.cond_tokens
        ar, cross = (mask if refs > 1 else None for mask in ours.attention_masks(config, device))
        cross = cross if cross is None else cross.repeat_interleave(batch_mul * N, dim=0)
        shapes = dict(AR=(batch, S, S, ar), DiT=(batch * M, N, N, None))
        shapes |= dict(cross=(batch, M * N, config.cond_tokens, cross))
        for name, (B, Q, K, mask) in shapes.items():
            new = lambda n: torch.randn(B, config.heads, n, config.width // config.heads, device=device, dtype=dtype)
            q, k, v = (new(n).requires_grad_() for n in (Q, K, K))
            kernel = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, config.dropout)).name
            step = lambda f: f(q, k, v, mask, config.dropout).sum().backward()
            times = [min(clock(lambda: step(f), device) for _ in range(4)) for f in (fused, formula)]
            dropped = 1 - 0.9 * fused(q, k, torch.ones_like(v), mask, 0.1).double().mean().item()
            grads = torch.autograd.grad(fused(30 * q, k, v, mask, 0.1).sum(), (q, k, v))
            finite = all(g.isfinite().all() for g in grads)
            row = f"{name + ' refs ' + str(refs):14}{kernel:>22}{times[0] * 1e3:10.2f}{times[1] * 1e3:10.2f}"
            print(f"{row}{dropped:10.4f}{'yes' if finite else 'NO':>8}", flush=True)


def compare(kind, refs, args, device, dtype, top):
    """Measure training or sampling of chains of `refs` images, and print a row."""
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SIZES[args.size], refs=refs)).to(device)
    if kind == "train":
        parts = training(model, args.batch_size, 4 if refs == 1 else 2, device, dtype, args.compile)
    else:
        parts = sampling(model, args.sample_batch_size, refs, args.steps, device, dtype, args.compile)
    fast, plain, operations, images = parts
    our_attention, times, plain_times, peak = ours.attention, [], [], None
    for _ in range(1 + args.rounds):  # the first round warms up
        memory(device, reset=True)
        times.append(clock(fast, device))
        peak = memory(device)
        ours.attention = plain_attention
        plain_times.append(clock(plain, device))
        ours.attention = our_attention
    times, plain_times = times[1:], plain_times[1:]
    ratios, seconds = [b / a for a, b in zip(times, plain_times)], statistics.median(times)
    name = f"{kind} {'1-step' if refs == 1 else 'MRAR'}"
    print(
        f"{name:14}{images / seconds:10.3g}{images / statistics.median(plain_times):10.3g}"
        f"{statistics.median(ratios):8.2f}{min(ratios):7.2f}-{max(ratios):.2f}"
        f"{operations / seconds / 1e12:12.3f}{operations / seconds / top:12.0%}"
        + (f"{peak:7.1f}" if peak else f"{'-':>7}"),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, bounded(int, 1)
    add("--size", choices=SIZES, help="(default: B; for memory B, L and H)")
    add("--batch-size", type=count, default=2, help="chains of a training step (default: 2)")
    add("--sample-batch-size", type=count, default=1, help="chains drawn at once (default: 1)")
    add("--steps", type=count, default=10, help="evaluations an image in sampling (default: 10; the paper's is 100)")
    add("--rounds", type=count, default=3, help="pairs (default: 3)")
    add("--only", choices=["train", "sample", "memory", "loader", "attention"], help="(default: train and sample)")
    add("--device", help="cpu, cuda ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="(default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of ours (default: on CUDA)")
    args = parser.parse_args()
    if args.only == "loader":
        return count_loading()
    if args.only == "memory":
        return count_memory([args.size] if args.size else ["B", "L", "H"])
    args.size = args.size or "B"
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.only == "attention":
        return check_attention(args.size, device, dtype)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    top = ceiling(device, dtype)
    machine = f"{device.type}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{args.size}, {machine}; ceiling {top / 1e12:.3f} TFLOP/s")
    print(f"training {args.batch_size}, sampling {args.sample_batch_size} chains, {args.steps} steps, guided")
    heads = ("images/s", "plain", "ratio", "range", "TFLOP/s", "of ceiling", "GB")
    print("{:14}{:>10}{:>10}{:>8}{:>14}{:>9}{:>12}{:>7}".format("", *heads))
    for kind in ("train", "sample"):
        for refs in (1, 4):
            if args.only in (None, kind):
                compare(kind, refs, args, device, dtype, top)


if __name__ == "__main__":
    run_main(main)
