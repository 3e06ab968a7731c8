"""The model over two processes: by Transformers' plans it computes what it computes in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.ports import reserved_port
from tests.huggingface.tiny import left_padded, tiny_model, tokens

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "routing": "dtop_p",
    "threshold": 0.5,
    "qk_norm": True,
    "attention_bias": True,
    "shared_expert_intermediate_size": 24,
    "mlp_layer_types": ["sparse", "dense", "sparse"],
    "intermediate_size": 48,
    "vocab_size": 96,
}
PLANS = {"tp": {"tp_size": 2}, "ep": {"tp_size": 2, "ep_size": 2}}
SHAPES = {"tp": (8, 16, 32), "ep": (4, 32, 32)}  # half of each expert, or half of the experts
RUN = f"""
import sys
import torch
import megatron_dynmoe.huggingface
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
folder = sys.argv[1]
ids, mask = torch.load(folder + "/ids.pt")
found = {{}}
for plan, sizes in {PLANS}.items():
    how = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=how)
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    found[plan] = {{"shape": tuple(gate_up.to_local().shape)}}
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            output = model(ids, attention_mask=mask)
        found[plan][name] = (output.logits, output.experts_per_token)
if torch.distributed.get_rank() == 0:
    torch.save(found, folder + "/found.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_compute_what_one_computes(tmp_path):
    model = tiny_model(**SETTINGS)
    ids, mask = left_padded([tokens(1, 5)[0] - 2, tokens(1, 9)[0] - 2])
    model.save_pretrained(tmp_path)
    torch.save((ids, mask), tmp_path / "ids.pt")
    keeper, port = reserved_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={port}", "--no-python", sys.executable, "-c", RUN, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with keeper:
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    valid = mask.bool()
    for plan, found in torch.load(tmp_path / "found.pt").items():
        assert found["shape"] == SHAPES[plan]
        for name in ("eager", "grouped_mm"):
            logits, experts_per_token = found[name]
            torch.testing.assert_close(logits[valid], expected.logits[valid], atol=2e-5, rtol=1e-4)
            assert torch.equal(experts_per_token, expected.experts_per_token)
