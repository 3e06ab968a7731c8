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
        "tokens_without_the_dense_mlp",
        "experts are grown for a rule that may leave a token without any",
        "conversion/upcycle.py",
        "if ROUTINGS[routing].least_experts == 0:",
        "if ROUTINGS[routing].least_experts < 0:",
        ("tests/conversion/test_upcycle.py::test_what_cannot_be_upcycled",),
    ),
    Mutation(
        "scaling_beside_other_positions",
        "scaled positions are overlooked beside rope_parameters",
        "conversion/formats/common.py",
        'word = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"',
        'word = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"',
        ("tests/conversion/bad_input/test_folders.py::test_what_training_does_not_have",),
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
        "any_output_layer_beside_a_tied_embedding",
        "an output layer that differs from the embedding it is tied to is left out",
        "conversion/sources.py",
        "not torch.equal(*both)",
        "False",
        ("tests/conversion/test_foreign.py::test_tensors_that_repeat_others_are_not_needed",),
    ),
    Mutation(
        "one_expert_whose_weight_is_always_one",
        "a model whose router no text can train is converted for a training that refuses it",
        "conversion/megatron/settings.py",
        'and config["num_experts_per_tok"] == 1',
        'and config["num_experts_per_tok"] == 0',
        ("tests/conversion/bad_input/test_folders.py::test_what_training_does_not_have",),
    ),
    Mutation(
        "two_models_in_one_folder",
        "a folder with shards and another model's single file is converted",
        "conversion/hugging_face/folder.py",
        "(self.folder / SINGLE).is_file() and SINGLE not in names",
        "not (self.folder / INDEX).is_file()",
        ("tests/conversion/bad_input/test_folders.py::test_files_of_weights",),
    ),
    Mutation(
        "padding_with_the_end_of_a_text",
        "an exported tokenizer pads with the end token, which collators leave out of the loss",
        "conversion/hugging_face/tokenizer.py",
        '"unk_token" if proto.trainer_spec.byte_fallback else "eos_token"',
        '"eos_token"',
        (
            "tests/conversion/test_tokenizer.py"
            "::test_collators_leave_the_end_of_a_text_to_be_learned",
        ),
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
