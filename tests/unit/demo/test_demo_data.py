"""The demonstration data, read back with plain tarfile, json and Pillow and recomputed from the labelled boxes."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from megavlm.config.load import load_recipe
from megavlm.data import demo, demo_samples
from megavlm.data.demo import DemoError, demo_contact_sheet, make_demo
from megavlm.data.demo_pages import INK_LEVEL, PageMaker, PlacedDigit, ScanLibrary
from megavlm.data.demo_talk import WORDS, layout_of
from megavlm.data.tokenizer import load_tokenizer

PAGE_PX = 48
RECIPE = Path(__file__).parents[3] / "configs/recipes/quickstart.yaml"


def read_back(folder: Path) -> list[tuple[dict[str, Any], list[Image.Image]]]:
    """Samples with their pictures, without any code of the project."""
    found = []
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name in (n for n in members if n.endswith(".json")):
            sample = json.loads(members[name])
            found.append((sample, [Image.open(io.BytesIO(members[i["file"]])) for i in sample.get("images", [])]))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, seed=3, num_train=240, num_held_out=160, page_px=PAGE_PX)
    return folder


@pytest.fixture(scope="module")
def samples(made: Path) -> dict[str, list[tuple[dict[str, Any], list[Image.Image]]]]:
    return {source: read_back(made / source) for source in demo.SOURCES}


def digits_of(sample: dict[str, Any], image: int = 0) -> list[dict[str, Any]]:
    return [o for o in sample["objects"] if o["image"] == image]


def read_row(objects: list[dict[str, Any]]) -> str:
    return "".join(str(o["label"]) for o in sorted(objects, key=lambda o: o["box_px"][0]))


def expected(question: str, objects: list[dict[str, Any]]) -> str:
    """The right answer about one page, from its labelled boxes alone."""
    if question.startswith("Which number"):
        return read_row(objects)
    if question.startswith("How many"):
        return str(len(objects))
    if question.startswith("Describe"):
        labels = sorted(o["label"] for o in objects)
        return f"{len(labels)} digit{'s' * (len(labels) > 1)}: {' '.join(map(str, labels))}"
    assert question == "Where is the number?"
    x0, y0, x1, y1 = zip(*(o["box_px"] for o in objects), strict=True)
    box = (min(x0), min(y0), max(x1), max(y1))
    return " ".join(f"{round(v / PAGE_PX * 999):03d}" for v in box)


def test_answers_follow_from_the_labelled_boxes(samples: dict[str, Any]) -> None:
    tasks = defaultdict(int)
    for sample, pictures in samples["pages"] + samples["multi"]:
        tasks[sample["task"]] += 1
        assert [p.size for p in pictures] == [(PAGE_PX, PAGE_PX)] * len(pictures) and all(p.mode == "RGB" for p in pictures)
        assert all((i["width"], i["height"]) == (PAGE_PX, PAGE_PX) for i in sample["images"])
        users, answers = ([m["content"] for m in sample["messages"] if m["role"] == role] for role in ("user", "assistant"))
        assert users[0].startswith("<image>\n" * len(pictures)) and sum(u.count("<image>") for u in users) == len(pictures)
        asked = users[0].rsplit("<image>\n", 1)[1]
        page = int(asked.split()[-1].rstrip("?")) - 1 if sample["task"] == "several" else 0
        for question, answer in zip([asked, *users[1:]], answers, strict=True):
            assert answer == expected(question, digits_of(sample, page)), sample
        if sample["task"] == "grounding":
            assert " ".join(f"{v:03d}" for v in sample["meta"]["answer"]) == answers[0]
        elif sample["task"] != "turns":
            assert sample["meta"]["answer"] == answers[0]
    assert set(tasks) == {"caption", "reading", "counting", "grounding", "turns", "several"} and min(tasks.values()) >= 100


def test_boxes_hold_the_ink(samples: dict[str, Any]) -> None:
    maker, rng = PageMaker("train", PAGE_PX), np.random.default_rng(0)
    for page in [maker.crowded(rng) for _ in range(50)] + [maker.row([1, 2, 3], rng) for _ in range(50)]:
        outside = page.ink_HW.copy()
        for x0, y0, x1, y1 in (d.box_px for d in page.digits):
            inside = page.ink_HW[y0:y1, x0:x1] > 0.85 * INK_LEVEL
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # tight on all four sides
            outside[y0:y1, x0:x1] = 0
        assert outside.max() <= INK_LEVEL
    # In the written pictures ink is darker than paper.
    for sample, (picture,) in samples["patches"][:50]:
        grey = np.asarray(picture.convert("L"), dtype=float)
        paper = np.ones_like(grey, dtype=bool)
        for x0, y0, x1, y1 in (o["box_px"] for o in sample["objects"]):
            paper[int(y0) : int(y1), int(x0) : int(x1)] = False
        for x0, y0, x1, y1 in (o["box_px"] for o in sample["objects"]):
            assert grey[int(y0) : int(y1), int(x0) : int(x1)].min() < np.median(grey[paper]) - 25


def test_held_out_pages_use_held_out_scans_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = (set(ScanLibrary(split).indices_N.tolist()) for split in ("train", "heldout"))
    assert not train & held_out and len(train | held_out) == 1797 and len(held_out) == 300
    # Scans are replaced by marks that tell the split: a full square for held-out ones, a dot for the others.
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    marks = np.zeros_like(images).reshape(-1, 8, 8)
    marks[:, 3:5, 3:5] = 16
    marks[sorted(held_out)] = 16
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (marks.reshape(-1, 64), labels))
    demo_samples._maker.cache_clear()
    try:
        make_demo(tmp_path, num_train=40, num_held_out=40, page_px=PAGE_PX)
    finally:
        demo_samples._maker.cache_clear()
    seen = set()
    for source in ("pages", "multi", "patches"):
        for sample, _ in read_back(tmp_path / source):
            for x0, y0, x1, y1 in (o["box_px"] for o in sample["objects"]):
                seen.add(sample["split"])
                large = max(x1 - x0, y1 - y0) >= 9
                assert large == (sample["split"] == "heldout"), sample
    assert seen == {"train", "heldout"}


def test_chance_is_what_the_manifest_says(made: Path) -> None:
    chance = demo.read_manifest(made).chance  # type: ignore[union-attr]
    answers = defaultdict(list)
    for name in (demo_samples.SampleName("pages", "heldout", i) for i in range(1000)):
        talk = demo_samples._talk(name, 0, PAGE_PX)
        answers[talk.task].append(talk.answer)
    rng = np.random.default_rng(0)
    for task in ("reading", "counting"):
        given = np.array(answers[task])
        same = np.mean([np.mean(given == given[rng.permutation(len(given))]) for _ in range(100)])
        assert same == pytest.approx(chance[task], rel=0.4), task


def test_text_is_told_in_the_pictures_language(samples: dict[str, Any], made: Path) -> None:
    tasks = {sample["task"] for sample, _ in samples["text"]}
    assert tasks == {"layout", "spelling", "ordering", "arithmetic", "length"}
    assert not any(sample.get("images") or pictures for sample, pictures in samples["text"])
    tokenizer = load_tokenizer(made / "tokenizer.model")
    for word in WORDS:
        assert len(tokenizer.encode(f" {word}").ids) == 1, word
    told = next(s["messages"][0]["content"].split("\n")[0] for s, _ in samples["text"] if s["task"] == "layout")
    assert len(tokenizer.encode(told).ids) == len(told.split()) == (PAGE_PX // 8) ** 2
    for sample, _ in samples["text"] + samples["pages"]:
        for message in sample["messages"]:
            assert tokenizer.decode(tokenizer.encode(message["content"]).ids) == message["content"]


def test_a_layout_names_the_digit_that_covers_a_cells_centre() -> None:
    page = PageMaker("train", 40).row([7], np.random.default_rng(0))
    # Centres lie at 4, 12, 20, 28, 36: the box holds 12 and 20 across, and 4 alone down (its lower edge is exclusive).
    object.__setattr__(page, "digits", (PlacedDigit(7, (5, 3, 21, 12)),))
    cells = layout_of(page, 40).split()
    assert [i for i, cell in enumerate(cells) if cell == "seven"] == [1, 2] and set(cells) == {"seven", "-"}
    assert PlacedDigit(0, (0, 10, 20, 40)).box_per_mille(40) == (0, 250, 500, 999)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_settings_same_bytes_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"seed": 5, "num_train": 24, "num_held_out": 8, "page_px": 40}
    make_demo(tmp_path / "one", **size, num_workers=1)
    monkeypatch.setattr(demo, "_PARALLEL_FROM", 0)
    make_demo(tmp_path / "two", **size, num_workers=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_made_once_and_anew_only_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"num_train": 16, "num_held_out": 8, "page_px": 40}
    first = make_demo(tmp_path, seed=1, **size)
    before = bytes_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_sources", lambda *_: pytest.fail("made again"))
        assert make_demo(tmp_path, seed=1, **size) == first
    second = make_demo(tmp_path, seed=2, **size)
    after = bytes_of(tmp_path)
    assert second != first and set(after) == set(before)
    assert before["pages/shard-00000.tar"] != after["pages/shard-00000.tar"]


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"num_train": 16, "num_held_out": 8, "page_px": 40}
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_sentencepiece", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path, **size)
    assert demo.read_manifest(tmp_path) is None and not (tmp_path / "pages").exists()
    make_demo(tmp_path, **size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "multi", "pages", "patches", "text", "tokenizer.model"]


def test_foreign_folders_and_senseless_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    with pytest.raises(DemoError, match="holds pages but no manifest.json"):
        make_demo(tmp_path, num_train=16, num_held_out=8)
    (tmp_path / "manifest.json").write_text('{"name": "something else"}')
    with pytest.raises(DemoError, match="not a manifest"):
        make_demo(tmp_path, num_train=16, num_held_out=8)
    for wrong, message in (
        ({"page_px": 50}, "page_px=50"),
        ({"page_px": 32}, "page_px=32"),
        ({"num_train": 3}, "num_train=3"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(DemoError, match=message):
            make_demo(tmp_path / "new", **wrong)  # type: ignore[arg-type]
    with pytest.raises(DemoError, match="no demonstration data"):
        demo_contact_sheet(tmp_path / "new", tmp_path / "sheet.png")


def test_contact_sheet_shows_pages_and_boxes(made: Path, tmp_path: Path) -> None:
    demo_contact_sheet(made, tmp_path / "sheet.png", per_source=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), dtype=int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60) & (sheet[..., 2] < 60)
    assert red.sum() > 500 and sheet.shape[1] == 4 * PAGE_PX * 4 * 3 // 2


def test_the_quickstart_recipe_fits_its_data(made: Path, samples: dict[str, Any]) -> None:
    recipe = load_recipe(RECIPE)
    model, tokenizer = recipe.model, load_tokenizer(made / "tokenizer.model")
    assert model.vision.image_size_px == PAGE_PX == make_demo.__kwdefaults__["page_px"]
    assert tokenizer.vocab_size <= model.language.vocab_size
    classification = next(s for s in recipe.stages if s.objective == "vision_classification")
    labels = {o["label"] for sample, _ in samples["patches"] for o in sample["objects"]}
    assert labels == set(range(10)) and classification.num_classes == 11
    longest = max(
        sum(len(tokenizer.encode(m["content"]).ids) + 2 for m in sample["messages"]) + len(pictures) * (model.visual_tokens_per_tile - 1)
        for source in ("pages", "multi", "text")
        for sample, pictures in samples[source]
    )
    assert longest <= min(recipe.data.seq_len_tokens, model.language.max_positions)
