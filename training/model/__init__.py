"""The network: vision, backbone, action expert, and the insulation between them."""

from training.model.expert import (
    LONGEST_PERIOD,
    SHORTEST_PERIOD,
    AdaRMSNorm,
    Conditioning,
    Expert,
    empty_actions,
    time_periods,
)
from training.model.gemma import MLP, GemmaConfig, Projections, RMSNorm, Rotation, rotate
from training.model.initialization import order_action_tokens, order_embeddings
from training.model.sampling import (
    FAULTS,
    FlowSampler,
    RegressionSampler,
    Sampler,
    SamplerName,
    TokenSampler,
    last_tokens,
)
from training.model.siglip import LayerNorm, VisionConfig, VisionLayer
from training.model.sizes import VARIANTS, paligemma_3b
from training.model.vla import VLA, Actions, Cache, Output, VLAConfig, draw_weights, settle

__all__ = [
    "FAULTS",
    "LONGEST_PERIOD",
    "MLP",
    "SHORTEST_PERIOD",
    "VARIANTS",
    "VLA",
    "Actions",
    "AdaRMSNorm",
    "Cache",
    "Conditioning",
    "Expert",
    "FlowSampler",
    "GemmaConfig",
    "LayerNorm",
    "Output",
    "Projections",
    "RMSNorm",
    "RegressionSampler",
    "Rotation",
    "Sampler",
    "SamplerName",
    "TokenSampler",
    "VLAConfig",
    "VisionConfig",
    "VisionLayer",
    "draw_weights",
    "empty_actions",
    "last_tokens",
    "order_action_tokens",
    "order_embeddings",
    "paligemma_3b",
    "rotate",
    "settle",
    "time_periods",
]
