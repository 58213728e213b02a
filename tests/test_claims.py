"""The study of the paper's claims, demo/claims.py: a tiny run of all of it."""

import csv
import math

ARGV = "demo/claims.py --quick --out study"
CLAIMS = "mrar references autoguidance interval noise samplers s1_s2 t steps refs".split()


def values(rows, claim):
    """{setting: distance in the bundled network} of a claim."""
    return {
        row["setting"]: float(row["value"])
        for row in rows
        if (row["claim"], row["network"], row["metric"]) == (claim, "features.pt", "distance")
    }


def written(folder):
    """{path: time} of all results and models."""
    paths = [*folder.rglob("*.json"), *folder.rglob("*.pt")]
    return {path: path.stat().st_mtime_ns for path in paths}


def test_every_claim_has_finite_figures_and_a_second_run_adds_nothing(command, tmp_path):
    printed, _ = command(ARGV)
    folder = tmp_path / "study"
    text = (folder / "claims.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert list(dict.fromkeys(row["claim"] for row in rows)) == CLAIMS
    assert all(math.isfinite(float(row["value"])) for row in rows)

    # Both networks measure the same sets.
    measured = {"features.pt": set(), "features-2.pt": set()}
    for row in rows:
        if row["metric"] == "distance":
            measured[row["network"]].add((row["claim"], row["setting"]))
    assert measured["features.pt"] == measured["features-2.pt"]
    assert ("mrar", "MRAR, cfg 2, image 3") in measured["features.pt"]

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

    # The printed table has every setting of every claim, and there is a picture of each curve.
    assert all(f"| {row['setting']} |" in printed for row in rows)
    pictures = {path.name for path in folder.glob("claims-*.png")}
    assert {"claims-autoguidance-distance.png", "claims-references-gain.png"} <= pictures

    files = written(folder)
    assert any(path.name == "last.pt" for path in files)
    command(ARGV)
    assert (folder / "claims.csv").read_text() == text
    assert written(folder) == files
