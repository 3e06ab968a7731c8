"""A training script as a user of Megatron has one: nothing in it knows of dynamic routing."""

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def forward_step(data_iterator, model):
    batch = {"tokens": None, "position_ids": None, "labels": None, "loss_mask": torch.ones(())}
    if mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage():
        batch = next(data_iterator)
    loss_mask = batch["loss_mask"].view(-1)

    def loss_function(losses):
        total = (losses.view(-1).float() * loss_mask).sum()
        num_tokens = loss_mask.sum().int()
        return total, num_tokens, {"lm loss": torch.stack([total.detach(), num_tokens.float()])}

    return model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
    ), loss_function


def datasets(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args()
    model_config = gpt_config_from_args(args)
    config = pretrain_cfg_container_from_args(args, model_config)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
