"""What changes weights: fine-tune, evaluate, publish."""
