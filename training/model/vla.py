"""The vision-language-action model with knowledge insulation (arXiv 2505.23705).

One attention per layer joins backbone and expert, and only the expert attends to the expert. So the backbone's rows of
all layers are computed first, then the expert's rows, each with one softmax over the backbone's prefix and the expert.
Insulation is one `detach` at that seam: keys and values as the expert reads them carry no gradient, while the
backbone's own rows keep theirs.

    who sees             prefix    postfix   expert
    prefix               yes       -         -
    postfix              yes       causal    -
    expert               yes       -         yes (state token: only itself)

With `hybrid_mask` the postfix sees the action tokens too (HybridVLA, arXiv 2503.10631). With `actions: backbone` these
pass through the backbone's own layers, after the prefix: there is nothing to insulate then.

Flow convention: x_t = t * noise + (1 - t) * action, velocity = noise - action, integrated from t = 1 to 0.

Legend: B batch, V cameras, C channels, S image side, L prompt tokens, P prefix tokens (image tokens, then prompt),
T postfix tokens (answer text or FAST actions), R expert rows (a multiple of B), H horizon, A action dim, N layers,
K key/value heads, D model width or head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ki_vla_ros.engines.base import step_times
from ki_vla_ros.errors import ConfigurationError
from training.model.expert import AdaRMSNorm, BackboneAsExpert, Conditioning, Expert, expert_bias
from training.model.gemma import Backbone, GemmaConfig, additive, make_view, positions, rotation
from training.model.siglip import Vision, VisionConfig

Actions = Literal["expert", "backbone"]
"""What action tokens go through: layers of their own, or the backbone's."""


@dataclass(frozen=True)
class VLAConfig:
    """Sizes of the whole model; with `state_dim`, the state is one continuous token of the expert, else prompt text.

    With `actions: backbone`, `expert` is as large as the backbone, which stands in for it.
    """

    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int
    horizon: int
    state_dim: int | None = None
    conditioning: Conditioning = "adarms"
    actions: Actions = "expert"
    hybrid_mask: bool = False

    def __post_init__(self) -> None:
        if self.actions == "backbone" and self.expert != self.backbone:
            raise ConfigurationError(
                "expert: expected the backbone's sizes, as actions go through its layers, got others"
            )
        for name in ("depth", "heads", "kv_heads", "head_dim"):
            ours, theirs = getattr(self.backbone, name), getattr(self.expert, name)
            if ours != theirs:
                raise ConfigurationError(
                    f"backbone and expert meet in one attention per layer: {name} must agree, got {ours} and {theirs}"
                )


class Cache(NamedTuple):
    """What the expert needs from the prefix; keys are rotated already."""

    keys_NBKPD: Tensor
    values_NBKPD: Tensor
    mask_BP: Tensor


@dataclass(frozen=True)
class Output:
    """What a training step may want; hidden states are after the backbone's final norm."""

    prefix_hidden_BPD: Tensor
    postfix_hidden_BTD: Tensor | None
    velocity_RHA: Tensor | None
    prefix_by_layer: tuple[Tensor, ...]
    """The residual stream [B, P, D] after each layer, before the final norm."""
    probe_logits_BPQ: Tensor | None
    """Scaled attention scores among prefix tokens (row: query), before mask and softmax."""


class VLA(nn.Module):
    """The whole model; the module's docstring has masks, flow convention and legend."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision = Vision(config.vision)
        self.projector = nn.Linear(config.vision.width, config.backbone.width)
        self.backbone = Backbone(config.backbone, config.vocab_size)
        through = config.actions == "backbone"
        self.expert = BackboneAsExpert(self.backbone) if through else Expert(config.expert, config.conditioning)
        self.action_in = nn.Linear(config.action_dim, width)
        self.action_out = nn.Linear(width, config.action_dim)
        self.state_in = None if config.state_dim is None else nn.Linear(config.state_dim, width)
        initialize(self)

    def embed_prefix(
        self, images_BVCSS: Tensor, image_mask_BV: Tensor, tokens_BL: Tensor, token_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens of all cameras, then the prompt: [B, P, D], and their mask [B, P]."""
        image_BPD = self.projector(self.vision(images_BVCSS.flatten(0, 1)))
        image_BPD = image_BPD.unflatten(0, image_mask_BV.shape).flatten(1, 2)
        image_mask_BP = image_mask_BV[:, :, None].expand(-1, -1, self.config.vision.tokens).flatten(1, 2)
        embed_BPD = torch.cat((image_BPD, self.backbone.embed(tokens_BL)), dim=1)
        return embed_BPD, torch.cat((image_mask_BP, token_mask_BL), dim=1)

    def stem_features(self, images_BCSS: Tensor) -> Tensor:
        """[B, M, W]: what the stem makes of each of M image cells, in raster order."""
        features_BMW: Tensor = self.vision.stem(images_BCSS).flatten(2).transpose(1, 2)
        return features_BMW

    def prefill(self, images_BVCSS: Tensor, image_mask_BV: Tensor, tokens_BL: Tensor, token_mask_BL: Tensor) -> Cache:
        """Run the prefix once; from the last layer only keys and values are computed, as nothing reads the rest."""
        x_BPD, mask_BP = self.embed_prefix(images_BVCSS, image_mask_BV, tokens_BL, token_mask_BL)
        turn = rotation(positions(mask_BP), self.config.backbone.head_dim)
        view = make_view(mask_BP, None, self.config.backbone.group)
        keys, values = [], []
        *layers, last = self.backbone.layers
        for layer in layers:
            x_BPD, key, value = layer(x_BPD, turn, view)
            keys.append(key)
            values.append(value)
        key, value = last.keys_values(x_BPD, turn)
        return Cache(torch.stack([*keys, key]), torch.stack([*values, value]), mask_BP)

    def velocity(self, cache: Cache, x_t_RHA: Tensor, time_RH: Tensor, state_RS: Tensor | None = None) -> Tensor:
        """[R, H, A] of one expert step; rows of one prefix are adjacent: row r reads prefix r // (R / B)."""
        keys, values = cache.keys_NBKPD.unbind(0), cache.values_NBKPD.unbind(0)
        return self._expert_velocity(keys, values, cache.mask_BP, x_t_RHA, time_RH, state_RS)[0]

    def read_on(self, cache: Cache, tokens_BT: Tensor) -> tuple[Tensor, Cache]:
        """Hidden states [B, T, D] of the postfix's next tokens, after the final norm, and the cache for those after.

        The first token after `prefill` is the prompt's last, once more: it stands in the prefix already, where nothing
        computed its hidden state, and no other token sees it twice.
        """
        begun, prompt = cache.keys_NBKPD.shape[3] - cache.mask_BP.shape[1], cache.mask_BP.sum(dim=1, keepdim=True)
        tokens = tokens_BT.shape[1]
        at_T = begun + torch.arange(tokens, device=tokens_BT.device)
        turn = rotation(prompt - 1 + at_T, self.config.backbone.head_dim)
        before_C = torch.arange(begun + tokens, device=tokens_BT.device)
        past_TC = (before_C <= at_T[:, None]) & (before_C > 0)
        seen_BTC = torch.cat(
            (cache.mask_BP[:, None].expand(-1, tokens, -1), past_TC.expand(len(tokens_BT), -1, -1)), dim=2
        )
        bias = additive(seen_BTC).repeat_interleave(self.config.backbone.group, dim=1)[:, None]
        read = cache.keys_NBKPD.unbind(0), cache.values_NBKPD.unbind(0)
        hidden_BTD, keys, values = self.backbone.follow(self.backbone.embed(tokens_BT), turn, *read, bias)
        return hidden_BTD, Cache(torch.stack(keys), torch.stack(values), cache.mask_BP)

    def forward(
        self,
        images_BVCSS: Tensor,
        image_mask_BV: Tensor,
        tokens_BL: Tensor,
        token_mask_BL: Tensor,
        postfix_BT: Tensor | None = None,
        postfix_mask_BT: Tensor | None = None,
        x_t: Tensor | None = None,
        time: Tensor | None = None,
        state: Tensor | None = None,
        insulate: bool = True,
        probe: tuple[int, int] | None = None,
        prefix_rows: int | None = None,
    ) -> Output:
        """Everything at once, with gradients.

        x_t [R, H, A], time [R, H] (one per action token), state [R, S]: the expert's rows, as in `velocity`.
        `insulate=False` lets the flow loss train the backbone (the baseline). With `hybrid_mask`, the postfix sees
        these rows; its padding, if any, must then be at its end.
        `probe` = (layer, head) whose attention scores among prefix tokens are returned.
        `prefix_rows`: only this many prefix tokens (at least 1), the last ones, pass through the last layer, whose
        outputs have that many rows. No loss reads the others; a step at the demo's sizes takes 6-13 % less time.
        """
        if (x_t is None) != (time is None):
            raise ConfigurationError("forward: x_t and time go together, got only one of them")
        if postfix_BT is None and postfix_mask_BT is not None:
            raise ConfigurationError("forward: got a postfix mask without a postfix")
        x_BSD, mask_BP = self.embed_prefix(images_BVCSS, image_mask_BV, tokens_BL, token_mask_BL)
        prefix, mask_BS = mask_BP.shape[1], mask_BP
        after_actions = self.config.hybrid_mask and postfix_BT is not None and x_t is not None
        if postfix_BT is not None and not after_actions:
            if postfix_mask_BT is None:
                postfix_mask_BT = torch.ones_like(postfix_BT, dtype=torch.bool)
            x_BSD = torch.cat((x_BSD, self.backbone.embed(postfix_BT)), dim=1)
            mask_BS = torch.cat((mask_BP, postfix_mask_BT), dim=1)
        turn = rotation(positions(mask_BS), self.config.backbone.head_dim)
        view = make_view(mask_BP, None if after_actions else postfix_mask_BT, self.config.backbone.group)
        keys, values, by_layer, scores = [], [], [], None
        rows = prefix
        for index, layer in enumerate(self.backbone.layers):
            if probe is not None and probe[0] == index:
                turn_P = (turn[0][:, :prefix], turn[1][:, :prefix])
                scores = layer.scores(x_BSD[:, :prefix], turn_P, probe[1])
            if prefix_rows is not None and index == len(self.backbone.layers) - 1:
                rows = prefix_rows
            x_BSD, key, value = layer(x_BSD, turn, view, first=prefix - rows)
            keys.append(key[:, :, :prefix])
            values.append(value[:, :, :prefix])
            by_layer.append(x_BSD[:, :rows])
        hidden_BSD = self.backbone.norm(x_BSD)
        postfix_hidden = None if postfix_BT is None else hidden_BSD[:, rows:]
        velocity = None
        if x_t is not None and time is not None:
            # Insulation is this `detach`: the backbone's own rows have read the same keys and values with a gradient.
            read_keys, read_values = (
                tuple(x.detach() for x in part) if insulate else tuple(part) for part in (keys, values)
            )
            velocity, *seen = self._expert_velocity(read_keys, read_values, mask_BP, x_t, time, state)
            if after_actions and postfix_BT is not None:
                postfix_hidden = self._read_after_actions(postfix_BT, mask_BP, keys, values, *seen)
        return Output(
            prefix_hidden_BPD=hidden_BSD[:, :rows],
            postfix_hidden_BTD=postfix_hidden,
            velocity_RHA=velocity,
            prefix_by_layer=tuple(by_layer),
            probe_logits_BPQ=scores,
        )

    def _expert_velocity(
        self,
        keys_BKPD: tuple[Tensor, ...],
        values_BKPD: tuple[Tensor, ...],
        mask_BP: Tensor,
        x_t_RHA: Tensor,
        time_RH: Tensor,
        state_RS: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run the expert's rows; its layers work in their weights' type, actions and velocity are float32.

        After the velocity come, by layer, the keys and values of prefix and expert.

        A continuous state is one token before the actions. It does not attend to them (openpi's cumulative rule: the
        state's block comes first); they attend to it.
        """
        if (state_RS is None) != (self.state_in is None):
            raise ConfigurationError(
                f"expert: a model with state_dim {self.config.state_dim} got {'no' if state_RS is None else 'a'} state"
            )
        repeats, rest = divmod(x_t_RHA.shape[0], mask_BP.shape[0])
        if rest:
            raise ConfigurationError(
                f"expert: {x_t_RHA.shape[0]} rows are not a multiple of {mask_BP.shape[0]} prefixes"
            )
        if repeats > 1:
            # All draws along one query axis, with a block-diagonal mask, need no copies, but see each other's keys in
            # vain: steps with 4 draws took 0.96 to 1.00 times as long, with 16 draws 1.05 to 1.20 times.
            keys_BKPD = tuple(key.repeat_interleave(repeats, dim=0) for key in keys_BKPD)
            values_BKPD = tuple(value.repeat_interleave(repeats, dim=0) for value in values_BKPD)
            mask_BP = mask_BP.repeat_interleave(repeats, dim=0)
        x_RED = self.expert.embed_actions(self.action_in(x_t_RHA), time_RH)
        if self.state_in is not None:
            x_RED = torch.cat((self.state_in(state_RS)[:, None], x_RED), dim=1)
        x_RED = x_RED.to(keys_BKPD[0].dtype)
        tokens = x_RED.shape[1]
        position_RE = mask_BP.sum(dim=1, keepdim=True) + torch.arange(tokens, device=mask_BP.device)
        turn = rotation(position_RE, self.config.expert.head_dim)
        bias = expert_bias(mask_BP, tokens, self.state_in is not None, self.config.expert.group)
        condition = self.expert.condition(time_RH, with_state=self.state_in is not None)
        hidden_RED, keys, values = self.expert(x_RED, condition, keys_BKPD, values_BKPD, turn, bias)
        return self.action_out(hidden_RED[:, -x_t_RHA.shape[1] :].to(self.action_out.weight.dtype)), keys, values

    def _read_after_actions(
        self,
        postfix_BT: Tensor,
        mask_BP: Tensor,
        keys_BKPD: Sequence[Tensor],
        values_BKPD: Sequence[Tensor],
        seen_keys: Sequence[Tensor],
        seen_values: Sequence[Tensor],
    ) -> Tensor:
        """[B, T, D]: the postfix's hidden states where it sees the prefix, all action tokens and its own past.

        `seen_keys` and `seen_values` are of prefix and action tokens, the prefix's perhaps without a gradient.
        Positions are those of a postfix that sees no actions.
        """
        prefix, tokens, actions = mask_BP.shape[1], postfix_BT.shape[1], seen_keys[0].shape[2] - mask_BP.shape[1]
        if len(seen_keys[0]) != len(postfix_BT):
            raise ConfigurationError(
                f"hybrid_mask: expected one noisy chunk for each of {len(postfix_BT)} prefixes, got {len(seen_keys[0])}"
            )
        at_T = torch.arange(tokens, device=mask_BP.device)
        turn = rotation(mask_BP.sum(dim=1, keepdim=True) + at_T, self.config.backbone.head_dim)
        past_TC = F.pad(at_T <= at_T[:, None], (actions, 0), value=True)
        visible = torch.cat((mask_BP[:, None].expand(-1, tokens, -1), past_TC.expand(len(postfix_BT), -1, -1)), dim=2)
        bias = additive(visible).repeat_interleave(self.config.backbone.group, dim=1)[:, None]
        keys, values = (
            [torch.cat((own, other[:, :, prefix:]), dim=2) for own, other in zip(part, seen, strict=True)]
            for part, seen in ((keys_BKPD, seen_keys), (values_BKPD, seen_values))
        )
        return self.backbone.follow(self.backbone.embed(postfix_BT), turn, keys, values, bias)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary, with the token table as output head."""
        return F.linear(hidden, self.backbone.embedding.weight)

    def sample_actions(self, cache: Cache, noise_RHA: Tensor, steps: int, state_RS: Tensor | None = None) -> Tensor:
        """Integrate the flow from noise (t = 1) to actions (t = 0) in equal Euler steps."""
        x_t = noise_RHA
        for t in step_times(steps):
            time_RH = torch.full_like(x_t[..., 0], t)
            x_t = x_t - self.velocity(cache, x_t, time_RH, state_RS) / steps
        return x_t


def initialize(model: VLA) -> None:
    """Weights for training from scratch.

    Every linear map keeps the variance of its input (truncated normal, 1 / sqrt(fan in)). Tokens enter the residual
    stream, and leave it as logits, at about unit size. Expert branches start closed (adaRMS at zero), and the first
    velocities are small.
    """
    for module in model.modules():
        draw_weights(module)
    settle(model)


def draw_weights(module: nn.Module) -> None:
    """Of one map or table; those of the modules in it are theirs."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def settle(model: VLA) -> None:
    """What is not as it was drawn: closed branches, small first velocities."""
    for module in model.modules():
        if isinstance(module, AdaRMSNorm):
            nn.init.zeros_(module.dense.weight)
    with torch.no_grad():
        model.action_out.weight.mul_(0.1)
