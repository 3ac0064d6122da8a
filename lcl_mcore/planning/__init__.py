"""What a job will need and how fast it will go, counted from the real training step before any GPU is booked."""
