"""Who started this process, and as which rank: torchrun, srun, or nobody."""

import errno
import shutil
import socket
import subprocess

import pytest

from megavlm_launchers.environment import LOOPBACK, found_ranks, held_port, num_visible_gpus, rank_environment
from megavlm_launchers.errors import LaunchError
from megavlm_launchers.slurm import first_host, master_port, slurm_environment, tasks_of_node

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "SLURM_JOB_ID": "1234",
}


def test_nobody():
    assert found_ranks({}) is None
    assert found_ranks({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}) is None  # salloc's shell


def test_torchrun():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    assert found_ranks({**env, **STEP}) == env


@pytest.mark.parametrize("env", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_of_torchrun_is_refused(env):
    with pytest.raises(LaunchError, match="MASTER_PORT"):
        found_ranks(env)


@pytest.mark.parametrize("rank", ["4", "-1", "x"])
def test_rank_outside_its_world_is_refused(rank):
    with pytest.raises(LaunchError, match="RANK="):
        found_ranks({"RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "9"})


def test_srun():
    found = found_ranks(STEP)
    assert found is not None
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07"}
    assert 1024 < int(port) < 32768


def test_srun_of_one_task_is_nobody():
    assert slurm_environment({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_settings_of_the_user_win():
    found = slurm_environment({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert found is not None and (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4242")


def test_the_shell_of_an_sbatch_script_is_told_to_use_srun():
    with pytest.raises(LaunchError, match="srun megavlm train"):
        found_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"})


def test_port_differs_between_jobs_steps_and_restarts():
    kinds = [{}, {"SLURM_JOB_ID": "1235"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    assert len({master_port({**STEP, **k}) for k in kinds}) == 4


NODE_LISTS = ["node7", "gpu[03-07,9],login", "a[1-2]b[5-6]", "x-1,x-2", "n[001,003-005],m1", "rack[2-3]node[10-11]"]


@pytest.mark.parametrize("nodes,host", zip(NODE_LISTS, ["node7", "gpu03", "a1b5", "x-1", "n001", "rack2node10"], strict=True))
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs SLURM's scontrol")
@pytest.mark.parametrize("nodes", NODE_LISTS)
def test_first_host_agrees_with_scontrol(nodes, tmp_path, monkeypatch):
    (tmp_path / "slurm.conf").write_text("ClusterName=test\nSlurmctldHost=localhost\nPartitionName=p Nodes=n1\nNodeName=n1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    assert first_host(nodes) == listed.split()[0]


def test_tasks_of_node():
    assert [tasks_of_node("4(x2),3", n) for n in range(3)] == [4, 4, 3]
    with pytest.raises(LaunchError, match="node 3"):
        tasks_of_node("4(x2),3", 3)
    with pytest.raises(LaunchError, match="4x2"):
        tasks_of_node("4x2", 0)


@pytest.mark.parametrize("listed,num", [("", 0), ("0,1", 2), ("GPU-a,GPU-b,GPU-c", 3), ("0,-1,2", 1), ("-1", 0)])
def test_cuda_visible_devices(listed, num):
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == num


def test_rank_environment_keeps_the_rest():
    assert rank_environment(0, 1, 5, {"PATH": "p"})["PATH"] == "p"


def test_a_port_is_held_for_rank_0_until_the_run_ends():
    """Between the choice and rank 0's listening lie seconds of imports, in which other runs choose theirs."""
    import torch

    with held_port() as port:
        with socket.socket() as somebody, pytest.raises(OSError) as refused:
            somebody.bind((LOOPBACK, port))
        assert refused.value.errno == errno.EADDRINUSE
        store = torch.distributed.TCPStore(LOOPBACK, port, is_master=True)
        store.set("who", "rank 0")
        assert torch.distributed.TCPStore(LOOPBACK, port, is_master=False).get("who") == b"rank 0"
        with held_port() as another:
            assert another != port
