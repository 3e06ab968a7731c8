"""Mistakes in ReLU routing, its L1 loss and the laws on its coefficient."""

from tests.mutations.mutation import Mutation

ROUTER = "tests/moe/test_relu.py"

MISTAKES = [
    Mutation(
        "loss_over_no_target",
        "lambda is not divided by the target, so each factor f_e is k and not 1",
        "moe/rules/relu.py",
        " / target.targets[-1]",
        "",
        (f"{ROUTER}::test_the_gradient_of_the_loss_is_the_papers",),
    ),
    Mutation(
        "cut_gates_left_alone",
        "gates that a cap has cut are not in the L1 loss",
        "moe/rules/relu.py",
        "chosen = choose_open(logits_TE, max_experts)",
        "chosen = (c := choose_open(logits_TE, max_experts))[0] * c[1], *c[1:]",
        ("tests/routing/rules/test_relu.py::test_a_cut_gate_is_still_in_the_loss",),
    ),
    Mutation(
        "zero_is_open",
        "a gate of exactly zero sends the token to its expert",
        "routing/rules/relu.py",
        "capped(gates_TE > 0, gates_TE, max_experts)",
        "capped(gates_TE >= 0, gates_TE, max_experts)",
        (f"{ROUTER}::test_a_token_may_have_no_expert",),
    ),
    Mutation(
        "far_counts_in_full",
        "a dense start moves lambda as far as its distance says",
        "control/pi.py",
        ".clamp(-MOST_RELATIVE_ERROR, MOST_RELATIVE_ERROR)",
        "",
        ("tests/control/test_pi.py::test_a_relative_error_depends_on_no_size_and_is_bounded",),
    ),
]
