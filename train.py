"""Stage 1: train TransDiff, 1-step AR, on a latent cache (Section 3.2.1; recipe of Appendix B).

    python train.py                                       the XS demo on the bundled images
    torchrun --nproc_per_node 8 train.py --size B --out runs/B    the paper's recipe on ./latents

A run writes OUT/last.pt (all that --resume needs beside the cache), OUT/ema.pt (EMA weights in
float16) and OUT/vae.pt for sample.py, OUT/log.csv and pictures of samples. finetune_mrar.py, stage
2, runs this same loop on chains of images.

Read `train` first: it is the whole stage, from the latents to the last checkpoint.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import RANK, RELEASED, SIZES, WORLD, Config, Sampling, TransDiff, UserError, atomic_write
from model import autocast, bounded, checkpoint_path, derive_seed, draw_t, load_file, lock
from model import make_parser, pick_device, pick_dtype, read_checkpoint, run_main, say
from model import sha256_prefix, shorten, user_file
from vae import DEMO_DATA, LatentCache, encode_once, latents_to_images, load_vae, save_grid

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# Default values of the flags with these names. Sources: epochs, lr, batch size: Appendix B; ema,
# warmup, batch_mul, "only decoder" (512 px): the release; the rest is ours. warmup is a fraction of
# the run: 1/8 of 800 epochs is the release's 100. batch_size counts chains, also in MRAR, where the
# paper does not say what it counts.
PAPER = dict(batch_size=2048, ema=0.9999, cooldown=0.0, save_every=1_000)
OURS = dict(warmup=1 / 16, cooldown=1 / 2, ema=0.998, save_every=100)
MANY_IMAGES = 200_000  # from here on the paper's recipe, else one for fewer images
RECIPES = {
    "1-step": dict(PAPER, epochs=800, lr=8e-4, warmup=1 / 8, batch_mul=4),
    # The release keeps its weights in bf16 here, which rounds away most of the small updates:
    # another lr may suit float32.
    "MRAR": dict(PAPER, epochs=40, lr=5e-5, warmup=1 / 4, batch_mul=2),
    "only decoder": dict(PAPER, epochs=150, lr=1e-4, warmup=1 / 15, batch_mul=4, ema=0.999),
    # Fewer images. batch_size counts images, not chains. "later": MRAR, or a run from --init.
    # Steps: as many as the epochs need, at least `steps`. lr is that of S.
    "few": dict(OURS, steps=5000, epochs=400, lr=1e-3, batch_mul=4, batch_size=256),
    "few, later": dict(OURS, steps=500, epochs=40, lr=2.5e-4, batch_mul=2, batch_size=256),
    "XS": dict(OURS, steps=1600, epochs=10, lr=2e-3, batch_mul=1, batch_size=64),
    "XS, later": dict(OURS, steps=500, epochs=3, lr=1e-3, batch_mul=1, batch_size=64),
}
# Of XS, and of models of fewer images; the others have the released settings.
OUR_SAMPLING = Sampling("adams-bashforth", steps=8, cfg=2.25, null_refs=False, s1=1.0, s2=1.0)
WEIGHT_DECAY = 0.02  # Appendix B
CLIP = 3.0  # norm of the gradient; the release
COLUMNS = "step,epoch,loss,grad_norm,lr,images_per_second,memory_gb,holdout_loss,seen_loss"


# -------------------------------------------------------------------------------- chains of images
def split(cache, holdout):
    """(indices to train on, indices held out) of a cache: by a hash of each image's name, so that
    an image stays on its side when others are added."""
    readable = cache.labels >= 0  # -1: the image could not be read
    held_out = np.zeros_like(readable)
    if holdout:
        hashes = [int(sha256_prefix(ascii(name).encode()), 16) for name in cache.names()]
        held_out = np.array([h < holdout * 2**64 for h in hashes])
    return np.flatnonzero(readable & ~held_out), np.flatnonzero(readable & held_out)


@dataclasses.dataclass(eq=False)  # hashable, for lru_cache
class Chains(Dataset):
    """Item s is the batch of step s, chains of `refs` images of a class.

    An epoch uses each image at most once: images and chains are shuffled anew, and the images of a
    class that do not fill a chain are left out. The epochs follow each other as one list of chains.
    Step s takes chains s B to (s + 1) B - 1; each process takes an equal part. The seed,
    the step and the rank determine an item, so a run can resume at any step.

    Given the class, the images of a random chain are independent, so the best condition is the
    same for all of them: references tell nothing that the class does not. The paper (Section 3.2.2)
    expects them to help. For chains in which they can, see `growing_scales` and `read_chains`.
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
        # Classes that fill no chain.
        self.empty = np.setdiff1d(range(len(self.cache.classes)), self.cache.labels[chains])

    @functools.lru_cache(2)
    def epoch_order(self, epoch):
        """Chains of one epoch: image indices [chains, refs]."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.listed is not None:
            return rng.permutation(self.listed)
        images = rng.permutation(self.images)
        labels = self.cache.labels[images]
        chains = [np.empty((0, self.refs), int)]
        for label in np.unique(labels):
            members = images[labels == label]
            count = len(members) // self.refs
            chains.append(members[: count * self.refs].reshape(count, self.refs))
        return rng.permutation(np.concatenate(chains))

    def indices(self, step):
        """Image indices [b, refs] of this process's part of a step."""
        local_batch = self.batch_size // self.world
        first = step * self.batch_size + self.rank * local_batch
        chains = range(first, first + local_batch)
        n = self.chains_per_epoch
        return np.stack([self.epoch_order(i // n)[i % n] for i in chains])

    def __getitem__(self, step):
        """Moments, the VAE's mean and log-variance, float16 [b, refs, 2 C, h, w]; labels [b].

        Arrays travel from the workers through a pipe, tensors would through shared memory, of which
        a container may have next to none.
        """
        indices = self.indices(step)
        rng = np.random.default_rng((self.seed, step, self.rank))
        flips = rng.integers(0, 2 if self.mirror else 1, indices.shape)
        return self.cache.moments(indices, flips), self.cache.labels[indices[:, 0]]


def read_chains(path, cache, images, refs):
    """Image indices [chains, refs] of a list in the release's format.

    A line is {"cate": a class folder, "files": [names of its files]}; suffixes are not compared.

    cache   its names are CLASS/FILE, of an .npz CLASS/NUMBER
    images  indices of those to use; chains with others are left out
    refs    images in each chain
    """
    with user_file(path, "list of chains"):
        lines = Path(path).read_text().strip().split("\n")
    names = cache.names()
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


# -------------------------------------------------------------------------------- one step
def learning_rate(step, steps, lr, warmup, cooldown):
    """Linear warm-up over the first `warmup` part of the run, linear decay over the last
    `cooldown`; the paper mentions neither."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, cooldown * steps)
    return lr * min(1.0, rise, fall)


def make_optimizer(model, lr):
    """AdamW; as in the release, no weight decay in the decoder, nor on biases and norms. The paper
    says 0.02 and no more."""
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
def train(args, last=None, init=None, model_class=TransDiff):
    """Train a model.

    args         the flags, as `parse` returns them: --data is a latent cache
    last         contents of last.pt, of a run to resume
    init         Checkpoint whose weights to start from
    model_class  called with a Config
    """
    # -------- latents, and chains of them
    cache = LatentCache(args.data)
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    amp = autocast(device, args.dtype)
    out = Path(args.out)
    train_images, test_images = split(cache, args.holdout)
    read = args.refs  # images read for a chain
    listed = None
    if args.chains == "scales":
        read = 1  # `growing_scales` makes a chain of it
    elif args.chains != "images":
        listed = read_chains(args.chains, cache, train_images, read)
    chains = Chains(
        cache, train_images, read, args.batch_size, args.seed, args.mirror, RANK, WORLD, listed
    )
    # To evaluate: 512 held-out and 512 training images, in random chains even with --chains FILE.
    fixed = dict(refs=read, batch_size=512 // args.refs, seed=0, mirror=args.mirror)
    held_out = Chains(cache, test_images, **fixed)
    seen = Chains(cache, train_images, **fixed)
    if not chains.chains_per_epoch:
        raise UserError(
            f"--data {args.data}: no class has {read} images to train on (--holdout {args.holdout})"
        )
    empty = [cache.classes[k] for k in chains.empty]
    if empty:
        missing = "images" if read == 1 else f"chain of {read}"
        say(f"{len(empty)} of {len(cache.classes)} classes have no {missing}: {shorten(empty)}")
    steps_per_epoch = chains.chains_per_epoch / args.batch_size
    steps = args.steps or math.ceil(args.epochs * steps_per_epoch)

    # -------- model, EMA, optimizer: new, from --init, or as last.pt has them
    channels, latent_size, _ = cache.latent_shape
    data = dict(num_classes=len(cache.classes), latent_channels=channels, latent_size=latent_size)
    if last:
        config = Config(**last["config"])
    elif init:
        config = dataclasses.replace(init.config, refs=args.refs, **data)
    else:  # c has a token per position of the latents, at most as many as the size has
        size = SIZES[args.size]
        tokens = min(size.cond_tokens, latent_size**2)
        data.update(cond_tokens=tokens, class_tokens=tokens // 4)
        config = dataclasses.replace(size, refs=args.refs, **data)
    torch.manual_seed(args.seed)
    model = model_class(config)
    if args.size == "XS" or len(cache.labels) < MANY_IMAGES:
        model.sampling = OUR_SAMPLING
    if args.chains == "scales":
        # The references show the image itself, so the null class sees them too.
        model.sampling = model.sampling.replace(null_refs=True)
    if init:
        warm_start(model, init, cache.classes)
    model.to(device).requires_grad_(not args.only_decoder)
    model.decoder.requires_grad_()  # trained in any case
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, args.lr)
    first_step = 0
    log = []
    if last:
        if not cache.info.items() <= last.items():  # not a subset: an entry differs
            raise UserError(f"{out}/last.pt was trained on other images than {cache.path} has")
        model.load_state_dict(last["model"])
        ema.load_state_dict(last["model_ema"])
        optimizer.load_state_dict(last["optimizer"])
        first_step = last["step"]
        log = last["log"]
    if steps < first_step:
        raise UserError(f"--steps {steps}: this run has done {first_step} already")

    # -------- micro-batches: as many as the memory needs
    num_params = sum(p.numel() for p in model.parameters())
    accumulate = args.accumulate
    if not accumulate:
        chain_bytes = memory_per_chain(config, args.batch_mul, args.only_decoder)
        memory = memory_of(device)
        if 30 * num_params + chain_bytes > memory:
            raise UserError(
                f"--size {args.size}: chains of {args.refs} need "
                f"{(30 * num_params + chain_bytes) / 1e9:.0f} GB of memory, {device} has "
                f"{memory / 1e9:.0f}; a smaller --size, fewer --refs or smaller images fit; "
                "--accumulate N starts all the same"
            )
        accumulate = micro_batches_needed(args.batch_size, chain_bytes, num_params, memory)
    micro_batch, rest = divmod(args.batch_size, WORLD * accumulate)
    if rest:
        raise UserError(
            f"--batch-size {args.batch_size}: must be a multiple of {WORLD} processes x "
            f"--accumulate {accumulate}"
        )

    # -------- stored in every checkpoint
    not_saved = "out resume init vae device compile workers".split()
    counts = np.bincount(cache.labels[cache.labels >= 0], minlength=len(cache.classes))
    counts[chains.empty] = 0
    info = dict(
        cache.info,
        config=vars(config),
        sampling=vars(model.sampling),
        chains=args.chains,
        counts=counts.tolist(),
        args={k: v for k, v in vars(args).items() if k not in not_saved},
    )
    if RANK == 0:
        lock_file = lock(out)  # noqa: F841 - until this function returns
        vae_bytes = (cache.path / "vae.pt").read_bytes()  # beside ema.pt, for sample.py
        atomic_write(out / "vae.pt", lambda f: f.write(vae_bytes))

    say(f"TransDiff-{args.size}: {num_params:,} parameters on {WORLD} x {device.type}")
    say(
        f"{steps / steps_per_epoch:.1f} epochs of {chains.chains_per_epoch:,} chains from "
        f"{chains.chains_per_epoch * read:,} images of {len(cache.classes)} classes, "
        f"{len(test_images):,} held out, in {args.dtype}"
    )
    say(
        f"{steps} steps of {args.batch_size} chains of {args.refs} in {accumulate} micro-batches, "
        f"from step {first_step}"
    )
    rate = learning_rate(first_step, steps, args.lr, args.warmup, args.cooldown)
    was = f", was {optimizer.param_groups[0]['lr']:.2g}" if last else ""
    say(
        f"learning rate {rate:.2g}{was}, peak {args.lr:.3g}, warm-up {args.warmup:.3g}, cool-down "
        f"{args.cooldown:.3g} of the run; EMA {args.ema:g}; batch_mul {args.batch_mul}"
    )

    # -------- the loop
    batches = DataLoader(
        chains,
        batch_size=None,  # an item is a batch
        sampler=range(first_step, steps),
        num_workers=args.workers,
        collate_fn=tuple,  # the default would make tensors
    )
    batches = iter(batches)  # forks the workers, which use no GPU: before NCCL starts
    if WORLD > 1:  # the time-out: rank 0 may draw, or write a large checkpoint
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(minutes=30),
            device_id=device if on_gpu else None,
        )
    forward = parallelize(model, args.compile)
    evaluate_every = args.sample_every or max(1, min(10_000, steps // 10))
    bar = tqdm(batches, total=steps, initial=first_step, unit="step", disable=RANK > 0)
    losses = []  # since the last row of the log
    started = saved = time.monotonic()

    for step, (moments, labels) in enumerate(bar, first_step):
        # Seeds the posterior, dropped labels, t, noise and dropout. A resumed run draws the same,
        # given as many processes and micro-batches.
        torch.manual_seed(derive_seed(args.seed, step, RANK))
        lr = learning_rate(step, steps, args.lr, args.warmup, args.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = lr
        moments = torch.from_numpy(moments).split(micro_batch)
        labels = torch.from_numpy(labels).split(micro_batch)
        mean_loss = 0.0
        for i, (m, y) in enumerate(zip(moments, labels)):
            # DDP averages the gradients over the processes in the last micro-batch alone.
            forward.require_backward_grad_sync = i == accumulate - 1
            latents = cache.latents(m, device, args.chains)
            y = y.to(device, non_blocking=True)
            with amp:  # forward is TransDiff.loss
                loss = forward(latents, y, batch_mul=args.batch_mul, t_distribution=args.t)
            (loss / accumulate).backward()
            mean_loss += loss.detach() / accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not grad_norm.isfinite():
            raise UserError(
                f"the gradient of step {step + 1} is not finite; --resume with a smaller --lr, or "
                "start anew if there is no checkpoint yet"
            )
        optimizer.step()
        optimizer.zero_grad()
        # EMA warm-up, anew in each stage: 0.99 is reached at step 890; XS, 1,600 steps, ends at
        # 0.994. The release's decay is constant.
        update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))
        if RANK > 0:
            continue

        # -------- log, save, draw: rank 0
        done = step + 1
        losses.append(mean_loss)
        evaluate = is_due(evaluate_every, done, steps)
        if evaluate or is_due(args.log_every, done, steps):
            loss = torch.stack(losses).mean().item()  # of rank 0
            seconds = time.monotonic() - started
            speed = len(losses) * args.batch_size * args.refs / seconds  # images per second
            memory = torch.cuda.max_memory_allocated() / 1e9  # 0 without a GPU
            row = [done, done / steps_per_epoch, loss, grad_norm.item(), lr, speed, memory]
            for part in (held_out, seen):
                evaluated = evaluate and held_out.chains_per_epoch
                how = (args.chains, args.t, micro_batch, amp, device)
                row.append(ema_loss(ema, part, *how) if evaluated else math.nan)
            log.append(",".join(f"{x:.7g}" for x in row).replace("nan", ""))
            text = "\n".join([COLUMNS, *log, ""])
            atomic_write(out / "log.csv", lambda f: f.write(text.encode()))
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, {memory:.1f} GB")
            losses.clear()
        keep = is_due(args.keep_every, done, steps)
        late = time.monotonic() - saved > 15 * 60
        if late or keep or is_due(args.save_every, done, steps):
            save(out, dict(info, step=done), model, ema, optimizer, log)
            if keep:
                shutil.copy(out / "ema.pt", out / f"ema-{done:07d}.pt")
            saved = time.monotonic()
        if evaluate and args.sample_every != 0:
            draw_samples(ema, out, done, counts, cache.classes, args.seed, amp, device)
        if not losses:  # a row was written: saving and drawing since do not count
            started = time.monotonic()

    say(f"complete at step {steps}; to draw: python sample.py --ckpt {out}")
    if WORLD > 1:  # leave together: rank 0 may still be writing
        dist.barrier()
        dist.destroy_process_group()


# -------------------------------------------------------------------------------- before the loop
@torch.no_grad()
def warm_start(model, init, classes):
    """Fill `model` from the EMA weights of a Checkpoint; the release copies raw weights into the
    model and EMA weights into the EMA.

    1-step -> MRAR: the mask embedding is copied into each mask token, positions are kept, the
    reference projection is new. 256 -> 512 px: the decoder's positions are interpolated. Other
    classes: rows of the class embedding are matched by name, and one line says which are new.
    """
    old = init.config
    new = model.config
    state = dict(init.weights)
    if old.refs == 1 and new.refs > 1:
        state["ar.mask_tokens"] = state["ar.mask_tokens"].expand(-1, new.tokens_per_image, -1)
        state.update({k: v for k, v in model.state_dict().items() if "reference_proj" in k})
    if old.latent_size != new.latent_size:
        grid = state["decoder.positions"].unflatten(1, (old.latent_size, -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new.latent_size, mode="bicubic", align_corners=False)
        state["decoder.positions"] = grid.flatten(2).transpose(1, 2)
    # A file without names (the release's): the same classes, if there are as many.
    names = init.entries.get("classes", classes if old.num_classes == new.num_classes else [])
    if names != classes:
        rows = model.ar.class_embedding.weight.clone()
        for k, name in enumerate(classes):
            if name in names:
                rows[k] = state["ar.class_embedding.weight"][names.index(name)]
        state["ar.class_embedding.weight"] = rows
        unknown = [name for name in classes if name not in names]
        say(f"{init.path}: class embeddings matched by name; new: {shorten(unknown)}")
    with user_file(init.path, "start of this model"):
        model.load_state_dict(state)


def parallelize(model, use_compile):
    """The model to call in the loop: compiled and wrapped for DDP, where wanted."""
    if use_compile:
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


def memory_of(device):
    """Bytes of memory of a GPU; of a CPU, of the machine, shared by its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def micro_batches_needed(batch_size, chain_bytes, num_params, memory):
    """Micro-batches per step: activations may fill half of the memory that weights leave free.

    memory  bytes of the device; 30 per parameter hold weights, gradients, AdamW, EMA, buffers
    """
    local_batch = -(-batch_size // WORLD)
    fitting = (memory - 30 * num_params) / 2 / chain_bytes
    for n in range(1, local_batch):
        if local_batch % n == 0 and local_batch <= n * fitting:
            return n
    return local_batch


# -------------------------------------------------------------------------------- in the loop
def is_due(every, step, steps):
    """Whether this step is one of every so many, or the last; 0 and None: never."""
    return every and (step % every == 0 or step == steps)


@torch.no_grad()
def ema_loss(ema, images, chains, t_distribution, micro_batch, amp, device):
    """Loss of the EMA weights on 512 of the `images` (scales: 128 at 4 scales), always the same
    ones and the same draws.

    micro_batch  chains at once: as many as in training
    """
    torch.manual_seed(0)
    moments, labels = map(torch.from_numpy, images[0])
    latents = images.cache.latents(moments, device, chains)
    t = draw_t(latents.shape[:2], t_distribution, device)
    noise = torch.randn_like(latents)
    total = 0.0
    parts = (x.split(micro_batch) for x in (latents, labels.to(device), t, noise))
    for x, y, t, eps in zip(*parts):
        with amp:
            total += len(y) * ema.loss(x, y, t, eps)
    return total.item() / len(labels)


def save(out, info, model, ema, optimizer, log):
    """Write ema.pt, for sample.py, and last.pt, for --resume; info: what both have."""
    weights = {k: v.half() for k, v in ema.state_dict().items()}
    last = dict(
        info,
        model=model.state_dict(),
        model_ema=ema.state_dict(),
        optimizer=optimizer.state_dict(),
        log=log,
    )
    atomic_write(out / "ema.pt", lambda f: torch.save(dict(info, model=weights), f))
    atomic_write(out / "last.pt", lambda f: torch.save(last, f))


def draw_samples(ema, out, step, counts, names, seed, amp, device):
    """Draw four images of each of the first ten classes that have images, a class per row."""
    classes = np.flatnonzero(counts)[:10]
    labels = torch.tensor(classes, device=device).repeat_interleave(4)
    torch.manual_seed(seed)
    vae = load_vae(out / "vae.pt", device)
    with amp:
        chain = ema.sample(labels)
    images = latents_to_images(vae, chain[:, -1].unflatten(0, (-1, 4)))
    path = out / f"samples-{step:07d}.png"
    save_grid(images, path)
    tqdm.write(f"wrote {path}: {', '.join(names[k] for k in classes)}")


# -------------------------------------------------------------------------------- command line
def training_parser(doc, out):
    """Parser with the flags of both stages; `parse` adds the defaults that depend on the run."""
    parser = make_parser(doc, torchrun=True)
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()

    def number(name, kind, text, add=add):
        add(name, type=kind, help=f"{text} (default: %(default)s)")

    count = bounded(int, 1)
    fraction = bounded(float, 0, 1)
    # What to train, on what, from where.
    add("--size", choices=SIZES, help="of the model (default: %(default)s)")
    add("--data", help="latent cache, or images to encode first (default: %(default)s)")
    add(
        "--vae",
        help="VAE that encodes images; kl16: the released (default: the bundled, for its images)",
    )
    add(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train mirror images too; not for letters, digits, left and right",
    )
    number(
        "--holdout",
        fraction,
        "part of the images to keep out, 0 to 1; log.csv has the EMA weights' loss on 512 of "
        "them and on 512 trained on: compare these two, not the training loss",
    )
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue from OUT/last.pt with the flags of its run")
    # The recipe.
    number("--steps", count, "length of the run in optimiser steps", length.add_argument)
    number("--epochs", count, "length of the run in passes over the images", length.add_argument)
    number("--batch-size", count, "chains (1-step: images) per step, over all processes")
    number("--batch-mul", count, "draws of (t, noise) per image")
    number("--lr", bounded(float, 0), "peak learning rate; scale it with the batch size")
    number("--warmup", fraction, "first part of the run, 0 to 1: the learning rate rises")
    number("--cooldown", fraction, "last part of the run, 0 to 1: it falls to 0")
    number("--ema", fraction, "decay of the EMA weights per step, 0 to 1")
    add(
        "--t",
        choices=["logit-normal", "uniform"],
        help="distribution of t: the release's (default), or Eq. 5's",
    )
    number("--seed", bounded(int, 0), "of weights, data order and every draw")
    # What is written, and when.
    number("--log-every", count, "steps between rows of log.csv")
    number(
        "--save-every",
        count,
        "steps between checkpoints; one is also written 15 minutes after the last",
    )
    number("--keep-every", count, "steps between checkpoints to keep as OUT/ema-STEP.pt")
    add(
        "--sample-every",
        type=bounded(int, 0),
        help="steps between pictures and held-out losses; 0: no pictures (default: a tenth of the "
        "run, at most 10,000)",
    )
    # The machine.
    number("--accumulate", count, "micro-batches per step on each process; None: by the memory")
    number("--workers", bounded(int, 0), "processes that read data")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile")
    return parser


# Fixed on --resume: changing them would make it a different run.
FIXED = "size refs chains seed batch_size holdout mirror only_decoder".split()


def recipe(stage, init, size, width, refs, num_images, batch_size):
    """Default values of flags, from RECIPES, for a stage of a model on so many images.

    init        whether it starts from a trained model
    batch_size  the flag, or None
    """
    if size != "XS" and num_images >= MANY_IMAGES:
        return RECIPES[stage]
    name = "XS" if size == "XS" else "few"
    flags = dict(RECIPES[f"{name}, later" if init or stage != "1-step" else name])
    flags["batch_size"] //= refs
    epochs = flags.pop("epochs")
    steps = epochs * num_images // (refs * (batch_size or flags["batch_size"]))
    flags["steps"] = max(flags["steps"], steps)
    if name == "few":
        flags["lr"] *= 384 / width
    return flags


def parse(parser):
    """(flags, contents of the last.pt of --resume, Checkpoint of --init).

    Precedence of a flag: typed; the resumed run; --init (size, data, holdout, mirror); the recipe.
    --data becomes a latent cache: images are encoded first.
    """
    # First pass: the flags that decide the defaults of the others. Without -h: the second shows
    # them.
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    first = parser.parse_args(words)
    stage = "only decoder" if first.only_decoder else "MRAR" if first.refs > 1 else "1-step"
    device = pick_device(first.device)
    on_gpu = device.type == "cuda"
    last_path = Path(first.out, "last.pt")
    last = init = None
    known = {}
    if first.resume and last_path.exists():
        last = load_file(last_path)
        known = last["args"]
    elif first.resume:
        say(f"--resume: there is no {last_path} yet: a new run")
    elif last_path.exists():
        raise UserError(f"{last_path} exists: --resume continues that run; else give another --out")
    elif first.only_decoder and not first.init:
        raise UserError("--only-decoder: give --init, a trained model; its AR Transformer is kept")
    elif first.chains == "scales" and first.refs != 4:
        raise UserError(f"--chains scales: has 4 images, not --refs {first.refs}")
    if first.init and not last and (first.init in RELEASED or os.path.exists(first.init)):
        init = read_checkpoint(checkpoint_path(first.init, "last.pt"))
        sizes = {config.width: name for name, config in SIZES.items()}
        known = {"size": sizes.get(init.config.width, "own")}
        if "config" in init.entries:  # ours
            flags = init.entries.get("args", {})
            known.update({k: flags[k] for k in ("size", "data", "holdout", "mirror") if k in flags})

    # The latent cache. The recipe depends on its images and on the side of its latents.
    defaults = dict(
        data=DEMO_DATA if first.size in (None, "XS") else "latents",
        workers=4 if on_gpu else 0,
        compile=on_gpu,
        seed=0,
        holdout=0.0,
        log_every=50,
        t="logit-normal",
    )
    data = first.data or known.get("data") or defaults["data"]
    num_images, side = (10**6 if first.size in ("B", "L", "H") else 0), 8
    if len(words) == len(sys.argv) - 1 or Path(data, "cache.json").exists():  # else --help alone
        if first.init and not init and not last:
            raise UserError(
                f"--init {first.init}: not there; run train.py first, name a model, or one of "
                f"{shorten(list(RELEASED))}"
            )
        workers = defaults["workers"] if first.workers is None else first.workers
        data = encode_once(data, first.vae, init, last_path.parent.parent, workers, device)
        cache = LatentCache(data)
        num_images, side = len(cache.labels), cache.latent_shape[-1]

    # The recipe.
    size = first.size or known.get("size") or ("XS" if side <= 8 else "S")
    width = init.config.width if init else SIZES.get(size, SIZES["S"]).width
    if init and first.size and SIZES[size].width != width:
        raise UserError(f"--size {size}: the model of --init has width {width}; leave out --size")
    defaults.update(recipe(stage, init, size, width, first.refs, num_images, first.batch_size))
    if first.epochs:
        defaults["steps"] = None
    defaults.update(size=size, dtype=pick_dtype(device, width))
    parser.set_defaults(**{**defaults, **known})
    args = parser.parse_args()

    if last:
        for name, old in last["args"].items():
            new = getattr(args, name, None)
            if name == "data" or new in (None, old):  # `train` compares the images
                continue
            change = f"{name} was {old}, now {new}"
            if name in FIXED:
                raise UserError(f"{last_path} is of another run: {change}")
            say(f"{args.out}: {change}; the rest of the run follows the new value")
    args.data = str(data)
    return args, last, init


def main(model_class=TransDiff):
    parser = training_parser(__doc__, "runs/train")
    parser.add_argument(
        "--init",
        help="start from the EMA weights of a checkpoint, of a run, or of a released model (B, L "
        "...); its size, data, holdout and mirror are the defaults",
    )
    parser.add_argument(
        "--only-decoder", action="store_true", help="keep the AR Transformer: the 512 px recipe"
    )
    parser.set_defaults(refs=1, chains="images")
    train(*parse(parser), model_class)


if __name__ == "__main__":
    run_main(main, "; --resume continues the run", "; raise --accumulate")
