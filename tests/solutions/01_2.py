"""One prompt form serves any number of responses, so a single one is a prompt as well; what the judge does not see cannot sway it."""
# ruff: noqa: F821  (the script has these names)


def judge_alone(model, tokenizer, items: list[Preference]) -> list[list[int] | None]:
    """Scores of every item's responses, each judged greedily in a prompt of its own; None for an item of which one cannot be read."""
    prompts = [encode(tokenizer, build_prompt(item.query, [response], item.reference)) for item in items for response in item.responses]
    drawn = iter(sample(model, tokenizer, prompts, 1, 0.0))
    scores = [[read_judgement(next(drawn)[0].text, 1).scores for _ in item.responses] for item in items]
    return [None if None in of_item else [score for [score] in of_item] for of_item in scores]
