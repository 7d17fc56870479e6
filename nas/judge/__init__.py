"""Judging trained denoisers: the checker, Fréchet distances, CLIP score, speed, and the teacher at the same seeds."""

from nas.judge.comparing import Comparison, Metric, Row, compare, grid, psnr_db, write_png
from nas.judge.decoding import DecoderScores, decoder_scores
from nas.judge.frechet import Statistics, frechet_distance, statistics
from nas.judge.networks import ClipScore, InceptionDistance, load_clip, load_inception, read_pictures
from nas.judge.pipelines import EmbeddedPipeline, LatentPipeline, Pipeline, pipeline_of
from nas.judge.scoring import Speed, drawn, drawn_and_timed, scores
from nas.judge.shapes_features import drawings, reference, shapes_distance, shapes_statistics

__all__ = [
    "ClipScore",
    "Comparison",
    "DecoderScores",
    "EmbeddedPipeline",
    "InceptionDistance",
    "LatentPipeline",
    "Metric",
    "Pipeline",
    "Row",
    "Speed",
    "Statistics",
    "compare",
    "decoder_scores",
    "drawings",
    "drawn",
    "drawn_and_timed",
    "frechet_distance",
    "grid",
    "load_clip",
    "load_inception",
    "pipeline_of",
    "psnr_db",
    "read_pictures",
    "reference",
    "scores",
    "shapes_distance",
    "shapes_statistics",
    "statistics",
    "write_png",
]
