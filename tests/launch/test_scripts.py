"""The launch scripts up to the point where they would start a job: settings and plain mistakes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# What each script trains unless it is told otherwise.
DEFAULTS = {
    "pretrain_dtop_p.sh": "dtop_p_16e",
    "pretrain_dynamic.sh": "moe_dynamic_p04",
    "pretrain_topk.sh": "moe_top2",
    "pretrain_dense.sh": "dense_374m",
}
SCRIPTS = list(DEFAULTS)


# Programs of a cluster, as far as the scripts ask them: an sbatch that says what it got, a scontrol
# that knows two jobs of which the first counts, a node with two interfaces, one without address.
PROGRAMS = {
    "sbatch": 'echo "sbatch $* in ${SBATCH_PARTITION:-none}"',
    "scontrol": 'printf "JobId=%s\\n   Command=%s\\n" 7 "$COMMAND" 8 "/no/b.sh x.sh y"',
    "ip": 'if [[ $* == *" dev "* && $* != *"dev ib0" ]]; then exit 1; fi\n'
    'echo "2: ib0    inet 10.1.2.3/16 brd 10.1.255.255 scope global ib0"',
}
# What a job finds: one node with two CPUs.
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_CPUS_ON_NODE": "2",
}


@pytest.fixture
def bash(tmp_path):
    """Runs a script of launch/ with a cluster's settings and programs, and these variables."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH"))
    }
    environment = kept | {"PATH": f"{programs}:{os.environ['PATH']}"}

    def run(
        script: str,
        *arguments: str,
        settings: str | None = "DEVICE=cpu\nPARSE_FLAGS=no",
        **variables: str,
    ):
        file = tmp_path / "cluster.env"
        if settings is not None:
            file.write_text(f"{settings}\nRUNS='{tmp_path}/runs'\n")
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=environment | {"CLUSTER_ENV": str(file)} | variables,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    return run


def submit(bash, *arguments: str, settings: str = "DEVICE=cpu"):
    return bash("submit.sh", *arguments, settings=f"{settings}\nPARSE_FLAGS=no")


def assert_opens_no_attempt(answer: subprocess.CompletedProcess, tmp_path: Path, words: str):
    assert answer.returncode == 2 and words in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_needs_the_clusters_settings(bash, script):
    answer = bash(script, settings=None)
    assert answer.returncode == 2
    assert "cp " in answer.stderr and "cluster.env.example" in answer.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_slurm_did_not_start_says_how_to_submit_it(bash, script):
    answer = bash(script)
    assert answer.returncode == 2
    assert "launch/submit.sh" in answer.stderr and "launch/local.sh" in answer.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_default_recipe_fits_one_node_of_eight(bash, script):
    answer = submit(bash, "--ntasks-per-node", "8", str(LAUNCH / script), "--mock-data")
    assert answer.returncode == 0, answer.stderr
    assert f"sbatch --ntasks-per-node 8 {LAUNCH / script} --mock-data" in answer.stdout


def test_the_example_of_settings_is_read(bash):
    example = (LAUNCH / "cluster.env.example").read_text()
    answer = submit(bash, str(LAUNCH / "pretrain_dense.sh"), "smoke", settings=example)
    assert answer.returncode == 0, answer.stderr


def test_submitting_uses_the_clusters_settings(bash):
    settings = (
        "export SBATCH_PARTITION=fast SBATCH_GPUS_PER_NODE=a800:8\n"
        "DATA_FLAGS=(--data-path '/no where/text' --tokenizer-model /nowhere)"
    )
    script = str(LAUNCH / "pretrain_dtop_p.sh")
    answer = submit(bash, "-N", "2", script, "smoke", "--micro-batch-size", "2", settings=settings)
    assert "--micro-batch-size 2 times 16 data-parallel ranks" in answer.stderr
    answer = submit(bash, "--nodes=1", script, "smoke", settings=settings)
    assert f"sbatch --nodes=1 {script} smoke in fast" in answer.stdout
    answer = submit(bash, script, "dtop_p_16e", settings=settings)
    assert "no file /no where/text.bin" in answer.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "checked for nodes x processes = 1 x 1"),
        ("--gres=gpu:8", "= 1 x 8"),
        ("--gres gpu:a800:8", "= 1 x 8"),
        ("--gres=shm:3,gpu:a:2,gpu:b:2", "= 1 x 4"),
        ("--gres gpu:a800", "= 1 x 1"),
        ("--gpus 8", "= 1 x 8"),
        ("-G8 -n 16", "= 1 x 8"),
        ("-G a800:8 -N2", "= 2 x 4"),
        ("--gpus-per-node=a800:4 --ntasks-per-node 2 -N 2", "= 2 x 4"),
        ("--nodes=4 --nodes=2", "= 2 x 1"),
        ("--gpus 3 -N 2", "not checked here: 2 nodes do not share 3 GPUs"),
        ("--gres gpu:8 -G 8", "not checked here: GPUs are asked for in two ways"),
        ("--gpus-per-task 1 -n 16", "not checked here: --gpus-per-task"),
        ("-n 16", "not checked here: --ntasks does not say"),
        ("--ntasks 16 -N 2", "not checked here: --ntasks does not say"),
        ("--exclusive", "not checked here: --exclusive gives all GPUs"),
        ("--nodes 2-4", "not checked here: --nodes is the range 2-4"),
    ],
)
def test_the_number_of_processes_follows_from_any_way_to_ask_for_them(bash, options, told):
    script = str(LAUNCH / "pretrain_dtop_p.sh")
    answer = submit(bash, *options.split(), script, "smoke")
    assert answer.returncode == 0, answer.stderr
    assert told in answer.stdout
    assert f"sbatch {options} {script} smoke".replace("  ", " ") in answer.stdout


def test_variables_and_lines_of_the_script_ask_for_processes_too(bash, tmp_path):
    script = tmp_path / "pretrain_mine.sh"
    lines = "#SBATCH --nodes=2\n#SBATCH --gres=gpu:2"
    script.write_text(f"{lines}\nsource '{LAUNCH}/common.sh'\nrun_job smoke")
    assert "= 2 x 2" in submit(bash, str(script)).stdout
    settings = "export SBATCH_GRES=gpu:a800:4"
    assert "= 2 x 4" in submit(bash, str(script), settings=settings).stdout
    answer = submit(bash, "--gres", "gpu:8", "-N1", str(script), settings=settings)
    assert "= 1 x 8" in answer.stdout


@pytest.mark.parametrize(
    "arguments", ["", " smoke", " smoke --data-path /a.sh /data/c.shuffled/text"]
)
@pytest.mark.parametrize("folder", [LAUNCH, "launch"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_copy_that_slurm_runs_finds_its_folder(bash, tmp_path, script, folder, arguments):
    shutil.copy(LAUNCH / script, tmp_path / "slurm_script")
    place = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = f"{folder}/{script}{arguments}"
    answer = bash(str(tmp_path / "slurm_script"), *arguments.split(), COMMAND=command, **place)
    assert "this is a batch job" in answer.stderr, answer.stderr  # out of common.sh


@pytest.mark.parametrize("words", [[], ["--seed", "7"], ["smoke"]])
@pytest.mark.parametrize("runs_copy", [False, True])
@pytest.mark.parametrize(("script", "recipe"), DEFAULTS.items())
def test_the_name_chooses_the_recipe_unless_one_is_named(
    bash, tmp_path, script, recipe, runs_copy, words
):
    called, settings = LAUNCH / script, f"PYTHON={tmp_path}/bin/show"
    (tmp_path / "bin" / "show").write_text('#!/usr/bin/env bash\necho "flags of $*" >&2\n')
    (tmp_path / "bin" / "show").chmod(0o755)
    variables = {"CHECK_WORLD_SIZE": "1", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    if runs_copy:
        called = tmp_path / "slurm_script"
        shutil.copy(LAUNCH / script, called)
        variables["COMMAND"] = " ".join([f"launch/{script}", *words])
    answer = bash(str(called), *words, settings=settings, **variables)
    assert answer.returncode == 0, answer.stderr
    assert f" --parse {'smoke' if words == ['smoke'] else recipe} --" in answer.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_ARRAY_JOB_ID": "7"}, "a task of a job array"),
        ({"SLURM_NTASKS": "2"}, "--ntasks is 2, which may be spread unevenly"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "the job has 2 CPUs for 8 processes a node: add --exclusive"),
    ],
)
def test_a_job_that_cannot_work_opens_no_attempt(bash, tmp_path, variables, message):
    settings = "LAUNCHER=srun"
    answer = bash("pretrain_dtop_p.sh", "smoke", settings=settings, **JOB, **variables)
    assert_opens_no_attempt(answer, tmp_path, message)


def test_torchrun_shares_few_cpus_and_says_so(bash):
    variables = JOB | {"SLURM_NTASKS_PER_NODE": "8"}
    settings = "DEVICE=cpu\nNETWORK_INTERFACE=ib0"  # this machine may be without a network
    # smokey, so that it ends before Slurm
    answer = bash("pretrain_dtop_p.sh", "smokey", settings=settings, **variables)
    assert "warning: the job has 2 CPUs for 8 processes a node" in answer.stderr
    assert "did you mean smoke?" in answer.stderr


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("eth7", "NETWORK_INTERFACE is 'eth7', but "),
        ("ib", "has no ib with an IPv4 address: use one of ib0."),
        ("^docker0", "NETWORK_INTERFACE is '^docker0' in "),
    ],
)
@pytest.mark.parametrize("script", ["pretrain_dtop_p.sh", "local.sh"])
def test_a_network_interface_that_is_none_is_named(bash, tmp_path, script, interface, message):
    settings = f"NETWORK_INTERFACE={interface}"
    answer = bash(script, "smoke", settings=settings, **JOB)
    assert_opens_no_attempt(answer, tmp_path, message)


@pytest.mark.parametrize("interface", ["ib0", "=ib0", "ib0,ib1"])
def test_nccls_ways_to_name_interfaces_are_taken(bash, tmp_path, interface):
    probe = tmp_path / "probe.sh"
    probe.write_text(
        f"set -euo pipefail; source '{LAUNCH}/common.sh'; load_settings; address_of_this_node\n"
        "echo $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME"
    )
    answer = bash(str(probe), settings=f"NETWORK_INTERFACE={interface}")
    assert answer.stdout == f"10.1.2.3\n{interface} {interface.removeprefix('=')}\n"


def test_settings_may_use_functions_that_are_careless_about_variables(bash):
    module = 'module() { local seen=$NOT_SET; false; echo "loaded $1"; }\nmodule load\n'
    answer = bash("pretrain_dtop_p.sh", "smoke", settings=module)
    assert "loaded load" in answer.stdout and "this is a batch job" in answer.stderr


@pytest.mark.parametrize("script", ["pretrain_dtop_p.sh", "local.sh"])
def test_settings_that_fail_are_named(bash, tmp_path, script):
    file = tmp_path / "broken.env"
    file.write_text("PARSE_FLAGS=no\nDATA_FLAGS=(\n")
    answer = bash(script, "smoke", CLUSTER_ENV=str(file))
    assert_opens_no_attempt(answer, tmp_path, f"reading {file} ended with status 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain_dtop_p.sh smokey", "did you mean smoke?"),
        ("-N3 pretrain_dtop_p.sh", "processes is 3"),
        ("--nodes=2 pretrain_dtop_p.sh", "there is no data"),
        ("--nodes=3 pretrain_dtop_p.sh --mock-data", "pipeline 2"),
        ("--nodes 2 pretrain_dtop_p.sh smoke --expert-model-parallel-size 3", "--num-experts is 8"),
        ("-N 16 pretrain_dtop_p.sh smoke", "--global-batch-size is 8"),
        (
            "--nodes 5 pretrain_dtop_p.sh smoke --pipeline-model-parallel-size 5",
            "--num-layers is 4",
        ),
        ("--nodes two pretrain_dtop_p.sh smoke", "--nodes is 'two'"),
        ("--nodes 2", "name a script"),
        ("--array 1-4 pretrain_dtop_p.sh smoke", "job arrays are not supported"),
        ("-a1-4 pretrain_dtop_p.sh smoke", "job arrays are not supported"),
        ("--gpus-per-node 0 pretrain_dtop_p.sh smoke", "processes of a node are '0'"),
    ],
)
def test_a_mistake_is_found_before_the_job_is_submitted(bash, arguments, message):
    words = [str(LAUNCH / word) if word.endswith(".sh") else word for word in arguments.split()]
    answer = submit(bash, *words)
    assert answer.returncode != 0
    assert answer.stderr.startswith("error: ") and message in answer.stderr
    assert "Traceback" not in answer.stderr and "sbatch" not in answer.stdout


@pytest.mark.megatron
def test_a_misspelled_flag_is_found_before_the_job_is_submitted(bash):
    script, settings = str(LAUNCH / "pretrain_dtop_p.sh"), "DEVICE=cpu"
    answer = bash("submit.sh", script, "smoke", "--clip-grads", "1", settings=settings)
    assert answer.returncode == 2 and "sbatch" not in answer.stdout
    assert "CUDA" not in answer.stderr  # of a login node without GPUs
    assert answer.stderr.startswith(
        "error: there is no flag --clip-grads: did you mean --clip-grad?"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("LAUNCHER=mpirun", "LAUNCHER is 'mpirun'"),
        ("DEVICE=tpu", "DEVICE is 'tpu'"),
    ],
)
def test_a_bad_setting_is_named(bash, settings, message):
    answer = submit(bash, str(LAUNCH / "pretrain_dtop_p.sh"), "smoke", settings=settings)
    assert answer.returncode == 2 and message in answer.stderr


def test_the_local_script_names_what_is_missing(bash):
    answer = bash("local.sh", "dtop_p_16e", settings=None)  # it needs no cluster's settings
    assert answer.returncode == 2
    assert "error: the number of processes is 1, which tensor 1 x pipeline 2" in answer.stderr
    assert "name a recipe" in bash("local.sh").stderr
    assert "'runs/mine' belongs to no flag" in bash("local.sh", "smoke", "runs/mine").stderr
    for number in ("0", "two"):
        answer = bash("local.sh", "smoke", NPROC=number)
        assert (answer.returncode, answer.stderr) == (
            2,
            f"error: NPROC is '{number}': give the number of processes, from 1.\n",
        )


def test_a_dry_run_checks_and_shows_what_it_would_submit(bash):
    script = str(LAUNCH / "pretrain_dtop_p.sh")
    settings = "export SBATCH_PARTITION='fast lane'\nDEVICE=cpu"
    answer = submit(bash, "--dry-run", "-N", "2", script, "smoke", settings=settings)
    assert answer.returncode == 0, answer.stderr
    shown = answer.stdout.splitlines()[-1]
    assert shown.startswith(r"SBATCH_PARTITION=fast\ lane ")
    assert shown.rstrip().endswith(f"sbatch -N 2 {script} smoke")
    assert "--dry-run" not in shown
    wrong = submit(bash, "--dry-run", script, "smoke", "--micro-batch-size", "7")
    assert wrong.returncode == 2 and "--micro-batch-size 7" in wrong.stderr


@pytest.mark.parametrize("script", ["submit.sh", "local.sh"])
def test_help_says_how_to_call_it_before_there_are_settings(bash, script):
    answer = bash(script, "--help", settings=None)
    assert answer.returncode == 0
    assert f"launch/{script}" in answer.stdout and "#" not in answer.stdout
