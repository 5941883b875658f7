"""A judgement is text. Give the model its beginning, and what follows is written after those
principles."""
# ruff: noqa: F821  (the script has these names)


def judge_by(model, tokenizer, items: list[Judgement], principles: list[str], args) -> list[str]:
    """Greedy judgements of every item by the principles given for it."""
    starts, prompts = [], []
    for number, (item, text) in enumerate(zip(items, principles)):
        one = show(item, number, list(range(len(item.responses))))
        starts.append(f"Specific Criteria: {text}.\nAnalysis:")
        prompts.append(encode_turns(tokenizer, [build_prompt(one)], starts[-1]))
    drawn = sample(model, tokenizer, prompts, 0.0, args)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    return [start + text for start, text in zip(starts, texts)]
