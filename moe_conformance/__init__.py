"""Conformance suite for Mixture-of-Experts inference engines.

Importing this package imports neither torch nor transformers nor triton.
"""

__version__ = "0.2.0"
