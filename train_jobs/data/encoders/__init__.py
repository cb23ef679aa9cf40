"""From records to examples, one module for each family of objectives. No torch."""
