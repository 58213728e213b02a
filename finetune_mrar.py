"""Stage 2: fine-tune a 1-step model with Multi-Reference Autoregression (Section 3.2.2).

    python finetune_mrar.py                               the XS demo, after python train.py
    torchrun --nproc_per_node 8 finetune_mrar.py --init runs/B    the recipe of Appendix B

The loop is train.py's. What differs: an item is a chain of `refs` images of one class (Eq. 11), and
the mask is block-causal (Figure 3 e; the paper writes "causal"). The run starts from stage 1's EMA
weights and size; if --init is a run or its files, also from its images, holdout and mirror. The
one mask embedding of stage 1 is copied into every mask token.
"""

from model import TransDiff, run_main
from train import parse, train, training_parser


def main(model_class=TransDiff):
    parser = training_parser(__doc__, "runs/mrar")
    add = parser.add_argument
    add("--init", default="runs/train", help="1-step checkpoint or run (default: %(default)s)")
    add(
        "--refs",
        type=int,
        choices=(4, 16, 64),
        default=4,
        help="images in a chain (default: 4, best in Fig. 6)",
    )
    add(
        "--chains",
        default="images",
        help="images (default): of a class, at random; scales: scale AR (Table 4); or a "
        "file: the release's list of chains",
    )
    parser.set_defaults(only_decoder=False)
    train(*parse(parser), model_class)


if __name__ == "__main__":
    run_main(main, "; --resume continues the run", "; raise --accumulate")
