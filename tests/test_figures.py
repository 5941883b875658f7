"""Every figure with an error in README.md and in the new tables of tests/RESULTS.md is of a run."""

import json
import re

import pytest
from conftest import ROOT

FIGURE = re.compile(r"(\d+\.\d) ± (\d+\.\d)")
FILES = sorted((ROOT / "tests" / "results").glob("*.json"))


def figures(results) -> set[tuple[str, str]]:
    """All {"mean", "se"} anywhere in results, in percent, as they are printed; without a sign."""
    if isinstance(results, list):
        return set().union(*map(figures, results))
    if not isinstance(results, dict):
        return set()
    if {"mean", "se"} <= results.keys():
        mean, error = results["mean"], results["se"]
        return {(f"{abs(100 * mean):.1f}", f"{100 * error:.1f}")} if error is not None else set()
    return figures(list(results.values()))


@pytest.mark.parametrize("name", ["README.md", "tests/RESULTS.md"])
def test_every_figure_comes_from_a_run(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.partition("## What the first edition measured")[0]  # its runs were not kept
    known = figures([json.loads(path.read_text()) for path in FILES])
    found = FIGURE.findall(text)
    assert len(found) > 10 and not set(found) - known, f"of no run: {sorted(set(found) - known)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_how_it_was_made(path):
    results = json.loads(path.read_text())
    assert {"settings", "date", "transformers", "seconds"} <= results.keys()
    assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), "a path of a machine"
