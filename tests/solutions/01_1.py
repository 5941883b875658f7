"""All responses tie. The argmax of a tie is a coin toss: right with chance 1 / n, so
(6 / 2 + 3 / 3 + 1 / 4) / 10. No best response is above all others, and everything is a tie."""
LAZY = (0.425, 0.0, 1.0)
