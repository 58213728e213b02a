"""Fixtures of all tests: `command` runs a script as a user does, `garments` are bundled images."""

import dataclasses
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

# Before torch is imported. A second thread gains nothing for models this small, and beside other
# programs it makes the tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# If there are more threads after all, those that wait do not spin for long; as in model.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

os.fsync = lambda fd: None  # no test is about a power cut

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are not a package


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; run with -m slow")
    config.addinivalue_line("markers", "weights: needs the bundled or the golden weights")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


# Most commands take less time than importing torch, so they are forked from a process that has
# imported it.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.utils.data", "numpy", "PIL.Image", "tqdm"]
)


def run_script(argv, folder, env, out, err, file_size=resource.RLIM_INFINITY):
    """Do in this process what `python argv` does in this folder and environment."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    os.chdir(folder)
    os.environ.update(env)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, sys.stdout, sys.stderr = argv, open(1, "w"), open(2, "w", buffering=1)
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture
def command(tmp_path, tmp_path_factory):
    """command("sample.py --n 2", expect=0) runs a script in an empty folder.

    Returns (stdout, stderr).
    expect    the exit status; for 2 the last line on stderr has to be a short message, and there
              must be no traceback
    env       environment variables to add
    file_size bytes that a file may have, as on a full disk
    launcher  what to run the script with, e.g. torchrun (default: a fork that has torch imported)
    """
    logs = tmp_path_factory.mktemp("logs")

    def fork(argv, env, *file_size):
        process = forks.Process(
            target=run_script, args=(argv, tmp_path, env, logs / "out", logs / "err", *file_size)
        )
        process.start()
        process.join(240)
        status = process.exitcode
        process.kill()
        return status, *(
            (logs / name).read_text() if (logs / name).exists() else "" for name in ("out", "err")
        )

    def launch(argv, env):
        env = {**os.environ, **env}
        result = subprocess.run(
            argv, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env
        )
        return result.returncode, result.stdout, result.stderr

    def call(line, expect=0, env=None, launcher=None, file_size=resource.RLIM_INFINITY):
        script, *flags = line.split() if isinstance(line, str) else line
        argv = [str(ROOT / script), *map(str, flags)]
        status, out, err = (
            launch([*launcher, *argv], env or {}) if launcher else fork(argv, env or {}, file_size)
        )
        assert status == expect, f"{line}: status {status}\n{out}\n{err}"
        if expect == 2:
            assert "Traceback" not in err and len(err.strip().splitlines()[-1]) < 600
        return out, err

    return call


TINY = dict(width=32, heads=1, ar_depth=1, dit_depth=1, label_drop_prob=0.5)


@pytest.fixture
def tiny(monkeypatch):
    """XS is smaller in this process: for tests of what does not depend on the size."""
    from model import SIZES

    monkeypatch.setitem(SIZES, "XS", dataclasses.replace(SIZES["XS"], **TINY))


@pytest.fixture(scope="session")
def garments():
    """60 bundled images, 6 of each class: images uint8 [60, 32, 32], labels [60]."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.concatenate([np.flatnonzero(data["labels"] == k)[:6] for k in range(10)])
    return data["images"][picks], data["labels"][picks]
