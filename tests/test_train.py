"""Stages 1 and 2: order of the data, recipes, resuming, and the commands as a user types them."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, forks, run_script
from in_process import run_in_process
from PIL import Image
from test_vae import SMALL, refused, run, save_small_vae, save_vae  # noqa: F401

import model
import train
import vae
from model import SIZES, Sampling, TransDiff, derive_seed, load_checkpoint, load_file
from train import RECIPES, Chains, learning_rate, make_optimizer, split
from vae import Images, LatentCache, encode_images, growing_scales, load_vae, sample_posterior


def draw(moments):
    """Latents, unscaled, of moments [B, refs, 2 z, h, w]."""
    return sample_posterior(*moments.chunk(2, dim=2))


# --------------------------------------------------------------------------------- chains of images


def fake_cache(counts, seed=0):
    """A cache of counts[k] images of class k.

    Channel 0 of the moments is the index of the image, channel 1 is 1 where it is mirrored.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels)

    def moments(indices, flips):
        return np.stack([indices, flips], axis=-1)[..., None, None].astype(np.float16)

    classes = [f"class {i}" for i in range(len(counts))]
    names = [f"{classes[k]}/{i}" for i, k in enumerate(labels)]
    return SimpleNamespace(labels=labels, moments=moments, classes=classes, names=lambda: names)


def all_chains(counts, refs, batch_size, seed=3, **options):
    cache = fake_cache(counts)
    return Chains(cache, np.arange(len(cache.labels)), refs, batch_size, seed, **options)


def read_epochs(chains, n):
    """Image indices [chains, refs] of each of n epochs, as the batches give them."""
    per_epoch = chains.chains_per_epoch
    step = 0
    seen = []
    while len(seen) < n * per_epoch:
        moments, labels = chains[step]
        images = moments[:, :, 0, 0, 0].astype(int)
        assert (chains.cache.labels[images] == labels[:, None]).all(), "mixed classes"
        seen += list(images)
        step += 1
    return [np.stack(seen[i * per_epoch : (i + 1) * per_epoch]) for i in range(n)]


@pytest.mark.parametrize("refs,counts", [(1, [5, 9, 7]), (4, [9, 15, 6]), (16, [33, 16])])
def test_an_epoch_has_every_image_once_as_a_member_of_one_chain(refs, counts):
    """Except for the remainder of each class. Chains and their order are new in each epoch."""
    chains = all_chains(counts, refs, batch_size=5)
    first, second = read_epochs(chains, 2)
    for epoch in (first, second):
        images, n = np.unique(epoch, return_counts=True)
        assert (n == 1).all()
        seen = np.bincount(chains.cache.labels[images])
        assert seen.tolist() == [count // refs * refs for count in counts]
    assert first.tolist() != second.tolist()
    labels = chains.cache.labels[first[:, 0]]
    assert (np.diff(labels) < 0).any(), "class after class"
    if refs > 1:
        members = [{frozenset(chain.tolist()) for chain in epoch} for epoch in (first, second)]
        assert members[0] != members[1]


def test_each_image_is_in_some_epoch_although_a_remainder_is_left_out():
    epochs = read_epochs(all_chains([5], refs=4, batch_size=1), 30)
    assert len(np.unique(np.concatenate(epochs))) == 5


def test_the_batches_of_all_ranks_are_the_batch_of_one_process():
    chains = all_chains([13, 11], 1, 6)
    ranks = [all_chains([13, 11], 1, 6, rank=rank, world=3) for rank in range(3)]
    for step in (50, 0, 3, 4):  # in any order; the second epoch starts at step 4
        parts = [rank.indices(step) for rank in ranks]
        assert np.array_equal(np.concatenate(parts), chains.indices(step))
        assert not np.array_equal(
            all_chains([13, 11], 1, 6, seed=4).indices(step), chains.indices(step)
        )


def flips_of(step, **options):
    """1 where an image of a batch of 8 chains of 4 is mirrored, [8, 4]."""
    return torch.from_numpy(all_chains([64], 4, 8, **options)[step][0])[:, :, 1, 0, 0]


def test_half_of_the_images_are_mirrored_each_by_itself_or_none():
    steps = [flips_of(step) for step in range(6)]
    assert 70 < torch.stack(steps).sum() < 122  # of 192
    for flips in steps:
        assert len(flips.unique(dim=0)) > 2 and len(flips.unique(dim=1)) > 1
    parts = [flips_of(step, rank=rank, world=2) for step in (0, 1) for rank in (0, 1)]
    assert len(torch.stack(parts).flatten(1).unique(dim=0)) == 4
    assert not any(flips_of(step, mirror=False).any() for step in range(6))
    assert not torch.equal(flips_of(0, seed=4), flips_of(0))


@pytest.mark.parametrize("refs", [1, 4])
def test_held_out_images_are_never_trained_on(refs):
    cache = fake_cache([400, 500])
    cache.labels[7] = -1  # an image that could not be read
    kept, held_out = split(cache, 0.1)
    assert 60 < len(held_out) < 120
    assert sorted([7, *kept, *held_out]) == list(range(900))
    chains = Chains(cache, kept, refs, 10, seed=0)
    seen = np.unique(np.concatenate([chains.indices(step).ravel() for step in range(300)]))
    assert np.array_equal(seen, kept)


# -------------------------------------------------------------------------------- kinds of chains


def test_scale_ar_is_one_image_at_growing_scales():
    x = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    chains = growing_scales(x)
    assert chains.shape == (2, 4, 3, 8, 8) and torch.equal(chains[:, 3], x[:, 0])
    mean = x[:, 0].mean((-2, -1), keepdim=True).expand(2, 3, 8, 8)
    torch.testing.assert_close(chains[:, 0], mean)  # 1 position, enlarged
    # 2 x 2 positions are their means in the corners, which bilinear enlargement keeps.
    quarter = x[:, 0, :, :4, :4].mean((-2, -1))
    torch.testing.assert_close(chains[:, 1, :, 0, 0], quarter)
    right = x[:, 0, :, :4, 4:].mean((-2, -1))
    torch.testing.assert_close(chains[:, 1, :, 0, 3], torch.lerp(quarter, right, 0.375))
    assert growing_scales(torch.randn(1, 1, 3, 5, 5)).shape == (1, 4, 3, 5, 5)


def test_chains_of_scales_are_trained_drawn_and_resumed(project, tiny, run, refused):
    run_in_process(f"train.py {SHORT} --steps 1")
    flags = "--chains scales --batch-size 8 --steps 2 --sample-every 2"
    out = run(f"finetune_mrar.py {flags} --log-every 1 --lr 0 --dtype fp32").out
    assert "0.3 epochs of 60 chains" in out  # every image is a chain
    # The weights stay, so the loss of step 1 can be computed from them.
    chains = Chains(LatentCache("cache"), np.arange(60), 1, 8, seed=0)
    moments, labels = map(torch.from_numpy, chains[0])
    net = load_checkpoint("runs/mrar/last.pt", ema=False).train()
    torch.manual_seed(derive_seed(0, 0, 0))
    loss = net.loss(growing_scales(draw(moments) * SCALE), labels).item()
    assert float(column("runs/mrar", "loss")[0]) == pytest.approx(loss, rel=1e-4)
    ckpt = load_file("runs/mrar/ema.pt")
    assert ckpt["chains"] == "scales" and ckpt["sampling"]["null_refs"]
    assert load_checkpoint("runs/mrar").info["chains"] == "scales"
    assert not load_checkpoint("runs/train").sampling.null_refs
    out = run("sample.py --ckpt runs/mrar --class 1 --n 1 --show-chain").out
    assert "null_refs True" in out
    run("finetune_mrar.py --resume --steps 3")
    message = refused("finetune_mrar.py --resume --steps 4 --chains images")
    assert "chains was scales, now images" in message
    message = refused(f"finetune_mrar.py {flags} --refs 16 --out other")
    assert "--chains scales: has 4 images, not --refs 16" in message


@pytest.fixture
def listed(project, tiny, garments):
    """A cache of a folder: a/0.png ... a/19.png, of which 19 is unreadable, and b/0.png ..."""
    for i in range(40):
        path = Path("photos", "ab"[i // 20], f"{i % 20}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(garments[0][i]).save(path)
    Path("photos/a/19.png").write_bytes(b"broken")
    run_in_process("vae.py encode --data photos --vae vae.pt --out of-photos")
    run_in_process("train.py --data of-photos --batch-size 8 --steps 1 --sample-every 0")
    return LatentCache("of-photos")


def chain_list(*chains):
    """Write chains (class, numbers) as the release does, in chains.txt."""
    lines = [dict(cate=k, files=[f"{i}.JPEG" for i in numbers]) for k, numbers in chains]
    Path("chains.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_epoch_uses_each_listed_chain_once_in_a_new_order(listed):
    chains = [("a", range(k, k + 4)) for k in range(8)] + [("b", [7, 3, 5, 1])]
    chain_list(*chains)
    images, _ = split(listed, 0)
    rows = train.read_chains("chains.txt", listed, images, 4)
    names = [os.path.relpath(path, "photos") for path in Images("photos").files]
    assert [[names[i] for i in row] for row in rows] == [
        [f"{k}/{i}.png" for i in numbers] for k, numbers in chains
    ]
    sampler = Chains(listed, images, 4, batch_size=3, seed=0, listed=rows)
    epochs = [[sampler.indices(3 * e + s) for s in range(3)] for e in range(2)]
    first, second = (np.concatenate(epoch).tolist() for epoch in epochs)
    assert sorted(first) == sorted(second) == sorted(rows.tolist()) and first != second


def test_stage_2_is_trained_on_a_list_of_chains(listed, run):
    kept, held_out = split(listed, 0.2)
    names = [Path(path).stem for path in Images("photos").files]
    a = [names[i] for i in kept if listed.labels[i] == 0]
    out = next(names[i] for i in held_out if listed.labels[i] == 0)
    chains = [a[:4], a[4:8], [*a[:3], out], [*a[:3], "19"], [*a[:3], "99"]]
    chain_list(*(("a", chain) for chain in chains), ("nothing", range(4)))
    flags = "--batch-size 2 --steps 2 --sample-every 2 --holdout 0.2 --lr 0"
    run(f"finetune_mrar.py {flags} --out random")
    printed = run(f"finetune_mrar.py --chains chains.txt {flags}").out
    # The held-out loss is of random chains.
    assert column("runs/mrar", "holdout_loss") == column("random", "holdout_loss") != [""]
    rest = f"absent, unreadable or held out: a/{out}, a/19, a/99, nothing/0, nothing/1"
    assert f"chains.txt: 2 of 6 chains; {rest}" in printed and "2.0 epochs" in printed
    assert "1 of 2 classes have no chain of 4: b" in printed
    assert load_file("runs/mrar/ema.pt")["chains"] == "chains.txt"
    run_in_process("finetune_mrar.py --resume --steps 3")


NOTHING = b'{"cate": "nothing", "files": ["0", "1", "2", "3"]}\n'
NOT_A_CHAIN = "chains.txt, line 2: not a usable chain"


@pytest.mark.parametrize("content,message", [
    (NOTHING + b"{", NOT_A_CHAIN),
    (NOTHING + b'{"cate": "a"}', f"{NOT_A_CHAIN} (no 'files')"),
    (NOTHING + b'{"cate": "a", "files": [1, 2, 3, 4]}', NOT_A_CHAIN),
    (NOTHING + b'{"cate": "a", "files": ["1.png"]}', f"{NOT_A_CHAIN} (it has 1 files, refs is 4)"),
    (NOTHING + b"[1]", NOT_A_CHAIN),
    (NOTHING, "has no chain of images in of-photos; absent, unreadable or held out: nothing/0, no"),
    (b"", "chains.txt, line 1: not a usable chain"),
    (b"\xff\xfe", "chains.txt: not a usable list of chains"),
    (None, "chains.txt: No such file"),
])  # fmt: skip
def test_a_list_without_a_chain_or_with_a_malformed_line_is_refused(
    content, message, listed, refused
):
    if content is not None:
        Path("chains.txt").write_bytes(content)
    assert message in refused("finetune_mrar.py --chains chains.txt")


# ---------------------------------------------------------------------- recipes and parts of a step


def test_recipes_are_those_of_appendix_b():
    r = RECIPES["1-step"]
    assert (r["batch_size"], r["lr"], r["epochs"]) == (2048, 8e-4, 800)
    assert (r["warmup"] * r["epochs"], r["batch_mul"], r["ema"]) == (100, 4, 0.9999)
    r = RECIPES["MRAR"]
    assert (r["batch_size"], r["lr"], r["epochs"]) == (2048, 5e-5, 40)
    assert (r["warmup"] * r["epochs"], r["batch_mul"]) == (10, 2)
    r = RECIPES["only decoder"]
    assert (r["lr"], r["epochs"], r["warmup"] * r["epochs"]) == (1e-4, 150, 10)
    assert (r["batch_mul"], r["ema"]) == (4, 0.999)
    assert (train.WEIGHT_DECAY, train.CLIP) == (0.02, 3.0)


@pytest.mark.parametrize("flags,num_images,side,recipe", [
    ("", 10_000, 8, ("XS", 1600, 64, 2e-3, 1)),
    ("", 50_000, 8, ("XS", 7812, 64, 2e-3, 1)),  # ten epochs
    ("--refs 16", 10_000, 8, ("XS", 500, 4, 1e-3, 1)),
    ("", 5_000, 16, ("S", 7812, 256, 1e-3, 4)),  # 400 epochs
    ("--size B", 5_000, 16, ("B", 7812, 256, 5e-4, 4)),
    ("--size B --refs 4", 500, 16, ("B", 500, 64, 1.25e-4, 2)),
    ("--size B", 1_281_167, 16, ("B", None, 2048, 8e-4, 4)),
    ("--size XS --batch-size 16 --lr 0.1", 10_000, 8, ("XS", 6250, 16, 0.1, 1)),
])  # fmt: skip
def test_the_recipe_follows_the_images_the_latents_and_the_size(
    flags, num_images, side, recipe, monkeypatch
):
    """--size, --steps (None: the paper's epochs), --batch-size, --lr, --batch-mul."""
    cache = SimpleNamespace(labels=np.zeros(num_images), latent_shape=(8, side, side))
    monkeypatch.setattr(train, "encode_once", lambda *_: "cache")
    monkeypatch.setattr(train, "LatentCache", lambda _: cache)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    parser = train.training_parser("", "runs/none")
    for name, kind in (("--init", str), ("--refs", int), ("--chains", str)):
        parser.add_argument(name, type=kind, default={"--refs": 1}.get(name))
    parser.set_defaults(only_decoder=False)
    args, _, _ = train.parse(parser)
    assert (args.size, args.steps, args.batch_size, args.lr, args.batch_mul) == recipe


def test_a_start_from_a_trained_model_has_the_recipe_of_a_later_stage():
    flags = train.recipe("1-step", True, "XS", 160, 1, 10_000, None)
    assert (flags["steps"], flags["lr"], flags["batch_size"]) == (500, 1e-3, 64)
    flags = train.recipe("1-step", True, "B", 768, 1, 1_281_167, None)
    assert flags["lr"] == 8e-4  # of that many images, the paper's


def test_a_new_model_has_a_condition_token_for_each_position_of_its_latents(
    project, tiny, run, monkeypatch
):
    """As S and B have it at 256 px, which here are of XS's shape but for c. The sampling settings
    are the released ones from so many images on."""
    monkeypatch.setattr(train, "MANY_IMAGES", train.MANY_IMAGES)
    for name, cond_tokens in (("wide", 256), ("narrow", 16)):
        size = dataclasses.replace(SIZES["XS"], cond_tokens=cond_tokens)
        small = dataclasses.replace(size, width=32, heads=1, ar_depth=1, dit_depth=1)
        monkeypatch.setitem(model.SIZES, name, small)
        run(f"train.py {SHORT} --steps 1 --size {name} --out {name}")
        run(f"finetune_mrar.py --init {name} --steps 1 --batch-size 2 --out {name}-mrar")
        for folder in (name, f"{name}-mrar"):
            config = load_checkpoint(folder).config
            assert config.cond_tokens == min(cond_tokens, 64)
            assert config.class_tokens == config.cond_tokens // 4
            assert load_checkpoint(folder).sampling == train.OUR_SAMPLING  # few images
    train.MANY_IMAGES = 60
    run(f"train.py {SHORT} --steps 1 --size narrow --lr 0.1 --batch-mul 1 --out many")
    assert load_checkpoint("many").sampling == Sampling()


def test_a_resumed_run_says_how_its_learning_rate_changes(project, tiny, run):
    run(f"train.py {SHORT} --steps 4 --lr 0.1 --warmup 0 --cooldown 1")
    out = run("train.py --resume --steps 8").out
    assert "learning rate 0.05, was 0.025, peak 0.1," in out


def test_without_pictures_held_out_losses_are_logged_at_least_ten_times(project, tiny, monkeypatch):
    monkeypatch.setattr(train, "ema_loss", lambda *args: 0.5)
    run_in_process(f"train.py {SHORT} --steps 20 --holdout 0.3 --sample-every 0")
    for name in ("holdout_loss", "seen_loss"):
        assert [bool(loss) for loss in column("runs/train", name)] == [False, True] * 10
    assert not list(Path("runs/train").glob("*.png"))


def test_the_learning_rate_warms_up_and_decays_linearly():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.0) for step in (0, 4, 9, 50, 99)]
    assert rates == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [learning_rate(step, 100, 1.0, 0.1, 0.5) for step in (50, 75)] == [1.0, 0.5]
    assert learning_rate(99, 100, 1.0, 0.1, 0.5) == pytest.approx(0.02)


def test_weight_decay_is_for_the_matrices_of_the_ar_transformer_alone():
    net = TransDiff(SIZES["XS"])
    names = {id(p): name for name, p in net.named_parameters()}
    groups = make_optimizer(net, 1e-3).param_groups
    assert all(group["betas"] == (0.9, 0.95) for group in groups)
    members = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert {"ar.blocks.0.mlp.fc1.weight", "cond_positions"} <= members[0.02]
    assert not any(name.startswith("decoder.") for name in members[0.02])
    assert {"decoder.blocks.0.mlp.fc1.weight", "ar.norm_in.weight"} <= members[0.0]
    assert "ar.blocks.0.attn.qkv.bias" in members[0.0]
    assert len(members[0.02]) + len(members[0.0]) == len(names)


# ------------------------------------------------------------------------------------- the commands

SHORT = "--data cache --batch-size 8 --log-every 1 --sample-every 0"
CONSTANT_LR = "--warmup 0 --cooldown 0"
SCALE = 0.7  # of the VAE of the cache


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, garments):
    """A folder with images.npz, of three classes, vae.pt, an untrained VAE, and their cache."""
    folder = tmp_path_factory.mktemp("encoded")
    save_vae(folder / "vae.pt", SMALL, 32, scale=SCALE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = ["garment 0", "garment 1", "garment 2"]
        encode("cache", garments[0], garments[1] // 4, names)
        shutil.move("cache.npz", "images.npz")
    return folder


@pytest.fixture
def project(encoded, tmp_path, monkeypatch):
    """A copy of `encoded`, as the current folder."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encode(name, images, labels, classes, vae_path="vae.pt"):
    """Write NAME.npz and encode it into the cache NAME, in the current folder."""
    np.savez(f"{name}.npz", images=images, labels=labels, classes=np.array(classes))
    encode_images(Images(f"{name}.npz", 32), load_vae(vae_path), name)


def weights(path):
    return load_file(path)["model"]


def assert_same_run(a, b):
    """Two last.pt have the same weights, EMA weights and moments of AdamW, bit for bit."""
    a, b = load_file(a), load_file(b)
    assert a["step"] == b["step"]
    for part in ("model", "model_ema"):
        assert all(torch.equal(b[part][k], v) for k, v in a[part].items()), part
    assert len(a["optimizer"]["state"]) == len(b["optimizer"]["state"]) > 0
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(x[k], y[k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def read_log(run):
    with open(f"{run}/log.csv") as f:
        return list(csv.DictReader(f))


def column(run, name):
    return [row[name] for row in read_log(run)]


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(encoded, tmp_path_factory):
    """(folder, stdout, stderr) of a short run of train.py from images."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(encoded, folder, dirs_exist_ok=True)
    out, err = io.StringIO(), io.StringIO()
    flags = "--data images.npz --vae vae.pt --batch-size 8 --log-every 1 --steps 3 --sample-every 2"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        run_in_process(f"train.py {flags}")
    return folder, out.getvalue(), err.getvalue()


def test_a_run_encodes_its_images_and_writes_checkpoints_pictures_and_a_log(trained):
    folder, out, err = trained
    assert "encoding" in err and "TransDiff-XS" in out
    assert "to draw: python sample.py --ckpt runs/train" in out
    assert re.search(r"latents from runs/latents-images-32-\w{16}, of ", out)
    run = folder / "runs" / "train"
    pictures = {"samples-0000002.png", "samples-0000003.png"}
    files = {"last.pt", "ema.pt", "vae.pt", "log.csv", "lock"}
    assert {path.name for path in run.iterdir()} == files | pictures
    for name in ("loss", "grad_norm", "lr", "images_per_second"):
        assert all(float(value) > 0 for value in column(run, name)), name
    assert column(run, "step") == ["1", "2", "3"]
    assert column(run, "memory_gb") == ["0"] * 3 and column(run, "holdout_loss") == [""] * 3
    ema, last = load_file(run / "ema.pt"), load_file(run / "last.pt")
    assert all(torch.equal(ema["model"][k], v.half()) for k, v in last["model_ema"].items())
    assert ema["classes"][2] == "garment 2"


def test_stage_2_and_sampling_go_on_from_a_run_as_a_user_types_them(trained, tmp_path, command):
    """A new XS model draws with the settings that suit it."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    out, err = command("finetune_mrar.py --batch-size 8 --steps 2 --sample-every 0")
    assert "chains of 4" in out and "encoding" not in err
    out, _ = command("sample.py --ckpt runs/train --class 2 --n 2")
    assert "(garment 2; refs 1, sampler adams-bashforth, steps 8, cfg 2.25," in out
    line = ["sample.py", "--ckpt", "runs/mrar/last.pt", "--class", "garment 1", "0"]
    out, _ = command([*line, *"--n 2 --steps 2 --out new/x.npz".split()])
    assert "refs 4, sampler adams-bashforth, steps 2, cfg 2.25," in out
    arrays = np.load(tmp_path / "new" / "x.npz")
    assert arrays["arr_0"].shape == (4, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [1, 1, 0, 0]


def test_a_row_of_the_log_is_the_mean_since_the_last_row(project, tiny):
    """There is also a row with each picture."""
    flags = "--data cache --batch-size 8 --steps 5"
    run_in_process(f"train.py {flags} --log-every 1 --sample-every 0 --out each")
    run_in_process(f"train.py {flags} --log-every 50 --sample-every 2 --out second")
    assert column("second", "step") == ["2", "4", "5"]
    assert len(list(Path("second").glob("samples-*.png"))) == 3
    losses = np.array(column("each", "loss"), float)
    means = [losses[:2].mean(), losses[2:4].mean(), losses[4]]
    np.testing.assert_allclose(np.array(column("second", "loss"), float), means, rtol=1e-5)


def test_epochs_give_the_length_of_a_run(project, tiny):
    run_in_process(f"train.py {SHORT} --epochs 1")
    assert load_file("runs/train/last.pt")["step"] == 8  # 60 images, 8 per step
    run_in_process("train.py --resume --epochs 2")
    assert load_file("runs/train/last.pt")["step"] == 15
    run_in_process(f"finetune_mrar.py {SHORT} --epochs 1")
    assert load_file("runs/mrar/last.pt")["step"] == 2  # 15 chains


def untrained(seed=0):
    """The model that a run on the cache starts from."""
    torch.manual_seed(seed)
    return TransDiff(dataclasses.replace(SIZES["XS"], num_classes=3)).train()


def step_by_hand(step, world=1, accumulate=1, **options):
    """(loss of rank 0, norm, gradients in the optimizer's order) of a step with SHORT and --seed 5.

    Of a run whose weights stay. In plain form: each process draws from its own seed; means over
    all micro-batches; options of the loss.
    """
    cache = LatentCache("cache")
    net = untrained(5)
    losses = []
    for rank in range(world):
        chains = Chains(cache, np.arange(60), 1, 8, seed=5, rank=rank, world=world)
        moments, labels = map(torch.from_numpy, chains[step])
        torch.manual_seed(derive_seed(5, step, rank))
        for m, y in zip(moments.chunk(accumulate), labels.chunk(accumulate)):
            losses.append(net.loss(draw(m) * SCALE, y, **options))
    torch.stack(losses).mean().backward()
    gradients = [p.grad for group in make_optimizer(net, 1.0).param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    return torch.stack(losses[:accumulate]).mean().item(), norm, gradients


@pytest.mark.parametrize("flags,options", [
    ("", dict()),
    ("--accumulate 4", dict(accumulate=4)),
    ("--accumulate 2", dict(accumulate=2, world=2)),
    ("--batch-mul 3", dict(batch_mul=3)),
    ("--t uniform", dict(t_distribution="uniform")),
])  # fmt: skip
def test_loss_and_clipped_gradient_of_each_step_are_those_computed_by_hand(
    flags, options, project, monkeypatch, request
):
    """The means over all micro-batches and processes; AdamW's first moment m <- 0.9 m + 0.1 g."""
    line = f"train.py {SHORT} --steps 2 --lr 0 --seed 5 --dtype fp32 --device cpu {flags}"
    if "world" in options:
        clip = train.CLIP
        out = run_on_two_ranks(line, project)
        assert "2 x cpu" in out and "8 chains of 1 in 2 micro-batches, from step 0" in out
    else:
        request.getfixturevalue("tiny")
        clip = 0.05
        monkeypatch.setattr(train, "CLIP", clip)
        run_in_process(line)
    moment = 0
    for step, row in enumerate(read_log("runs/train")):
        loss, norm, gradients = step_by_hand(step, **options)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-3)
        assert float(row["epoch"]) == pytest.approx((step + 1) * 8 / 60, rel=1e-4)
        flat = torch.cat([g.flatten() for g in gradients])
        moment = 0.9 * moment + 0.1 * min(1.0, clip / norm) * flat
    state = load_file("runs/train/last.pt")["optimizer"]["state"].values()
    ours = torch.cat([s["exp_avg"].flatten() for s in state])
    torch.testing.assert_close(ours, moment, atol=1e-6, rtol=1e-3)


def test_rate_and_ema_of_two_steps_are_those_of_their_formulas(project, tiny):
    """The rate falls to half of it in step 2. The decay of the EMA is 1/10, then --ema < 2/11."""
    run_in_process(f"train.py {SHORT} {CONSTANT_LR} --steps 1 --lr 0.02 --ema 0.15")
    first = load_file("runs/train/last.pt")
    first = {k: v.clone() for k, v in first["model"].items()}
    run_in_process("train.py --resume --steps 2 --cooldown 1")
    last = load_file("runs/train/last.pt")
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.01, 0.01]
    assert column("runs/train", "lr") == ["0.02", "0.01"]
    for name, start in untrained().state_dict().items():
        ema = 0.15 * (0.1 * start + 0.9 * first[name]) + 0.85 * last["model"][name]
        torch.testing.assert_close(last["model_ema"][name], ema, msg=name)


def test_the_first_update_is_adamws_with_decoupled_weight_decay(project, tiny):
    """p <- p (1 - lr decay) - lr g / (|g| + 1e-8), of the rate of the warm-up's only step."""
    run_in_process(f"train.py {SHORT} --steps 1 --lr 0.5 --warmup 1")
    last = load_file("runs/train/last.pt")
    net = untrained()
    names = {p: name for name, p in net.named_parameters()}
    state = iter(last["optimizer"]["state"].values())
    for group in make_optimizer(net, 1.0).param_groups:
        for p in group["params"]:
            g = 10 * next(state)["exp_avg"]
            expected = p.detach() * (1 - 0.5 * group["weight_decay"]) - 0.5 * g / (g.abs() + 1e-8)
            torch.testing.assert_close(last["model"][names[p]], expected, atol=1e-4, rtol=1e-4)


def test_pictures_and_held_out_loss_are_of_the_ema_weights(project, tiny):
    """Also: each row has four images of a class, the last of their chains."""
    run_in_process(f"train.py {SHORT} --steps 1 --holdout 0.4")
    flags = "--batch-size 4 --steps 2 --lr 0.1 --warmup 0 --sample-every 2 --t uniform --seed 3"
    run_in_process(f"finetune_mrar.py {flags} --dtype fp32")
    cache, net = LatentCache("cache"), load_checkpoint("runs/mrar/last.pt")
    torch.manual_seed(3)
    chain = net.sample(torch.arange(3).repeat_interleave(4))
    images = vae.to_uint8(load_vae("vae.pt").decode(chain[:, -1] / SCALE))
    vae.save_grid(images.reshape(3, 4, 32, 32, 3), "by-hand.png")
    picture = np.asarray(Image.open("runs/mrar/samples-0000002.png"))
    assert np.array_equal(picture, np.asarray(Image.open("by-hand.png")))

    for name, images in zip(("seen_loss", "holdout_loss"), split(cache, 0.4)):
        moments, labels = map(torch.from_numpy, Chains(cache, images, 4, 128, seed=0)[0])
        torch.manual_seed(0)
        latents = draw(moments) * SCALE
        loss = net.loss(latents, labels, t_distribution="uniform").item()
        assert float(column("runs/mrar", name)[-1]) == pytest.approx(loss, rel=1e-5)
    raw = load_checkpoint("runs/mrar/last.pt", ema=False)
    assert raw.loss(latents, labels).item() != pytest.approx(loss, rel=1e-2)


# ------------------------------------------------------------------------------- kills and resuming

# python SCRIPT train.py FLAGS: run train.py with a patch.
PATCHED = """
import dataclasses, os, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train, vae
from model import SIZES, TransDiff, run_main
SIZES["XS"] = dataclasses.replace(SIZES["XS"], **{tiny})
{patch}
run_main(train.main)
"""

# One process gets a signal in the middle of a step: in call number `call` of its loss, from 0.
SIGNAL_IN_A_STEP = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
loss, calls = TransDiff.loss, iter(range(99))
def forward(*args, **kwargs):
    if next(calls) == {call} and os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), {number})
    return loss(*args, **kwargs)
TransDiff.forward = forward
"""

# The process is killed when half of the checkpoint of step 4 is written.
KILL_IN_A_CHECKPOINT = """
save = train.torch.save
def half(data, file):
    save(data, file)
    if data["step"] == 4 and "optimizer" in data:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
train.torch.save = half
"""


def patched(patch):
    """Write the script that patches train.py; returns its absolute path."""
    path = Path("patched.py").absolute()
    path.write_text(PATCHED.format(patch=patch, tiny=TINY))
    return path


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(project, tiny, command):
    """SIGTERM, Ctrl-C, and a kill while a checkpoint is written, each in step 4.

    The same weights, EMA weights and moments of AdamW, bit for bit. Step 4 is the end of an epoch.
    """
    flags = "--data cache --batch-size 16 --log-every 1 --sample-every 0 --save-every 2 --steps 5"
    run_in_process(f"train.py {flags} --keep-every 3 --out whole")
    assert (project / "whole" / "ema-0000003.pt").exists()
    for name, status in {"SIGTERM": 143, "SIGINT": 130, "killed": -9}.items():
        patch = KILL_IN_A_CHECKPOINT
        if name != "killed":
            patch = SIGNAL_IN_A_STEP.format(call=3, rank=0, number=f"signal.{name}")
        line = [patched(patch), ROOT / "train.py", *flags.split(), "--out", name]
        _, err = command(line, expect=status)
        assert "Traceback" not in err
        if name == "SIGINT":
            assert last_line(err).startswith("train.py: interrupted")
        assert load_file(project / name / "last.pt")["step"] == 2
        run_in_process(f"train.py --out {name} --resume --workers 1")  # and the run's flags
        assert column(name, "step") == ["1", "2", "3", "4", "5"]
        assert column(name, "loss") == column("whole", "loss")
        assert_same_run("whole/last.pt", f"{name}/last.pt")


def test_a_second_command_in_the_folder_of_a_run_is_refused_while_the_first_runs(project, refused):
    argv = [ROOT / "train.py", *f"{SHORT} --steps 99 --save-every 1 --out run".split()]
    first = start(argv, project)
    message = "train.py: run: another command writes to it; wait or change --out"
    try:
        while not Path("run/last.pt").exists():
            assert first.is_alive()
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        assert refused("train.py --out run --resume") == message
        Path("run/last.pt").rename("last.pt")  # as before the first checkpoint
        assert refused(f"train.py {SHORT} --steps 1 --out run") == message
        Path("last.pt").rename("run/last.pt")
    finally:
        first.kill()
        first.join()
    step = load_file("run/last.pt")["step"]
    run_in_process(f"train.py --out run --resume --steps {step + 1}")  # the lock is gone too


def test_flags_that_would_make_a_resumed_run_another_one_are_refused(
    project, tiny, refused, garments
):
    run_in_process(f"train.py {SHORT} --steps 2")
    resume = "train.py --resume --steps 3"
    message = "runs/train/last.pt is of another run: "
    assert message + "seed was 0, now 1" in refused(f"{resume} --seed 1")
    assert message + "batch_size was 8, now 4" in refused(f"{resume} --batch-size 4")
    assert message + "holdout was 0.0, now 0.2" in refused(f"{resume} --holdout 0.2")
    assert message + "mirror was True, now False" in refused(f"{resume} --no-mirror")
    line = "finetune_mrar.py --out runs/train --resume --steps 3 --refs 4"
    assert message + "refs was 1, now 4" in refused(line)
    assert "--steps 1: this run has done 2 already" in refused("train.py --resume --steps 1")
    assert "runs/train/last.pt exists: --resume continues" in refused(f"train.py {SHORT}")
    encode("other", 255 - garments[0], garments[1] // 4, ["garment 0", "garment 1", "garment 2"])
    assert "was trained on other images than other has" in refused(f"{resume} --data other")


def test_other_changes_of_a_resumed_run_are_answered_by_one_line_each(project, tiny, run):
    run(f"train.py {SHORT} {CONSTANT_LR} --steps 1")
    Path("cache").rename("moved")
    rest = "the rest of the run follows the new value"

    def answers(flags):
        lines = run(f"train.py --resume {flags}").out.splitlines()
        return {line.removesuffix(f"; {rest}") for line in lines if rest in line}

    changes = {"runs/train: steps was 1, now 2", "runs/train: lr was 0.002, now 0.004"}
    assert answers("--steps 2 --lr 0.004 --data moved --seed 0") == changes
    answers("--steps 3")
    assert column("runs/train", "lr") == ["0.002", "0.004", "0.004"]
    assert answers("--epochs 1") == {"runs/train: epochs was None, now 1"}


def test_a_checkpoint_is_due_after_15_minutes(project, tiny, monkeypatch):
    """A step takes 10 minutes."""
    clock = SimpleNamespace(now=0, monotonic=lambda: clock.now)
    steps = []

    def forward(net, *args, **kwargs):
        clock.now += 600
        return net.loss(*args, **kwargs)

    def save(out, info, *others):
        steps.append(info["step"])

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(TransDiff, "forward", forward)
    run_in_process(f"train.py {SHORT} --steps 7 --save-every 50")
    assert steps == [2, 4, 6, 7]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(project, tiny, run):
    flags = "--data cache --batch-size 8 --sample-every 0 --log-every 50 --steps 9 --save-every 1"
    message = last_line(run(f"train.py {flags} --lr 1e18 --warmup 0", expect=2).err)
    assert re.search(r"gradient of step \d+ is not finite; --resume with a smaller --lr", message)
    last = load_file("runs/train/last.pt")
    assert last["step"] < 9 and all(torch.isfinite(v).all() for v in last["model"].values())


def test_chains_of_16_are_resumed_without_naming_their_length(project, tiny, run, garments):
    np.savez("images.npz", images=garments[0], labels=garments[1] // 5)  # 30 of each class
    flags = "--data images.npz --vae vae.pt --batch-size 2 --sample-every 0 --steps 1"
    run(f"train.py {flags}")
    run(f"finetune_mrar.py {flags} --refs 16")
    out = run("finetune_mrar.py --resume --steps 2").out
    assert "2 steps of 2 chains of 16" in out and "from step 1" in out
    out = run("train.py --resume --steps 3 --out runs/mrar").out
    assert "3 steps of 2 chains of 16" in out


# -------------------------------------------------------------------------------- several processes


def start(argv, folder, env={}, name="0"):
    """Start `python argv` as a fork; its output goes to the files `out NAME` and `err NAME`."""
    argv = [str(word) for word in argv]
    streams = (folder / f"out {name}", folder / f"err {name}")
    process = forks.Process(target=run_script, args=(argv, folder, env, *streams))
    process.start()
    return process


def run_on_two_ranks(line, folder, script=None, expect=(0, 0)):
    """Run a command in two processes, in the environment that torchrun sets; faster.

    script  patches the command
    """
    argv = [ROOT / line.split()[0], *line.split()[1:]]
    if script:
        argv = [script, *argv]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    ranks = [start(argv, folder, dict(env, RANK=r, LOCAL_RANK=r), r) for r in ("0", "1")]
    for rank in ranks:
        rank.join(120)
    errors = "".join((folder / f"err {r}").read_text() for r in ("0", "1"))
    assert tuple(rank.exitcode for rank in ranks) == expect, errors
    return (folder / "out 0").read_text()


def test_a_killed_run_of_two_processes_is_resumed_bit_for_bit(project):
    """The kill is in the middle of an accumulation. One process can go on, with other draws."""
    flags = f"{SHORT} --steps 4 --save-every 2 --dtype fp32 --device cpu --accumulate 2"
    run_on_two_ranks(f"train.py {flags} --out whole", project, patched(""))
    script = patched(SIGNAL_IN_A_STEP.format(call=6, rank=1, number=9))
    run_on_two_ranks(f"train.py {flags} --out killed", project, script, expect=(1, -9))
    assert load_file("killed/last.pt")["step"] == 2
    shutil.copytree("killed", "alone")
    run_on_two_ranks("train.py --resume --out killed --device cpu", project)
    assert_same_run("whole/last.pt", "killed/last.pt")
    run_in_process("train.py --resume --out alone")
    assert column("alone", "step") == ["1", "2", "3", "4"]
    assert column("alone", "loss")[:2] == column("whole", "loss")[:2]


# The parts of a cache are 16 images, and the group of processes may start only after encoding.
ENCODE_IN_PARTS = """
from pathlib import Path
vae.PART = 16
init = train.dist.init_process_group
def init_after_encoding(*args, **kwargs):
    assert list(Path("runs").glob("latents-*/cache.json")), "not encoded yet"
    assert args == ("gloo",) and kwargs["device_id"] is None
    assert kwargs["timeout"].total_seconds() == 1800
    init(*args, **kwargs)
train.dist.init_process_group = init_after_encoding
"""


def test_two_processes_encode_images_before_they_form_a_group(project, command):
    """A group has a time-out, and encoding ImageNet takes longer."""
    flags = "--data images.npz --vae vae.pt --batch-size 8 --steps 1 --sample-every 0 --device cpu"
    script = patched(ENCODE_IN_PARTS)
    torchrun = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 --standalone {script}"
    out, _ = command(f"train.py {flags}", launcher=torchrun.split())
    assert out.count("wrote 60 of 60 images") == 1
    (cache,) = Path("runs").glob("latents-images-32-*")
    assert len(list(cache.glob("0*.npy"))) == 4


# --------------------------------------------------------------------------- images and their cache


def test_other_images_or_another_vae_are_encoded_anew(project, tiny, garments, run):
    """train.py takes a cache of its own again for the same images and VAE alone, and says so."""
    flags = "--data images.npz --vae vae.pt --batch-size 8 --sample-every 0 --steps 1"

    def caches_after(out):
        printed = run(f"train.py {flags} --out {out}")
        assert ("encoding" in printed.err) == (out != "again")
        return len(list(project.glob("latents-images-32-*"))), printed.out

    assert caches_after("first")[0] == 1
    (cache,) = project.glob("latents-images-32-*")
    long_ago = time.mktime((2020, 2, 20, 20, 20, 20, 0, 0, -1))
    os.utime(cache / "cache.json", (long_ago, long_ago))
    count, out = caches_after("again")
    assert count == 1 and "Feb 20 20:20:20 2020" in out
    np.savez("images.npz", images=255 - garments[0], labels=garments[1])
    assert caches_after("other")[0] == 2
    save_small_vae("vae.pt", seed=1)
    assert caches_after("third")[0] == 3


def test_a_run_that_starts_anew_takes_the_vae_of_its_own_latents(project, tiny, garments):
    """A run of another VAE in this folder was stopped before its first checkpoint."""
    run_in_process(f"train.py {SHORT} --steps 1")
    Path("runs/train/last.pt").unlink()
    save_small_vae("vae.pt", seed=1)
    encode("other", garments[0], garments[1], [str(k) for k in range(10)])
    run_in_process("train.py --data other --batch-size 8 --steps 1 --sample-every 0")
    run_in_process("sample.py --ckpt runs/train --n 1 --steps 1")  # which checks the VAE
    assert Path("runs/train/vae.pt").read_bytes() == Path("vae.pt").read_bytes()


def test_no_mirror_is_remembered_by_resume_and_by_stage_2(project, tiny, run):
    """The mirror images of this cache are NaN: who reads one is stopped."""
    part = np.load("cache/00000.npy")
    part[:, 1] = np.nan
    np.save("cache/00000.npy", part)
    err = run(f"train.py {SHORT} --steps 1 --out mirrored", expect=2).err
    assert "step 1 is not finite" in err
    run_in_process(f"train.py {SHORT} --steps 2 --no-mirror --holdout 0.2")
    run_in_process("train.py --resume --steps 4 --sample-every 1")
    assert all(float(loss) > 0 for loss in column("runs/train", "holdout_loss")[2:])
    run_in_process("finetune_mrar.py --batch-size 2 --steps 2 --sample-every 0 --log-every 1")
    assert len(read_log("runs/mrar")) == 2


# ----------------------------------------------------------------- classes without images, held out


def test_classes_without_images_are_named_and_never_drawn(project, tiny, garments, run, refused):
    """Labels 1 to 3: there is a class 0, without images."""
    labels = np.minimum(garments[1] // 3 + 1, 3)
    encode("gap", garments[0], labels, ["0", "1", "2", "3"])
    out = run("train.py --data gap --batch-size 8 --steps 1").out
    assert "1 of 4 classes have no images: 0\n" in out
    height = Image.open("runs/train/samples-0000001.png").height
    assert 3 * 64 <= height < 4 * 64  # three rows of images, each 32 px enlarged twice
    out = run("finetune_mrar.py --batch-size 4 --steps 1").out
    assert "1 of 4 classes have no chain of 4: 0\n" in out
    for ckpt in ("runs/train", "runs/mrar/ema.pt"):
        run(f"sample.py --ckpt {ckpt} --num 6 --refs 1 --steps 1 --out s.npz")
        assert np.load("s.npz")["arr_1"].tolist() == [3, 1, 2] * 2  # 24, 18, 18 images
        Path("s.npz").unlink()
        message = "--class 0: this model was trained on the classes 1, 2, 3"
        assert message in refused(f"sample.py --ckpt {ckpt} --class 0")


def sides(name):
    """(kept, held out) of 60 images of a class."""
    names = [f"{name}/{i}" for i in range(60)]
    return split(SimpleNamespace(names=lambda: names, labels=np.zeros(60)), 0.2)


def test_an_image_is_held_out_by_its_name_whatever_is_added(project, garments):
    images, labels = garments
    encode("few", images[:50], labels[:50], [str(k) for k in range(10)])
    encode("more", images, labels, [str(k) for k in range(10)])
    few, more = (split(LatentCache(name), 0.3) for name in ("few", "more"))
    assert [part[part < 50].tolist() for part in more] == [part.tolist() for part in few]
    assert 0.15 < len(more[1]) / 60 < 0.45 and not set(more[0]) & set(more[1])


KEPT, HELD_OUT = sides("rare")


@pytest.mark.parametrize("rare,missing", [(HELD_OUT[:1], "images"), (KEPT[:3], "chain of 4")])
def test_classes_without_images_to_train_on_are_named_and_refused(
    rare, missing, project, tiny, garments, run, refused
):
    labels = np.isin(np.arange(60), rare).astype(int)
    encode("rare", garments[0], labels, ["common", "rare"])
    flags = "--batch-size 4 --steps 1 --sample-every 0"
    runs = {"runs/train": run(f"train.py --data rare {flags} --holdout 0.2").out}
    runs["runs/mrar"] = run(f"finetune_mrar.py {flags}").out
    for name, out in runs.items():
        absent = "images" if name == "runs/train" else "chain of 4"
        if absent == missing or name == "runs/mrar":
            assert f"1 of 2 classes have no {absent}: rare\n" in out
            message = "--class rare: this model was trained on the classes common"
            assert message in refused(f"sample.py --ckpt {name} --class rare")
        else:
            assert "classes have no" not in out
            run(f"sample.py --ckpt {name} --class rare --n 1 --steps 1")
    message = refused("finetune_mrar.py --steps 1 --refs 64 --out other")
    assert "no class has 64 images to train on" in message


def test_classes_too_small_to_be_held_out_are_left_out_of_the_held_out_loss(
    project, tiny, garments
):
    """Class b has 4 images to train on and one held out: no chain of 4 to be measured."""
    kept, held_out = sides("b")
    labels = np.isin(np.arange(60), [*kept[:4], held_out[0]]).astype(int)
    encode("small", garments[0], labels, ["a", "b"])
    flags = "--batch-size 4 --steps 1 --sample-every 1"
    run_in_process(f"train.py --data small {flags} --holdout 0.2")
    run_in_process(f"finetune_mrar.py {flags}")  # with the holdout of stage 1
    (loss,) = column("runs/mrar", "holdout_loss")
    assert float(loss) > 0 and load_checkpoint("runs/mrar").info["counts"] == [55, 5]


def test_a_holdout_without_a_chain_has_no_loss_and_one_of_all_is_refused(
    project, tiny, garments, refused
):
    encode("few", garments[0][:9], garments[1][:9], ["a", "b"])
    flags = "train.py --data few --batch-size 3 --steps 1 --sample-every 1 --holdout"
    run_in_process(f"{flags} 0.01")
    assert column("runs/train", "holdout_loss") == [""]
    message = "no class has 1 images to train on (--holdout 1.0)"
    assert message in refused(f"{flags} 1 --out all")


def test_the_loss_of_held_out_images_is_logged_and_does_not_depend_on_a_stop(project, tiny):
    flags = f"--data cache --batch-size 8 --log-every 1 --holdout 0.3 {CONSTANT_LR}"
    run_in_process(f"train.py {flags} --sample-every 2 --steps 4 --out whole")
    run_in_process(f"train.py {flags} --sample-every 2 --steps 2 --out stopped")
    run_in_process("train.py --resume --steps 4 --out stopped")
    whole, stopped = (column(run, "holdout_loss") for run in ("whole", "stopped"))
    assert [bool(value) for value in whole] == [False, True, False, True]  # with the pictures
    assert float(whole[3]) > 0 and stopped[1] == whole[1] and stopped[3] == whole[3]
    assert column("whole", "loss") == column("stopped", "loss")


# ---------------------------------------------------------------------------- starting from a model


@pytest.mark.parametrize("init", ["runs/train", "runs/train/last.pt"])
def test_init_gives_a_class_the_ema_embedding_of_its_name(init, project, tiny, garments, run):
    """The learning rate is 0: the weights after a step are those before it."""
    run(f"train.py {SHORT} --steps 1 --seed 1")
    old = load_file("runs/train/last.pt")["model_ema"]["ar.class_embedding.weight"]
    encode("other", garments[0], garments[1] % 4, ["bag", "garment 1", "car", "garment 0"])
    flags = "--steps 1 --batch-size 8 --sample-every 0 --lr 0 --out new"
    out = run(f"train.py --init {init} --data other {flags}").out
    rows = weights("new/last.pt")["ar.class_embedding.weight"]
    assert torch.equal(rows[1], old[1]) and torch.equal(rows[3], old[0])
    assert "runs/train/last.pt: class embeddings matched by name; new: bag, car\n" in out


def test_stage_2_takes_its_size_from_stage_1(project, run, monkeypatch):
    """Also that of a size of one's own which is as wide as XS."""
    own = dataclasses.replace(SIZES["XS"], ar_depth=1, dit_depth=1)
    monkeypatch.setitem(model.SIZES, "mine", own)
    run(f"train.py {SHORT} --steps 1 --size mine")
    assert "TransDiff-mine: " in run(f"finetune_mrar.py {SHORT} --steps 1").out
    assert load_file("runs/mrar/ema.pt")["config"]["ar_depth"] == 1
    err = run(f"finetune_mrar.py {SHORT} --steps 1 --size S --out other", expect=2).err
    assert "--size S: the model of --init has width 160; leave out --size" in last_line(err)


@pytest.mark.weights
def test_the_wrong_vae_for_init_is_found_before_images_are_encoded(project, refused):
    run_in_process(f"train.py {SHORT} --steps 1")
    save_small_vae("other.pt", seed=1)
    for data in ("images.npz --vae other.pt", ROOT / "demo" / "fashion_mnist_10k.npz"):
        flags = f"--data {data} --steps 1 --batch-size 2"
        message = "--init runs/train/ema.pt: was trained on the latents of another VAE"
        assert message in refused(f"finetune_mrar.py --init runs/train/ema.pt {flags}")


def test_only_decoder_trains_the_decoder_at_another_resolution(project, tiny):
    """The 512 px recipe in small: the AR Transformer is kept, the decoder's positions grow."""
    run_in_process(f"train.py {SHORT} --steps 1")
    before = load_file("runs/train/last.pt")["model_ema"]
    run_in_process("vae.py encode --data images.npz --vae vae.pt --image-size 64 --out of-64-px")
    flags = "--batch-size 8 --steps 2 --lr 1e-3 --warmup 0 --sample-every 0 --out large"
    run_in_process(f"train.py --data of-64-px --init runs/train --only-decoder {flags}")
    run_in_process("train.py --resume --steps 3 --out large")
    after = weights("large/last.pt")
    assert after["decoder.positions"].shape[1] == 256
    kept = {k: v for k, v in before.items() if not k.startswith("decoder.")}
    assert all(torch.equal(after[k], v) for k, v in kept.items())
    name = "decoder.input_proj.weight"
    assert not torch.equal(after[name], before[name])


# ----------------------------------------------------------------------------------------- refusals


def test_a_mistake_in_the_code_that_reads_images_or_the_cache_is_a_traceback(project, monkeypatch):
    """It is neither "left out, not readable" nor a damaged cache."""
    Path("photos/a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("photos/a/0.png")
    with monkeypatch.context() as patch, pytest.raises(NameError, match="Image"):
        patch.delattr(vae, "Image")  # of read_image
        run_in_process("vae.py encode --data photos --vae vae.pt --out new")
    cache = LatentCache("cache")
    with monkeypatch.context() as patch, pytest.raises(NameError, match="np"):
        patch.delattr(vae, "np")  # of moments
        cache.moments(np.zeros(1, int), np.zeros(1, int))


@pytest.mark.parametrize("line,messages", [
    ("train.py --size B", ["latents: not there, not a latent", "vae.py encode --data SRC", "latents"]),
    ("finetune_mrar.py", ["--init runs/train: not there", "run train.py first"]),
    ("train.py --data cache --batch-size 8 --batch-mul 1 --steps 1 --only-decoder",
     ["--only-decoder: give --init"]),
    ("train.py --data images.npz --vae nothing.pt", ["nothing.pt: No such file"]),
    ("train.py --size B --data images.npz", ["--vae: name the VAE for images.npz"]),
    ("train.py --data cache --vae vae.pt", ["--data cache: is a cache; leave out --vae"]),
    ("train.py --data cache --init images.npz", ["images.npz: not a usable checkpoint"]),
    ("train.py --data cache --init vae.pt", ["vae.pt: not a usable TransDiff model"]),
    ("train.py --data cache --batch-size 8 --accumulate 3 --steps 1",
     ["--batch-size 8: must be a multiple of 1 processes x --accumulate 3"]),
    ("train.py --data cache --lr -1", ["--lr: -1: must be from 0"]),
    ("finetune_mrar.py --refs 5", ["--refs: invalid choice: 5"]),
])  # fmt: skip
def test_missing_or_wrong_inputs_are_refused_with_the_remedy(line, messages, project, refused):
    error = refused(line)
    assert all(message in error for message in messages), error
