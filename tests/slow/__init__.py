"""Training on the real model, nightly: `make test-slow`."""
