"""The largest numbers that are accepted from a config.

Each is far above any published model. Together they bound what is built from a config: no list of layers takes long to
write, and no shape, which may be the product of experts and two widths, overflows int64.
"""

from __future__ import annotations

MOST_LAYERS = 2048  # published: 126, of Llama 3.1 405B
MOST_STEP = 2**30  # of a step or a start; beyond the last layer it means: no layer
MOST_EXPERTS = 2**18  # published: 16,384, of Doge
MOST_SHARED = 2**10  # published: 8
MOST_WIDTH = 2**20  # published: 73,728, of Nemotron-4 340B
MOST_ROWS = 2**30  # of a table by token id; published vocabularies: 262,144
MOST = 1e9  # in magnitude, of scales, limits and caps; published: below 100
LEAST_EPSILON = 2.0**-149  # the smallest positive float32; an epsilon of 0 would mean that there is no norm
DEEPEST = 4  # levels below the top; published: 2, thinker_config.text_config
