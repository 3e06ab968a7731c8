"""GPT datasets from Megatron's flags."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_dynmoe.backends.attention.documents import lengths_travel
from megatron_dynmoe.training.datasets.splits import SPLITS, splits_read
from megatron_dynmoe.training.datasets.token_files import (
    DatasetConfig,
    GPTDataset,
    naming_the_cache,
)


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the training, validation and test datasets of one model chunk.

    Args:
        num_samples: the number of samples wanted of each of the three.
        vp_stage: the chunk's virtual pipeline stage.
    """
    args = get_args()
    print_rank_0("> building training, validation and test datasets ...")
    with naming_the_cache(args):
        datasets = BlendedMegatronDatasetBuilder(
            MockGPTDataset if args.mock_data else GPTDataset,
            num_samples,
            partial(_is_built_here, vp_stage),
            dataset_config(args),
        ).build()
    if args.dataloader_type == "single":
        check_lengths(datasets, num_samples)
    return datasets


# Every rank builds its part; without this Megatron builds on tensor-parallel rank 0 alone.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def check_lengths(datasets: Sequence[Any], num_samples: Sequence[int | None]) -> None:
    """Refuse data that would run out in the middle of a run.

    If several files have no weights, upstream reads each once, and gives no message if they are
    too short.

    Args:
        datasets: those of training, validation and test; each is a dataset, a list or None.
        num_samples: how many samples of each the run needs; None means all there are.

    Raises:
        ValueError: a dataset has fewer samples than the run needs.
    """
    for name, dataset, needed in zip(SPLITS, datasets, num_samples, strict=True):
        for part in dataset if isinstance(dataset, list) else [dataset]:
            if part is not None and needed is not None and len(part) < needed:
                raise ValueError(
                    f"the {name} data hold {len(part)} sequences, and this run needs {needed}. "
                    "Several files without weights are read once: give each a weight, as in "
                    "--data-path 1 FILE 1 FILE, to have them read as often as needed, or need "
                    "fewer (--train-iters, --eval-iters, --eval-interval)."
                )


def dataset_config(args: Any) -> DatasetConfig:
    """Megatron's dataset configuration from its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    tokenizer = build_tokenizer(args)
    config = DatasetConfig(
        num_embeddings=args.padded_vocab_size,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        # Positions also say to attention where documents begin.
        reset_position_ids=args.reset_position_ids or lengths_travel(args),
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    # Upstream also counts the epochs of a split that no one reads; if that split has no token, it
    # counts for ever.
    for number, is_read in enumerate(splits_read(args)):
        if not is_read and not args.mock_data:
            if config.split_matrix is not None:
                config.split_matrix[number] = None
            if config.blend_per_split is not None:
                config.blend_per_split[number] = None
    return config


def _is_built_here(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return lengths_travel(get_args()) or is_first_or_last_pipeline_stage(vp_stage)
