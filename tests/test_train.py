"""Stages 1 and 2: the order of the data, the recipes, resuming a run, and the commands as a user runs them."""

import argparse
import csv
import dataclasses
import logging
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, forks, run_script
from in_process import run_in_process
from test_vae import save_small_vae

from model import SIZES, TransDiff, load_checkpoint, load_file
from train import (
    COMMON,
    RECIPES,
    Chains,
    resolve_flags,
    learning_rate,
    loss_inputs,
    make_optimizer,
    split,
    update_ema,
)
from vae import Images, encode_images, load_vae

# ------------------------------------------------------------------------------------------ chains and draws


def fake_cache(counts, seed=0):
    """A cache of counts[k] images of class k. Channel 0 of the moments is the image's index, channel 1 its side."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    moments = np.empty((len(labels), 2, 2, 1, 1), np.float16)
    moments[:, :, 0, 0, 0] = np.arange(len(labels))[:, None]
    moments[:, :, 1, 0, 0] = [0, 1]

    class Cache(SimpleNamespace):
        def __len__(self):
            return len(self.labels)

    return Cache(labels=labels, moments=moments, classes=[f"class {i}" for i in range(len(counts))])


def read_epochs(chains, n):
    """Image indices [chains, refs] of each of n epochs, as the batches give them."""
    step, seen, per_epoch = 0, [], chains.chains_per_epoch
    while len(seen) < n * per_epoch:
        moments, labels = chains[step]
        images = moments[:, :, 0, 0, 0].long().numpy()
        assert (chains.cache.labels[images] == labels[:, None].numpy()).all(), "a chain has images of another class"
        seen += list(images)
        step += 1
    return [np.stack(seen[i * per_epoch : (i + 1) * per_epoch]) for i in range(n)]


@pytest.mark.parametrize("refs,counts", [(1, [5, 9, 7]), (4, [8, 12, 4]), (4, [9, 15, 6]), (16, [33, 16])])
def test_an_epoch_has_every_image_once_as_a_member_of_one_chain(refs, counts):
    """Except for the remainder of each class. The chains and their order are new in each epoch."""
    cache = fake_cache(counts)
    first, second = read_epochs(Chains(cache, refs, batch_size=5, seed=3), 2)
    for epoch in (first, second):
        images, n = np.unique(epoch, return_counts=True)
        assert (n == 1).all()
        assert np.bincount(cache.labels[images]).tolist() == [count // refs * refs for count in counts]
    assert first.tolist() != second.tolist()
    if refs > 1:
        members = [{frozenset(chain.tolist()) for chain in epoch} for epoch in (first, second)]
        assert members[0] != members[1]


def test_each_image_is_in_some_epoch_although_a_remainder_is_left_out():
    epochs = read_epochs(Chains(fake_cache([5]), 4, 1, seed=0), 30)  # 5 images in chains of 4
    assert len(np.unique(np.concatenate([epoch.ravel() for epoch in epochs]))) == 5


def test_classes_with_too_few_images_for_a_chain_are_named():
    with pytest.raises(ValueError, match=r"classes have fewer than 4 images.*: class 1"):
        Chains(fake_cache([8, 3, 4]), 4, 2, seed=0)


def test_the_batches_of_all_ranks_are_the_batch_of_one_process():
    cache = fake_cache([13, 11])
    chains = Chains(cache, 1, 6, seed=1)
    ranks = [Chains(cache, 1, 6, seed=1, rank=r, world=3) for r in range(3)]
    for step in (50, 0, 3, 4):  # in any order; 24 images, 6 a batch: the second epoch starts at step 4
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), chains[step][0])


def test_half_of_the_images_are_mirrored():
    chains = Chains(fake_cache([40]), 1, 40, seed=0)
    assert 60 < torch.cat([chains[step][0] for step in range(5)])[:, 0, 1, 0, 0].sum() < 140  # of 200


def draws(seeds, t="logit-normal"):
    """Latents, t, noise and drop of chains whose posteriors are standard normal."""
    moments, args = torch.zeros(len(seeds), 4, 16, 8, 8), SimpleNamespace(batch_mul=2, t=t)
    config, labels = dataclasses.replace(SIZES["XS"], refs=4), torch.zeros(len(seeds), dtype=torch.int64)
    latents, _, t, noise, _, drop = loss_inputs(moments, labels, seeds, SimpleNamespace(scale=1), config, args)
    return latents, t, noise, drop


def test_the_random_numbers_of_a_chain_depend_on_its_seed_alone():
    four, one = draws(range(5, 9)), draws(range(7, 8))
    assert [tuple(x.shape) for x in four] == [(4, 4, 8, 8, 8), (4, 8), (4, 8, 8, 8, 8), (4,)]
    assert all(torch.equal(a[2:3], b) for a, b in zip(four, one))
    assert four[1].unique().numel() == 32


@pytest.mark.parametrize("refs", [1, 4])
def test_held_out_images_are_never_trained_on(refs):
    cache = fake_cache([400, 500])
    cache.labels[7] = -1  # an image that could not be read
    kept, held_out = split(cache.labels, 0.1)
    assert 60 < len(held_out) < 120 and sorted([7, *kept, *held_out]) == list(range(900))
    assert np.array_equal(split(cache.labels[:500], 0.1)[1], held_out[held_out < 500])
    chains = Chains(cache, refs, 10, seed=0, images=kept)
    seen = np.unique(np.concatenate([chains.indices(step).ravel() for step in range(300)]))
    assert np.array_equal(seen, kept)


@pytest.mark.parametrize("gigabytes,micro_batches", [(80, 8), (160, 4), (24, 32)])
def test_a_batch_is_cut_until_it_fits_the_memory_of_the_gpu(gigabytes, micro_batches, monkeypatch):
    gpu = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    flags = dict(size="B", refs=1, batch_size=256, accumulate=None, init=None, resume=False)
    assert resolve_flags(argparse.Namespace(**flags), None, torch.device("cuda")).accumulate == micro_batches


def test_the_random_numbers_have_the_distributions_asked_for():
    posterior_noise, t, noise, drop = draws(range(2000), "uniform")
    assert abs(drop.float().mean() - SIZES["XS"].label_drop_prob) < 0.02
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.std() - 12**-0.5) < 0.01
    assert abs(noise.std() - 1) < 0.01 and abs(posterior_noise.std() - 1) < 0.01
    assert abs((noise[:, 0] * posterior_noise[:, 0]).mean()) < 0.01  # independent


# ------------------------------------------------------------------------------------------ recipes and parts of a step


def test_recipes_are_those_of_appendix_b():
    r = RECIPES["1-step"]
    assert (r["batch_size"], r["lr"], r["epochs"], r["warmup"] * r["epochs"]) == (2048, 8e-4, 800, 100)
    assert (r["batch_mul"], r["ema"]) == (4, 0.9999)
    r = RECIPES["MRAR"]
    assert (r["batch_size"], r["lr"], r["epochs"], r["warmup"] * r["epochs"], r["batch_mul"]) == (2048, 5e-5, 40, 10, 2)
    r = RECIPES["512 px"]
    assert (r["lr"], r["epochs"], r["warmup"] * r["epochs"], r["batch_mul"], r["ema"]) == (1e-4, 150, 10, 4, 0.999)
    assert (COMMON["weight_decay"], COMMON["clip"], COMMON["t"]) == (0.02, 3.0, "logit-normal")


def test_the_learning_rate_warms_up_and_decays_linearly():
    args = SimpleNamespace(lr=1.0, steps=100, warmup=0.1, cooldown=0.0)
    assert [learning_rate(step, args) for step in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    args.cooldown = 0.5
    assert [learning_rate(step, args) for step in (50, 75)] == [1.0, 0.5]
    assert learning_rate(99, args) == pytest.approx(0.02)


def test_weight_decay_is_for_the_matrices_of_the_ar_transformer_alone():
    model = TransDiff(SIZES["XS"])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, SimpleNamespace(lr=1e-3, weight_decay=0.02)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.02, 0] and groups[0]["betas"] == (0.9, 0.95)
    decayed, others = ({names[id(p)] for p in group["params"]} for group in groups)
    assert "ar.blocks.0.mlp.fc1.weight" in decayed and "cond_positions" in decayed
    assert {"decoder.blocks.0.mlp.fc1.weight", "ar.norm_in.weight", "ar.blocks.0.attn.qkv.bias"} <= others
    assert len(decayed) + len(others) == len(names)


def test_ema_moves_towards_the_weights_without_a_graph():
    ema, model = (TransDiff(SIZES["XS"]) for _ in range(2))
    ema.requires_grad_(False)
    expected = [0.9 * a + 0.1 * b.detach() for a, b in zip(ema.parameters(), model.parameters())]
    update_ema(ema, model, 0.9)
    for p, e in zip(ema.parameters(), expected):
        torch.testing.assert_close(p, e)
        assert p.grad_fn is None and not p.requires_grad


# ------------------------------------------------------------------------------------------ the commands

SHORT = "--data cache --batch-size 8 --log-every 1 --sample-every 0"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, garments):
    """A folder with images.npz, of three classes, vae.pt, an untrained VAE, and cache, the images' latents."""
    folder = tmp_path_factory.mktemp("encoded")
    labels, classes = garments[1] // 4, np.array(["garment 0", "garment 1", "garment 2"])
    np.savez(folder / "images.npz", images=garments[0], labels=labels, classes=classes)
    save_small_vae(folder / "vae.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the cache records the path of the VAE
        encode_images(Images("images.npz", 32), load_vae("vae.pt"), "cache")
    return folder


@pytest.fixture
def project(encoded, tmp_path, monkeypatch):
    """A copy of `encoded`, as the current folder."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path):
    return load_file(path)["model"]


def assert_same_run(a, b):
    """The files last.pt have the same weights, EMA weights and moments of the optimiser, bit for bit."""
    a, b = load_file(a), load_file(b)
    assert a["step"] == b["step"]
    for part in ("model", "model_ema"):
        assert all(torch.equal(b[part][k], v) for k, v in a[part].items()), part
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(x[k], y[k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def read_log(run):
    with open(f"{run}/log.csv") as f:
        return list(csv.DictReader(f))


def losses(run):
    return np.array([float(row["loss"]) for row in read_log(run)])


def test_train_finetune_sample(project, command):
    """The three stages, as a user runs them, from images."""
    data = "--data images.npz --vae vae.pt --batch-size 8 --log-every 1"
    out, err = command(f"train.py {data} --steps 3 --sample-every 2")
    run = project / "runs" / "train"
    assert "encoding" in err and "TransDiff-XS" in out and "runs/train/ema.pt" in out
    pictures = {"samples-0000002.png", "samples-0000003.png"}
    assert {path.name for path in run.iterdir()} == {"last.pt", "ema.pt", "vae.pt", "log.csv"} | pictures
    rows = read_log(run)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["loss"]) > 0 and float(row["images_per_second"]) > 0 for row in rows)
    ema, last = load_file(run / "ema.pt"), load_file(run / "last.pt")
    assert all(v.dtype == torch.float16 for v in ema["model"].values()) and ema["classes"][2] == "garment 2"
    assert all(torch.equal(ema["model"][k], v.half()) for k, v in last["model_ema"].items())
    _, err = command(f"train.py {data} --steps 3", expect=2)
    assert "--resume" in err

    # Stage 2 continues on the data of stage 1.
    out, err = command("finetune_mrar.py --batch-size 8 --steps 2 --sample-every 0")
    assert "mask embedding copied into 16 mask tokens" in out and "chains of 4" in out and "encoding" not in err
    assert load_checkpoint(project / "runs" / "mrar" / "ema.pt").config.refs == 4

    out, _ = command("sample.py --ckpt runs/train/ema.pt --class 2 --n 2 --steps 2")
    assert "(garment 2; refs 1" in out
    flags = "--n 2 --steps 2 --out new/x.npz"
    command(["sample.py", "--ckpt", "runs/mrar/last.pt", "--class", "garment 1", "0", *flags.split()])
    arrays = np.load(project / "new" / "x.npz")
    assert arrays["arr_0"].shape == (4, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [1, 1, 0, 0]


def test_samples_are_drawn_before_the_first_row_of_the_log(project):
    run_in_process("train.py --data cache --batch-size 8 --steps 2 --sample-every 1 --log-every 50")
    assert {path.name for path in Path("runs/train").glob("samples-*")} == {f"samples-000000{i}.png" for i in (1, 2)}


# The scripts below patch train.py and run it: python SCRIPT train.py FLAGS.
PATCHED = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train
from model import TransDiff
from vae import run_main
{patch}
run_main(train.main)
"""

KILL_AFTER_THE_FIRST_CHECKPOINT = """
atomic_write = train.atomic_write
def write(path, data):
    atomic_write(path, data)
    if "last.pt" in str(path):
        os.kill(os.getpid(), 9)
train.atomic_write = write
"""

# One rank of a run gets a signal in the middle of a step: in call number `call` of its loss, from 0.
SIGNAL_IN_A_STEP = """
loss, calls = TransDiff.loss, iter(range(99))
def forward(*args, **kwargs):
    if next(calls) == {call} and os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), {number})
    return loss(*args, **kwargs)
TransDiff.forward = forward
"""


def patched(folder, patch):
    """Write the script that patches train.py; returns its path."""
    (folder / "patched.py").write_text(PATCHED.format(patch=patch))
    return folder / "patched.py"


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(project, command, capsys):
    """The weights, EMA weights and optimiser, bit for bit. The kill is in the middle of an epoch."""
    run_in_process(f"train.py {SHORT} --steps 5 --save-every 2 --keep-every 3 --out whole")
    assert (project / "whole" / "ema-0000003.pt").exists()
    script = patched(project, KILL_AFTER_THE_FIRST_CHECKPOINT)
    flags = f"{SHORT} --steps 5 --save-every 2 --out killed".split()
    command([script, ROOT / "train.py", *flags], expect=-signal.SIGKILL)
    assert load_file(project / "killed" / "last.pt")["step"] == 2

    run_in_process("train.py --out killed --resume --seed 1", expect=2)
    assert "killed/last.pt is of another run: seed 0 there, 1 here" in capsys.readouterr().err
    run_in_process("train.py --out killed --resume")  # with the flags that the run was started with
    assert [row["step"] for row in read_log("killed")] == ["1", "2", "3", "4", "5"]
    assert_same_run("whole/last.pt", "killed/last.pt")

    run_in_process(f"finetune_mrar.py {SHORT} --out killed --resume", expect=2)
    assert "killed/last.pt is of another run: refs 1 there, 4 here" in capsys.readouterr().err
    shutil.copy("killed/ema.pt", "killed/last.pt")
    run_in_process("train.py --out killed --resume", expect=2)
    assert "killed/last.pt: not the last.pt of a run" in capsys.readouterr().err


def test_the_loss_of_held_out_images_is_logged_and_does_not_depend_on_a_stop(project):
    flags = "--data cache --batch-size 8 --log-every 1 --holdout 0.3 --sample-every 2 --cooldown 0"
    run_in_process(f"train.py {flags} --steps 4 --out whole")
    run_in_process(f"train.py {flags} --steps 3 --out stopped")
    run_in_process("train.py --resume --steps 4 --out stopped")
    whole, stopped = ([row["holdout_loss"] for row in read_log(run)] for run in ("whole", "stopped"))
    assert [bool(value) for value in whole] == [False, True, False, True]  # where pictures are drawn
    assert float(whole[3]) > 0 and stopped[1] == whole[1] and stopped[3] == whole[3]
    run_in_process("train.py --resume --steps 5 --holdout 0.2 --out whole", expect=2)


def test_chains_of_16_are_resumed_without_naming_their_length(project, capsys, garments):
    np.savez("images.npz", images=garments[0], labels=garments[1] // 5)  # 30 of each class
    flags = "--data images.npz --vae vae.pt --batch-size 2 --sample-every 0 --steps 1 --cooldown 0"
    run_in_process(f"train.py {flags}")
    run_in_process(f"finetune_mrar.py {flags} --refs 16")
    capsys.readouterr()
    run_in_process("finetune_mrar.py --resume --steps 2")
    out = capsys.readouterr().out
    assert "chains of 16" in out and "resuming from runs/mrar/last.pt at step 1" in out


# ------------------------------------------------------------------------------------------ several processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def run_on_two_ranks(line, folder):
    """Run a command on two processes, with the environment that torchrun sets; faster than torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    script, *flags = line.split()
    argv, ranks = [str(ROOT / script), *flags], []
    for rank in ("0", "1"):
        out, err = folder / f"out {rank}", folder / f"err {rank}"
        ranks.append(
            forks.Process(target=run_script, args=(argv, folder, env | dict(RANK=rank, LOCAL_RANK=rank), out, err))
        )
        ranks[-1].start()
    for rank in ranks:
        rank.join(120)
    errors = "".join((folder / f"err {rank}").read_text() for rank in ("0", "1"))
    assert [rank.exitcode for rank in ranks] == [0, 0], errors
    return (folder / "out 0").read_text()


def test_a_run_is_the_same_however_its_batches_are_split(project, command):
    """Over micro-batches, over two processes, or over both: the same losses and gradients to rounding."""
    flags = f"train.py {SHORT} --steps 3 --dtype fp32 --device cpu"
    run_in_process(f"{flags} --out one")
    run_in_process(f"{flags} --out micro --accumulate 4")
    assert "2 x cpu" in run_on_two_ranks(f"{flags} --out ranks", project)
    out, _ = command(f"{flags} --out both --accumulate 2", launcher=TORCHRUN)
    assert "2 x cpu" in out
    one = load_file("one/last.pt")["optimizer"]["state"].values()
    for name in ("micro", "ranks", "both"):
        np.testing.assert_allclose(losses(name), losses("one"), atol=2e-4)
        # the means of the gradients; the first steps of Adam show their signs alone
        for a, b in zip(one, load_file(f"{name}/last.pt")["optimizer"]["state"].values()):
            torch.testing.assert_close(b["exp_avg"], a["exp_avg"], atol=2e-5, rtol=2e-3)


def test_a_killed_run_of_two_processes_is_resumed_by_two_and_by_one(project, command):
    """By two bit for bit, by one with the same losses to rounding. The kill is in the middle of an accumulation."""
    flags = f"{SHORT} --steps 4 --save-every 2 --dtype fp32 --device cpu --accumulate 2"
    run_on_two_ranks(f"train.py {flags} --out whole", project)
    script = patched(project, SIGNAL_IN_A_STEP.format(call=6, rank=1, number=int(signal.SIGKILL)))
    command(f"train.py {flags} --out killed", expect=1, launcher=(*TORCHRUN, str(script)))
    assert load_file("killed/last.pt")["step"] == 2
    shutil.copytree("killed", "alone")
    run_on_two_ranks("train.py --resume --out killed", project)
    run_in_process("train.py --resume --out alone")
    assert_same_run("whole/last.pt", "killed/last.pt")
    assert len(losses("whole")) == 4
    np.testing.assert_allclose(losses("alone"), losses("whole"), atol=2e-4)


@pytest.mark.parametrize("number,world", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_a_run_after_its_step_with_a_checkpoint(project, command, number, world):
    """A signal to one process in the third step of 10,000: every process finishes the step; --resume continues."""
    script = patched(project, SIGNAL_IN_A_STEP.format(call=2, rank=0, number=int(number)))
    flags = f"{SHORT} --steps 10000 --out stopped"
    if world == 1:
        out, err = command([script, ROOT / "train.py", *flags.split()], expect=128 + number)
    else:
        out, err = command(f"train.py {flags}", expect=1, launcher=(*TORCHRUN, str(script)))
    assert "stopped at step 3, --resume continues; stopped has last.pt" in out
    assert "Traceback" not in err.split("torch/distributed")[0]  # torchrun ends with a traceback of its own
    assert load_file("stopped/last.pt")["step"] == 3
    if world == 1:
        run_in_process("train.py --resume --out stopped --steps 4 --warmup 1 --cooldown 0")
        assert load_file("stopped/last.pt")["step"] == 4


# ------------------------------------------------------------------------------------------ flags and failures


def test_a_batch_that_processes_and_micro_batches_do_not_divide_is_refused(project, capsys):
    run_in_process(f"train.py {SHORT} --steps 2 --accumulate 3", expect=2)
    message = "--batch-size 8: must be a multiple of 1 processes x --accumulate 3"
    assert message in capsys.readouterr().err


def test_epochs_give_the_length_of_a_run(project):
    run_in_process(f"train.py {SHORT} --epochs 1")
    assert load_file("runs/train/last.pt")["step"] == 8  # 60 images, 8 a step


def test_other_images_or_another_vae_are_encoded_anew(project, garments, capsys):
    """train.py encodes images into a cache of its own, and takes that again for the same images and VAE alone."""
    flags = "--data images.npz --vae vae.pt --batch-size 8 --sample-every 0 --steps 1"

    def caches_after(out):
        run_in_process(f"train.py {flags} --out {out}")
        return len(list(project.glob("latents-images-32-*")))

    assert caches_after("first") == 1
    capsys.readouterr()
    assert caches_after("again") == 1 and "encoding" not in capsys.readouterr().err
    np.savez("images.npz", images=255 - garments[0], labels=garments[1])
    assert caches_after("other") == 2
    save_small_vae("vae.pt", seed=1)
    assert caches_after("third") == 3
    (project / "first").rename(project / "moved")  # a run's folder has its own copy of the VAE
    run_in_process("sample.py --ckpt moved --n 1 --steps 1")
    capsys.readouterr()
    run_in_process("sample.py --ckpt moved --vae vae.pt --n 1 --steps 1", expect=2)
    assert "--vae vae.pt: not the VAE of this model's latents" in capsys.readouterr().err
    (project / "moved" / "vae.pt").unlink()
    run_in_process("sample.py --ckpt moved --n 1 --steps 1", expect=2)
    assert "demo/vae.pt: not the VAE of this model's latents" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(project, capsys):
    flags = "--data cache --batch-size 8 --sample-every 0 --log-every 50 --steps 9 --save-every 1"
    run_in_process(f"train.py {flags} --lr 1e18 --warmup 0", expect=2)
    message = r"the loss or gradient of step \d+ is not finite; --resume with a smaller --lr"
    assert re.search(message, capsys.readouterr().err)
    last = load_file("runs/train/last.pt")
    assert last["step"] < 9 and all(torch.isfinite(v).all() for v in last["model"].values())


def test_workers_read_the_same_batches_as_the_main_process(project):
    run_in_process(f"train.py {SHORT} --steps 3 --out plain")
    run_in_process(f"train.py {SHORT} --steps 3 --out workers --workers 2")
    assert_same_run("plain/last.pt", "workers/last.pt")


def test_a_compiler_that_fails_is_one_line_that_names_no_compile(project, monkeypatch, capsys, caplog):
    def fail(graph, inputs):
        raise RuntimeError("no such compiler")

    compile_with = torch.compile
    caplog.set_level(logging.CRITICAL, "torch")  # the compiler's log would be captured line by line
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_with(model, backend=fail))
    run_in_process(f"train.py {SHORT} --steps 1 --compile", expect=2)
    torch._dynamo.reset()
    assert re.search("train.py: torch.compile failed .*no such compiler.*--no-compile", capsys.readouterr().err)


def test_only_decoder_trains_the_decoder_at_another_resolution(project, capsys):
    """The 512 px recipe in small: the AR Transformer is frozen, the decoder's positions grow with the latents."""
    run_in_process(f"train.py {SHORT} --steps 1")
    before = load_file("runs/train/last.pt")["model_ema"]
    flags = (
        "--data images.npz --vae vae.pt --image-size 64 --batch-size 8 --sample-every 0 --steps 2 --lr 1e-3 --warmup 0"
    )
    run_in_process(f"train.py {flags} --out large --init runs/train/last.pt --only-decoder")
    assert "decoder positions interpolated, latents 8 -> 16" in capsys.readouterr().out
    after = weights("large/last.pt")
    assert after["decoder.positions"].shape[1] == 256
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith("decoder."))
    assert not torch.equal(after["decoder.input_proj.weight"], before["decoder.input_proj.weight"])


@pytest.mark.parametrize(
    "line,messages",
    [
        ("train.py --size B", ["latents: not a latent cache", "vae.py encode --data SRC --out latents"]),
        ("finetune_mrar.py", ["runs/train/last.pt: no such file", "run train.py first"]),
        ("train.py --data images.npz --vae nothing.pt", ["nothing.pt"]),
        ("train.py --size B --data images.npz", ["--vae: name the VAE"]),
    ],
)
def test_missing_inputs_are_refused_with_the_remedy(line, messages, project, capsys):
    run_in_process(line, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(message in error for message in messages)
