"""What `moe-conformance new-engine` writes: an adapter that is judged as it is, and what belongs around it."""
