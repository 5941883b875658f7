"""Of 4 samples, c = 0 to 4 are right with chances 1, 4, 6, 4, 1 of 16. One is kept: right unless c = 0. Two: right if c >= 2, a coin toss if c = 1.
Four: right if c >= 3, a coin toss if c = 2. A perfect meta RM wants k_meta = 1; a larger one insures against its errors."""
PERFECT = (15 / 16, 13 / 16, 1 / 2)
