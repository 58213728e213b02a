"""fid.py: closed forms, a float64 reference written from the definitions, and the command on images through a tiny random network."""
import http.server
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn

import fid
from vae import DEMO_DATA

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
    """measure(line) runs the command in this process, in an empty folder, and returns its JSON and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        monkeypatch.setattr(sys, "argv", ["fid.py", *f"{line} --json numbers.json".split()])
        fid.main()
        return json.loads((tmp_path / "numbers.json").read_text()), capsys.readouterr()

    return call


def noise_images(n, seed, spread=64, size=20):
    """uint8 [n, size, size, 3], each of a brightness and contrast of its own, so that features differ."""
    rng = np.random.default_rng(seed)
    x = 128 + rng.normal(0, spread, (n, 1, 1, 3)) + rng.normal(0, 1, (n, size, size, 3)) * rng.uniform(0, 90, (n, 1, 1, 1))
    return x.clip(0, 255).astype(np.uint8)


def answers(net, images):
    """Float64 features and class probabilities, asked of the network directly."""
    module, x = torch.jit.load(str(net)), torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return module(x, return_features=True).double().numpy(), module(x, no_output_bias=True).double().numpy()


# ------------------------------------------------------------------------------------------ the measures


def test_frechet_distance_of_gaussians_in_closed_form():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])  # these do not commute
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # tr of the root of a 2 x 2 matrix
    got = fid.frechet_distance(*map(torch.tensor, (np.array([1.0, 2.0]), a, np.array([4.0, -2.0]), b)))
    assert got == pytest.approx(25 + np.trace(a + b) - 2 * cross, rel=1e-12)

    u, v = np.random.default_rng(0).normal(size=(2, 50))  # rank one: tr sqrt(u u' v v') = |u.v|
    zero = torch.zeros(50, dtype=torch.float64)
    got = fid.frechet_distance(zero, torch.tensor(np.outer(u, u)), zero, torch.tensor(np.outer(v, v)))
    assert got == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-6)


@pytest.mark.parametrize("n", [30, 1000])
def test_identical_sets_are_at_distance_zero(n):
    mu, sigma = fid.statistics(torch.randn(n, 200, generator=torch.Generator().manual_seed(0)).relu())
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6 * sigma.trace()
    assert fid.frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(200, rel=1e-6)


@pytest.mark.parametrize("block", [7, 100, 4096])
def test_streamed_statistics_are_numpys(block):
    features = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12) + 3000
    mu, sigma = fid.statistics(features, block=block)
    np.testing.assert_allclose(mu, features.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-11)


def test_inception_score_knows_its_extremes():
    sure = torch.eye(8).repeat(1000, 1)  # every class as often, each with certainty: the best there is, K
    assert fid.inception_score(sure)[0] == pytest.approx(8, rel=0.01)
    assert fid.inception_score(sure[:1].repeat(100, 1)) == (1.0, 0.0)


def test_precision_and_recall():
    a, b = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (150, 130))
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, a + 100) == (0, 0)
    assert fid.precision_recall(a, torch.cat([a + 0.01, a + 100])) == (1, 0.5)  # half of the reference's modes are missing
    few = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))  # radius 0 where each is there several times
    assert fid.precision_recall(few.repeat(5, 1)[torch.randperm(100)], few.repeat(7, 1)) == (1, 1)
    assert fid.precision_recall(a + 1000, b + 1000) == pytest.approx(brute_precision_recall((a + 1000).numpy(), (b + 1000).numpy()), abs=1e-12)


def brute_precision_recall(a, b):
    def inside(x, y):  # share of x in a ball about a y
        radii = np.array([sorted(np.delete(row, i))[2] for i, row in enumerate(cdist(y, y))])
        return np.mean([(row <= radii).any() for row in cdist(x, y)])

    return inside(a, b), inside(b, a)


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("spread", [64, 30])
def test_the_command_gives_what_the_definitions_say(tmp_path, command, net, spread):
    if spread == 64:
        images, others = noise_images(83, 0), noise_images(61, 1)
    else:
        images, others = noise_images(12, 2, spread), noise_images(9, 3, spread)  # fewer than features: singular covariances
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez_compressed(tmp_path / "r.npz", arr_0=others)
    out, err = command(f"fid.py --samples s.npz --ref r.npz --net {net} --batch-size 16 --json deep/numbers.json")
    got = json.loads((tmp_path / "deep" / "numbers.json").read_text())

    (a, p), (b, _) = answers(net, images), answers(net, others)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    p, scores = p[np.random.RandomState(2020).permutation(len(p))], []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        scores.append(np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, part.mean(0))) for row in part])))
    precision, recall = brute_precision_recall(a, b)
    assert got["fid"] == pytest.approx(distance, rel=1e-4)
    assert spread < 64 or got["inception_score"] > 1.5  # else any shuffle would do
    assert got["inception_score"] == pytest.approx(np.mean(scores), rel=1e-5) and got["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-4)
    assert (got["precision"], got["recall"]) == pytest.approx((precision, recall), abs=1e-12)
    assert set(got) == {"fid", "inception_score", "inception_score_std", "precision", "recall"}
    assert "Frechet distance (tiny.pt)" in out and "FID" not in out  # FID is the Inception network's alone
    assert f"{got['fid']:.4f}" in out and "fewer than 10,000" in err


def test_two_processes_give_what_one_does(tmp_path, command, net):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(75, 0))
    (tmp_path / "r").mkdir()
    for i, image in enumerate(noise_images(41, 1)):
        Image.fromarray(image).save(tmp_path / "r" / f"{i:02}.png")
    line, launcher = f"fid.py --samples s.npz --ref r --net {net} --batch-size 8 --device cpu --json", (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531")
    command(f"{line} one.json", env={"OMP_NUM_THREADS": "1"})
    out, _ = command(f"{line} two.json", launcher=launcher, env={"OMP_NUM_THREADS": "1"})
    one, two = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-12) and out.count("precision") == 1


def test_statistics_are_saved_and_reused(tmp_path, measure, net):
    images, others = noise_images(50, 0), noise_images(40, 1)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=others)
    direct, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    alone, _ = measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    assert "fid" not in alone and "inception_score" in alone
    reused, said = measure(f"--samples s.npz --ref stats.npz --net {net}")
    assert reused == {k: v for k, v in direct.items() if k not in ("precision", "recall")}
    assert "no precision and recall: stats.npz has statistics alone" in said.out
    stats = np.load(tmp_path / "stats.npz")
    np.testing.assert_allclose(stats["sigma"], np.cov(answers(net, others)[0], rowvar=False), rtol=1e-4, atol=1e-9)

    # ADM's reference batch: images, and statistics that are not theirs
    np.savez(tmp_path / "adm.npz", arr_0=others, mu=stats["mu"] + 10, sigma=stats["sigma"], mu_s=np.zeros(3))
    adm, _ = measure(f"--samples r.npz --ref adm.npz --net {net}")
    assert adm["fid"] == pytest.approx(16 * 100, rel=1e-9) and adm["precision"] == adm["recall"] == 1


def test_a_folder_and_an_npz_of_the_same_images(tmp_path, measure, net):
    images = noise_images(30, 0)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=noise_images(20, 1))
    for i, image in enumerate(images):  # some at the top, some two folders down
        path = tmp_path / "tree" / ("." if i < 9 else f"class {i % 3}/more") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "tree" / "notes.txt").write_text("not an image")
    a, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    b, said = measure(f"--samples tree --ref r.npz --net {net} --batch-size 7")
    assert "30 images" in said.out
    for key in ("fid", "precision", "recall"):  # the score's parts depend on the order
        assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert measure(f"--samples s.npz --ref tree --net {net}")[0]["fid"] < 1e-5

    Image.fromarray(noise_images(1, 9, size=40)[0]).save(tmp_path / "tree" / "large.png")
    with pytest.raises(ValueError, match=r"large.png: is 40 x 40 px, others are 20 x 20; --image-size"):
        measure(f"--samples tree --ref r.npz --net {net}")
    assert "31 images, 16 x 16" in measure(f"--samples tree --ref r.npz --net {net} --image-size 16")[1].out


def test_the_reference_is_brought_to_the_samples_size_as_in_training(tmp_path, measure, net, garments):
    images, labels = garments
    np.savez(tmp_path / "source.npz", images=images, labels=labels)  # 28 px, grey
    np.savez(tmp_path / "s.npz", arr_0=np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3))
    got, _ = measure(f"--samples s.npz --ref source.npz --net {net}")
    assert got["fid"] < 1e-6 and got["precision"] == got["recall"] == 1


def test_few_samples(tmp_path, measure, net):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(3, 0))
    got, said = measure(f"--samples s.npz --ref s.npz --net {net}")
    assert set(got) == {"fid"} and "no Inception Score" in said.out and "no precision and recall" in said.out


def test_errors(tmp_path, measure, net):
    good = noise_images(12, 0)
    np.savez(tmp_path / "s.npz", arr_0=good)
    np.savez(tmp_path / "float.npz", arr_0=good.astype(float))
    np.savez(tmp_path / "other.npz", something=good)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(16), sigma=np.eye(16), network="0123")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no picture")
    (tmp_path / "net.txt").write_text("no network")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "deaf.pt"))
    for line, message in [
        ("--samples gone.npz --ref s.npz", "gone.npz: no such images"),
        ("--samples s.npz --ref gone", "gone: no such images"),
        ("--samples s.npz", "give --samples and --ref"),
        ("--samples float.npz --ref s.npz", r"float.npz: images are float64 \(12, 20, 20, 3\), expected uint8"),
        ("--samples other.npz --ref s.npz", "--samples other.npz: 0 images"),
        ("--samples s.npz --ref other.npz", "--ref other.npz: has neither images"),
        ("--samples s.npz --ref wide.npz", "--ref wide.npz: statistics of 2048 features, but .*tiny.pt gives 16"),
        ("--samples s.npz --ref foreign.npz", "foreign.npz: statistics of the features of another network"),
        ("--samples cut.npz --ref s.npz", "cut.npz: not a readable .npz"),
        ("--samples empty --ref s.npz", "empty: no images in this folder"),
        ("--samples bad --ref s.npz", r"bad/x.png: cannot be read as an image"),
        ("--samples s.npz --save-stats stats", "--save-stats stats: must end in .npz"),
        ("--samples s.npz --ref s.npz --net gone.pt", "--net gone.pt: no such file; --train-net makes one"),
        ("--samples s.npz --ref s.npz --net net.txt", "--net net.txt: not a TorchScript file"),
        ("--samples s.npz --ref s.npz --net weights.pt", "--net weights.pt: not a TorchScript file"),
        ("--samples s.npz --ref s.npz --net deaf.pt", "--net deaf.pt: needs net.x, return_features=True"),
        ("--samples s.npz --train-net new.pt", "--train-net takes"),
    ]:
        with pytest.raises((ValueError, OSError), match=message) as error:
            measure(line if "net " in line else f"{line} --net {net}")
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500, line


# ------------------------------------------------------------------------------------------ networks


def test_no_network_is_one_line(tmp_path, command):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    proxy = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": str(tmp_path / "home")}
    _, err = command("fid.py --samples s.npz --ref s.npz", expect=2, env=proxy)
    assert len(err.strip().splitlines()) == 1 and "metrics/inception-2015-12-05.pt" in err
    assert re.search(r"put the file at \S+home/hub/transdiff/inception-2015-12-05.pt", err)


def test_the_inception_file_is_fetched_once_and_its_distance_is_called_fid(tmp_path, measure, net, monkeypatch):
    body, asked = net.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            first = int(asked[-1][6:-1]) if asked[-1] else 0
            self.send_response(206 if asked[-1] else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first:] if asked[-1] else body[:1000])  # the first connection closes early

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fid, "INCEPTION", f"http://127.0.0.1:{server.server_port}/inception.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    with pytest.raises(OSError, match="could not fetch .* run it again to go on"):
        measure("--samples s.npz --ref s.npz")
    _, said = measure("--samples s.npz --ref s.npz")
    assert (tmp_path / "home" / "hub" / "transdiff" / "inception.pt").read_bytes() == body and "FID " in said.out
    measure("--samples s.npz --ref s.npz")
    assert asked == [None, "bytes=1000-"]
    server.shutdown()


def test_train_net(tmp_path, measure, monkeypatch, capsys):
    data = np.load(Path(fid.__file__).parent / "demo" / DEMO_DATA.name)
    picks = np.flatnonzero((data["labels"] == 1) | (data["labels"] == 8))[::10]  # trousers and bags
    images, labels = data["images"][picks], (data["labels"][picks] == 8).astype(int)
    np.savez(tmp_path / "two.npz", images=images, labels=labels, classes=np.array(["trouser", "bag"]))
    fid.train_net(tmp_path / "a.pt", tmp_path / "two.npz", steps=40, seed=0, device="cpu", batch_size=16)
    assert float(re.search(r"([\d.]+)% of 40 unseen images", capsys.readouterr().out)[1]) > 85
    assert (tmp_path / "a.pt").stat().st_size < 500_000

    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3)
    np.savez(tmp_path / "s.npz", arr_0=padded, arr_1=labels)
    got, said = measure("--samples s.npz --ref two.npz --net a.pt")
    assert got["accuracy"] > 0.85 and got["fid"] < 1e-6 and got["precision"] == 1 and "accuracy" in said.out and "Frechet distance (a.pt)" in said.out
    np.savez(tmp_path / "s.npz", arr_0=padded, arr_1=labels + 1)  # a class that the network does not have
    assert "accuracy" not in measure("--samples s.npz --ref two.npz --net a.pt")[0]
    net, x = torch.jit.load(tmp_path / "a.pt"), torch.zeros(2, 3, 50, 40, dtype=torch.uint8)
    assert net(x, return_features=True).shape == (2, 64) and torch.allclose(net(x).sum(1), torch.ones(2))
    assert list(net.classes) == ["trouser", "bag"]

    monkeypatch.setattr(sys, "argv", ["fid.py", "--train-net", "b.pt", "--data", "two.npz", "--steps", "1", "--seed", "3"])
    fid.main()
    fid.train_net("c.pt", "two.npz", steps=1, seed=3, device="cpu")
    b, c = ((tmp_path / f"{x}.pt").read_bytes() for x in "bc")
    assert b == c
