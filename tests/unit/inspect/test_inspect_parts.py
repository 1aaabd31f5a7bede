"""Parts of the page by themselves: token texts, the mask's pixels, where a grid lies; and the statistics against the indexes."""

import base64
import io
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from megavlm.cli.main import main
from megavlm.config import load_recipe
from megavlm.config.data import ImageConfig
from megavlm.data.inspect.opened import open_stage
from megavlm.data.inspect.pictures import grid_frame, mask_uri
from megavlm.data.inspect.tokens import token_pieces
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes; `tidy` strips spaces when decoding, as some do."""

    def __init__(self, tidy=False):
        self.tidy = tidy

    def decode(self, ids, skip_special=False):
        text = bytes(ids).decode(errors="replace")
        return text.strip() if self.tidy else text


@pytest.mark.parametrize("words", ["plain", "déjà vu 数字 🙂!", "🙂"])
def test_pieces_are_whole_characters_and_add_up(words):
    pieces = token_pieces(Bytes(), list(words.encode()))
    assert [p.text for p in pieces] == list(words)
    assert [i for p in pieces for i in p.ids] == list(words.encode())


def test_pieces_of_a_tokenizer_that_tidies_up_are_the_true_text():
    (piece,) = token_pieces(Bytes(tidy=True), list(b"a b"))
    assert piece.text == "a b" and piece.ids == tuple(b"a b")


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mask_is_block_diagonal(is_causal):
    lengths = [5, 1, 10, 4]
    uri = mask_uri(lengths, [0, 1, 2, None], np.zeros(20, dtype=bool), is_causal=is_causal)
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))[..., 3]
    block = np.kron(np.eye(4), np.ones((1, 1)))[np.repeat(range(4), lengths)][:, np.repeat(range(4), lengths)].astype(bool)
    assert ((alpha > 0) == (np.tril(block) if is_causal else block)).all()


@pytest.mark.parametrize(
    "image, expected",
    [
        ({"policy": "fixed"}, (0, 0, 1, 1)),
        ({"policy": "tiles", "max_tiles": 4}, (0, 0, 1, 1)),
        ({"policy": "fixed", "fit": "crop"}, (0.25, 0, 0.75, 1)),
        ({"policy": "fixed", "fit": "pad"}, (0, -0.5, 1, 1.5)),
    ],
)
def test_where_the_grid_lies_over_a_wide_picture(image, expected):
    frame = grid_frame(ImageConfig(**image), 200, 100, 48, 48)
    assert (frame.x0, frame.y0, frame.x1, frame.y1) == pytest.approx(expected)


def test_statistics_agree_with_the_indexes(tmp_path, capsys):
    data = make_tiny_data(tmp_path / "data")
    recipe = tiny_recipe(tmp_path / "run", data, [tiny_stage("mixed", steps=20)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with pytest.raises(SystemExit) as done:
        main(["data", "stats", str(tmp_path / "recipe.yaml"), "--steps", "20", "--out", str(tmp_path / "stats")])
    assert not done.value.code
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    (found,) = json.loads((tmp_path / "stats" / "stats.json").read_text())["stages"]
    opened = open_stage(load_recipe(tmp_path / "recipe.yaml"), 0, progress=False)
    for name, index in opened.indexes.items():
        source = found["sources"][name]
        assert source["samples"] == len(index) == sum(source["length"]["counts"]) == sum(source["tasks"].values())
        assert source["tokens_per_epoch"] == index.length_tokens.sum()
        assert source["realised_share"] == pytest.approx(source["target_share"], abs=0.05)
    assert sum(s["realised_share"] for s in found["sources"].values()) == pytest.approx(1)
    assert len(found["steps"]) == found["num_planned_steps"] == 20
    assert found["mean_fill"] == pytest.approx(np.mean([s["pack_fill"] for s in found["steps"]]))
    assert re.search(r"fill \d+\.\d+ %", "\n".join(lines))
    pixels = np.asarray(Image.open(tmp_path / "stats" / "mixed.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
