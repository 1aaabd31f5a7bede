"""The rank grid against megatron-core's own rank generator."""

import itertools

import pytest
from megatron.core.parallel_state import RankGenerator

from megavlm.config.schema import ParallelConfig, StageConfig
from megavlm.topology.grid import GridError, RankGrid

SHAPES = list(itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2)))
TOKENS = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}


def stage(**kwargs) -> StageConfig:
    return StageConfig(name="align", steps=1, mixture={"a": 1.0}, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_megatrons(shape):
    tensor, context, data, pipeline = shape
    world = tensor * context * data * pipeline
    oracle = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    grid = RankGrid.from_config(ParallelConfig(tensor=tensor, context=context, pipeline=pipeline), world)
    assert grid.data == data
    for count in (1, 2, 3):
        for axes in itertools.combinations(TOKENS, count):
            assert sorted(grid.groups(*axes)) == sorted(oracle.get_ranks("-".join(TOKENS[a] for a in axes))), axes
    for axis, token in TOKENS.items():
        for group in oracle.get_ranks(token):
            assert [getattr(grid.coordinates(rank), axis) for rank in group] == list(range(len(group)))
    assert [grid.rank(*grid.coordinates(rank)) for rank in range(world)] == list(range(world))


def test_a_world_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(GridError, match=r"6 ranks.*tensor=2.*pipeline=2 = 4 ranks.*multiple of 4"):
        RankGrid.from_config(ParallelConfig(tensor=2, pipeline=2), 6)
    with pytest.raises(GridError, match="world_size=5"):
        RankGrid(world_size=5, tensor=2, data=2)


def test_ranks_and_coordinates_outside_are_refused():
    grid = RankGrid(world_size=4, tensor=2, data=2)
    with pytest.raises(GridError, match="rank 4"):
        grid.coordinates(4)
    with pytest.raises(GridError, match="data coordinate 2"):
        grid.rank(data=2)


def test_num_microbatches():
    grid = RankGrid(world_size=8, pipeline=2, virtual_pipeline=2, data=4)
    assert grid.num_microbatches(stage(packs_per_step=32, micro_batch_packs=2)) == 4
    with pytest.raises(GridError, match=r"'align'.*packs_per_step=12.*4 x micro_batch_packs=2 = 8: use 8 or 16"):
        grid.num_microbatches(stage(packs_per_step=12, micro_batch_packs=2))
    with pytest.raises(GridError, match=r"makes 3: use 8 or 16"):
        grid.num_microbatches(stage(packs_per_step=12))
    assert RankGrid(world_size=8, pipeline=2, data=4).num_microbatches(stage(packs_per_step=12)) == 3


def test_table_lists_ranks_and_counts_the_rest():
    table = RankGrid(world_size=8, tensor=2, pipeline=2, data=2).table(max_rows=5)
    assert "8 ranks = tensor 2 x context 1 x data 2 x pipeline 2" in table
    assert table.splitlines()[3:8][4].split() == ["4", "0", "0", "0", "1"]
    assert table.endswith("... and 3 more ranks")
