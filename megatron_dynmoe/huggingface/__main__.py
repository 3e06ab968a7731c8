"""The command ``transformers``, which then knows this model, for example to serve a folder:

    python -m megatron_dynmoe.huggingface serve my-model

``transformers serve`` looks every class up among those of Transformers, so it finds none whose code
lies in a model's folder, whatever ``--trust-remote-code`` says (5.23: "has no attribute").
"""

import transformers
from transformers.cli.transformers import main

from megatron_dynmoe.huggingface import DynMoEForCausalLM

if __name__ == "__main__":
    transformers.DynMoEForCausalLM = DynMoEForCausalLM
    main()
