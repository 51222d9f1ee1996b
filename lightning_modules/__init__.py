"""One file a method: LightningModules with their roles and their training step."""

from lightning_modules.adversarial_post_training import AdversarialPostTraining
from lightning_modules.base import FewStepModule
from lightning_modules.consistency_distillation import ConsistencyDistillation
from lightning_modules.diffusion_training import DiffusionTraining
from lightning_modules.frame_adversary import FrameAdversary
from lightning_modules.motion_consistency_distillation import MotionConsistencyDistillation
from lightning_modules.phased_consistency_distillation import PhasedConsistencyDistillation
from lightning_modules.roles import Pretrained
from lightning_modules.steering import Steering
from lightning_modules.training_free_guidance import TrainingFreeGuidance

__all__ = [
    "AdversarialPostTraining",
    "ConsistencyDistillation",
    "DiffusionTraining",
    "FewStepModule",
    "FrameAdversary",
    "MotionConsistencyDistillation",
    "PhasedConsistencyDistillation",
    "Pretrained",
    "Steering",
    "TrainingFreeGuidance",
]
