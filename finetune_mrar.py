"""Stage 2: fine-tune a 1-step model with Multi-Reference Autoregression (Section 3.2.2; recipe of Appendix B).

    python finetune_mrar.py                               the XS demo, after python train.py
    torchrun --nproc_per_node 8 finetune_mrar.py --size B --init runs/B/last.pt    the paper's recipe

The loop is train.py's. What differs: a sample is a chain of `refs` images of one class (Eq. 11), the mask is
block-causal (Figure 3 e), and the run starts from stage 1, on the same data: the mask embedding is copied into every
mask token.
"""

from pathlib import Path

from train import make_parser, train
from vae import run_main


def main():
    parser = make_parser(__doc__, "runs/mrar", ("XS MRAR", "MRAR"))
    parser.add_argument("--init", default="runs/train/last.pt", help="1-step checkpoint (default: %(default)s)")
    parser.add_argument("--refs", type=int, choices=(4, 16, 64), help="images in a chain (default: 4, best in Fig. 6)")
    parser.set_defaults(only_decoder=False)
    args = parser.parse_args()
    if not args.resume and not Path(args.init).exists():
        raise ValueError(f"--init {args.init}: no such file; run train.py first, or name a 1-step checkpoint")
    train(args)


if __name__ == "__main__":
    run_main(main)
