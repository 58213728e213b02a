"""fid.py: closed forms, a float64 reference written from the definitions, the command with a tiny random network."""

import http.server
import json
import re
import sys
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn

import fid
from vae import center_crop

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Tiny(nn.Module):
    """Images of any size -> 16 features, 5 classes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 5, stride=3), nn.Linear(16, 5)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = self.conv(x.float() / 127.5 - 1).relu().mean((2, 3))
        if return_features:
            return features
        logits = 60 * ((features - features.mean(1, keepdim=True)) @ self.head.weight.t())
        return (logits if no_output_bias else logits + self.head.bias).softmax(1)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "tiny.pt"
    torch.manual_seed(0)
    torch.jit.script(Tiny().eval()).save(str(path))
    return path


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """measure(flags) runs fid.py in this process, in an empty folder, and returns its JSON and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(flags):
        monkeypatch.setattr(sys, "argv", ["fid.py", *f"{flags} --json out/numbers.json".split()])
        fid.main()
        return json.loads((tmp_path / "out" / "numbers.json").read_text()), capsys.readouterr()

    return call


def noise_images(n, seed, spread=64, size=20):
    """uint8 [n, size, size, 3]. Each image has its own brightness and contrast, so that features differ."""
    rng = np.random.default_rng(seed)
    brightness = 128 + rng.normal(0, spread, (n, 1, 1, 3))
    x = brightness + rng.normal(0, 1, (n, size, size, 3)) * rng.uniform(0, 90, (n, 1, 1, 1))
    return x.clip(0, 255).astype(np.uint8)


def features_and_probabilities(net, images):
    """Float64 results of the network, called directly."""
    module, x = torch.jit.load(str(net)), torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return module(x, return_features=True).double().numpy(), module(x, no_output_bias=True).double().numpy()


# ------------------------------------------------------------------------------------------ the measures


def test_frechet_distance_of_gaussians_in_closed_form():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])  # these do not commute
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # trace of the root of a 2 x 2 matrix
    distance = fid.frechet_distance(*map(torch.tensor, (np.array([1.0, 2.0]), a, np.array([4.0, -2.0]), b)))
    assert distance == pytest.approx(25 + np.trace(a + b) - 2 * cross, rel=1e-12)

    u, v = np.random.default_rng(0).normal(size=(2, 50))  # rank one: tr sqrt(u u^T v v^T) = |u.v|
    zero = torch.zeros(50, dtype=torch.float64)
    distance = fid.frechet_distance(zero, torch.tensor(np.outer(u, u)), zero, torch.tensor(np.outer(v, v)))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-6)


@pytest.mark.parametrize("n", [30, 1000])
def test_identical_sets_have_distance_zero(n):
    mu, sigma = fid.mean_and_covariance(torch.randn(n, 200, generator=torch.Generator().manual_seed(0)).relu())
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6 * sigma.trace()
    assert fid.frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(200, rel=1e-6)


def test_inception_score_of_certain_predictions():
    every_class = torch.eye(8).repeat(1000, 1)  # each as often: the best score is the number of classes
    assert fid.inception_score(every_class)[0] == pytest.approx(8, rel=0.01)
    assert fid.inception_score(every_class[:1].repeat(100, 1)) == (1.0, 0.0)


def test_precision_and_recall():
    a, b = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (150, 130))
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, a + 100) == (0, 0)
    assert fid.precision_recall(a, torch.cat([a + 0.01, a + 100])) == (1, 0.5)  # half of the reference is missing
    distant = fid.precision_recall(a + 1000, b + 1000)
    assert distant == pytest.approx(brute_precision_recall((a + 1000).numpy(), (b + 1000).numpy()), abs=1e-12)


def test_copies_of_an_image_are_in_each_others_manifold():
    x = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))  # 5 copies of each: the balls have radius 0
    assert fid.precision_recall(x.repeat(5, 1)[torch.randperm(100)], x.repeat(7, 1)) == (1, 1)


def brute_precision_recall(a, b):
    def part_inside(x, y):  # the part of x that is in a ball around a point of y
        radii = np.array([sorted(np.delete(row, i))[2] for i, row in enumerate(cdist(y, y))])
        return np.mean([(row <= radii).any() for row in cdist(x, y)])

    return part_inside(a, b), part_inside(b, a)


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("counts,spread", [((83, 61), 64), ((12, 10), 30)], ids=["many", "fewer than features"])
def test_the_command_gives_what_the_definitions_say(tmp_path, measure, net, counts, spread):
    """Of 83 and 12 samples the parts of the Inception Score differ in size; few images have singular covariances."""
    images, others = (noise_images(n, seed, spread) for seed, n in enumerate(counts))
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez_compressed(tmp_path / "r.npz", arr_0=others)
    got, printed = measure(f"--samples s.npz --ref r.npz --net {net} --batch-size 16")

    (a, p), (b, _) = features_and_probabilities(net, images), features_and_probabilities(net, others)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    p, scores = p[np.random.RandomState(2020).permutation(len(p))], []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        scores.append(np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, part.mean(0))) for row in part])))
    assert got["frechet_distance"] == pytest.approx(distance, rel=1e-4)
    assert spread < 64 or got["inception_score"] > 1.5  # near 1 any parts would give the same
    assert got["inception_score"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert got["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-4)
    assert (got["precision"], got["recall"]) == pytest.approx(brute_precision_recall(a, b), abs=1e-12)
    numbers = {"frechet_distance", "inception_score", "inception_score_std", "precision", "recall"}
    assert set(got) == numbers | {"network", "samples", "reference", "num_samples"}
    assert "fid " not in printed.out  # FID is of Inception's features
    assert f"{got['frechet_distance']:.4f}" in printed.out and "fewer than 10,000" in printed.err


def test_statistics_are_saved_and_reused(tmp_path, measure, net):
    images, others = noise_images(50, 0), noise_images(40, 1)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=others)
    direct, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    alone, _ = measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    assert "frechet_distance" not in alone and "inception_score" in alone
    reused, _ = measure(f"--samples s.npz --ref stats.npz --net {net}")
    assert reused.pop("reference") == "stats.npz" and direct.pop("reference") == "r.npz"
    assert reused.pop("network") == direct.pop("network") and reused.pop("samples") == direct.pop("samples")
    assert reused == pytest.approx({k: v for k, v in direct.items() if k not in ("precision", "recall")}, rel=1e-9)
    sigma = np.cov(features_and_probabilities(net, others)[0], rowvar=False)
    np.testing.assert_allclose(np.load(tmp_path / "stats.npz")["sigma"], sigma, rtol=1e-4, atol=1e-9)


def test_the_statistics_in_a_reference_batch_come_before_those_of_its_images(tmp_path, measure, net):
    """ADM's reference batches hold both; their statistics are of more images than the batch has."""
    np.savez(tmp_path / "r.npz", arr_0=noise_images(40, 1))
    measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    stats = np.load(tmp_path / "stats.npz")
    shifted = dict(mu=stats["mu"] + 10, sigma=stats["sigma"], mu_s=np.zeros(3))
    np.savez(tmp_path / "adm.npz", arr_0=noise_images(40, 1), **shifted)
    got, _ = measure(f"--samples r.npz --ref adm.npz --net {net}")
    assert got["frechet_distance"] == pytest.approx(16 * 100, rel=1e-9) and got["precision"] == got["recall"] == 1


def test_a_folder_gives_the_numbers_of_an_npz(tmp_path, measure, net):
    images = noise_images(30, 0)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=noise_images(20, 1))
    for i, image in enumerate(images):  # some at the top, some two folders down
        path = tmp_path / "tree" / ("." if i < 9 else f"class {i % 3}/more") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "tree" / "notes.txt").write_text("not an image")
    a, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    b, printed = measure(f"--samples tree --ref r.npz --net {net} --batch-size 7 --workers 1")
    assert "30 images" in printed.out
    for key in ("frechet_distance", "precision", "recall"):  # the Inception Score depends on the order
        assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert measure(f"--samples s.npz --ref tree --net {net}")[0]["frechet_distance"] < 1e-5

    Image.fromarray(noise_images(1, 9, size=40)[0]).save(tmp_path / "tree" / "large.png")
    with pytest.raises(ValueError, match=r"large.png: is 40 x 40 px, others are 20 x 20; --image-size"):
        measure(f"--samples tree --ref r.npz --net {net}")
    assert "31 images of (16, 16) px" in measure(f"--samples tree --ref r.npz --net {net} --image-size 16")[1].out


@pytest.mark.parametrize("size", [47, 12], ids=["larger", "smaller"])
def test_the_reference_gets_the_size_of_the_samples_as_in_training(tmp_path, measure, net, size):
    source = noise_images(12, 0, size=size)
    np.savez(tmp_path / "source.npz", images=source, labels=np.zeros(12, int))
    np.savez(tmp_path / "s.npz", arr_0=np.stack([center_crop(Image.fromarray(x), 20) for x in source]))
    got, _ = measure(f"--samples s.npz --ref source.npz --net {net}")
    assert got["frechet_distance"] < 1e-6 and got["precision"] == got["recall"] == 1


def test_grey_images_are_measured_as_rgb(tmp_path, measure, net):
    grey = noise_images(12, 0)[..., 0]
    np.savez(tmp_path / "grey.npz", images=grey)
    np.savez(tmp_path / "rgb.npz", arr_0=grey[..., None].repeat(3, axis=3))
    assert measure(f"--samples rgb.npz --ref grey.npz --net {net}")[0]["frechet_distance"] < 1e-6


WRONG_INPUTS = {  # flags: message
    "--samples gone.npz --ref s.npz": "gone.npz: no such folder",
    "--samples s.npz --ref gone": "--ref gone: no such file or folder",
    "--samples s.npz": "--ref: give a reference",
    "--samples one.npz --ref s.npz": "one.npz: has 1 images; the measures need 10 or more",
    "--samples s.npz --ref one.npz": "one.npz: has 1 images",
    "--samples wide.npz --ref s.npz": "--ref s.npz: .* --image-size N crops both",
    "--samples float.npz --ref s.npz": r"float.npz: not a readable .npz of images \(images are float64",
    "--samples other.npz --ref s.npz": "other.npz: not a readable .npz of images",
    "--samples s.npz --ref other.npz": "other.npz: not a readable .npz of images or statistics",
    "--samples s.npz --ref inception.npz": "inception.npz: .*of another network",
    "--samples s.npz --ref foreign.npz": "foreign.npz: .*of another network",
    "--samples s.npz --ref nan.npz": "nan.npz: .*not finite",
    "--samples cut.npz --ref s.npz": "cut.npz: not a readable .npz of images",
    "--samples s.npz --ref cut.npz": "cut.npz: not a readable .npz",
    "--samples empty --ref s.npz": "empty/?: no images in this folder",
    "--samples bad --ref s.npz": "bad/x.png: not a readable image",
    "--samples s.npz --ref s.npz --net gone.pt": "gone.pt: not a readable TorchScript feature network",
    "--samples s.npz --ref s.npz --net net.txt": "net.txt: not a readable TorchScript feature network",
    "--samples s.npz --ref s.npz --net weights.pt": "weights.pt: not a readable TorchScript feature network",
    "--samples s.npz --ref s.npz --net flatten.pt": "flatten.pt: not a readable TorchScript feature network",
}


@pytest.fixture(scope="module")
def wrong_inputs(tmp_path_factory):
    """Folder with the good images s.npz, and with the files that WRONG_INPUTS names."""
    folder, good = tmp_path_factory.mktemp("inputs"), noise_images(12, 0)
    np.savez(folder / "s.npz", arr_0=good)
    np.savez(folder / "one.npz", arr_0=good[:1])
    np.savez(folder / "wide.npz", arr_0=good[:, :15])
    np.savez(folder / "float.npz", arr_0=good.astype(float))
    np.savez(folder / "other.npz", something=good)
    np.savez(folder / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "foreign.npz", mu=np.zeros(16), sigma=np.eye(16), network="0123")
    np.savez(folder / "nan.npz", mu=np.full(16, np.nan), sigma=np.eye(16))
    (folder / "cut.npz").write_bytes((folder / "s.npz").read_bytes()[:5000])
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "x.png").write_text("no picture")
    (folder / "net.txt").write_text("no network")
    torch.save({"weights": torch.zeros(3)}, folder / "weights.pt")
    torch.jit.script(nn.Flatten()).save(str(folder / "flatten.pt"))
    return folder


@pytest.mark.parametrize("flags", WRONG_INPUTS)
def test_wrong_inputs_are_refused_in_one_line(wrong_inputs, measure, monkeypatch, net, flags):
    monkeypatch.chdir(wrong_inputs)
    with pytest.raises((ValueError, OSError), match=WRONG_INPUTS[flags]) as error:
        measure(flags if "--net" in flags else f"{flags} --net {net}")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


# ------------------------------------------------------------------------------------------ networks


def test_a_network_that_cannot_be_fetched_is_one_line(tmp_path, command):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    proxy = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": str(tmp_path / "home")}
    _, err = command("fid.py --samples s.npz --ref s.npz", expect=2, env=proxy)
    assert len(err.strip().splitlines()) == 1 and "metrics/inception-2015-12-05.pt" in err
    assert re.search(r"put the file at \S+home/hub/transdiff/inception-2015-12-05.pt", err)


def test_the_inception_file_is_fetched_once_and_its_distance_is_called_fid(tmp_path, measure, net, monkeypatch):
    body, bodies = net.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            bodies.append(body[:1000] if not bodies else body)  # the first connection closes early
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(bodies[-1])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fid, "INCEPTION", f"http://127.0.0.1:{server.server_port}/inception.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    with pytest.raises(OSError, match="could not fetch .* repeat the command"):
        measure("--samples s.npz --ref s.npz")
    _, printed = measure("--samples s.npz --ref s.npz")
    assert (tmp_path / "home" / "hub" / "transdiff" / "inception.pt").read_bytes() == body and "  fid " in printed.out
    measure("--samples s.npz --ref s.npz")
    assert len(bodies) == 2
    server.shutdown()


@pytest.fixture(scope="module")
def trousers_and_bags():
    """200 bundled images of two classes: images uint8 [200, 32, 32], labels 0 and 1, names of the classes."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.flatnonzero((data["labels"] == 1) | (data["labels"] == 8))[::10]
    classes = np.array(["trouser", "bag"])
    return dict(images=data["images"][picks], labels=(data["labels"][picks] == 8).astype(int), classes=classes)


def test_train_features_makes_a_network_for_other_images(tmp_path, command, measure, trousers_and_bags):
    np.savez(tmp_path / "two.npz", **trousers_and_bags)
    out, _ = command("demo/train_features.py --data two.npz --out new/a.pt --steps 40 --batch-size 16")
    assert float(re.search(r"new/a.pt: ([\d.]+)% of 40 held-out images", out)[1]) > 85
    assert (tmp_path / "new" / "a.pt").stat().st_size < 500_000
    net, x = torch.jit.load(tmp_path / "new" / "a.pt"), torch.zeros(2, 3, 50, 40, dtype=torch.uint8)
    assert net(x, return_features=True).shape == (2, 64) and torch.allclose(net(x).sum(1), torch.ones(2))
    assert list(net.classes) == ["trouser", "bag"]

    rgb, labels = trousers_and_bags["images"][..., None].repeat(3, axis=3), trousers_and_bags["labels"]
    np.savez(tmp_path / "s.npz", arr_0=rgb, arr_1=labels)
    got, printed = measure("--samples s.npz --ref two.npz --net new/a.pt")
    assert got["accuracy"] > 0.85 and got["frechet_distance"] < 1e-6 and got["precision"] == 1
    assert "accuracy" in printed.out
    np.savez(tmp_path / "s.npz", arr_0=rgb, arr_1=labels + 1)  # a class that the network does not have
    assert "accuracy" not in measure("--samples s.npz --ref two.npz --net new/a.pt")[0]


def test_train_features_writes_the_same_file_for_the_same_seed(tmp_path, command, trousers_and_bags):
    np.savez(tmp_path / "two.npz", **trousers_and_bags)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command(f"demo/train_features.py --data two.npz --out {name}.pt --steps 1 --batch-size 16 --seed {seed}")
    a, b, c = ((tmp_path / f"{name}.pt").read_bytes() for name in "abc")
    assert a == b != c
