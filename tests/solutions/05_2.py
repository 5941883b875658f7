"""The sigmoid of the meta reward is the chance that the scores are correct: a weight without a
threshold. Infinities and nan are put aside first, because 0 times one of them is nan."""
# ruff: noqa: F821  (the script has these names)


def vote_weighted(scores: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Votes (items, subsets, responses): sums of scores (items, subsets, k, responses), each times
    the sigmoid of its meta reward (items, subsets, k)."""
    votes = torch.where(scores.isfinite(), scores * rewards.sigmoid()[..., None], 0.0).sum(-2)
    return votes.masked_fill((scores == -math.inf).any(-2), -math.inf)
