"""Prints a row of the replication sheet in tests/RESULTS.md, from folders of runs.

    python tests/tools/sheet.py "Gemma 3 1B, nf4, RewardBench" runs/gains runs/4 runs/5

The first run of step 4 has three --model: before training, after step 2, after step 3. Or several
have them, in this order: a base model is judged with --shots, in a run of its own. Runs of step 4
give voting by their last model, a run of step 5 voting and guided voting of its samples. All are
accuracies in percent. What no run has measured stays empty.
"""

import argparse
import json
from pathlib import Path

TRAINED = ["base", "RFT", "GRPO"]  # one sample at temperature 0.5
COLUMNS = [*TRAINED, "voting@8", "voting@32", "MetaRM@8", "MetaRM@32"]


def row(name: str, folders: list[Path]) -> str:
    """The row for `name`, as Markdown."""
    found, stages = {}, []
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        figures = results.get("figures", {}).items()
        curves = [curve for title, curve in figures if " minus " not in title and "1" in curve]
        stages += curves
        rows = results.get("rows", {})
        for k, guided in (("8", "4 of 8"), ("32", "16 of 32")):
            if curves and k in curves[-1]:
                found[f"voting@{k}"] = curves[-1][k]["sum"]
            if guided in rows:
                found |= {f"voting@{k}": rows[guided]["voting"]}
                found |= {f"MetaRM@{k}": rows[guided]["guided"]}
    if len(stages) >= len(TRAINED):
        found |= {column: curve["1"]["sum"] for column, curve in zip(TRAINED, stages)}
    cells = [""] * len(COLUMNS)
    for number, column in enumerate(COLUMNS):
        if column in found:
            one = found[column]
            cells[number] = f"{100 * one['mean']:.1f} ± {100 * one['se']:.1f}"
    return f"| {' | '.join([name, *cells])} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the model and the data")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of steps 4 and 5")
    args = parser.parse_args()
    missing = [str(folder) for folder in args.runs if not (folder / "results.json").exists()]
    if missing:
        raise SystemExit(f"error: no results.json in {', '.join(missing)}")
    print(f"| model, data | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    print(row(args.name, args.runs))


if __name__ == "__main__":
    main()
