"""The study of the paper's claims, demo/claims.py: a tiny run of all of it."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import in_process  # noqa: F401 - finds the scripts of demo

import claims
import verdicts
from conftest import ROOT
from model import SIZES, TransDiff
from train import read_chains

ARGV = "demo/claims.py --quick --out study"
CLAIMS = (
    "mrar baselines scales neighbours features references condition autoguidance interval noise samplers "
    "s1_s2 t steps refs length"
).split()


def values(rows, claim):
    """{setting: distance} of a claim."""
    return {
        row["setting"]: float(row["value"])
        for row in rows
        if (row["claim"], row["metric"]) == (claim, "distance")
    }


def written(folder):
    """{path: time} of all results and models."""
    paths = [*folder.rglob("*.json"), *folder.rglob("*.pt")]
    return {path: path.stat().st_mtime_ns for path in paths}


SOME = "mrar baselines features references autoguidance samplers".split()


@pytest.mark.weights
@pytest.mark.parametrize("names", [SOME, pytest.param(CLAIMS, marks=pytest.mark.slow)])
def test_claims_have_finite_figures_and_a_second_run_adds_nothing(names, command, tmp_path):
    argv = f"{ARGV} --rows {' '.join(names)}"
    printed, _ = command(argv)
    folder = tmp_path / "study"
    text = (folder / "claims.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert list(dict.fromkeys(row["claim"] for row in rows)) == names
    assert all(math.isfinite(float(row["value"])) for row in rows)

    # The best of a grid is its minimum.
    grid = values(rows, "mrar")
    expected = min(grid["MRAR, cfg 1, image 3"], grid["MRAR, cfg 2, image 3"])
    assert grid["MRAR, best cfg, image 3"] == expected

    # What is guided in another way differs, where the way matters: from image 1 on.
    guided = values(rows, "autoguidance")
    other = "MRAR against null without references, cfg 2"
    assert guided["MRAR, cfg 2, image 0"] == guided[f"{other}, image 0"]
    assert guided["MRAR, cfg 2, image 3"] != guided[f"{other}, image 3"]
    assert guided["control, cfg 2"] != guided["control against step 2, cfg 2"]
    assert len(set(values(rows, "samplers").values())) > 2
    settings = ("stage 1", "diffusion only", "diffusion only, 6 blocks", "diffusion loss")
    distances = [values(rows, "baselines")[f"{setting}, cfg 2"] for setting in settings]
    assert len(set(distances)) == 4
    few_and_all = values(rows, "features")
    assert few_and_all["MRAR, features 8"] != few_and_all["MRAR, features 64"]

    # The printed table has every setting of every claim, and there is a picture of each curve.
    assert all(f"| {row['setting']} |" in printed for row in rows)
    pictures = {path.name for path in folder.glob("claims-*.png")}
    assert {"claims-autoguidance-distance.png", "claims-references-gain.png"} <= pictures
    assert "cannot tell: one seed" in printed and "| yes |" not in printed

    files = written(folder)
    assert any(path.name == "last.pt" for path in files)
    command(argv)
    assert (folder / "claims.csv").read_text() == text
    assert written(folder) == files


def test_the_baselines_are_what_they_are_called():
    config = dataclasses.replace(SIZES["XS"], num_classes=5)
    torch.manual_seed(0)
    plain, deep, alone = (build(config).eval() for build in claims.BASELINES.values())
    parameters = sum(p.numel() for p in TransDiff(config).parameters())
    labels = torch.arange(3)

    # Diffusion only: of the AR Transformer nothing but the class embedding has a gradient.
    plain.loss(torch.randn(3, 1, 8, 8, 8), labels).backward()
    used = {name for name, p in plain.ar.named_parameters() if p.grad is not None}
    assert used == {"class_embedding.weight", "null_class"}
    assert len(plain.decoder.blocks) == 4 and len(deep.decoder.blocks) == 6
    in_use = [p for net in (deep.decoder, deep.ar.class_embedding) for p in net.parameters()]
    assert sum(p.numel() for p in in_use) == pytest.approx(parameters, rel=0.15)

    # Diffusion loss: a token depends on no other token, and on the c of its own position alone.
    torch.nn.init.normal_(alone.decoder.output_proj.weight)
    x = torch.randn(1, 8, 8, 8)
    c = alone.encode(labels[:1])
    with torch.no_grad():
        before = alone.velocity(x, torch.tensor([0.5]), c)
        for change in (x, c[0].T.unflatten(1, (8, 8))[None]):
            change[:, :, 2, 3] += 1
            after = alone.velocity(x, torch.tensor([0.5]), c)
            changed = (after != before).any(dim=1)[0].nonzero().tolist()
            assert changed == [[2, 3]]
            before = after


def test_neighbours_are_chains_of_one_class_that_use_each_image_once(tmp_path, monkeypatch):
    """An image is beside its copies."""
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(6, 1, 8, 8, 8)).astype(np.float16)
    moments = np.repeat(groups, 4, axis=1).reshape(24, 8, 8, 8)  # four copies each
    order = rng.permutation(24)
    means = np.concatenate([moments[order], np.zeros_like(moments)], axis=1)
    cache = SimpleNamespace(
        labels=order // 12, classes=["a", "b"], scale=1.0, path=tmp_path,
        moments=lambda indices, flips: means[indices], names=lambda: names,
    )  # fmt: skip
    names = [f"{cache.classes[k]}/{i}" for i, k in enumerate(cache.labels)]
    monkeypatch.setattr(claims, "cache_of", lambda seed: (cache, np.arange(24), None))
    monkeypatch.setattr(claims.args, "out", tmp_path, raising=False)
    chains = read_chains(claims.neighbour_chains(0), cache, np.arange(24), 4)
    assert sorted(chains.ravel()) == list(range(24))
    assert all(len(set(order[chain] // 4)) == 1 for chain in chains)


@pytest.mark.parametrize(
    "differences,expected",
    [
        ([1.0, 1.1, 1.2], "yes"),
        ([-1.0, -1.1, -1.2], "no"),
        ([3.0, 3.1, -0.1], "cannot tell"),  # two standard errors are 2.1, but one sign differs
        ([0.5, 0.6, 0.0], "cannot tell"),
        # Of these, the standard error is 1: the mean is below and above twice of it.
        ([1.9 - 3**0.5, 1.9, 1.9 + 3**0.5], "cannot tell"),
        ([2.1 - 3**0.5, 2.1, 2.1 + 3**0.5], "yes"),
        ([0.0, 0.0, 0.0], "cannot tell"),
        ([5.0], "cannot tell: one seed"),
    ],
)
def test_a_verdict_needs_one_sign_and_two_standard_errors(differences, expected):
    assert verdicts.verdict(differences) == expected


def test_comparisons_are_paired_by_seed_and_lower_is_better_but_for_a_gain():
    distances = {
        "MRAR, cfg 1, image 3": {"2": 1.0, "0": 3.0},
        "stage 1, cfg 1": {"0": 3.5, "2": 1.5},
    }
    table = {
        ("mrar", setting, seed, "distance"): value
        for setting, values in distances.items()
        for seed, value in values.items()
    }
    table["mrar", "stage 1, cfg 1", "7", "distance"] = 100.0  # no pair
    table["references", "class, step 500, real, image 3", "0", "gain"] = 0.25
    mrar, gain = verdicts.compare(verdicts.by_claim(table))
    assert mrar.seeds == ["2", "0"] and mrar.ours == [1.0, 3.0] and mrar.theirs == [1.5, 3.5]
    assert mrar.differences == [0.5, 0.5] and mrar.verdict == "yes"
    assert gain.differences == [0.25] and gain.verdict == "cannot tell: one seed"


def test_every_comparison_is_in_the_study_and_the_page_has_its_verdict():
    table = claims.read_table(ROOT / "demo" / "claims.csv")
    tables = verdicts.by_claim(table)
    compared = [result.comparison for result in verdicts.compare(tables)]
    assert compared == list(verdicts.COMPARISONS)
    assert len({comparison.claim for comparison in compared}) == len(compared)

    # A setting has one value, whatever the claim.
    values = {}
    for (_, *key), value in table.items():
        assert values.setdefault(tuple(key), value) == value

    page = (ROOT / "demo" / "CLAIMS.md").read_text(encoding="utf-8")
    assert verdicts.markdown(tables).split("\n\n")[0] in page


def test_without_rows_the_tables_of_a_folder_are_printed(command, tmp_path):
    study = (ROOT / "demo" / "claims.csv").read_text().splitlines()
    lines = [study[0], *(line for line in study if line.startswith("mrar,"))]
    (tmp_path / "claims.csv").write_text("\n".join(lines))
    printed, _ = command("demo/claims.py --rows --out .")
    assert printed.startswith("| claim |") and "| MRAR beats 1-step AR, guided | mrar |" in printed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("claims")) == [
        "claims-verdicts.png",
        "claims.csv",
    ]
