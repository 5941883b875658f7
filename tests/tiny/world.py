"""The world that the embedded judge judges: packing lists with checkable criteria.

A request names a place and 3 to 5 criteria. Each must, should or could hold (importance 3, 2, 1):

    Make a packing list for the lake. It must mention rope. It should have at least 4 items.

A response is a list ("Pack rope, tent, lamp."). Whether it meets a criterion is computed, never
sampled, so the truth of every verdict that a judge writes is known. The reward of a response is the
importance-weighted sum of the criteria that it meets, and the best one is ahead by 1 or 2. A single
response (n = 1) has reward 1 if it meets every criterion, else 0.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

PLACES = "lake forest beach desert mountain city island village river castle farm harbor".split()
ITEMS = (
    "rope map lamp tent knife book coat drum soap cup pan hat boots kite ball salt bread apple "
    "fish cake milk honey rice paper pen ring coin key mirror brush chair box bag bell candle "
    "blanket bottle camera compass radio saw nail hammer wire string glue paint flag whistle "
    "violin basket ladder shovel towel spoon plate glove scarf belt"
).split()
OPENINGS = "Take Pack Bring".split()
MODALS = {"must": 3, "should": 2, "could": 1}
KINDS = ("mention", "avoid", "begin with", "end with", "have at least")
CLOSE = 2  # the best response leads by no more: who looks at half of the criteria is often wrong


@dataclass(frozen=True)
class Criterion:
    """One demand on a list: its kind, its argument (an item, or a number of items as text) and its
    importance 3, 2 or 1."""

    kind: str
    argument: str
    importance: int

    @property
    def text(self) -> str:
        return f"{self.kind} {self.argument}" + (" items" if self.kind == "have at least" else "")

    def holds(self, items: list[str]) -> bool:
        """Whether a list of items meets the criterion: the one definition of truth in this
        world."""
        return {
            "mention": self.argument in items,
            "avoid": self.argument not in items,
            "begin with": bool(items) and items[0] == self.argument,
            "end with": bool(items) and items[-1] == self.argument,
            "have at least": self.argument.isdigit() and len(items) >= int(self.argument),
        }[self.kind]


def items_of(response: str) -> list[str]:
    """The items of a list such as "Pack rope, tent, lamp."."""
    words = response.strip().rstrip(".").split(" ", 1)
    return [item.strip() for item in words[1].split(",")] if len(words) == 2 else []


SENTENCE = re.compile(
    r"It (must|should|could) (mention|avoid|begin with|end with|have at least) (\w+)(?: items)?\."
)


def criteria_of(query: str) -> list[Criterion]:
    """The criteria that a request states, in its order."""
    return [
        Criterion(kind, argument, MODALS[modal])
        for modal, kind, argument in SENTENCE.findall(query)
    ]


def met_weight(criteria: list[Criterion], items: list[str]) -> int:
    """Importance-weighted sum of the criteria that a list meets."""
    return sum(c.importance for c in criteria if c.holds(items))


def draw_criteria(rng: random.Random) -> list[Criterion]:
    """3 to 5 criteria on different items; begin, end and count at most once each."""
    kinds = rng.sample(
        ["mention", "mention", "avoid", "avoid", "begin with", "end with", "have at least"],
        rng.choice((3, 4, 4, 5)),
    )
    words = rng.sample(ITEMS, len(kinds))
    return [
        Criterion(
            kind, str(rng.randint(3, 6)) if kind == "have at least" else word, rng.choice((1, 2, 3))
        )
        for kind, word in zip(kinds, words)
    ]


def draw_items(rng: random.Random, criteria: list[Criterion], met: list[bool]) -> list[str] | None:
    """A list that meets exactly the criteria marked in `met`, or None if this draw found none."""
    low, high, inside, first, last = 2, 6, [], None, None
    named = {c.argument for c in criteria}
    for criterion, wanted in zip(criteria, met):
        if criterion.kind == "have at least":
            low, high = (int(criterion.argument), 6) if wanted else (2, int(criterion.argument) - 1)
        elif criterion.kind in ("begin with", "end with"):
            if (
                not wanted
            ):  # a near miss half of the time: the item is in the list, in the wrong place
                inside += [criterion.argument] * rng.randint(0, 1)
            elif criterion.kind == "begin with":
                first = criterion.argument
            else:
                last = criterion.argument
        elif wanted == (criterion.kind == "mention"):
            inside.append(criterion.argument)
    length = rng.randint(low, high)
    fillers = length - len(inside) - (first is not None) - (last is not None)
    if fillers < 0:
        return None
    middle = inside + rng.sample([item for item in ITEMS if item not in named], fillers)
    rng.shuffle(middle)
    items = [first] * (first is not None) + middle + [last] * (last is not None)
    return items if [c.holds(items) for c in criteria] == met else None


def draw_item(rng: random.Random, n: int) -> dict:
    """One item of the data set: {"query", "responses", "rewards", "subset"} with n responses and
    one highest reward."""
    while True:
        criteria = draw_criteria(rng)
        lists = []
        for _ in range(200):
            if n == 1:  # half of the single responses are right altogether
                met = (
                    [True] * len(criteria)
                    if rng.random() < 0.5
                    else [rng.random() < 0.5 for _ in criteria]
                )
            else:
                met = [rng.random() < 0.5 for _ in criteria]
            items = draw_items(rng, criteria, met)
            if items is not None and items not in lists:
                lists.append(items)
            if len(lists) == n:
                break
        rewards = [met_weight(criteria, items) for items in lists]
        if n == 1 and lists:
            rewards = [int(rewards[0] == sum(c.importance for c in criteria))]
        if len(lists) == n and (n == 1 or 0 < sorted(rewards)[-1] - sorted(rewards)[-2] <= CLOSE):
            break
    modal = {weight: word for word, weight in MODALS.items()}
    query = f"Make a packing list for the {rng.choice(PLACES)}. " + " ".join(
        f"It {modal[c.importance]} {c.text}." for c in criteria
    )
    return {
        "query": query,
        "responses": [f"{rng.choice(OPENINGS)} {', '.join(items)}." for items in lists],
        "rewards": rewards,
        "subset": f"n={n}",
    }


def judgement_text(named: list[tuple[Criterion, int]], lists: list[list[str]], binary: bool) -> str:
    """A judgement with true verdicts on the named criteria, each (criterion, weight as judged), and
    the scores that follow from them."""
    modal = {weight: word for word, weight in MODALS.items()}
    criteria = "; ".join(f"{modal[weight]} {c.text} (weight {weight})" for c, weight in named)
    weights, analysis, scores = [weight for _, weight in named], [], []
    for number, items in enumerate(lists, 1):
        verdicts = [c.holds(items) for c, _ in named]
        said = "; ".join(
            f"{c.text} {'yes' if holds else 'no'}" for (c, _), holds in zip(named, verdicts)
        )
        met = sum(weight for holds, weight in zip(verdicts, weights) if holds)
        analysis.append(
            f"Response {number} lists {', '.join(items)}: {said}; {met} of {sum(weights)}."
        )
        scores.append(score_of(verdicts, weights, binary))
    box = f"\\boxed{{{', '.join(map(str, scores))}}}"
    return f"Specific Criteria: {criteria}.\nAnalysis: {' '.join(analysis)}\nScores: {box}"


def score_of(verdicts: list[bool], weights: list[int], binary: bool) -> int:
    """The score that follows from verdicts: 1 to 10 by the weight met, or 1 / 0 for all met / not
    all met (binary)."""
    if binary:
        return int(all(verdicts))
    return 1 + round(9 * sum(w for v, w in zip(verdicts, weights) if v) / sum(weights))


def review_text(named: list[tuple[Criterion, int]], criteria: list[Criterion], follow: bool) -> str:
    """What a reader notes about a judgement that names `named` where the request asks for
    `criteria`: how far its weights are from the request's in all (not named and not asked for count
    as weight 0), what it names, and whether its scores follow. Not whether they are right."""
    asked, given = {c.text: c.importance for c in criteria}, {c.text: weight for c, weight in named}
    off = sum(abs(asked.get(text, 0) - given.get(text, 0)) for text in asked | given)
    both = [text for text in given if text in asked]
    wrong = sum(asked[text] != given[text] for text in both)
    text = f"{off} of {sum(asked.values())} off; {len(both)} of {len(asked)} named"
    text += f"; wrong weights {wrong}; not asked {len(given) - len(both)}"
    return f"{text}; scores {'follow' if follow else 'stray'}."
