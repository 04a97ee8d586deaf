"""The files for schedulers do what they say, tried with stand-ins for their tools."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.cli.launch import FILES, RESTARTS, launch, yaml_text
from gptjax.config import find_config
from gptjax.errors import ConfigError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NAMES = TEXTS.filter(bool) | st.sampled_from(
    ["it's", '"', "$(touch x)", "`id`", "a\nb", "$$(HOME)", "#SBATCH -x", "\\", "é🦜 "]
)
SOME = {  # of every kind of launcher, options that it can be used with
    "slurm": {"nodes": 2, "devices": 8},
    "gke": {"topology": "v5e:4x8", "volume": "runs"},
    "tpu-vm": {"topology": "v5e:2x4", "zone": "us-west4-a"},
    "skypilot": {"accelerator": "H100", "devices": 8, "nodes": 2, "volume": "runs"},
}
NOTE = 'printf "%s\\0" "$#" "$@" >> "$LOG"'  # what a stand-in is told


def run_file(text, tools, *words):
    """Runs a file or its script with stand-ins for tools; code, and what each heard."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        folder = home / "tools"
        folder.mkdir()
        for tool, body in tools.items():
            path = home / tool if "/" in tool else folder / tool
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/bash\nLOG={home}/{path.name}.log\n{NOTE}\n{body}\n")
            path.chmod(0o755)
        file = home / "file.sh"
        file.write_text(text, encoding="utf-8", newline="")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        code = subprocess.run(
            ["bash", file, *words],
            env={**clean, "HOME": name, "PATH": f"{folder}:/usr/bin:/bin"},
            cwd=home,
            capture_output=True,
            timeout=20,
        ).returncode
        return code, {log.stem: heard(log) for log in home.glob("*.log")}


def heard(log):
    """The arguments of each call of a stand-in."""
    words = log.read_bytes().decode("utf-8").split("\0")[:-1]
    calls = []
    while words:
        end = int(words[0]) + 1
        calls.append(words[1:end])
        words = words[end:]
    return calls


def parsed(text):
    """What YAML's own reader makes of a file."""
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(text))


def expanded(word):
    """A word of a container's command, after Kubernetes has looked for $(NAME)."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else "expanded", word)


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    """A config that gptjax does not ship with, in a folder with a name to quote."""
    path = tmp_path_factory.mktemp("it's $HOME") / "my run.toml"
    path.write_text('[train]\nsteps = 3\n[data]\nsource = "é $x"\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(("code", "queued"), [(75, 1), (0, 0), (1, 0), (2, 0), (143, 0)])
def test_a_slurm_job_goes_back_into_the_queue_after_exit_code_75_only(code, queued):
    text = "SLURM_JOB_ID=7\n" + launch("slurm", "tiny", **SOME["slurm"])

    ended, calls = run_file(text, {"srun": f"exit {code}", "scontrol": "exit 0"})

    assert ended == code
    assert len(calls["srun"]) == 1
    assert calls.get("scontrol", []) == [["requeue", "7"]] * queued


@settings(max_examples=30)
@example("-x", "-y")
@given(NAMES, TEXTS)
def test_slurm_runs_train_with_every_name_as_it_was_given(run, value):
    text = launch("slurm", "tiny", ["--data.source", value], run=run)

    _, calls = run_file(text, {"srun": "exit 0"})

    folder = f"./{run}" if run.startswith("-") else run
    command = ["gptjax", "train", "tiny", "--data.source", value, "--run", folder]
    assert calls["srun"][0][2:] == [*command, "--distributed", "auto"]


def test_slurm_is_asked_for_a_task_per_gpu_before_anything_runs():
    options = {"partition": "gpu", "account": "me", "time": "1-12"}
    text = launch("slurm", "tiny", nodes=2, devices=8, accelerator="h100", **options)

    head = text.split("\nset -u")[0].splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in head if "#SBATCH" in line}
    assert all(line.startswith("#") for line in head)
    assert asked >= {"nodes=2", "ntasks-per-node=8", "gpus-per-node=h100:8"}
    assert asked >= {"partition=gpu", "account=me", "time=1-12"}
    assert asked >= {"requeue", "signal=TERM@120", "open-mode=append"}
    assert "gpus" not in launch("slurm", "tiny", devices=0).lower().split("set -u")[0]


@example(" a\nb\n", 2)
@given(TEXTS | TEXTS.map(lambda text: f"{text}\n"), st.integers(0, 8))
def test_any_text_is_read_back_from_yaml_as_it_was(text, indent):
    (read,) = parsed(f"a: {yaml_text(text, indent)}\nb: 1")

    assert read == {"a": text, "b": 1}


def test_gke_gets_one_pod_per_host_that_goes_on_after_exit_code_75(toml):
    config_map, job_set = parsed(
        launch("gke", str(toml), topology="v5e:4x8", volume="runs", spot=True)
    )

    spec = job_set["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert config_map["data"]["config.toml"] == toml.read_text(encoding="utf-8")
    assert job["completions"] == job["parallelism"] == 8
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    assert spec["failurePolicy"]["maxRestarts"] == RESTARTS
    assert spec["failurePolicy"]["rules"][0]["action"].endswith("IgnoreMaxRestarts")
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {container["workingDir"], "/etc/gptjax"}


@settings(max_examples=30)
@given(NAMES, TEXTS, st.booleans())
def test_gke_runs_train_with_every_name_as_it_was_given(name, value, built):
    run = f"runs/x{name.replace('/', '-')}"
    text = launch(
        "gke",
        "tiny",
        ["--data.source", value],
        run=run,
        install=value or "gptjax",
        image="me/gptjax:1" if built else "",
        **SOME["gke"],
    )

    (job_set,) = parsed(text)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    words = [*map(expanded, job["template"]["spec"]["containers"][0]["command"])]
    if not built:
        _, calls = run_file(words[2], {"pip": "exit 0", "gptjax": "exit 0"})
        assert calls["pip"] == [["install", "--quiet", value or "gptjax"]]
        words = ["gptjax", *calls["gptjax"][0]]
    end = ["--data.source", value, "--run", run, "--distributed", "auto"]
    assert words == ["gptjax", "train", "tiny", *end]
    assert re.fullmatch(r"gptjax(-[a-z0-9]+)*", job_set["metadata"]["name"])
    assert len(job_set["metadata"]["name"]) <= 40


GCLOUD = """
case "$3 $4" in
  "queued-resources describe") head -n 1 "$HOME"/states; sed -i 1d "$HOME"/states ;;
  "tpu-vm ssh") last="${@: -1}"; bash -c "${last#--command=}" ;;
esac
"""


def tpu_vm(states, codes, *words, config="tiny", **options):
    """Runs the file for TPU VMs: these states, and these codes of training."""
    text = launch("tpu-vm", config, **SOME["tpu-vm"], **options)
    begin = "printf '%s\\n' " + " ".join(states) + ' > "$HOME"/states\n'
    begin += "printf '%s\\n' " + " ".join(codes) + ' > "$HOME"/codes\n'
    train = 'code=$(head -n 1 "$HOME"/codes); sed -i 1d "$HOME"/codes; exit "$code"'
    tools = {"gcloud": GCLOUD, "uv": "", "sleep": "", "pkill": ""}
    tools |= {"gptjax-env/bin/gptjax": train, "gptjax-env/bin/python": ""}
    code, calls = run_file(begin + text, tools, *words)
    verbs = [call[3] for call in calls["gcloud"] if call[3] != "describe"]
    return code, verbs, calls


@pytest.mark.parametrize(
    ("states", "codes", "code", "verbs"),
    [
        (["NONE", "PROVISIONING", "ACTIVE"], ["0"], 0, "create ssh ssh"),
        (["ACTIVE", "ACTIVE"], ["75"], 75, "ssh ssh"),
        (
            ["ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"],
            ["75", "0"],
            0,
            "ssh ssh delete create ssh ssh",
        ),
        (["ACTIVE"] * 4, ["1", "0"], 0, "ssh ssh ssh ssh"),
        (["ACTIVE"] * 8, ["1"] * 4, 1, "ssh ssh " * (RESTARTS + 1)),
        (["FAILED"], ["0"], 1, ""),
    ],
)
def test_a_tpu_vm_is_asked_for_again_when_it_was_taken_away(states, codes, code, verbs):
    ended, called, _ = tpu_vm(states, codes)

    assert (ended, called) == (code, verbs.split())


@settings(max_examples=20)
@given(NAMES)
def test_tpu_vms_run_train_with_every_name_as_it_was_given(toml, run):
    _, verbs, calls = tpu_vm(["ACTIVE"], ["0"], config=str(toml), run=run, install=run)

    home = calls["gptjax"][0][1].removesuffix("/gptjax.toml")
    folder = f"./{run}" if run.startswith("-") else run
    end = ["--run", folder, "--distributed", "auto"]
    assert calls["gptjax"] == [["train", f"{home}/gptjax.toml", *end]]
    assert calls["uv"][0][-1] == run
    assert verbs == ["scp", "ssh", "ssh"]
    assert calls["gcloud"][1][4] == str(toml)


def test_tpu_vms_can_be_stopped_and_given_back():
    _, stopped, calls = tpu_vm(["ACTIVE"], ["0"], "stop")
    _, deleted, _ = tpu_vm(["ACTIVE"], ["0"], "delete")

    assert (stopped, deleted) == (["ssh"], ["delete"])
    assert calls["pkill"] == [["-TERM", "-f", "[g]ptjax train"]]


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e:4x4", "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("v6e:2x4", "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e"),
        ("v5p:2x2x4", "--accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5"),
        ("v4:4x4x16", "--type=v4 --topology=4x4x16 --runtime-version=tpu-ubuntu2204-base"),
    ],
)
def test_tpu_vms_are_created_by_the_name_that_the_cloud_has_for_them(topology, words):
    options = {"topology": topology, "volume": "10.0.0.2:/share"}
    text = launch("tpu-vm", "tiny", zone="z", project="p", spot=True, **options)

    _, calls = run_file(text, {"gcloud": "[ $4 = create ] && exit 1; echo NONE"})

    created = ["create", "gptjax-tiny", "--node-id=gptjax-tiny", "--zone=z"]
    assert calls["gcloud"][1][3:] == [*created, "--project=p", *words.split(), "--spot"]


@settings(max_examples=20)
@given(NAMES, TEXTS)
def test_skypilot_runs_train_with_every_name_as_it_was_given(toml, name, value):
    run = f"x{name.replace('/', '-')}"
    (task,) = parsed(launch("skypilot", str(toml), ["--a", value], run=run, **SOME["skypilot"]))

    names = "$SLURM_STEP_NODELIST $SLURM_NTASKS $SLURM_PROCID $SLURM_LOCALID"
    train = f'note "{names} $JAX_LOCAL_DEVICE_IDS"'
    begin = "cd() { :; }\nSKYPILOT_NODE_IPS=$'10.0.0.7\\n10.0.0.8'\n"
    begin += "SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_RANK=1\n"
    tools = {"gptjax-env/bin/gptjax": train, "note": ""}
    _, calls = run_file(begin + task["run"], tools)
    assert task["file_mounts"] == {"~/gptjax.toml": str(toml)}
    end = ["--a", value, "--run", run, "--distributed", "auto"]
    assert calls["gptjax"][0][2:] == end
    assert calls["note"] == [["10.0.0.7 2 1 0 0,1,2,3,4,5,6,7"]]


def test_skypilot_finds_new_machines_after_exit_code_75():
    (task,) = parsed(launch("skypilot", "tiny", spot=True, **SOME["skypilot"]))

    resources = task["resources"]
    assert (task["num_nodes"], resources["accelerators"]) == (2, "H100:8")
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert resources["job_recovery"]["max_restarts_on_errors"] == RESTARTS
    assert task["volumes"] == {"/shared": "runs"}
    assert "file_mounts" not in task


def test_skypilot_gets_a_tpu_slice_as_one_node_with_an_nfs_folder():
    options = {"volume": "10.0.0.2:/share", "zone": "us-east5-a"}
    (task,) = parsed(launch("skypilot", "tiny", topology="v5e:2x4", **options))

    assert task["num_nodes"] == 1
    assert task["resources"]["accelerators"] == "tpu-v5litepod-8"
    assert task["resources"]["infra"] == "gcp/*/us-east5-a"
    assert "mount -t nfs 10.0.0.2:/share /shared" in task["setup"]
    assert "volumes" not in task
    assert task["run"].endswith("--distributed auto\n")


def test_one_node_of_gpus_needs_no_distributed_start():
    text = launch("skypilot", "tiny", accelerator="H100", volume="runs")

    assert "--distributed" not in text
    assert "SLURM" not in text


def test_a_shipped_config_is_named_and_not_copied():
    text = launch("gke", str(find_config("book/ch05")), **SOME["gke"])

    assert "train book/ch05 --run runs/ch05 " in text
    assert "ConfigMap" not in text


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_written_once_and_says_how_it_is_submitted(tmp_path, kind):
    out = tmp_path / "launch it"
    submit = {"slurm": "sbatch", "gke": "kubectl apply -f", "tpu-vm": "bash"}
    line = f"#   {submit.get(kind, 'sky jobs launch')} '{out}'"

    tried = launch(kind, "tiny", out=out, dry_run=True, **SOME[kind])
    assert not out.exists()
    text = launch(kind, "tiny", out=out, **SOME[kind])

    assert tried == text == out.read_text(encoding="utf-8")
    head = [row for row in text.splitlines()[:12] if row.startswith("#")]
    assert any(row.startswith(line) for row in head)
    with pytest.raises(ConfigError, match=r"--out=.* already exists"):
        launch(kind, "tiny", out=out, **SOME[kind])
    assert out.read_text(encoding="utf-8") == text


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write --out=.*nowhere"):
        launch("slurm", "tiny", out=tmp_path / "nowhere" / "x")
