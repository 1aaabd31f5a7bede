"""Our path against transformers' own, on held-out samples: a random model in a folder that transformers itself wrote."""

import json
import shutil

import pytest
import torch
import transformers

from megavlm.checkpoint.hf import TokenIds, config_to_hf
from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig
from megavlm.data.chat import Chat
from megavlm.data.demo import make_demo
from megavlm.data.tokenizer import load_tokenizer
from megavlm.evaluation.hf_agreement import AgreementError, compare_with_hf
from megavlm.evaluation.questions import load_questions
from megavlm.inference.load import load_for_inference
from megavlm.testing.in_rank import in_rank

PAGE_PX = 48


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, seed=3, num_train=8, num_held_out=16, page_px=PAGE_PX, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    made = tmp_path_factory.mktemp("hf")
    tokenizer = load_tokenizer(demo / "tokenizer.model")
    small = {"num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64}
    model = ModelConfig(
        vision={**small, "image_size_px": PAGE_PX, "patch_size_px": 8, "hidden_size": 32},
        language={**small, "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "max_positions": 512},
    )
    config = transformers.LlavaConfig(**config_to_hf(model, TokenIds(image=tokenizer.image_token_id)))
    torch.manual_seed(0)
    hf = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + ("norm" in name and name.endswith("weight")))
    hf.save_pretrained(made)
    jinja = Chat("megavlm", tokenizer).jinja()
    tokenizer.save_hf(made, jinja)
    images = transformers.CLIPImageProcessor(
        size={"height": PAGE_PX, "width": PAGE_PX},
        do_center_crop=False,
        image_mean=model.vision.image_mean,
        image_std=model.vision.image_std,
    )
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=transformers.AutoTokenizer.from_pretrained(made),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=jinja,
    )
    processor.save_pretrained(made)
    return made


def questions(demo, loaded, names=("pages", "multi", "text"), per_task=2):
    sources = {name: SourceConfig(path=str(demo / name), split="heldout") for name in names}
    data = DataConfig(tokenizer=str(demo / "tokenizer.model"), seq_len_tokens=2048)
    return load_questions(sources, data, loaded.recipe.model, loaded.tokenizer, tasks=None, per_task=per_task, seed=0)


@in_rank
def test_logits_answers_and_pixels_agree(demo, folder, ctx, tmp_path):
    loaded = load_for_inference(folder, ctx=ctx)
    asked = questions(demo, loaded)
    assert {min(q.num_pictures, 2) for q in asked} == {0, 1, 2}
    found = compare_with_hf(loaded, folder, asked)
    assert found.max_logit_difference <= 1e-4 * max(1.0, max(s.max_logit for s in found.samples))
    assert found.max_pixel_difference <= 1e-5
    assert found.num_same_answers == len(asked)
    assert len({s.ours for s in found.samples}) > 1
    assert found.example.question in found.summary()
    found.write(tmp_path)
    assert len(json.loads((tmp_path / "hf_agreement.json").read_text())["samples"]) == len(asked)
    assert (tmp_path / "hf_agreement.png").stat().st_size > 1000


@in_rank
def test_another_weight_shows(demo, folder, ctx):
    loaded = load_for_inference(folder, ctx=ctx)
    with torch.no_grad():
        loaded.model.projector.linear_1.bias += 0.05
    found = compare_with_hf(loaded, folder, questions(demo, loaded, ["pages"], 1), max_new_tokens=1)
    assert found.max_logit_difference > 1e-3


@in_rank
def test_other_tokens_are_refused(demo, folder, ctx):
    loaded = load_for_inference(folder, ctx=ctx)
    with pytest.raises(AgreementError, match="the first difference is at"):
        compare_with_hf(loaded._replace(chat=_lower(loaded)), folder, questions(demo, loaded, ["pages"], 1))


def _lower(loaded):
    """A chat that differs from the folder's template in one letter."""

    class Lower(Chat):
        def encode_prompt(self, messages, tokens_per_image):
            return super().encode_prompt([{**m, "content": m["content"].lower()} for m in messages], tokens_per_image)

    return Lower("megavlm", loaded.tokenizer)


@in_rank
def test_bf16_is_refused(demo, folder, ctx):
    loaded = load_for_inference(folder, ctx=ctx, dtype="bf16")
    with pytest.raises(AgreementError, match="load it with dtype='fp32'"):
        compare_with_hf(loaded, folder, questions(demo, loaded, ["pages"], 1))


@in_rank
def test_a_folder_speaks_its_own_template(demo, folder, ctx, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    parts = "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    turns = (
        "{% for m in messages %}"
        + "{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        + parts
        + "{% endif %}<|end|>"
    )
    foreign = turns + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "hf" / "chat_template.jinja").write_text(foreign)
    loaded = load_for_inference(tmp_path / "hf", ctx=ctx)
    ours = loaded.prompt("What?").ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": "What?"}], add_generation_prompt=True, return_dict=False
    )
    assert ours == theirs and ours != load_for_inference(folder, ctx=ctx).prompt("What?").ids
