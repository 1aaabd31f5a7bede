"""Traps of megatron-core that this project steps round, each in one place and behind a test that fails without it.

What is stepped round by not calling megatron-core at all is listed here too, so that nobody calls it again:

- `DistributedOptimizer.load_state_dict` gives all parameters one shared `step` tensor (Adam then counts N steps an update),
  its `state_dict` asserts on a rank that trains nothing or has not stepped yet, `fully_reshardable` raises KeyError 'step'
  with torch's Adam, and its world tensors drop the padding between buckets but are cut by indices that count it.
  `megavlm.checkpoint.optimizer_state` reads and writes the optimizers' tensors itself.
- The checkpoint writer forks a process per file and waits for it without a timeout, so that a killed writer hangs the job;
  `write_in_process` takes its place.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any


def install() -> None:
    """Apply every fix in this process. Idempotent."""
    use_plain_results_queue()


def use_plain_results_queue() -> None:
    """Give the checkpoint writer an empty queue of this process instead of one in a spawned manager process.

    The manager re-imports `__main__` (an unguarded script starts again, and hangs), takes seconds to start and outlives a
    rank that is killed. Writing happens in this process, so an ordinary queue will do. It must be a new one for each save:
    a save that failed on another rank leaves its results behind, and the next one would take them for its own.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def write_in_process(transforms: list[Any], use_msc: bool, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """In the place of FileSystemWriterAsync.write_preloaded_data_multiproc: a thread per file instead of a forked process.

    Raises what a file could not be written for (OSError when the disk is full).
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(index: int) -> Any:
        answer: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, buckets[index], answer, running, True, use_msc=use_msc)
        return answer.get_nowait()[1]

    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as threads:
        written = list(threads.map(write, range(len(buckets))))
    failed = next((w for w in written if isinstance(w, Exception)), None)
    if failed is not None:
        raise failed
    results.put(dict(enumerate(written)))


def in_process_save_strategy() -> Any:
    """megatron-core's sharded save (format torch_dist), writing with `write_in_process`.

    A rank that cannot write makes every rank raise OSError: megatron-core raises on rank 0 only, while the others go on to
    the next barrier and wait there.
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class InProcessSave(TorchDistSaveShardedStrategy):
        """Same files, no child processes, one outcome for all ranks."""

        def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
            install()
            request = super().async_save(sharded_state_dict, checkpoint_dir)
            # Also on ranks with nothing to write: they must hear of the others' failures.
            return request._replace(async_fn=partial(_write_and_agree, request.async_fn))

    return InProcessSave("torch_dist", 1)


def _write_and_agree(original: Any, *arguments: Any) -> None:
    import torch.distributed as dist

    error = None
    if original is not None:
        assert isinstance(original, partial), "megatron-core's writer changed: see FileSystemWriterAsync.get_save_function_and_args"
        rank, buckets, results = arguments
        try:
            transforms, use_msc = original.args
            write_in_process(transforms, use_msc, buckets, results)
        except Exception as raised:
            error = f"rank {rank} could not write: {raised}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise OSError(first)
