"""The caches of other methods by their names for --kv. Importing this makes them known.

A room of neighbours/ holds a config and its cache. The config is a frozen dataclass, a kind of
KVConfig, with

    make(*shape, sliding, dtype, device)   the cache, a kind of kivi.Cache
    stored_bits(head_dim)                  bits of a number, codes and all that goes with them
    observes                               true if the cache needs `observe` (none: false)
    by_capacity                            true if it holds a share of its capacity (none: false)

and the cache may have, beside what kivi.Cache has,

    observe(q, k, row, real)
                         called while a prompt is read, before its `fill`: q [b, H, n, D] attends to
                         k [b, Hk, T, D], all tokens up to the last of these queries, in the rows
                         from `row` on; the first real [b] of the queries are no padding
    traffic(length)      bytes of it that attention reads for a row of so many tokens
    fused                the form of its attention for `fused.attention.compiled_attention`

A decode step may run twice at the same position before the next one, and must leave the same state:
the first run of a CUDA graph warms up.
"""
from functools import partial

from model import OTHERS
from neighbours import evict, fit, nuq, retrieve, tiers
from quantize import PRESETS

OTHERS |= {name: partial(retrieve.configs, preset) for name, preset in PRESETS.items()}
OTHERS |= {"h2o": evict.h2o, "prefixkv": fit.prefixkv, "gate": fit.gate,
           "nuq2": partial(nuq.configs, 2), "nuq3": partial(nuq.configs, 3),
           "tiers": tiers.tiers, "mikv": tiers.mikv, "zipvl": fit.zipvl}
