"""Writes one page of HTML about a whole run of the five steps. It needs nothing else.

    python tests/tools/report.py runs report.html

RUNS is the folder that holds 01_pointwise_grm, 02_rejective_ft, 03_grpo, 04_voting and 05_metarm, or
some of them. The page has their figures and curves, a judgement before and after training, a vote
that was saved and one that was spoiled, and the judgements of one item that the meta RM trusts most
and least. All text that a model or a user wrote is escaped.
"""

import argparse
import base64
import html
import io
import json
import math
from pathlib import Path

import plot
import show_votes

step = show_votes.step
NAMES = ["01_pointwise_grm", "02_rejective_ft", "03_grpo", "04_voting", "05_metarm"]
JUDGED = "01_pointwise_grm/judgements.jsonl"
SAMPLES = "04_voting/samples_1.jsonl"
STYLE = """
img { max-width: 100%; min-width: 32em; height: auto } .wide { overflow-x: auto }
.wide td { white-space: nowrap } section.wide td { white-space: normal } summary { white-space: nowrap }
.two { display: flex; flex-wrap: wrap; gap: 1em } .two > div { flex: 1 1 20em; min-width: 0 }
.two p, details { overflow-wrap: anywhere }
</style>"""


def results(folder: Path) -> dict:
    """The results.json of a step, empty if it was not run."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def figure_table(rows: dict[str, dict]) -> str:
    """A table of {row: {column: {"mean", "se"}}} in percent."""
    head = ["", *map(html.escape, next(iter(rows.values())))]
    cells = []
    for name, row in rows.items():
        shown = [
            f"{100 * one['mean']:.1f} &plusmn; {100 * (one['se'] or 0):.1f}"
            if one["mean"] is not None
            else "too few"
            for one in row.values()
        ]
        cells.append([html.escape(name), *shown])
    return f'<div class="wide">{show_votes.table(head, cells)}</div>'


def image(draw, title: str) -> str:
    """What draw(file) writes as a PNG, as an <img>."""
    file = io.BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/png;base64,{data}"
    return f'<div class="wide"><img alt="{html.escape(title)}" src="{source}"></div>\n'


def log_curves(path: Path, names: list[str]) -> str:
    """The curves of a log.jsonl over its steps, one small plot below the other."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def draw(file):
        figure = plot.Figure(figsize=(8, 1.8 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names):
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], color="0.2")
            axes.set(ylabel=name, xlabel="step" if name == names[-1] else "")
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=110)

    return image(draw, f"{', '.join(names)} over the steps") if lines else ""


def collapse(path: Path) -> list[str]:
    """What in the log of step 3 says that the judge is lost."""
    lines, said = [json.loads(line) for line in path.read_text().splitlines()], []
    quiet = [not any(line["signal"] for line in lines[i : i + 10]) for i in range(len(lines) - 9)]
    if any(quiet):
        first = lines[quiet.index(True)]["step"]
        said.append(f"From step {first} on, no group had a signal in ten steps: the items are all")
        said[-1] += " too easy or too hard, or the judge writes one and the same text."
    for name, most in (("unreadable", 0.5), ("kl", 1)):
        over = [line["step"] for line in lines if line[name] > most]
        if over:
            said.append(f"At step {over[0]}, {name} was above {most}: lower --lr or raise --beta.")
    return said


def judgement(one, title: str, more: str = "") -> str:
    """A judgement as it was written."""
    verdict = "right" if one.correct else "wrong"
    scores = html.escape(str(one.scores or one.reason))
    text = html.escape(one.output.strip())
    return f"<div><h3>{title}</h3><p>{text}</p><p><b>{scores}: {verdict}{more}</b></p></div>\n"


def question(one) -> str:
    """The query and the responses, in the order in which a judgement shows them."""
    rows = [["query", html.escape(str(one.query))]]
    for number, text in enumerate(one.responses, 1):
        best = " (the best)" if one.rewards[number - 1] == max(one.rewards) else ""
        rows.append([f"response {number}{best}", html.escape(text)])
    return show_votes.table(["", ""], rows)


def before_and_after(runs: Path) -> str:
    """An item that step 1's judge got wrong, and the first sample of step 4's judge right."""
    if not (runs / JUDGED).exists() or not (runs / SAMPLES).exists():
        return ""
    later = {}
    for one in step.read_lines(runs / SAMPLES):
        later.setdefault(str(one.query), one)
    for one in step.read_lines(runs / JUDGED):
        after = later.get(str(one.query))
        mended = after and after.correct and not one.correct
        if mended and sorted(one.responses) == sorted(after.responses):
            pair = judgement(one, "Before training") + judgement(after, "After")
            orders = question(one) + "<p>After, the responses may be in another order.</p>"
            return f'<h2>A judgement before and after</h2>{orders}<div class="two">{pair}</div>'
    return ""


def trusted(runs: Path) -> str:
    """Of an item whose votes are divided, the most and the least trusted judgement."""
    folder = runs / "05_metarm"
    if not (folder / "rewards.jsonl").exists():
        return ""
    settings = json.loads((folder / "settings.json").read_text())
    samples = step.read_lines(settings["samples"])
    samples = [one for one in samples if len(one.rewards) > 1]
    lines = (folder / "rewards.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    count = sum(one.item == samples[0].item for one in samples)
    spread, first = max(
        (max(rewards[i : i + count]) - min(r for r in rewards[i : i + count] if r > -math.inf), i)
        for i in range(0, len(samples), count)
        if max(rewards[i : i + count]) > -math.inf and samples[i].scores
    )
    places = [i for i in range(first, first + count) if rewards[i] > -math.inf]
    most, least = max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__)
    pair = [
        judgement(samples[place], title, f"; meta reward {rewards[place]:.2f}")
        for place, title in ((most, "Trusted most"), (least, "Trusted least"))
    ]
    title = f"Two judgements of one item, {spread:.2f} apart in meta reward"
    return f'<h2>{title}</h2>{question(samples[most])}<div class="two">{"".join(pair)}</div>'


def sections(runs: Path) -> list[str]:
    """The parts of the page, for the steps that were run."""
    one, two, three, four, five = (results(runs / name) for name in NAMES)
    parts = []
    if one:
        parts += ["<h2>Step 1: the judge, greedy</h2>"]
        parts += [figure_table({name: {"%": row} for name, row in one["figures"].items()})]
    if two:
        parts += ["<h2>Step 2: trajectories that were kept and rejected</h2>"]
        names = sorted({name for row in two["trajectories"].values() for name in row})
        rows = [[t, *(str(row.get(n, 0)) for n in names)] for t, row in two["trajectories"].items()]
        parts += [f'<div class="wide">{show_votes.table(["", *names], rows)}</div>']
        parts += [log_curves(runs / "02_rejective_ft/log.jsonl", ["loss"])]
    if three:
        parts += ["<h2>Step 3: what GRPO did</h2>"]
        names = ["reward", "kl", "entropy", "unreadable"]
        parts += [log_curves(runs / "03_grpo/log.jsonl", names)]
        parts += [f"<p>{sign}</p>" for sign in collapse(runs / "03_grpo/log.jsonl")]
    if four:
        parts += ["<h2>Step 4: accuracy by the number of samples</h2>"]
        for name, rows in four["figures"].items():
            parts += [f"<h3>{html.escape(name)}</h3>", figure_table(rows)]
    if five:
        parts += ["<h2>Step 5: guided votes</h2>", figure_table(five["rows"])]
        parts += [figure_table({name: {"ROC-AUC": row} for name, row in five["auc"].items()})]
    folders = [runs / name for name in ("04_voting", "05_metarm") if results(runs / name)]
    curves = {}
    for folder in folders:
        curves |= plot.curves_of(folder)
    if curves:
        parts += [image(lambda file: plot.plot(curves, file), "accuracy over samples")]
    parts += [before_and_after(runs)]
    if four:
        samples = step.read_lines(runs / SAMPLES)
        parts += [part.replace("<section>", '<section class="wide">') for part in votes(samples)]
    return [*parts, trusted(runs)]


def votes(samples: list) -> list[str]:
    """Sections of a saved vote and a spoiled one."""
    page = show_votes.page("", samples, most=1).partition("<section>")[2]
    page = page.partition("</body>")[0]
    return [f"<section>{part}" for part in page.split("<section>") if part]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the folder of the runs")
    parser.add_argument("out", type=Path, help="the page")
    args = parser.parse_args()
    found = sorted(path.parent.name for path in args.runs.glob("0*/results.json"))
    found = [name for name in found if name in NAMES]
    if not found:
        raise SystemExit(f"error: {args.runs} holds no run of a step")
    head, _, tail = show_votes.PAGE.partition("</style>")
    about = results(args.runs / found[-1])
    head = head.replace("default-src 'none';", "default-src 'none'; img-src data:;")
    head = head.replace("How the votes were decided", "A run of the five steps").format()
    told = f"<p>{', '.join(found)}; {about['date']}, transformers {about['transformers']}</p>"
    view = '<meta name="viewport" content="width=device-width">'
    head = head.replace("<meta charset", view + "<meta charset")
    body = "</head><body><h1>A run of the five steps</h1>" + told + "".join(sections(args.runs))
    args.out.write_text(f"{head}{STYLE}{body}</body></html>\n", encoding="utf-8")
    others = {path.parent.name for path in args.runs.glob("*/results.json")} - {*found}
    left = f"; left out: {', '.join(sorted(others))}" if others else ""
    print(f"wrote {args.out}: {', '.join(found)}{left}")


if __name__ == "__main__":
    step.start(main)
