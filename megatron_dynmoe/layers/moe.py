"""The parts of a mixture of experts, in plain PyTorch: routing, experts, and the layer of both.

The exported model is made of them, and exports ship with this file, so it imports only the files of
``routing`` that exports ship with, too.

Dimension letters, in names as a suffix (``probs_TE``):
    T  tokens, ``sequence * S + position``
    B  sequences
    S  positions
    E  experts
    K  slots of a token: the most experts that it may use
    D  hidden size
    F  ffn size of an expert
    A  assignments: one token at one expert
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dynmoe.kernels.choose_cpu import choose, choose_top_k
from megatron_dynmoe.layers.rules import Chosen
from megatron_dynmoe.routing.losses import (
    count_tokens,
    dynamic_loss,
    fractions,
    load_balance_loss,
    sum_by_sequence,
    sum_entropy,
)
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.select import weigh

BALANCE_LOSSES = ("seq_aux_loss", "aux_loss", "global_aux_loss", "none")
GROUPED_BYTES = 16  # what grouped_mm wants weights and their rows to be a multiple of


class Choice(NamedTuple):
    """How a router chooses, at one forward.

    Attributes:
        threshold: what the probabilities of a token's experts must exceed; None: top-k.
        max_experts: the most experts of a token, or with top-k their number; None: no cap.
        normalized: whether the logits are normalized and scaled by theta.
        renormalize: whether a token's weights sum to 1; else they are its probabilities.
        dtype: of gate, softmax and weights. Selection sums exactly in any dtype.
        rule: chooses by the logits instead, with its own state and settings; None: top-p or top-k.
    """

    threshold: Tensor | float | None
    max_experts: int | None
    normalized: bool
    renormalize: bool
    dtype: torch.dtype = torch.float32
    rule: Callable[[Tensor], Chosen] | None = None


class Routed(NamedTuple):
    """What a router decided.

    Attributes:
        logits_TE: the input of the softmax, so after normalization; in the router's dtype.
        probs_TE: in the router's dtype.
        map_TE: bool, which experts a token uses.
        weights_TE: in the router's dtype; exactly 0 for experts that a token does not use.
        ranked_TK: int64, candidates of each token, its own experts first, the most probable one
            before all others.
        residual_T: the weight of the token itself in the layer's output; None: zero for all.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    map_TE: Tensor
    weights_TE: Tensor
    ranked_TK: Tensor
    residual_T: Tensor | None = None

    def slots(self) -> tuple[Tensor, Tensor]:
        """The experts in slots, the first ones of which are used; both [T, K].

        Returns:
            Ids, int64, and weights, exactly 0 in slots without an expert. Such a slot repeats the
            token's first id: engines take only valid ones, and no further expert's weights are read
            for it.
        """
        ids_TK = self.ranked_TK
        used_TK, weights_TK = self.map_TE.gather(-1, ids_TK), self.weights_TE.gather(-1, ids_TK)
        return torch.where(used_TK, ids_TK, ids_TK[:, :1]), weights_TK

    def without(self, padding_T1: Tensor) -> Routed:
        """The same without the experts of padding, [T, 1] bool; the logits stay."""
        residual_T = self.residual_T
        return self._replace(
            map_TE=self.map_TE & ~padding_T1,
            weights_TE=self.weights_TE * ~padding_T1,
            residual_T=None if residual_T is None else residual_T * ~padding_T1.squeeze(-1),
        )


class Gate(nn.Module):
    """The gate of a router; what is built on it says how it chooses.

    The parameter theta_offset, [1], makes theta = 1 + theta_offset, which scales the normalized
    logits: bf16 would round small updates of a value near 1 away.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, normalized: bool, extra_logits: int = 0
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts + extra_logits, hidden_size))
        if normalized:
            self.theta_offset = nn.Parameter(torch.zeros(1))

    @property
    def theta(self) -> Tensor:
        """The scale of the normalized logits, [1] float32."""
        return 1 + self.theta_offset.float()

    def choice(self) -> Choice:
        """How to choose, at this forward."""
        raise NotImplementedError

    def forward(self, hidden_TD: Tensor, threshold: Tensor | float | None = None) -> Routed:
        """Gate, normalize, softmax, select, weigh: the same steps as in Megatron's router.

        Args:
            hidden_TD: [T, D].
            threshold: instead of the router's own, for this forward: a number, or one for each
                token, [T, 1] float32.
        """
        choice = self.choice()
        if threshold is not None:
            if choice.rule is not None:
                raise ValueError(f"threshold is {threshold}, and this routing compares with none.")
            choice = choice._replace(threshold=threshold)
        # 1. Gate, normalize, softmax
        kind = hidden_TD.device.type
        exact: AbstractContextManager[object] = nullcontext()
        if torch.is_autocast_enabled(kind):
            exact = torch.autocast(kind, enabled=False)
        with exact:
            logits_TE = F.linear(hidden_TD.to(choice.dtype), self.weight.to(choice.dtype))
        if choice.normalized:
            logits_TE = normalize(logits_TE, self.theta).to(choice.dtype)
        if choice.rule is not None:
            return _ranked(logits_TE, choice.rule(logits_TE), choice.max_experts)
        probs_TE = torch.softmax(logits_TE, dim=-1)

        # 2. Select; the threshold is compared in float32, whatever the router's dtype is
        if choice.threshold is None:
            assert choice.max_experts is not None
            ids_TK, used_TK = choose_top_k(probs_TE, choice.max_experts)
        else:
            ids_TK, used_TK = choose(probs_TE.float(), choice.threshold, choice.max_experts)
        map_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(-1, ids_TK, used_TK)

        # 3. Weigh
        weights_TE = weigh(probs_TE, map_TE, choice.renormalize)
        return Routed(logits_TE, probs_TE, map_TE, weights_TE, ids_TK)


def _ranked(logits_TE: Tensor, chosen: Chosen, max_experts: int | None) -> Routed:
    """Give each token's experts as many places as it may use, or all E without a cap."""
    ranked_TE = chosen.weights_TE.detach().masked_fill(~chosen.map_TE, -1.0)
    ids_TK = ranked_TE.argsort(dim=-1, descending=True, stable=True)[:, :max_experts]
    return Routed(
        logits_TE, chosen.probs_TE, chosen.map_TE, chosen.weights_TE, ids_TK, chosen.residual_T
    )


class Experts(nn.Module):
    """SwiGLU experts: ``down(silu(gate x) * up x)``, with the weights of gate and up stacked."""

    def __init__(
        self, hidden_size: int, num_experts: int, ffn_size: int, init_std: float | None = 0.02
    ) -> None:
        """Make the experts.

        Args:
            init_std: standard deviation of the first weights; None: they are set elsewhere.
        """
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        if init_std is not None:
            nn.init.normal_(self.gate_up_proj, std=init_std)
            nn.init.normal_(self.down_proj, std=init_std)

    @property
    def sums_itself(self) -> bool:
        """Whether :meth:`forward` is this class's own, which needs no slots."""
        return True

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor | None, weights: Tensor) -> Tensor:
        """Sum each token's experts with their weights, in the order of the experts.

        An expert of weight 0 costs nothing. The order of the sum is fixed on every device, and a
        token's result does not depend on the rest of the batch.

        Args:
            hidden_TD: [T, D].
            ids_TK: the expert in each slot, int64; no expert has two slots of a token with weights
                other than 0. None: there are no slots.
            weights: of the slots, [T, K]; or, without slots, of all experts, [T, E].

        Returns:
            [T, D], dtype of ``hidden_TD``; summed in float32 at least, and rounded once.
        """
        weights_TE = weights
        if ids_TK is not None:
            # Of an unused slot the id may be any: with expert parallelism it is that of no expert.
            zeros_TE = weights.new_zeros(len(weights), self.num_experts)
            weights_TE = zeros_TE.scatter_add(-1, ids_TK.masked_fill(weights == 0, 0), weights)
        if hidden_TD.shape[0] == 1 and hidden_TD.device.type == "cpu":
            return self._forward_of_one(hidden_TD, weights_TE)
        # 1. What each expert computes, in the order of the experts
        experts_A, tokens_A = weights_TE.t().nonzero().unbind(1)
        rows_E = experts_A.bincount(minlength=self.num_experts)

        # 2. Compute and weigh
        rows_AD = hidden_TD.index_select(0, tokens_A)
        weights_A1 = weights_TE[tokens_A, experts_A].unsqueeze(-1)
        if _can_group(rows_AD, self.gate_up_proj, self.down_proj):
            ends_E = rows_E.cumsum(0, dtype=torch.int32)
            rows_AG = F.grouped_mm(rows_AD, self.gate_up_proj.transpose(1, 2), offs=ends_E)
            gate_AF, up_AF = rows_AG.chunk(2, dim=-1)
            rows_AF = F.silu(gate_AF, inplace=True).mul_(up_AF)
            rows_AD = F.grouped_mm(rows_AF, self.down_proj.transpose(1, 2), offs=ends_E)
            rows_AD = rows_AD.mul_(weights_A1)
        else:
            rows = rows_E.tolist()
            gate_AF, up_AF = _multiply(rows_AD, self.gate_up_proj, rows).chunk(2, dim=-1)
            rows_AD = _multiply(F.silu(gate_AF) * up_AF, self.down_proj, rows) * weights_A1

        # 3. Add up: a CPU row after row, in one call. A GPU adds all rows of a call at once, in any
        # order, but an expert has a token at most once.
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        output_TD, rows_AD = torch.zeros_like(hidden_TD, dtype=dtype), rows_AD.to(dtype)
        if hidden_TD.device.type == "cpu":
            output_TD.index_add_(0, tokens_A, rows_AD)
        else:
            parts = rows_E.tolist()
            for tokens, part in zip(tokens_A.split(parts), rows_AD.split(parts), strict=True):
                output_TD.index_add_(0, tokens, part)
        return output_TD.to(hidden_TD.dtype)

    def _forward_of_one(self, hidden_TD: Tensor, weights_TE: Tensor) -> Tensor:
        """The same for one token, which has no rows to find, nor to collect."""
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        output_TD = torch.zeros_like(hidden_TD, dtype=dtype)
        weights_ET = weights_TE.t()
        for expert, weight in enumerate(weights_TE[0].tolist()):
            if weight:
                gate_AF, up_AF = F.linear(hidden_TD, self.gate_up_proj[expert]).chunk(2, dim=-1)
                row_AD = F.linear(F.silu(gate_AF) * up_AF, self.down_proj[expert])
                output_TD = output_TD + (row_AD * weights_ET[expert]).to(dtype)
        return output_TD.to(hidden_TD.dtype)


def _multiply(rows_AI: Tensor, weights_EOI: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Multiply rows, which are in the order of their experts, by their experts' weights: [A, O]."""
    # With unbind, the gradient of an expert is not a tensor of zeros for all experts.
    weights = weights_EOI.unbind() if torch.is_grad_enabled() else weights_EOI
    used = [(expert, rows) for expert, rows in enumerate(rows_per_expert) if rows]
    parts = rows_AI.split([rows for _, rows in used])
    done = [F.linear(part, weights[expert]) for part, (expert, _) in zip(parts, used, strict=True)]
    return torch.cat(done) if done else rows_AI.new_zeros(0, weights_EOI.shape[1])


def _can_group(rows_AI: Tensor, *weights_EOI: Tensor) -> bool:
    """Whether PyTorch multiplies the rows of all experts at once, to the bits of :func:`_multiply`.

    It does so on a CPU. Its derivative is another, and autocast leaves it out.
    """
    kind = rows_AI.device.type
    if kind != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
        return False
    if not hasattr(F, "grouped_mm") or rows_AI.dtype == torch.float64:
        return False
    unit = GROUPED_BYTES // rows_AI.element_size()
    return all(
        weights.dtype == rows_AI.dtype
        and not weights.data_ptr() % GROUPED_BYTES
        and not (weights.shape[1] % unit or weights.shape[2] % unit)
        for weights in weights_EOI
    )


def _check_fit(router: Gate, experts: Experts) -> None:
    num_experts, hidden_size = router.num_experts, router.weight.shape[1]
    if num_experts != experts.num_experts:
        raise ValueError(
            f"the router has {num_experts} experts and Experts has {experts.num_experts}: give "
            "both the same number."
        )
    if hidden_size != experts.gate_up_proj.shape[-1]:
        raise ValueError(
            f"the router's hidden size is {hidden_size} and that of Experts is "
            f"{experts.gate_up_proj.shape[-1]}: give both the same."
        )


class Losses(NamedTuple):
    """The losses of a router: their scope and their coefficients.

    Attributes:
        balance_loss: seq_aux_loss (over each sequence), aux_loss (over the batch) or none;
            global_aux_loss, which a configuration may have from training, is aux_loss here.
        balance_loss_coeff: times the balance loss (equations 6 to 8 of Dynamic MoE).
        dynamic_loss_coeff: times the mean entropy of the probabilities (equation 5 there).
    """

    balance_loss: str = "seq_aux_loss"
    balance_loss_coeff: float = 1e-4
    dynamic_loss_coeff: float = 1e-3


class LossSettings(Protocol):
    """:class:`Losses`, or a configuration with such fields."""

    @property
    def balance_loss(self) -> str: ...
    @property
    def balance_loss_coeff(self) -> float: ...
    @property
    def dynamic_loss_coeff(self) -> float: ...


class MoEOutput(NamedTuple):
    """What an MoE layer returns.

    Attributes:
        hidden_states: [B, S, D], dtype of the input.
        router_logits: [B, S, E], the input of the router's softmax, in the router's dtype.
        experts_per_token: [B, S] int64, 0 for padding.
        loss: a float32 scalar, both losses of the router times their coefficients; or None.
    """

    hidden_states: Tensor
    router_logits: Tensor
    experts_per_token: Tensor
    loss: Tensor | None


class MoELayer(nn.Module):
    """Mixture of experts: a router, and the experts that it sends tokens to.

    Attributes:
        shared_expert: a module that every token passes through, too, [B, S, D] to [B, S, D].
        shared_expert_gate: maps [B, S, D] to [B, S, 1], whose sigmoid scales its output.
    """

    shared_expert: nn.Module | None
    shared_expert_gate: nn.Module | None

    def __init__(
        self, router: nn.Module, experts: nn.Module, losses: LossSettings | None = None
    ) -> None:
        """Put a layer together.

        Args:
            router: maps [T, D] to :class:`Routed`.
            experts: maps hidden states [T, D], ids and weights [T, K] to [T, D]; see
                :meth:`Routed.slots`.
            losses: which :class:`Losses` the router is trained with; None: the defaults, DTop-p's.

        Raises:
            ValueError: router and experts are made for other numbers of experts or other sizes, or
                there is no such balance loss.
        """
        super().__init__()
        if isinstance(router, Gate) and isinstance(experts, Experts):
            _check_fit(router, experts)
        self.router, self.experts = router, experts
        self.losses = Losses() if losses is None else losses
        if self.losses.balance_loss not in BALANCE_LOSSES:
            raise ValueError(
                f"balance_loss is {self.losses.balance_loss!r}: use {' or '.join(BALANCE_LOSSES)}."
            )
        self.shared_expert = self.shared_expert_gate = None

    def forward(
        self,
        hidden_BSD: Tensor,
        valid_BS: Tensor | None = None,
        with_loss: bool = True,
        threshold: Tensor | float | None = None,
    ) -> MoEOutput:
        """Route, compute, combine.

        Args:
            hidden_BSD: [B, S, D].
            valid_BS: [B, S] bool, False for padding, which uses no expert; None: no padding.
            with_loss: whether to compute the losses of the router.
            threshold: see :meth:`Gate.forward`; None: the router's own.

        Raises:
            ValueError: the hidden states do not have three dimensions.
        """
        if hidden_BSD.dim() != 3:
            raise ValueError(
                f"the hidden states have shape {list(hidden_BSD.shape)}: give [sequences, "
                "positions, hidden size], of single tokens [1, tokens, hidden size]."
            )
        batch, length = hidden_BSD.shape[:2]
        hidden_TD = hidden_BSD.flatten(0, 1)

        # 1. Route
        routed = self.router(hidden_TD, *(() if threshold is None else (threshold,)))
        if valid_BS is not None:
            routed = routed.without(~valid_BS.flatten().unsqueeze(-1))
        map_TE = routed.map_TE

        # 2. Compute and combine
        ids_TK, weights = (None, routed.weights_TE) if self._needs_no_slots() else routed.slots()
        output_BSD = self.experts(hidden_TD, ids_TK, weights).view_as(hidden_BSD)
        if (residual_T := routed.residual_T) is not None:
            itself_TD = (hidden_TD * residual_T.unsqueeze(-1)).to(hidden_TD.dtype)
            output_BSD = output_BSD + itself_TD.view_as(hidden_BSD)
        if self.shared_expert is not None:
            shared_BSD = self.shared_expert(hidden_BSD)
            if self.shared_expert_gate is not None:
                shared_BSD = shared_BSD * torch.sigmoid(self.shared_expert_gate(hidden_BSD))
            output_BSD = output_BSD + shared_BSD

        # 3. Losses and counts
        loss = None
        if with_loss:
            probs_BSE = routed.probs_TE.unflatten(0, (batch, length))
            map_BSE = map_TE.unflatten(0, (batch, length))
            loss = routing_loss(self.losses, probs_BSE, map_BSE, valid_BS)
        return MoEOutput(
            output_BSD,
            routed.logits_TE.view(batch, length, -1),
            map_TE.sum(dim=-1).view(batch, length),
            loss,
        )

    def _needs_no_slots(self) -> bool:
        """Whether the experts are computed here.

        Hooks take slots, and so does whoever puts a function before a module's own, as expert
        parallelism of Transformers.
        """
        experts = self.experts
        is_wrapped = bool(
            "forward" in vars(experts) or experts._forward_pre_hooks or experts._forward_hooks
        )
        return isinstance(experts, Experts) and experts.sums_itself and not is_wrapped


def routing_loss(
    losses: LossSettings, probs_BSE: Tensor, map_BSE: Tensor, valid_BS: Tensor | None
) -> Tensor:
    """Balance and dynamic loss of one layer times their coefficients: a float32 scalar.

    The scope ``global_aux_loss`` works like ``aux_loss``: over all tokens of this batch.
    """
    # The losses order tokens as Megatron does: position * B + sequence.
    num_experts = probs_BSE.shape[-1]
    probs_TE = probs_BSE.transpose(0, 1).reshape(-1, num_experts).float()
    map_TE = map_BSE.transpose(0, 1).reshape(-1, num_experts)
    valid_T = None if valid_BS is None else valid_BS.t().reshape(-1)

    num_sequences = probs_BSE.shape[0] if losses.balance_loss == "seq_aux_loss" else 1
    tokens_B, tokens = count_tokens(map_TE, num_sequences, valid_T)
    loss = losses.dynamic_loss_coeff * dynamic_loss(sum_entropy(probs_TE, valid_T), tokens)
    if losses.balance_loss != "none":
        prob_sums_BE, assignments_BE = (
            sum_by_sequence(values_TE, num_sequences, valid_T) for values_TE in (probs_TE, map_TE)
        )
        loss = loss + losses.balance_loss_coeff * load_balance_loss(
            prob_sums_BE, fractions(assignments_BE, tokens_B), tokens_B
        )
    return loss
