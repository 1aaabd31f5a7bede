"""Use of a node's processors, memory, disk, network and GPUs over time, under the names of MLflow's page "System metrics"."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Self

from megavlm.tracking.spool import Item

PREFIX = "system/"


class SystemMetrics:
    """Samples every so often; the numbers are those of MLflow's own monitors.

    Args:
        monitors: each with collect_metrics, aggregate_metrics and clear_metrics, as mlflow.system_metrics has them.
        every_s: seconds between two samples.
        prefix: in front of every name.
    """

    def __init__(self, monitors: list[Any], every_s: float, prefix: str) -> None:
        self._monitors, self._every_s, self._prefix = monitors, every_s, prefix
        self._next = 0.0

    @classmethod
    def start(cls, every_s: float | None, node: str, many_nodes: bool) -> Self | None:
        """None where no samples are wanted. With several nodes the names hold the node: system/node-1/cpu_utilization_percentage."""
        if every_s is None:
            return None
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
        monitors = []
        for kind in kinds:
            with contextlib.suppress(Exception):  # no driver, no nvidia-ml-py, no network: the rest is worth having
                monitors.append(kind())
        return cls(monitors, every_s, f"{PREFIX}{node}/" if many_nodes else PREFIX)

    def due(self, now_s: float | None = None) -> list[Item]:
        """A record when it is time for one, else nothing.

        Its step counts intervals since 1970: so those of several nodes and of a run's several starts lie in order on one axis.
        """
        now = time.time() if now_s is None else now_s
        if now < self._next:
            return []
        self._next = now + self._every_s
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update({self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        return [{"kind": "metrics", "step": int(now // self._every_s), "time_ms": int(now * 1000), "values": values}]
