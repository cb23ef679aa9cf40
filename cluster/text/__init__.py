"""Text that trainer and gateway must agree on to the token."""
