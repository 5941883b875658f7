"""A judgement is text: give the model its beginning, and what follows is written after those principles."""
# ruff: noqa: F821  (the script has these names)


def judge_by(model, tokenizer, items: list[Preference], principles: list[str]) -> list[Judgement]:
    """Greedy judgements of every item by principles given to it, a text an item, instead of the judge's own."""
    starts = [f"Specific Criteria: {text}.\nAnalysis:" for text in principles]
    prompts = [encode(tokenizer, build_prompt(item.query, item.responses, item.reference)) + tokenizer(start, add_special_tokens=False)["input_ids"]
               for item, start in zip(items, starts)]
    return [read_judgement(start + output.text, len(item.responses))
            for item, start, [output] in zip(items, starts, sample(model, tokenizer, prompts, 1, 0.0))]
