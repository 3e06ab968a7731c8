"""A machine whose own name leads nowhere: one machine trains, several are told what to give."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from megatron_dynmoe import torchrun_plugin
from megatron_dynmoe.jobs import host_names

NOWHERE = "no-such-host-7"
ONE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
SEVERAL = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}


@pytest.fixture
def names(monkeypatch):
    """Only this machine's loopback is known."""
    monkeypatch.setattr(
        host_names, "addresses", lambda name: ["127.0.0.1"] if name != NOWHERE else []
    )
    monkeypatch.setattr(host_names, "own_name", lambda: NOWHERE)
    monkeypatch.setattr(torchrun_plugin, "own_name", lambda: NOWHERE)
    for name in ("PET_LOCAL_ADDR", "PET_STANDALONE", "PET_RDZV_ENDPOINT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_address_is_of_this_machine_or_not():
    assert host_names.is_of_this_machine("127.0.0.1")
    assert not host_names.is_of_this_machine("192.0.2.1")  # of documentation, nobody's
    assert host_names.addresses("name.invalid") == []
    assert host_names.addresses("\x00" * 80) == []


def test_on_one_machine_the_address_is_replaced(names, capsys):
    names.setattr(os, "environ", {**ONE, "RANK": "0", "MASTER_ADDR": NOWHERE})
    host_names.fix_master_address()
    assert os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1")
    assert NOWHERE in capsys.readouterr().out


def test_on_several_machines_nothing_is_guessed(names, capsys):
    names.setattr(os, "environ", {**SEVERAL, "RANK": "0", "MASTER_ADDR": NOWHERE})
    with pytest.raises(ValueError, match=f"MASTER_ADDR is {NOWHERE}.*--master-addr"):
        host_names.fix_master_address(patience=0.01)
    assert os.environ["MASTER_ADDR"] == NOWHERE


@pytest.mark.parametrize("environment", [ONE, SEVERAL])
def test_an_address_that_leads_somewhere_stays(names, environment):
    names.setattr(os, "environ", {**environment, "MASTER_ADDR": "node-1"})
    host_names.fix_master_address()
    assert os.environ["MASTER_ADDR"] == "node-1"


@pytest.mark.parametrize(
    ("command", "local_address"),
    [
        ("torchrun --standalone -m x", "127.0.0.1"),
        ("torchrun --standalone --local-addr 10.0.0.1 -m x", None),
        ("torchrun --nnodes 2 --rdzv-endpoint node-1:29500 -m x", None),
        ("torchrun --master-addr 10.0.0.1 --nnodes 2 -m x", None),
    ],
)
def test_torchrun_is_given_an_address_on_one_machine_only(names, capsys, command, local_address):
    names.setattr(os, "environ", dict(os.environ))
    torchrun_plugin.fix_local_address(command.split())
    found = os.environ.get("PET_LOCAL_ADDR")
    assert found == local_address or (local_address and found == "localhost")
    assert ("give each torchrun --local-addr" in capsys.readouterr().err) is (
        "--rdzv-endpoint" in command
    )


def test_torchrun_finds_the_plugin_and_other_programs_are_left_alone():
    (plugin,) = (p for p in entry_points(group="torchrun.handlers") if p.name == "dynmoe")
    assert plugin.load() is torchrun_plugin.rendezvous_handler
    code = (
        "import os, torch.distributed.elastic.rendezvous.registry\n"
        "from megatron_dynmoe import torchrun_plugin\n"
        "torchrun_plugin.rendezvous_handler()\n"
        "assert 'PET_LOCAL_ADDR' not in os.environ\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
