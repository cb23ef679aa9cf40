"""What fine-tuning gives on real data: experiments as a user would run them."""
