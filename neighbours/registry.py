"""The caches of other methods by their names for --kv. Importing this makes them known.

A room of neighbours/ holds a config and its cache. The config is a frozen dataclass, a kind of
KVConfig, with

    make(*shape, sliding, dtype, device)   the cache, a kind of kivi.Cache
    stored_bits(head_dim)                  bits of a number, codes and all that goes with them

and the cache may have, beside what kivi.Cache has,

    observe(q, k, row)   called while a prompt is read, a row at a time, before its `fill`: q [b, H,
                         n, D] attends to k [b, Hk, T, D], all tokens up to the last of these
                         queries, in the rows from `row` on
    traffic(length)      bytes of it that attention reads for a row of so many tokens
    fused                the form of its attention for `fused.attention.compiled_attention`

A decode step may run twice at the same position before the next one, and must leave the same state:
the first run of a CUDA graph warms up.
"""
from model import OTHERS
from neighbours.tiers import mikv, tiers, zipvl

OTHERS |= {"tiers": tiers, "mikv": mikv, "zipvl": zipvl}
