"""Scores lie between 1 and 10, so a sample moves the distance of two responses by at most 9. Only a lead larger than 9 for each sample that is left
is safe: k unanimous samples of 10 against 1 are still decided only after more than half of them."""
# ruff: noqa: F821  (the script has these names)


def vote_early(scores: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Scores (k, responses) of n >= 2 responses to (sums (responses,), samples used): stops when the others cannot even lead to a tie."""
    for used in range(1, len(scores) + 1):
        votes = vote_sum(scores[:used])
        first, second = votes.topk(2).values
        if first - second > 9 * (len(scores) - used):
            break
    return votes, used
