"""`python -m moe_conformance`, for an interpreter whose scripts are not on the path."""

from __future__ import annotations

from moe_conformance.cli import main

if __name__ == "__main__":
    main()
