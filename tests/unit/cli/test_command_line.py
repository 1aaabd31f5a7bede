"""The `megavlm` command from outside: exit codes, messages, what it imports, how it finds or starts ranks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
run: {dir: RUN}
data:
  sources: {pages: {path: data/pages}}
stages:
  - {name: align, steps: 10, mixture: {pages: 1.0}}
"""

# Stands in for megavlm.training.run, whose own tests are elsewhere: what is under test is who calls it, where, and with which recipe.
FAKE_ENGINE = """
import json, os, sys, types
engine = types.ModuleType("megavlm.training.run")
def train(recipe):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    told = {n: os.environ[n] for n in names} | {"seed": recipe.run.seed}
    with open(os.path.join(recipe.run.dir, f"told{os.environ['RANK']}.json"), "w") as file:
        json.dump(told, file)
    return int(os.environ.get("ENGINE_CODE", "0"))
engine.train = train
package = types.ModuleType("megavlm.training")
package.__path__ = []
sys.modules["megavlm.training"], sys.modules["megavlm.training.run"] = package, engine
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("RUN", str(tmp_path)))
    return path


def megavlm(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megavlm.cli", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "140", **environ}, capture_output=True, text=True, timeout=120)


@pytest.fixture
def fake_engine(tmp_path):
    """PYTHONPATH entry whose sitecustomize puts the fake engine into every process."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAKE_ENGINE)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def told(folder, rank: int) -> dict[str, object]:
    return json.loads((folder / f"told{rank}.json").read_text())


# --------------------------------------------------------------------------------------------------------------------- exit codes


def test_help_lists_the_commands():
    done = megavlm("--help")
    assert done.returncode == 0
    for name in ("train", "data", "config", "doctor"):
        assert name in done.stdout


def test_version():
    import megavlm as package

    assert megavlm("--version").stdout == f"megavlm {package.__version__}\n"


def test_a_wrong_recipe_is_one_message_and_code_2(recipe_file):
    done = megavlm("train", recipe_file, "parallel.tensor=two")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("megavlm: error: ")
    assert "parallel.tensor: must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_keys_are_code_2_with_the_path(recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "model: {vision: {image_sise_px: 3}}\n")
    done = megavlm("train", recipe_file)
    assert done.returncode == 2
    assert "model.vision.image_sise_px: unknown field; did you mean 'image_size_px'?" in done.stderr


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(recipe_file, place):
    arguments = ["train", str(recipe_file), "run.sed=1"]
    arguments.insert(place, "--debug")
    done = megavlm(*arguments)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "megavlm: error: " in done.stderr


def test_a_missing_file_and_a_wrong_option_are_code_2(tmp_path):
    assert megavlm("train", tmp_path / "no.yaml").returncode == 2
    assert megavlm("train", "--nprocs", "2").returncode == 2
    assert megavlm("frobnicate").returncode == 2


def test_which_exceptions_are_the_users():
    from megavlm.cli.errors import is_user_error
    from megavlm.config import RecipeError, load_recipe
    from megavlm_launchers.errors import LaunchError

    def raised(call):
        try:
            call()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert is_user_error(RecipeError("r", "wrong"))
    assert is_user_error(LaunchError("wrong"))
    assert is_user_error(raised(lambda: Path("/no/such/file").read_text()))
    assert is_user_error(raised(lambda: load_recipe("/no/such/file")))
    assert not is_user_error(raised(lambda: int("x")))
    assert not is_user_error(raised(lambda: json.loads("{")))
    assert not is_user_error(RuntimeError("torch"))
    for number in (errno.EROFS, errno.ENOSPC):
        assert is_user_error(OSError(number, os.strerror(number)))
    assert not is_user_error(OSError(errno.EBADF, "bad file descriptor"))


@pytest.mark.parametrize(
    "package,body,expected",
    [
        ("megavlm.data", "raise ValueError('3 is not 4')", True),
        ("megavlm.data", "\n try: raise ValueError('3 is not 4')\n finally: print()", True),
        ("megavlm.data", "\n with open('/dev/null'): raise ValueError('3 is not 4')", True),
        ("megavlm.data", "int('x')", False),
        ("megavlm.data", "a, b = 1, 2, 3", False),
        ("torch.nn", "raise ValueError('3 is not 4')", False),
        ("megavlm_other", "raise ValueError('3 is not 4')", False),
    ],
)
def test_a_plain_value_error_is_the_users_where_our_code_raises_it(package, body, expected):
    from megavlm.cli.errors import is_user_error

    module = {"__name__": package}
    exec(f"def fail(): {body}", module)
    with pytest.raises(ValueError) as caught:
        module["fail"]()
    assert is_user_error(caught.value) is expected


# -------------------------------------------------------------------------------------------------------------------------- train


def test_one_rank_trains_in_this_process(recipe_file, fake_engine, tmp_path):
    done = megavlm("train", recipe_file, "run.seed=7", CUDA_VISIBLE_DEVICES="", **fake_engine)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path, 0) | {"MASTER_PORT": ""} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "",
        "seed": 7,
    }


@pytest.mark.parametrize(
    "arguments,environ,num_ranks",
    [
        (["--nproc", "3"], {}, 3),
        (["run.num_ranks=2"], {}, 2),
        (["run.num_ranks=2", "--nproc", "1"], {}, 1),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        (["run.device=cpu"], {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    ],
)
def test_ranks_are_started_here(recipe_file, fake_engine, tmp_path, arguments, environ, num_ranks):
    done = megavlm("train", recipe_file, "run.seed=5", *arguments, **{"CUDA_VISIBLE_DEVICES": ""} | environ | fake_engine)
    assert done.returncode == 0, done.stderr
    assert [told(tmp_path, r)["WORLD_SIZE"] for r in range(num_ranks)] == [str(num_ranks)] * num_ranks
    assert not (tmp_path / f"told{num_ranks}.json").exists()
    assert told(tmp_path, num_ranks - 1)["seed"] == 5
    assert (tmp_path / "logs").is_dir() == (num_ranks > 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_engines_exit_code_comes_out(recipe_file, fake_engine, num_ranks):
    assert megavlm("train", recipe_file, "--nproc", num_ranks, ENGINE_CODE="9", **fake_engine).returncode == 9


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_LOCALID": "0"}


def test_under_torchrun_it_is_that_rank(recipe_file, fake_engine, tmp_path):
    done = megavlm("train", recipe_file, "run.num_ranks=8", **TORCHRUN, **fake_engine)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path, 1) == {**TORCHRUN, "seed": 1234}
    assert not (tmp_path / "told0.json").exists()


def test_under_srun_it_is_that_rank(recipe_file, fake_engine, tmp_path):
    done = megavlm("train", recipe_file, **SRUN, **fake_engine)
    assert done.returncode == 0, done.stderr
    found = told(tmp_path, 1)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("1", "4", "0", "n1")


def test_in_an_sbatch_script_it_asks_for_srun_or_nproc(recipe_file, fake_engine, tmp_path):
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    done = megavlm("train", recipe_file, **batch, **fake_engine)
    assert done.returncode == 2 and "srun megavlm train" in done.stderr
    assert megavlm("train", recipe_file, "--nproc", "2", **batch, **fake_engine).returncode == 0
    assert told(tmp_path, 1)["WORLD_SIZE"] == "2"


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN])
def test_nproc_that_contradicts_the_environment_is_refused(recipe_file, fake_engine, environ):
    done = megavlm("train", recipe_file, "--nproc", "2", **environ, **fake_engine)
    assert done.returncode == 2
    assert "--nproc 2" in done.stderr and "4 ranks" in done.stderr


# -------------------------------------------------------------------------------------------------------------------------- config


def test_config_show_is_a_recipe(recipe_file, tmp_path):
    from megavlm.config import load_recipe

    done = megavlm("config", "show", recipe_file, "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    (tmp_path / "shown.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(recipe_file, ["parallel.tensor=2"])


def test_config_schema(tmp_path):
    done = megavlm("config", "schema", "-o", tmp_path / "schema.json")
    assert done.returncode == 0, done.stderr
    assert "ParallelConfig" in json.loads((tmp_path / "schema.json").read_text())["$defs"]
    assert megavlm("config", "schema").stdout == (tmp_path / "schema.json").read_text()


# ------------------------------------------------------------------------------------------------------------------------ start-up


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys, time; begin = time.process_time()\n"
        "from megavlm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy', 'mlflow', 'pydantic', 'omegaconf', 'nvidia'} & set(sys.modules)\n"
        "print('SPENT', time.process_time() - begin, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    _, spent_s, heavy = done.stdout.strip().splitlines()[-1].split(maxsplit=2)
    assert heavy == "[]"
    assert float(spent_s) < 0.5


def test_a_wrong_recipe_is_told_before_torch_is_imported(recipe_file):
    code = (
        "import sys\nfrom megavlm.cli.main import main\n"
        f"try: main(['train', {str(recipe_file)!r}, 'run.sed=1'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n"
