"""Of 4 samples, 0 to 4 are right with chances 1, 4, 6, 4, 1 of 16. If one is kept, it is right
unless none is. Two: right if 2 or more are, a coin toss if 1 is. Four: right if 3 or more are, a
coin toss if 2 are. A perfect meta RM wants k_meta = 1; a larger one insures against its errors."""
PERFECT = (15 / 16, 13 / 16, 1 / 2)
