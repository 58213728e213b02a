"""Test what the paper claims, at the laptop's size, by the project's own commands run in this process.

    python demo/claims.py                       all claims, seeds 0 1 2: hours; stopped, the same command goes on
    python demo/claims.py --rows mrar refs      some claims, in the order of CLAIMS
    python demo/claims.py --rows                only the table and the curves of what is in the csv
    python demo/claims.py --quick               a smoke test of all claims

Writes claims.csv, a figure a row, and curves claims-*.png to demo/; with --quick or --out to OUT, where the files of runs
are. What is there is not made again. Prints mean and standard deviation over seeds as Markdown.
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
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import diversity as diversity_script  # noqa: E402
import fid  # noqa: E402
import finetune_mrar  # noqa: E402
import train  # noqa: E402
from demo import train_features  # noqa: E402
from model import adams_bashforth, load_checkpoint, t_from_normal  # noqa: E402
from vae import (
    DEMO,
    DEMO_DATA,
    DEMO_VAE,
    atomic_write,
    autocast,
    bounded,
    cast_weights,
    latents_to_images,
)  # noqa: E402
from vae import load_vae, per_image_noise, pick_device, pick_dtype, plot, run_main, sample_posterior  # noqa: E402

FULL = dict(data=DEMO_DATA, holdout=0.1, steps=1600, keep=400, tune=500, images=64, pictures=500, net_steps=1000)
FULL |= dict(num=1000, evaluations=8, sde_steps=25, positions=(0, 1, 2, 3, 15, 63), draws=4, refs=(1, 4, 16, 64))
FULL |= dict(scales=(1, 1.25, 1.5, 2, 3), counts=(4, 6, 8, 12, 25, 100), factors=(1.0, 0.9, 0.8))
QUICK = dict(holdout=0.5, steps=2, keep=2, tune=2, images=8, pictures=0, net_steps=2)
QUICK |= dict(num=10, evaluations=1, sde_steps=2, positions=(0, 3), draws=1, refs=(1, 4))
QUICK |= dict(scales=(1, 2), counts=(1, 2), factors=(1.0, 0.9))
CFG = 2  # guidance scale where it is not the question: the default of XS; one of `scales`
ONE_SEED = ("samplers", "s1-s2", "diversity")  # the first seed alone, since they take long
COLUMNS = ["claim", "setting", "seed", "network", "metric", "value"]
args = argparse.Namespace(**FULL)  # main adds the flags
fid.load_net = functools.cache(fid.load_net)  # loading takes longer than the features of a few images


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


def stage1(seed, name="stage1", **flags):
    flags = dict(steps=args.steps, batch_size=args.images, keep_every=args.keep) | flags
    return trained(f"{name}-{seed}", train, seed=seed, **flags)


def control(seed):
    """Stage 1 trained on with the learning rate, schedule, length and number of images of stage 2."""
    recipe = {k: train.RECIPES["XS MRAR"][k] for k in ("lr", "warmup", "cooldown", "ema", "batch_mul")}
    flags = dict(init=stage1(seed) / "last.pt", steps=args.tune, batch_size=args.images, seed=seed)
    return trained(f"control-{seed}", train, **flags, **recipe)


def stage2(seed, refs=4):
    """MRAR: whatever the length of the chains, a step sees the same number of images."""
    flags = dict(init=stage1(seed) / "last.pt", steps=args.tune, batch_size=args.images // refs, seed=seed)
    flags |= dict(keep_every=args.tune // 2) if refs == 4 else dict(sample_every=0)  # pictures of long chains take long
    return trained(f"mrar{refs}-{seed}", finetune_mrar, refs=refs, **flags)


def load(folder, file="ema.pt"):
    return cast_weights(load_checkpoint(folder / file, args.device), args.dtype)


# ---------------------------------------------------------------------------------------------- measures
@functools.cache
def networks():
    """{name: (feature network, statistics of the data)}: the bundled network, and one of another seed and width."""
    paths = {"features.pt": DEMO / "features.pt", "features-2.pt": args.out / "features-2.pt"}
    stats = {name: args.out / f"statistics-{name}.npz" for name in paths}
    if not paths["features-2.pt"].exists():
        flags = dict(steps=args.net_steps, data=args.data, out=paths["features-2.pt"])
        run(train_features, seed=1, width=1.5, batch_size=2 * args.images, **flags)
    for name in paths:
        if not stats[name].exists():
            run(fid, samples=args.data, net=paths[name], save_stats=stats[name])
    return {name: (paths[name], stats[name]) for name in paths}


def draw_images(name, seed, draw, num):
    """Draw `num` chains, the classes in turn -> {position in the chain: uint8 images [num, H, W, 3]}, labels [num]."""
    vae, labels, images = load_vae(DEMO_VAE, args.device), torch.arange(num) % 10, {}
    for part in tqdm(torch.arange(num).split(64), unit="batch", desc=name):
        randn = per_image_noise(seed, part.tolist(), args.device)
        with torch.inference_mode(), autocast(args.device, args.dtype):
            chain = draw(labels[part].to(args.device), randn).float()
        for k in [k for k in args.positions if k < chain.shape[1]]:
            images.setdefault(k, []).append(latents_to_images(vae, chain[:, k]))
    return {k: np.concatenate(parts) for k, parts in images.items()}, labels.numpy()


def measure(name, seed, draw, num=None):
    """Rows (setting, network, metric, value) of `num` chains that draw(labels, noise_sampler) returns, by position."""

    def compute():
        images, labels = draw_images(name, seed, draw, num or args.num)
        samples, result, rows = args.out / "samples.npz", args.out / "fid.out", []
        for k in images:
            atomic_write(samples, lambda f: np.savez(f, arr_0=images[k], arr_1=labels))
            setting = name + f", image {k}" * (len(images) > 1)
            for network, (net, stats) in networks().items():
                run(fid, samples=samples, ref=stats, net=net, json=result)
                figures = json.loads(result.read_text())
                rows.append([setting, network, "distance", figures["frechet_distance"]])
                rows.append([setting, network, "accuracy", figures["accuracy"]])
        return rows

    return cached(f"{name}, seed {seed}" + f", {num} chains" * bool(num), compute)


def at_scales(name, seed, draw, scales=None, num=None):
    """Rows at every guidance scale, and for each image and network the best distance and its scale."""
    best = {}
    for cfg in scales or args.scales:
        for setting, network, metric, value in measure(
            f"{name}, cfg {cfg:g}", seed, functools.partial(draw, cfg=cfg), num
        ):
            yield setting, network, metric, value
            if metric == "distance":
                key = setting.replace(f"cfg {cfg:g}", "best cfg"), network
                best[key] = min(best.get(key, (math.inf, 0)), (value, cfg))
    for key, (value, cfg) in best.items():
        yield from ((*key, "distance", value), (*key, "cfg", cfg))


def sampler(model, **settings):
    """draw(labels, noise_sampler) of `measure`: chains as sample.py draws them, without noise in few evaluations."""
    settings = dict(sampler="adams-bashforth", steps=args.evaluations) | settings
    return lambda labels, randn, **more: model.sample(labels, noise_sampler=randn, **settings, **more)


def guided_by(weaker, null, model):
    """As `sampler`, but guided against `weaker`, of the class or the null class and without references."""

    def draw(labels, randn, cfg):
        noise = randn(torch.empty(len(labels), *model.config.latent_shape))
        c_weak = weaker.encode(torch.full_like(labels, model.config.num_classes) if null else labels)
        keys_values_weak, chain = weaker.decoder.keys_values(c_weak), noise[:, None][:, :0]
        for _ in range(model.config.refs):
            keys_values = model.decoder.keys_values(model.encode(labels, chain))

            def velocity(x, t):
                t = torch.full((1,), t, device=x.device)
                v_weak = weaker.decoder(x, t, keys_values_weak).float()
                return v_weak + cfg * (model.decoder(x, t, keys_values).float() - v_weak)

            x = adams_bashforth(velocity, noise, args.evaluations)
            chain = torch.cat([chain, x[:, None]], dim=1)
        return chain

    return draw


# ---------------------------------------------------------------------------------------------- references
def held_out_batch(seed):
    """Held-out latents, labels, fixed t and noise, and {kind: three references of each image}, real ones."""
    flags = argparse.Namespace(data=str(args.data), vae=DEMO_VAE, image_size=None, out=stage2(seed))
    cache = train.open_cache(flags, args.device)
    held_out, rng = np.flatnonzero(train.holdout_mask(len(cache), args.holdout)), np.random.default_rng(seed)
    mean, logvar = torch.from_numpy(cache.moments[held_out, 0]).float().chunk(2, dim=1)
    torch.manual_seed(seed)
    latents, labels = sample_posterior(mean, logvar, torch.randn_like(mean)) * cache.scale, cache.labels[held_out]
    N, kinds = min(args.num, len(labels)), {}
    for kind, shift in (("real", 0), ("another class's", 1)):
        of_class = [np.flatnonzero(labels == (y + shift) % len(cache.classes)) for y in labels[:N]]
        others = [rng.choice(np.setdiff1d(same, i), 3, replace=False) for i, same in enumerate(of_class)]
        kinds[kind] = latents[torch.from_numpy(np.stack(others))].to(args.device)
    t, noise = t_from_normal(torch.randn(N, args.draws)), torch.randn(N, args.draws, *latents.shape[1:])
    return [x.to(args.device) for x in (latents[:N], torch.from_numpy(labels[:N]), t, noise)], kinds


@torch.no_grad()
def losses(model, batch, references=None, null=False):
    """Loss (Eq. 8) of each image as the next one of a chain of references [N, k, C, h, w] -> [N]."""
    values = []
    for i in torch.arange(len(batch[0]), device=args.device).split(64):
        x, labels, t, noise = (part[i] for part in batch)
        t_, x = t[..., None, None, None], x[:, None]
        labels = torch.full_like(labels, model.config.num_classes) if null else labels
        x_t, c = (1 - t_) * x + t_ * noise, model.encode(labels, None if references is None else references[i])
        v = model.velocity(x_t.flatten(0, 1), t.flatten(), c).view_as(noise)
        values.append((v.float() - (noise - x)).square().mean((1, 2, 3, 4)))
    return torch.cat(values)


def compare_references(seed):
    """Rows (setting, metric, value): losses with and without references, and their paired difference."""
    folder = stage2(seed)
    one_step, model, batch, kinds = (load(stage1(seed)), load(control(seed))), load(folder), *held_out_batch(seed)
    labels = batch[1]
    randn = per_image_noise(seed, range(len(labels)), args.device)
    kinds |= {"zeros": torch.zeros_like(kinds["real"]), "drawn": sampler(model, refs=3, cfg=CFG)(labels, randn)}
    rows = [(name, "loss", losses(m, batch).mean().item()) for name, m in zip(("stage 1", "control"), one_step)]
    for condition, null in (("class", False), ("null class", True)):
        alone = losses(model, batch, null=null)
        rows.append((f"no references, {condition}", "loss", alone.mean().item()))
        for kind, k in [(kind, k) for kind in kinds for k in (1, 2, 3)]:
            rows += gain(f"{kind}, image {k}, {condition}", alone, losses(model, batch, kinds[kind][:, :k], null))
        for path in sorted(folder.glob("ema-*.pt")):
            early = load(folder, path.name)
            values = losses(early, batch, null=null), losses(early, batch, kinds["real"], null)
            rows += gain(f"real, image 3, {condition}, step {int(path.stem[4:])}", *values)
    return rows


def gain(setting, alone, given):
    """What references take off the loss, and the standard error of that."""
    gain, figures = alone - given, {"loss": given.mean()}
    figures |= {"gain": gain.mean(), "standard error of gain": gain.std() / len(gain) ** 0.5}
    return [(setting, metric, value.item()) for metric, value in figures.items()]


# ---------------------------------------------------------------------------------------------- the claims
# Each gives rows (setting, network, metric, value) of one seed.
def mrar(seed):
    """MRAR is better than 1-step AR (Tables 2-4), also if that is trained as long, each at its best guidance."""
    for name, folder in (("stage 1", stage1), ("control", control), ("MRAR", stage2)):
        yield from at_scales(name, seed, sampler(load(folder(seed))))


def references(seed):
    """References carry something (Section 3.2): they lower the loss of the same held-out images, t and noise."""
    return [
        (setting, "", *row) for setting, *row in cached(f"references, seed {seed}", lambda: compare_references(seed))
    ]


def autoguidance(seed):
    """The gain is guidance's (ours): against what the model is guided, and whether an early file of itself does as well."""
    model, early = load(stage2(seed)), load(stage1(seed), f"ema-{args.keep:07d}.pt")
    against_early, scales = f"against step {args.keep} of stage 1", args.scales[1:]
    yield from at_scales("MRAR", seed, sampler(model))
    yield from at_scales("MRAR against null without references", seed, guided_by(model, True, model), scales)
    for name, folder in (("stage 1", stage1), ("control", control)):
        one_step = load(folder(seed))
        yield from at_scales(name, seed, sampler(one_step))
        yield from at_scales(f"{name} {against_early}", seed, guided_by(early, False, one_step), scales)


def noise(seed):
    """One noise for all images of a chain, as in the release, or fresh noise for each (ours)."""
    model = load(stage2(seed))

    def fresh(labels, randn):
        chain = None
        for k in range(model.config.refs):  # without `noise` each call draws its own
            chain = sampler(model, refs=k + 1, references=chain, cfg=CFG)(labels, randn)
        return chain

    yield from measure(f"MRAR, cfg {CFG}", seed, sampler(model, cfg=CFG))
    yield from measure(f"MRAR, cfg {CFG}, fresh noise", seed, fresh)


def samplers(seed):
    """The sampler without noise needs fewer evaluations (ours); half as many chains, since 100 evaluations take long."""
    model = load(stage2(seed))
    for name, n in [(name, n) for name in ("adams-bashforth", "euler-maruyama") for n in args.counts]:
        draw = sampler(model, sampler=name, steps=n, cfg=CFG)
        yield from measure(f"{name}, {n} evaluations", seed, draw, args.num // 2)


def scaling(seed):
    """s1 and s2 below 1 help (Appendix C)."""
    model, settings = load(stage1(seed)), dict(sampler="euler-maruyama", steps=args.sde_steps, cfg=CFG)
    for s1, s2 in [(s1, s2) for s1 in args.factors for s2 in args.factors]:
        yield from measure(f"s1 {s1}, s2 {s2}", seed, sampler(model, s1=s1, s2=s2, **settings))


def refs(seed):
    """4 references are best (Figure 6); 1 is the control, and 64, the dearest, is for the first seed alone.

    All see 64 images a step for 500 steps, so images and steps are equal at once; a step has 64, 16, 4 or 1 chains.
    """
    for count in [count for count in args.refs if count < 64 or seed == args.seeds[0]]:
        model = load(stage2(seed, count) if count > 1 else control(seed))
        yield from at_scales(f"{count} images a chain", seed, sampler(model), (1, CFG), args.num // 2)


def distribution_of_t(seed):
    """Logit-normal t, as in the release, is better than uniform t, as in the paper."""
    for name, flags in (("stage 1", {}), ("stage 1, uniform t", dict(name="uniform-t", t="uniform"))):
        yield from at_scales(name, seed, sampler(load(stage1(seed, **flags))))


def diversity(seed):
    """As training goes on, diversity grows and the distance falls (Figure 4a), over three times the length."""
    folder = stage1(seed, "long", steps=3 * args.steps)
    for path in sorted(folder.glob("ema-*.pt")):
        setting = f"step {int(path.stem[4:])}"
        with redirect_stdout(io.StringIO()) as table:
            run(diversity_script, ckpt=path)
        row = next(csv.DictReader(table.getvalue().splitlines()))
        yield setting, "", "similarity (Eq. 15)", float(row["similarity"])
        yield setting, "", "similarity (release)", float(row["released"])
        yield from measure(setting, seed, sampler(load(folder, path.name), cfg=CFG))


CLAIMS = {"mrar": mrar, "references": references, "autoguidance": autoguidance, "noise": noise, "samplers": samplers}
CLAIMS |= {"s1-s2": scaling, "t": distribution_of_t, "diversity": diversity, "refs": refs}
PICTURES = {  # claim, metric, setting (x and the curve's name), label of x
    "guidance": ("mrar", "distance", r"(stage 1|control|MRAR), cfg (?P<x>[\d.]+)(|, image 0|, image 3)", "guidance scale"),
    "autoguidance": ("autoguidance", "distance", r"((?!stage).*), cfg (?P<x>[\d.]+)(|, image 3)", "guidance scale"),
    "references": ("references", "gain", r"(real), image 3(, .*), step (?P<x>\d+)", "steps of stage 2"),
    "samplers": ("samplers", "distance", r"(.*), (?P<x>\d+) evaluations, image 3", "evaluations an image"),
    "diversity": ("diversity", "similarity.*", r"step (?P<x>\d+)", "steps of stage 1"),
    "distance": ("diversity", "distance", r"step (?P<x>\d+)", "steps of stage 1"),
}


# ---------------------------------------------------------------------------------------------- table and curves
def read_table(path):
    """{(claim, setting, seed, network, metric): value}, in the order of the file."""
    with open(path) as f:
        return {tuple(row[:5]): float(row[5]) for row in list(csv.reader(f))[1:]}


def record(path, claim, seed, rows):
    """Put the rows of a claim and seed in the table: a row that is there keeps its place."""
    table = read_table(path) if path.exists() else {}
    table |= {(claim, setting, str(seed), network, metric): value for setting, network, metric, value in rows}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [COLUMNS, *((*key, f"{value:.6g}") for key, value in table.items())]
    )
    atomic_write(path, text.getvalue().encode())


def over_seeds(table):
    """{(claim, setting, network, metric): values of all seeds}."""
    values = {}
    for (claim, setting, _, network, metric), value in table.items():
        values.setdefault((claim, setting, network, metric), []).append(value)
    return values


def markdown(table):
    """Mean and standard deviation over seeds of every figure: a table for each claim, a row for each setting."""
    values, lines = over_seeds(table), []
    for claim in dict.fromkeys(key[0] for key in values):
        columns = list(dict.fromkeys(key[2:] for key in values if key[0] == claim))
        names = [f"{metric} ({network})" if network else metric for network, metric in columns]
        lines += ["", f"| {claim} | " + " | ".join(names) + " |", "| --- " * (1 + len(columns)) + "|"]
        for setting in dict.fromkeys(key[1] for key in values if key[0] == claim):
            cells = [values.get((claim, setting, *column), []) for column in columns]
            cells = [f"{np.mean(v):.4g}" + f" +- {np.std(v, ddof=1):.2g}" * (len(v) > 1) if v else "" for v in cells]
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def draw_curves(table, folder):
    """Curves of means over seeds, by the bundled network, of the claims that have run."""
    for picture, (claim, metric, pattern, xlabel) in PICTURES.items():
        curves = {}
        for key, values in over_seeds(table).items():
            match = re.fullmatch(pattern, key[1])
            if key[0] == claim and key[2] in ("", "features.pt") and re.fullmatch(metric, key[3]) and match:
                *name, x = [match[g] for g in range(1, match.re.groups + 1) if g != match.re.groupindex["x"]] + [match["x"]]
                curves.setdefault("".join(name) or key[3], []).append((float(x), np.mean(values)))
        if curves:
            plot({name: tuple(zip(*sorted(points))) for name, points in curves.items()}, folder / f"claims-{picture}.png", xlabel)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=bounded(int, 0), default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--rows", nargs="*", choices=CLAIMS, default=list(CLAIMS), help="claims (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs of one seed: only shows that all works")
    parser.add_argument("--out", default="runs/claims", help="files of the runs (default: %(default)s)")
    flags = parser.parse_args()
    vars(args).update(vars(flags), out=Path(flags.out), device=pick_device())
    args.dtype = pick_dtype(None, args.device)
    if args.quick:
        vars(args).update(QUICK, seeds=args.seeds[:1], data=few_images(args.out / "images.npz"))
    folder = args.out if args.quick or flags.out != parser.get_default("out") else DEMO
    path = folder / "claims.csv"
    for claim, seed in [(claim, seed) for claim in CLAIMS for seed in args.seeds if claim in args.rows]:
        if claim not in ONE_SEED or seed == args.seeds[0]:
            record(path, claim, seed, CLAIMS[claim](seed))
    table = read_table(path)
    draw_curves(table, folder)
    print(markdown(table))


def few_images(path):
    """The first 24 of the bundled images of each class, for --quick."""
    data = np.load(DEMO_DATA)
    indices = np.sort(np.concatenate([np.flatnonzero(data["labels"] == k)[:24] for k in range(10)]))
    arrays = dict(images=data["images"][indices], labels=data["labels"][indices], classes=data["classes"])
    path.exists() or atomic_write(path, lambda f: np.savez(f, **arrays))
    return path


if __name__ == "__main__":
    run_main(main)
