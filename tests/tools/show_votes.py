"""Shows how votes were decided: a page of HTML with a few items and all of their samples.

    python tests/tools/show_votes.py runs/04_voting/samples_1.jsonl votes.html

It takes the first items of three kinds: the vote of all samples saved a wrong first sample, did not
save it, or spoiled a right one. The page needs nothing else, and all text in it is escaped.
"""

import argparse
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import load_script  # noqa: E402

step = load_script("04_voting")

KINDS = {  # by whether the first sample and the vote are right
    (0, 1): "The vote saved a wrong first sample",
    (0, 0): "The vote did not save a wrong first sample",
    (1, 0): "The vote spoiled a right first sample",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>How the votes were decided</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ border: 1px solid #bbb; padding: .2em .7em; text-align: left; vertical-align: top }}
p, td {{ white-space: pre-wrap }} section {{ border-top: 3px solid #222; margin-top: 3em }}
</style></head><body><h1>How the votes were decided</h1>
<p>{name}: {count} samples of each item. The highest numbers are bold.</p>
{sections}</body></html>
"""


def bold(values: list[float]) -> list[str]:
    """The numbers as HTML, the highest of them bold."""
    texts = [f"{value:g}" for value in values]
    best = [value == max(values) for value in values]
    return [f"<b>{text}</b>" if top else text for text, top in zip(texts, best)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>\n"


def section(title: str, samples: list) -> str:
    """One item: its query, its responses y1, y2, ..., each sample's scores and the sums so far."""
    first, scores = samples[0], step.score_tensor(samples, len(samples))[0]
    places = [first.order.index(i) for i in range(len(first.order))]
    names = [f"y{i + 1}" for i in range(len(places))]
    turns = first.query
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    texts = [f"<b>{html.escape(t['role'])}:</b> {html.escape(t['content'])}" for t in turns]
    rows = [names, [html.escape(first.responses[i]) for i in places]]
    rows.append(bold([first.rewards[i] for i in places]))
    rows += [bold(vote(scores).tolist()) for vote in (step.vote_sum, step.vote_majority)]
    head, rows_of_samples = ["response", "", "true reward", "sum", "choices"], []
    for number, one in enumerate(samples):
        read = bold(scores[number].tolist()) if one.scores else [html.escape(one.reason), ""]
        sums = bold(step.vote_sum(scores[: number + 1]).tolist())
        order = ", ".join(f"Response {i} is {names[j]}" for i, j in enumerate(one.order, 1))
        text = f"<details><summary>{order}</summary>{html.escape(one.output)}</details>"
        read += [""] * (len(names) - len(read))
        rows_of_samples.append([str(number + 1), *read[: len(names)], *sums, text])
    columns = ["sample", *names, *(f"sum {name}" for name in names), "what it wrote"]
    told = "".join(f"<p>{text}</p>\n" for text in texts) + table(head, [*zip(*rows)])
    return f"<section><h2>{title}</h2>\n{told}{table(columns, rows_of_samples)}</section>\n"


def page(name: str, samples: list, most: int = 2) -> str:
    """The page of a file's samples, with at most so many items of each kind."""
    count = sum(one.item == samples[0].item for one in samples)
    sections = {kind: [] for kind in KINDS}
    for first in range(0, len(samples), count):
        of_item = samples[first : first + count]
        best = of_item[0].order[of_item[0].rewards.index(max(of_item[0].rewards))]
        scores, chances = step.score_tensor(of_item, count)[0], []
        for votes in (step.vote_sum(scores[:1]), step.vote_sum(scores)):
            top = votes == votes.max()
            chances.append((top[best] / top.sum()).item())  # a tie is a coin toss
        found = sections.get(tuple(chances))
        if found is not None and len(found) < most and len(of_item[0].order) > 1:
            found.append(section(KINDS[tuple(chances)], of_item))
    sections = "".join(sum(sections.values(), [])) or "<p>There is no such item.</p>"
    return PAGE.format(name=html.escape(name), count=count, sections=sections)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("samples", help="a file of step 4")
    parser.add_argument("out", type=Path, help="the page")
    args = parser.parse_args()
    samples = step.read_lines(args.samples)
    args.out.write_text(page(args.samples, samples), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    step.start(main)
