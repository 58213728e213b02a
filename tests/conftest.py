import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are not a package


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


# Importing torch takes longer than most of the commands that are tested, so they are forked from a process that has done it.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.data", "numpy", "PIL.Image", "tqdm"])


def run_script(argv, folder, env, out, err):
    """In a process of its own: what `python argv` does in this folder and environment."""
    os.chdir(folder)
    os.environ.update(env)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, sys.stdout, sys.stderr = argv, open(1, "w"), open(2, "w", buffering=1)
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture
def command(tmp_path, tmp_path_factory):
    """command("sample.py --n 2", expect=0) runs a script as a user does, in an empty folder, and returns what it printed: (stdout, stderr)."""
    logs = tmp_path_factory.mktemp("logs")

    def call(line, expect=0, env=None, launcher=None):
        script, *flags = line.split() if isinstance(line, str) else line
        argv = [str(ROOT / script), *map(str, flags)]
        if launcher is None:
            process = forks.Process(target=run_script, args=(argv, tmp_path, env or {}, logs / "out", logs / "err"))
            process.start()
            process.join(240)
            status = process.exitcode
            process.kill()
            out, err = ((logs / name).read_text() if (logs / name).exists() else "" for name in ("out", "err"))
        else:
            result = subprocess.run([*launcher, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, **(env or {})})
            status, out, err = result.returncode, result.stdout, result.stderr
        assert status == expect, f"{line}: status {status}\n{out}\n{err}"
        if expect == 2:
            assert "Traceback" not in err and len(err.strip().splitlines()[-1]) < 600
        return out, err

    return call


@pytest.fixture(scope="session")
def garments():
    """60 bundled images, 6 of each class: images uint8 [60, 28, 28], labels [60]."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.concatenate([np.flatnonzero(data["labels"] == k)[:6] for k in range(10)])
    return data["images"][picks], data["labels"][picks]
