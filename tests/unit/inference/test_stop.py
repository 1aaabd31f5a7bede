"""Stop strings end an answer wherever its tokens are cut, and never show; the penalty on repetition is Hugging Face's."""

import pytest
import torch

from megavlm.inference.sampling import GenerationError, Sampler, Sampling
from megavlm.inference.stop import StopStrings
from megavlm.inference.stream import TextStream

PIECES = {1: "The ", 2: "cat", 3: " sa", 4: "t\nUs", 5: "er: ", 6: "!", 7: "\ufffd"}


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def test_a_stop_string_over_several_tokens_ends_the_answer():
    stop = StopStrings(["\nUser:"], decode)
    assert [stop.is_over(0, [1, 2, 3, 4, 5][:n]) for n in range(1, 6)] == [False, False, False, False, True]
    assert stop.cut(decode([1, 2, 3, 4, 5])) == "The cat sat"
    assert StopStrings([], decode).cut("all") == "all"
    with pytest.raises(GenerationError, match="empty"):
        StopStrings(["a", ""], decode)


def test_what_may_be_its_beginning_is_held_back_and_shown_when_it_is_not():
    shown = []
    stream = TextStream(decode, shown.append, StopStrings(["\nUser:", "cats"], decode))
    for token in (1, 2):
        stream.add(token)
    assert "".join(shown) == "The ", "cat may become cats"
    for token in (3, 4):
        stream.add(token)
    assert "".join(shown) == "The cat sat"
    stream.add(6)
    assert "".join(shown) == "The cat sat\nUs!"
    ended = []
    stream = TextStream(decode, ended.append, StopStrings(["\nUser:"], decode))
    for token in (1, 2, 3, 4, 5):
        stream.add(token)
    stream.close()
    assert "".join(ended) == "The cat sat"


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_penalty_equals_hugging_face(penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    prompts = [[3, 5, 5, 9], [1], [7, 2]]
    sampler, hf = Sampler(Sampling(repetition_penalty=penalty)), RepetitionPenaltyLogitsProcessor(penalty)
    for i, prompt in enumerate(prompts):
        sampler.start(i, prompt)
    for _ in range(30):
        logits = torch.randn(3, 60, generator=generator) * 2
        expected = [int(hf(torch.tensor([ids]), logits[i : i + 1]).argmax()) for i, ids in enumerate(prompts)]
        assert sampler.next_tokens(logits, [0, 1, 2]).tolist() == expected
        for ids, token in zip(prompts, expected, strict=True):
            ids.append(token)


def test_a_penalty_that_is_no_number_is_refused():
    for value in (0.0, -1.0, float("inf")):
        with pytest.raises(GenerationError, match="repetition_penalty"):
            Sampling(repetition_penalty=value)


def test_a_token_beyond_the_head_is_no_candidate():
    """Mllama's image token has an embedding and no logit: a prompt with a picture holds it."""
    sampler, without = Sampler(Sampling(repetition_penalty=1.3)), Sampler(Sampling(repetition_penalty=1.3))
    sampler.start(0, [3, 60, 5])
    without.start(0, [3, 5])
    for seed in range(5):
        logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(seed))
        assert sampler.next_tokens(logits, [0]).tolist() == without.next_tokens(logits, [0]).tolist()
