"""The model for Transformers, which every export ships with.

An import of this package registers the model with AutoConfig and AutoModel. Token ids and a
folder's weights enter; logits and the experts of each token leave.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig
from megatron_dynmoe.huggingface.modeling_dynmoe import (
    DynMoEForCausalLM,
    DynMoEModel,
    DynMoEPreTrainedModel,
)
from megatron_dynmoe.huggingface.shipping import AUTO_MAP, write_code

__all__ = ["DynMoEForCausalLM", "DynMoEModel", "DynMoEModelConfig"]

AutoConfig.register(DynMoEModelConfig.model_type, DynMoEModelConfig, exist_ok=True)
AutoModel.register(DynMoEModelConfig, DynMoEModel, exist_ok=True)
AutoModelForCausalLM.register(DynMoEModelConfig, DynMoEForCausalLM, exist_ok=True)
# A copy of the model that was loaded from a folder is saved with its code by Transformers itself.
DynMoEPreTrainedModel.auto_map = AUTO_MAP
DynMoEPreTrainedModel.write_code = staticmethod(write_code)
