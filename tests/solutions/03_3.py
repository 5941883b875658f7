"""With care, the mean reward is 0.9 - 0.1 = 0.8 less 60 P; by a guess it is 0 less 10 P. They are
equal at P = 0.8 / 50. Above it the judge learns to guess, although the rule still pays for being
right. And a group that is all right, which said nothing before, now pushes towards the shortest."""
# ruff: noqa: F821  (the script has these names)
LENGTH_PENALTY = 0.0
BREAKS = 0.016


def reward_of(scores: list[int] | None, rewards: list[float], tokens: int = 0) -> float:
    """Eq. 11: +1 for correct scores, -1 for wrong or unreadable (None) ones, less the penalty."""
    return (1.0 if is_correct(scores, rewards) else -1.0) - LENGTH_PENALTY * tokens


REPLACE = [("reward_of(of_one.scores, one.rewards)",
            "reward_of(of_one.scores, one.rewards, of_one.tokens)")]
