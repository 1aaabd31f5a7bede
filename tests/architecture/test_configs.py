"""Every YAML file of configs/ is what it claims to be, under the schema of today."""

from pathlib import Path

import pytest
import yaml

from megavlm.config import RecipeError, dump_recipe, load_blocks, load_recipe
from megavlm.config.cluster import load_cluster

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").rglob("*.y*ml"))
CLUSTERS = sorted((CONFIGS / "clusters").rglob("*.y*ml"))
PARTS = sorted([*(CONFIGS / "models").rglob("*.y*ml"), *(CONFIGS / "data").rglob("*.y*ml")])


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def test_every_file_is_one_of_them():
    found = {p for p in CONFIGS.rglob("*") if p.is_file()}
    assert found == {*RECIPES, *PARTS, *CLUSTERS}, "configs/ holds models/, data/, recipes/ and clusters/, YAML only"


def test_there_are_recipes():
    assert {"recipes/quickstart.yaml"} <= {name(p) for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_loads_and_survives_a_dump(path, tmp_path):
    recipe = load_recipe(path)
    dump_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", CLUSTERS, ids=name)
def test_cluster_is_one(path):
    assert load_cluster(path).world_size


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_part_holds_checked_blocks(path):
    assert load_blocks(path)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_slip_in_a_recipe_is_refused_with_its_path(path):
    with pytest.raises(RecipeError, match=r"model\.language\.num_layer: unknown field; did you mean 'num_layers'"):
        load_recipe(path, ["model.language.num_layer=2"])
    with pytest.raises(RecipeError, match=r"parallel\.tensor: must be a whole number"):
        load_recipe(path, ["parallel.tensor=two"])


@pytest.mark.parametrize("path", [*RECIPES, *PARTS], ids=name)
def test_no_path_of_a_machine(path):
    """Absolute paths belong to somebody's cluster: a recipe names places by ${oc.env:NAME} or relative to where it is run."""

    def texts(value):
        if isinstance(value, dict):
            return [t for v in value.values() for t in texts(v)]
        if isinstance(value, list):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    assert not [t for t in texts(yaml.safe_load(path.read_text(encoding="utf-8"))) if t.startswith(("/", "~"))]
