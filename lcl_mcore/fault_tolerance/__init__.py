"""Dead, hung and slow ranks, bad steps, stop signals, and the account of time."""
