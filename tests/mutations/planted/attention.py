"""Mistakes in attention and positions."""

from tests.mutations.mutation import Mutation

APART = "tests/distributed/test_documents.py"
LATENT = "tests/distributed/test_latent_attention.py"

MISTAKES = [
    Mutation(
        "documents_see_each_other",
        "documents that are to be kept apart are one",
        "backends/attention/documents.py",
        ".split(lengths.tolist())",
        ".split([int(lengths.sum())])",
        ("tests/backends/test_documents.py::test_attention_is_that_of_each_document",),
    ),
    Mutation(
        "stages_without_lengths",
        "stages between the first and the last do not know where documents begin",
        "training/forward.py",
        "if not (has_lengths or is_first_or_last_pipeline_stage(vp_stage)):",
        "if not is_first_or_last_pipeline_stage(vp_stage):",
        (f"{APART}::test_documents_stay_apart_under_every_layout[pp2]",),
    ),
    Mutation(
        "data_without_ends_taken",
        "documents are to be told apart in data that do not mark their ends",
        "training/datasets/token_files.py",
        "if check.state == WARNING:",
        "if check.state == WARNING and not by_eod:",
        ("tests/training/test_token_files.py::test_documents_without_an_end_cannot_be_told_apart",),
    ),
    Mutation(
        "latent_positions_not_summed",
        "the gradient of the keys' positions is not summed over tensor-parallel ranks",
        "backends/torch_native.py",
        "attention.module = LatentAttention",
        "attention.module = MLASelfAttention",
        (f"{LATENT}::test_tensor_parallel_ranks_train_it_as_one",),
    ),
    Mutation(
        "latent_values_cut",
        "padded values of latent attention keep the size of the keys",
        "backends/torch_native.py",
        "return context[..., :value_size].flatten(2)",
        "return context.flatten(2)",
        ("tests/backends/test_torch_native.py::test_heads_of_two_sizes_attend_as_in_local",),
    ),
]
