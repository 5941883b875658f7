"""Cross-entropy spends itself on which items are easy, and guided voting compares judgements of one item alone. Pairs within an item drop what its
judgements share (Bradley and Terry 1952, as reward models are trained)."""
# ruff: noqa: F821  (the script has these names)


def ranking_loss(rewards: torch.Tensor, labels: list[int], items: list[int]) -> torch.Tensor:
    """Mean of -log sigmoid(right - wrong) over the pairs of a right and a wrong judgement of the same item; 0 if there is none."""
    right, item = torch.tensor(labels, dtype=torch.bool), torch.tensor(items)
    pairs = right[:, None] & ~right & (item[:, None] == item)
    losses = torch.nn.functional.softplus(rewards - rewards[:, None])[pairs]  # -log sigmoid(m_row - m_column)
    return losses.sum() / max(1, len(losses))
