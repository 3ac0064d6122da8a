"""What this machine offers: the doctor, checks before a job, the environment of a measurement."""
