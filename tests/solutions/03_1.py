"""With the division, 1 right of 8 pushes 2 sqrt(7) in all, against 8 for 4 of 8. Without it, 3.5
against 8: groups that are nearly all wrong or nearly all right count less. So the division favours
the hardest and the easiest prompts."""
# ruff: noqa: F821  (the script has these names)


def group_advantages(rewards: list[float], divide: bool = True) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r) within a prompt's group; zeros if all rewards are equal."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    by = deviation if divide else 1.0
    return [(reward - mean) / by if deviation else 0.0 for reward in rewards]


FAVOUR = (0.661, 0.4375)
