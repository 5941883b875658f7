"""The sigmoid of the meta reward is the chance that the scores are correct: a weight without a
threshold. Infinities and nan are put aside first, because 0 times one of them is nan."""
# ruff: noqa: F821  (the script has these names)


def vote_weighted(scores: torch.Tensor, rewards: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Votes (items, subsets, responses): sums of scores (items, total, responses), each times the
    sigmoid of its meta reward (items, total), over the subsets of index (items, subsets, k)."""
    chosen, weights = take(scores, index), take(rewards.sigmoid()[..., None], index)
    votes = torch.where(chosen.isfinite(), chosen * weights, 0.0).sum(-2)
    return votes.masked_fill((chosen == -math.inf).any(-2), -math.inf)
