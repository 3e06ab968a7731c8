"""Grows experts from a dense model, so that the first step computes what the dense model computes.

Every layer's MLP, ``f(x) = down(silu(gate x) * up x)``, becomes E experts. They are E / G copies of
it, each cut into G parts along the intermediate size, so ``f = f_1 + ... + f_G``. The router is
random, but the G experts of a copy c have the same row, so a token gives them the same weight w_c.
Their down projections are G times those of the dense model. If a token uses whole copies, and the
weights of its experts sum to 1, its output is

    sum over its copies of w_c sum_j G f_j(x) = f(x) sum of G w_c = f(x)

So the weights have to be renormalized, and no token may be without an expert. Copies are whole if G
is 1, or with a fixed number of experts that G divides. A threshold would cut a copy apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dynmoe.conversion.hugging_face.folder import cast
from megatron_dynmoe.conversion.model_settings import NO_ROUTING, kinds_of_layers
from megatron_dynmoe.conversion.names import Row, row, rows_by_part
from megatron_dynmoe.conversion.shapes import Block, Shapes
from megatron_dynmoe.conversion.sources import FromFolder
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.routings import ROUTINGS

# The dense parameter from which each of an expert's is made, and the dimension that is cut.
_MADE_OF = {"expert_gate": ("gate", 0), "expert_up": ("up", 0), "expert_down": ("down", 1)}
_ROWS = (
    row("{layer}.router", "router"),
    *(row("{layer}.{expert}." + dense, part) for part, (dense, _) in _MADE_OF.items()),
)
# Megatron's --moe-aux-loss-coeff: between Mixtral's and Qwen3-MoE's.
_BALANCE_LOSS = 1e-2


class Upcycling(NamedTuple):
    """How experts are made of a dense MLP; ``dynmoe convert from-hf`` has a flag for each.

    Attributes:
        experts: how many experts each layer gets, E.
        granularity: the number of parts that a copy is cut into, G.
        topk: the experts of a token with top-k; None: G, so that the active size is the dense
            model's, but at least 2, so that the router learns from the first step on.
        noise: standard deviation of the normal noise on each weight, in root mean squares of its
            matrix. With noise the first step no longer computes exactly the dense function.
        seed: of router and noise.
    """

    experts: int
    granularity: int = 1
    topk: int | None = None
    noise: float = 0.0
    seed: int = 0

    def config(self, dense: dict[str, Any]) -> dict[str, Any]:
        """The config of the upcycled model, with top-k.

        Args:
            dense: the config of the dense model.

        Raises:
            UsageError: a number does not fit the model or another number.
        """
        if "sparse" in dense["mlp_layer_types"]:
            raise UsageError(
                f"--upcycle-experts is {self.experts}, but the model has {dense['num_experts']} "
                "experts already: leave the flag out, or give a dense model."
            )
        parts, ffn = self.granularity, dense["intermediate_size"]
        topk = max(2, parts) if self.topk is None else self.topk
        for name, number, of in (
            ("--upcycle-experts", self.experts, "experts are copies times parts"),
            ("--upcycle-topk", topk, "a token uses whole copies"),
            ("the model's intermediate_size", ffn, "it is cut into parts of one size"),
        ):
            if number % parts:
                raise UsageError(
                    f"{name} is {number}, which --upcycle-granularity {parts} does not divide "
                    f"({of}): use a granularity of {_largest_divisor(number, parts)}"
                    + (f", or a multiple of {parts}." if name.startswith("--") else ".")
                )
        if topk == 1:
            raise UsageError(
                "--upcycle-topk is 1: the only weight of a token would always be 1, through which "
                "a text cannot train the router; use 2 or more."
            )
        if topk > self.experts:
            raise UsageError(
                f"--upcycle-topk is {topk}: use at most --upcycle-experts, {self.experts}."
            )
        return {
            **dense,
            **NO_ROUTING,
            "num_experts": self.experts,
            "num_experts_per_tok": topk,
            "moe_intermediate_size": ffn // parts,
            "mlp_layer_types": kinds_of_layers([True] * dense["num_hidden_layers"]),
            "weights": "renormalized",
            "router_dtype": "float32",
            "balance_loss": "aux_loss",
            "balance_loss_coeff": _BALANCE_LOSS / topk,
        }

    def check_routing(self, config: dict[str, Any]) -> None:
        """Refuse a routing with which the first step could not compute the dense function.

        Raises:
            UsageError: it is such a routing; the message names the setting.
        """
        routing = config["routing"]
        if ROUTINGS[routing].least_experts == 0:
            fit = [name for name, other in ROUTINGS.items() if other.least_experts > 0]
            raise UsageError(
                f"--routing {routing} may leave a token without an expert, where the dense model "
                f"has an MLP: use one of {', '.join(fit)}, or upcycle with one of them, train, and "
                "change the routing then."
            )
        if config["weights"] != "renormalized":
            raise UsageError(
                f"--routing {routing} has weights {config['weights']!r}, which do not sum to 1, so "
                "copies of an MLP would not add up to it: give --weights renormalized."
            )
        if routing == "top_k":
            return
        if self.topk is not None:
            raise UsageError(
                f"--upcycle-topk is {self.topk}, but --routing {routing} has no fixed number: "
                "leave it out."
            )
        if self.granularity > 1:
            raise UsageError(
                f"--upcycle-granularity is {self.granularity}, but the threshold of --routing "
                f"{routing} can end within a copy, whose other parts would be missing: leave the "
                "granularity out, or upcycle with top-k, train, and change the routing then."
            )


class Upcycled:
    """A dense folder as a source of an upcycled model's parameters."""

    def __init__(self, dense: FromFolder, upcycling: Upcycling) -> None:
        self._dense, self._upcycling = dense, upcycling
        self._dense_rows = rows_by_part(dense.table)
        self._layer: int | None = None
        self._of_layer: dict[str, Tensor] = {}
        self.config = upcycling.config(dense.config)
        self.shapes = Shapes(self.config)
        made = {part for part, _ in _MADE_OF.values()}
        self.table: tuple[Row, ...] = (
            *(one for one in dense.table if not made & {*one.parts}),
            *_ROWS,
        )
        self.dtype, self.about, self.remarks = dense.dtype, dense.about, dense.remarks
        self.token_ids, self.generation = dense.token_ids, dense.generation

    def read(self, block: Block) -> Tensor:
        """A block: of the dense model, or made of one."""
        if block.row not in _ROWS:
            return self._dense.read(block)
        (part,) = block.row.parts
        made = self._router(block) if part == "router" else self._of_expert(part, block)
        return cast(made, getattr(torch, self.dtype), block.key)

    def _router(self, block: Block) -> Tensor:
        """Random rows as at the start of a training, one for each copy, [E, hidden]."""
        parts = self._upcycling.granularity
        shape = (self._upcycling.experts // parts, self.shapes.sizes["hidden"])
        rows = torch.randn(shape, generator=self._generator(block, 0))
        return (rows * self.config["initializer_range"]).repeat_interleave(parts, dim=0)

    def _of_expert(self, part: str, block: Block) -> Tensor:
        assert block.expert is not None
        name, dim = _MADE_OF[part]
        whole = self._whole(name, block.layer)
        size = self.config["moe_intermediate_size"]
        parts, noise = self._upcycling.granularity, self._upcycling.noise
        made = whole.narrow(dim, block.expert % parts * size, size)
        if noise:
            generator = self._generator(block, 1 + list(_MADE_OF).index(part))
            scale = noise * whole.square().mean().sqrt()
            made = made + scale * torch.randn(made.shape, generator=generator)
        return made * parts if part == "expert_down" else made

    def _whole(self, name: str, layer: int | None) -> Tensor:
        """A parameter of a dense layer in float32, read once for all experts of the layer."""
        if layer != self._layer:
            self._layer, self._of_layer = layer, {}
        if name not in self._of_layer:
            self._of_layer[name] = self._dense.read(Block(self._dense_rows[name], layer)).float()
        return self._of_layer[name]

    def _generator(self, block: Block, kind: int) -> torch.Generator:
        place = (self._upcycling.seed, block.layer or 0, block.expert or 0, kind)
        seed = np.random.SeedSequence(place).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)
