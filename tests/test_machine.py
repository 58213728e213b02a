"""Machines and habits: drivers, memory, terminals, moved files, folders with other things in them."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_model import ONE_STEP, SMALL, build
from test_vae import refused, run, save_images, save_small_vae  # noqa: F401 - fixtures

import diversity
import fid
import model
import train
import vae
from model import DEMO_MODEL, UserError, atomic_write, load_checkpoint, pick_device, pick_dtype
from vae import Images, LatentCache, center_crop, encode_images, load_vae

FAST = "--steps 1 --batch-size 4 --sample-every 0"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder `cache`, of 20 images of two classes in s.npz, and vae.pt."""
    monkeypatch.chdir(tmp_path)
    save_small_vae("vae.pt")
    images = np.random.default_rng(0).integers(0, 255, (20, 32, 32), dtype=np.uint8)
    np.savez("s.npz", images=images, labels=np.arange(20) % 2)
    encode_images(Images("s.npz", 32), load_vae("vae.pt"), "cache")
    return LatentCache("cache")


# ------------------------------------------------------------------------------ devices and memory
def test_a_driver_that_is_too_old_is_one_line_and_the_cpu_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(model, "NVIDIA_DRIVER", str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="driver does not serve the CUDA 13.0"):
            pick_device()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
        assert pick_device().type == "cpu"
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("amx,avx512,width,dtype", [
    (True, True, 160, "bf16"), (False, True, 768, "bf16"), (False, True, 160, "fp32"),
    (False, False, 768, "fp32"),
])  # fmt: skip
def test_bf16_on_a_cpu_depends_on_its_instructions_and_the_width(
    amx, avx512, width, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert pick_dtype(torch.device("cpu"), width) == dtype


def test_what_cannot_fit_is_refused_and_what_can_is_cut(cache, run, refused, monkeypatch):
    flags = f"train.py --data cache {FAST}"
    chain = train.memory_per_chain(train.SIZES["XS"], 1)
    monkeypatch.setattr(train, "memory_of", lambda device: 30 * 2.9e6)
    message = "--size XS: chains of 1 need 0 GB of memory, cpu has 0; a smaller --size"
    assert message in refused(flags)
    run(f"{flags} --accumulate 2 --out forced")
    monkeypatch.setattr(train, "memory_of", lambda device: 30 * 2.9e6 + 2 * 2.5 * chain)
    assert "in 2 micro-batches" in run(f"{flags} --out cut").out


def test_the_held_out_loss_does_not_depend_on_how_many_chains_fit(cache):
    held_out = train.Chains(cache, np.arange(20), 1, 10, 0)
    net = model.TransDiff(
        train.dataclasses.replace(train.SIZES["XS"], num_classes=2, ar_depth=1, dit_depth=1)
    ).eval()
    amp = model.autocast(torch.device("cpu"), "fp32")
    losses = [
        train.ema_loss(net, held_out, "images", "logit-normal", n, amp, "cpu") for n in (3, 10)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fewer_images_are_encoded_at_once_the_larger_they_are(tmp_path, monkeypatch):
    sizes = []
    moments = np.zeros((1, 2, 16, 128, 128), np.float16)

    def encode(vae, images, device):
        sizes.append(len(images))
        return np.repeat(moments, len(images), axis=0)

    monkeypatch.setattr(vae, "encode_moments", encode)
    monkeypatch.setattr(vae, "show_reconstructions", lambda *_: 0.0)
    save_small_vae(tmp_path / "vae.pt")
    np.savez(tmp_path / "s.npz", images=np.zeros((10, 4, 4), np.uint8) + 7, labels=[0] * 10)
    encode_images(Images(tmp_path / "s.npz", 512), load_vae(tmp_path / "vae.pt"), tmp_path / "c")
    assert sizes == [8, 2]


def test_rows_of_a_cache_are_read_exactly(cache):
    rows = np.concatenate([np.load(path) for path in cache.parts])
    indices = np.array([[3, 19], [0, 3]])
    flips = np.array([[0, 1], [1, 1]])
    assert np.array_equal(cache.moments(indices, flips), rows[indices, flips])
    with open(cache.parts[0], "ab") as f:
        f.write(b"surplus")
    with pytest.raises(
        UserError, match="cache: not a usable latent cache .*00000.npy has another size"
    ):
        LatentCache("cache")


def test_mean_and_covariance_follow_from_sums():
    x = torch.randn(50, 4, dtype=torch.float64)
    mu, sigma = fid.mean_and_covariance(50, x.sum(0), x.T @ x)
    np.testing.assert_allclose(mu, x.mean(0))
    np.testing.assert_allclose(sigma, np.cov(x.T), atol=1e-12)


# ------------------------------------------------------------------------------ files and processes
def test_a_link_stays_its_target_is_replaced_and_a_pipe_is_written_to(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    atomic_write(link, lambda f: f.write(b"new"))
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    atomic_write(pipe, lambda f: f.write(b"numbers"))
    reader.join(10)
    assert read == [b"numbers"] and pipe.is_fifo()


@pytest.mark.parametrize("load,path", [(load_checkpoint, DEMO_MODEL), (load_vae, vae.DEMO_VAE)])
def test_a_loaded_model_does_not_change_with_its_file(load, path, tmp_path):
    ckpt = torch.load(path, weights_only=True)
    ckpt["model"] = {k: v.float() for k, v in ckpt["model"].items()}
    torch.save(ckpt, tmp_path / "x.pt")
    net = load(tmp_path / "x.pt")
    before = [p.clone() for p in net.parameters()]
    (tmp_path / "x.pt").write_bytes(bytes((tmp_path / "x.pt").stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_who_waits_says_for_what_and_ends_with_torchrun(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(model.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    polls = iter([False] * 5 + [True])
    model.wait_until(lambda: next(polls), "the other half")
    assert capsys.readouterr().err == "process 0 waits for the other half\n"
    parents = iter([7, 1])
    monkeypatch.setattr(model.os, "getppid", lambda: next(parents))
    with pytest.raises(UserError, match="torchrun ended while this process waited for it"):
        model.wait_until(lambda: False, "it")


def test_a_left_over_world_size_is_one_line_in_every_script(command):
    for line in ("sample.py --n 1", "fid.py --samples x", "vae.py encode"):
        _, err = command(line, expect=2, env={"WORLD_SIZE": "2"})
        assert "WORLD_SIZE is set, RANK is not" in err


@pytest.mark.parametrize("script", ["fid.py", "diversity.py", "demo/train_vae.py"])
def test_what_runs_as_one_process_refuses_torchrun(script, command):
    _, err = command(script, expect=2, env=dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"))
    assert "runs as one process: start it without torchrun" in err


def test_no_terminal_and_one_of_few_letters_stop_nothing(cache, tmp_path):
    line = [sys.executable, str(ROOT / "vae.py"), "encode", "--data", "photos", "--vae", "vae.pt"]
    save_images(tmp_path / "photos", ["größe/0.png"])
    quiet = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for name, launcher in (("quiet", quiet), ("ascii", [])):
        result = subprocess.run([*launcher, *line, "--out", name], env=env, capture_output=True)
        assert result.returncode == 0 and Path(name, "cache.json").exists(), result.stderr


def test_batches_of_workers_do_not_need_shared_memory(cache):
    chains = train.Chains(cache, np.arange(8), refs=1, batch_size=4, seed=0)
    assert all(isinstance(x, np.ndarray) for x in chains[0])


# -------------------------------------------------------------------------------- what is the data?
def test_what_is_no_image_of_a_class_is_left_out_and_counted(tmp_path, run):
    names = ["a/0.png", "a/@eaDir/0.png/thumb.png", "a/.1.png", "b/0.png", "beside.png"]
    save_images(tmp_path / "photos", names, size=32)
    (tmp_path / "photos/b/notes.txt").write_text("")
    (tmp_path / "photos/b/gone.png").symlink_to("nowhere.png")
    save_small_vae(tmp_path / "vae.pt")
    out = run("vae.py encode --data photos --vae vae.pt --out cache").out
    line = next(line for line in out.splitlines() if line.startswith("photos: left out: "))
    for part in (
        "1 images beside",
        "2 hidden or of a system",
        "1 not images by their suffix '.txt'",
    ):
        assert part in line
    assert "left out, not readable: 'b/gone.png'" in out and "wrote 2 of 3 images" in out


def test_results_inside_the_images_and_two_classes_of_one_name_are_refused(cache, refused):
    save_images(Path("photos"), ["a/0.png", "b/0.png"])
    message = refused(f"train.py --data photos --vae vae.pt {FAST} --out photos/runs/one")
    assert "lies in the folder of images photos" in message
    message = refused("vae.py encode --data photos --vae vae.pt --out photos")
    assert "photos: lies in the folder of images photos" in message
    arrays = dict(images=np.arange(192, dtype=np.uint8).reshape(3, 8, 8), labels=[0, 1, 2])
    np.savez("cranes.npz", **arrays, classes=np.array([b"crane", b"dog", b"crane"]))
    message = refused("vae.py encode --data cranes.npz --vae vae.pt --out x")
    assert "cranes.npz: two classes have the name crane" in message


def test_a_run_goes_on_where_its_images_have_other_times(cache, run):
    run(f"train.py --data cache {FAST}")
    os.utime("s.npz", (1, 1))
    run("vae.py encode --data s.npz --vae vae.pt --out again")
    run("train.py --resume --data again --steps 2")
    images = 255 - np.load("s.npz")["images"]
    np.savez("other.npz", images=images, labels=np.arange(20) % 2)
    run("vae.py encode --data other.npz --vae vae.pt --out other")
    err = run("train.py --resume --data other --steps 3", expect=2).err
    assert "was trained on other images than other has" in err
    out = run(f"finetune_mrar.py --data other {FAST}").out
    assert "runs/train/last.pt: was trained on other images than these" in out


def test_resume_starts_a_run_that_has_no_checkpoint_yet(cache, run):
    out = run(f"train.py --resume --data cache {FAST}").out
    assert "there is no runs/train/last.pt yet: a new run" in out
    assert "from step 1" in run("train.py --resume --steps 2").out


def test_a_narrow_image_is_cropped_before_it_is_enlarged(monkeypatch):
    column = np.random.default_rng(0).integers(0, 255, (400, 4, 3), dtype=np.uint8)
    sizes = []
    cover = vae.ImageOps.cover
    monkeypatch.setattr(
        vae.ImageOps, "cover", lambda image, *a: sizes.append(image.size) or cover(image, *a)
    )
    middle = center_crop(Image.fromarray(column), 32)
    assert sizes == [(4, 32)]
    assert np.array_equal(middle, center_crop(Image.fromarray(column[184:216]), 32))


# -------------------------------------------------------------------------------- numbers from outside
def test_numbers_that_are_not_finite_are_refused_by_the_file_they_are_from(cache, run):
    ckpt = torch.load("vae.pt", weights_only=True)
    ckpt["model"]["encoder.conv_out.bias"][0] = torch.nan
    torch.save(ckpt, "bad.pt")
    err = run("vae.py encode --data s.npz --vae bad.pt --out x", expect=2).err
    assert "bad.pt: this VAE gives latents that are not finite" in err
    with pytest.raises(UserError, match="vae.pt, or the model: gives pixels that are not finite"):
        vae.latents_to_images(load_vae("vae.pt"), torch.full((1, 8, 8, 8), torch.nan))


class Net(torch.nn.Module):
    """8 features, and `gain` 1: probabilities, 10: of sum 10."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.f = torch.nn.Linear(12, 8)
        self.gain = gain

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        f = self.f(torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, (2, 2)).flatten(1))
        return f if return_features else self.gain * f.softmax(1)


def test_statistics_and_networks_that_do_not_fit_are_refused(cache, refused):
    for name, gain in (("net.ts", 1.0), ("logits.ts", 10.0), ("nan.ts", math.nan)):
        torch.jit.script(Net(gain)).save(name)
    for name, mu, sigma in (
        ("wide", np.zeros(64), np.eye(64)),
        ("flat", np.zeros(8), np.ones(8)),
        ("nan", np.full(8, np.nan), np.eye(8)),
    ):
        np.savez(f"{name}.npz", mu=mu, sigma=sigma)
        message = refused(f"fid.py --samples s.npz --net net.ts --ref {name}.npz")
        assert f"--ref {name}.npz: not mean and covariance of 8 finite features" in message
    assert "probabilities of sum 10" in refused("fid.py --samples s.npz --net logits.ts")
    assert "probabilities of sum nan" in refused("fid.py --samples s.npz --net nan.ts")
    assert "must end in .npz" in refused("fid.py --samples s.npz --net net.ts --save-stats stats")


def test_a_vae_of_diffusers_is_named_as_such(tmp_path):
    torch.save({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="diffusers"):
        load_vae(tmp_path / "x.bin")


# -------------------------------------------------------------------------------------- Python use
@pytest.mark.parametrize("refs,settings", [
    (4, dict(steps=0)), (4, dict(references=torch.zeros(1, 4, 6, 8, 8))),
    (1, dict(references=torch.zeros(1, 1, 6, 8, 8))),
])  # fmt: skip
def test_a_call_that_draws_no_image_is_refused(refs, settings):
    net = build(SMALL if refs == 4 else ONE_STEP)
    with pytest.raises(UserError, match="no image"):
        net.sample(torch.tensor([1]), **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_a_model_of_another_dtype_draws(dtype):
    net = build(SMALL)
    expected = net.sample(torch.tensor([1]), steps=2, s2=0, noise=torch.ones(1, 6, 8, 8))
    images = net.to(dtype).sample(torch.tensor([1]), steps=2, s2=0, noise=torch.ones(1, 6, 8, 8))
    torch.testing.assert_close(images.float(), expected, atol=0.1, rtol=0.1)


def test_classes_that_were_never_trained_are_not_measured(monkeypatch):
    net = build(ONE_STEP)
    net.info["counts"] = [9, 0, 9, 0, 9]
    seen = []
    features = diversity.chain_features
    monkeypatch.setattr(
        diversity, "chain_features", lambda m, y, s: seen.extend(y.tolist()) or features(m, y, s)
    )
    diversity.measure(net, 1, "cpu")
    assert seen == [0, 2, 4]


def test_samples_are_written_as_pngs_in_a_folder_for_each_class(run, tmp_path):
    run("sample.py --num 4 --refs 1 --steps 1 --class trouser bag --out samples/")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert files == [f"samples/{name}.png" for name in (
        "bag/000001", "bag/000003", "trouser/000000", "trouser/000002",
    )]  # fmt: skip
    run("sample.py --num 4 --refs 1 --steps 1 --class trouser bag --out s.npz")
    picture = np.array(Image.open("samples/bag/000003.png"))
    assert np.array_equal(picture, np.load("s.npz")["arr_0"][3])
    assert not Path("samples.partial").exists()
