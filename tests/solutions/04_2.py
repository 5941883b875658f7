"""A random order, turned by one place from sample to sample: after n samples everybody has stood everywhere."""
# ruff: noqa: F821  (the script has these names)


def show_balanced(item: Preference, number: int, seed: str, i: int) -> Trajectory:
    """Sample i of item `number`: as `show`, but in samples 0 to n - 1, n to 2n - 1, ... every response stands once at every place."""
    block, turn = divmod(i, len(item.responses))
    order = list(range(len(item.responses)))
    random.Random(f"{seed} {number} {block}").shuffle(order)
    order = order[turn:] + order[:turn]
    return Trajectory(number, item.query, [item.responses[j] for j in order], [item.rewards[j] for j in order], order, False, False, item.reference)
