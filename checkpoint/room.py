"""How much memory is free: of a GPU, or of the system and of the container in it."""
import re
from itertools import product
from math import inf
from pathlib import Path

import torch

LIMITS = {  # of a control group, and what counts against it: in version 1, in version 2
    "memory.limit_in_bytes": "memory.usage_in_bytes",
    "memory.max": "memory.current",
}


def free_bytes(device):
    """Bytes that this process can still allocate; inf where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    kilobytes = _last(Path("/proc/meminfo"), r"MemAvailable: *(\d+)")
    return min(1024 * kilobytes, container_bytes(Path("/")))


def container_bytes(root):
    """What the limits of this process's control groups leave; inf without any."""
    room = inf
    for name in _found(root / "proc/self/cgroup", ":/(.*)"):
        for tree in ("sys/fs/cgroup/memory", "sys/fs/cgroup"):  # of version 1, of version 2
            group = root / tree / name
            # In a container, the group itself may be the root of the tree.
            for folder, (limit, used) in product((group, *group.parents), LIMITS.items()):
                left = _last(folder / limit) - _last(folder / used)
                # Files that were read, as the weights are, make room.
                room = min(room, left + _last(folder / "memory.stat", r"inactive_file (\d+)"))
    return room


def _found(file, pattern):
    try:
        return re.findall(pattern, file.read_text())
    except OSError:  # another system
        return []


def _last(file, pattern=r"\d+"):
    """The last of the numbers in a file of the system, inf without one."""
    return float([inf, *_found(file, pattern)][-1])


def size(n_bytes):
    gib = n_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.2f} MiB"


def check_room(model):
    """Raises ValueError where a model on the CPU is larger than what is free, before it is filled.

    The system gives out memory that it does not have, and kills the process that fills it.
    """
    device = model.embed.weight.device
    needed, free = sum(weight.nbytes for weight in model.state_dict().values()), free_bytes(device)
    if device.type == "cpu" and needed > free:
        raise ValueError(f"the weights need {size(needed)}, {size(free)} are free: take "
                         "--weights int4, --dtype bfloat16 or a smaller checkpoint")
