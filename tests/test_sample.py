"""sample.py on the bundled weights, and the download of the released ones from a local server."""

import dataclasses
import http.server
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, forks, run_script
from golden import write_released
from in_process import run_in_process
from PIL import Image

import sample
from model import SIZES, TransDiff, load_file
from vae import latents_to_images, load_vae

MODEL, VAE = ROOT / "demo" / "mrar.pt", ROOT / "demo" / "vae.pt"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("sample.py --n 2", expect=0) runs it in this process, in an empty folder, and returns
    (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(line, expect=0):
        run_in_process(line, expect)
        return capsys.readouterr()

    return call


def last_line(printed):
    """The last line on stderr, of the (stdout, stderr) that `run` returns."""
    return printed[1].strip().splitlines()[-1]


def columns(path, n):
    """The pictures in the last row of a grid of n columns of 32 px images, in grey, int [32, 32]
    each. They are drawn twice as large, each in a white frame."""
    grid = np.asarray(Image.open(path).convert("L")).astype(int)[::2, ::2]
    return [grid[-33:-1, 34 * i + 1 : 34 * i + 33] for i in range(n)]


def one_step_model(path, **others):
    """Write an untrained 1-step model of the bundled latents."""
    torch.manual_seed(0)
    model = TransDiff(SIZES["XS"])
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config, **others), path)


# ------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("flags,refs", [
    ("--class 1 --refs 4", 4),  # the first command of the README
    (f"--class trouser --ckpt {ROOT}/demo/1step.pt", 1),
])  # fmt: skip
def test_the_bundled_models_draw_trousers(flags, refs, tmp_path, command):
    """Most of the 8 images correlate best with the mean image of their class."""
    out, _ = command(f"sample.py {flags}")
    path = tmp_path / "runs" / "samples.png"
    assert f"runs/samples.png (trouser; refs {refs}" in out
    assert Image.open(path).size == (8 * 34 * 2, 34 * 2)
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    means = [data["images"][data["labels"] == k].mean(0).ravel() for k in range(10)]
    images = [image.ravel() for image in columns(path, 8)]
    correlation = np.corrcoef(images, means)[:8, 8:]
    assert (correlation.argmax(1) == 1).sum() >= 6


def test_image_i_is_a_function_of_the_seed_and_i(run):
    flags = "sample.py --class 2 7 --n 3 --steps 3 --refs 2 --dtype fp32 --out"
    run(f"{flags} a.npz")
    run(f"{flags} b.npz --batch-size 4")
    run(f"{flags} c.npz --seed 1")
    a, b, c = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).mean() > 5
    assert len(np.unique(a.reshape(6, -1), axis=0)) == 6


def test_show_chain_draws_a_chain_in_each_row(run):
    run("sample.py --class bag --n 2 --refs 3 --steps 2 --show-chain --out chain.png")
    assert Image.open("chain.png").size == (3 * 34 * 2, 2 * 34 * 2)
    run("sample.py --class bag --n 2 --refs 3 --steps 2 --out last.png")
    assert np.array_equal(columns("chain.png", 3)[2], columns("last.png", 2)[1])


# ------------------------------------------------------------------------------------ guidance


def test_cfg_0_draws_without_a_class(run):
    flags = "--n 2 --refs 1 --dtype fp32 --cfg-below 1"
    for name in ("bag", "trouser"):
        run(f"sample.py --class {name} {flags} --cfg 0 --out {name}-0.npz")
        run(f"sample.py --class {name} {flags} --cfg 1 --out {name}-1.npz")
    without, trouser = (np.load(f"trouser-{cfg}.npz")["arr_0"].astype(int) for cfg in (0, 1))
    assert np.array_equal(without, np.load("bag-0.npz")["arr_0"])
    assert np.abs(trouser - np.load("bag-1.npz")["arr_0"]).mean() > 5


def test_cfg_is_one_number_or_one_for_each_image(run):
    flags = "--class bag --n 1 --refs 3 --steps 3 --dtype fp32 --show-chain --out"
    run(f"sample.py --cfg 1 {flags} same.png")
    run(f"sample.py --cfg 1 1 4 {flags} last.png")
    same, last = columns("same.png", 3), columns("last.png", 3)
    assert np.array_equal(same[:2], last[:2]) and np.abs(same[2] - last[2]).mean() > 1
    message = "cfg [1.0, 2.0]: give one number, or one for each of 3 images"
    assert message in last_line(run(f"sample.py --cfg 1 2 {flags} x.png", expect=2))


# ------------------------------------------------------------------------------------ classes


def test_a_class_named_twice_is_drawn_twice_as_often_and_the_help_says_so(run):
    run("sample.py --class bag bag 1 --num 6 --steps 1 --refs 1 --out s.npz")
    assert np.load("s.npz")["arr_1"].tolist() == [8, 8, 1, 8, 8, 1]
    help_, _ = run("sample.py --help")
    assert "a class named twice is drawn twice as often" in " ".join(help_.split())


def test_the_names_of_the_classes_are_in_the_npz(run):
    run("sample.py --class bag --n 1 --steps 1 --refs 1 --out s.npz")
    arrays = np.load("s.npz")
    assert arrays["classes"][arrays["arr_1"]].tolist() == ["bag"]
    assert len(arrays["classes"]) == 10


def test_classes_without_images_are_left_out(run, tmp_path):
    torch.save({**load_file(MODEL), "empty": [0, 3]}, tmp_path / "gaps.pt")
    draw = "sample.py --ckpt gaps.pt --steps 1 --refs 1"
    run(f"{draw} --num 16 --out s.npz")
    assert np.load("s.npz")["arr_1"].tolist() == [1, 2, 4, 5, 6, 7, 8, 9] * 2
    out, _ = run(f"{draw} --n 1")
    assert "(trouser, pullover, coat, sandal, " in out
    for word in ("dress", "3"):
        message = last_line(run(f"{draw} --class {word}", expect=2))
        assert f"--class {word}: " in message and "trouser, pullover, coat, sandal" in message


# ------------------------------------------------------------------------------------ checkpoints


def test_the_folder_of_a_run_stands_for_its_model_and_vae(run, tmp_path):
    """Its VAE is another than the bundled one, so that only the one beside the model fits."""
    (tmp_path / "run").mkdir()
    vae = load_file(VAE)
    torch.save({**vae, "scale": 0.5 * vae["scale"]}, tmp_path / "run" / "vae.pt")
    digest = load_vae(tmp_path / "run" / "vae.pt").digest
    torch.save({**load_file(MODEL), "vae_digest": digest}, tmp_path / "run" / "ema.pt")
    draw = "sample.py --class bag --n 1 --refs 1 --steps 1 --out"
    run(f"{draw} folder.npz --ckpt run")
    run(f"{draw} file.npz --ckpt run/ema.pt")
    assert np.array_equal(np.load("folder.npz")["arr_0"], np.load("file.npz")["arr_0"])
    (tmp_path / "run" / "vae.pt").unlink()
    message = last_line(run(f"{draw} x.npz --ckpt run", expect=2))
    assert f"{VAE}: not the VAE of this model's latents" in message


# ------------------------------------------------------------------------------------ large sets

DRAW_SET = "sample.py --num 40 --batch-size 8 --steps 2 --refs 2 --out"  # 5 parts


@pytest.fixture
def start(tmp_path):
    """start("sample.py ...", rank, world) starts it as torchrun does, in the same folder as `run`,
    and returns the process."""
    processes = []

    def call(line, rank, world):
        script, *flags = line.split()
        env = dict(RANK=str(rank), WORLD_SIZE=str(world))
        logs = [tmp_path / f"{len(processes)}.{name}" for name in ("out", "err")]
        args = ([str(ROOT / script), *flags], tmp_path, env, *logs)
        processes.append(forks.Process(target=run_script, args=args))
        processes[-1].start()
        return processes[-1]

    yield call
    for process in processes:
        process.kill()


@pytest.fixture(scope="module")
def balanced_set(tmp_path_factory):
    """Bytes of the set that DRAW_SET draws in one process."""
    path = tmp_path_factory.mktemp("set") / "one.npz"
    run_in_process(f"{DRAW_SET} {path}")
    return path.read_bytes()


def test_a_balanced_set_has_the_classes_in_turn(run):
    run("sample.py --num 20 --steps 1 --refs 1 --out s.npz")
    arrays = np.load("s.npz")
    assert arrays["arr_0"].shape == (20, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == list(range(10)) * 2


def test_two_processes_write_the_same_bytes_as_one(start, balanced_set, tmp_path):
    processes = [start(f"{DRAW_SET} two.npz", rank, world=2) for rank in (0, 1)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "two.npz").read_bytes() == balanced_set
    assert not (tmp_path / "two.npz.partial").exists()


def test_a_killed_set_is_resumed_by_another_number_of_processes(
    start, run, balanced_set, tmp_path, monkeypatch
):
    """Process 0 of 2 draws parts 0, 2 and 4, and waits for the others, which never come."""
    partial = tmp_path / "s.npz.partial"
    process = start(f"{DRAW_SET} s.npz", rank=0, world=2)
    deadline = time.monotonic() + 100
    while len(list(partial.glob("*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    message = last_line(run(f"{DRAW_SET} s.npz", expect=2))
    assert "s.npz.partial: another command writes to it" in message
    process.kill()
    process.join()
    parts = {path.name for path in partial.glob("*.npy")}
    assert parts == {"00000.npy", "00002.npy", "00004.npy"} and not (tmp_path / "s.npz").exists()

    message = last_line(run(f"{DRAW_SET} s.npz --seed 1", expect=2))
    assert "s.npz.partial: is of other inputs or settings" in message
    drawn = []
    count = lambda vae, latents: drawn.append(len(latents)) or latents_to_images(vae, latents)
    monkeypatch.setattr(sample, "latents_to_images", count)
    run(f"{DRAW_SET} s.npz")
    assert drawn == [8, 8]  # the two parts that were missing
    assert (tmp_path / "s.npz").read_bytes() == balanced_set and not partial.exists()


def test_a_set_whose_first_command_was_wrong_needs_no_clearing_up(run, tmp_path):
    draw = "sample.py --num 10 --steps 1 --out s.npz"
    run(f"{draw} --refs 5", expect=2)
    run(f"{draw} --refs 1")
    assert len(np.load("s.npz")["arr_0"]) == 10


def test_a_complete_set_is_not_replaced(run, tmp_path):
    (tmp_path / "s.npz").write_bytes(b"of another model")
    message = last_line(run("sample.py --num 10 --out s.npz", expect=2))
    assert "--out s.npz: is there already; remove it or give another" in message
    assert (tmp_path / "s.npz").read_bytes() == b"of another model"


@pytest.mark.parametrize("flags,message", [
    ("--show-chain", "--show-chain: draws a picture; run it without torchrun"),
    ("--n 1 --out x.png", "must end in .npz here"),
])  # fmt: skip
def test_several_processes_draw_only_sets(flags, message, run, monkeypatch):
    monkeypatch.setattr(sample, "WORLD", 2)
    assert message in last_line(run(f"sample.py {flags}", expect=2))


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("flags,message", [
    ("--num 20 --out x.png", "must end in .npz"),
    ("--num 20 --show-chain", "--show-chain: draws a picture; run it without torchrun and --num"),
    ("--n 2 --num 20", "--num: not allowed with argument --n"),
    ("--class 10", "--class 10: this model was trained on the classes t-shirt, trouser"),
    ("--class hat", "--class hat: this model was trained on the classes t-shirt, trouser"),
    ("--refs 5", "refs 5: this model draws chains of 1 to 4 images"),
    ("--s1 0.9", "s1: adams-bashforth has none; name another sampler"),
    ("--s1 0 --s2 0", "s1, s2: adams-bashforth has none"),
    ("--ckpt nothing.pt", "nothing.pt: No such file or directory"),
    (f"--ckpt {VAE}", "vae.pt: not a usable TransDiff model"),
    (f"--vae {MODEL}", "mrar.pt: not a usable VAE"),
    ("--out picture.jpg", "--out picture.jpg: must end in .png or .npz here"),
    ("--n 0", "argument --n: 0: must be from 1 to"),
    ("--pretrained B --ckpt x", "--ckpt: not allowed with argument --pretrained"),
])  # fmt: skip
def test_errors_are_one_line_and_nothing_is_written(flags, message, tmp_path, run):
    _, printed = run(f"sample.py {flags}", expect=2)
    assert printed.startswith("sample.py: ") and printed.count("\n") == 1
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_s1_and_s2_scale_the_noise_of_the_sampler_that_has_it(run):
    flags = "--class bag --n 1 --refs 1 --steps 5 --sampler euler-maruyama --out"
    run(f"sample.py {flags} a.npz")
    run(f"sample.py --s2 0.5 {flags} b.npz")
    assert not np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])


def test_references_are_refused_by_a_one_step_model_with_the_remedy(run, tmp_path):
    one_step_model(tmp_path / "one.pt")
    message = last_line(run("sample.py --ckpt one.pt --refs 4 --n 1", expect=2))
    assert "refs 4: this model draws chains of 1 to 1 images" in message
    assert "finetune_mrar.py" in message


# ------------------------------------------------------------------------------------ --pretrained


@pytest.fixture(scope="module")
def released_files(tmp_path_factory):
    """Contents of the released files, small, by their paths; that of L-mrar is a web page."""
    folder, files = tmp_path_factory.mktemp("released"), {}
    kinds = dict(transdiff_b="one_step", transdiff_b_mrar="mrar", vae="vae")
    for name, kind in kinds.items():
        path = write_released(kind, folder / f"{kind}.pth")
        files[f"{name}/checkpoint-last.pth"] = path.read_bytes()
    return {**files, "transdiff_l_mrar/checkpoint-last.pth": b"<html>please log in</html>"}


@pytest.fixture
def hub(tmp_path, released_files, monkeypatch):
    """A server of the released files, where --pretrained looks for them.

    hub.cut       close the connection after so many bytes of the body
    hub.requests  number of files sent so far
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/zhendch/Transdiff/resolve/main/")
            if name not in released_files:
                return self.send_error(404)
            server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(released_files[name])))
            self.end_headers()
            self.wfile.write(released_files[name][: server.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cut = 0, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()


def test_pretrained_fetches_once_and_draws(run, hub):
    draw = "sample.py --pretrained B-mrar --class 1 --n 1 --refs 1 --steps 1"
    run(f"{draw} --out x.npz")
    assert hub.requests == 2  # the model and the VAE
    assert np.load("x.npz")["arr_0"].shape == (1, 256, 256, 3)
    run(f"{draw} --class hat", expect=2)  # is noticed after both files are loaded
    assert hub.requests == 2


def test_a_download_that_was_cut_off_is_not_kept(run, hub, tmp_path):
    hub.cut = 1_000_000
    message = last_line(run("sample.py --pretrained B-mrar", expect=2))
    assert "could not fetch" in message and "checkpoint-last.pth" in message
    assert not list((tmp_path / "home").rglob("*.pth"))


def test_a_download_of_something_else_is_not_kept(run, hub, tmp_path):
    message = last_line(run("sample.py --pretrained L-mrar", expect=2))
    assert "transdiff_l_mrar/checkpoint-last.pth" in message and "not a zip file" in message
    assert not list((tmp_path / "home").rglob("*.pth"))


def test_no_network_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _, err = run("sample.py --pretrained H", expect=2)
    assert len(err.strip().splitlines()) == 1
    assert "could not fetch" in err and "put the file at" in err
