"""Test what the paper claims, at the laptop's size, by the project's own commands run in this process.

    python demo/claims.py                       all claims, seeds 0 1 2: hours; stopped, the same command goes on
    python demo/claims.py --rows mrar refs      some claims; --rows without names: only the table and the curves
    python demo/claims.py --quick               a smoke test of all claims

Writes claims.csv, a figure a row, and curves claims-*.png to demo/; with --quick or --out to OUT, where the runs are.
What is there is not made again. Prints mean and standard deviation over seeds as Markdown.
Left out: scale AR (Table 4), which is not implemented, and a constant EMA decay, for which there is no flag.
"""

import argparse
import csv
import functools
import io
import json
import math
import re
import signal
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import diversity  # noqa: E402
import fid  # noqa: E402
import finetune_mrar  # noqa: E402
import train  # noqa: E402
import train_features  # noqa: E402
from curves import plot  # noqa: E402
from model import adams_bashforth, load_checkpoint, t_from_normal  # noqa: E402
from vae import DEMO, DEMO_DATA, DEMO_VAE, atomic_write, autocast, bounded, cast_weights, load_vae  # noqa: E402
from vae import latents_to_images, per_image_noise, pick_device, pick_dtype, run_main  # noqa: E402

CFG, CFG_BELOW = 2, 0.65  # guidance where it is not the question, and the part of t that `interval` guides
FULL = dict(data=DEMO_DATA, holdout=0.1, steps=1600, keep=400, tune=500, images=64, pictures=500, net_steps=1000)
FULL |= dict(num=1000, evaluations=8, sde_steps=25, positions=(0, 1, 2, 3, 15, 63), draws=4, refs=(1, 4, 16, 64))
FULL |= dict(scales=(1, 1.25, 1.5, 2, 3), counts=(4, 6, 8, 12, 25, 100), factors=(1.0, 0.9, 0.8))
QUICK = dict(holdout=0.5, steps=2, keep=2, tune=2, images=4, pictures=0, net_steps=2)
QUICK |= dict(num=20, evaluations=1, sde_steps=1, positions=(0, 3), draws=1, refs=(1, 4))
QUICK |= dict(scales=(1, CFG), counts=(1, 2), factors=(1.0, 0.9))
args = argparse.Namespace(**FULL)  # main adds the flags
# loading takes longer than the features of a few images
fid.load_net, load_vae = functools.cache(fid.load_net), functools.cache(load_vae)


# ---------------------------------------------------------------------------------------------- runs
def run(script, *words, **flags):
    """Run a command of the project in this process: a new one spends seconds on importing torch."""
    argv, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    flags = [w for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv = [f"{script.__name__}.py", *words, *flags]
    print(" ".join(sys.argv), file=sys.stderr)
    try:
        script.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():  # training catches them
            signal.signal(number, handler)
        torch.set_float32_matmul_precision("highest")  # training lowers it


def cached(name, compute):
    """compute(), or what it returned the first time: the JSON file OUT/NAME.json."""
    path = args.out / (re.sub(r"[^\w.]+", "-", name) + ".json")
    if not path.exists():
        atomic_write(path, json.dumps(compute()).encode())
    return json.loads(path.read_text())


def trained(name, script, **flags):
    """Folder of a training run: begun, resumed or already complete."""
    out = args.out / name
    if not (out / "complete").exists():
        flags = dict(data=args.data, vae=DEMO_VAE, holdout=args.holdout, sample_every=args.pictures) | flags
        run(script, *["--resume"] * (out / "last.pt").exists(), out=out, **flags)
        (out / "complete").touch()
    return out


def stage1(seed, name="stage1", steps=1, **flags):
    flags |= dict(steps=steps * args.steps, batch_size=args.images, keep_every=args.keep)
    return trained(f"{name}-{seed}", train, seed=seed, **flags)


def control(seed):
    """Stage 1 trained on with the learning rate, schedule, length and number of images of stage 2."""
    flags = {k: train.RECIPES["XS MRAR"][k] for k in ("lr", "warmup", "cooldown", "ema", "batch_mul")}
    flags |= dict(init=stage1(seed) / "last.pt", steps=args.tune, batch_size=args.images)
    return trained(f"control-{seed}", train, seed=seed, **flags)


def stage2(seed, refs=4):
    """MRAR: whatever the length of the chains, a step sees the same number of images."""
    flags = dict(init=stage1(seed) / "last.pt", steps=args.tune, batch_size=args.images // refs, refs=refs)
    # long chains take long to draw
    flags |= dict(keep_every=max(1, args.tune // 5)) if refs == 4 else dict(sample_every=0)
    return trained(f"mrar{refs}-{seed}", finetune_mrar, seed=seed, **flags)


@functools.lru_cache(8)
def load(folder, file="ema.pt"):
    return cast_weights(load_checkpoint(folder / file, args.device), args.dtype)


# ---------------------------------------------------------------------------------------------- distances
@functools.cache
def networks():
    """{name: (feature network, statistics of the data)}: the bundled network, and one of another seed and width."""
    paths = {"features.pt": DEMO / "features.pt", "features-2.pt": args.out / "features-2.pt"}
    stats = {name: args.out / f"statistics-{name}.npz" for name in paths}
    if not paths["features-2.pt"].exists():
        flags = dict(seed=1, width=1.5, steps=args.net_steps, batch_size=2 * args.images)
        run(train_features, data=args.data, out=paths["features-2.pt"], **flags)
    for name in [name for name in paths if not stats[name].exists()]:
        run(fid, samples=args.data, net=paths[name], save_stats=stats[name])
    return {name: (paths[name], stats[name]) for name in paths}


def measure(name, seed, draw, num=None):
    """Rows (setting, network, metric, value) of `num` chains that draw(labels, noise_sampler) returns, by position."""

    def compute():
        vae, labels, images = load_vae(DEMO_VAE, args.device), torch.arange(num or args.num) % 10, {}
        for part in tqdm(torch.arange(len(labels)).split(64), unit="batch", desc=name):
            randn = per_image_noise(seed, part.tolist(), args.device)
            with torch.inference_mode(), autocast(args.device, args.dtype):
                chain = draw(labels[part].to(args.device), randn).float()
            for k in [k for k in args.positions if k < chain.shape[1]]:
                images.setdefault(k, []).append(latents_to_images(vae, chain[:, k]))
        return [row for k in images for row in figures(k, np.concatenate(images[k]), labels.numpy())]

    def figures(k, images, labels):
        with tempfile.TemporaryDirectory() as folder:
            samples, result = Path(folder, "samples.npz"), Path(folder, "figures.json")
            np.savez(samples, arr_0=images, arr_1=labels)
            for network, (net, stats) in networks().items():
                run(fid, samples=samples, ref=stats, net=net, json=result)
                for metric, key in (("distance", "frechet_distance"), ("accuracy", "accuracy")):
                    yield k, network, metric, json.loads(result.read_text())[key]

    rows = cached(f"{name}, seed {seed}" + f", {num} chains" * bool(num), compute)
    return [(name + f", image {k}" * any(row[0] for row in rows), *row) for k, *row in rows]


def at_scales(name, seed, draw, scales=None, num=None):
    """Rows at every guidance scale, and for each image and network the best distance and its scale."""
    best = {}
    for cfg in scales or args.scales:
        for row in measure(f"{name}, cfg {cfg:g}", seed, functools.partial(draw, cfg=cfg), num):
            yield row
            if row[2] == "distance":
                key = row[0].replace(f"cfg {cfg:g}", "best cfg"), row[1]
                best[key] = min(best.get(key, (math.inf, 0)), (row[3], cfg))
    for key, (value, cfg) in best.items():
        yield from ((*key, "distance", value), (*key, "cfg", cfg))


def sampler(model, **settings):
    """draw(labels, noise_sampler) of `measure`: chains without noise in few evaluations, guided as in the release."""
    settings = dict(sampler="adams-bashforth", steps=args.evaluations, cfg_below=1.0, null_refs=True) | settings
    return lambda labels, randn, **more: model.sample(labels, noise_sampler=randn, **settings, **more)


def sample_against(weaker, null, model, labels, randn, cfg):
    """A chain guided against `weaker` without references, of the null class or of the class itself."""
    noise = randn(torch.empty(len(labels), *model.config.latent_shape))
    weak_labels, chain = torch.full_like(labels, model.config.num_classes) if null else labels, noise[:, None][:, :0]
    weak_keys_values = weaker.decoder.keys_values(weaker.encode(weak_labels))

    def velocity(x, t):
        t = torch.full((1,), t, device=x.device)
        v_weak = weaker.decoder(x, t, weak_keys_values).float()
        return v_weak + cfg * (model.decoder(x, t, keys_values).float() - v_weak)

    for _ in range(model.config.refs):
        keys_values = model.decoder.keys_values(model.encode(labels, chain))
        chain = torch.cat([chain, adams_bashforth(velocity, noise, args.evaluations)[:, None]], dim=1)
    return chain


def diversity_of(path):
    with redirect_stdout(io.StringIO()) as table:
        run(diversity, ckpt=path)
    return next(csv.DictReader(table.getvalue().splitlines()))


# ---------------------------------------------------------------------------------------------- losses
def held_out_images(seed):
    """Held-out latents, labels, t and noise, all of N images, and {kind: three references of each}, held out too."""
    flags = argparse.Namespace(data=str(args.data), vae=DEMO_VAE, image_size=None, out=stage1(seed))
    cache, rng = train.open_cache(flags, args.device), np.random.default_rng(seed)
    held_out = train.split(cache.labels, args.holdout)[1]
    latents, labels = torch.from_numpy(cache.moments[held_out, 0]).float().chunk(2, dim=1)[0], cache.labels[held_out]
    latents, N, kinds = latents.to(args.device) * cache.scale, min(args.num, len(labels)), {}  # the posterior's means
    for kind, shift in (("real", 0), ("of another class", 1)):
        of_class = [np.flatnonzero(labels == (y + shift) % len(cache.classes)) for y in labels[:N]]
        others = [rng.choice(np.setdiff1d(same, i), 3, replace=False) for i, same in enumerate(of_class)]
        kinds[kind] = latents[torch.from_numpy(np.stack(others))]
    torch.manual_seed(seed)
    t, noise = t_from_normal(torch.randn(N, args.draws)), torch.randn(N, args.draws, *latents.shape[1:])
    return [x.to(args.device) for x in (latents[:N], torch.from_numpy(labels[:N]), t, noise)], kinds


def losses(model, images, null, references=None):
    """Loss (Eq. 8) of each image as the next one of a chain of references [N, k, C, h, w] -> [N]."""
    values = []
    for i in torch.arange(len(images[0]), device=args.device).split(64):
        x, labels, t, noise = (part[i] for part in images)
        t_, x = t[..., None, None, None], x[:, None]
        labels = torch.full_like(labels, model.config.num_classes) if null else labels
        c = model.encode(labels, None if references is None else references[i])
        v = model.velocity(((1 - t_) * x + t_ * noise).flatten(0, 1), t.flatten(), c).view_as(noise)
        values.append((v - (noise - x)).square().mean((1, 2, 3, 4)))
    return torch.cat(values)


@torch.no_grad()
def compare_references(seed):
    """Rows (setting, network, metric, value): the loss with references, what they take off it, its standard error."""
    folder, (images, kinds), rows = stage2(seed), held_out_images(seed), []
    paths = {"stage 1": stage1(seed) / "ema.pt", "control": control(seed) / "ema.pt", "MRAR": folder / "ema.pt"}
    paths |= {f"MRAR, step {int(path.stem[4:])}": path for path in sorted(folder.glob("ema-*.pt"))}
    for name, path in paths.items():
        model, cases = load_checkpoint(path, args.device), {}  # in float32, since the differences are small
        if name == "MRAR":
            randn = per_image_noise(seed, range(len(images[0])), args.device)
            drawn = sampler(model, refs=3, cfg=CFG)(images[1], randn)
            kinds |= dict(zero=torch.zeros_like(drawn), drawn=drawn)
            cases = {f"{kind}, image {k}": kinds[kind][:, :k] for kind in kinds for k in (1, 2, 3)}
        elif name.startswith("MRAR"):
            cases = {"real, image 3": kinds["real"]}
        for null, condition in enumerate(("class", "null class")):
            alone = losses(model, images, null)
            rows.append((f"{condition}, {name}, no references", "", "loss", alone.mean().item()))
            for setting, references in cases.items():
                gain, setting = alone - losses(model, images, null, references), f"{condition}, {name}, {setting}"
                rows.append((setting, "", "loss", (alone - gain).mean().item()))
                rows.append((setting, "", "gain", gain.mean().item()))
                rows.append((setting, "", "error of gain", (gain.std() / len(gain) ** 0.5).item()))
    return rows


# ---------------------------------------------------------------------------------------------- the claims
# Each gives rows (setting, network, metric, value) of one seed.
def mrar(seed):
    """MRAR is better than 1-step AR (Tables 2-4), also if that is trained as long, each at its best guidance."""
    for name, folder in (("stage 1", stage1), ("control", control), ("MRAR", stage2)):
        yield from at_scales(name, seed, sampler(load(folder(seed))))


def references(seed):
    """References carry something (Section 3.2): they lower the loss of the same held-out images, t and noise."""
    return cached(f"references, seed {seed}", lambda: compare_references(seed))


def autoguidance(seed):
    """The gain is guidance's (ours): by references that null sees too, or by an early file of a 1-step model."""
    model, early, scales = load(stage2(seed)), load(stage1(seed), f"ema-{args.keep:07d}.pt"), args.scales[1:]
    yield from at_scales("MRAR", seed, sampler(model))
    draw = functools.partial(sample_against, model, True, model)
    yield from at_scales("MRAR against null without references", seed, draw, scales)
    for name, folder in (("stage 1", stage1), ("control", control)):
        yield from at_scales(name, seed, sampler(load(folder(seed))))
        draw = functools.partial(sample_against, early, False, load(folder(seed)))
        yield from at_scales(f"{name} against step {args.keep}", seed, draw, scales)


def interval(seed):
    """Guidance at low t alone is better (ours, after Kynkaanniemi et al. 2024), for MRAR without references in null."""
    below = functools.partial(sampler, cfg_below=CFG_BELOW)
    yield from at_scales(f"control, t to {CFG_BELOW}", seed, below(load(control(seed))), args.scales[-2:])
    for name, null_refs in (("with", True), ("without", False)):
        draw = below(load(stage2(seed)), null_refs=null_refs)
        yield from at_scales(f"MRAR, null {name} references, t to {CFG_BELOW}", seed, draw, args.scales[-2:])


def noise(seed):
    """One noise for all images of a chain, as in the release, or fresh noise for each (ours)."""
    model = load(stage2(seed))

    def fresh(labels, randn):
        chain = None
        for k in range(model.config.refs):  # each call draws its own noise
            chain = sampler(model, refs=k + 1, references=chain, cfg=CFG)(labels, randn)
        return chain

    yield from measure(f"MRAR, cfg {CFG}", seed, sampler(model, cfg=CFG))
    yield from measure(f"MRAR, cfg {CFG}, fresh noise", seed, fresh)


def samplers(seed):
    """The sampler without noise needs fewer evaluations (ours): image 1, of half as many chains to save time."""
    for name, n in [(name, n) for name in ("adams-bashforth", "euler-maruyama") for n in args.counts]:
        draw = sampler(load(stage2(seed)), refs=2, sampler=name, steps=n, cfg=CFG)
        image_1 = lambda labels, randn: draw(labels, randn)[:, 1:]  # noqa: E731
        yield from measure(f"{name}, evaluations {n}", seed, image_1, args.num // 2)


def s1_s2(seed):
    """s1 and s2 below 1 help (Appendix C); half as many images, to save time."""
    settings = dict(sampler="euler-maruyama", steps=args.sde_steps, cfg=CFG)
    for s1, s2 in [(s1, s2) for s1 in args.factors for s2 in args.factors]:
        draw = sampler(load(stage1(seed)), s1=s1, s2=s2, **settings)
        yield from measure(f"s1 {s1}, s2 {s2}", seed, draw, args.num // 2)


def refs(seed):
    """4 references are best (Figure 6); 1 is the control, and 64, the dearest, is for the first seed alone.

    All see 64 images a step for 500 steps, so images and steps are equal at once; a step has 64, 16, 4 or 1 chains.
    """
    for count in [count for count in args.refs if count < 64 or seed == args.seeds[0]]:
        model = load(stage2(seed, count) if count > 1 else control(seed))
        yield from at_scales(f"chains of {count}", seed, sampler(model), (1, CFG), args.num // 2)


def t(seed):
    """Logit-normal t, as in the release, is better than uniform t, as in the paper."""
    yield from at_scales("logit-normal t", seed, sampler(load(stage1(seed))))
    yield from at_scales("uniform t", seed, sampler(load(stage1(seed, "uniform-t", t="uniform"))))


def steps(seed):
    """As training goes on, diversity grows and the distance falls (Figure 4a): stage 1 of three times the length."""
    for path in sorted(stage1(seed, "long", steps=3).glob("ema-*.pt")):
        setting = f"step {int(path.stem[4:])}"
        similarity = cached(f"similarity, {setting}, seed {seed}", lambda: diversity_of(path))
        yield setting, "", "similarity (Eq. 15)", float(similarity["similarity"])
        yield setting, "", "similarity (release)", float(similarity["released"])
        yield from measure(setting, seed, sampler(load(path.parent, path.name), cfg=CFG))


CLAIMS = {f.__name__: f for f in (mrar, references, autoguidance, interval, noise, samplers, s1_s2, t, steps, refs)}
ONE_SEED = ("samplers", "s1_s2", "steps")  # the first seed alone, since they take long
CURVES = [(claim, "distance") for claim in ("autoguidance", "samplers", "steps")]
CURVES += [("references", "gain"), ("steps", "similarity (Eq. 15)")]


# ---------------------------------------------------------------------------------------------- table and curves
def read_table(path):
    """{(claim, setting, seed, network, metric): value}, in the order of the file."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {tuple(row[:5]): float(row[5]) for row in csv.reader(lines)}


def record(path, claim, seed, rows):
    """Put the rows of a claim and seed in the table; a row that is there keeps its place."""
    rows = {(claim, setting, str(seed), network, metric): value for setting, network, metric, value in rows}
    table, text = read_table(path) | rows, io.StringIO()  # read after hours: another run may have written to it
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "setting", "seed", "network", "metric", "value"])
    writer.writerows((*key, f"{value:.6g}") for key, value in table.items())
    atomic_write(path, text.getvalue().encode())


def over_seeds(path):
    """{claim: {setting: {(network, metric): values of all seeds}}}."""
    tables = {}
    for (claim, setting, _, *column), value in read_table(path).items():
        tables.setdefault(claim, {}).setdefault(setting, {}).setdefault(tuple(column), []).append(value)
    return tables


def markdown(path):
    """Mean and standard deviation over seeds of every figure: a table for each claim, a row for each setting."""
    lines = []
    for claim, settings in over_seeds(path).items():
        columns = list(dict.fromkeys(column for cells in settings.values() for column in cells))
        names = [f"{metric} ({network})" if network else metric for network, metric in columns]
        lines += ["", f"| {claim} | " + " | ".join(names) + " |", "| --- " * (1 + len(columns)) + "|"]
        for setting, cells in settings.items():
            cells = [cells.get(column, []) for column in columns]
            cells = [
                f"{np.mean(v):.4g} +- {np.std(v, ddof=1):.2g}" if v[1:] else "%.4g" % v[0] if v else "" for v in cells
            ]
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def draw_curves(path):
    """Curves of means over seeds by the bundled network, of 1-step AR only the control, of a chain the last image."""
    for claim, metric in CURVES:
        curves = {}
        for setting, cells in over_seeds(path).get(claim, {}).items():
            match = re.fullmatch(r"(?!stage 1)(.*)(cfg|evaluations|step) ([\d.]+)(?:, (?:real, )?image 3)?", setting)
            values = cells.get(("features.pt", metric)) or cells.get(("", metric))
            if match and values:
                xs, ys = curves.setdefault(match[1].strip(", ") or metric, ([], []))
                xs.append(float(match[3]))
                ys.append(np.mean(values))
                xlabel = match[2]
        if curves:
            plot(curves, path.with_name(f"claims-{claim}-{metric.split()[0]}.png"), xlabel)


# ---------------------------------------------------------------------------------------------- command
def few_images(path):
    """The first 16 of the bundled images of each class, for --quick."""
    data = dict(np.load(DEMO_DATA))
    first = np.sort(np.concatenate([np.flatnonzero(data["labels"] == k)[:16] for k in range(10)]))
    data |= dict(images=data["images"][first], labels=data["labels"][first])
    return path if path.exists() else atomic_write(path, lambda f: np.savez(f, **data)) or path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=bounded(int, 0), default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--rows", nargs="*", choices=CLAIMS, default=list(CLAIMS), help="claims (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs of one seed: only shows that all works")
    parser.add_argument("--out", default="runs/claims", help="folder of the runs (default: %(default)s)")
    flags = parser.parse_args()
    vars(args).update(vars(flags), out=Path(flags.out), device=pick_device())
    args.dtype = pick_dtype(None, args.device)
    if args.quick:
        vars(args).update(QUICK, seeds=args.seeds[:1], data=few_images(args.out / "images.npz"))
    path = (args.out if args.quick or flags.out != "runs/claims" else DEMO) / "claims.csv"
    for claim, seed in [(claim, seed) for claim in CLAIMS if claim in args.rows for seed in args.seeds]:
        if claim not in ONE_SEED or seed == args.seeds[0]:
            record(path, claim, seed, CLAIMS[claim](seed))
    draw_curves(path)
    print(markdown(path))


if __name__ == "__main__":
    run_main(main)
