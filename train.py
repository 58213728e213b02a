"""Stage 1: train TransDiff, 1-step AR, on a latent cache (Section 3.2.1; recipe of Appendix B).

    python train.py                                       the XS demo on the bundled images, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --size B --data LATENTS    the paper's recipe on ImageNet

A run writes OUT/last.pt (all that --resume needs), OUT/ema.pt (EMA weights in float16, for sample.py), OUT/log.csv and
pictures of samples. finetune_mrar.py, stage 2, runs this same loop on chains of images.
"""

import argparse
import copy
import dataclasses
import datetime
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import SIZES, TransDiff, load_file, load_state, t_from_normal
from vae import DEMO_DATA, RANK, WORLD, LatentCache, atomic_write, autocast, bounded
from vae import derive_seed, encode_images, latents_to_images, load_vae, open_images, per_image_noise
from vae import pick_device, pick_dtype, run_main, sample_posterior, save_grid, sha256_prefix, shorten

# Defaults of the flags of these names. Epochs, lr, batch size, weight decay: Appendix B; the rest, 512 px: the release.
# warmup is a fraction of the run: 1/8 of 800 epochs is the release's 100. The release scales lr with the batch size.
COMMON = dict(weight_decay=0.02, clip=3.0, t="logit-normal", seed=0, holdout=0.0, log_every=50, workers=0)
PAPER = dict(batch_size=2048, ema=0.9999, cooldown=0.0, sample_every=10_000, save_every=1_000)
DEMO = dict(warmup=1 / 16, cooldown=1 / 2, batch_mul=1, ema=0.998, sample_every=500, save_every=500)
RECIPES = {
    "1-step": dict(PAPER, epochs=800, lr=8e-4, warmup=1 / 8, batch_mul=4),
    # The release trains this with bf16 weights, which take up few of the small updates: another lr may suit float32.
    "MRAR": dict(PAPER, epochs=40, lr=5e-5, warmup=1 / 4, batch_mul=2),
    "512 px": dict(PAPER, epochs=150, lr=1e-4, warmup=1 / 15, batch_mul=4, ema=0.999),
    "XS 1-step": dict(DEMO, steps=1600, lr=2e-3, batch_size=64),
    "XS MRAR": dict(DEMO, steps=500, lr=1e-3, batch_size=16),
}
MICRO_BATCH = {"XS": 8192, "B": 32, "L": 16, "H": 4}  # chains at once on a GPU of 80 GB, estimated: tests/README.md


def split(labels, holdout):
    """(indices to train on, indices held out) of labels [N]; by index alone, so that every stage and run agree."""
    held_out, readable = np.random.default_rng(0).random(len(labels)) < holdout, labels >= 0
    return np.flatnonzero(readable & ~held_out), np.flatnonzero(readable & held_out)


class Chains(torch.utils.data.Dataset):
    """Item s is the batch of step s, chains of `refs` images of a class: moments [b, refs, 2 C, h, w] and labels [b].

    An epoch uses each of `images` (indices; default: all) at most once: images and chains are shuffled anew, and the
    images of a class that do not fill a chain are left out. Step s takes chains [s B, (s + 1) B) of the epochs in a
    row, and this rank an equal part of them. All is a function of (seed, epoch or step): any step can be resumed.
    """

    def __init__(self, cache, refs, batch_size, seed, rank=0, world=1, images=None):
        self.cache, self.refs, self.batch_size = cache, refs, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.images = split(cache.labels, 0)[0] if images is None else images
        counts = np.bincount(cache.labels[self.images], minlength=len(cache.classes))
        too_small = [name for name, n in zip(cache.classes, counts) if n < refs]
        if too_small and refs > 1 or not counts.any():
            raise ValueError(f"--refs {refs}: classes have fewer than {refs} images: {shorten(too_small)}")
        self.chains_per_epoch = int((counts // refs).sum())
        self.epoch, self.order = -1, None

    def epoch_order(self, epoch):
        """Image indices [chains, refs] of one epoch."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            indices = rng.permutation(self.images)
            indices = indices[np.argsort(self.cache.labels[indices], kind="stable")]  # by class, shuffled within it
            labels = self.cache.labels[indices]
            position = np.arange(len(indices)) - np.searchsorted(labels, labels)  # within the class
            class_size = np.bincount(labels)[labels]
            indices = indices[position < class_size // self.refs * self.refs]
            indices = rng.permutation(indices.reshape(-1, self.refs))
            self.epoch, self.order = epoch, indices
        return self.order

    def indices(self, step):
        """Image indices [b, refs] of this rank's part of a step."""
        local_batch = self.batch_size // self.world
        first = step * self.batch_size + self.rank * local_batch
        epochs, positions = np.divmod(np.arange(first, first + local_batch), self.chains_per_epoch)
        return np.concatenate([self.epoch_order(e)[positions[epochs == e]] for e in np.unique(epochs)])

    def __getitem__(self, step):
        indices = self.indices(step)
        flips = np.random.default_rng((self.seed, step)).integers(0, 2, (self.batch_size, self.refs), dtype=np.uint8)
        flips = flips[self.rank * len(indices) : (self.rank + 1) * len(indices)]
        return torch.from_numpy(self.cache.moments[indices, flips]), torch.from_numpy(self.cache.labels[indices[:, 0]])


# ---------------------------------------------------------------------------------------------- one step
def loss_inputs(moments, labels, seeds, cache, config, args):
    """Arguments of TransDiff.loss; the random numbers of a chain depend on its seed alone, not on how a batch is split.

    moments [b, refs, 2 C, h, w], labels [b], seeds: b integers; M = refs batch_mul
    Returns latents [b, refs, C, h, w], labels, t [b, M], noise [b, M, C, h, w], batch_mul, drop bool [b].
    """
    shape, M = config.latent_shape, config.refs * args.batch_mul
    parts = [1, M, M * math.prod(shape), config.refs * math.prod(shape)]
    normal, generator = torch.empty(len(seeds), sum(parts), device=labels.device), torch.Generator(labels.device)
    for row, seed in zip(normal, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    drop_normal, t, noise, posterior_noise = normal.split(parts, dim=1)
    latents = sample_posterior(*moments.float().chunk(2, dim=-3), posterior_noise.unflatten(1, (config.refs, *shape)))
    drop = torch.special.ndtr(drop_normal[:, 0]) < config.label_drop_prob
    noise = noise.unflatten(1, (M, *shape))
    return latents * cache.scale, labels, t_from_normal(t, args.t), noise, args.batch_mul, drop


def learning_rate(step, args):
    """Linear warm-up over the first `warmup` part of the run and (not in the paper) decay over the last `cooldown`."""
    remaining = (args.steps - step) / max(1, args.cooldown * args.steps)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup * args.steps), remaining)


def make_optimizer(model, args):
    """AdamW; as in the release, no weight decay in the decoder, nor on biases and norms."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and not n.startswith("decoder.")]
    others = [p for n, p in named if p.ndim == 1 or n.startswith("decoder.")]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], args.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------- the loop
def train(args):
    device, last = setup(args)
    args = resolve_flags(args, last, device)
    cache = open_cache(args, device)
    model, ema, optimizer = build(args, cache, last, device)
    images, held_out_images = split(cache.labels, args.holdout)
    chains = Chains(cache, args.refs, args.batch_size, args.seed, RANK, WORLD, images)
    held_out = Chains(cache, args.refs, 64, seed=0, images=held_out_images) if args.holdout else None
    args.steps = args.steps or math.ceil(args.epochs * chains.chains_per_epoch / args.batch_size)
    run = Run(args, chains, held_out, model, ema, optimizer, last, device)
    del last  # four times the size of the model
    options = dict(num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    options["timeout"] = 600 * (args.workers > 0)  # seconds: a worker that hangs is an error
    batches = torch.utils.data.DataLoader(chains, batch_size=None, sampler=range(run.step, args.steps), **options)
    forward = parallelize(model, args)
    local_batch = args.batch_size // WORLD
    micro_batch = local_batch // args.accumulate

    for step, batch in zip(range(run.step, args.steps), batches):
        torch.manual_seed(derive_seed(args.seed, step, 1 + RANK))  # seeds dropout: a resumed run draws the same masks
        moments, labels = (x.to(device, non_blocking=True) for x in batch)
        first = derive_seed(args.seed, step) + RANK * local_batch
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=device)
        for i in range(0, local_batch, micro_batch):
            forward.require_backward_grad_sync = i + micro_batch == local_batch  # DDP: all-reduce once a step
            part, seeds = slice(i, i + micro_batch), range(first + i, first + i + micro_batch)
            with autocast(device, run.dtype):
                loss = forward(*loss_inputs(moments[part], labels[part], seeds, cache, model.config, args))
            (loss / args.accumulate).backward()
            loss_sum += loss.detach() / args.accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        run.check_finite(grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=WORLD == 1)  # DDP's gradients are views of its buckets: None costs a copy
        # EMA warm-up, anew in each stage; the release's decay is constant
        update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))
        run.after_step(loss_sum, grad_norm, lr)
    run.finish(f"complete at step {run.step}")


# ---------------------------------------------------------------------------------------------- before the loop
def setup(args):
    """Pick the device, start the process group. Returns (device, last.pt or None)."""
    path = Path(args.out, "last.pt")
    if path.exists() and not args.resume:
        raise ValueError(f"{path} exists: --resume continues that run; else give another --out, or remove {args.out}")
    device = pick_device(args.device)
    if WORLD > 1:  # timeout of a day: ranks wait while rank 0 encodes images
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=device_id)
    # cuDNN's attention, which 2.11 prefers on H100, may round the dropout rate and give NaN gradients under a mask
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    last = load_file(path) if args.resume else None
    if args.resume and not (isinstance(last, dict) and {"args", "config", "log", "optimizer"} <= last.keys()):
        raise ValueError(f"{path}: not the last.pt of a run, so it cannot be resumed")
    return device, last


def resolve_flags(args, last, device):
    """All flags of the run: the recipe's, over them those of the resumed run, over them those of the command line."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    before = last["args"] if last else {}
    if "epochs" in given:
        before = dict(before, steps=None)
    start = load_file(args.init) if args.init and not last else None
    if isinstance(start, dict) and {"args", "config"} <= start.keys():  # a last.pt: continue on its images
        before = dict(before, data=start["args"]["data"], holdout=start["args"]["holdout"])
    flags = dict(size="XS", refs=4, only_decoder=False) | before | given
    if "refs" not in given:  # finetune_mrar.py without --refs: never 1, so a 1-step run is refused
        flags["refs"] = max(4, flags["refs"])
    demo, stage = flags["size"] == "XS", "MRAR" if flags["refs"] > 1 else "1-step"
    recipe = COMMON | RECIPES[f"XS {stage}" if demo else "512 px" if flags["only_decoder"] else stage]
    recipe |= dict(data=str(DEMO_DATA) if demo else "latents", compile=device.type == "cuda")
    args = argparse.Namespace(**(vars(args) | recipe | flags))
    if not args.accumulate:
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
        micro_batches = args.batch_size / WORLD / (MICRO_BATCH[args.size] * memory / 80e9)
        args.accumulate = 2 ** max(0, math.ceil(math.log2(micro_batches or 1)))
    if args.batch_size % (WORLD * args.accumulate):
        multiple = f"a multiple of {WORLD} processes x --accumulate {args.accumulate}"
        raise ValueError(f"--batch-size {args.batch_size}: must be {multiple}")
    return args


def open_cache(args, device):
    """The cache at --data; images are encoded first, into a cache beside OUT, named after them and the VAE."""
    path = Path(args.data)
    if path.suffix == ".npz" or path.is_dir() and not any(path.glob("moments.*")):
        images, vae = open_images(args, device)
        cache_id = sha256_prefix((images.digest + vae.digest).encode())
        path = Path(args.out).parent / f"latents-{path.stem}-{images.shape[0]}-{cache_id}"
        if RANK == 0 and not path.exists():
            encode_images(images, vae, path, device=device)
        if WORLD > 1:
            dist.barrier()
    cache = LatentCache(path)
    args.data = str(path)  # recorded: stage 2 and --resume need not encode again
    vae_digest = load_vae(args.vae).digest if args.vae else cache.vae_digest
    if (vae_digest, args.image_size or cache.image_size) != (cache.vae_digest, cache.image_size):
        raise ValueError(f"{path}: latents of another --vae or --image-size than asked for; leave those flags out")
    return cache


def build(args, cache, last, device):
    """(model, ema, optimizer): new, from --init, or as last.pt has them."""
    channels, size, _ = cache.latent_shape
    shape = dict(refs=args.refs, num_classes=len(cache.classes), latent_channels=channels, latent_size=size)
    config = dataclasses.replace(SIZES[args.size], **shape)
    torch.manual_seed(args.seed)
    model = TransDiff(config)
    if last:
        here = dataclasses.asdict(config) | cache.info
        here |= {k: vars(args)[k] for k in ("seed", "batch_size", "weight_decay", "holdout")}
        if different := differences("{} {} there, {} here", last["args"] | last | last["config"], here):
            raise ValueError(f"{args.out}/last.pt is of another run: {different}")
        model.load_state_dict(last["model"])
    elif args.init:
        warm_start(model, args.init, cache)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("decoder.") or not args.only_decoder)
    model.to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, args)
    if last:
        ema.load_state_dict(last["model_ema"])
        optimizer.load_state_dict(last["optimizer"])
    return model, ema, optimizer


def differences(form, a, b):
    """Text of the entries of the dict b that differ in a: form.format(name, value in a, value in b)."""
    return ", ".join(form.format(k, str(a.get(k))[:99], str(v)[:99]) for k, v in b.items() if a.get(k) != v)


@torch.no_grad()
def warm_start(model, path, cache=None):
    """Fill `model` from the EMA weights of a checkpoint, perhaps of another shape, and print what is converted.

    The release starts the weights from the raw ones, and the EMA from the EMA.
    1-step -> MRAR: the mask embedding is copied into each mask token, positions are kept, the reference layer is new.
    256 -> 512 px: the decoder's positions are interpolated. Another number of classes: the class embeddings are new.
    """
    old, state, info = load_state(path)
    new, own = model.config, model.state_dict()
    if cache and info.get("vae_digest", cache.vae_digest) != cache.vae_digest:
        raise ValueError(f"--init {path}: trained on latents of another VAE than {cache.path}")
    log = print if RANK == 0 else lambda line: None
    if old.refs == 1 and new.refs > 1:
        state["ar.mask_tokens"] = state["ar.mask_tokens"].expand(-1, new.tokens_per_image, -1)
        state |= {k: v for k, v in own.items() if k.startswith("ar.reference_proj.")}
        log(f"{path}: mask embedding copied into {new.tokens_per_image} mask tokens, reference projection new")
    if old.latent_size != new.latent_size and old.refs == new.refs == 1:
        grid = state["decoder.positions"].unflatten(1, (old.latent_size, -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new.latent_size, mode="bicubic", align_corners=False)
        state["decoder.positions"] = grid.flatten(2).transpose(1, 2)
        log(f"{path}: decoder positions interpolated, latents {old.latent_size} -> {new.latent_size}")
    if old.num_classes != new.num_classes:
        state["ar.class_embedding.weight"] = own["ar.class_embedding.weight"]
        log(f"{path}: class embeddings new, {old.num_classes} -> {new.num_classes} classes")
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        different = differences("{} {}, not {}", dataclasses.asdict(old), dataclasses.asdict(new))
        raise ValueError(f"--init {path}: weights of another shape: {different}")
    model.load_state_dict(state)


def parallelize(model, args):
    """The model to call in the loop: compiled and wrapped for DDP, where wanted."""
    if args.compile:  # by block: two graphs to compile, and DDP reduces gradients while the backward pass goes on
        torch._dynamo.config.optimize_ddp = False  # does not cut a block into buckets
        for block in [*model.ar.blocks, *model.decoder.blocks]:
            block.compile()
    if WORLD > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def ignore_signals(worker):
    """For a loader's worker, which ends with the process that reads from it."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------- around the loop
class Run:
    """What stands around the loop: the log, checkpoints, pictures and signals. Rank 0 alone writes."""

    def __init__(self, args, chains, held_out, model, ema, optimizer, last, device):
        self.args, self.chains, self.held_out, self.cache = args, chains, held_out, chains.cache
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.device, self.dtype = device, pick_dtype(args.dtype, device)
        args.dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"  # recorded: a resumed run keeps it
        self.out, self.name = Path(args.out), args.size + "-mrar" * (args.refs > 1)
        self.step, self.rows = (last["step"], last["log"]) if last else (0, [])
        self.steps_per_epoch = chains.chains_per_epoch / args.batch_size
        self.steps_since_log, self.loss_sum, self.started = 0, torch.zeros((), device=device), time.time()
        self.signal = None  # number of SIGTERM or Ctrl-C
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.on_signal)
        if RANK == 0:
            if not (self.out / "vae.pt").exists():  # a run's folder is complete: it can be moved
                atomic_write(self.out / "vae.pt", (self.cache.path / "vae.pt").read_bytes())
            count = sum(p.numel() for p in model.parameters())
            epochs, micro_batch = args.steps / self.steps_per_epoch, args.batch_size // WORLD // args.accumulate
            print(f"TransDiff-{self.name}: {count:,} parameters on {WORLD} x {device.type} in {args.dtype}")
            print(f"{len(chains.images):,} images of {len(self.cache.classes)} classes in chains of {args.refs}")
            print(f"{args.steps} steps, {epochs:.1f} epochs, of {args.batch_size} chains, {micro_batch} at once")
            print(f"resuming from {self.out}/last.pt at step {self.step}" if self.step else f"writing to {self.out}")
        self.bar = tqdm(total=args.steps, initial=self.step, unit="step", disable=RANK > 0, desc=self.name)

    def check_finite(self, grad_norm):
        """Refuse a loss or gradient that is not finite, before the optimiser touches the weights."""
        if not math.isfinite(grad_norm):
            self.bar.close()
            raise ValueError(
                f"the loss or gradient of step {self.step + 1} is not finite; --resume with a smaller --lr"
            )

    def after_step(self, loss, grad_norm, lr):
        """Count the step, then log, save, draw samples and stop where it is time to."""
        args, self.step = self.args, self.step + 1
        self.loss_sum += loss
        self.steps_since_log += 1
        self.bar.update()
        done, stop = self.step == args.steps, self.stop_requested()
        keep = bool(args.keep_every) and self.step % args.keep_every == 0
        save = done or stop or keep or self.step % args.save_every == 0
        sample = args.sample_every and (done or self.step % args.sample_every == 0)
        if save or sample or self.step % args.log_every == 0:
            self.log(grad_norm, lr, self.held_out and sample)
        paused = time.time()
        if save and RANK == 0:
            self.save(keep)
        if sample and RANK == 0:
            self.draw_samples()
        self.started += time.time() - paused  # images_per_second is of training alone
        if stop and not done:
            self.finish(f"stopped at step {self.step}, --resume continues")
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def log(self, grad_norm, lr, holdout):
        """Add a row to log.csv: means since the last one; with `holdout` the loss on held-out images too."""
        loss = self.loss_sum / self.steps_since_log
        if WORLD > 1:
            dist.all_reduce(loss)
            loss /= WORLD
        rate = self.steps_since_log * self.args.batch_size * self.args.refs / (time.time() - self.started)
        row = [self.step, self.step / self.steps_per_epoch, loss.item(), grad_norm.item(), lr, rate]
        if RANK == 0:
            self.rows.append(row + [self.holdout_loss() if holdout else math.nan])
            lines = ["{},{:.3f},{:.5f},{:.4f},{:.3e},{:.1f},{:.5f}\n".format(*row) for row in self.rows]
            head = "step,epoch,loss,grad_norm,lr,images_per_second,holdout_loss\n"
            atomic_write(self.out / "log.csv", (head + "".join(lines)).replace("nan", "").encode())
        self.bar.set_postfix(loss=f"{loss.item():.4f}", images=f"{rate:.0f}/s")
        self.steps_since_log, self.started = 0, time.time()
        self.loss_sum.zero_()

    @torch.no_grad()
    def holdout_loss(self):
        """Loss of the EMA weights on up to 1,024 held-out chains, with the same t and noise at every call."""
        losses = []
        for s in range(min(16, math.ceil(self.held_out.chains_per_epoch / 64))):
            moments, labels = (x.to(self.device) for x in self.held_out[s])
            inputs = loss_inputs(moments, labels, range(64 * s, 64 * s + 64), self.cache, self.model.config, self.args)
            with autocast(self.device, self.dtype):
                losses.append(self.ema(*inputs[:-1]).item())  # all but drop: no null class
        return sum(losses) / len(losses)

    def save(self, keep):
        """Write ema.pt, last.pt and, to keep, ema-STEP.pt."""
        info = dict(config=dataclasses.asdict(self.model.config), step=self.step, **self.cache.info)
        weights = {k: v.half() for k, v in self.ema.state_dict().items()}
        for name in ["ema.pt"] + [f"ema-{self.step:07d}.pt"] * keep:
            atomic_write(self.out / name, lambda f: torch.save(dict(info, model=weights), f))
        flags = {k: v for k, v in vars(self.args).items() if k not in ("out", "resume", "init", "device", "compile")}
        last = dict(info, model=self.model.state_dict(), model_ema=self.ema.state_dict(), args=flags, log=self.rows)
        last["optimizer"] = self.optimizer.state_dict()
        atomic_write(self.out / "last.pt", lambda f: torch.save(last, f))

    def draw_samples(self):
        """Draw four images of each of the first ten classes with the EMA weights."""
        names = self.cache.classes[:10]
        labels = torch.arange(len(names), device=self.device).repeat_interleave(4)
        randn = per_image_noise(self.args.seed, range(len(labels)), self.device)
        vae, path = load_vae(self.out / "vae.pt", self.device), self.out / f"samples-{self.step:07d}.png"
        with torch.inference_mode(), autocast(self.device, self.dtype):
            images = latents_to_images(vae, self.ema.sample(labels, noise_sampler=randn, cfg_below=1.0)[:, -1])
        save_grid(images, path, columns=4, rows=names)
        tqdm.write(f"wrote {path}")

    def on_signal(self, signum, frame):
        self.signal = signum  # stop after this step

    def stop_requested(self):
        flag = torch.tensor(float(self.signal is not None), device=self.device)
        if WORLD > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)  # all ranks stop after the same step
        return bool(flag)

    def finish(self, state):
        self.bar.close()
        if RANK == 0:
            print(f"{state}; {self.out} has last.pt, ema.pt, log.csv; draw: python sample.py --ckpt {self.out}/ema.pt")
        if WORLD > 1:  # torchrun kills the remaining ranks once one exits
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- command line
def make_parser(doc, out, recipes):
    lines = ["defaults:"]
    for name, flags in {"every recipe": COMMON, **{name: RECIPES[name] for name in recipes}}.items():
        values = [f"{k.replace('_', '-')} {v if isinstance(v, str) else format(v, 'g')}" for k, v in flags.items()]
        lines.append(f"  {name:13}{', '.join(values)}")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, epilog="\n".join(lines))
    add, count, fraction = parser.add_argument, bounded(int, 1), bounded(float, 0, 1)
    add("--size", choices=SIZES, help="of the model (default: XS)")
    add("--data", help="latent cache, or images to encode first (default: the bundled images for XS, else ./latents)")
    add("--vae", help="VAE that encodes images; kl16: the released one (default: the bundled one for its images)")
    add("--image-size", type=count, help="pixels (default: the cache's, or the VAE's own)")
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue from OUT/last.pt with its flags; --steps may be raised")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="length of the run in optimiser steps")
    length.add_argument("--epochs", type=count, help="length of the run in passes over the images")
    add("--batch-size", type=count, help="chains (1-step: images) a step, over all processes")
    add("--accumulate", type=count, help="micro-batches a step on each process (default: what a GPU's memory needs)")
    add("--batch-mul", type=count, help="draws of (t, noise) an image")
    add("--lr", type=bounded(float, 0), help="peak learning rate; scale it with the batch size")
    add("--warmup", type=fraction, help="first part of the run, over which the learning rate rises, 0 to 1")
    add("--cooldown", type=fraction, help="last part of the run, over which the learning rate falls to 0, 0 to 1")
    add("--ema", type=fraction, help="decay per step of the EMA weights, 0 to 1")
    add("--t", choices=["logit-normal", "uniform"], help="distribution of t in this stage: the release's, or Eq. 5's")
    add("--seed", type=bounded(int, 0), help="of weights, data order and every draw")
    add("--holdout", type=fraction, help="part of the images to keep out; log.csv has their loss at each picture")
    add("--save-every", type=count, help="steps between checkpoints")
    add("--keep-every", type=count, help="steps between EMA checkpoints to keep, as OUT/ema-STEP.pt (default: none)")
    add("--sample-every", type=bounded(int, 0), help="steps between pictures, and one at the end; 0 for none")
    add("--log-every", type=count, help="steps between rows of log.csv")
    add("--workers", type=bounded(int, 0), help="processes that read latents; 2 or more keep a GPU busy")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    return parser


def main():
    parser = make_parser(__doc__, "runs/train", ("XS 1-step", "1-step", "512 px"))
    parser.add_argument("--init", help="checkpoint whose EMA weights to start from")
    parser.add_argument("--only-decoder", action="store_true", default=None, help="train it alone: the 512 px recipe")
    parser.set_defaults(refs=1)
    train(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
