"""Augmentation against physics computed in the power domain, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardprep_trainer.learning.augment import Augment, mix, reverberate, smooth_curve

ALL: dict[str, Any] = {
    "reverb": 0.5,
    "channel": 1.0,
    "babble": 0.5,
    "noise": 0.5,
    "time_masks": 2,
    "freq_masks": 2,
}
EACH = [{key: ALL[key]} for key in ALL]


def segments(batch: int = 4, frames: int = 50, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 40, generator=generator) * 2.5 - 6


@given(snr=st.floats(-5, 30), lengths=st.lists(st.integers(1, 50), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_mixing_adds_powers_at_the_ratio_asked_for(snr: float, lengths: list[int]) -> None:
    mel, other = segments(3).double(), segments(3, seed=1).double() + 9
    mask = torch.arange(50) < torch.tensor(lengths)[:, None]
    mixed = mix(mel, other, torch.full((3, 1, 1), snr, dtype=torch.float64), mask)
    for b, length in enumerate(lengths):
        speech = mel[b, :length].exp()
        added = mixed[b, :length].exp() - speech
        ratio = 10 * math.log10(speech.mean() / added.mean())
        assert ratio == pytest.approx(snr, abs=1e-6)
        gain = (added / other[b, :length].exp()).log()
        assert gain.max() - gain.min() < 1e-6


def test_a_room_is_the_convolution_of_powers_with_its_decay() -> None:
    mel = segments(2, frames=60).double()
    seconds = torch.tensor([0.2, 0.6], dtype=torch.float64).view(2, 1, 1)
    found = reverberate(mel, seconds)
    for b, time in enumerate((0.2, 0.6)):
        decay = [10 ** (-6 * 0.01 * k / time) for k in range(40)]
        for t in (0, 1, 17, 59):
            power = sum(
                decay[k] / sum(decay) * mel[b, t - k].exp() for k in range(40) if t - k >= 0
            )
            torch.testing.assert_close(found[b, t], torch.log(power), atol=1e-9, rtol=0)


def test_a_room_lets_a_sound_die_away_in_its_time() -> None:
    mel = torch.full((1, 60, 40), -20.0)
    mel[0, 10] = 5.0
    room = reverberate(mel, torch.full((1, 1, 1), 0.3))
    fall = (room[0, 11] - room[0, 21]).mean() * 10 / math.log(10)
    # 60 dB in 0.3 s are 20 dB in the 10 frames of 10 ms.
    assert fall.item() == pytest.approx(20.0, abs=0.1)


def test_a_channel_adds_one_smooth_curve_to_all_frames_of_a_segment() -> None:
    mel = segments()
    change = Augment(channel=1.0).train()(mel) - mel
    assert (change - change[:, :1]).abs().max() < 1e-5
    assert (change[0, 0] - change[1, 0]).abs().max() > 0.1
    curve = change[:, 0]
    assert (curve[:, 1:] - curve[:, :-1]).abs().max() < 0.25 * (curve.max() - curve.min())


def test_curves_have_the_deviation_that_is_told() -> None:
    torch.manual_seed(0)
    ends = smooth_curve(torch.zeros(4000, 1, 40), 6)[:, 0, [0, -1]]
    assert ends.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("options", [*EACH, ALL], ids=lambda o: "+".join(o))
def test_it_is_a_function_of_the_seed_and_rests_in_evaluation(options: dict[str, Any]) -> None:
    augment, mel = Augment(**options).train(), segments(8)
    before = mel.clone()
    torch.manual_seed(3)
    first = augment(mel)
    torch.manual_seed(3)
    assert torch.equal(augment(mel), first)
    assert not torch.equal(augment(mel), first)
    assert torch.equal(mel, before)
    assert not torch.equal(first, mel)
    assert first.isfinite().all()
    assert torch.equal(augment.eval()(mel), mel)


@pytest.mark.parametrize("options", [*EACH, ALL], ids=lambda o: "+".join(o))
def test_valid_frames_do_not_depend_on_what_padding_holds(options: dict[str, Any]) -> None:
    augment, lengths = Augment(**options).train(), torch.tensor([50, 20, 35, 1])
    valid = torch.arange(50) < lengths[:, None]
    results = []
    for value in (-20.0, -3.0):
        mel = segments().masked_fill(~valid.unsqueeze(2), value)
        torch.manual_seed(1)
        results.append(augment(mel, lengths)[valid])
    if "babble" in options:
        # The padding of another segment may be mixed in: silence, as it is stored.
        assert results[0].isfinite().all()
    else:
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_hidden_spans_hold_the_mean_of_their_bin_and_are_no_wider_than_told() -> None:
    torch.manual_seed(0)
    mel = segments(200)
    changed = Augment(time_masks=1, time_width=7).train()(mel)
    hidden = (changed != mel).all(2)
    assert 5 <= hidden.sum(1).max() <= 7
    mean = mel.mean(1, keepdim=True).expand_as(mel)
    torch.testing.assert_close(changed[hidden], mean[hidden])
    edges = (hidden[:, 1:] != hidden[:, :-1]).sum(1)
    assert edges.max() <= 2
    bins = Augment(freq_masks=1, freq_width=5).train()(mel) != mel
    assert bins.all(1).sum(1).max() == 5


@pytest.mark.parametrize(("name", "share"), [("reverb", 0.25), ("babble", 0.5), ("noise", 0.75)])
def test_shares_are_shares_of_the_segments(name: str, share: float) -> None:
    torch.manual_seed(0)
    mel = segments(2000, frames=3)
    changed = (Augment(**{name: share}).train()(mel) != mel).any(2).any(1)
    assert changed.double().mean().item() == pytest.approx(share, abs=0.05)


def test_a_single_segment_and_an_empty_batch_pass() -> None:
    augment = Augment(**ALL).train()
    assert augment(segments(1)).shape == (1, 50, 40)
    assert augment(segments()[:0]).shape == (0, 50, 40)
