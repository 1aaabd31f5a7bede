"""Scripts of `megavlm launch` on a real SLURM of two nodes: signals, crashes, restarts, chains. Ranks are small shell scripts that write
checkpoints as training does."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.config.cluster import ClusterConfig
from megavlm.testing.slurm import SlurmCluster, missing_programs
from megavlm_launchers import jobs, sbatch
from megavlm_launchers.sbatch import SlurmJob, render, submit

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"no SLURM here: {', '.join(missing_programs())} missing")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
RANK = """
save() { # rank 0 writes; a rank that ended before it would have it killed
  if [ "$SLURM_PROCID" != 0 ]; then sleep 2; return; fi
  local step=$(($(cut -d- -f1 "$RUN/checkpoints/latest" 2> /dev/null || echo 0) + 1))
  echo "0000000$step-all" > "$RUN/checkpoints/latest"
}
"""
WARNED = 'trap "save; exit 140" USR2; if [ "$MEGAVLM_START" = 0 ]; then echo ready; while :; do sleep 0.1; done; fi'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(cluster.configuration)
        try:
            yield cluster
        finally:
            os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With everything in its name that a shell could fall over."""
    run_dir = tmp_path / 'o d\'d $HOME %j "q" `é`; #'
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "slurm").mkdir()
    monkeypatch.setenv("RUN", str(run_dir))
    monkeypatch.setenv("MEGAVLM_JOBS", str(tmp_path / "jobs"))
    return run_dir


def start(
    run_dir: Path, ranks: str, *, chain: int | None = None, env_file: Path | None = None, local_dir: Path | None = None, **facts: object
) -> jobs.Job:
    given = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "exclusive": False, "memory_per_node": None, "time": "5"}
    command = ["bash", "-c", RANK + ranks]
    cluster = ClusterConfig.model_validate({**given, **facts})
    job = SlurmJob("fake", cluster, command, run_dir, run_dir.parent, env_file, chain, local_dir)
    script = run_dir / "slurm" / "job.sbatch"
    script.write_text(render(job))
    launched = jobs.Job(submit(script), "slurm", "fake", str(run_dir), time.time(), str(script))
    jobs.remember(launched)
    return launched


def log(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.log")))


def until(job: jobs.Job, words: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while words not in log(Path(job.run_dir)):
        assert time.monotonic() < end, f"never said {words!r}:\n{log(Path(job.run_dir))}"
        time.sleep(0.1)


def test_every_task_is_a_rank_that_can_find_the_first(cluster: SlurmCluster, run_dir: Path) -> None:
    secret = run_dir / "env file"
    secret.write_text("# of the run\nTOKEN=a b $HOME 'c'=d\n\nEMPTY=\n")
    job = start(
        run_dir,
        'echo "rank $SLURM_PROCID of $SLURM_NTASKS at $MASTER_ADDR: $ODD|$TOKEN|${EMPTY-unset}|$MADE"',
        env={"ODD": "x  y $Z 'q' \\"},
        env_file=secret,
        setup=["export MADE=$(echo here)"],
    )
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED"
    for rank in (0, 1):
        assert f"{rank}: rank {rank} of 2 at 127.0.0.1: x  y $Z 'q' \\|a b $HOME 'c'=d||here" in log(run_dir)
    assert jobs.state(job) == "COMPLETED"
    assert "a b" not in Path(job.script or "").read_text(), "what the env file says stays out of the script"


@pytest.mark.parametrize("setup", [[], ["trap : TERM USR2", "ranks=1 teller=1 timer=1"]], ids=["plain", "set-up lines that meddle"])
def test_the_warning_before_the_limit_saves_and_the_job_goes_on_by_itself(cluster: SlurmCluster, run_dir: Path, setup: list[str]) -> None:
    job = start(run_dir, WARNED, setup=setup)
    until(job, "1: ready")
    cluster.run("scancel", "--batch", "--signal=USR2", job.id)  # as SLURM sends it
    cluster.start_requeued(job.id)
    until(job, "done at step 1")
    assert cluster.wait(job.id, ENDED)["Restarts"] == "1"
    assert "USR2: the ranks save and end" in log(run_dir)
    assert jobs.state(job) == "COMPLETED"


@pytest.mark.slow
def test_slurm_itself_warns_before_the_limit(cluster: SlurmCluster, run_dir: Path) -> None:
    """It counts limits in minutes, and warns up to a minute early."""
    job = start(run_dir, WARNED, time="1", signal_before_s=50)
    until(job, "out of time at step 1: back into the queue", 90)
    cluster.start_requeued(job.id)
    until(job, "done at step 1")
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED"


def test_restarts_without_progress_come_to_an_end(cluster: SlurmCluster, run_dir: Path) -> None:
    """One start that got on, then two restarts that did not."""
    job = start(run_dir, '[ "$MEGAVLM_START" = 0 ] && save; exit 7')
    found = cluster.wait(job.id, ENDED)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "86:0"), log(run_dir)
    assert log(run_dir).count("again, on the same nodes") == 2
    assert "no checkpoint newer than step 1 after 2 restarts" in log(run_dir)


UNREADABLE = '[ "$SLURM_PROCID" = 0 ] || exec sleep 20; echo 82 > "$MEGAVLM_EXIT_NOTE"; exit 82'


def test_a_file_server_that_is_away_is_waited_for(cluster: SlurmCluster, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as is said; then starts that cannot read count as any that got nowhere."""
    monkeypatch.setattr(sbatch, "AWAY_S", 0.1)
    monkeypatch.setattr(sbatch, "AWAY_STARTS", 4)
    back = start(run_dir, f'[ "$MEGAVLM_START" = 4 ] && exit 0; {UNREADABLE}', max_fruitless_restarts=1)
    assert cluster.wait(back.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert log(run_dir).count("nothing can be read now; the next start is in 0.1 s") == 4
    away = start(run_dir, UNREADABLE, max_fruitless_restarts=1)
    found = cluster.wait(away.id, ENDED)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "86:0"), log(run_dir)
    assert "start 5 on" in log(run_dir) and "start 6 on" not in log(run_dir), "four, the first that counts, and one restart"


def test_who_waits_for_a_file_server_can_be_stopped(cluster: SlurmCluster, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbatch, "AWAY_S", 3600)
    job = start(run_dir, UNREADABLE)
    until(job, "the next start is in 3600 s")
    jobs.stop(job)
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert "stopped at step 0, as asked" in log(run_dir) and "start 1 on" not in log(run_dir)


def test_progress_from_the_nodes_own_disks_is_progress(cluster: SlurmCluster, run_dir: Path) -> None:
    """Starts that go on from ever newer local checkpoints, of which `latest` knows nothing, are as many as it takes."""
    note = 'echo $((MEGAVLM_START / 2 * 20)) > "$MEGAVLM_RESUME_NOTE"'  # every other start gets on; rank 0 tells
    job = start(run_dir, f'[ "$MEGAVLM_START" = 4 ] && exit 0; [ "$SLURM_PROCID" = 0 ] || exec sleep 20; {note}; exit 7')
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert "at step 20: again" in log(run_dir) and "done at step 20" in log(run_dir)


def make_program(path: Path, script: str) -> Path:
    """One that a job finds before the real one, where its folder stands first in PATH."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def make_runtime(folder: Path) -> Path:
    """A container runtime that mounts nothing that is not there, and contains nothing."""
    mounts = 'if [ "$1" = --bind ] && [ ! -d "${2%%:*}" ]; then echo "no ${2%%:*}" >&2; exit 255; fi'
    return make_program(folder / "apptainer", f'while [ "$1" != image.sif ]; do\n  {mounts}\n  shift\ndone\nshift; exec "$@"')


def test_ranks_do_not_start_behind_a_warning(cluster: SlurmCluster, run_dir: Path, tmp_path: Path) -> None:
    """One that comes while the folders of the nodes' own tier are made: ranks that start then would never hear of it."""
    runtime, go = make_runtime(tmp_path / "bin"), tmp_path / "go"
    waits = f'echo making\nwhile [ ! -e "{go}" ]; do sleep 0.1; done\nsleep 0.5'
    make_program(runtime.with_name("mkdir"), f'{waits}\nexec /bin/mkdir "$@"')
    job = start(
        run_dir,
        "echo entered",
        local_dir=tmp_path / "disk",
        container={"image": "image.sif", "runtime": "apptainer"},
        setup=[f"export PATH={runtime.parent}:$PATH"],
    )
    until(job, "1: making")
    cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    go.touch()
    cluster.start_requeued(job.id)
    until(job, "done at step 0")
    said = log(run_dir)
    assert said.index("back into the queue") < said.index("start 0 on") and said.count("entered") == 2, said


def test_a_warning_during_the_clusters_own_setup_is_heard(cluster: SlurmCluster, run_dir: Path) -> None:
    """Of which nobody knows how long it takes."""
    job = start(run_dir, "echo entered", setup=['[ -n "${SLURM_RESTART_COUNT:-}" ] || kill -USR2 $$'])
    cluster.start_requeued(job.id)
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert "out of time at step 0: back into the queue" in log(run_dir) and log(run_dir).count("entered") == 2


def test_a_warning_while_the_ranks_are_being_started_is_heard(cluster: SlurmCluster, run_dir: Path, tmp_path: Path) -> None:
    """It comes while the script clears the note of the last start away: behind its look at warnings, before there is anybody to tell."""
    warns = f'[ -e "{tmp_path}/warned" ] || {{ touch "{tmp_path}/warned"; kill -USR2 $PPID; }}'
    remove = make_program(tmp_path / "bin" / "rm", f'{warns}\nexec /bin/rm "$@"')
    ranks = 'trap "exit 140" USR2; if [ "$MEGAVLM_START" = 0 ]; then while :; do sleep 0.1; done; fi'
    job = start(run_dir, ranks, setup=[f"export PATH={remove.parent}:$PATH"])
    until(job, "out of time at step 0: back into the queue")
    cluster.start_requeued(job.id)
    until(job, "done at step 0")
    assert "again, on the same nodes" not in log(run_dir)
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED"


def test_a_warning_that_srun_drops_is_said_again(
    cluster: SlurmCluster, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drops what comes before its tasks have started: here for as long as the test wants. A stop has no limit."""
    monkeypatch.setattr(sbatch, "TELL_S", 0.2)
    hears = f'echo starting; trap "echo dropped" USR2; while [ ! -e "{tmp_path}/go" ]; do sleep 0.1; done; trap "" USR2'
    deaf = make_program(tmp_path / "bin" / "srun", f'{hears}\nexec {shutil.which("srun")} "$@"')
    job = start(run_dir, 'trap "save; exit 140" USR2; while :; do sleep 0.1; done', setup=[f"export PATH={deaf.parent}:$PATH"])
    until(job, "starting")
    jobs.stop(job)
    until(job, "dropped")
    (tmp_path / "go").touch()
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert log(run_dir).count("the ranks save and end") == 1 and "stopped at step" in log(run_dir) and "start 1 on" not in log(run_dir)


def test_a_container_finds_the_nodes_own_tier(cluster: SlurmCluster, run_dir: Path, tmp_path: Path) -> None:
    """The folder is made on every node before the runtime, which mounts nothing that is not there, is called."""
    runtime = make_runtime(tmp_path / "bin")
    job = start(
        run_dir,
        "echo entered",
        local_dir=tmp_path / "o d'd $HOME" / "disk",
        container={"image": "image.sif", "runtime": "apptainer"},
        setup=[f"export PATH={runtime.parent}:$PATH"],
    )
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED", log(run_dir)
    assert "0: entered" in log(run_dir) and "1: entered" in log(run_dir)


def test_ranks_that_do_not_end_in_time_are_killed_and_the_job_goes_on(cluster: SlurmCluster, run_dir: Path) -> None:
    stuck = 'trap "" USR2; if [ "$MEGAVLM_START" = 0 ]; then echo ready; while :; do sleep 0.1; done; fi'
    job = start(run_dir, stuck, signal_before_s=4)
    until(job, "1: ready")
    cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    cluster.start_requeued(job.id)
    until(job, "done at step 0")
    assert "2 s later they have not ended: killed" in log(run_dir)
    assert cluster.wait(job.id, ENDED)["Restarts"] == "1"


@pytest.mark.parametrize("line", ["export TOKEN=hunter2", "hunter2", "9X=hunter2"])
def test_a_wrong_line_of_the_env_file_is_not_printed(cluster: SlurmCluster, run_dir: Path, line: str) -> None:
    secret = run_dir / "env file"
    secret.write_text(f"# of the run\nA=b\n{line}\n")
    found = cluster.wait(start(run_dir, "exit 0", env_file=secret).id, ENDED)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert "line 3 is not NAME=value" in log(run_dir) and "hunter2" not in log(run_dir)


@pytest.mark.parametrize("code", [2, 78])
def test_what_a_restart_does_not_mend_is_not_started_again(cluster: SlurmCluster, run_dir: Path, code: int) -> None:
    job = start(run_dir, f'echo {code} > "$MEGAVLM_EXIT_NOTE"; exit {code}')  # as megavlm's command line does
    found = cluster.wait(job.id, ENDED)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert "which a restart does not mend" in log(run_dir) and "start 1" not in log(run_dir)


def test_one_failed_rank_ends_the_others_and_all_start_again(cluster: SlurmCluster, run_dir: Path) -> None:
    fails = 'echo 9 > "$MEGAVLM_EXIT_NOTE"; exit 9'  # as megavlm's command line does
    ranks = f'[ "$MEGAVLM_START" = 1 ] && exit 0; [ "$SLURM_PROCID" = 1 ] && {{ {fails}; }}; while :; do sleep 0.1; done'
    job = start(run_dir, ranks)
    assert cluster.wait(job.id, ENDED)["JobState"] == "COMPLETED"
    assert "exit code 9 at step 0: again, on the same nodes" in log(run_dir)


def test_stop_saves_and_nothing_starts_again(cluster: SlurmCluster, run_dir: Path) -> None:
    job = start(run_dir, 'trap "save; exit 140" USR2; echo ready; while :; do sleep 0.1; done')
    until(job, "1: ready")
    assert "save and end" in jobs.stop(jobs.find("fake"))
    found = cluster.wait(job.id, ENDED)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0")
    assert jobs.progress(job).checkpoint == "00000001-all"
    with pytest.raises(ValueError, match="it is COMPLETED"):
        jobs.stop(job)


def test_a_chain_goes_on_until_the_run_is_done(cluster: SlurmCluster, run_dir: Path) -> None:
    ranks = 'trap "save; exit 140" USR2; [ "$SLURM_ARRAY_TASK_ID" = 2 ] && exit 0; echo ready; while :; do sleep 0.1; done'
    job = start(run_dir, ranks, chain=5)
    until(job, "1: ready")
    first = cluster.run("squeue", f"--jobs={job.id}_1", "--noheader", "--format=%A").strip()
    cluster.run("scancel", "--batch", "--signal=USR2", first, check=False)  # see jobs.stop
    until(job, "done at step 1")
    end = time.monotonic() + 60
    while "PENDING" in jobs.state(job) or "RUNNING" in jobs.state(job):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert len(list((run_dir / "slurm").glob(f"{job.id}_*.log"))) == 2, "what was left of the chain was cancelled"


def test_cancelling_ends_the_job_for_good(cluster: SlurmCluster, run_dir: Path) -> None:
    job = start(run_dir, 'trap "save; exit 143" TERM; echo ready; while :; do sleep 0.1; done')
    until(job, "1: ready")
    cluster.run("scancel", job.id)
    assert cluster.wait(job.id, ENDED)["JobState"] == "CANCELLED"
    until(job, "ended by SLURM at step 1")
