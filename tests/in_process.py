"""Run a script's main() in the process of the tests, in a fraction of the time of a new process."""

import signal
import sys

from conftest import ROOT

import diversity
import fid
import finetune_mrar
import model
import sample
import train
import vae

sys.path.insert(0, str(ROOT / "demo"))
import figures  # noqa: E402
import train_vae  # noqa: E402

MAINS = {
    f"{script.__name__}.py": script.main
    for script in (vae, train, finetune_mrar, sample, fid, diversity, figures, train_vae)
}


def run_in_process(line, expect=0):
    """Run a command, a string or a list of words, in the current folder; check its exit status."""
    words = line.split() if isinstance(line, str) else [str(word) for word in line]
    handler = signal.getsignal(signal.SIGTERM)  # run_main sets another
    argv, sys.argv = sys.argv, words
    status = 0
    try:
        model.run_main(MAINS[words[0]])
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    assert status == expect, f"{line}: status {status}"
