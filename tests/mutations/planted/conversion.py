"""Mistakes in formats and upcycling."""

from tests.mutations.mutation import Mutation

UPCYCLE = "tests/conversion/test_upcycle.py::test_the_function_is_unchanged"
FOREIGN = "tests/conversion/test_foreign.py::test_ours_has_the_same_logits"

MISTAKES = [
    Mutation(
        "parts_not_scaled",
        "the parts of an upcycled copy have the weights of a whole one",
        "conversion/upcycle.py",
        'return made * parts if part == "expert_down" else made',
        "return made",
        (UPCYCLE,),
    ),
    Mutation(
        "parts_routed_apart",
        "the parts of an upcycled copy have rows of different copies in the router",
        "conversion/upcycle.py",
        ".repeat_interleave(parts, dim=0)",
        ".repeat(parts, 1)",
        (UPCYCLE,),
    ),
    Mutation(
        "parts_by_threshold",
        "copies that are cut into parts may be routed by a threshold",
        "conversion/upcycle.py",
        "if self.granularity > 1:",
        "if self.granularity > self.experts:",
        ("tests/conversion/test_upcycle.py::test_what_cannot_be_upcycled",),
    ),
    Mutation(
        "top_k_probabilities_always_normalized",
        "norm_topk_prob of a Qwen3-MoE is taken for true",
        "conversion/formats/qwen3_moe.py",
        'if theirs.get("norm_topk_prob", False) else "raw"',
        'if theirs.get("norm_topk_prob", True) else "raw"',
        ("tests/conversion/test_foreign.py::test_what_a_file_leaves_out",),
    ),
    Mutation(
        "sparse_step_from_the_first_layer",
        "every n-th layer of a Qwen3-MoE is counted from the first one on",
        "conversion/formats/qwen3_moe.py",
        "(layer + 1) % step == 0",
        "layer % step == 0",
        (FOREIGN,),
    ),
]
