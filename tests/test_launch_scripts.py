"""The scripts in configs/launch: run with stubs for the tools of each scheduler."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from gptjax.config import builtin_config_dir
from tests.command_line import parse_command

FOLDER = builtin_config_dir() / "launch"
RECORD = 'printf "%s\\0" "$@" "end of call" >> "$HOME/{name}.calls"'
UV, TRAIN = ".local/bin/uv", "gptjax-env/bin/gptjax"


def run_script(home, script, stubs, *words, **variables):
    """Runs a script with stubs of programs; returns its exit code and their calls."""
    for name, body in stubs.items():
        path = home / name if "/" in name else home / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{RECORD.format(name=path.name)}\n{body}\n")
        path.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    variables |= {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"}
    command = ["bash", "-c", script, "script", *words]
    done = subprocess.run(command, env=clean | variables, cwd=home, capture_output=True, timeout=20)
    calls = {}
    for path in home.glob("*.calls"):
        lines = path.read_text().split("end of call\0")[:-1]
        calls[path.stem] = [line.split("\0")[:-1] for line in lines]
        path.unlink()
    return done.returncode, calls


def check_train(words, distributed="auto"):
    """Asserts that the arguments of gptjax are a valid command for many hosts."""
    command, arguments = parse_command(words)
    found = (command.name, arguments["distributed"], arguments["run_dir"])
    assert found == ("train", distributed, Path("runs/gpt2_124m"))


@pytest.mark.parametrize(("code", "requeued"), [(75, 1), (1, 0)])
def test_slurm_requeues_a_job_that_was_interrupted(tmp_path, code, requeued):
    script = (FOLDER / "slurm.sh").read_text()
    stubs = {"srun": f"exit {code}", "scontrol": ""}

    found, calls = run_script(tmp_path, script, stubs, SLURM_JOB_ID="7")

    assert found == code
    assert calls.get("scontrol", []) == [["requeue", "7"]] * requeued
    (words,) = calls["srun"]
    check_train(words[words.index("gptjax") + 1 :])


GCLOUD = """
case "$3 $4" in
  "queued-resources describe") head -n 1 "$HOME"/states; sed -i 1d "$HOME"/states ;;
  "tpu-vm ssh") last="${@: -1}"; bash -c "cd() { :; }; ${last#--command=}" ;;
esac
"""
EXIT = 'code=$(head -n 1 "$HOME"/codes); sed -i 1d "$HOME"/codes; exit "$code"'


@pytest.mark.parametrize(
    ("states", "codes", "code", "verbs"),
    [
        ("NONE PROVISIONING ACTIVE", "0", 0, "create ssh ssh"),
        ("ACTIVE SUSPENDED SUSPENDED NONE ACTIVE", "75 0", 0, "ssh ssh delete create ssh ssh"),
        ("FAILED", "0", 1, ""),
    ],
)
def test_tpu_vm_creates_the_tpu_again_after_a_preemption(tmp_path, states, codes, code, verbs):
    script = (FOLDER / "tpu_vm.sh").read_text()
    (tmp_path / "states").write_text(states.replace(" ", "\n"))
    (tmp_path / "codes").write_text(codes.replace(" ", "\n"))
    tools = ("sleep", "python3", "sudo", UV, "gptjax-env/bin/python")
    stubs = {"gcloud": GCLOUD, TRAIN: EXIT, **dict.fromkeys(tools, "")}

    found, calls = run_script(tmp_path, script, stubs)

    assert found == code
    assert [call[3] for call in calls["gcloud"] if call[3] != "describe"] == verbs.split()
    for call in calls.get("gptjax", []):
        check_train(call)
    _, calls = run_script(tmp_path, script, {**stubs, "pkill": ""}, "stop")
    assert calls["pkill"] == [["-TERM", "-f", "[g]ptjax train"]]


def test_gke_trains_on_every_host_and_restarts_interrupted_pods(tmp_path):
    spec = yaml.safe_load((FOLDER / "gke.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]

    command = shlex.join(container["command"])
    code, calls = run_script(tmp_path, command, {"pip": "", "gptjax": "exit 75"})

    assert code == 75
    assert "gptjax[tpu] @ git+https://" in calls["pip"][0][-1]
    check_train(calls["gptjax"][0])
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]


def test_skypilot_connects_the_nodes_and_recovers_interrupted_jobs(tmp_path):
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    nodes = {"NODE_IPS": "10.0.0.7\n10.0.0.8", "NODE_RANK": "1", "NUM_NODES": "2"}
    variables = {f"SKYPILOT_{name}": value for name, value in nodes.items()}

    script = f"cd() {{ :; }}\n{task['setup']}\n{task['run']}"
    stubs = {TRAIN: "exit 75", UV: "", "python3": ""}
    code, calls = run_script(tmp_path, script, stubs, **variables)

    assert code == 75
    check_train(calls["gptjax"][0], "10.0.0.7:8476,2,1")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
