"""Recipes are composed, overridden, resolved and checked; every mistake is named with its field, its place and what is allowed."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megavlm.config import RecipeError, dump_recipe, load_blocks, load_recipe, parse_recipe
from megavlm.config.compose import read_composition
from megavlm.config.fields import leaf_paths
from megavlm.config.overrides import apply_overrides
from megavlm.config.schema import Recipe

MINIMAL = """\
run: {dir: runs/x}
data:
  sources: {pages: {path: data/pages}, text: {path: data/text}}
stages:
  - {name: align, steps: 10, mixture: {pages: 1.0}}
  - {name: tune, steps: 20, mixture: {pages: 1.0, text: 0.5}}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- composition


def test_minimal(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.run.dir == "runs/x"
    assert [s.name for s in recipe.stages] == ["align", "tune"]


def test_bases_are_merged_in_order_and_the_file_wins(tmp_path):
    write(tmp_path, "parts/a.yaml", "model: {projector: {num_layers: 1, bias: false}}\nparallel: {tensor: 2}\n")
    write(tmp_path, "parts/b.yaml", "model: {projector: {num_layers: 2}}\nparallel: {pipeline: 2}\nevaluation: {sources: [pages]}\n")
    path = write(
        tmp_path,
        "r/recipe.yaml",
        "base: [../parts/a.yaml, ../parts/b.yaml]\nparallel: {pipeline: 4}\nevaluation: {sources: []}\n" + MINIMAL,
    )
    recipe = load_recipe(path)
    assert (recipe.model.projector.num_layers, recipe.model.projector.bias) == (2, False)
    assert (recipe.parallel.tensor, recipe.parallel.pipeline) == (2, 4)
    assert recipe.evaluation.sources == []


def test_a_base_may_have_a_base_and_two_may_share_one(tmp_path):
    write(tmp_path, "root.yaml", "run: {seed: 7, name: root}\n")
    write(tmp_path, "left.yaml", "base: root.yaml\nrun: {name: left}\n")
    write(tmp_path, "right.yaml", "base: root.yaml\n")
    path = write(tmp_path, "recipe.yaml", "base: [left.yaml, right.yaml]\n" + MINIMAL)
    assert (load_recipe(path).run.seed, load_recipe(path).run.name) == (7, "root")


def test_a_list_is_replaced_not_merged(tmp_path, recipe_file):
    path = write(tmp_path, "child.yaml", "base: recipe.yaml\nstages: [{name: only, steps: 1, mixture: {text: 1.0}}]\n")
    assert [s.name for s in load_recipe(path).stages] == ["only"]


def test_a_circle_of_bases_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: sub/b.yaml\n")
    write(tmp_path, "sub/b.yaml", "base: ../a.yaml\n")
    assert "form a circle" in refused(tmp_path / "a.yaml")
    assert "a.yaml -> " in refused(tmp_path / "a.yaml")


def test_a_base_that_is_not_there_names_who_wanted_it(tmp_path):
    write(tmp_path, "models/small.yaml", "model: {}\n")
    message = refused(write(tmp_path, "recipe.yaml", "base: models/smal.yaml\n" + MINIMAL))
    assert "models/smal.yaml" in message and "recipe.yaml" in message and "did you mean 'small.yaml'?" in message


@pytest.mark.parametrize("base", ["3", "[a.yaml, 3]", "{a: b}", "''"])
def test_a_base_that_is_no_path_is_refused(tmp_path, base):
    write(tmp_path, "a.yaml", "run: {}\n")
    assert "base: must be a path" in refused(write(tmp_path, "recipe.yaml", f"base: {base}\n" + MINIMAL))


# -------------------------------------------------------------------------------------------------------------- files that are no YAML


@pytest.mark.parametrize(
    "text,problem",
    [
        ("run: {dir: x\nmodel: 3\n", "line 2"),
        ("run:\n  dir: x\n dir: y\n", "line 3"),
        ("run: {dir: x}\nrun: {dir: y}\n", "duplicate key run"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("just text\n", "must be a mapping"),
        ("", "is empty"),
        ("run: !!python/object:os.system {}\n", "not valid YAML, line 1"),
        ("\tx: 1\n", "line 1"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, text, problem):
    message = refused(write(tmp_path, "recipe.yaml", text))
    assert problem in message
    assert str(tmp_path / "recipe.yaml") in message


def test_files_that_cannot_be_read(tmp_path, recipe_file):
    assert "no such file; did you mean 'recipe.yaml'?" in refused(tmp_path / "recipes.yaml")
    assert "no such file" in refused(tmp_path / "nowhere" / "r.yaml")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(tmp_path / "binary.yaml")


# ------------------------------------------------------------------------------------------------------------------- wrong fields


def test_all_mistakes_at_once_each_with_its_line(tmp_path):
    text = MINIMAL + "parallel:\n  tensor: two\n  pipline: 2\nprecision: {dtype: fp8}\n"
    message = refused(write(tmp_path, "recipe.yaml", text))
    assert "3 mistakes" in message
    assert f"parallel.tensor: must be a whole number, got the text 'two'  [{tmp_path}/recipe.yaml:8]" in message
    assert "parallel.pipline: unknown field; did you mean 'pipeline'?" in message
    assert "precision.dtype: must be one of 'fp32', 'bf16' or 'fp16', got the text 'fp8'" in message


def test_a_mistake_in_a_base_names_the_base(tmp_path):
    write(tmp_path, "model.yaml", "# a comment\nmodel:\n  vision: {image_size_px: 0}\n")
    message = refused(write(tmp_path, "recipe.yaml", "base: model.yaml\n" + MINIMAL))
    assert f"model.vision.image_size_px: must be above 0, got 0  [{tmp_path}/model.yaml:3]" in message


@pytest.mark.parametrize(
    "override,problem",
    [
        ("parallel.tensor='2'", "must be a whole number, got the text '2'"),
        ("parallel.tensor=true", "must be a whole number, got true"),
        ("parallel.tensor=2.0", "must be a whole number, got 2.0; write 2"),
        ("parallel.tensor=null", "must be a whole number, got null"),
        ("stages.0.steps=1e3", "write 1000"),
        ("run.deterministic=1", "must be true or false, got 1"),
        ("run.name=3", "must be text, got 3"),
        ("run.name=no", "must be text, got false"),
        ("stages.align.optimizer.lr=fast", "must be a number"),
        ("stages.align.optimizer.lr=-1", "must be above 0"),
        ("stages.align.optimizer.lr=.nan", "must be a finite number"),
        ("stages.align.optimizer.beta1=1.5", "must be below 1.0"),
        ("model=3", "must be a block"),
        ("stages=[]", "a list of at least 1"),
        ("stages=align", "must be a list"),
        ("data.sources=[a]", "must be a mapping"),
        ("model.vision.image_mean=[0.5]", "model.vision.image_mean"),
        ("parallel.sequence=true", "sequence=true needs tensor > 1"),
        ("stages.1.name=align", "two stages are called 'align'"),
        ("stages.align.mixture.pags=1.0", "'pags', which is not in data.sources"),
        ("stages.align.mixture.pages=-1", "stages[0].mixture.pages: must be at least 0.0, got -1"),
        ("stages.align.mixture.pages={max_epoch: 2}", "stages[0].mixture.pages.max_epoch: unknown field; did you mean 'max_epochs'?"),
        ("stages.align.mixture.pages.weigth=2", "did you mean 'weight'?"),
    ],
)
def test_wrong_values(recipe_file, override, problem):
    message = refused(recipe_file, override)
    assert problem in message
    assert "Value error" not in message and "pydantic" not in message
    if not problem.startswith(("two stages", "'pags'")):
        assert f"override {override!r}" in message


def test_a_missing_field(tmp_path):
    message = refused(write(tmp_path, "recipe.yaml", MINIMAL.replace("{dir: runs/x}", "{seed: 3}")))
    assert "run.dir: is missing" in message


# ---------------------------------------------------------------------------------------------------------------------- overrides


def test_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "parallel.tensor=2",
            "stages.tune.optimizer.lr=1e-3",
            "stages[0].steps=7",
            "stages.-1.mixture.text=2.5",
            "run.max_steps=5",
            "run.max_steps=null",
            "run.name=a=b",
            "run.dir='3'",
            "data.sources.new={path: data/new, tasks: [reading, counting]}",
            "model.vision={image_size_px: 56, hidden_size: 64, num_attention_heads: 4}",
            "evaluation.sources=[new]",
        ],
    )
    assert recipe.parallel.tensor == 2
    assert recipe.stages[1].optimizer.lr == 1e-3
    assert recipe.stages[0].steps == 7
    assert recipe.stages[1].mixture == {"pages": 1.0, "text": 2.5}
    assert recipe.run.max_steps is None
    assert (recipe.run.name, recipe.run.dir) == ("a=b", "3")
    assert recipe.data.sources["new"].tasks == ["reading", "counting"]
    assert (recipe.model.vision.image_size_px, recipe.model.vision.patch_size_px) == (56, 14)
    assert recipe.evaluation.sources == ["new"]


def test_a_later_override_wins_and_is_the_one_blamed(recipe_file):
    assert load_recipe(recipe_file, ["run.seed=1", "run.seed=2"]).run.seed == 2
    assert "override 'run.seed=x'" in refused(recipe_file, "run.seed=1", "run.seed=x")
    assert "override 'parallel={tensor: x}'" in refused(recipe_file, "parallel.tensor=2", "parallel={tensor: x}")


@pytest.mark.parametrize(
    "override,problem",
    [
        ("paralel.tensor=2", "did you mean 'parallel'?"),
        ("parallel.tensr=2", "did you mean 'tensor'?"),
        ("tensor=2", "did you mean 'parallel.tensor'?"),
        ("lr=1", "stages.<name>.optimizer.lr"),
        ("stages.tun.steps=2", "stages has no 'tun'; did you mean 'tune'? (2 there: align, tune)"),
        ("stages.2.steps=2", "stages has no '2'"),
        ("stages.tune.optimiser.lr=2", "did you mean 'optimizer'?"),
        ("data.sources.pages.pth=x", "did you mean 'path'?"),
        ("parallel.tensor.size=2", "parallel.tensor is a single value"),
        ("evaluation.sources.0=x", "evaluation.sources is empty"),
        ("parallel.tensor", "path=value"),
        ("=2", "path=value"),
        ("parallel.tensor=", "has no value"),
        ("parallel..tensor=2", "two dots"),
        ("run.name=[a", "not a YAML value"),
        ("base=x.yaml", "base: unknown field"),
    ],
)
def test_wrong_overrides(recipe_file, override, problem):
    message = refused(recipe_file, override)
    assert problem in message
    assert "1 mistakes" not in message


def test_every_field_can_be_reached_by_an_override(recipe_file):
    """A path that the schema has is never called unknown."""
    names = {"stages.<name>": "stages.0", "data.sources.<name>": "data.sources.pages", "vision_beside.<name>": "vision_beside.0"}
    paths = list(leaf_paths(Recipe))
    for general, one in names.items():
        paths = [path.replace(general, one) for path in paths]
    assert len(paths) > 100
    composition = read_composition(recipe_file)
    apply_overrides(composition, ["model.vision_beside=[{}]", *(f"{p}=17" for p in paths)], Recipe, "test")
    assert composition.values["stages"][0]["optimizer"]["lr"] == composition.values["data"]["sources"]["pages"]["path"] == 17


# ------------------------------------------------------------------------------------------------------------------ interpolation


def test_references_and_environment(recipe_file, monkeypatch):
    monkeypatch.setenv("MEGAVLM_TEST_ROOT", "/mnt/data")
    overrides = ["data.sources.pages.path=${oc.env:MEGAVLM_TEST_ROOT}/pages", "run.name=${stages.0.name}", "run.seed=${stages.0.steps}"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.data.sources["pages"].path == "/mnt/data/pages"
    assert (recipe.run.name, recipe.run.seed) == ("align", 10)
    assert load_recipe(recipe_file, ["run.name=${oc.env:MEGAVLM_TEST_UNSET,fallback}"]).run.name == "fallback"


@pytest.mark.parametrize(
    "value,problem",
    [
        ("${oc.env:MEGAVLM_TEST_UNSET}", "Environment variable 'MEGAVLM_TEST_UNSET' not found; set it"),
        ("${run.nme}", "'run.nme' not found"),
        ("${shell:ls}", "shell"),
        ("${run.name}", "run.name"),
        ("???", "give it a value"),
    ],
)
def test_interpolation_that_leads_nowhere(recipe_file, value, problem):
    message = refused(recipe_file, f"run.name={value}")
    assert problem in message and "run.name" in message and "Traceback" not in message


# ---------------------------------------------------------------------------------------------------------------------- dumping


def test_a_dumped_recipe_is_the_same_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["parallel.tensor=2", "stages.tune.optimizer.lr=3e-7", "run.name='a ${b} c'".replace("${", "\\${")])
    assert recipe.run.name == "a ${b} c"
    dump_recipe(recipe, tmp_path / "deep" / "out.yaml")
    assert load_recipe(tmp_path / "deep" / "out.yaml") == recipe
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.yaml"]


def test_a_dump_holds_every_default(recipe_file, tmp_path):
    dump_recipe(load_recipe(recipe_file), tmp_path / "out.yaml")
    plain = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert plain["stages"][0]["optimizer"]["beta2"] == 0.95
    assert plain["checkpoint"]["timeout_s"] == 600.0


TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(lambda t: t != "???")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TEXTS, lr=st.floats(1e-12, 1e3), seed=st.integers(-(2**60), 2**60), weight=st.floats(0.001, 1e6))
def test_any_values_survive_a_dump(recipe_file, tmp_path, name, lr, seed, weight):
    recipe = load_recipe(recipe_file)
    recipe.run.name, recipe.run.seed, recipe.stages[0].optimizer.lr, recipe.stages[0].mixture["pages"] = name, seed, lr, weight
    dump_recipe(recipe, tmp_path / "out.yaml")
    assert load_recipe(tmp_path / "out.yaml") == recipe


# ----------------------------------------------------------------------------------------------------------------- parts and values


def test_blocks_of_a_part(tmp_path):
    blocks = load_blocks(write(tmp_path, "model.yaml", "model: {projector: {num_layers: 1}}\nprecision: {dtype: fp32}\n"))
    assert blocks["model"].projector.num_layers == 1
    assert blocks["precision"].dtype == "fp32"
    with pytest.raises(RecipeError, match=r"model.projector.num_layer: unknown field; did you mean 'num_layers'"):
        load_blocks(write(tmp_path, "model.yaml", "model: {projector: {num_layer: 1}}\n"))
    with pytest.raises(RecipeError, match="modle: unknown field; did you mean 'model'"):
        load_blocks(write(tmp_path, "model.yaml", "modle: {projector: {num_layers: 1}}\n"))


def test_plain_values(recipe_file):
    values = OmegaConf.to_container(OmegaConf.load(recipe_file))
    assert parse_recipe(values, ["run.seed=3"]).run.seed == 3
    assert "seed" not in values["run"], "the caller's values are left alone"
    with pytest.raises(RecipeError, match="my test: run.sed: unknown field"):
        parse_recipe({**values, "run": {"dir": "x", "sed": 1}}, source="my test")


def test_schema_describes_every_field_of_the_recipe():
    from megavlm.config.jsonschema import recipe_schema

    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    parallel = schema["$defs"]["ParallelConfig"]
    assert parallel["properties"]["sequence"]["description"].startswith("Megatron sequence parallelism")
    assert parallel["additionalProperties"] is False
    assert "base" in schema["properties"] and "run" not in schema.get("required", [])


def test_overrides_reach_into_a_mixture(recipe_file):
    recipe = load_recipe(recipe_file, ["stages.align.mixture.pages.max_epochs=2"])
    entry = recipe.stages[0].mixture["pages"]
    assert (entry.weight, entry.max_epochs) == (1.0, 2.0), "the plain number becomes the entry's weight"
