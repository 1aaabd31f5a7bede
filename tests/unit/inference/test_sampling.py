"""The next token's distribution: Hugging Face's filters are the oracle, frequencies are counted."""

import pytest
import torch

from megavlm.inference.sampling import Sampler, Sampling, filtered_logits


def test_sampled_frequencies_follow_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0, -1.0]])
    sampler = Sampler(Sampling(temperature=0.7))
    drawn = torch.cat([sampler.next_tokens(logits, [0]) for _ in range(4000)])
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    assert (frequency - (logits[0] / 0.7).softmax(-1)).abs().max() < 0.03
    assert frequency[2] == 0


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.5, 0, 1.0), (1.0, 7, 1.0), (1.3, 0, 0.6), (0.8, 20, 0.9), (1.0, 0, 0.01)])
def test_filters_equal_hugging_face(temperature, top_k, top_p):
    from transformers.generation import logits_process as hf

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = hf.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    ours = filtered_logits(logits, Sampling(temperature, top_k, top_p))
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.allclose(ours.softmax(-1), expected.softmax(-1))
