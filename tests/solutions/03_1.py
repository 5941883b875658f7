"""With the division, 1 right of 8 pushes 2 sqrt(7) in all, against 8 for 4 of 8. Without it, 3.5 against 8: groups that are nearly all wrong (or
nearly all right) count less. Dividing favours the hardest and the easiest prompts."""
REPLACE = [
    ("def group_advantages(rewards: list[float]) -> list[float]:", "def group_advantages(rewards: list[float], divide: bool = True) -> list[float]:"),
    ("    return [(reward - mean) / deviation if deviation else 0.0 for reward in rewards]",
     "    return [(reward - mean) / (deviation if divide else 1.0) if deviation else 0.0 for reward in rewards]"),
]
FAVOUR = (0.661, 0.4375)
