"""The model library: references, manifests, versions, aliases, imports."""
