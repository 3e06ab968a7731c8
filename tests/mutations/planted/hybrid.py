"""Mistakes in models whose layers are written down one by one."""

from tests.mutations.mutation import Mutation

TESTS = "tests/settings/test_hybrid_pattern.py"

MISTAKES = [
    Mutation(
        "stages_count_as_layers",
        "the marks between pipeline stages are counted as layers",
        "settings/hybrid_pattern.py",
        'layers = pattern.replace(PIPE, "")',
        "layers = pattern",
        (f"{TESTS}::test_layers_follow_from_the_pattern",),
    ),
    Mutation(
        "dense_layers_of_a_pattern_have_experts",
        "every MLP of a pattern is taken for one with experts",
        "settings/hybrid_pattern.py",
        "int(symbol == EXPERTS) for symbol in layers",
        "int(symbol != ATTENTION) for symbol in layers",
        (f"{TESTS}::test_layers_follow_from_the_pattern",),
    ),
    Mutation(
        "halves_of_a_layer_are_swapped",
        "a converted model by a pattern has its MLPs before the attention",
        "conversion/names.py",
        "2 * layer + half",
        "2 * layer + 1 - half",
        ("tests/conversion/test_patterns.py::test_attention_and_mlps_are_layers_of_their_own",),
    ),
]
