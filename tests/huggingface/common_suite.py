"""Transformers' own common tests of models and generation, run against ours.

They come from a snapshot of its repository, which ``make test-transformers`` puts in front of this
repository on the path: ``tests`` here is Transformers' package, not ours.
"""

import unittest

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModel, DynMoEModelConfig


class DynMoEModelTester(CausalLMModelTester):
    base_model_class = DynMoEModel
    config_class = DynMoEModelConfig
    causal_lm_class = DynMoEForCausalLM

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(parent, hidden_act="silu", moe_intermediate_size=16)

    def get_config(self) -> DynMoEModelConfig:
        self.num_experts_per_tok = None
        return super().get_config()


class DynMoEModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = DynMoEModelTester
