"""Stage 1: train TransDiff, 1-step AR, on a latent cache (Section 3.2.1; recipe of Appendix B).

    python train.py                                       the XS demo on the bundled images
    torchrun --nproc_per_node 8 train.py --size B --data LATENTS    the paper's recipe on ImageNet

A run writes OUT/last.pt (all that --resume needs beside the cache), OUT/ema.pt (EMA weights in
float16) and OUT/vae.pt for sample.py, OUT/log.csv and pictures of samples. finetune_mrar.py, stage
2, runs this same loop on chains of images.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import RANK, SIZES, WORLD, TransDiff, UserError, atomic_write, autocast, bounded
from model import checkpoint_path, derive_seed, load_file, load_state, lock, make_parser
from model import pick_device, pick_dtype, run_main, say, sha256_prefix, shorten
from model import user_file
from vae import DEMO_DATA, LatentCache, encode_images, latents_to_images, load_vae, open_images
from vae import sample_posterior, save_grid

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# Default values of the flags with these names. Epochs, lr, batch size: Appendix B. ema, warmup,
# batch_mul, all of 512 px: the release. The rest, and all of XS: ours. warmup is a fraction of the
# run: 1/8 of 800 epochs is the release's 100.
PAPER = dict(batch_size=2048, ema=0.9999, cooldown=0.0, sample_every=10_000, save_every=1_000)
DEMO_RUN = dict(warmup=1 / 16, cooldown=1 / 2, ema=0.998, sample_every=500, save_every=100)
RECIPES = {
    "1-step": dict(PAPER, epochs=800, lr=8e-4, warmup=1 / 8, batch_mul=4),
    # The release keeps its weights in bf16 here, which rounds away most of the small updates:
    # another lr may suit float32.
    "MRAR": dict(PAPER, epochs=40, lr=5e-5, warmup=1 / 4, batch_mul=2),
    "512 px": dict(PAPER, epochs=150, lr=1e-4, warmup=1 / 15, batch_mul=4, ema=0.999),
    "XS 1-step": dict(DEMO_RUN, steps=1600, lr=2e-3, batch_mul=1, batch_size=64),
    "XS MRAR": dict(DEMO_RUN, steps=500, lr=1e-3, batch_mul=1, batch_size=16),
}
XS_SAMPLING = dict(sampler="adams-bashforth", steps=8, cfg=2.25, s1=1.0, s2=1.0)
WEIGHT_DECAY = 0.02  # Appendix B
CLIP = 3.0  # norm of the gradient; the release


# -------------------------------------------------------------------------------- chains of images
def split(labels, holdout):
    """(indices to train on, indices held out) of labels [N]; every stage and run agree."""
    held_out = np.random.default_rng(0).random(len(labels)) < holdout
    readable = labels >= 0
    return np.flatnonzero(readable & ~held_out), np.flatnonzero(readable & held_out)


@dataclasses.dataclass(eq=False)
class Chains(Dataset):
    """Item s is the batch of step s, chains of `refs` images of a class.

    An epoch uses each image at most once: images and chains are shuffled anew, and the images of a
    class that do not fill a chain are left out. The epochs follow each other as one list of chains.
    Step s takes the next B of them, from number s B on; each process takes an equal part. The seed,
    the step and the rank determine an item, so a run can resume at any step.

    Given the class, the images of such a chain are independent. So the best condition c_k is the
    same for every k: references can tell nothing that the class does not. For chains in which they
    can, see `growing_scales` and `read_chains`.
    """

    cache: LatentCache
    images: np.ndarray  # indices of those to use
    refs: int
    batch_size: int  # B, over all processes
    seed: int
    mirror: bool = True
    rank: int = 0
    world: int = 1
    listed: np.ndarray = None  # the chains, image indices [N, refs]; None: random ones, as above

    def __post_init__(self):
        chains = self.epoch_order(0)
        self.chains_per_epoch = len(chains)
        # Classes without a chain.
        self.empty = np.setdiff1d(range(len(self.cache.classes)), self.cache.labels[chains])

    @functools.lru_cache(2)
    def epoch_order(self, epoch):
        """Image indices [chains, refs] of one epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.listed is not None:
            return rng.permutation(self.listed)
        images = rng.permutation(self.images)
        images = images[np.argsort(self.cache.labels[images], kind="stable")]
        labels = self.cache.labels[images]
        position = np.arange(len(images)) - np.searchsorted(labels, labels)  # within its class
        full = np.bincount(labels) // self.refs * self.refs
        chains = images[position < full[labels]].reshape(-1, self.refs)
        return rng.permutation(chains)

    def indices(self, step):
        """Image indices [b, refs] of this process's part of a step."""
        local_batch = self.batch_size // self.world
        first = step * self.batch_size + self.rank * local_batch
        chains = range(first, first + local_batch)
        n = self.chains_per_epoch
        return np.stack([self.epoch_order(i // n)[i % n] for i in chains])

    def __getitem__(self, step):
        """Moments float16 [b, refs, 2 C, h, w] and labels int64 [b]."""
        indices = self.indices(step)
        rng = np.random.default_rng((self.seed, step, self.rank))
        flips = rng.integers(0, 2 if self.mirror else 1, indices.shape)
        moments = self.cache.moments(indices, flips)
        return torch.from_numpy(moments), torch.from_numpy(self.cache.labels[indices[:, 0]])


def growing_scales(latents):
    """Chains of scale AR (Table 4): one image at 1/8, 1/4, 1/2 and all of its resolution.

    The paper does not describe them. Here the latent is averaged, and enlarged again bilinearly.

    latents  [B, 1, C, H, W]
    Returns [B, 4, C, H, W].
    """
    x = latents[:, 0]
    side = x.shape[-1]
    scales = [F.adaptive_avg_pool2d(x, -(-side // n)) for n in (8, 4, 2, 1)]
    return torch.stack([F.interpolate(s, size=side, mode="bilinear") for s in scales], dim=1)


def read_chains(path, cache, images, refs):
    """Image indices [chains, refs] of a list in the release's format.

    A line is {"cate": a class folder, "files": [names of its files]}; suffixes are not compared.

    cache   of a folder: it keeps the names of the files
    images  indices of those to use; chains with others are left out
    refs    images in each chain
    """
    with user_file(path, "list of chains"):
        lines = Path(path).read_text().strip().split("\n")
    if not (cache.path / "names.json").exists():
        raise UserError(f"--chains {path}: {cache.path} has no file names; encode a folder")
    names = json.loads((cache.path / "names.json").read_text())
    index = {os.path.splitext(names[i])[0]: i for i in images}
    chains = []
    absent = []
    for number, line in enumerate(lines, 1):
        with user_file(f"{path}, line {number}", "chain"):
            chain = json.loads(line)
            files = [f"{chain['cate']}/{os.path.splitext(name)[0]}" for name in chain["files"]]
            if len(files) != refs:
                raise ValueError(f"it has {len(files)} files, refs is {refs}")
        missing = [name for name in files if name not in index]
        absent += missing
        if not missing:
            chains.append([index[name] for name in files])
    rest = f"absent, unreadable or held out: {shorten(absent) or 'none'}"
    if not chains:
        raise UserError(f"--chains {path}: has no chain of images in {cache.path}; {rest}")
    say(f"{path}: {len(chains)} of {len(lines)} chains; {rest}")
    return np.array(chains)


def open_chains(args, cache):
    """(chains to train on, chains held out)."""
    images, other_images = split(cache.labels, args.holdout)
    refs = args.refs
    listed = None
    if args.chains == "scales":
        refs = 1  # `growing_scales` makes a chain of it
        if args.refs != 4:
            raise UserError(f"--chains scales: has 4 images, not --refs {args.refs}")
    elif args.chains != "images":
        listed = read_chains(args.chains, cache, images, refs)
    chains = Chains(
        cache, images, refs, args.batch_size, args.seed, args.mirror, RANK, WORLD, listed
    )
    # The held-out loss is of random chains, also where those to train on are listed.
    held_out = Chains(cache, other_images, refs, 512 // args.refs, 0, args.mirror)
    empty = [cache.classes[k] for k in chains.empty]
    if not chains.chains_per_epoch:
        raise UserError(
            f"--data {args.data}: no class has {refs} images to train on (--holdout {args.holdout})"
        )
    if empty:
        missing = "images" if refs == 1 else f"chain of {refs}"
        say(f"{len(empty)} of {len(cache.classes)} classes have no {missing}: {shorten(empty)}")
    return chains, held_out


# -------------------------------------------------------------------------------- one step
def learning_rate(step, steps, args):
    """Linear warm-up over the first `warmup` part of the run and (not in the paper) linear decay
    over the last `cooldown`."""
    rise = (step + 1) / max(1, args.warmup * steps)
    fall = (steps - step) / max(1, args.cooldown * steps)
    return args.lr * min(1.0, rise, fall)


def make_optimizer(model, lr):
    """AdamW; as in the release, no weight decay in the decoder, nor on biases and norms."""
    decayed = []
    others = []
    for name, p in model.named_parameters():
        group = others if p.ndim == 1 or name.startswith("decoder.") else decayed
        group.append(p)
    groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# -------------------------------------------------------------------------------- the loop
def train(args, model_class=TransDiff):
    """Train a model with the flags `args`, None where they are not given."""
    device = pick_device(args.device)
    # cuDNN's attention may round the dropout rate and give NaN gradients under a mask.
    torch.backends.cuda.enable_cudnn_sdp(False)
    last, start = open_previous(args)
    resolve_flags(args, last, start, device)
    cache = open_cache(args, start, device)
    if WORLD > 1:  # after encoding, which may take longer than the group's time-out
        # PyTorch's CUDA build would pick NCCL for a CPU too.
        dist.init_process_group(None if device.type == "cuda" else "gloo")
    model, ema, optimizer = build(args, cache, last, start, device, model_class)
    run = Run(args, cache, model, ema, optimizer, last, device)
    batches = DataLoader(
        run.chains,
        batch_size=None,  # an item is a batch
        sampler=range(run.step, run.steps),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    batches = enumerate(batches, run.step)  # workers must fork before DDP starts NCCL
    forward = parallelize(model, args)

    for step, (moments, labels) in batches:
        # Seeds the posterior, dropped labels, t, noise, dropout: a resumed run draws the same.
        torch.manual_seed(derive_seed(args.seed, step, RANK))
        lr = learning_rate(step, run.steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = zip(moments.chunk(run.accumulate), labels.chunk(run.accumulate))
        mean_loss = 0.0
        for i, (m, y) in enumerate(parts):
            # DDP: add up the gradients of all processes once per step.
            forward.require_backward_grad_sync = i == run.accumulate - 1
            latents = run.latents(m)
            y = y.to(device, non_blocking=True)
            with autocast(device, args.dtype):
                loss = forward(latents, y, batch_mul=args.batch_mul, t_distribution=args.t)
            (loss / run.accumulate).backward()
            mean_loss += loss.detach() / run.accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not grad_norm.isfinite():
            raise UserError(
                f"the gradient of step {step + 1} is not finite; --resume with a smaller --lr, or "
                "start anew if there is no checkpoint yet"
            )
        optimizer.step()
        optimizer.zero_grad()
        # EMA warm-up, anew in each stage; the release's decay is constant.
        update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))
        run.after_step(mean_loss, grad_norm, lr)
    run.finish()


# -------------------------------------------------------------------------------- before the loop
def open_previous(args):
    """(last.pt of the resumed run, `load_state` of --init), each None where there is none."""
    path = Path(args.out, "last.pt")
    if args.resume:
        return load_file(path), None
    if path.exists():
        raise UserError(f"{path} exists: --resume continues that run; else give another --out")
    if args.init:
        args.init = checkpoint_path(args.init, "last.pt")
        return None, load_state(args.init)
    if args.only_decoder:
        raise UserError("--only-decoder: give --init, a trained model; its AR Transformer is kept")
    return None, None


def resolve_flags(args, last, start, device):
    """Give the flags that are None their values, layer by layer: the first to have one wins."""

    def fill(**values):
        for name, value in values.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)

    # The resumed run's own flags.
    saved = last["args"] if last else {}
    answer_changes(args, saved)
    if args.epochs:
        args.steps = 0  # overrules the steps of all layers
    fill(**saved)
    # Of --init: its size, its images, and how they were used.
    if start:
        config, _, ckpt = start
        for name, size in SIZES.items():
            if size.width == config.width:
                fill(size=name)
        before = ckpt.get("args", {})
        fill(**{k: before[k] for k in ("data", "holdout", "mirror") if k in before})
    # The recipe of this size and stage.
    fill(size="XS", refs=4, only_decoder=False)
    stage = "MRAR" if args.refs > 1 else "512 px" if args.only_decoder else "1-step"
    fill(**RECIPES.get(f"{args.size} {stage}", RECIPES[stage]))
    # What depends on the machine, and the rest.
    cuda = device.type == "cuda"
    fill(dtype=pick_dtype(None, device), compile=cuda, workers=4 if cuda else 0)
    fill(data=str(DEMO_DATA) if args.size == "XS" else "latents")
    fill(t="logit-normal", chains="images", seed=0, holdout=0.0, mirror=True, log_every=50)


def answer_changes(args, saved):
    """Refuse flags that would make the resumed run another one; print the other changes."""
    fixed = "size refs chains seed batch_size holdout mirror only_decoder".split()
    for name, old in saved.items():
        new = getattr(args, name, None)
        if new not in (None, old) and name != "data":  # `build` compares the images
            change = f"{name} {old} there, {new} here"
            if name in fixed:
                raise UserError(f"{args.out}/last.pt is of another run: {change}")
            say(f"{args.out}: {change}; the rest of the run follows the new value")


def open_cache(args, start, device):
    """The cache at --data; images are encoded first, into a cache beside OUT named after them."""
    path = Path(args.data)
    if (path / "settings.json").exists() or not path.exists():
        if args.vae and path.exists():
            raise UserError(f"--data {path}: is a cache; leave out --vae")
        digest = LatentCache(path).info["vae_digest"]
    else:
        images, vae = open_images(args.data, args.vae, device)
        digest = vae.digest
        cache_id = sha256_prefix((images.digest + digest).encode())
        path = Path(args.out).parent / f"latents-{path.stem}-{images.shape[0]}-{cache_id}"
    if start and start[2].get("vae_digest", digest) != digest:
        raise UserError(f"--init {args.init}: was trained on the latents of another VAE")
    if not (path / "cache.json").exists():
        encode_images(images, vae, path, args.workers, device)
    say(f"latents from {path}, of {time.ctime((path / 'cache.json').stat().st_mtime)}")
    args.data = str(path)
    return LatentCache(path)


def build(args, cache, last, start, device, model_class):
    """(model, ema, optimizer): new, from --init, or as last.pt has them."""
    channels, size, _ = cache.latent_shape
    config = dataclasses.replace(
        SIZES[args.size],
        refs=args.refs,
        num_classes=len(cache.classes),
        latent_channels=channels,
        latent_size=size,
    )
    torch.manual_seed(args.seed)
    model = model_class(config)
    if args.size == "XS":
        # In scale AR the references show the image itself, so the null class sees them too.
        model.sampling.update(XS_SAMPLING, null_refs=args.chains == "scales")
    if last:
        if not cache.info.items() <= last.items():
            raise UserError(f"{args.out}/last.pt is of other images than {cache.path} has")
        model.load_state_dict(last["model"])
    elif start:
        warm_start(model, start, cache.classes, args.init)
    model.to(device).requires_grad_(not args.only_decoder)
    model.decoder.requires_grad_()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, args.lr)
    if last:
        ema.load_state_dict(last["model_ema"])
        optimizer.load_state_dict(last["optimizer"])
    return model, ema, optimizer


@torch.no_grad()
def warm_start(model, start, classes, path):
    """Fill `model` from the EMA weights of a checkpoint.

    The release copies raw weights into the model and EMA weights into the EMA.
    1-step -> MRAR: the mask embedding is copied into each mask token, positions are kept, the
    reference projection is new. 256 -> 512 px: the decoder's positions are interpolated. Other
    classes: rows of the class embedding are matched by name, and one line says which are new.
    """
    old, state, ckpt = start
    new = model.config
    if old.refs == 1 and new.refs > 1:
        state["ar.mask_tokens"] = state["ar.mask_tokens"].expand(-1, new.tokens_per_image, -1)
        state.update({k: v for k, v in model.state_dict().items() if "reference_proj" in k})
    if old.latent_size != new.latent_size:
        grid = state["decoder.positions"].unflatten(1, (old.latent_size, -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new.latent_size, mode="bicubic", align_corners=False)
        state["decoder.positions"] = grid.flatten(2).transpose(1, 2)
    names = ckpt.get("classes", classes if old.num_classes == new.num_classes else [])
    if names != classes:
        rows = model.ar.class_embedding.weight.clone()
        for k, name in enumerate(classes):
            if name in names:
                rows[k] = state["ar.class_embedding.weight"][names.index(name)]
        state["ar.class_embedding.weight"] = rows
        unknown = [name for name in classes if name not in names]
        say(f"{path}: class embeddings matched by name; new: {shorten(unknown)}")
    with user_file(path, "start of this model"):
        model.load_state_dict(state)


def parallelize(model, args):
    """The model to call in the loop: compiled and wrapped for DDP, where wanted."""
    if args.compile:
        # Block by block: only two graphs to compile, and DDP reduces the gradients of one block
        # while the backward pass of the earlier ones still runs.
        torch._dynamo.config.optimize_ddp = False  # would split the graphs at DDP's buckets
        for block in [*model.ar.blocks, *model.decoder.blocks]:
            block.compile()
    if WORLD > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def memory_per_chain(config, batch_mul, only_decoder=False):
    """Bytes of activations that one chain keeps for the backward pass (tests/README.md)."""
    dit = 73 * config.dit_depth * config.refs * batch_mul * config.latent_size**2
    ar = 51 * config.ar_depth * (config.class_tokens + config.cond_tokens)
    return config.width * (dit if only_decoder else dit + ar)


def micro_batches_needed(config, args, num_params, memory):
    """Micro-batches per step: activations fill at most half of what weights leave of the GPU.

    memory  bytes of the GPU; 30 bytes per parameter hold weights, gradients, AdamW, EMA, buffers
    """
    local_batch = -(-args.batch_size // WORLD)
    room = (memory - 30 * num_params) / 2
    fitting = room / memory_per_chain(config, args.batch_mul, args.only_decoder)
    for n in range(1, local_batch):
        if local_batch % n == 0 and local_batch <= n * fitting:
            return n
    return local_batch


# -------------------------------------------------------------------------------- around the loop
COLUMNS = "step,epoch,loss,grad_norm,lr,images_per_second,memory_gb,holdout_loss"


class Run:
    """What stands around the loop: its length, the log, checkpoints, pictures. Rank 0 writes."""

    def __init__(self, args, cache, model, ema, optimizer, last, device):
        self.args = args
        self.cache = cache
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.device = device
        self.out = Path(args.out)
        last = last or dict(step=0, log=[])
        self.step = last["step"]
        self.rows = last["log"]
        self.chains, self.held_out = open_chains(args, cache)
        chains_per_epoch = self.chains.chains_per_epoch
        self.steps_per_epoch = chains_per_epoch / args.batch_size
        self.steps = args.steps or math.ceil(args.epochs * self.steps_per_epoch)
        if self.steps < self.step:
            raise UserError(f"--steps {self.steps}: this run has done {self.step} already")
        num_params = sum(p.numel() for p in model.parameters())
        self.accumulate = args.accumulate or 1
        if device.type == "cuda" and not args.accumulate:
            memory = torch.cuda.get_device_properties(device).total_memory
            self.accumulate = micro_batches_needed(model.config, args, num_params, memory)
        if args.batch_size % (WORLD * self.accumulate):
            raise UserError(
                f"--batch-size {args.batch_size}: must be a multiple of {WORLD} processes x "
                f"--accumulate {self.accumulate}"
            )
        if RANK == 0:
            lock(self.out)
            vae = (cache.path / "vae.pt").read_bytes()  # beside ema.pt, for sample.py
            atomic_write(self.out / "vae.pt", lambda f: f.write(vae))
        say(f"TransDiff-{args.size}: {num_params:,} parameters on {WORLD} x {device.type}")
        images = chains_per_epoch * self.chains.refs
        say(
            f"{self.steps / self.steps_per_epoch:.1f} epochs of {chains_per_epoch:,} chains from "
            f"{images:,} images of {len(cache.classes)} classes, in {args.dtype}"
        )
        say(
            f"{self.steps} steps of {args.batch_size} chains of {args.refs} in {self.accumulate} "
            f"micro-batches, from step {self.step}"
        )
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=RANK > 0)
        self.losses = []  # since the last row of the log
        self.started = self.saved = time.time()

    def latents(self, moments):
        """Latents [B, refs, C, H, W], on the device, of a batch of moments."""
        x = sample_posterior(moments.to(self.device, non_blocking=True)) * self.cache.scale
        return growing_scales(x) if self.args.chains == "scales" else x

    def due(self, every):
        """Whether this is one of every so many steps, or the last; 0 and None: never."""
        return every and (self.step % every == 0 or self.step == self.steps)

    def after_step(self, loss, grad_norm, lr):
        """Count the step; rank 0 logs, saves and draws samples where it is time to."""
        args = self.args
        self.step += 1
        if RANK > 0:
            return
        self.losses.append(loss)
        self.bar.update()
        sample = self.due(args.sample_every)
        if sample or self.due(args.log_every):
            self.log(grad_norm, lr, sample)
        late = time.time() - self.saved > 15 * 60
        if late or self.due(args.save_every) or self.due(args.keep_every):
            self.save()
        if sample:
            self.draw_samples()
        if not self.losses:  # a row was written; saving and drawing do not count
            self.started = time.time()

    def log(self, grad_norm, lr, sample):
        """Add a row to log.csv: the mean loss of rank 0 since the last row; with samples also the
        held-out loss."""
        loss = torch.stack(self.losses).mean().item()
        rate = len(self.losses) / (time.time() - self.started)  # steps per second
        images_per_second = rate * self.args.batch_size * self.args.refs
        memory = torch.cuda.max_memory_allocated() / 1e9  # 0 without a GPU
        holdout = self.holdout_loss() if sample and self.held_out.chains_per_epoch else math.nan
        row = [self.step, self.step / self.steps_per_epoch, loss, grad_norm.item(), lr]
        row += [images_per_second, memory, holdout]
        self.rows.append(",".join(f"{x:.7g}" for x in row).replace("nan", ""))
        text = "\n".join([COLUMNS, *self.rows, ""])
        atomic_write(self.out / "log.csv", lambda f: f.write(text.encode()))
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, {images_per_second:.0f} images/s, {memory:.1f} GB"
        )
        self.losses.clear()

    @torch.no_grad()
    def holdout_loss(self):
        """Loss of the EMA weights on about 512 held-out images, always with the same draws."""
        torch.manual_seed(0)
        moments, labels = self.held_out[0]
        with autocast(self.device, self.args.dtype):
            loss = self.ema.loss(
                self.latents(moments), labels.to(self.device), t_distribution=self.args.t
            )
        return loss.item()

    def save(self):
        """Write ema.pt, last.pt and, to keep, ema-STEP.pt."""
        info = dict(
            self.cache.info,
            config=dataclasses.asdict(self.model.config),
            sampling=self.model.sampling,
            step=self.step,
            chains=self.args.chains,
            empty=self.chains.empty.tolist(),
        )
        weights = {k: v.half() for k, v in self.ema.state_dict().items()}
        ema = dict(info, model=weights)
        atomic_write(self.out / "ema.pt", lambda f: torch.save(ema, f))
        if self.due(self.args.keep_every):
            shutil.copy(self.out / "ema.pt", self.out / f"ema-{self.step:07d}.pt")
        here = "out resume init vae device compile workers".split()
        flags = {k: v for k, v in vars(self.args).items() if k not in here}
        last = dict(
            info,
            model=self.model.state_dict(),
            model_ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            args=flags,
            log=self.rows,
        )
        atomic_write(self.out / "last.pt", lambda f: torch.save(last, f))
        self.saved = time.time()

    def draw_samples(self):
        """Draw four images of each of the first ten classes with the EMA weights."""
        classes = np.setdiff1d(range(self.model.config.num_classes), self.chains.empty)[:10]
        labels = torch.tensor(classes, device=self.device).repeat_interleave(4)
        torch.manual_seed(self.args.seed)
        vae = load_vae(self.out / "vae.pt", self.device)
        with autocast(self.device, self.args.dtype):
            chain = self.ema.sample(labels)
        images = latents_to_images(vae, chain[:, -1].unflatten(0, (-1, 4)))  # a class per row
        path = self.out / f"samples-{self.step:07d}.png"
        save_grid(images, path)
        tqdm.write(f"wrote {path}")

    def finish(self):
        self.bar.close()
        say(f"complete at step {self.step}; to draw: python sample.py --ckpt {self.out}")
        if WORLD > 1:  # leave together: rank 0 may still be writing
            dist.barrier()
            dist.destroy_process_group()


# -------------------------------------------------------------------------------- command line
def training_parser(doc, out, recipes):
    lines = ["defaults:"]
    for name in recipes:
        values = [f"{k.replace('_', '-')} {v:g}" for k, v in RECIPES[name].items()]
        lines.append(f"  {name}: {', '.join(values)}")
    parser = make_parser(doc)
    parser.epilog = "\n".join(lines)
    add = parser.add_argument
    add("--size", choices=SIZES, help="of the model (default: that of --init, else XS)")
    add(
        "--data",
        help="latent cache, or images to encode first (default: those of --init; else for XS the "
        "bundled images, for other sizes ./latents)",
    )
    add(
        "--vae",
        help="VAE that encodes images; kl16: the released (default: the bundled, for its images)",
    )
    add(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="train mirror images too; not for letters, digits, left and right "
        "(default: as in --init, else yes)",
    )
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue from OUT/last.pt with the flags of its run")
    counts = {
        "steps": "length of the run in optimiser steps",
        "epochs": "length of the run in passes over the images; overrules --steps",
        "batch-size": "chains (1-step: images) per step, over all processes",
        "accumulate": "micro-batches per step on each process (default: what a GPU's memory needs)",
        "batch-mul": "draws of (t, noise) per image",
        "save-every": "steps between checkpoints; one is also written 15 minutes after the last",
        "keep-every": "steps between checkpoints to keep as OUT/ema-STEP.pt",
        "log-every": "steps between rows of log.csv (default: 50)",
    }
    fractions = {
        "warmup": "first part of the run, 0 to 1: the learning rate rises",
        "cooldown": "last part of the run, 0 to 1: it falls to 0",
        "ema": "decay of the EMA weights per step, 0 to 1",
        "holdout": "part of the images to keep out, 0 to 1; their loss is logged with each picture "
        "(default: as in --init, else 0)",
    }
    for name, text in counts.items():
        add(f"--{name}", type=bounded(int, 1), help=text)
    for name, text in fractions.items():
        add(f"--{name}", type=bounded(float, 0, 1), help=text)
    add("--lr", type=bounded(float, 0), help="peak learning rate; scale it with the batch size")
    add(
        "--t",
        choices=["logit-normal", "uniform"],
        help="distribution of t: the release's (default), or Eq. 5's",
    )
    add("--seed", type=bounded(int, 0), help="of weights, data order and every draw (default: 0)")
    add("--sample-every", type=bounded(int, 0), help="steps between pictures; 0 for none")
    add("--workers", type=bounded(int, 0), help="processes that read data (default: 4 on CUDA)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where it is fast)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    return parser


def main(model_class=TransDiff):
    parser = training_parser(__doc__, "runs/train", ("XS 1-step", "1-step", "512 px"))
    parser.add_argument("--init", help="checkpoint or run whose EMA weights to start from")
    parser.add_argument(
        "--only-decoder", action="store_true", default=None, help="the 512 px recipe"
    )
    parser.set_defaults(refs=1)
    train(parser.parse_args(), model_class)


if __name__ == "__main__":
    run_main(main)
