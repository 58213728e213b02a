"""Images a second in training and sampling, beside a plain eager version of the same mathematics and the machine's own ceiling.

    python tests/bench.py                                                           size B on a CPU, in minutes
    python tests/bench.py --size L --batch-size 64 --sample-batch-size 64 --steps 100   on a GPU
    python tests/bench.py --only memory                                             what training needs, by count
    python tests/bench.py --only loader                                             latents a second read from synthetic caches

Ours and the plain version take turns in one process, on the same weights and inputs; a ratio is of two neighbours, and its median and
range are over the rounds. The plain version does what the released code does: c copied for each draw, its keys and values computed anew for each
draw and step, weights cast at each step, the modulation for each sample, a chain's images one after the other in training, torch's own attention everywhere, a for-loop
optimiser and average, nothing compiled.

TFLOP/s: multiplications and additions of the matrix products and attentions of *our* version, forward and backward, counted by
torch.utils.flop_counter, by our time: work that is saved counts for nothing. Ceiling: the best product of two square matrices of the same dtype in
this run. Memory: the peak of this process's (CPU, Linux) or of torch's (CUDA) during our version; weights, average and both versions' optimisers included.
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as ours  # noqa: E402
from model import SIZES, TransDiff, euler_maruyama  # noqa: E402
from train import Chains, make_optimizer, update_average  # noqa: E402
from vae import LatentCache, autocast, cast_weights, compiled, pick_device, pick_dtype, positive, run  # noqa: E402


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
    """Peak memory in GB since the last reset, or None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 1e9
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- the plain version


def plain_attention(q, k, v, mask, dropout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def plain_velocity(model, x, t, c):
    return model.decoder(x, t, model.decoder.keys_values(c))


def plain_loss(model, latents, labels, repeats):
    c, losses = model.encode(labels, latents[:, :-1]), []
    tokens = model.config.tokens_per_image
    for k in range(latents.shape[1]):
        x = latents[:, k].repeat(repeats, 1, 1, 1)
        t, eps = torch.randn(len(x), device=x.device).sigmoid(), torch.randn_like(x)
        x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * eps
        v = plain_velocity(model, x_t, t, c[:, : (k + 1) * tokens].repeat(repeats, 1, 1))
        losses.append((v.float() - (eps - x)).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def plain_sample(model, labels, refs, steps, cfg):
    null, chain = torch.full_like(labels, model.config.num_classes), None
    noise = torch.randn(len(labels), model.config.latent_channels, model.config.latent_size, model.config.latent_size, device=labels.device)
    for k in range(refs):
        c = torch.cat([model.encode(labels, chain), model.encode(null, chain)])

        def velocity(x, t):
            v, v_null = plain_velocity(model, torch.cat([x, x]), t.expand(2 * len(x)).to(x.device), c).float().chunk(2)
            return v_null + cfg * (v - v_null)

        x = euler_maruyama(velocity, noise, steps)[:, None]
        chain = x if chain is None else torch.cat([chain, x], dim=1)
    return chain


# ---------------------------------------------------------------------------------------------- what is measured


def training(model, batch, repeats, device, dtype, compile):
    """(ours, plain, operations of ours, images): one optimiser step each."""
    config, n = model.config, batch
    latents = torch.randn(n, config.refs, config.latent_channels, config.latent_size, config.latent_size, device=device)
    labels = torch.arange(n, device=device) % config.num_classes
    averaged = TransDiff(config).to(device).eval().requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, SimpleNamespace(lr=1e-6, weight_decay=0.02))
    slow = torch.optim.AdamW(model.parameters(), 1e-6, betas=(0.9, 0.95), foreach=False, fused=False)
    with autocast(device, dtype):
        forward = compiled(model, lambda m: m(latents, labels, repeats=repeats).backward()) if compile else model
    model.zero_grad(set_to_none=True)

    def step(loss, optimizer, average):
        with autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average()

    def plain_average():
        with torch.no_grad():
            for p, q in zip(averaged.parameters(), model.parameters()):
                p.mul_(0.9999).add_(q, alpha=1 - 0.9999)

    fast = lambda: step(lambda: forward(latents, labels, repeats=repeats), optimizer, lambda: update_average(averaged, model, 0.9999))  # noqa: E731
    plain = lambda: step(lambda: plain_loss(model, latents, labels, repeats), slow, plain_average)  # noqa: E731
    with FlopCounterMode(display=False) as counter, autocast(device, dtype):
        model(latents, labels, repeats=repeats).backward()
    model.zero_grad(set_to_none=True)
    return fast, plain, counter.get_total_flops(), n * config.refs


def sampling(model, batch, refs, steps, device, dtype, compile):
    """(ours, plain, operations of ours, images): a batch of chains each, guided."""
    model.eval().requires_grad_(False)
    labels, cast = torch.arange(batch, device=device) % model.config.num_classes, cast_weights(copy.deepcopy(model), dtype)

    def fast():
        with torch.inference_mode(), autocast(device, dtype):
            cast.sample(labels, refs, steps, cfg=1.3)

    def plain():
        with torch.inference_mode(), autocast(device, dtype):
            plain_sample(model, labels, refs, steps, 1.3)

    with FlopCounterMode(display=False) as counter:
        fast()
    if compile:

        def trial(decoder):
            cast.decoder = decoder
            fast()

        compiled(cast.decoder, trial, mode="reduce-overhead" if batch <= 8 else "default")  # as sample.py does
    return fast, plain, counter.get_total_flops(), batch


def kept(config, batch, repeats, checkpointing):
    """Bytes that a loss of `batch` chains in bf16 keeps for its backward pass, each storage counted once; parameters are not."""
    model, storages = TransDiff(config), {}
    model.ar.grad_checkpointing = model.decoder.grad_checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return x

    latents = torch.randn(batch, config.refs, config.latent_channels, config.latent_size, config.latent_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = model(latents, torch.zeros(batch, dtype=torch.int64), repeats=repeats)
    total = sum(s.nbytes() for s in storages.values())
    del loss
    return total


def a_chain(config, repeats, checkpointing):
    """Bytes kept for one more chain: measured on one and two blocks of each kind, of which a model has many, all alike."""

    def measured(ar_depth, dit_depth):
        short = dataclasses.replace(config, ar_depth=ar_depth, dit_depth=dit_depth)
        return kept(short, 2, repeats, checkpointing) - kept(short, 1, repeats, checkpointing)

    one = measured(1, 1)
    return one + (config.ar_depth - 1) * (measured(2, 1) - one) + (config.dit_depth - 1) * (measured(1, 2) - one)


def counting(sizes):
    """Operations of training, and memory: 20 bytes a parameter (float32 weights, gradients, two moments of AdamW, average), 2 for the copies of the weights in bf16, and activations.

    Activations are of an eager step, with fused attention as on a GPU; torch.compile keeps less.
    """
    ours.attention = lambda q, k, v, mask, dropout: plain_attention(q, k, v, mask, 0.0)  # fused attention keeps no dropout masks
    print(f"{'':12}{'TFLOP a chain':>14}{'weights etc.':>14}{'a chain':>12}{'checkpointed':>14}{'chains at once in 80 GB':>26}")
    for size in sizes:
        for name, refs, repeats in (("1-step", 1, 4), ("MRAR", 4, 2)):
            config = dataclasses.replace(SIZES[size], refs=refs)
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = TransDiff(config)
                model(torch.empty(1, refs, 16, 16, 16), torch.empty(1, dtype=torch.int64), repeats=repeats).backward()
            states = 22 * sum(p.numel() for p in model.parameters())
            chain = [a_chain(config, repeats, c) for c in (False, True)]
            fit = [int((72e9 - states) // c) for c in chain]
            print(f"{size + ' ' + name:12}{counter.get_total_flops() / 1e12:14.2f}{states / 1e9:11.1f} GB{chain[0] / 1e9:9.2f} GB{chain[1] / 1e9:11.2f} GB{fit[0]:12} or {fit[1]}", flush=True)


def loading():
    """Latents a second through train.py's loader, of caches of random bytes: start-up, workers in this process and beside it."""
    print(f"{'':26}{'start-up s':>12}{'latents/s':>12}{'2 workers':>12}{'MB of memory':>14}")
    for name, n, shape in (("XS, 20,000", 20_000, (2, 16, 8, 8)), ("XS, 200,000", 200_000, (2, 16, 8, 8)), ("KL-16, 20,000", 20_000, (2, 32, 16, 16))):
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/moments.npy", "wb") as f:
                np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=(n, *shape)))
                for _ in range(0, n, 1000):
                    f.write(np.random.default_rng(0).standard_normal((1000, *shape), dtype=np.float32).astype(np.float16).tobytes())
            np.save(f"{folder}/labels.npy", np.arange(n) % 1000)
            Path(folder, "meta.json").write_text(json.dumps(dict(classes=list(map(str, range(1000))), scale=1.0, image_size=256, vae="", vae_digest="")))
            start = time.perf_counter()
            cache = LatentCache(folder)
            chains = Chains(cache, 1, 256, seed=0)
            chains.batch(0)
            startup, rates = time.perf_counter() - start, []
            for workers in (0, 2):
                loader = iter(torch.utils.data.DataLoader(chains, batch_size=None, num_workers=workers))
                for _ in range(4):
                    next(loader)
                start = time.perf_counter()
                for _ in range(200):
                    next(loader)
                rates.append(200 * 256 / (time.perf_counter() - start))
            status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
            private = int((re.search(r"RssAnon:\s+(\d+)", status) or [0, 0])[1]) / 1000  # what the file's pages take, the machine may take back
            print(f"{name:26}{startup:12.2f}{rates[0]:12,.0f}{rates[1]:12,.0f}{private:14,.0f}", flush=True)
            del loader, chains, cache


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, help="(default: B; for memory B, L and H)")
    add("--batch-size", type=positive, default=2, help="chains of a training step (default: 2)")
    add("--sample-batch-size", type=positive, default=1, help="chains drawn at once (default: 1)")
    add("--steps", type=positive, default=10, help="evaluations an image in sampling (default: 10; the paper's is 100)")
    add("--rounds", type=positive, default=3, help="pairs (default: 3)")
    add("--only", choices=["train", "sample", "memory", "loader"], help="(default: train and sample)")
    add("--device", help="cpu, cuda ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="(default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of ours (default: on CUDA)")
    args = parser.parse_args()
    if args.only == "loader":
        return loading()
    if args.only == "memory":
        return counting([args.size] if args.size else ["B", "L", "H"])
    args.size = args.size or "B"
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    compile = device.type == "cuda" if args.compile is None else args.compile
    top = ceiling(device, dtype)
    print(f"{args.size}, {device.type}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; ceiling {top / 1e12:.3f} TFLOP/s; training {args.batch_size}, sampling {args.sample_batch_size} chains, {args.steps} steps, guided")
    print(f"{'':14}{'images/s':>10}{'plain':>10}{'ratio':>8}{'range':>14}{'TFLOP/s':>9}{'of ceiling':>12}{'GB':>7}")
    fused_attention, kinds = ours.attention, [(k, r) for k in ("train", "sample") for r in (1, 4) if args.only in (None, k)]
    for kind, refs in kinds:
        torch.manual_seed(0)
        model = TransDiff(dataclasses.replace(SIZES[args.size], refs=refs)).to(device)
        if kind == "train":
            fast, plain, operations, images = training(model, args.batch_size, 4 if refs == 1 else 2, device, dtype, compile)
        else:
            fast, plain, operations, images = sampling(model, args.sample_batch_size, refs, args.steps, device, dtype, compile)
        times, plain_times, peak = [], [], None
        for i in range(1 + args.rounds):  # the first round warms up
            ours.attention = fused_attention
            memory(device, reset=True)
            times.append(clock(fast, device))
            peak = memory(device)
            ours.attention = plain_attention
            plain_times.append(clock(plain, device))
        ours.attention = fused_attention
        times, plain_times = times[1:], plain_times[1:]
        ratios, seconds = [b / a for a, b in zip(times, plain_times)], statistics.median(times)
        share = operations / seconds / top
        name = f"{kind} {'1-step' if refs == 1 else 'MRAR'}"
        print(
            f"{name:14}{images / seconds:10.3g}{images / statistics.median(plain_times):10.3g}{statistics.median(ratios):8.2f}{min(ratios):7.2f}-{max(ratios):.2f}"
            f"{operations / seconds / 1e12:12.3f}{share:12.0%}" + (f"{peak:7.1f}" if peak else f"{'-':>7}"),
            flush=True,
        )


if __name__ == "__main__":
    run(main)
