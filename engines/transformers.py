"""The reference implementation as an engine."""
