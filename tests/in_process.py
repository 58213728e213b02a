"""Run a script's main() in the process of the tests: it takes a fraction of the time of a new process."""

import signal
import sys

import torch

import diversity
import fid
import finetune_mrar
import sample
import train
import vae

MAINS = {f"{script.__name__}.py": script.main for script in (vae, train, finetune_mrar, sample, fid, diversity)}


def run_in_process(line, expect=0):
    """Run a command, given as a string or a list of words, in the current folder. Checks its exit status."""
    words = line.split() if isinstance(line, str) else [str(word) for word in line]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv, status = sys.argv, words, 0
    try:
        vae.run_main(MAINS[words[0]])
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_float32_matmul_precision("highest")  # training lowers it
    assert status == expect, f"{line}: status {status}"
