"""Cross-entropy spends itself on which items are easy, but guided voting compares judgements of one
item. Pairs within an item drop what its judgements share (Bradley and Terry 1952; reward models are
trained like this)."""
# ruff: noqa: F821  (the script has these names)


def ranking_loss(rewards: torch.Tensor, labels: list[int], items: list[int]) -> torch.Tensor:
    """Mean of -log sigmoid(right - wrong) over pairs of a right and a wrong judgement of an
    item."""
    right, item = torch.tensor(labels, dtype=torch.bool), torch.tensor(items)
    pairs = right[:, None] & ~right & (item[:, None] == item)
    losses = torch.nn.functional.softplus(rewards - rewards[:, None])[pairs]
    return losses.sum() / max(1, len(losses))
