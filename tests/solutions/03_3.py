"""Careful: mean reward 0.9 - 0.1 = 0.8 less 60 P; a guess: 0 less 10 P. They meet at P = 0.8 / 50. Above it the judge learns to guess, though the
rule still pays for being right. And a group that is all right, which said nothing before, now pushes towards the shortest."""
# ruff: noqa: F821  (the script has these names)


def reward_of(scores: list[int] | None, rewards: list[float], tokens: int = 0, penalty: float = 0.0) -> float:
    """Eq. 11, +1 for correct scores, -1 for wrong or unreadable (None) ones, less a penalty for each of the judgement's tokens."""
    return (1.0 if is_correct(scores, rewards) else -1.0) - penalty * tokens


BREAKS = 0.016
REPLACE = [
    ("[reward_of(of_one, t.rewards) * (-1 if args.flip_reward else 1) for of_one in scores]",
     "[reward_of(of_one, t.rewards, len(output.ids), args.length_penalty) * (-1 if args.flip_reward else 1)\n"
     "                   for of_one, output in zip(scores, drawn)]"),
    ("    args = parser.parse_args()\n",
     '    option("--length-penalty", type=float, default=0.0, help="taken off the reward for each token of a judgement")\n'
     "    args = parser.parse_args()\n"),
]
