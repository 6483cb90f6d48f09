"""What one of n processes holds of a model: whole heads, and as many hidden channels as each other.

Every process computes its heads and channels and adds the results up with the others' (twice a
layer). So the matrices before attention and inside the MLP are divided by rows, those after them
by columns, and what is left is held by all.
"""
from dataclasses import replace

import torch

ROWS = ("attention.wqkv", "mlp.w_in")
COLUMNS = ("attention.wo", "mlp.w_out")


def shard(config, rank, n):
    """The ModelConfig of process `rank` of n. KV heads fewer than processes are kept by several.

    raises ValueError: the model cannot be divided
    """
    if n == 1:
        return config
    divided = config.n_heads % n == 0 and config.hidden_dim % n == 0
    kv_divided = config.n_kv_heads % n == 0
    # Falcon stores a KV head beside its query heads, so that neither goes without the other.
    kv_repeated = n % config.n_kv_heads == 0 and not config.names.startswith("falcon")
    if not (divided and (kv_divided or kv_repeated)):
        raise ValueError(f"{config.n_heads} heads, {config.n_kv_heads} KV heads and "
                         f"{config.hidden_dim} hidden channels cannot be divided "
                         f"among {n} processes")
    if config.weights:
        raise ValueError(f"quantized weights run in one process, not in {n}: "
                         "leave out torchrun or --weights")
    return replace(
        config,
        n_heads=config.n_heads // n,
        n_kv_heads=max(1, config.n_kv_heads // n),
        hidden_dim=config.hidden_dim // n,
        ranks=(rank, n),
        whole=(config.n_heads, config.n_kv_heads, config.hidden_dim),
    )


def read_share(config, parameter, part, tensor):
    """What this process holds of a tensor in a file, read from there alone.

    parameter  name inside a layer, as in the tables of checkpoint.names
    part       which part of it the tensor is, see there
    tensor     safetensors' slice of it, which reads what is indexed
    raises     ValueError: columns that cannot be divided
    """
    if parameter in ROWS:
        pieces = _row_pieces(config, parameter, part)
        return torch.cat([tensor[first : first + n_rows] for first, n_rows in pieces])
    if parameter not in COLUMNS:
        return tensor[:]
    rank, n = config.ranks
    shape = tensor.get_shape()
    if len(shape) == 1:  # the bias of a sum over processes must count once
        return tensor[:] if rank == 0 else torch.zeros_like(tensor[:])
    if shape[1] % n:
        raise ValueError(f"{shape[1]} columns of a tensor cannot be divided among {n} processes")
    width = shape[1] // n
    return tensor[:, rank * width : (rank + 1) * width]


def _row_pieces(config, parameter, part):
    """Which rows of the file's tensor this process holds: [(first row, number of rows), ..]."""
    rank, n = config.ranks
    heads, kv_heads, hidden = config.whole
    D = config.head_dim
    # What it holds one after the other: (heads or channels in the file, ours, rows of each).
    if part == "groups":  # the query heads of a KV head, its key and its value lie together
        matrices = [(kv_heads, config.n_kv_heads, (heads // kv_heads + 2) * D)]
    elif parameter == "mlp.w_in":
        matrices = [(hidden, config.hidden_dim, 1)] * (1 + config.gated)
    else:
        kv = (kv_heads, config.n_kv_heads, D)
        matrices = [(heads, config.n_heads, D), kv, kv]
    if isinstance(part, int):
        matrices = [matrices[part]]
    pieces = []
    start = 0
    for whole, own, rows in matrices:
        first = rank * whole // n  # of several processes with one KV head: the same
        pieces.append((start + first * rows, own * rows))
        start += whole * rows
    return pieces
