"""How many bytes a parameter and an activation take, from a run's settings."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_dynmoe.settings.messages.refusals import FlagError


@dataclass(frozen=True)
class Precision:
    """Bytes of each parameter's state, and of an activation.

    Attributes:
        optimizer: bytes of main parameters and moments, which the distributed optimizer shards.
        gradient_copies: the part of ``optimizer`` that holds gradients in float32.
        update: temporary bytes in the optimizer's step. PyTorch's AdamW computes the roots of all
            second moments at once.
    """

    weight: int
    gradient: int
    optimizer: int
    gradient_copies: int
    activation: int
    update: int

    @classmethod
    def from_args(cls, args: Namespace) -> Precision:
        """Read Megatron's flags.

        Raises:
            ValueError: the optimizer's state is not known.
        """
        if args.optimizer not in ("adam", "sgd"):
            raise FlagError(
                "optimizer", args.optimizer, ", whose state is not known", "use adam or sgd"
            )
        is_half = args.bf16 or args.fp16
        gradient = 4
        if args.grad_reduce_in_bf16 or (args.fp16 and not args.accumulate_allreduce_grads_in_fp32):
            gradient = 2
        moments = 8 if args.optimizer == "adam" else 4
        copies = 4 if gradient == 2 else 0
        return cls(
            weight=2 if is_half else 4,
            gradient=gradient,
            optimizer=moments + (4 if is_half else 0) + copies,  # main parameters in float32
            gradient_copies=copies,
            activation=2 if is_half else 4,
            update=4 if args.optimizer == "adam" else 0,
        )


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again instead of keeping it.

    Attributes:
        modules: the recomputed modules, if the kind is selective.
        method: ``uniform`` or ``block`` if the kind is full, else None.
        num_layers: the layers of a chunk (uniform), or the number of recomputed layers (block).
    """

    modules: frozenset[str] = frozenset()
    method: str | None = None
    num_layers: int = 0

    @classmethod
    def from_args(cls, args: Namespace) -> Recompute:
        """Read Megatron's flags.

        Raises:
            ValueError: the kind is full, and its method or its number of layers is missing.
                Megatron has no default for them.
        """
        if args.recompute_granularity == "full":
            for name in ("recompute_method", "recompute_num_layers"):
                if not getattr(args, name):
                    raise FlagError(
                        name,
                        None,
                        ", which --recompute-granularity full needs",
                        "use --recompute-method uniform --recompute-num-layers 1",
                    )
            return cls(method=args.recompute_method, num_layers=args.recompute_num_layers)
        if args.recompute_granularity == "selective":
            return cls(frozenset(args.recompute_modules or ["core_attn"]))
        return cls()
