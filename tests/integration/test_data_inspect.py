"""`megavlm data inspect` in a real browser: the page is whole, runs without an error and shows what the plan holds."""

import io
import re
import shutil
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from megavlm.cli.main import main
from megavlm.config import load_recipe
from megavlm.data.inspect.opened import open_stage
from megavlm.data.inspect.step import plan_step
from megavlm.data.shards import ShardWriter
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code or 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny recipe of three objectives; one more source has a text that would run if it could, and a picture that cannot be read."""
    folder = tmp_path_factory.mktemp("inspect")
    data = make_tiny_data(folder / "data")
    file = io.BytesIO()
    Image.fromarray(np.full((30, 70, 3), (200, 30, 30), dtype=np.uint8)).save(file, "PNG")
    with ShardWriter(folder / "odd") as writer:
        for i in range(8):
            turns = [{"role": "user", "content": f"<image>\nSay {SCRIPT}"}, {"role": "assistant", "content": f"{SCRIPT} {i}"}]
            writer.write(f"odd-{i}", {"task": "odd", "split": "train", "messages": turns}, [file.getvalue()])
    _spoil(folder / "odd" / "shard-00000.tar", "odd-3.0.png")
    stages = [
        tiny_stage("mixed", packs_per_step=4, mixture={"pages": 0.4, "text": 0.3, "odd": 0.3}),
        {**tiny_stage("labels", packs_per_step=2, mixture={"patches": 1}), "objective": "vision_classification", "num_classes": 11},
        {**tiny_stage("words", packs_per_step=2, mixture={"text": 1}), "objective": "text"},
    ]
    stages[1] |= {"projector": {"train": "frozen"}, "language": {"train": "frozen"}, "images_per_pack": 5}
    sources = {"odd": {"path": str(folder / "odd")}}
    recipe = tiny_recipe(folder / "run", data, stages, data={"sources": sources, "seq_len_tokens": 512})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return folder


def _spoil(shard, name):
    """Cut the picture's pixels out, keep its header: it is indexed, and cannot be decoded."""
    with tarfile.open(shard) as tar:
        member = tar.getmember(name)
    with open(shard, "r+b") as file:
        file.seek(member.offset_data + 40)
        file.write(b"\0" * (member.size - 40))


def browse(page, *flags):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--v=0", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def page(folder):
    assert run("data", "inspect", folder / "recipe.yaml", "--step", 2, "--dp", 2, "--packs", 4, "--out", folder / "page.html") == 0
    return folder / "page.html"


@pytest.fixture(scope="module")
def plan(folder):
    return plan_step(open_stage(load_recipe(folder / "recipe.yaml"), 0, progress=False), 2, 2)


def test_the_page_holds_the_plan_and_nothing_from_outside(page, plan):
    html = page.read_text(encoding="utf-8")
    packs = [pack for rank in plan.assignment for group in rank for pack in group]
    assert html.count('<section class="pack"') == html.count('<div class="row overview"') == len(packs) == 4
    assert html.count('<article class="sample"') == sum(len(p.samples) for p in packs)
    assert html.count('<div class="row rank"') == 2
    targets = [int(n) for n in re.findall(r"<span>[\d,]+ tokens, (\d+) of them targets</span>", html)]
    assert sum(targets) == sum(p.num_targets for p in packs)
    pictures = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) visual tokens</span>", html)]
    assert pictures
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", html), "the page asks for something outside it"
    assert "@import" not in html and "url(" not in html


def test_texts_of_the_data_are_shown_and_never_run(page):
    html = page.read_text(encoding="utf-8")
    assert html.count("<script>") == 1 and "<img src=x" not in html
    shown = re.sub(r"<[^>]*>", "", html)
    assert "&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;" in shown


def test_an_unreadable_picture_is_shown_as_such(folder, capsys):
    """Whichever of the first steps holds it."""
    pages = []
    for step in range(4):
        assert run("data", "inspect", folder / "recipe.yaml", "--step", step, "--packs", 4, "--out", folder / "bad.html") == 0
        pages.append((folder / "bad.html").read_text(encoding="utf-8"))
    (html, *_) = [p for p in pages if '<div class="problem">' in p]
    problem = re.search(r'<article class="sample"(?:(?!</article>).)*<div class="problem">.*?</article>', html, re.DOTALL).group()
    assert "odd-3" in problem and "loss weight is 0" in problem and 'class="unread"' in problem
    assert '<span class="muted">' in problem and '<span class="target">' not in problem
    assert "seg lost" in html


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_chromium_shows_it(page, plan):
    done = browse(page, "--dump-dom")
    assert done.returncode == 0, done.stderr
    dom, packs = done.stdout, [pack for rank in plan.assignment for group in rank for pack in group]
    assert 'data-ready="1"' in dom and 'data-errors="0"' in dom, "the page's script did not end"
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>step 2 of mixed" in dom, "a text of the data ran"
    assert dom.count('class="sample"') == sum(len(p.samples) for p in packs)
    assert dom.count('<section class="pack"') == len(packs)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_screenshot_has_the_colours_of_what_is_shown(page, tmp_path, dark):
    picture = tmp_path / "page.png"
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = browse(page, f"--screenshot={picture}", "--window-size=1300,1800", "--force-device-scale-factor=1", *flags)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (1800, 1300, 3)
    counts = Counter(map(tuple, pixels.reshape(-1, 3)))
    paper, target, vision = ((20, 23, 26), (18, 62, 47), (229, 154, 60)) if dark else ((251, 250, 247), (211, 242, 227), (224, 138, 30))
    assert counts.most_common(1)[0][0] == paper or counts[paper] > 0.2 * pixels.shape[0] * pixels.shape[1]
    assert counts[target] > 200, "supervised tokens have their background"
    assert counts[vision] > 500, "the encoder's share of the work is drawn"
    assert len(counts) > 300, "pictures, text and packs make many colours"


@pytest.mark.parametrize("stage, holds", [("labels", 'class="over labels"'), ("words", '<span class="target">')])
def test_other_objectives(folder, stage, holds):
    assert run("data", "inspect", folder / "recipe.yaml", "--stage", stage, "--out", folder / f"{stage}.html") == 0
    html = (folder / f"{stage}.html").read_text(encoding="utf-8")
    assert holds in html and html.count('<section class="pack"') == 2
    assert ("visual tokens</span>" in html) is False


@pytest.mark.parametrize(
    "image, holds",
    [
        ({"policy": "fixed", "fit": "crop"}, "one tile"),
        ({"policy": "tiles", "max_tiles": 4, "thumbnail": True}, "2 tiles x 1 and the whole picture"),
        ({"policy": "anyres", "anyres_grids": [[1, 2], [2, 1]]}, "2 tiles x 1 after the whole picture"),
        ({"policy": "native"}, "patches x "),
    ],
    ids=lambda v: v["policy"] if isinstance(v, dict) else "",
)
def test_every_picture_policy(folder, image, holds):
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["data"]["image"] = image
    values["data"]["seq_len_tokens"] = 1024
    values["stages"] = [{**values["stages"][0], "mixture": {"odd": 1}, "packs_per_step": 1}]
    (folder / "policy.yaml").write_text(yaml.safe_dump(values))
    assert run("data", "inspect", folder / "policy.yaml", "--out", folder / "policy.html") == 0
    html = (folder / "policy.html").read_text(encoding="utf-8")
    assert holds in html and len(re.findall('class="picture[ "]', html)) == html.count('class="grid"') + html.count('class="unread"') > 0


def test_mistakes_are_told_in_one_message(folder, capsys):
    def refused(*arguments):
        assert run("data", "inspect", folder / "recipe.yaml", *arguments) == 2
        return capsys.readouterr().err

    assert "did you mean 'mixed'?" in refused("--stage", "mixd")
    assert "stage 'mixed' has 5 steps, 0 to 4" in re.sub(r"[\s│]+", " ", refused("--step", 5))
    assert "cannot be dealt out to 3 ranks" in re.sub(r"[\s│]+", " ", refused("--dp", 3))
    assert "nowhere" in refused("data.tokenizer=nowhere.model")
