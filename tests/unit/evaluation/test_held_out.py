"""The three conditions, measured on scripted models whose scores are known beforehand, through the real route of the data.

The models below see exactly what a real one sees: token ids and tiles.
"""

import itertools
import json
import types

import pytest
from PIL import Image

from megavlm.config.schema import DataConfig, ImageConfig, ModelConfig, Recipe, RunConfig, SourceConfig
from megavlm.data.chat import Chat
from megavlm.data.demo import make_demo
from megavlm.data.index import build_index
from megavlm.data.tokenizer import load_tokenizer
from megavlm.evaluation.held_out import evaluate, folder_sources, held_out_sources
from megavlm.evaluation.questions import EvaluationError, load_questions, swap_partners
from megavlm.inference import prompts
from megavlm.inference.load import LoadedModel

PAGE_PX = 48


class Scripted:
    """Looks like a LoadedModel; answers as `speak(question text, tiles or None)` says."""

    text = LoadedModel.text

    def __init__(self, recipe, speak):
        self.recipe, self.speak = recipe, speak
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        self.chat = Chat(recipe.data.chat_template, self.tokenizer)
        ctx = types.SimpleNamespace(rank=0, data_rank=0, grid=types.SimpleNamespace(data=1, world_size=1))
        self.model = types.SimpleNamespace(ctx=ctx)

    def generate(self, prompts, *, max_new_tokens):
        answers = []
        for prompt in prompts:
            asked = self.tokenizer.decode([i for i in prompt.ids if i != self.tokenizer.image_token_id])
            asked = asked.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>").strip()
            ids = [*self.tokenizer.encode(self.speak(asked, prompt.tiles_TCHW)).ids, self.chat.stop_ids[0]]
            answers.append(ids[:max_new_tokens])
        return answers


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, seed=3, num_train=40, num_held_out=60, page_px=PAGE_PX, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def recipe(demo):
    sources = {name: SourceConfig(path=str(demo / name), split="train") for name in ("pages", "multi", "text")}
    model = ModelConfig(vision={"image_size_px": PAGE_PX, "patch_size_px": 8}, language={"vocab_size": 1024})
    data = DataConfig(sources=sources, tokenizer=str(demo / "tokenizer.model"), seq_len_tokens=2048, image=ImageConfig())
    return Recipe.model_construct(run=RunConfig(dir="unused"), model=model, data=data, stages=[])


@pytest.fixture(scope="module")
def reader(recipe):
    """Knows every held-out page by its pixels: the model that looks, and reads without mistake."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    chat = Chat(recipe.data.chat_template, tokenizer)
    known = {}
    for name in ("pages", "multi"):
        source = recipe.data.sources[name].model_copy(update={"split": "heldout"})
        index = build_index(source, recipe.data, recipe.model, "multimodal", tokenizer, progress=False)
        for row in range(len(index)):
            sample = index.sample(row)
            pictures = [index.image(row, i) for i in range(len(sample.images))]
            prompt = prompts.make_prompt(prompts.question("?", len(pictures)), pictures, chat=chat, data=recipe.data, model=recipe.model)
            seen = prompt.tiles_TCHW.numpy().tobytes()
            for asked, said in itertools.pairwise(sample.messages):
                known[asked.content.replace("<image>\n", ""), seen] = said.content

    def speak(asked, tiles):
        return "?" if tiles is None else known.get((asked, tiles.numpy().tobytes()), "no such thing here")

    return speak


def measure(recipe, speak, names=("pages",), **changes):
    loaded = Scripted(recipe, speak)
    return evaluate(loaded, **{"sources": held_out_sources(recipe, names), "samples_per_task": 30, "progress": False, **changes})


def test_a_model_that_looks(recipe, reader):
    result = measure(recipe, reader, tasks=["reading", "counting", "caption"])
    assert [t.task for t in result.tasks] == ["caption", "counting", "reading"]
    for row in result.tasks:
        assert row.right_picture.value == 1
        assert row.swapped_picture.value == 0
        assert row.follows_swapped.value == 1, "a swapped page asks the same here, and is answered for what it shows"
        assert row.no_picture.value == 0


def test_grounding_is_measured_by_overlap(recipe, reader):
    def shifted(asked, tiles):
        said = reader(asked, tiles)
        if not said[0].isdigit():
            return said
        x0, y0, x1, y1 = (int(v) for v in said.split())
        shift = (y1 - y0) // 5 * (-1 if y0 >= (y1 - y0) // 5 else 1)  # IoU (5 - 1) / (5 + 1) = 0.67
        return f"{x0} {y0 + shift} {x1} {y1 + shift}"

    row = measure(recipe, shifted, tasks=["grounding"]).task("grounding")
    assert row.metric == "IoU >= 0.5"
    assert row.right_picture.value == 1
    assert row.swapped_picture.value == 0


def test_a_blind_model_scores_the_same_with_any_picture(recipe):
    result = measure(recipe, lambda asked, tiles: "3", tasks=["counting"], samples_per_task=1000)
    row = result.task("counting")
    assert 0 < row.right_picture.value < 0.5
    assert row.right_picture == row.no_picture == row.swapped_picture
    counts = [a.reference for a in result.answers if a.condition == "no picture"]
    n = len(counts)
    assert row.chance == pytest.approx(sum(a == b for a, b in itertools.permutations(counts, 2)) / (n * (n - 1)))


def test_several_pictures_and_text_only(recipe, reader):
    result = measure(recipe, reader, names=("multi", "text"), samples_per_task=12)
    several = result.task("several")
    assert several.right_picture.value == 1
    assert several.swapped_picture.value == 0
    text = result.task("layout")
    assert text.right_picture.total > 0
    assert text.swapped_picture.total == text.no_picture.total == 0
    assert text.chance is None


def test_partners_would_be_wrong_and_are_the_same_every_time(recipe):
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    questions = load_questions(
        held_out_sources(recipe, ["pages", "multi"]), recipe.data, recipe.model, tokenizer, tasks=None, per_task=20, seed=1
    )
    partners = swap_partners(questions, seed=1)
    assert partners == swap_partners(questions, seed=1) != swap_partners(questions, seed=2)
    assert any(p is not None for p in partners)
    for mine, partner in zip(questions, partners, strict=True):
        if partner is not None:
            other = questions[partner]
            assert (mine.task, mine.num_pictures) == (other.task, other.num_pictures)
            assert not mine.accepts(other.reference)


def test_a_conversation_is_asked_its_first_question_only(recipe):
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    questions = load_questions(
        held_out_sources(recipe, ["multi"]), recipe.data, recipe.model, tokenizer, tasks=["turns"], per_task=20, seed=1
    )
    for question in questions:
        assert [m["role"] for m in question.messages] == ["user"]
        assert question.reference == question.index.sample(question.row).messages[1].content


def test_files_and_table(recipe, reader, tmp_path):
    result = measure(recipe, reader, tasks=["reading", "grounding"], out=tmp_path, samples_per_task=9)
    table = result.table()
    assert len({line.index("IoU") for line in table.splitlines() if "IoU" in line}) == 1
    assert len(table.splitlines()) == 4
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["tasks"][1]["task"] == "reading"
    assert values["tasks"][1]["right_picture"] == {"count": 9, "total": 9, "value": 1.0}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 9 * 3
    assert sum(line["right"] for line in lines) == 18
    page = Image.open(tmp_path / "pictures.png")
    assert len(page.getcolors(1 << 24)) > 100


def test_a_picture_that_cannot_be_read_is_named(recipe, reader, monkeypatch):
    from megavlm.data.index import SampleIndex

    monkeypatch.setattr(SampleIndex, "image", lambda self, row, number: b"not a picture")
    with pytest.raises(EvaluationError, match=r"shard-0.*tar: sample 'heldout-.*' ?: its picture cannot be read"):
        measure(recipe, reader)


def test_what_cannot_be_measured_is_refused(recipe, demo):
    with pytest.raises(EvaluationError, match="no data source pagez; it has multi, pages, text"):
        held_out_sources(recipe, ["pagez"])
    with pytest.raises(EvaluationError, match="no data to measure on"):
        measure(recipe, str, names=())
    with pytest.raises(EvaluationError, match=r"no sample of task singing in .*pages; there are caption"):
        measure(recipe, str, sources=folder_sources([demo / "pages"], "heldout"), tasks=["singing"])
    with pytest.raises(EvaluationError, match="samples_per_task=0"):
        measure(recipe, str, samples_per_task=0)
