"""A Diffusion Transformer on Megatron-Core's own ``TransformerBlock``.

The sequence is a token for the time, a token for the class, and then the patches, row by row: DiT's
"in-context" conditioning (Peebles and Xie 2023), which U-ViT uses, too. It needs no layer of its
own, and later pipeline stages need nothing but the hidden states. Attention has no mask.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec
from torch import Tensor, nn

CONDITIONS = 2  # tokens before the patches: time and class
AVERAGE = "average."


@dataclass(kw_only=True)
class DiTConfig(GPTModelConfig):
    """Upstream's config of a model, with images in place of a vocabulary."""

    builder: ClassVar[str] = f"{__name__}.DiTBuilder"
    image_shape: tuple[int, int, int]  # C, H, W
    patch_size: int
    num_classes: int
    average_decay: float

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a column and of a row."""
        _, height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size


class DiTBuilder(GPTModelBuilder):
    """Builds one model chunk; upstream's method then wraps and distributes it."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> DiT:
        config = self._model_config
        place = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
        if pre_process is None:
            pre_process = is_vp_first_stage(**place) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(**place) and is_pp_last_stage(pg_collection.pp)
        parts = (config, pg_collection, pre_process, post_process, vp_stage)
        model = DiT(*parts)
        # Not a submodule: neither the optimizer nor the controller shall see it.
        model.average = (DiT(*parts).float().cuda().requires_grad_(False).eval(),)
        model.average[0].load_state_dict(model.state_dict())
        return model


class DiT(MegatronModule):
    """One pipeline stage: noised images in, velocities out.

    Attributes:
        average: none, or one model that holds the moving average of this one's weights, in fp32.
    """

    average: tuple[DiT, ...] = ()
    followed: int | None = None  # the finished steps at the last move of the average
    drawn: int | None = None  # the finished steps at the last samples
    share_embeddings_and_output_weights = False  # upstream asks

    def __init__(
        self,
        config: DiTConfig,
        pg_collection: Any,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config.transformer)
        self.model_config, self.vp_stage, self.pg_collection = config, vp_stage, pg_collection
        self.pre_process, self.post_process = pre_process, post_process
        width = config.transformer.hidden_size
        patch = config.image_shape[0] * config.patch_size**2
        if pre_process:
            self.patch_in = nn.Linear(patch, width)
            self.time_in = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            self.class_in = nn.Embedding(config.num_classes + 1, width)  # the last: no class
            nn.init.normal_(self.class_in.weight, std=0.02)
            positions = positions_2d(*config.grid, width)
            self.register_buffer("positions", positions, persistent=False)
        layer_spec = config.transformer_layer_spec or default_layer_spec
        self.decoder = TransformerBlock(
            config.transformer,
            without_mask(layer_spec(config, vp_stage=vp_stage)),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.patch_out = nn.Linear(width, patch)
            nn.init.zeros_(self.patch_out.weight)
            nn.init.zeros_(self.patch_out.bias)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before; Megatron's schedule calls it."""
        one = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(one)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: [B, C, H, W], noised images.
            time: [B], 0 (noise) to 1 (image).
            label: [B] int64; ``num_classes`` stands for no class.

        Returns:
            [B, C, H, W] float32 on the last stage; before, hidden states [S, B, D].
        """
        hidden = None
        parallel = self.config.sequence_parallel
        if self.pre_process:
            weight = self.patch_in.weight
            patches = self.patch_in(self._cut(x).to(weight.dtype)) + self.positions.to(weight)
            waves = sinusoids(1000 * time.float(), self.config.hidden_size).to(weight)
            conditions = torch.stack([self.time_in(waves), self.class_in(label)], dim=1)
            hidden = torch.cat([conditions, patches], dim=1).transpose(0, 1).contiguous()
            if parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None)
        if not self.post_process:
            return hidden
        if parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        return self._paste(self.patch_out(hidden[CONDITIONS:].transpose(0, 1)).float())

    def _cut(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to patches [B, P, C * p * p], row by row."""
        p = self.model_config.patch_size
        return nn.functional.unfold(x, kernel_size=p, stride=p).transpose(1, 2)

    def _paste(self, patches: Tensor) -> Tensor:
        p, (_, *size) = self.model_config.patch_size, self.model_config.image_shape
        return nn.functional.fold(patches.transpose(1, 2), size, kernel_size=p, stride=p)

    @torch.no_grad()
    def follow(self, finished_steps: int) -> None:
        """Move the average towards the weights; call once before each step.

        So the average of a checkpoint after step N holds the weights up to step N - 1. It begins
        short, and lengthens to the decay of the config. Counts and thresholds are copied.
        """
        (average,) = self.average
        decay = min(self.model_config.average_decay, (1 + finished_steps) / (10 + finished_steps))
        of_average = list(average.parameters())
        new = [parameter.to(of_average[0].dtype) for parameter in self.parameters()]
        torch._foreach_lerp_(of_average, new, 1 - decay)
        for old, buffer in zip(average.buffers(), self.buffers(), strict=True):
            old.copy_(buffer)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Upstream's, and the same of the average under its own prefix."""
        entries = super().sharded_state_dict(prefix, *args, **kwargs)
        for model in self.average:
            entries |= model.sharded_state_dict(f"{prefix}{AVERAGE}", *args, **kwargs)
        return entries

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the model, and the average if its entries are there."""
        own = {name: value for name, value in state_dict.items() if not name.startswith(AVERAGE)}
        others = {
            name.removeprefix(AVERAGE): value
            for name, value in state_dict.items()
            if name.startswith(AVERAGE)
        }
        for model in self.average if others else ():
            model.load_state_dict(others, *args, **kwargs)
        return super().load_state_dict(own, *args, **kwargs)


def without_mask(spec: Any) -> Any:
    """Copy a block's spec with attention from every token to every token."""
    layers = []
    for layer in spec.layer_specs:
        attention = copy.copy(layer.submodules.self_attention)
        attention.params = attention.params | {"attn_mask_type": AttnMaskType.no_mask}
        layer = copy.copy(layer)
        layer.submodules = replace(layer.submodules, self_attention=attention)
        layers.append(layer)
    return replace(spec, layer_specs=layers)


def sinusoids(numbers: Tensor, width: int) -> Tensor:
    """Sines and cosines of [...] numbers at wavelengths 2 pi to 20,000 pi, [..., width]."""
    scale = -math.log(10000) / (width // 2)
    rates = torch.exp(scale * torch.arange(width // 2, device=numbers.device))
    angles = numbers[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions_2d(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions [rows * columns, width]: half of the numbers say the row, half the column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [sinusoids(number.flatten().float(), width // 2) for number in (row, column)]
    return torch.cat(halves, dim=-1)
