"""Cached generation against the plain way: run the whole sequence again for every token, one sequence at a time."""

import pytest
import torch

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.inference.generate import PromptError, generate
from megavlm.models.init import initialise
from megavlm.models.vlm import VisionLanguageModel
from megavlm.testing.in_rank import in_rank

IMAGE = 3
VOCABULARY = 101


def build(ctx) -> VisionLanguageModel:
    small = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    config = ModelConfig(
        init_std=0.25,
        vision={**small, "image_size_px": 8, "patch_size_px": 4},
        language={**small, "vocab_size": VOCABULARY, "num_query_groups": 2, "max_positions": 256},
    )
    built = VisionLanguageModel(config, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx)
    initialise([built], config, 0, ctx)
    return built


def prompts(model, num_images=(0, 1, 2, 0, 1)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for i, images in enumerate(num_images):
        text = torch.randint(5, VOCABULARY, (3 + 5 * i,), generator=generator).tolist()
        placeholders = [IMAGE] * (images * model.model.visual_tokens_per_tile)
        tiles = torch.randint(0, 256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8) if images else None
        made.append(Prompt([text[0], *placeholders, *text[1:]], tiles))
    return made


@torch.no_grad()
def next_logits(model, prompt: Prompt, answer: list[int]) -> torch.Tensor:
    batch = prompt_batch([Prompt([*prompt.ids, *answer], prompt.tiles_TCHW)], IMAGE, model.model)
    # Placeholders may only stand in the prompt: an answer may contain the image token's id as plain text.
    batch.image_positions_N = batch.image_positions_N[batch.image_positions_N < len(prompt.ids)]
    return model.language.logits(model.transform(batch, model.packing(batch)))[-1]


def uncached(model, prompt: Prompt, count: int, stop_ids=()) -> list[int]:
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stop_ids):
        answer.append(int(next_logits(model, prompt, answer).argmax()))
    return answer


def run(model, batch, **changes):
    return generate(model, batch, **{"max_new_tokens": 40, "stop_ids": [], "image_token_id": IMAGE, **changes})


@in_rank
def test_greedy_equals_running_everything_again(ctx):
    model = build(ctx)
    batch = prompts(model)
    answers = run(model, batch, max_new_tokens=100)  # grows the cache past its first block
    assert answers == [uncached(model, p, 100) for p in batch]
    assert len({tuple(a) for a in answers}) == len(answers), "answers that are all alike prove nothing"


@in_rank
def test_pictures_matter_and_stay_with_their_prompt(ctx):
    model = build(ctx)
    batch = prompts(model)
    swapped = [Prompt(batch[1].ids, batch[4].tiles_TCHW), *batch[2:]]
    assert run(model, swapped)[0] != run(model, batch[1:])[0]
    assert run(model, batch[::-1]) == run(model, batch)[::-1]


@in_rank
def test_sequences_end_at_stop_tokens_and_the_others_go_on(ctx):
    model = build(ctx)
    batch = prompts(model)
    free = run(model, batch)
    stops = [free[0][3], free[2][10], free[4][0]]
    expected = [uncached(model, p, 40, stops) for p in batch]
    answers = run(model, batch, stop_ids=stops)
    assert answers == expected
    assert len({len(a) for a in answers}) > 2
    assert answers[4] == [free[4][0]]


@in_rank
def test_streaming_gives_the_same_tokens_in_order(ctx):
    model = build(ctx)
    seen: dict[int, list[int]] = {}
    answers = run(model, prompts(model), on_token=lambda i, t: seen.setdefault(i, []).append(t))
    assert [seen[i] for i in range(len(answers))] == answers


@in_rank
def test_samples_do_not_depend_on_neighbours_and_repeat_with_the_seed(ctx):
    model = build(ctx)
    batch = prompts(model)
    free = run(model, batch, temperature=1.0, seed=7)
    stops = [free[1][2]]
    ended = run(model, batch, temperature=1.0, seed=7, stop_ids=stops)
    for whole, short in zip(free, ended, strict=True):
        assert whole[: len(short)] == short
    assert run(model, batch[:1], temperature=1.0, seed=7)[0] == free[0]
    split = run(model, batch[:1], temperature=1.0, seed=7) + run(model, batch[1:], temperature=1.0, seed=7, first_number=1)
    assert split == free, "a list in two batches"
    assert run(model, batch[:1] * 2, temperature=1.0, seed=7)[1] != free[0], "the same prompt again draws anew"
    assert run(model, batch, temperature=1.0, seed=8) != free
    assert run(model, batch, temperature=1.0, top_k=1, seed=8) == run(model, batch)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_k": -2}, "top_k=-2"),
        ({"top_k": 5}, "set a temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
@in_rank
def test_values_out_of_range_are_refused(ctx, change, says):
    model = build(ctx)
    with pytest.raises(ValueError, match=says):
        run(model, prompts(model), **change)


@in_rank
def test_prompts_that_do_not_fit_are_refused(ctx):
    model = build(ctx)
    good = prompts(model)
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        run(model, [good[0], Prompt([])])
    with pytest.raises(PromptError, match=r"together 265, but model.language.max_positions=256"):
        run(model, [Prompt([7] * 225)])
    with pytest.raises(PromptError, match="5 image placeholders .* 1 tiles make 4 visual tokens"):
        run(model, [Prompt([7, *[IMAGE] * 5], good[1].tiles_TCHW)])
    with pytest.raises(PromptError, match=r"shape \(1, 3, 9, 9\)"):
        run(model, [Prompt([7, *[IMAGE] * 4], torch.zeros(1, 3, 9, 9, dtype=torch.uint8))])
    with pytest.raises(PromptError, match="vocabulary has 101 rows"):
        run(model, [Prompt([7, 101])])


@in_rank
def test_the_model_stays_in_its_mode(ctx):
    model = build(ctx)
    model.train()
    run(model, prompts(model)[:1], max_new_tokens=1)
    assert model.training
