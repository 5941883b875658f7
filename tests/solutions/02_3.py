"""Three prompts an item that differ in their last line alone. A judge that reads the hint is lifted by the truth and misled by the lie."""
# ruff: noqa: F821  (the script has these names)


def hint_effect(model, tokenizer, items: list[Preference], args) -> tuple[float, float, float]:
    """The shares of pairs that the judge gets right (Eq. 10) with the truth as hint, without any, and with the other response's number."""
    shown, shares = [show(item, number, f"{args.seed} hint") for number, item in enumerate(items)], []
    for shift in (0, None, 1):
        hints = [None if shift is None else f"The best response is number {(t.rewards.index(max(t.rewards)) + shift) % 2 + 1}." for t in shown]
        prompts = [encode(tokenizer, build_prompt(t.query, t.responses, t.reference, hint)) for t, hint in zip(shown, hints)]
        drawn = sample(model, tokenizer, prompts, 1, args.temperature, args.max_new_tokens, args.batch_size, args.seed)
        shares.append(sum(is_correct(read_judgement(output.text, 2).scores, t.rewards) for t, [output] in zip(shown, drawn)) / len(items))
    return tuple(shares)
