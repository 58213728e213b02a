"""Stages 1 and 2: the order of the data, the recipe, resume, and the commands as a user runs them."""
import csv
import dataclasses
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_vae import small_vae

from model import SIZES, TransDiff, load_checkpoint, load_file
from train import RECIPES, Chains, draw, learning_rate, make_optimizer, update_average


def fake_cache(counts, seed=0):
    """A cache whose moments tell their image (channel 0) and whether they are the mirror image (channel 1)."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))

    class Cache:
        classes, moments = [f"class {i}" for i in range(len(counts))], np.empty((len(labels), 2, 2, 1, 1), np.float16)

        def __len__(self):
            return len(labels)

    cache = Cache()
    cache.labels = labels
    cache.moments[:, :, 0, 0, 0] = np.arange(len(labels))[:, None]
    cache.moments[:, :, 1, 0, 0] = [0, 1]
    return cache


def epochs(chains, n):
    """Image indices [chains, refs] of each of n epochs, read from the batches."""
    stream, seen = iter(chains), []
    while len(seen) < n * chains.chains:
        moments, labels = next(stream)
        images = moments[:, :, 0, 0, 0].long().numpy()
        assert (chains.cache.labels[images] == labels[:, None].numpy()).all(), "a chain is of one class, the label's"
        seen += list(images)
    return [np.stack(seen[i * chains.chains : (i + 1) * chains.chains]) for i in range(n)]


@pytest.mark.parametrize("refs,counts", [(1, [5, 9, 7]), (4, [8, 12, 4]), (4, [9, 15, 6]), (16, [33, 16])])
def test_an_epoch_is_every_image_once_as_a_member_of_one_chain(refs, counts):
    cache = fake_cache(counts)
    first, second = epochs(Chains(cache, refs, batch_size=5, seed=3), 2)
    for epoch in (first, second):
        images, n = np.unique(epoch, return_counts=True)
        assert (n == 1).all()
        assert np.bincount(cache.labels[images]).tolist() == [c // refs * refs for c in counts]  # a class's remainder sits out
    partners = lambda e: {frozenset(row.tolist()) for row in e}  # noqa: E731
    if refs > 1:
        assert partners(first) != partners(second)  # chains are drawn afresh
    assert first.tolist() != second.tolist()


def test_remainders_take_turns():
    """5 images, chains of 4: over some epochs every image gets in."""
    assert len(np.unique(np.concatenate([e.ravel() for e in epochs(Chains(fake_cache([5]), 4, 1, seed=0), 30)]))) == 5


def test_classes_too_small_for_a_chain_are_named():
    with pytest.raises(ValueError, match=r"1 classes have fewer than 4 images.*: class 1"):
        Chains(fake_cache([8, 3, 4]), 4, 2, seed=0)


def test_ranks_share_one_order_and_any_step_can_be_had_again():
    cache = fake_cache([13, 11])
    whole = Chains(cache, 1, 6, seed=1)
    parts = [Chains(cache, 1, 6, seed=1, rank=r, world=3) for r in range(3)]
    for step in (0, 3, 4, 50):  # 24 images, 6 a batch: step 4 begins the second epoch
        assert torch.equal(torch.cat([p.batch(step)[0] for p in parts]), whole.batch(step)[0])  # mirrored alike, too
    late = iter(Chains(cache, 1, 6, seed=1, start=3))
    assert torch.equal(next(late)[0], whole.batch(3)[0])
    loader = torch.utils.data.DataLoader(whole, batch_size=None, num_workers=2)
    for step, (latents, _) in zip(range(5), loader):
        assert torch.equal(latents, whole.batch(step)[0])


def test_both_mirror_images_are_drawn():
    flips = torch.cat([Chains(fake_cache([40]), 1, 40, seed=0).batch(s)[0][:, 0, 1, 0, 0] for s in range(5)])
    assert 60 < flips.sum() < 140


def test_draws_belong_to_their_chain():
    config = dataclasses.replace(SIZES["XS"], refs=4)
    together, alone = draw(config, 2, "logit-normal", range(5, 9), "cpu"), draw(config, 2, "logit-normal", range(7, 8), "cpu")
    assert [tuple(x.shape) for x in together] == [(4,), (4, 8), (4, 8, 8, 8, 8), (4, 4, 8, 8, 8)]
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone)) and together[1].unique().numel() == 32
    dropped, t, eps, noise = draw(config, 2, "uniform", range(3000), "cpu")
    assert abs(dropped.float().mean() - config.label_dropout) < 0.02 and abs(t.mean() - 0.5) < 0.01 and abs(t.std() - 12**-0.5) < 0.01
    assert abs(eps.std() - 1) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((eps[:, 0] * noise[:, 0]).mean()) < 0.01


def test_a_compiler_that_fails_costs_one_line(project, command):
    (project / "broken.py").write_text(BROKEN_COMPILER)
    _, err = command(f"train.py {SHORT} --steps 1 --compile", launcher=(sys.executable, "broken.py"))
    assert err.count("warning: torch.compile failed") == 1 and "no such compiler" in err and "Traceback" not in err


def test_recipe_of_appendix_b():
    r = RECIPES["1-step"]
    assert (r["batch_size"], r["lr"], r["epochs"], r["warmup"] * r["epochs"], r["ema"], r["repeats"]) == (2048, 8e-4, 800, 100, 0.9999, 4)
    r = RECIPES["MRAR"]
    assert (r["lr"], r["epochs"], r["warmup"] * r["epochs"], r["repeats"]) == (5e-5, 40, 10, 2)
    r = RECIPES["512 px"]
    assert (r["lr"], r["epochs"], r["warmup"] * r["epochs"], r["repeats"], r["ema"]) == (1e-4, 150, 10, 4, 0.999)
    args = SimpleNamespace(lr=1.0, steps=100, warmup=0.1, cooldown=0.0)
    assert [learning_rate(s, args) for s in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    args.cooldown = 0.5
    assert learning_rate(50, args) == 1.0 and learning_rate(75, args) == 0.5 and learning_rate(99, args) == pytest.approx(0.02)


def test_weight_decay_is_for_the_ar_transformers_matrices_alone():
    model = TransDiff(SIZES["XS"])
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, others = make_optimizer(model, SimpleNamespace(lr=1e-3, weight_decay=0.02)).param_groups
    assert decayed["weight_decay"] == 0.02 and others["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.95)
    decayed, others = ({names[id(p)] for p in g["params"]} for g in (decayed, others))
    assert "ar.blocks.0.mlp.fc1.weight" in decayed and "cond_positions" in decayed
    assert {"decoder.blocks.0.mlp.fc1.weight", "ar.norm_in.weight", "ar.blocks.0.attn.qkv.bias"} <= others
    assert len(decayed) + len(others) == len(names)


# ------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def project(tmp_path, garments):
    """A folder with images and a VAE of their size, trained on nothing."""
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1], classes=np.array([f"garment {i}" for i in range(10)]))
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "v.pt")
    return tmp_path


SHORT = "--data s.npz --vae v.pt --batch-size 8 --log-every 1 --sample-every 0"


KILL_AFTER_THE_FIRST_CHECKPOINT = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train
write = train.write_whole
def save(path, *rest):
    write(path, *rest)
    if "ema.pt" in str(path):
        os.kill(os.getpid(), 9)
train.write_whole = save
train.main()
"""


BROKEN_COMPILER = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import torch
compile = torch.compile
def broken(graph, inputs):
    raise RuntimeError("no such compiler")
torch.compile = lambda m, **options: compile(m, backend=broken)
import train
train.main()
"""

# One rank of a run gets a signal in the middle of a step: in call number `call` of its loss, from 0.
SIGNAL_IN_A_STEP = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train
from model import TransDiff
from vae import run
loss, calls = TransDiff.loss, iter(range(99))
def forward(*args, **kwargs):
    if next(calls) == {call} and os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), {number})
    return loss(*args, **kwargs)
TransDiff.forward = forward
run(train.main)
"""


def weights(path):
    return {k: v for k, v in load_file(path)["model"].items()}


def test_train_finetune_sample(project, command):
    out, err = command(f"train.py {SHORT} --steps 3 --sample-every 2")
    run = project / "runs" / "train"
    assert "encoding" in err and "runs/train/ema.pt" in out
    assert {p.name for p in run.iterdir()} == {"last.pt", "ema.pt", "log.csv", "samples-0000002.png", "samples-0000003.png"}
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [r["step"] for r in rows] == ["1", "2", "3"] and all(float(r["loss"]) > 0 and float(r["images_per_second"]) > 0 for r in rows)
    ema, last = load_file(run / "ema.pt"), load_file(run / "last.pt")
    assert all(v.dtype == torch.float16 for v in ema["model"].values()) and ema["classes"][2] == "garment 2"
    assert all(torch.equal(ema["model"][k], v.half()) for k, v in last["model_ema"].items())

    _, err = command(f"train.py {SHORT} --steps 3", expect=2)
    assert "--resume" in err
    out, err = command(f"finetune_mrar.py {SHORT} --steps 2")
    assert "mask embedding copied into 16 mask tokens" in out and "encoding" not in err
    model = load_checkpoint(project / "runs" / "mrar" / "ema.pt")
    assert model.config.refs == 4 and model.info["size"] == "XS-mrar"

    for ckpt in ("train", "mrar"):
        out, _ = command(f"sample.py --ckpt runs/{ckpt}/ema.pt --class 3 --n 2 --steps 2")
        assert "2 images (garment 3; refs" in out
    command(["sample.py", "--ckpt", "runs/mrar/last.pt", "--class", "garment 1", "0", "--n", "2", "--steps", "2", "--out", "new/x.npz"])
    arrays = np.load(project / "new" / "x.npz")
    assert arrays["arr_0"].shape == (4, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].tolist() == [1, 1, 0, 0]


def test_killed_and_resumed_is_never_stopped(project, command):
    """The same weights, averages and optimiser, bit for bit; the break is in the middle of an epoch (60 images, 8 a step)."""
    command(f"train.py {SHORT} --steps 5 --save-every 2 --keep-every 3 --out whole")
    assert (project / "whole" / "ema-0000003.pt").exists()
    (project / "stop.py").write_text(KILL_AFTER_THE_FIRST_CHECKPOINT)
    command(f"train.py {SHORT} --steps 5 --save-every 2 --out killed", expect=-9, launcher=(sys.executable, "stop.py"))
    assert load_file(project / "killed" / "last.pt")["step"] == 2
    _, err = command("train.py --out killed --resume --seed 1", expect=2)
    assert "killed/last.pt is of another run: seed 0 there, 1 here" in err
    command("train.py --out killed --resume")  # with the flags that the run was started with
    assert [row["step"] for row in csv.DictReader(open(project / "killed" / "log.csv"))] == ["1", "2", "3", "4", "5"]
    whole, resumed = (load_file(project / d / "last.pt") for d in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 5
    for part in ("model", "model_ema"):
        assert all(torch.equal(resumed[part][k], v) for k, v in whole[part].items()), part
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in ("exp_avg", "exp_avg_sq", "step"))
    _, err = command(f"finetune_mrar.py {SHORT} --out killed --resume", expect=2)
    assert "killed/last.pt is of another run: refs 1 there, 4 here" in err
    (project / "killed" / "last.pt").write_bytes((project / "killed" / "ema.pt").read_bytes())
    _, err = command("train.py --out killed --resume", expect=2)
    assert "killed/last.pt: not the last.pt of a run" in err


def test_a_chain_of_16_is_resumed_as_one(project, command, garments):
    np.savez(project / "s.npz", images=np.repeat(garments[0], 3, axis=0), labels=np.repeat(garments[1], 3))
    command(f"train.py {SHORT} --steps 1")
    command(f"finetune_mrar.py {SHORT} --steps 1 --refs 16 --cooldown 0")
    out, _ = command("finetune_mrar.py --resume --steps 2")
    assert "chains of 16" in out and "going on from runs/mrar/last.pt at step 1" in out


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517")


def test_a_run_is_the_same_however_its_batches_are_split(project, command):
    """1 process, accumulation, 2 processes under torchrun with gloo, and both: the same losses and gradients, but for the order of the sums."""
    results = {}
    for name, launcher, flags in (("one", None, ""), ("micro", None, "--accumulate 4"), ("ranks", TORCHRUN, ""), ("both", TORCHRUN, "--accumulate 2")):
        out, _ = command(f"train.py {SHORT} --steps 3 --dtype fp32 --device cpu --out {name} {flags}", launcher=launcher, env={"OMP_NUM_THREADS": "1"})
        results[name] = load_file(project / name / "last.pt")
        assert ("2 x cpu" in out) == (launcher == TORCHRUN)
    losses = {name: [row["loss"] for row in csv.DictReader(open(project / name / "log.csv"))] for name in results}
    for name in ("micro", "ranks", "both"):
        np.testing.assert_allclose(np.array(losses[name], float), np.array(losses["one"], float), atol=2e-4)
        for a, b in zip(results["one"]["optimizer"]["state"].values(), results[name]["optimizer"]["state"].values()):
            torch.testing.assert_close(b["exp_avg"], a["exp_avg"], atol=2e-5, rtol=2e-3)  # gradients: Adam's first steps are but their signs


def test_two_processes_killed_and_resumed_by_two_and_by_one(project, command):
    """Two go on bit for bit; one goes on with the same chains and draws, so the same losses to rounding. The kill is in the middle of an accumulation."""
    flags, env = f"train.py {SHORT} --steps 4 --save-every 2 --dtype fp32 --device cpu --accumulate 2", {"OMP_NUM_THREADS": "1"}
    command(f"{flags} --out whole", launcher=TORCHRUN, env=env)
    (project / "stop.py").write_text(SIGNAL_IN_A_STEP.format(call=6, rank=1, number=9))
    command(f"{flags} --out killed", expect=1, launcher=(*TORCHRUN, "stop.py"), env=env)
    assert load_file(project / "killed" / "last.pt")["step"] == 2
    shutil.copytree(project / "killed", project / "alone")
    command("train.py --resume --out killed", launcher=TORCHRUN, env=env)
    command("train.py --resume --out alone", env=env)
    whole, killed, alone = (load_file(project / d / "last.pt") for d in ("whole", "killed", "alone"))
    assert all(torch.equal(killed["model"][k], v) for k, v in whole["model"].items())
    losses = [[float(row["loss"]) for row in csv.DictReader(open(project / d / "log.csv"))] for d in ("whole", "alone")]
    np.testing.assert_allclose(*losses, atol=2e-4)
    assert len(losses[0]) == 4


@pytest.mark.parametrize("number,world", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_polite_signal_saves_first(project, command, number, world):
    """Stopped in its third step, of 10,000: it finishes that step, saves, says so, and --resume goes on."""
    (project / "stop.py").write_text(SIGNAL_IN_A_STEP.format(call=2, rank=0, number=int(number)))  # the other rank hears of it from this one
    launcher = (*(TORCHRUN if world == 2 else (sys.executable,)), "stop.py")
    out, err = command(f"train.py {SHORT} --steps 10000 --out stopped", expect=128 + number if world == 1 else 1, launcher=launcher)
    assert "stopped at step 3; stopped/last.pt is saved" in out and "Traceback" not in err.split("torch/distributed")[0]
    assert load_file(project / "stopped" / "last.pt")["step"] == 3
    if world == 1:
        command("train.py --resume --out stopped --steps 4 --warmup 1 --cooldown 0")


def test_a_batch_that_does_not_divide(project, command):
    _, err = command(f"train.py {SHORT} --steps 2 --accumulate 3", expect=2)
    assert "--batch-size 8: must be a multiple of 1 processes x --accumulate 3, e.g. 9" in err


def test_average():
    averaged, model = (TransDiff(SIZES["XS"]) for _ in range(2))
    averaged.requires_grad_(False)
    expected = [0.9 * a + 0.1 * b.detach() for a, b in zip(averaged.parameters(), model.parameters())]
    update_average(averaged, model, 0.9)
    for p, e in zip(averaged.parameters(), expected):
        torch.testing.assert_close(p, e)
        assert p.grad_fn is None and not p.requires_grad  # no graph grows from step to step


def test_another_data_set_or_vae_is_encoded_anew(project, command, garments):
    """The cache that train.py makes for itself is found again for the same images and VAE, and for nothing else."""
    made = lambda: sorted((project / "runs").glob("latents-s-32-*"))  # noqa: E731
    command(f"train.py {SHORT} --steps 1")
    _, err = command(f"train.py {SHORT} --steps 1 --out again")
    assert len(made()) == 1 and "encoding" not in err
    np.savez(project / "s.npz", images=255 - garments[0], labels=garments[1])
    command(f"train.py {SHORT} --steps 1 --out other")
    assert len(made()) == 2
    torch.save(dict(model=small_vae(1).state_dict(), scale=1.0, image_size=32), project / "v.pt")
    command(f"train.py {SHORT} --steps 1 --out third")
    assert len(made()) == 3
    # and a model remembers the VAE that it was trained with
    _, err = command("sample.py --ckpt runs/train/ema.pt --n 1 --steps 1", expect=2)
    assert "v.pt is no longer the file that made this model's latents" in err


def test_a_loss_that_is_not_finite_is_not_saved(project, command):
    _, err = command(f"train.py {SHORT.replace('--log-every 1', '--log-every 50')} --steps 9 --lr 1e30 --warmup 0 --save-every 1", expect=2)
    assert re.search(r"the (loss|gradient) of step \d+ is not finite, of images [\d, ]+ in runs/latents-s-32-\w+; --resume goes on", err)
    kept = load_file(project / "runs" / "train" / "last.pt")
    assert kept["step"] < 9 and all(torch.isfinite(v).all() for v in kept["model"].values())


def test_workers_read_what_one_process_reads(project, command):
    command(f"train.py {SHORT} --steps 3 --out plain")
    command(f"train.py {SHORT} --steps 3 --workers 2 --out workers")
    plain, workers = (weights(project / d / "last.pt") for d in ("plain", "workers"))
    assert all(torch.equal(v, workers[k]) for k, v in plain.items())


def test_only_decoder_and_init(project, command):
    """The 512 px recipe in small: the AR Transformer stays as it was, the decoder learns, its positions grow with the latents."""
    command(f"train.py {SHORT} --steps 1")
    before = load_file(project / "runs" / "train" / "last.pt")["model_ema"]
    out, _ = command(f"train.py {SHORT} --steps 2 --out large --init runs/train/last.pt --only-decoder --image-size 64 --lr 1e-3 --warmup 0")
    assert "latents 8 -> 16: decoder positions interpolated" in out
    _, err = command(f"train.py {SHORT} --steps 2 --out none --only-decoder", expect=2)
    assert "--only-decoder: needs --init" in err
    after = weights(project / "large" / "last.pt")
    assert after["decoder.positions"].shape[1] == 256
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith("decoder."))
    assert not torch.equal(after["decoder.input_proj.weight"], before["decoder.input_proj.weight"])


def test_missing_inputs_say_what_to_do(project, command):
    _, err = command("train.py --size B", expect=2)
    assert "latents: not a latent cache" in err and "python vae.py encode" in err
    _, err = command("finetune_mrar.py", expect=2)
    assert "run python train.py --size XS first" in err
    _, err = command("train.py --data s.npz --vae nothing.pt", expect=2)
    assert "nothing.pt" in err
    _, err = command("train.py --size B --data s.npz", expect=2)
    assert "--vae: name the VAE" in err
