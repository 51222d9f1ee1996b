"""Metrics of a set of samples, mostly against a reference: streaming and rank-independent."""

from fewstep.metrics.base import (
    Features,
    Metric,
    Samples,
    Statistics,
    numbers_of,
    to_uint8,
)
from fewstep.metrics.classifiers import ClassAccuracy, GuideAndJudge
from fewstep.metrics.clip import CLIPFeatures, CLIPFrechetDistance, CLIPScore, FrameConsistency
from fewstep.metrics.clip_networks import ClipFrechetDistance, ClipNetwork
from fewstep.metrics.collecting import Collection, collect, merged, share_features
from fewstep.metrics.digit_classifier import DigitClassifierFeatures
from fewstep.metrics.digit_readers import digit_reader
from fewstep.metrics.dino import DINOv2Features, FDDINOv2
from fewstep.metrics.fid import FID, SFID, FrameFID
from fewstep.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance
from fewstep.metrics.i3d import FVD, I3DFeatures
from fewstep.metrics.inception import InceptionFeatures
from fewstep.metrics.inception_score import InceptionScore
from fewstep.metrics.kid import KID
from fewstep.metrics.lpips import LPIPSDiversity, LPIPSFeatures, PairedLPIPS
from fewstep.metrics.means import Means
from fewstep.metrics.motion import MotionDifference, MotionFlow, RAFTFeatures
from fewstep.metrics.moving_digits import Sharpness, WatermarkEnergy
from fewstep.metrics.nearest_data import NearestDataDistance
from fewstep.metrics.pairs import Consistency, PairedDistance, PairedPSNR
from fewstep.metrics.precision_recall import PrecisionRecall
from fewstep.metrics.random_video import RandomVideoFeatures
from fewstep.metrics.ranks import Ranks
from fewstep.metrics.references import ReferenceStore
from fewstep.metrics.rows import Rows
from fewstep.metrics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from fewstep.metrics.tracks import EndError, TrackAcceleration, TrackError, tracks
from fewstep.metrics.video_mae import FrechetVideoMAE, VideoMAEFeatures
from fewstep.metrics.wanted_modes import WantedModes

__all__ = [
    "FID",
    "FVD",
    "KID",
    "SFID",
    "CLIPFeatures",
    "CLIPFrechetDistance",
    "CLIPScore",
    "ClassAccuracy",
    "ClipFrechetDistance",
    "ClipNetwork",
    "Collection",
    "Consistency",
    "DINOv2Features",
    "DigitClassifierFeatures",
    "EndError",
    "FDDINOv2",
    "Features",
    "FrameConsistency",
    "FrameFID",
    "FrechetDistance",
    "FrechetVideoMAE",
    "GaussianStatistics",
    "GuideAndJudge",
    "I3DFeatures",
    "InceptionFeatures",
    "InceptionScore",
    "LPIPSDiversity",
    "LPIPSFeatures",
    "Means",
    "Metric",
    "MotionDifference",
    "MotionFlow",
    "NearestDataDistance",
    "PairedDistance",
    "PairedLPIPS",
    "PairedPSNR",
    "PrecisionRecall",
    "RAFTFeatures",
    "RandomVideoFeatures",
    "Ranks",
    "ReferenceStore",
    "Rows",
    "Samples",
    "Sharpness",
    "SlicedWasserstein",
    "Statistics",
    "TrackAcceleration",
    "TrackError",
    "VideoMAEFeatures",
    "WantedModes",
    "WatermarkEnergy",
    "collect",
    "digit_reader",
    "frechet_distance",
    "merged",
    "numbers_of",
    "share_features",
    "sliced_wasserstein",
    "to_uint8",
    "tracks",
]
