"""Names of layouts that a recipe may ask for; `judging/layouts.py` makes them. No torch here."""

LAYOUTS = ("columns", "sliced", "transposed", "offset", "expanded")
