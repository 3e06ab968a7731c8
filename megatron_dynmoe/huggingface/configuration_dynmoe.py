"""The model's configuration for Transformers: its shape, and every setting of its routing.

Exported models ship with this file and with those that it imports from the package.
"""

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from packaging import version
from transformers import PreTrainedConfig

from megatron_dynmoe.huggingface.budgets_dynmoe import threshold_at
from megatron_dynmoe.huggingface.validation_dynmoe import check_settings, checked_threshold
from megatron_dynmoe.layers.rules import LAYER_RULES, LayerRule

if version.parse(transformers.__version__) < version.parse("5.5"):
    raise ImportError(
        f"transformers {transformers.__version__} is installed, and this model needs 5.5 or later: "
        "pip install --upgrade transformers"
    )

# For each routing, the values of settings that are left out: the papers' values, as in training.
ROUTING_DEFAULTS: dict[str, dict[str, Any]] = {
    "top_k": {
        "normalization": "none",
        "weights": "renormalized",
        "balance_loss": "none",
        "balance_loss_coeff": 0.0,
        "dynamic_loss_coeff": 0.0,
    },
    "top_p": {
        "threshold": 0.4,
        "normalization": "none",
        "weights": "raw",
        "balance_loss": "seq_aux_loss",
        "balance_loss_coeff": 1e-2,
        "dynamic_loss_coeff": 1e-4,
    },
    "dtop_p": {
        "normalization": "drn",
        "weights": "renormalized",
        "balance_loss": "seq_aux_loss",
        "balance_loss_coeff": 1e-4,
        "dynamic_loss_coeff": 1e-3,
    },
}

# Of other rules, if they do not say otherwise (layers/rules.py).
RULE_DEFAULTS: dict[str, Any] = ROUTING_DEFAULTS["top_k"] | {"weights": "raw"}
for _name, _rule in LAYER_RULES.items():
    ROUTING_DEFAULTS[_name] = {**RULE_DEFAULTS, **_rule.defaults}


class DynMoEModelConfig(PreTrainedConfig):
    """Shape and routing of a model; every field is written to ``config.json``.

    The routing settings have the same names, units and defaults as in training
    (``--moe-dynamic-*``). The others are:

        mlp_layer_types: ``sparse`` (experts) or ``dense``, one entry per layer; None: all sparse.
        num_experts_per_tok: experts per token with routing ``top_k``, and to be set only there.
            With the others it reads as the most that a token may use at inference: engines reserve
            so many slots for each token.
        threshold: cumulative probability in [0, 1] that a token's experts must exceed; one number,
            or a list with one entry per layer (None for dense layers). Like all routing settings,
            it is read at every forward, so a new value on ``model.config`` takes effect.
        budget_curve: measured points, each with ``experts_per_token`` (mean over tokens and
            layers), ``threshold`` (one for all layers) and ``loss`` (nats per token, or None), the
            first two ascending; None: budgets cannot be asked for.
        inference_experts_per_token: a budget: in inference, the threshold is the curve's for so
            many experts per token; None: it is the model's own.
        router_state: what other rules keep (``layers/rules.py``): for each name a list with one
            entry for each layer, a list of numbers (None for dense layers).
        rule_settings: the settings that only such a rule has, by name.
        theta: scale of the normalized logits, one entry per layer (None for dense layers); only
            with ``normalization`` ``drn``. It initializes a new model. In a loaded model it is a
            readable copy of the weights, which take precedence.
        router_dtype: dtype of gate, softmax and weights. The default is ``float32``, as in our
            training; the authors of Dynamic MoE route in the model's dtype. Selection sums exactly
            in any dtype.
        shared_expert_intermediate_size: ffn size of an expert that every token uses; None: none.
        shared_expert_gate: whether a sigmoid gate scales that expert's output.
        measured_experts_per_token: means over the last global batch of training, one entry per
            layer (None for dense layers). It is for information only.
        rope_parameters: rotary positions, of any type that Transformers knows. Training has only
            ``default``; set another to read longer texts than the model was trained on.
        controller: state and settings of the PI controller, for further training in Megatron. In
            Transformers the threshold stays as it is, even in training.

    Raises:
        ValueError: a setting makes no sense, alone or with another.
    """

    model_type = "dynmoe"
    keys_to_ignore_at_inference = ["past_key_values", "experts_per_token", "aux_loss"]  # noqa: RUF012
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # noqa: RUF012
    attribute_map = {"use_qk_norm": "qk_norm"}  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {  # noqa: RUF012
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        num_experts: int = 16,
        moe_intermediate_size: int = 2816,
        intermediate_size: int | None = None,
        mlp_layer_types: list[str] | None = None,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        routing: str = "top_p",
        num_experts_per_tok: int | None = None,
        threshold: float | list[float | None] | None = None,
        theta: list[float | None] | None = None,
        max_experts_per_token: int | None = None,
        inference_threshold: float | None = None,
        inference_experts_per_token: float | None = None,
        inference_max_experts_per_token: int | None = None,
        normalization: str | None = None,
        weights: str | None = None,
        router_dtype: str = "float32",
        target_experts_per_token: float | str | None = None,
        balance_loss: str | None = None,
        balance_loss_coeff: float | None = None,
        dynamic_loss_coeff: float | None = None,
        budget_curve: list[dict[str, Any]] | None = None,
        router_state: dict[str, list[Any]] | None = None,
        rule_settings: dict[str, Any] | None = None,
        output_router_logits: bool = False,
        controller: dict[str, Any] | None = None,
        measured_experts_per_token: list[float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        # 1. The transformer
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 1e4})
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

        # 2. The experts
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.intermediate_size = intermediate_size
        self.mlp_layer_types = list(mlp_layer_types or ["sparse"] * num_hidden_layers)
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate

        # 3. The routing
        self.routing = routing
        self.num_experts_per_tok = num_experts_per_tok
        self.threshold = threshold
        self.theta: Any = theta
        self.max_experts_per_token = max_experts_per_token
        self.inference_threshold = inference_threshold
        self.inference_experts_per_token = inference_experts_per_token
        self.inference_max_experts_per_token = inference_max_experts_per_token
        self.normalization = normalization
        self.weights = weights
        self.router_dtype = router_dtype
        self.target_experts_per_token = target_experts_per_token
        self.balance_loss = balance_loss
        self.balance_loss_coeff: Any = balance_loss_coeff
        self.dynamic_loss_coeff: Any = dynamic_loss_coeff
        self.budget_curve = budget_curve
        self.router_state = router_state
        self.rule_settings = rule_settings
        self.output_router_logits = output_router_logits
        self.controller = controller
        self.measured_experts_per_token = measured_experts_per_token
        for name, default in ROUTING_DEFAULTS.get(routing, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

        self.validate_dynmoe()
        _warn_of_misspelled(kwargs)
        super().__init__(**kwargs)

    @property
    def num_experts_per_tok(self) -> int | None:
        """Slots of a token at inference: experts with ``top_k``, else the cap or all experts.

        What was set, which is written to ``config.json``, is in ``vars(config)``.
        """
        if self.routing == "top_k" or not self.has_experts:
            return vars(self)["num_experts_per_tok"]
        return self.cap(training=False) or self.num_experts

    @num_experts_per_tok.setter
    def num_experts_per_tok(self, value: int | None) -> None:
        self.__dict__["num_experts_per_tok"] = value

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts; if none has, num_experts may be 0."""
        return "sparse" in self.mlp_layer_types

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer (counted from 0) has experts."""
        return self.mlp_layer_types[layer] == "sparse"

    def threshold_and_cap(self, layer: int, training: bool) -> tuple[float, int | None]:
        """The threshold and the most experts per token that apply to a layer (counted from 0).

        Raises:
            ValueError: the threshold is missing or not in [0, 1], or no curve has the budget.
        """
        given = vars(self)  # quicker, as in the router, which asks in every layer
        threshold, inference_threshold = given["threshold"], given["inference_threshold"]
        budget = None if training else given["inference_experts_per_token"]
        if budget is not None:
            threshold = self.threshold_of_budget(budget)
        elif not training and inference_threshold is not None:
            threshold = checked_threshold("inference_threshold", inference_threshold)
        elif isinstance(threshold, (list, tuple)):
            threshold = checked_threshold("threshold", threshold[layer], layer)
        else:
            threshold = checked_threshold("threshold", threshold)
        return threshold, _cap(given, training)

    @property
    def rule(self) -> LayerRule | None:
        """The rule of the routing, unless it is top-k, top-p or DTop-p."""
        return LAYER_RULES.get(vars(self)["routing"])

    @property
    def extra_logits(self) -> int:
        """How many rows the gate has beside those of the experts."""
        return 0 if self.rule is None else self.rule.extra_logits(self.rule_settings or {})

    def cap(self, training: bool) -> int | None:
        """The most experts that a token may use; None: no cap."""
        return _cap(vars(self), training)

    def validate_dynmoe(self) -> None:
        """Check all settings; call it again after you change some.

        Raises:
            ValueError: a setting makes no sense, alone or with another.
        """
        check_settings(self)

    def threshold_of_budget(self, budget: Any) -> float:
        """The curve's threshold for so many experts per token in inference.

        Raises:
            ValueError: there is no curve, or it does not have this budget.
        """
        name = "inference_experts_per_token"
        return threshold_at(vars(self)["budget_curve"], budget, self.cap(training=False), name)


def _cap(given: Mapping[str, Any], training: bool) -> int | None:
    if not training and given["inference_max_experts_per_token"] is not None:
        return given["inference_max_experts_per_token"]
    return given["max_experts_per_token"]


def _warn_of_misspelled(names: Iterable[str]) -> None:
    """Warn of names that look like a setting's; leave all others to transformers.

    The names that transformers itself writes, in later versions too, must not be refused.
    """
    known = inspect.signature(DynMoEModelConfig.__init__).parameters
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            warnings.warn(
                f"the model's configuration has {name!r}, which is no setting and has no effect: "
                f"did you mean {near[0]!r}?",
                stacklevel=3,
            )
