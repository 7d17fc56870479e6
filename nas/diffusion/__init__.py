"""Schedules, parameterisations and their conversions, denoisers, sampling.

Every model here is a denoiser in rectified flow's terms, x_t = (1 - t) x0 + t eps: whatever schedule a network was
trained on and whatever it predicts, it is asked at (x, t) for a velocity or a clean image, so objectives and samplers
never ask which. Legend: B batch, C channels, H W height and width, T text tokens, D text width.
"""

from nas.diffusion.conditioning import Conditioning
from nas.diffusion.denoisers import Denoiser, FlowDenoiser, NativeDenoiser, Preconditioner
from nas.diffusion.sampling import guided, sample, sample_few, start_noise
from nas.diffusion.schedules import (
    FLOW,
    TIMESTEPS,
    Coefficients,
    Prediction,
    Schedule,
    clean_and_noise,
    convert,
    noised,
    rectified_flow,
    sample_times,
    to_rectified_flow,
    to_variance_preserving,
    variance_preserving,
)

__all__ = [
    "FLOW",
    "TIMESTEPS",
    "Coefficients",
    "Conditioning",
    "Denoiser",
    "FlowDenoiser",
    "NativeDenoiser",
    "Preconditioner",
    "Prediction",
    "Schedule",
    "clean_and_noise",
    "convert",
    "guided",
    "noised",
    "rectified_flow",
    "sample",
    "sample_few",
    "sample_times",
    "start_noise",
    "to_rectified_flow",
    "to_variance_preserving",
    "variance_preserving",
]
