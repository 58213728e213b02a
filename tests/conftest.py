import os
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


@pytest.fixture
def command(tmp_path):
    """command("sample.py --n 2", expect=0) runs a script as a user does, in an empty folder, and returns what it printed: (stdout, stderr)."""

    def call(line, expect=0, env=None, launcher=(sys.executable,)):
        script, *flags = line.split() if isinstance(line, str) else line
        result = subprocess.run([*launcher, str(ROOT / script), *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, **(env or {})})
        assert result.returncode == expect, f"{line}: status {result.returncode}\n{result.stdout}\n{result.stderr}"
        if expect == 2:
            assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()[-1]) < 600
        return result.stdout, result.stderr

    return call


@pytest.fixture(scope="session")
def garments():
    """60 bundled images, 6 of each class: images uint8 [60, 28, 28], labels [60]."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.concatenate([np.flatnonzero(data["labels"] == k)[:6] for k in range(10)])
    return data["images"][picks], data["labels"][picks]
