"""Principles that no response has touched are the same for all of them, and are written once. The
price: what a response shows of the request is not there to be noticed."""
# ruff: noqa: F821  (the script has these names)


def principles_alone(model, tokenizer, items: list[Judgement], args) -> list[str]:
    """What the judge writes as criteria of each item, at temperature 0, without a response."""
    prompts = []
    for number, item in enumerate(items):
        one = show(item, number, list(range(len(item.responses))))
        one.responses = []
        prompts.append(encode(tokenizer, one, args.shots))
    drawn = sample(model, tokenizer, prompts, 0.0, args)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    lines = [text.partition("Specific Criteria: ")[2].partition("\n")[0] for text in texts]
    return [line.strip().rstrip(".") for line in lines]
