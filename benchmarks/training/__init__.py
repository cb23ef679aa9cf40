"""What the training benchmark feeds its sides, and the sides."""
