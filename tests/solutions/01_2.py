"""One prompt serves any number of responses, so also one. What the judge does not see cannot sway
it: now the order of the responses changes nothing."""
# ruff: noqa: F821  (the script has these names)


def judge_alone(model, tokenizer, items: list[Judgement], args) -> list[list[int] | None]:
    """Scores of every item's responses, each judged greedily in a prompt of its own. None for an
    item of which one cannot be read."""
    prompts = []
    for item in items:
        for response in item.responses:
            one = Judgement(item.query, [response], [1], reference=item.reference)
            prompts.append(encode(tokenizer, one, args.shots))
    drawn = iter(sample(model, tokenizer, prompts, 0.0, args))
    result = []
    for item in items:
        scores = [read_scores(tokenizer.decode(next(drawn)), 1)[0] for _ in item.responses]
        result.append(None if None in scores else [score for [score] in scores])
    return result
