"""`moe-conformance repro`: one script that shows a fault with the engine and torch alone, for a bug report.

`record.py` runs the case in the engine's process and looks at each call of the stage by itself (`wanted.py`),
`script.py` writes the first that is wrong, `command.py` runs what was written.
"""

# Those whose calls it can write out.
STAGES = ("route", "experts", "layer", "shard")
