"""Three prompts an item, which differ only in their last line. A judge that reads the hint gets
better with the truth and worse with a lie."""
# ruff: noqa: F821  (the script has these names)


def hint_effect(model, tokenizer, items: list[Judgement], args) -> tuple[float, float, float]:
    """The shares of items that the judge gets right (Eq. 10): with the truth as hint, without a
    hint, with the number of the other response."""
    shares = []
    for shift in (0, None, 1):
        prompts, asked = [], ballots(items, 1, f"{args.seed} hint")
        for one in asked:
            if shift is not None:
                number = (one.rewards.index(max(one.rewards)) + shift) % 2 + 1
                one.hint = f"The best response is number {number}."
            prompts.append(encode(tokenizer, one, args.shots))
        drawn = sample(model, tokenizer, prompts, 1.0, args, args.seed)
        scores = [read_scores(tokenizer.decode(ids), 2)[0] for ids in drawn]
        right = [is_correct(of_one, one.rewards) for of_one, one in zip(scores, asked)]
        shares.append(sum(right) / len(right))
    return tuple(shares)
