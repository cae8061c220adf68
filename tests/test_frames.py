"""Frames and their times, against the extractor and the subsampling themselves."""

from __future__ import annotations

import pytest
import torch

from asrkit import frames
from asrkit.data.features import fbank
from asrkit.nn.conformer import Subsampling, subsampled_lens


def test_the_constants() -> None:
    assert (frames.FRAME_SHIFT, frames.ENCODER_SHIFT, frames.ENCODER_SHIFT_MS) == (0.01, 0.04, 40.0)
    assert (frames.LOOK_AHEAD, frames.LOOK_AHEAD_MS) == (3, 37.5)


@pytest.mark.parametrize("num_samples", [400, 1119, 1120, 1199, 1200, 1201, 16000, 23456])
def test_feature_frames_of_a_recording(num_samples: int) -> None:
    assert len(fbank(torch.randn(num_samples))) == frames.count_features(num_samples / frames.SAMPLE_RATE)


def test_encoder_frames_of_feature_frames() -> None:
    subsampling = Subsampling(80, (2, 2), 4)
    for length in range(frames.RECEPTIVE_FIELD, 30):
        out, _ = subsampling(torch.randn(1, length, 80), torch.tensor([length]))
        assert out.shape[1] == frames.count_encoder_frames(length) == int(subsampled_lens(torch.tensor(length)))
    assert frames.count_encoder_frames(frames.RECEPTIVE_FIELD) == 1
    assert [frames.count_encoder_frames(length) for length in (0, 2, 6)] == [0, 0, 0]
    for count in range(1, 9):
        window = frames.count_window(count)
        assert frames.count_encoder_frames(window) == count and frames.count_encoder_frames(window - 1) == count - 1


def test_an_encoder_frame_is_centered_on_the_sound_it_sees() -> None:
    """The first and the last sample that change encoder frame t lie as far from its center on either side."""
    torch.manual_seed(0)
    # Positive weights, so that nothing that goes in gets lost in a ReLU.
    subsampling = Subsampling(80, (2, 2), 4).double()
    for parameter in subsampling.parameters():
        parameter.data.abs_()
    samples = 0.1 * torch.randn(16000)

    def encode(samples: torch.Tensor) -> torch.Tensor:
        features = fbank(samples)[None].double() + 20.0
        with torch.no_grad():
            return subsampling(features, torch.tensor([features.shape[1]]))[0][0]

    whole = encode(samples)

    def changes(sample: int, frame: int) -> bool:
        other = samples.clone()
        other[sample] += 0.5
        return not torch.equal(encode(other)[frame], whole[frame])

    for frame in (5, 10):
        first, last = 640 * frame - 120, 640 * frame + 6 * 160 + 279
        assert changes(first + 2, frame) and not changes(first - 2, frame)
        assert changes(last - 2, frame) and not changes(last + 2, frame)
        center = (first + last + 1) / 2 / frames.SAMPLE_RATE
        assert frames.encoder_center(frame) == pytest.approx(center) == pytest.approx(0.04 * frame + 0.035)
        start, end = frames.encoder_start(frame), frames.encoder_start(frame + 1)
        assert (start + end) / 2 == pytest.approx(center) and end - start == pytest.approx(0.04)
