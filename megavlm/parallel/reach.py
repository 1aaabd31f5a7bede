"""What ranks can say to each other: a process group, an all-reduce that must come out right, its latency and its bandwidth.

As a module it is one rank: `python -m megavlm.parallel.reach BACKEND TIMEOUT_S` with torchrun's variables prints what `talk` found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_BYTES = {"gloo": 8 << 20, "nccl": 256 << 20}
_TURNS = 20


def talk(backend: str, timeout_s: float) -> dict[str, Any]:
    """All-reduce among the ranks of the environment. Raises RuntimeError for a sum that is wrong, and whatever torch raises."""
    device = torch.device("cpu")
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise RuntimeError("NCCL needs a GPU, and torch finds none")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    begin = time.perf_counter()
    options = {"device_id": device} if backend == "nccl" else {}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **options)  # type: ignore[arg-type]
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        number = torch.full((1,), float(rank + 1), device=device)
        dist.all_reduce(number)
        start_s = time.perf_counter() - begin
        if int(number.item()) != size * (size + 1) // 2:
            raise RuntimeError(f"an all-reduce of {size} ranks came out as {number.item()}, and should be {size * (size + 1) // 2}")
        small_s = _seconds(torch.zeros(1, device=device), _TURNS)
        large = torch.zeros(_BYTES[backend] // 4, device=device)
        _seconds(large, 1)
        large_s = _seconds(large, 3)
        # What a ring moves over each link, as NCCL's own tests count it.
        moved = 2 * (size - 1) / size * _BYTES[backend]
        return {"ranks": size, "start_s": start_s, "latency_s": small_s, "bytes_per_s": moved / large_s}
    finally:
        dist.destroy_process_group()


def _seconds(values: Any, turns: int) -> float:
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(turns):
        dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / turns


def main() -> None:
    sys.stdout.write(json.dumps(talk(sys.argv[1], float(sys.argv[2]))) + "\n")


if __name__ == "__main__":
    main()
