"""Scores are between 1 and 10, so a sample moves the distance of two responses by at most 9. Only a
lead of more than 9 for each remaining sample is safe: even k samples that all say 10 against 1
decide only after more than half of them."""
# ruff: noqa: F821  (the script has these names)


def vote_early(scores: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums (responses,) of scores (k, responses), and the number of samples that they needed."""
    for used in range(1, len(scores) + 1):
        votes = vote_sum(scores[:used])
        first, second = votes.topk(2).values
        if first - second > 9 * (len(scores) - used):
            break
    return votes, used
