"""Test what the paper claims, at the laptop's size, by the project's own commands run in this
process.

    python demo/claims.py                     all claims, seeds 0 1 2: many hours
    python demo/claims.py --rows mrar refs    some claims; --rows alone: only tables and pictures
    python demo/claims.py --quick             a smoke test of all claims

Writes claims.csv, one number per row, and pictures claims-*.png to demo/; with --quick or --out to
OUT, where the runs are. A command that was stopped resumes when repeated: what is there is not made
again. Prints, as Markdown, the verdicts (verdicts.py), then mean and standard deviation over seeds.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO, DEMO_MODEL, CrossAttention, TransDiff, adams_bashforth  # noqa: E402
from model import add_noise, atomic_write, autocast, bounded, cast_weights, draw_t  # noqa: E402
from model import load_checkpoint, load_file, make_parser, per_image_noise  # noqa: E402
from model import pick_device, pick_dtype, read_checkpoint, run_main, write_json  # noqa: E402
from vae import DEMO_DATA, DEMO_VAE, LatentCache, latents_to_images, load_vae  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import diversity  # noqa: E402
import fid  # noqa: E402
import finetune_mrar  # noqa: E402
import train  # noqa: E402
from curves import draw_curves, draw_similarity, draw_verdicts  # noqa: E402
from verdicts import by_claim, compare, markdown  # noqa: E402

CFG = 2  # guidance scale where it is not the question
CFG_BELOW = 0.65  # the part of t that `interval` guides
FULL = dict(
    data=DEMO_DATA,
    holdout=0.1,
    images=64,  # per step of training
    steps=1600,  # of stage 1
    keep=400,  # steps between the checkpoints of it that are sampled
    measured=100,  # steps between those whose features are compared
    rates=(2e-3, 1e-3),  # peak learning rates of it to compare
    tune=500,  # steps of stage 2, and of the control
    pictures=0,  # steps between pictures: none, but the held-out loss ten times
    num=1000,  # chains to measure
    few=500,  # chains to measure where they take long
    positions=(0, 1, 2, 3, 15, 63),  # images of a chain to measure
    scales=(1, 2, 3),  # of guidance
    high=(1, 2, 3, 4),  # where 4 was best in an earlier trial
    evaluations=8,  # steps of the sampler without noise
    sde_steps=25,  # of the paper's sampler
    counts=(4, 6, 8, 12, 25, 100),  # steps to compare the samplers at
    factors=(1.0, 0.9, 0.8),  # s1, s2
    refs=(1, 4, 16, 64),
    features=(8, 16, 32, 64),  # of 64, to draw from
    draws=4,  # of (t, noise) per held-out image, and of chains to measure their diversity
    long=(7000, 3500, 6000),  # steps of the bundled model: stage 1, and twice stage 2
)
QUICK = dict(
    holdout=0.5,
    images=32,
    steps=2,
    keep=2,
    measured=1,
    tune=2,
    pictures=100,  # both at the end alone
    num=10,
    few=10,
    positions=(0, 3),
    scales=(1, CFG),
    high=(1, CFG, 3),
    evaluations=1,
    sde_steps=1,
    counts=(1, 2),
    factors=(1.0, 0.9),
    refs=(1, 4),
    features=(8, 64),
    draws=1,
    long=(1, 1, 1),
)
args = argparse.Namespace(**FULL)  # main adds the flags

load_vae = functools.cache(load_vae)


# -------------------------------------------------------------------------------- baselines
class DiffusionOnly(TransDiff):
    """Table 1: no AR Transformer. c is the class embedding at every position, plus positions."""

    def __init__(self, config, **others):
        super().__init__(dataclasses.replace(config, ar_depth=0, **others))

    def encode(self, labels, references=None):
        embeddings = torch.cat([self.ar.class_embedding.weight, self.ar.null_class])
        return F.embedding(labels, embeddings)[:, None] + self.cond_positions


class NoAttention(nn.Module):
    def forward(self, x, mask=None):
        return torch.zeros_like(x)


class OwnPosition(CrossAttention):
    """Each token attends to the c of its own position: softmax over one key is 1."""

    def forward(self, x, keys, values, mask=None):
        return self.dropout(self.proj(values.repeat(1, x.shape[1] // values.shape[1], 1)))


class DiffusionLoss(TransDiff):
    """Table 2: MAR's diffusion loss decodes each token by itself, given its c. All at once.

    The paper's 336 is MAR-L in one step; this is TransDiff's decoder without its attention, which
    leaves 86 % of the parameters.
    """

    def __init__(self, config):
        super().__init__(config)
        for block in self.decoder.blocks:
            block.attn1 = NoAttention()
            block.attn2 = OwnPosition(config)
        self.init_weights()


BASELINES = {
    "diffusion only": DiffusionOnly,
    # Two blocks more in the decoder: 96 % of the parameters of TransDiff.
    "diffusion only, 6 blocks": functools.partial(DiffusionOnly, dit_depth=6),
    "diffusion loss": DiffusionLoss,
}


# -------------------------------------------------------------------------------- runs
def run(script, *words, **flags):
    """Run a command of the project in this process: a new one would import torch for seconds."""
    for name, value in flags.items():
        words += (f"--{name.replace('_', '-')}", str(value))
    argv = sys.argv
    sys.argv = [f"{script.__name__}.py", *words]
    print(" ".join(sys.argv), file=sys.stderr)
    try:
        script.main()
    finally:
        sys.argv = argv


def cached(name, compute):
    """compute(), or what it returned the first time: the JSON file OUT/NAME.json."""
    path = args.out / (re.sub(r"[^\w.]+", "-", name) + ".json")
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())


def trained(name, script, **flags):
    """Folder of a training run: begun, resumed or already complete."""
    folder = args.out / name
    if not (folder / "complete").exists():
        run(script, "--resume", out=folder, **flags)
        (folder / "complete").touch()
    return folder


def stage1(seed, name="stage1", model_class=TransDiff, **others):
    script = SimpleNamespace(__name__="train", main=lambda: train.main(model_class))
    flags = dict(data=args.data, vae=DEMO_VAE, holdout=args.holdout, batch_size=args.images)
    flags.update(steps=args.steps, keep_every=args.measured, sample_every=args.pictures)
    flags.update(others, seed=seed)
    return trained(f"{name}-{seed}", script, **flags)


def long_stage1(seed):
    return stage1(seed, "long1", steps=args.long[0], keep_every=2 * args.keep)


def control(seed, name="control", init=None, **others):
    """Stage 1 trained on with the learning rate, schedule, length and images of stage 2."""
    flags = dict(train.RECIPES["XS, later"], steps=args.tune, batch_size=args.images)
    del flags["epochs"]  # steps say the length
    flags.update(others, init=init or stage1(seed), seed=seed, sample_every=args.pictures)
    return trained(f"{name}-{seed}", train, **flags)


def stage2(seed, refs=4, name="mrar", **others):
    """MRAR: whatever the length of the chains, a step sees the same number of images."""
    flags = dict(steps=args.tune, batch_size=args.images // refs, refs=refs)
    flags.update(keep_every=max(1, args.tune // 5), sample_every=args.pictures)
    flags.update(others, init=stage1(seed), seed=seed)
    return trained(f"{name}{refs}-{seed}", finetune_mrar, **flags)


@functools.lru_cache(8)
def load(folder, file="ema.pt", model_class=TransDiff):
    ckpt = read_checkpoint(folder / file)
    model = model_class(ckpt.config)
    model.load_state_dict(ckpt.weights)
    model.to(args.device).eval().requires_grad_(False)
    return cast_weights(model, args.dtype)


def cache_of(seed):
    """(latent cache of the runs of a seed, its images to train on, its held-out images)."""
    cache = LatentCache(load_file(stage1(seed) / "last.pt")["args"]["data"])
    return cache, *train.split(cache, args.holdout)


def means(cache, images):
    """Latents of images: the means of the posterior, scaled, [N, z, h, w]."""
    moments = torch.from_numpy(cache.moments(images, np.zeros_like(images)))
    return moments.float().chunk(2, dim=1)[0] * cache.scale


def neighbour_chains(seed):
    """Path of a list of chains of nearest neighbours of a class, each image in one: for --chains.

    An image, in random order, takes the three nearest that are left.
    """
    path = args.out / f"neighbours-{seed}.txt"
    if path.exists():
        return path
    cache, images, _ = cache_of(seed)
    lines = []
    for label in np.unique(cache.labels[images]):
        left = np.random.default_rng(seed).permutation(images[cache.labels[images] == label])
        x = means(cache, left).numpy()
        while len(left) >= 4:
            order = np.square(x - x[0]).sum((1, 2, 3)).argsort()  # the first is image 0 itself
            files = [str(k) for k in left[order[:4]]]
            lines.append(json.dumps(dict(cate=cache.classes[label], files=files)))
            rest = np.sort(order[4:])
            left = left[rest]
            x = x[rest]
    atomic_write(path, lambda f: f.write("\n".join(lines).encode()))
    return path


# -------------------------------------------------------------------------------- distances
NET = DEMO / "features.pt"


@functools.cache
def statistics():
    """Path of the statistics of the data in the features of the bundled network."""
    path = args.out / "statistics.npz"
    if not path.exists():
        run(fid, samples=args.data, net=NET, save_stats=path)
    return path


def draw_images(name, seed, draw, labels):
    """{k: images k of the chains, uint8 [N, H, W, 3]} that draw(labels, noise_sampler) returns."""
    vae = load_vae(DEMO_VAE, args.device)
    images = {}
    for part in tqdm(torch.arange(len(labels)).split(16), unit="batch", desc=name):
        randn = per_image_noise(seed, part.tolist())
        with torch.inference_mode(), autocast(args.device, args.dtype):
            chain = draw(labels[part].to(args.device), randn)
            for k in args.positions:
                if k < chain.shape[1]:
                    images.setdefault(k, []).append(latents_to_images(vae, chain[:, k]))
    return {k: np.concatenate(parts) for k, parts in images.items()}


def figures(images, labels, ref=None):
    """Rows (metric, value) of images: distance, accuracy; with images `ref` precision, recall."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder, "samples.npz")
        result = Path(folder, "figures.json")
        classes = np.load(args.data)["classes"]
        np.savez(samples, arr_0=images, arr_1=labels, classes=classes)
        run(fid, samples=samples, ref=ref or statistics(), net=NET, json=result)
        values = json.loads(result.read_text())
    rows = [("distance", values["frechet_distance"])]
    return rows + [(k, values[k]) for k in ("accuracy", "precision", "recall") if k in values]


def measure(name, seed, draw, num=None, ref=None):
    """Rows (setting, metric, value) of `num` chains that `draw` draws, by position."""

    def compute():
        labels = torch.arange(num or args.num) % 10
        images = draw_images(name, seed, draw, labels)
        return [(k, *row) for k in images for row in figures(images[k], labels.numpy(), ref)]

    chains = f", {num} chains" if num else ""
    rows = cached(f"{name}, seed {seed}{chains}", compute)
    several = any(row[0] for row in rows)
    return [(f"{name}, image {k}" if several else name, *row) for k, *row in rows]


def at_scales(name, seed, draw, scales=None, num=None, ref=None):
    """Rows at every guidance scale, and for each image the best distance and scale."""
    best = {}
    for cfg in scales or args.scales:
        for row in measure(
            f"{name}, cfg {cfg:g}", seed, functools.partial(draw, cfg=cfg), num, ref
        ):
            yield row
            setting, metric, value = row
            if metric == "distance":
                setting = setting.replace(f"cfg {cfg:g}", "best cfg")
                best[setting] = min(best.get(setting, (math.inf, 0)), (value, cfg))
    for setting, (value, cfg) in best.items():
        yield setting, "distance", value
        yield setting, "cfg", cfg


def sampler(model, **settings):
    """draw(labels, noise_sampler) of `measure`: chains without noise in few steps, guided as in the
    release."""
    few = dict(sampler="adams-bashforth", steps=args.evaluations, cfg_below=1.0, null_refs=True)
    settings = {**few, **settings}

    def draw(labels, randn, **more):
        return model.sample(labels, noise_sampler=randn, **settings, **more)

    return draw


def autoguided(model, early):
    """draw of `measure`: 1-step AR guided against early weights for the same class."""
    models = [model, early]

    def draw(labels, randn, cfg):
        conditions = [m.decoder.keys_values(m.encode(labels)) for m in models]
        noise = randn(torch.empty(len(labels), *model.config.latent_shape, device=args.device))

        def velocity(x, t):
            t = torch.full((1, 1), t, device=x.device)
            pairs = zip(models, conditions)
            v, v_early = (m.decoder(x[:, None], t, kv)[:, 0].float() for m, kv in pairs)
            return v_early + cfg * (v - v_early)

        return adams_bashforth(velocity, noise, args.evaluations)[:, None]

    return draw


# -------------------------------------------------------------------------------- losses
def held_out_images(seed, N):
    """([latents, labels, t, noise] of N held-out images, {kind: three references of each})."""
    cache, _, held_out = cache_of(seed)
    latents = means(cache, held_out)
    labels = cache.labels[held_out]
    N = min(N, len(labels))

    rng = np.random.default_rng(seed)
    references = {}
    for kind, shift in (("real", 0), ("of another class", 1), ("of another chain", 0)):
        chosen = []
        for i, label in enumerate(labels[:N]):
            others = np.flatnonzero(labels == (label + shift) % len(cache.classes))
            chosen.append(rng.choice(np.setdiff1d(others, i), 3, replace=False))
        references[kind] = latents[np.stack(chosen)].to(args.device)

    torch.manual_seed(seed)
    t = draw_t((N, args.draws))
    noise = torch.randn(N, args.draws, *cache.latent_shape)
    images = latents[:N], torch.from_numpy(labels[:N]), t, noise
    return [x.to(args.device) for x in images], references


def losses(model, images, c):
    """Loss (Eq. 8) of each image, given its condition c [N, K, D]: [N]."""
    values = []
    for i in torch.arange(len(c)).split(64):
        x, _, t, noise = (part[i] for part in images)
        x = x[:, None]
        v = model.decoder(add_noise(x, noise, t), t, model.decoder.keys_values(c[i]))
        values.append((v - (noise - x)).square().mean((1, 2, 3, 4)))
    return torch.cat(values)


@torch.no_grad()
def compare_references(seed):
    """Rows (setting, metric, value) of stage 2 as it goes on: what references take off the loss of
    the next image (the gain)."""
    images, kinds = held_out_images(seed, args.num)
    cases = {f"{kind}, image 3": kinds[kind] for kind in ("real", "of another class")}
    cases["real, image 1"] = kinds["real"][:, :1]
    rows = []
    for path in sorted(stage2(seed).glob("ema-*.pt")):
        model = load_checkpoint(path, args.device)  # float32, since the differences are small
        null = torch.full_like(images[1], model.config.num_classes)
        for condition, labels in (("class", images[1]), ("null class", null)):
            alone = losses(model, images, model.encode(labels))
            for case, references in cases.items():
                gain = alone - losses(model, images, model.encode(labels, references))
                setting = f"{condition}, step {int(path.stem[4:])}, {case}"
                rows.append((setting, "gain", gain.mean().item()))
    return rows


@torch.no_grad()
def compare_conditions(name, path, seed):
    """Rows (setting, metric, value) of a model: losses of held-out images under changed conditions,
    and the part of the features' variance that is outside their mean.

    The conditions of MRAR are those of image 3 of a chain.
    """
    images, kinds = held_out_images(seed, args.few)
    model = load_checkpoint(path, args.device)  # float32, since the differences are small
    labels = images[1]
    other = (labels + 1) % model.config.num_classes
    null = torch.full_like(labels, model.config.num_classes)
    chains = dict.fromkeys(kinds) if model.config.refs == 1 else kinds  # 1-step: no references
    c = model.encode(labels, chains["real"])
    positions = model.cond_positions[:, : c.shape[1]]
    order = torch.randperm(c.shape[1])
    conditions = {
        "c": c,
        # c itself has no order: attention sees a set of keys.
        "features at other positions": (c - positions)[:, order] + positions,
        "mean of c at every position": c.mean(1, keepdim=True).expand_as(c),
        "c of another class": model.encode(other, chains["of another class"]),
        "c of null": model.encode(null, chains["real"]),
    }
    if model.config.refs > 1:
        n = model.config.tokens_per_image
        conditions["first block of c alone"] = c[:, :n]
        conditions["own block of c alone"] = c[:, -n:]
        for kind in ("of another chain", "of another class"):
            conditions[f"references {kind}"] = model.encode(labels, kinds[kind])
    rows = []
    for condition, c in conditions.items():
        rows.append((f"{name}, {condition}", "loss", losses(model, images, c).mean().item()))
    features = diversity.chain_features(model, torch.arange(10, device=args.device), 0)
    mean = features.mean((0, 1))
    outside = 1 - mean.square().sum() / features.square().sum(-1).mean()
    return [*rows, (f"{name}, features", "variance outside", outside.item())]


# -------------------------------------------------------------------------------- the claims
# Each gives rows (setting, metric, value) of one seed.
def mrar(seed):
    """MRAR is better than 1-step AR (Tables 2-4), also if that is trained as long, each at its best
    guidance."""
    for name, folder in (("stage 1", stage1), ("control", control), ("MRAR", stage2)):
        yield from at_scales(name, seed, sampler(load(folder(seed))))


def references(seed):
    """References carry something (Section 3.2): they lower the loss of the same held-out images, t
    and noise."""
    return cached(f"references, seed {seed}", lambda: compare_references(seed))


def condition(seed):
    """What c holds, and what Eq. 15 measures (ours)."""
    paths = {"stage 1": stage1(seed), "control": control(seed), "MRAR": stage2(seed)}
    paths = {name: folder / "ema.pt" for name, folder in paths.items()}
    if seed == args.seeds[0]:
        paths.update({"bundled 1-step": DEMO / "1step.pt", "bundled MRAR": DEMO_MODEL})
    for name, path in paths.items():
        compare = functools.partial(compare_conditions, name, path, seed)
        yield from cached(f"condition, {name}, seed {seed}", compare)
        yield from similarities(f"{name}, features", seed, path)


def autoguidance(seed):
    """MRAR's gain comes from its guidance (ours). Null with and without references; and 1-step
    guided by its own early checkpoint."""
    model = load(stage2(seed))
    early = load(stage1(seed), f"ema-{args.keep:07d}.pt")
    scales = args.scales[1:]
    yield from at_scales("MRAR", seed, sampler(model))
    draw = sampler(model, null_refs=False)
    yield from at_scales("MRAR against null without references", seed, draw, scales)
    for name, folder in (("stage 1", stage1), ("control", control)):
        model = load(folder(seed))
        yield from at_scales(name, seed, sampler(model))
        draw = autoguided(model, early)
        yield from at_scales(f"{name} against step {args.keep}", seed, draw, scales)


def interval(seed):
    """Guidance at low t alone is better (ours, after Kynkaanniemi et al. 2024)."""
    draw = sampler(load(control(seed)), cfg_below=CFG_BELOW)
    yield from at_scales(f"control, t to {CFG_BELOW}", seed, draw, args.high)


def noise(seed):
    """One noise for all images of a chain, as in the release, or fresh noise for each (ours)."""
    draw = sampler(load(stage2(seed)), cfg=CFG)

    def fresh(labels, randn):
        chain = None
        for refs in (1, 2, 3, 4):  # each call draws its own noise
            chain = draw(labels, randn, refs=refs, references=chain)
        return chain

    yield from measure(f"MRAR, cfg {CFG}", seed, draw)
    yield from measure(f"MRAR, cfg {CFG}, fresh noise", seed, fresh)


def samplers(seed):
    """The sampler without noise needs fewer evaluations (ours): image 1, of half as many chains to
    save time."""
    model = load(stage2(seed))
    for name, factors in (("adams-bashforth", {}), ("euler-maruyama", dict(s1=1.0, s2=1.0))):
        for n in args.counts:
            draw = sampler(model, refs=2, sampler=name, steps=n, cfg=CFG, **factors)

            def image_1(labels, randn):
                return draw(labels, randn)[:, 1:]

            yield from measure(f"{name}, evaluations {n}", seed, image_1, args.few)


def s1_s2(seed):
    """s1 and s2 below 1 help (Appendix C); half as many images, to save time."""
    model = load(stage1(seed))
    settings = dict(sampler="euler-maruyama", steps=args.sde_steps, cfg=CFG)
    for s1 in args.factors:
        for s2 in args.factors:
            draw = sampler(model, s1=s1, s2=s2, **settings)
            yield from measure(f"s1 {s1}, s2 {s2}", seed, draw, args.few)


def refs(seed):
    """4 references are best (Figure 6); 1 is the control, and 64, the dearest, is for the first
    seed alone.

    All runs have the same number of steps and of images: 500 steps of 64, 16, 4 or 1 chains.
    """
    for count in args.refs:
        if count < 64 or seed == args.seeds[0]:
            model = load(stage2(seed, count) if count > 1 else control(seed))
            name = f"chains of {count}"
            yield from at_scales(name, seed, sampler(model), (1, CFG), args.few)


def t(seed):
    """Logit-normal t, as in the release, is better than uniform t, as in the paper."""
    yield from at_scales("stage 1", seed, sampler(load(stage1(seed))))
    uniform = stage1(seed, "uniform-t", t="uniform")
    yield from at_scales("uniform t", seed, sampler(load(uniform)))


def similarities(name, seed, path):
    """Rows (setting, metric, value): the measures of diversity.py of a checkpoint."""

    def compute():
        return diversity.measure(load_checkpoint(path, args.device), args.draws, args.device)

    metrics = "similarity (Eq. 15)", "centred", "similarity (release)"
    for metric, value in zip(metrics, cached(f"diversity, {name}, seed {seed}", compute)):
        yield name, metric, value


def steps(seed):
    """As training goes on, diversity grows and the distance falls (Figure 4a); the same with
    another peak learning rate (ours)."""
    default = train.RECIPES["XS"]["lr"]
    for lr in args.rates:
        name = f"lr {lr:g}"
        folder = stage1(seed) if lr == default else stage1(seed, name.replace(" ", ""), lr=lr)
        yield from at_scales(name, seed, sampler(load(folder)))
        log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        yield name, "held-out loss", float(log[-1]["holdout_loss"])
        for step in range(args.measured, args.steps + 1, args.measured):
            setting = f"{name}, step {step}"
            path = folder / f"ema-{step:07d}.pt"
            yield from similarities(setting, seed, path)
            if lr == default and step % args.keep == 0:
                draw = sampler(load(folder, path.name), cfg=CFG)
                yield from measure(setting, seed, draw, args.few)


def baselines(seed):
    """TransDiff beats diffusion alone (Table 1) and MAR's diffusion loss (Table 2)."""
    yield from at_scales("stage 1", seed, sampler(load(stage1(seed))))
    for name, model_class in BASELINES.items():
        folder = stage1(seed, name.replace(" ", "-"), model_class=model_class)
        yield from at_scales(name, seed, sampler(load(folder, model_class=model_class)))


def scales(seed):
    """Scale AR is worse than MRAR, and its features are less diverse (Table 4)."""
    folders = {"stage 1": stage1(seed), "MRAR": stage2(seed)}
    folders["scale AR"] = stage2(seed, name="scales", chains="scales")
    for name, folder in folders.items():
        scales = args.high if name == "scale AR" else args.scales
        yield from at_scales(name, seed, sampler(load(folder)), scales)
        yield from similarities(name, seed, folder)


def neighbours(seed):
    """References that carry information (ours): chains of nearest neighbours within a class."""
    folder = stage2(seed, name="neighbours", chains=neighbour_chains(seed))
    for name, path in (("MRAR", stage2(seed)), ("chains of neighbours", folder)):
        yield from at_scales(name, seed, sampler(load(path)))


def features(seed):
    """The first features alone make a good image (Figure 1); half as many images."""
    for name, folder in (("1-step", control), ("MRAR", stage2)):
        model = load(folder(seed))
        for count in args.features:

            def draw(labels, randn):
                shape = (len(labels), *model.config.latent_shape)
                noise = randn(torch.empty(shape, device=args.device))
                draw_chain = sampler(model, refs=model.config.refs - 1, cfg=CFG, noise=noise)
                chain = draw_chain(labels, randn)
                null = torch.full_like(labels, model.config.num_classes)
                c, c_null = (model.encode(y, chain)[:, :count] for y in (labels, null))
                few = dict(sampler="adams-bashforth", steps=args.evaluations)
                return model.decode(c, noise, c_null, cfg=CFG, **few)[:, None]

            yield from measure(f"{name}, features {count}", seed, draw, args.few)


def length(seed):
    """MRAR and 1-step keep their order after long training: the bundled MRAR, and 1-step trained
    as long with its schedules, but on nine tenths of the images. Each with both guidances."""
    _, second, third = args.long
    folder = control(seed, "long2", long_stage1(seed), steps=second)
    folder = control(seed, "long3", folder, steps=third, ema=0.999, warmup=0.02, cooldown=0.7)
    models = {"1-step, trained long": load(folder), "bundled MRAR": load(DEMO, DEMO_MODEL.name)}
    for name, model in models.items():
        for below in (1.0, CFG_BELOW):  # as the release guides, and as mrar.pt by default
            draw = sampler(model, cfg_below=below, null_refs=below == 1)
            yield from at_scales(f"{name}, t to {below}", seed, draw, (1, 1.5, 2, 3), ref=args.data)


FUNCTIONS = (
    mrar,
    baselines,
    scales,
    neighbours,
    features,
    references,
    condition,
    autoguidance,
    interval,
    noise,
    samplers,
    s1_s2,
    t,
    steps,
    refs,
    length,
)
CLAIMS = {f.__name__: f for f in FUNCTIONS}
ONE_SEED = ("samplers", "length")  # the first seed alone, since they take long


# -------------------------------------------------------------------------------- table
def read_table(path):
    """{(claim, setting, seed, metric): value}, in the order of the file."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {tuple(row[:4]): float(row[4]) for row in csv.reader(lines)}


def record(path, claim, seed, rows):
    """Put the rows of a claim and seed in the table; a row that is there keeps its place."""
    rows = list(rows)  # hours of work, in which another run may write to the table
    table = read_table(path)
    for setting, metric, value in rows:
        table[claim, setting, str(seed), metric] = value
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "setting", "seed", "metric", "value"])
    for key, value in table.items():
        writer.writerow([*key, f"{value:.6g}"])
    atomic_write(path, lambda f: f.write(text.getvalue().encode()))


# -------------------------------------------------------------------------------- command
def few_images(path):
    """16 or 17 of the bundled images of each class, for --quick."""
    if not path.exists():
        data = dict(np.load(DEMO_DATA))  # sorted by class
        data.update(images=data["images"][::62], labels=data["labels"][::62])
        atomic_write(path, lambda f: np.savez(f, **data))
    return path


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    seed = bounded(int, 0)
    add("--seeds", nargs="+", type=seed, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--rows", nargs="*", choices=CLAIMS, default=list(CLAIMS), help="claims (default: all)")
    add("--quick", action="store_true", help="tiny runs of one seed: only shows that all works")
    add("--out", type=Path, help="folder of the runs (default: runs/claims, runs/claims-quick)")
    vars(args).update(vars(parser.parse_args()))
    fid.load_net = functools.cache(fid.load_net)  # takes longer than the features of a few images
    table = (args.out or DEMO) / "claims.csv"
    args.out = args.out or Path("runs/claims-quick" if args.quick else "runs/claims")
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.device, train.SIZES["XS"].width)
    if args.quick:
        vars(args).update(QUICK, seeds=args.seeds[:1], data=few_images(args.out / "images.npz"))
        small = dict(width=32, heads=1, ar_depth=1, dit_depth=1)
        train.SIZES["XS"] = dataclasses.replace(train.SIZES["XS"], **small)
        table = args.out / "claims.csv"
    for claim in args.rows:
        for seed in args.seeds:
            if claim not in ONE_SEED or seed == args.seeds[0]:
                record(table, claim, seed, CLAIMS[claim](seed))
    tables = by_claim(read_table(table))
    draw_curves(tables, table.parent)
    draw_similarity(tables, table.parent)
    draw_verdicts(compare(tables), table.with_name("claims-verdicts.png"))
    print(markdown(tables))


if __name__ == "__main__":
    run_main(main, "; to continue, repeat the command")
