"""Settings for every test: one thread a process, no tracking server of the user's, no network; and one pool of gloo ranks for all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.testing.matrix.table import Figures, collected
from megavlm.testing.pool import RankPool
from megavlm_launchers.environment import num_visible_gpus

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# A rank or a tracking server of the shell that runs the tests is not theirs.
for _name in list(os.environ):
    if _name in {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
    }:
        del os.environ[_name]


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tests/slow.txt lists is marked `slow`; tests marked `gpu` are skipped, with the reason, where there is none."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if num_visible_gpus(os.environ):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to eight forked gloo ranks, started with the first test that asks for them: imports are paid for once."""
    ranks = RankPool(8)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """Fault -> what was measured, for the table of docs/reliability.md."""
    with collected() as found:
        yield found


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstration data that several files train on. Nobody may change it."""
    from megavlm.testing.recipes import make_tiny_data

    return make_tiny_data(tmp_path_factory.mktemp("tiny-data"))
