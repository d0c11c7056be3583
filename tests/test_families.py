"""Every family that the view reads, on small random models of it."""
