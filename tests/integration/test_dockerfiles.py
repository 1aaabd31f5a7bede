"""The images' recipes, as far as they can be proved without an engine: hadolint, what they copy, what they pin, and their commands run
here, in a folder and an environment made for it."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile", "Dockerfile.cpu")
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order; continued lines joined, comments left out."""
    text = "\n".join(line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    text = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def copies(name: str) -> list[str]:
    return [source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]]


def is_let_in(path: Path) -> bool:
    """Whether .dockerignore leaves a file in the build's context; the last line that matches decides, as docker has it."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parts, decision = path.relative_to(ROOT).parts, True
    for rule in rules:
        pattern = rule.removeprefix("!")
        anywhere = pattern.removeprefix("**/")
        if anywhere != pattern:
            hit = any(fnmatch.fnmatchcase(part, anywhere) for part in parts)
        else:
            hit = any(fnmatch.fnmatchcase("/".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
        if hit:
            decision = rule.startswith("!")
    return decision


@pytest.mark.parametrize("name", FILES)
@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say(name):
    done = subprocess.run([HADOLINT, ROOT / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_let_in(name):
    found = copies(name)
    assert "." in found and "setup.py" in found
    for source in found:
        path = ROOT / source
        assert path.exists(), source
        assert source == "." or is_let_in(path), f"{source} is in .dockerignore"
    for needed in (
        "launchers/megavlm_launchers/templates/train.sbatch",
        "kernels/megavlm_kernels/__init__.py",
        "configs/recipes/tiny.yaml",
    ):
        assert is_let_in(ROOT / needed), needed
    for left_out in (".git/config", "tests/conftest.py", "runs/x", "megavlm/__pycache__/x.pyc", ".venv/bin/python"):
        assert not is_let_in(ROOT / left_out), left_out


@pytest.mark.parametrize("name", FILES)
def test_it_is_pinned_and_not_root(name):
    found = instructions(name)
    (image,) = [rest for word, rest in found if word == "FROM"]
    repository, _, tag = image.partition(":")
    assert repository in ("nvcr.io/nvidia/pytorch", "python") and re.match(r"\d+\.\d+", tag), image
    assert [rest for word, rest in found if word == "USER"][-1] == "10001"
    assert not re.search(r"https?://", (ROOT / name).read_text())
    ranges = (ROOT / "setup.py").read_text()
    minimum = re.search(r'"torch>=([\d.]+)"', ranges).group(1)
    pin = re.search(r"^torch==([\d.]+)", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE).group(1)
    assert tuple(map(int, pin.split("."))) >= tuple(map(int, minimum.split(".")))
    lowest = re.search(r'python_requires=">=([\d.]+)"', ranges).group(1)
    assert name == "Dockerfile" or tag.startswith(lowest)
    commands = " ".join(rest for word, rest in found if word == "RUN")
    assert "--constraint" in commands and not re.search(r"pip install [^&|]*torch(?!_INDEX)\b", commands), (
        "torch is the image's own, or the pin's"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_its_commands_make_a_working_megavlm(name, tmp_path):
    """Every RUN line, in the folder that the COPY lines make and a fresh environment that sees this one's packages (so that pip finds them
    installed, as in NVIDIA's image). Only users and folders outside of it are not made: their commands are noted instead."""
    workdir, environment, shims = tmp_path / "opt", tmp_path / "venv", tmp_path / "shims"
    workdir.mkdir()
    shims.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for program in ("useradd", "install"):
        (shims / program).write_text(f'#!/bin/sh\necho {program} "$@" >> {tmp_path}/noted\n')
        (shims / program).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{shims}:{environment / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "false",  # pip's spelling of "without": setuptools is here, and no index is asked
        "TMPDIR": str(tmp_path),
    }
    for word, rest in instructions(name):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(source, workdir / target)
        elif word == "RUN":
            command = rest.replace("/tmp/", f"{tmp_path}/")
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command], cwd=workdir, env=variables, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Downloading torch" not in done.stdout and "Installing collected packages: torch" not in done.stdout
    noted = (tmp_path / "noted").read_text()
    assert "useradd --uid 10001" in noted and "/workspace/runs" in noted
    where = "import megavlm, megavlm_kernels, megavlm_launchers; print(megavlm.__file__)"
    done = subprocess.run([environment / "bin/python", "-c", where], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(workdir / "megavlm/__init__.py"), done.stderr
    done = subprocess.run([environment / "bin/megavlm", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("megavlm "), done.stderr


def copy(source: str, target: Path) -> None:
    if source != ".":
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, target)
        return
    for path in ROOT.rglob("*"):
        if path.is_file() and ".venv" not in path.parts and ".git" not in path.parts and is_let_in(path):
            there = target / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
