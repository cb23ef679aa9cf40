"""One module per objective: its loss, its batch, its metrics."""
