"""Draw accuracy over k from the results.json of steps 4 and 5.

    python tests/tools/plot.py runs/04_voting runs/05_metarm --out figure.png

Curves: each model of step 4 (the sum of its samples); of step 5 guided voting and the oracle. Bands
are one standard error. Curves of different judges differ in shade; voting is dashed, and every curve
has a marker of its own, so that they stay apart in grey.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def curves_of(folder: str) -> dict[str, dict[int, dict]]:
    """{title: {k: {"mean", "se"}}} of a run of step 4 or 5."""
    results = json.loads(Path(folder, "results.json").read_text())
    found = {}
    for name, curve in results.get("figures", {}).items():
        if " minus " not in name:  # a difference of two models
            label = Path(name).parent.name if Path(name).name == "model" else Path(name).name
            found[f"voting, {label}"] = {int(k): row["sum"] for k, row in curve.items()}
    for title, row in results.get("rows", {}).items():
        k_meta, _, k = title.partition(" of ")
        if k.isdigit() and int(k_meta) == max(1, round(results["settings"]["k_meta"] * int(k))):
            for kind in ("guided", "oracle"):
                found.setdefault(f"{kind}, {Path(folder).name}", {})[int(k)] = row[kind]
    return found


def label_places(ends: dict[str, float], gap: float = 1.2) -> dict[str, float]:
    """Heights of the labels of curves that end at these heights: in their order, not too close."""
    places, last = {}, -1e9
    for name in sorted(ends, key=ends.get):
        places[name] = last = max(ends[name], last + gap)
    return places


def plot(curves: dict[str, dict[int, dict]], path: str, title: str = "") -> None:
    """Draw the curves into a PNG file, each labelled at its end."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    places = label_places(
        {name: 100 * [*curve.values()][-1]["mean"] for name, curve in curves.items()}
    )
    judges = list(dict.fromkeys(name.partition(", ")[2] for name in curves))
    for number, (name, curve) in enumerate(curves.items()):
        mean = [100 * row["mean"] for row in curve.values()]
        error = [100 * row["se"] for row in curve.values()]
        low = [m - e for m, e in zip(mean, error)]
        high = [m + e for m, e in zip(mean, error)]
        kind, _, judge = name.partition(", ")
        shade = str(0.55 - 0.55 * judges.index(judge) / max(1, len(judges) - 1))
        style = {"voting": "--"}.get(kind, "-")
        axes.fill_between(list(curve), low, high, color=shade, alpha=0.15, linewidth=0)
        axes.plot(list(curve), mean, "os^Dv*"[number % 6] + style, color=shade, linewidth=2)
        label = name.replace("$", r"\$")
        axes.text(1.1 * max(curve), places[name], label, color=shade, va="center")
        axes.set_xscale("log")
        axes.set_xticks(list(curve), map(str, curve))
    axes.set(xlabel="samples per item, k", ylabel="accuracy, %", title=title)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs of steps 4 and 5")
    parser.add_argument("--out", default="figure.png", help="file to write")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--names", nargs="*", default=[], metavar="OLD=NEW", help="of curves")
    parser.add_argument("--leave-out", nargs="*", default=[], help="beginnings of names")
    args = parser.parse_args()
    curves = {}
    for folder in args.runs:
        curves |= curves_of(folder)
    out = tuple(args.leave_out)
    curves = {name: curve for name, curve in curves.items() if not name.startswith(out)}
    names = dict(pair.split("=", 1) for pair in args.names)
    plot({names.get(name, name): curve for name, curve in curves.items()}, args.out, args.title)
    print(f"{len(curves)} curves in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
