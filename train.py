"""Stage 1: train TransDiff, 1-step AR, on a latent cache (Section 3.2.1; recipe of Appendix B).

    python train.py                                               the XS demo on the bundled images, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --size B --data LATENTS --accumulate 8    the paper's recipe on ImageNet latents

A run writes OUT/last.pt (everything needed to go on: --resume), OUT/ema.pt (averaged weights in float16: what sample.py takes),
OUT/log.csv and pictures of samples. finetune_mrar.py is stage 2 and runs this same loop on chains of images.
"""
import argparse
import csv
import dataclasses
import datetime
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import SIZES, TransDiff, load_file, load_state, sampling_settings, t_of, warm_start
from vae import DEMO_DATA, DEMO_VAE, LatentCache, autocast, check_out, compiled, digest, encode_source, load_vae, number, open_source
from vae import pick_device, pick_dtype, pixels, positive, posterior, run, save_grid, seed_of, whole, write_whole

# Defaults of the flags of the same names. A recipe's warmup of 1/8 of 800 epochs is the paper's 100 epochs, and so on.
COMMON = dict(weight_decay=0.02, clip=3.0, t="logit-normal", seed=0, accumulate=1, log_every=50, workers=0)
PAPER = dict(batch_size=2048, ema=0.9999, cooldown=0.0, sample_every=10_000, save_every=1_000)
DEMO = dict(warmup=1 / 16, cooldown=1 / 2, repeats=1, ema=0.998, sample_every=500, save_every=500)  # on the bundled images, by trial
RECIPES = {
    "1-step": dict(PAPER, epochs=800, lr=8e-4, warmup=1 / 8, repeats=4),
    "MRAR": dict(PAPER, epochs=40, lr=5e-5, warmup=1 / 4, repeats=2),
    "512 px": dict(PAPER, epochs=150, lr=1e-4, warmup=1 / 15, repeats=4, ema=0.999),
    "XS 1-step": dict(DEMO, steps=1600, lr=2e-3, batch_size=64),
    "XS MRAR": dict(DEMO, steps=500, lr=1e-3, batch_size=16),
}


def recipe_name(size, refs, only_decoder):
    if size == "XS":
        return "XS MRAR" if refs > 1 else "XS 1-step"
    return "512 px" if only_decoder else "MRAR" if refs > 1 else "1-step"


# ---------------------------------------------------------------------------------------------- data


class Chains(torch.utils.data.IterableDataset):
    """Batches of chains, `refs` images of one class each, from step `start` on: (moments float16 [b, refs, 2 C, h, w], labels [b]).

    An epoch is every image once, as a member of one chain; images and chains are drawn afresh every epoch, and what is left of a class when
    its chains are full sits that epoch out. Epochs follow each other without a seam: step s takes chains [s B, (s + 1) B) of that endless
    order, of which this rank takes its even share. Everything random is a function of (seed, epoch or step), so any step can be had again, by any
    number of processes.
    """

    def __init__(self, cache, refs, batch_size, seed, start=0, rank=0, world=1):
        self.cache, self.refs, self.batch_size, self.seed = cache, refs, batch_size, seed
        self.start, self.rank, self.world = start, rank, world
        counts = np.bincount(cache.labels, minlength=len(cache.classes))
        few = [name for name, n in zip(cache.classes, counts) if n < refs]
        if few and refs > 1:
            raise ValueError(f"{len(few)} classes have fewer than {refs} images, so no chain of --refs {refs}: {', '.join(few[:10])}{' ...' if len(few) > 10 else ''}")
        self.chains = int((counts // refs).sum())  # in an epoch
        self.epoch, self.order = -1, None

    def epoch_order(self, epoch):
        """Image indices [chains, refs] of one epoch."""
        if epoch == self.epoch:
            return self.order
        rng = np.random.default_rng((self.seed, epoch))
        images = rng.permutation(len(self.cache))
        if self.refs > 1:
            images = images[np.argsort(self.cache.labels[images], kind="stable")]  # by class, shuffled within
            labels = self.cache.labels[images]
            starts = np.searchsorted(labels, labels)  # where each image's class begins
            place, size = np.arange(len(images)) - starts, np.bincount(labels)[labels]
            images = images[place < size // self.refs * self.refs]
            images = rng.permutation(images.reshape(-1, self.refs))
        self.epoch, self.order = epoch, images.reshape(-1, self.refs)
        return self.order

    def indices(self, step):
        """Images [b, refs] of this rank's share of a step."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        epochs, places = np.divmod(np.arange(first, first + share), self.chains)
        return np.concatenate([self.epoch_order(e)[places[epochs == e]] for e in np.unique(epochs)])

    def batch(self, step):
        indices = self.indices(step)
        flips = np.random.default_rng((self.seed, step)).integers(0, 2, (self.batch_size, self.refs), dtype=np.uint8)
        flips = flips[self.rank * len(indices) : (self.rank + 1) * len(indices)]
        return torch.from_numpy(self.cache.moments[indices, flips]), torch.from_numpy(self.cache.labels[indices[:, 0]])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        step, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:  # a DataLoader takes from its workers in turn, so the steps come out in order
            yield self.batch(step)
            step += stride


def draw(config, repeats, t_distribution, seeds, device):
    """What is random about each chain, a function of its seed alone, so that it does not matter how a batch is split.

    Returns dropped bool [b], t [b, M], eps [b, M, C, h, w], M = refs repeats, and the posterior's noise [b, refs, C, h, w].
    """
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    M, size = config.refs * repeats, math.prod(shape)
    parts = [1, M, M * size, config.refs * size]
    normal, generator = torch.empty(len(seeds), sum(parts), device=device), torch.Generator(device)
    for row, seed in zip(normal, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    dropped, t, eps, noise = normal.split(parts, dim=1)
    dropped = torch.special.ndtr(dropped[:, 0]) < config.label_dropout
    return dropped, t_of(t, t_distribution), eps.unflatten(1, (M, *shape)), noise.unflatten(1, (config.refs, *shape))


def latent_cache(args, device, rank):
    """The cache at --data; where --data is a source of images, it is encoded first, once: the cache's name tells the images (of a folder, the names of its files) and the VAE."""
    path = Path(args.data)
    if path.suffix == ".npz" or path.is_dir() and not (path / "meta.json").exists() and not (path / "moments.npy").exists():
        vae = args.vae or (DEMO_VAE if args.size == "XS" else None)
        if not vae:
            raise ValueError(f"--vae: name the VAE to encode {path} with (or encode it first: python vae.py encode)")
        vae = load_vae(vae, device)
        source = open_source(path, args.image_size or vae.image_size)
        path = Path("runs") / f"latents-{path.stem}-{source.size}-{digest((source.digest + vae.digest).encode())}"
        if rank == 0 and not path.exists():
            encode_source(source, vae, path, device=device)
        if dist.is_initialized():
            dist.barrier()
    cache = LatentCache(path)
    if args.vae and path == Path(args.data) and digest(Path(args.vae).read_bytes()) != cache.vae_digest:
        raise ValueError(f"--vae {args.vae}: is not the VAE that made the latents in {path}, which was {cache.vae}; leave the flag out, or encode again")
    if args.image_size and args.image_size != cache.image_size:
        raise ValueError(f"--image-size {args.image_size}: the latents in {path} are of {cache.image_size} px images")
    return cache


# ---------------------------------------------------------------------------------------------- the loop


def learning_rate(step, args):
    """Linear warm-up over the first `warmup` share of the run, constant, and (not in the paper) to 0 over the last `cooldown` share."""
    left = (args.steps - step) / max(1, args.cooldown * args.steps)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup * args.steps), left)


def make_optimizer(model, args):
    """AdamW; weight decay on the AR Transformer's matrices alone: not on 1-D parameters, nor on the decoder, as in the release."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and not n.startswith("decoder.")]
    others = [p for n, p in named if p.ndim == 1 or n.startswith("decoder.")]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], args.lr, betas=(0.9, 0.95), fused=True)


def draw_samples(model, cache, args, device, dtype, path):
    """A picture: 4 images (the last of each chain) in a row for each of the first ten classes, from the averaged weights."""
    if not Path(cache.vae).exists():
        return f"no picture of samples: {cache.vae}, which made the latents, is not there"
    try:
        vae, n = load_vae(cache.vae, device), min(10, len(cache.classes))
    except ValueError as e:
        return f"no picture of samples: {e}"
    generator = torch.Generator(device).manual_seed(args.seed)
    randn = lambda x: torch.randn(x.shape, generator=generator, device=device)  # noqa: E731
    labels = torch.arange(n, device=device).repeat_interleave(4)
    with torch.inference_mode(), autocast(device, dtype):
        latents = model.sample(labels, noise_sampler=randn, **sampling_settings(model.config, args.name))[:, -1]
        try:
            save_grid(pixels(vae, latents), path, columns=4)
        except ValueError as e:
            return f"no picture of samples: {e}"
    return f"wrote {path}"


@torch.no_grad()
def update_average(averaged, model, decay):
    """averaged <- decay averaged + (1 - decay) weights."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def ignore_signals(worker):
    """In a loader's worker: it ends with the process that reads from it, which may have something to save first."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


@torch.no_grad()
def not_finite(model, batch, indices):
    """The images, of the chains [b, refs] of a batch, whose chain's own loss is not finite."""
    losses = [model(**{k: v[i : i + 1] for k, v in batch.items()}) for i in range(len(indices))]
    return [image for row, loss in zip(indices.tolist(), losses) if not loss.isfinite() for image in row]


LOG = ["step", "epoch", "loss", "grad_norm", "lr", "images_per_second"]


def start_log(path, step):
    """Head the log; of a resumed run keep the rows up to the checkpoint, since those after it will come again."""
    lines = path.read_text(errors="replace").splitlines()[1:] if step and path.exists() else []
    kept = [line for line in lines if line.split(",")[0].isdecimal() and int(line.split(",")[0]) <= step]
    write_whole(path, lambda f: f.write("".join(f"{line}\n" for line in [",".join(LOG), *kept]).encode()))


def train(args, refs):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        # the other ranks wait for rank 0 to encode images and to draw pictures
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    check_out("--out", args.out, folder=True)
    out, log = Path(args.out), (print if rank == 0 else lambda *_: None)
    if (out / "last.pt").exists() and not args.resume:
        raise ValueError(f"{out}/last.pt exists: --resume goes on with that run; else give another --out, or remove {out}")

    # the recipe, then what a resumed run was started with, then what was given on the command line
    last = load_file(out / "last.pt") if args.resume else None
    if last is not None and not (isinstance(last, dict) and {"args", "config", "model", "model_ema", "optimizer", "step"} <= last.keys() and isinstance(last["args"], dict)):
        raise ValueError(f"{out}/last.pt: not the last.pt of a run, so there is nothing to go on from")
    before = last["args"] if last else {}
    given = {k: v for k, v in vars(args).items() if v is not None}
    if given.keys() >= {"steps", "epochs"}:
        raise ValueError("--steps and --epochs both set the length of the run; give one")
    differ = [f"{k} {before[k]} there, {given[k]} here" for k in ("size", "seed", "batch_size", "weight_decay") if k in before and given.get(k, before[k]) != before[k]]
    args.size = given.get("size") or before.get("size", "XS")
    args.refs = refs = refs or max(4, before.get("refs", 4))  # finetune_mrar.py: as given, as begun, or 4
    args.name = args.size if refs == 1 else f"{args.size}-mrar"
    recipe = COMMON | RECIPES[recipe_name(args.size, refs, args.only_decoder or before.get("only_decoder"))] | before
    if "epochs" in given:
        recipe["steps"] = None
    for flag, value in recipe.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = "bf16" if dtype == torch.bfloat16 else "fp32"  # a resumed run keeps it
    args.data = args.data or (str(DEMO_DATA) if args.size == "XS" else "latents")
    if args.only_decoder and not (args.init or args.resume):
        raise ValueError("--only-decoder: needs --init, the model whose AR Transformer it keeps")
    parts = world * args.accumulate
    if args.batch_size % parts:
        wanted = -(-args.batch_size // parts) * parts
        raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of {world} processes x --accumulate {args.accumulate}, e.g. {wanted}")

    # data and model
    cache = latent_cache(args, device, rank)
    channels, size, _ = cache.latent_shape
    config = dataclasses.replace(SIZES[args.size], refs=refs, num_classes=len(cache.classes), latent_channels=channels, latent_size=size)
    torch.manual_seed(args.seed)
    model = TransDiff(config)
    if last:
        differ += [f"{k} {v} there, {getattr(config, k)} here" for k, v in last["config"].items() if getattr(config, k) != v]
        differ += [f"{k} {last[k]} there, {v} here" for k, v in (("classes", cache.classes), ("vae_digest", cache.vae_digest), ("images", len(cache))) if last.get(k, v) != v]
        if differ:
            raise ValueError(f"{out}/last.pt is of another run: {', '.join(differ)}")
        model.load_state_dict(last["model"])
        log(f"going on from {out}/last.pt at step {last['step']}")
    elif args.init:
        *weights, info = load_state(args.init)
        if info.get("vae_digest", cache.vae_digest) != cache.vae_digest:
            raise ValueError(f"--init {args.init}: was trained on latents of another VAE ({info.get('vae')}) than those in {cache.path} ({cache.vae})")
        for note in warm_start(model, *weights, path=args.init):
            log(f"{args.init}: {note}")
        del weights
    if args.only_decoder:
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("decoder."))
    model.to(device)
    averaged = TransDiff(config).to(device).eval().requires_grad_(False)
    averaged.load_state_dict(last["model_ema"] if last else model.state_dict())
    optimizer = make_optimizer(model, args)
    step = last["step"] if last else 0
    if last:
        optimizer.load_state_dict(last["optimizer"])
    del last, before, recipe  # of the size of the model, four times

    chains = Chains(cache, refs, args.batch_size, args.seed, step, rank, world)
    per_epoch = chains.chains / args.batch_size
    args.steps = args.steps or math.ceil(args.epochs * per_epoch)
    model.train()
    model.ar.grad_checkpointing = model.decoder.grad_checkpointing = bool(args.grad_checkpointing)
    share, micro = args.batch_size // world, args.batch_size // world // args.accumulate
    seeds = lambda step: range(seed_of(args.seed, step) + rank * share, seed_of(args.seed, step) + (rank + 1) * share)  # noqa: E731, of this rank's chains
    forward, compile = model, device.type == "cuda" if args.compile is None else args.compile
    if compile:
        torch._dynamo.config.optimize_ddp = False  # one graph, the one that is tried here
        dropped, t, eps, noise = draw(config, args.repeats, args.t, range(micro), device)
        with autocast(device, dtype):
            batch = dict(latents=noise * cache.scale, labels=torch.zeros(micro, dtype=torch.int64, device=device), t=t, noise=eps, dropped=dropped)
            forward = compiled(model, lambda m: m(**batch).backward())
        model.zero_grad(set_to_none=True)
    if world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))  # what the processes tell each other beside gradients, without waiting for a GPU
    count = sum(p.numel() for p in model.parameters())
    log(
        f"TransDiff-{args.name}: {count:,} parameters on {world} x {device.type} in {str(dtype)[6:]}; {len(cache):,} images of {len(cache.classes)} classes, "
        f"chains of {refs}; {args.steps} steps of {args.batch_size} chains = {args.steps / per_epoch:.1f} epochs"
    )

    def save(keep=False):
        if rank:
            return
        weights = {k: v.half() for k, v in averaged.state_dict().items()}
        info = dict(config=dataclasses.asdict(config), size=args.name, step=step, classes=cache.classes, vae=cache.vae, vae_digest=cache.vae_digest, images=len(cache))
        states = dict(model=model.state_dict(), model_ema=averaged.state_dict(), optimizer=optimizer.state_dict())
        kept = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "init", "device")}
        write_whole(out / "last.pt", lambda f: torch.save(dict(info, **states, args=kept), f))
        for name in ["ema.pt"] + ([f"ema-{step:07d}.pt"] if keep else []):
            write_whole(out / name, lambda f: torch.save(dict(info, model=weights), f))

    stop = []  # SIGTERM or Ctrl-C, and when: finish the step, save, leave

    def leave(signum, frame):
        if stop and time.time() > stop[0][1] + 5:  # asked again, not told twice by a launcher: at once
            sys.exit(128 + signum)
        stop.append((signum, time.time()))

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave)
    loader = iter(torch.utils.data.DataLoader(chains, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals))
    if rank == 0:
        start_log(out / "log.csv", step)
    window, window_loss, started = 0, torch.zeros((), device=device), time.time()
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0, desc=f"{args.name}")
    while step < args.steps:
        torch.manual_seed(seed_of(args.seed, step, 1 + rank))  # of dropout; a resumed run draws what it would have drawn
        moments, labels = (x.to(device, non_blocking=True) for x in next(loader))
        dropped, t, eps, noise = draw(config, args.repeats, args.t, seeds(step), device)
        batch = dict(latents=posterior(moments, noise) * cache.scale, labels=labels, t=t, noise=eps, dropped=dropped)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for i in range(args.accumulate):
            if world > 1:
                forward.require_backward_grad_sync = i == args.accumulate - 1
            with autocast(device, dtype):
                loss = forward(**{k: v[i * micro : (i + 1) * micro] for k, v in batch.items()})
            (loss / args.accumulate).backward()
            window_loss += loss.detach() / args.accumulate
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], args.clip)
        if not math.isfinite(norm):  # before the optimiser touches the weights
            with autocast(device, dtype):
                found = [not_finite(model, batch, chains.indices(step))]
            if world > 1:
                found *= world
                dist.all_gather_object(found, found[0], group=control)
                if rank:
                    sys.exit(2)  # rank 0 tells
            bad = sum(found, [])
            what, images = ("loss", bad) if bad else ("gradient", chains.indices(step).ravel().tolist())
            shown = ", ".join(map(str, images[:16])) + (f" and {len(images) - 16} more" if len(images) > 16 else "")
            raise ValueError(f"the {what} of step {step + 1} is not finite, of images {shown} in {cache.path}; --resume goes on from the last checkpoint, with a smaller --lr perhaps")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(averaged, model, min(args.ema, (1 + step) / (10 + step)))  # short of history the average follows the weights
        step, window = step + 1, window + 1
        bar.update()

        stopping = torch.tensor(float(bool(stop)))
        if world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX, group=control)  # all leave after the same step
        done, keep = step == args.steps, bool(args.keep_every) and step % args.keep_every == 0
        saving = done or keep or stopping or step % args.save_every == 0
        if saving or step % args.log_every == 0:
            mean = window_loss / window
            if world > 1:
                dist.all_reduce(mean)
                mean /= world
            rate = window * args.batch_size * refs / (time.time() - started)
            if rank == 0:
                row = [step, f"{step / per_epoch:.3f}", f"{mean.item():.5f}", f"{norm.item():.4f}", f"{learning_rate(step - 1, args):.3e}", f"{rate:.1f}"]
                with open(out / "log.csv", "a", newline="") as f:
                    csv.writer(f, lineterminator="\n").writerow(row)
            bar.set_postfix(loss=f"{mean.item():.4f}", images=f"{rate:.0f}/s")
            window, started = 0, time.time()
            window_loss.zero_()
        if saving:
            save(keep)
        if stopping and not done:
            bar.close()
            log(f"stopped at step {step}; {out}/last.pt is saved, --resume goes on with it")
            if world > 1:
                dist.barrier(group=control)  # else a launcher that sees the others leave would end rank 0 in the middle of its file
                dist.destroy_process_group()
            sys.exit(128 + (stop[0][0] if stop else signal.SIGTERM))
        picture = args.sample_every and (done or step % args.sample_every == 0)
        if picture and rank == 0:
            tqdm.write(draw_samples(averaged, cache, args, device, dtype, out / f"samples-{step:07d}.png"))
        if saving or picture:
            started = time.time()  # the rate is of training alone
    bar.close()
    log(f"wrote {out}/last.pt, {out}/ema.pt and {out}/log.csv; draw from them with python sample.py --ckpt {out}/ema.pt")
    if world > 1:
        dist.destroy_process_group()


def make_parser(doc, out, recipes):
    shown = {"every recipe": COMMON} | {name: RECIPES[name] for name in recipes}
    lines = [f"  {name:13}" + ", ".join(f"{k.replace('_', '-')} {v if isinstance(v, str) else format(v, 'g')}" for k, v in r.items()) for name, r in shown.items()]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(["defaults:", *lines]))
    add = parser.add_argument
    add("--size", choices=SIZES, help="of the model (default: XS)")
    add("--data", help="latent cache, or images to encode first (default: the bundled images for XS, else the cache ./latents)")
    add("--vae", help="VAE that encodes --data if it is images (default: the bundled one for XS)")
    add("--image-size", type=positive, help="pixels (default: the cache's, or the VAE's own)")
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUT/last.pt, with the flags that the run was started with")
    add("--steps", type=positive, help="length of the run in optimiser steps")
    add("--epochs", type=positive, help="length of the run in passes over the images, instead of --steps")
    add("--batch-size", type=positive, help="chains (1-step: images) a step, over all processes")
    add("--accumulate", type=positive, help="micro-batches a step on each process, to save memory")
    add("--lr", type=number(0), help="peak learning rate; scale it with the batch size")
    add("--warmup", type=number(0, 1), help="first share of the run over which the learning rate rises, 0 to 1")
    add("--cooldown", type=number(0, 1), help="last share of the run over which the learning rate falls to 0, 0 to 1")
    add("--weight-decay", type=number(0), help="of the AR Transformer's matrices")
    add("--clip", type=number(1e-6), help="largest norm of the gradient")
    add("--ema", type=number(0, 1), help="decay per step of the averaged weights, 0 to 1")
    add("--repeats", type=positive, help="draws of (t, noise) an image")
    add("--t", choices=["logit-normal", "uniform"], help="distribution of t: the release's, or Eq. 5's")
    add("--seed", type=whole, help="of weights, data order and every draw")
    add("--save-every", type=positive, help="steps between checkpoints")
    add("--keep-every", type=positive, help="also keep the averaged weights of every so many steps, as OUT/ema-STEP.pt")
    add("--sample-every", type=whole, help="steps between pictures of samples, and one at the end; 0 draws none")
    add("--log-every", type=positive, help="steps between rows of log.csv")
    add("--workers", type=whole, help="processes that read latents; 0 reads in this one, 2 or more keep a GPU busy")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast; weights stay float32 (default: bf16 where the hardware has it)")
    add("--grad-checkpointing", action=argparse.BooleanOptionalAction, help="compute activations twice instead of keeping them: about a third slower, for H on small GPUs")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    return parser


def main():
    parser = make_parser(__doc__, "runs/train", ("XS 1-step", "1-step", "512 px"))
    parser.add_argument("--init", help="checkpoint whose averaged weights to start from")
    parser.add_argument("--only-decoder", action="store_true", default=None, help="freeze the AR Transformer: the 512 px recipe, with --init and --image-size 512")
    train(parser.parse_args(), refs=1)


if __name__ == "__main__":
    run(main)
