"""The peer that our prefill is timed against: `transformers`' PaliGemma with the weights of one of our models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaModel

from ki_vla_ros.errors import ConfigurationError
from training.model import VLA, Cache, VLAConfig
from training.weights import their_name

OURS = ("vision.", "projector.", "backbone.")
PREFIX = "paligemma_with_expert.paligemma.model."


def peer_config(config: VLAConfig) -> PaliGemmaConfig:
    vision, text = config.vision, config.backbone
    if vision.stem != "patch":
        raise ConfigurationError(f"PaliGemma: expected a vision stem 'patch', got {vision.stem!r}")
    return PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": text.width,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "intermediate_size": text.mlp,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": config.vocab_size,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        projection_dim=text.width,
        image_token_index=config.vocab_size - 1,
    )


def build_peer(model: VLA) -> PaliGemmaModel:
    """The peer without the language head, which a prefill does not need; ConfigurationError if names do not match."""
    peer = PaliGemmaModel(peer_config(model.config))
    weights = {
        peer_name(name, model.config): tensor for name, tensor in model.state_dict().items() if name.startswith(OURS)
    }
    missing, unknown = peer.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise ConfigurationError(f"PaliGemma: expected the same weights, got {missing} missing and {unknown} unknown")
    return peer.eval().requires_grad_(False)


def peer_name(name: str, config: VLAConfig) -> str:
    """What transformers 5 calls one of our weights: openpi's name without its beginning, and one level less."""
    return their_name(name, config).removeprefix(PREFIX).replace("vision_tower.vision_model.", "vision_tower.")


def peer_prefill(peer: PaliGemmaModel, images_VCSS: Tensor, tokens_BL: Tensor) -> Callable[[], Cache]:
    """A call that runs the peer on all cameras and a full prompt: bidirectional, with positions from 0, as ours."""
    vision: Any = peer.config.vision_config
    image_tokens = images_VCSS.shape[0] * (vision.image_size // vision.patch_size) ** 2
    image_id = peer.config.image_token_id
    if bool((tokens_BL == image_id).any()):
        raise ConfigurationError(f"PaliGemma: expected a prompt without token {image_id}, which marks an image, got it")
    input_ids = torch.cat((torch.full((1, image_tokens), image_id, device=tokens_BL.device), tokens_BL), dim=1)
    position_ids = torch.arange(input_ids.shape[1], device=tokens_BL.device)[None]
    token_type_ids, mask = torch.zeros_like(input_ids), torch.ones_like(input_ids)

    def prefill() -> Cache:
        with torch.no_grad():
            output = peer(
                input_ids=input_ids,
                pixel_values=images_VCSS,
                attention_mask=mask,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                use_cache=True,
            )
        layers = output.past_key_values.layers
        keys, values = torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])
        return Cache(keys, values, mask.bool())

    return prefill
