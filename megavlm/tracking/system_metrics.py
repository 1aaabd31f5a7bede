"""Use of a node's processors, memory, disk, network and GPUs over time, under the names of MLflow's page "System metrics"."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Self

from megavlm.tracking.console import get_logger
from megavlm.tracking.spool import Item

PREFIX = "system/"
_log = get_logger(__name__)


class SystemMetrics:
    """Samples every so often; the numbers are those of MLflow's own monitors.

    Args:
        monitors: each with collect_metrics, aggregate_metrics and clear_metrics, as mlflow.system_metrics has them.
        every_s: seconds between two samples.
        prefix: in front of every name.
    """

    def __init__(self, monitors: list[Any], every_s: float, prefix: str) -> None:
        self._monitors, self._every_s, self._prefix = monitors, every_s, prefix
        self._next, self._has_warned = 0.0, False

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
        """A record when it is time for one, else nothing. A monitor that fails is left out of it, with one warning for all of them.

        Its step counts intervals since 1970: so those of several nodes and of a run's several starts lie in order on one axis.
        """
        now = time.time() if now_s is None else now_s
        if now < self._next:
            return []
        self._next = now + self._every_s
        values: dict[str, float] = {}
        for monitor in self._monitors:
            try:
                monitor.collect_metrics()
                values.update({self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()})
            except Exception as error:  # a driver that goes away, a GPU whose power limit is 0: the rest is worth having
                self._warn(monitor, error)
            monitor.clear_metrics()
        if not values:
            return []
        return [{"kind": "metrics", "step": int(now // self._every_s), "time_ms": int(now * 1000), "values": values}]

    def _warn(self, monitor: Any, error: Exception) -> None:
        if not self._has_warned:
            _log.warning("system metrics lack those of %s (%s: %s)", type(monitor).__name__, type(error).__name__, error)
        self._has_warned = True
