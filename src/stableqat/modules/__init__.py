"""Training systems: LightningModules around quantized Llama-family models and vision transformers."""

from stableqat.modules.base import QATModule
from stableqat.modules.llama import LlamaModule
from stableqat.modules.parallel import DDPStrategy, FSDP2Strategy
from stableqat.modules.schedule import CosineWarmup
from stableqat.modules.sizing import SizedAdamW
from stableqat.modules.teacher import Distillation
from stableqat.modules.vit import ViTModule

__all__ = [
    "CosineWarmup",
    "DDPStrategy",
    "Distillation",
    "FSDP2Strategy",
    "LlamaModule",
    "QATModule",
    "SizedAdamW",
    "ViTModule",
]
