"""`megavlm train` on a recipe whose `init` block names Hugging Face folders: model, tokenizer and pictures are theirs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.hf import config_from_hf, export_hf, start_from
from megavlm.checkpoint.hf.config import quiet_transformers
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.config import load_recipe
from megavlm.config.schema import InitConfig, ModelConfig, ParallelConfig
from megavlm.data.chat import Chat
from megavlm.data.tokenizer import load_tokenizer
from megavlm.models.weights import sharded_tensors
from megavlm.parallel.context import enter_grid
from megavlm.testing.families.case import randomise
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.testing.tiny import tiny_chunks
from megavlm.tracking.metrics import read_metrics

ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
WORD_EMBEDDINGS = "language.embedding.word_embeddings.weight"


def text_config(tf: Any, vocabulary: int) -> Any:
    return tf.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )


def save(model: Any, folder: Path) -> None:
    torch.manual_seed(5)
    randomise(model, 0.1)
    model.save_pretrained(folder)


def make_folders(root: Path, tokenizer_file: Path) -> None:
    """llava/ with all that a downloaded model has; clip/ with both towers; llama/ without an image token's embedding."""
    tf = quiet_transformers()
    tf.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(tokenizer_file)
    text, vision = text_config(tf, tokenizer.vocab_size), tf.CLIPVisionConfig(**ENCODER)
    save(
        tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id)
        ),
        root / "llava",
    )
    tokenizer.save_hf(root / "llava", Chat("megavlm", tokenizer).jinja())
    (root / "llava" / "generation_config.json").write_text('{"temperature": 0.25}')
    side = {"height": 48, "width": 48}
    processor = {"do_resize": True, "size": side, "do_center_crop": False, "do_pad": True, "image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    (root / "llava" / "preprocessor_config.json").write_text(json.dumps(processor))
    small_text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    save(tf.CLIPModel(tf.CLIPConfig(vision_config=vision.to_dict(), text_config=small_text, projection_dim=16)), root / "clip")
    crop = {"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": side, "image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(crop))
    save(tf.LlamaForCausalLM(text_config(tf, tokenizer.vocab_size)), root / "llama")
    tokenizer.save_hf(root / "llama", Chat("megavlm", tokenizer).jinja())


@pytest.fixture(scope="module")
def folders(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    pool.run(make_folders, root, data_dir / "tokenizer.model")
    return root


def write_recipe(run: Path, data_dir: Path, init: dict[str, str], **changes: Any) -> Path:
    """A recipe that says nothing of the model; `changes` replace blocks."""
    values = tiny_recipe(run, data_dir, [tiny_stage(steps=2, vision={"train": "frozen"})]).model_dump(mode="json", exclude_defaults=True)
    for name in ("tokenizer", "image"):
        values["data"].pop(name, None)
    values = {**values, "init": init, **changes}
    if "model" not in changes:
        values.pop("model", None)
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of `megavlm ...` in this process."""
    from megavlm.cli.main import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), shown.getvalue()


def train(pool: RankPool, recipe: Path, *changes: str, world_size: int = 1) -> None:
    results = pool.run(command, ["train", str(recipe), *changes], world_size=world_size)
    assert [code for code, _ in results] == [0] * world_size, "".join(text for _, text in results)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_a_whole_model_brings_everything_and_goes_out_with_its_texts(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llava", tmp_path / "llava")
    recipe = write_recipe(tmp_path / "run", data_dir, {"from_hf": str(tmp_path / "llava")})
    train(pool, recipe, "parallel.tensor=2", world_size=2)
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.model == config_from_hf(tmp_path / "llava").model_copy(update={"init_std": saved.model.init_std})
    assert (saved.data.tokenizer, saved.data.chat_template, saved.data.image.fit) == (str(tmp_path / "llava"), "megavlm", "pad")
    assert saved.data.image_token == "<image>" and saved.model.vision.image_mean == (0.5, 0.5, 0.5)
    # The saved recipe repeats the run, in another layout too.
    train(pool, tmp_path / "run" / "recipe.yaml", f"run.dir={tmp_path / 'again'}", "parallel.tensor=1")
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    pool.run(export_hf, tmp_path / "run", tmp_path / "out")
    for name in ("generation_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "llava" / name).read_bytes(), name
    before, after = tensors(tmp_path / "llava"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("vision_tower."), f"{name}: only the encoder is frozen"


def test_a_run_answers_as_its_export_does(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    """End tokens and penalty of generation_config.json, which goes from the folder into the run and on into the export."""
    shutil.copytree(folders / "llava", tmp_path / "llava")
    (tmp_path / "llava" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17], "repetition_penalty": 1.3}))
    recipe = write_recipe(tmp_path / "run", data_dir, {"from_hf": str(tmp_path / "llava")})
    train(pool, recipe, "run.max_steps=1")
    pool.run(export_hf, tmp_path / "run", tmp_path / "out")
    for folder in (tmp_path / "run", next((tmp_path / "run" / "checkpoints").glob("0*")), tmp_path / "out"):
        penalty, ends = pool.run(answering, folder)[0]
        assert (penalty, ends) == (1.3, True), folder


def answering(folder: Path) -> tuple[float, bool]:
    from megavlm.inference.load import load_for_inference

    model = load_for_inference(folder)
    return model.repetition_penalty, 17 in model.chat.stop_ids


def test_an_fp16_folder_is_cast_to_the_recipes_precision(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llava", tmp_path / "llava")
    halves = {name: tensor.half() for name, tensor in tensors(folders / "llava").items()}
    save_file(halves, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    recipe = write_recipe(tmp_path / "run", data_dir, {"from_hf": str(tmp_path / "llava")})
    train(pool, recipe, "run.max_steps=1")
    pool.run(export_hf, tmp_path / "run", tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert after.keys() == halves.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    for name, tensor in halves.items():
        if name.startswith("vision_tower."):  # frozen
            assert torch.equal(after[name], tensor.float()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_another_way_to_cut_pictures_gets_a_processor_of_its_own(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run", data_dir, {"from_hf": str(folders / "llava")})
    train(pool, recipe, "data.image.fit=crop", "run.max_steps=1")
    pool.run(export_hf, tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert written["image_processor"]["do_center_crop"] is True
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folders / "llava" / "tokenizer.json").read_bytes()


def test_an_encoder_and_a_language_model_become_a_llava(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    init = {"vision_from_hf": str(folders / "clip"), "language_from_hf": str(folders / "llama")}
    model = {"init_std": 0.1, "vision": {"feature_layer": -1}}
    recipe = write_recipe(tmp_path / "run", data_dir, init, model=model)
    language = "stages.all.language.train=frozen"
    train(pool, recipe, language)
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.model.vision.feature_layer == -1 and saved.model.vision.hidden_size == 32 and saved.data.image.fit == "crop"
    pool.run(export_hf, tmp_path / "run", tmp_path / "out")
    tf = quiet_transformers()
    hf, info = tf.AutoModelForImageTextToText.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert type(hf).__name__ == "LlavaForConditionalGeneration"
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(tf.AutoProcessor.from_pretrained(str(tmp_path / "out"))).__name__ == "LlavaProcessor"
    out, clip, llama = tensors(tmp_path / "out"), tensors(folders / "clip"), tensors(folders / "llama")
    for name, tensor in out.items():
        if name.startswith("vision_tower."):
            assert torch.equal(tensor, clip["vision_model." + name.removeprefix("vision_tower.")]), name
        elif name.startswith("language_model."):
            assert torch.equal(tensor, llama[name.removeprefix("language_model.")]), name
    assert any(name.startswith("multi_modal_projector.") for name in out)
    # Two tensor ranks start from the same numbers.
    train(pool, recipe, language, f"run.dir={tmp_path / 'two'}", "parallel.tensor=2", world_size=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_two_encoders_side_by_side_start_from_two_folders(pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path) -> None:
    both = [str(folders / "clip"), str(folders / "clip")]
    recipe = write_recipe(tmp_path / "run", data_dir, {"language_from_hf": str(folders / "llama")}, model={"vision_beside": [{}, {}]})
    ((code, message),) = pool.run(command, ["train", str(recipe), f"init.vision_from_hf=[{','.join(both)}]"])
    assert code == 2 and "names 2 folders, and model has 3 encoders" in message
    recipe = write_recipe(tmp_path / "run", data_dir, {"language_from_hf": str(folders / "llama"), "vision_from_hf": both})
    train(pool, recipe, "run.max_steps=1")
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert [encoder.hidden_size for encoder in saved.model.vision_beside] == [32]
    clip = tensors(folders / "clip")
    reader = CheckpointReader(next((tmp_path / "run" / "checkpoints").glob("0*")))
    for key in ("vision.final_norm.weight", "vision.beside_0.final_norm.weight"):
        assert torch.equal(reader.tensor(key), clip["vision_model.post_layernorm.weight"]), key


def started(folder: Path, layout: dict[str, Any], rows: int) -> torch.Tensor:
    """The embedding of a model that starts from a folder, with a vocabulary of `rows`, as this rank holds it."""
    model = config_from_hf(folder)
    model = ModelConfig.model_validate(
        model.model_dump() | {"language": model.language.model_dump() | {"vocab_size": rows}, "init_std": 0.3}
    )
    parallel = ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks = tiny_chunks(model, ctx, parallel)
    start_from(chunks, InitConfig(from_hf=str(folder)), model, 3, ctx)
    return next(t.data.detach().clone() for t in sharded_tensors(chunks, ctx) if t.key == WORD_EMBEDDINGS)


def test_rows_of_new_tokens_are_drawn_alike_in_every_layout(pool: RankPool, folders: Path) -> None:
    theirs = tensors(folders / "llava")["language_model.model.embed_tokens.weight"]
    rows = len(theirs) + 9
    whole = pool.run(started, folders / "llava", {}, rows)[0]
    assert torch.equal(whole[: len(theirs)], theirs)
    new = whole[len(theirs) : rows]
    assert 0.2 < float(new.std()) < 0.4
    assert not whole[rows:].any()
    halves = pool.run(started, folders / "llava", {"tensor": 2}, rows, world_size=2)
    assert torch.equal(torch.cat(halves)[:rows], whole[:rows])


MISTAKES: list[tuple[dict[str, str], list[str], list[str]]] = [
    ({"from_hf": "nowhere"}, [], ["nowhere", "no such folder"]),
    ({"from_hf": "{llava}"}, ["model.language.num_layers=5"], ["model.language.num_layers=5 (the folder has 4)"]),
    ({"from_hf": "{llava}"}, ["model.language.vocab_size=9"], ["model.language.vocab_size=9 (the folder has"]),
    ({"from_hf": "{llava}"}, ["model.vision.hidden_sise=9"], ["hidden_sise", "hidden_size"]),
    ({"from_hf": "{clip}"}, [], ["model_type='clip' is none of the families here"]),
    ({"vision_from_hf": "{llama}", "language_from_hf": "{llama}"}, [], ["model_type='llama' is none of the encoders here"]),
    ({"vision_from_hf": "{clip}", "language_from_hf": "{llava}"}, [], ["is a whole llava", "use init.from_hf"]),
    ({"from_hf": "{llava}", "vision_from_hf": "{clip}"}, [], ["from_hf is a whole model"]),
    ({"from_hf": "{damaged}"}, [], ["model.safetensors is damaged"]),
    ({"from_hf": "{damaged}"}, ["--dry-run"], ["model.safetensors is damaged"]),
    ({"vision_from_hf": "{clip}"}, [], ["init.language_from_hf is missing", "data.tokenizer"]),
    (
        {"language_from_hf": "{wordless}"},
        ["model.text_only=true"],
        ["is empty: init.language_from_hf=", "wordless has no tok"],
    ),
    ({"from_hf": "{pickles}"}, [], ["pickles, which can run code"]),
    ({}, ["model.init_from=x"], ["unknown field: it is init.from_hf now"]),
]


@pytest.mark.parametrize(("init", "changes", "words"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes_end_with_one_message_and_code_2(
    init: dict[str, str], changes: list[str], words: list[str], pool: RankPool, folders: Path, data_dir: Path, tmp_path: Path
) -> None:
    damaged, pickles = tmp_path / "damaged", tmp_path / "pickles"
    shutil.copytree(folders / "llava", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(folders / "llava", pickles)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    shutil.copytree(folders / "llama", tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    names = {name: str(folders / name) for name in ("llava", "clip", "llama")}
    names |= {name: str(tmp_path / name) for name in ("damaged", "pickles", "wordless")}
    recipe = write_recipe(tmp_path / "run", data_dir, {key: value.format(**names) for key, value in init.items()})
    ((code, message),) = pool.run(command, ["train", str(recipe), *changes])
    assert code == 2, message
    assert message.count("megavlm: error: ") == 1 and "Traceback" not in message
    for word in words:
        assert word in message
