"""What the doctor and MLflow's system metrics see of GPUs."""

import pytest

from megavlm.cli._doctor.examine import examine_machine
from megavlm.cli._doctor.reach import check_here
from megavlm.tracking.system_metrics import SystemMetrics
from megavlm_launchers.environment import num_visible_gpus

pytestmark = pytest.mark.gpu


def test_ranks_talk_over_nccl():
    import os

    gpus = num_visible_gpus(os.environ)
    check = check_here("nccl", gpus)
    assert check.state == "ok" and "all-reduce is right" in check.detail, check.detail
    assert ("/s" in check.detail) == (gpus > 1)


def test_the_gpu_is_found():
    parts = {part.name: part for part in examine_machine(lambda text: None).parts}
    assert parts["CUDA"].status == "ok" and "NCCL" in parts["CUDA"].detail


def test_system_metrics_hold_each_gpus_memory_and_use():
    pytest.importorskip("pynvml")
    (item,) = SystemMetrics.start(1.0, "node-0", many_nodes=False).due(1.0)
    assert item["values"]["system/gpu_0_memory_usage_megabytes"] > 0 and "system/gpu_0_utilization_percentage" in item["values"]
