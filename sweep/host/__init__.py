"""What touches a real kernel: cases, the ways to run them, and the comparison with the model."""
