"""What the figures of demo/claims.csv say about the claims: one rule for all verdicts.

`python demo/claims.py --rows` prints the tables of this file.

The rule. A comparison has two settings, measured with the same seeds. Their difference is taken
seed by seed. The verdict is "yes" or "no" only if the difference has the same sign in all seeds and
its mean is more than twice its standard error; else it is "cannot tell". One seed has no standard
error, so its verdict is "cannot tell" too.
"""

import math
from typing import NamedTuple

import numpy as np


class Comparison(NamedTuple):
    claim: str
    rows: str  # the claim's name in claims.csv, and for --rows
    better: str  # the setting that the claim says is better
    other: str | None  # None: 0, of a metric that is a difference already
    metric: str = "distance"  # lower is better, but for a gain


def both(claim, rows, better, other):
    """A comparison without guidance and one at the best guidance scale."""
    names = {"cfg 1": "no guidance", "best cfg": "guided"}
    return tuple(
        Comparison(f"{claim}, {name}", rows, better.format(cfg), other.format(cfg))
        for cfg, name in names.items()
    )


def diversity(claim, rows, better, other):
    """A comparison by Eq. 15, and one by Eq. 15 of the features less their mean."""
    return (
        Comparison(f"{claim}, Eq. 15", rows, better, other, "similarity (Eq. 15)"),
        Comparison(f"{claim}, centred", rows, better, other, "centred"),
    )


def losses(claim, better, other):
    """A comparison of the losses of held-out images, given two conditions c."""
    return Comparison(claim, "condition", better, other, "loss")


COMPARISONS = (
    # The parts of TransDiff (Tables 1, 2).
    *both(
        "TransDiff beats a DiT with as many blocks as its decoder",
        "baselines",
        "stage 1, {}",
        "diffusion only, {}",
    ),
    *both(
        "TransDiff beats a DiT with as many parameters",
        "baselines",
        "stage 1, {}",
        "diffusion only, 6 blocks, {}",
    ),
    *both(
        "decoding the whole image beats decoding each token alone",
        "baselines",
        "stage 1, {}",
        "diffusion loss, {}",
    ),
    # MRAR (Tables 2 to 4, Figure 6).
    *both("MRAR beats 1-step AR", "mrar", "MRAR, {}, image 3", "stage 1, {}"),
    *both("MRAR beats 1-step AR trained as long", "mrar", "MRAR, {}, image 3", "control, {}"),
    Comparison(
        "MRAR beats 1-step AR, both trained for hours, no guidance",
        "length",
        "bundled MRAR, t to 1.0, cfg 1, image 3",
        "1-step, trained long, t to 1.0, cfg 1",
    ),
    Comparison(
        "MRAR beats 1-step AR, both trained for hours, guided at every t",
        "length",
        "bundled MRAR, t to 1.0, best cfg, image 3",
        "1-step, trained long, t to 1.0, best cfg",
    ),
    Comparison(
        "MRAR beats 1-step AR, both trained for hours, guided at low t",
        "length",
        "bundled MRAR, t to 0.65, best cfg, image 3",
        "1-step, trained long, t to 0.65, best cfg",
    ),
    *both("MRAR beats scale AR", "scales", "MRAR, {}, image 3", "scale AR, {}, image 3"),
    *both("chains of 4 beat chains of 1", "refs", "chains of 4, {}, image 3", "chains of 1, {}"),
    *both(
        "chains of 4 beat chains of 16",
        "refs",
        "chains of 4, {}, image 3",
        "chains of 16, {}, image 15",
    ),
    *both(
        "chains of 4 beat chains of 64",
        "refs",
        "chains of 4, {}, image 3",
        "chains of 64, {}, image 63",
    ),
    *both(
        "of 4 images in a chain, the last is better than the first",
        "mrar",
        "MRAR, {}, image 3",
        "MRAR, {}, image 0",
    ),
    *both(
        "of 16 images, the last is better than the first",
        "refs",
        "chains of 16, {}, image 15",
        "chains of 16, {}, image 0",
    ),
    *both(
        "of 16 images, the last is better than the second",
        "refs",
        "chains of 16, {}, image 15",
        "chains of 16, {}, image 1",
    ),
    # What references tell (Section 3.2).
    Comparison(
        "three references lower the loss, class given",
        "references",
        "class, step 500, real, image 3",
        None,
        "gain",
    ),
    Comparison(
        "one reference lowers the loss, class given",
        "references",
        "class, step 500, real, image 1",
        None,
        "gain",
    ),
    Comparison(
        "three references lower the loss, class not given",
        "references",
        "null class, step 500, real, image 3",
        None,
        "gain",
    ),
    *both(
        "chains of nearest neighbours beat random chains",
        "neighbours",
        "chains of neighbours, {}, image 3",
        "MRAR, {}, image 3",
    ),
    *both(
        "chains of nearest neighbours beat 1-step AR trained as long",
        "neighbours",
        "chains of neighbours, {}, image 3",
        "control, {}",
    ),
    # Features (Section 4.2.2, Figures 1 and 4, Table 4).
    *diversity(
        "the features of MRAR are more diverse than those of 1-step AR",
        "condition",
        "MRAR, features",
        "stage 1, features",
    ),
    *diversity(
        "the features of MRAR are more diverse than those of 1-step AR trained as long",
        "condition",
        "MRAR, features",
        "control, features",
    ),
    *diversity(
        "the features of 1-step AR are more diverse than those of scale AR",
        "scales",
        "stage 1",
        "scale AR",
    ),
    *diversity(
        "features become more diverse in training",
        "steps",
        "lr 0.002, step 1600",
        "lr 0.002, step 400",
    ),
    *diversity(
        "the features are more diverse with half the learning rate",
        "steps",
        "lr 0.001, step 1600",
        "lr 0.002, step 1600",
    ),
    Comparison(
        "1-step AR: 64 features beat the first 32",
        "features",
        "1-step, features 64",
        "1-step, features 32",
    ),
    Comparison(
        "MRAR: 64 features beat the first 32",
        "features",
        "MRAR, features 64",
        "MRAR, features 32",
    ),
    # What c holds (ours).
    losses(
        "the positions of the features matter", "stage 1, c", "stage 1, features at other positions"
    ),
    losses(
        "the features beside their mean matter",
        "stage 1, c",
        "stage 1, mean of c at every position",
    ),
    losses("the class in c matters", "stage 1, c", "stage 1, c of another class"),
    losses("of MRAR, all of c beats its first block", "MRAR, c", "MRAR, first block of c alone"),
    losses(
        "of MRAR, all of c beats the image's own block", "MRAR, c", "MRAR, own block of c alone"
    ),
    losses(
        "of MRAR, the references' class matters", "MRAR, c", "MRAR, references of another class"
    ),
    losses(
        "of MRAR, the references themselves matter", "MRAR, c", "MRAR, references of another chain"
    ),
    # Settings of training and sampling (Eq. 5, Appendix C, ours).
    *both("a learning rate of 1e-3 beats 2e-3", "steps", "lr 0.001, {}", "lr 0.002, {}"),
    Comparison(
        "a learning rate of 1e-3 beats 2e-3, held-out loss",
        "steps",
        "lr 0.001",
        "lr 0.002",
        "held-out loss",
    ),
    *both("uniform t beats logit-normal t", "t", "uniform t, {}", "stage 1, {}"),
    Comparison(
        "s1 = 0.9 alone is better than 1",
        "s1_s2",
        "s1 0.9, s2 1.0",
        "s1 1.0, s2 1.0",
    ),
    Comparison(
        "s2 = 0.9 alone is better than 1",
        "s1_s2",
        "s1 1.0, s2 0.9",
        "s1 1.0, s2 1.0",
    ),
    Comparison(
        "s1 = s2 = 0.9 is better than 1",
        "s1_s2",
        "s1 0.9, s2 0.9",
        "s1 1.0, s2 1.0",
    ),
    Comparison(
        "a sampler without noise is better in 4 evaluations",
        "samplers",
        "adams-bashforth, evaluations 4",
        "euler-maruyama, evaluations 4",
    ),
    Comparison(
        "a sampler without noise is better in 25 evaluations",
        "samplers",
        "adams-bashforth, evaluations 25",
        "euler-maruyama, evaluations 25",
    ),
    Comparison(
        "fresh noise for each image of a chain is better",
        "noise",
        "MRAR, cfg 2, fresh noise, image 3",
        "MRAR, cfg 2, image 3",
    ),
    Comparison(
        "MRAR is better guided against a null class without references",
        "autoguidance",
        "MRAR against null without references, best cfg, image 3",
        "MRAR, best cfg, image 3",
    ),
    Comparison(
        "guidance against early weights beats the null class",
        "autoguidance",
        "control against step 400, best cfg",
        "control, best cfg",
    ),
    Comparison(
        "guidance at t up to 0.65 alone is better",
        "interval",
        "control, t to 0.65, best cfg",
        "control, best cfg",
    ),
    Comparison(
        "guidance at t up to 0.65 alone is better, trained for hours",
        "length",
        "1-step, trained long, t to 0.65, best cfg",
        "1-step, trained long, t to 1.0, best cfg",
    ),
)


class Result(NamedTuple):
    comparison: Comparison
    ours: list  # values of the setting that the claim says is better, one per seed
    theirs: list  # of the other, for the same seeds
    seeds: list
    differences: list  # above 0 where a seed agrees with the claim
    verdict: str


def standard_error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def verdict(differences):
    """The rule above, of paired differences: above 0 where a seed agrees with the claim."""
    if len(differences) == 1:
        return "cannot tell: one seed"
    mean = np.mean(differences)
    signs = set(np.sign(differences))
    if len(signs) > 1 or abs(mean) <= 2 * standard_error(differences):
        return "cannot tell"
    return "yes" if mean > 0 else "no"


def by_claim(table):
    """{claim: {setting: {metric: {seed: value}}}} of {(claim, setting, seed, metric): value}."""
    tables = {}
    for (claim, setting, seed, metric), value in table.items():
        cells = tables.setdefault(claim, {}).setdefault(setting, {})
        cells.setdefault(metric, {})[seed] = value
    return tables


def compare(tables):
    """Result of each comparison whose two settings are in the tables.

    The other setting may be that of another claim: a name means the same run in all claims.
    """
    anywhere = {}
    for settings in tables.values():
        anywhere.update(settings)
    results = []
    for comparison in COMPARISONS:
        metric = comparison.metric
        settings = tables.get(comparison.rows, {})
        ours = settings.get(comparison.better, {}).get(metric, {})
        if comparison.other is None:
            theirs = dict.fromkeys(ours, 0.0)
        else:
            theirs = (anywhere | settings).get(comparison.other, {}).get(metric, {})
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            a = [ours[seed] for seed in seeds]
            b = [theirs[seed] for seed in seeds]
            differences = np.subtract(a, b) if metric == "gain" else np.subtract(b, a)
            row = Result(comparison, a, b, seeds, list(differences), verdict(differences))
            results.append(row)
    return results


def mean_and(values, spread):
    """ "2.00 ± 0.28", to two digits of the spread; of one value "2"."""
    if len(values) < 2:
        return "".join(f"{value:.4g}" for value in values)
    size = spread(values)
    decimals = 1 - math.floor(math.log10(size)) if size else 0
    return f"{np.mean(values):.{max(0, decimals)}f} ± {size:.{max(0, decimals)}f}"


def deviation(values):
    return np.std(values, ddof=1)


def markdown_table(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(tables):
    """The verdicts, then mean and standard deviation over seeds of every figure: one table per
    claim, one row per setting."""
    header = ["claim", "`--rows`", "A, better by the claim", "B"]
    header += ["lead of A ± standard error", "seeds", "holds?"]
    rows = []
    for comparison, ours, theirs, seeds, differences, answer in compare(tables):
        a = f"{comparison.better}: {mean_and(ours, deviation)}"
        b = f"{comparison.other}: {mean_and(theirs, deviation)}" if comparison.other else "0"
        lead = mean_and(differences, standard_error)
        rows.append([comparison.claim, comparison.rows, a, b, lead, ", ".join(seeds), answer])
    parts = [markdown_table(header, rows)]
    for claim, settings in tables.items():
        columns = list(dict.fromkeys(metric for cells in settings.values() for metric in cells))
        rows = []
        for setting, cells in settings.items():
            figures = [list(cells.get(column, {}).values()) for column in columns]
            rows.append([setting, *(mean_and(values, deviation) for values in figures)])
        parts.append(markdown_table([claim, *columns], rows))
    return "\n\n".join(parts)
