#!/bin/bash
# Trains on a Cloud TPU slice, without a scheduler.
#
# Copy this file, edit the lines marked EDIT, and run the copy where gcloud is logged in,
# inside tmux or screen, because it runs until the training ends:
#
#   bash tpu_vm.sh           create the TPU, set it up and train; again if it is preempted
#   bash tpu_vm.sh stop      save and end the run; `bash tpu_vm.sh` resumes
#   bash tpu_vm.sh delete    delete the TPU, which costs money until then
#
# A run on several hosts needs a file system that they share: an NFS export in the network
# of the TPU that the login user can write to. It is mounted at /shared, and paths in the
# command and in the config are relative to it. On a single host leave `nfs` empty: the run
# is then on the disk of the TPU, which is deleted with it.

set -euo pipefail

# EDIT: name, zone and size of the TPU. Runtime versions: v2-alpha-tpuv5-lite (v5e),
# v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), tpu-ubuntu2204-base (v4).
name=gptjax
place=(--zone=us-west4-a) # or (--zone=us-west4-a --project=PROJECT)
size=(--accelerator-type=v5litepod-32 --runtime-version=v2-alpha-tpuv5-lite) # and --spot
nfs=10.0.0.2:/share
requirement='gptjax[tpu] @ git+https://github.com/OWNER/NAME'
# EDIT: a built-in config or a TOML file, the run folder, further options.
train=(train gpt2_124m --run runs/gpt2_124m --distributed auto)
max_failures=3

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    "${size[@]}"
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

wait_until_active() {
  while true; do
    current=$(state)
    case "$current" in
      ACTIVE) return ;;
      NONE) create ;;
      SUSPENDED) delete ;; # preempted; it does not come back by itself
      FAILED)
        echo "cannot get the TPU; see 'gcloud compute tpus queued-resources describe $name'" >&2
        exit 1
        ;;
      *)
        echo "$current"
        sleep 30
        ;;
    esac
  done
}

setup() {
  on_all_hosts "set -e
python3 -m pip install --quiet --user uv
[ -x ~/gptjax-env/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/gptjax-env
~/.local/bin/uv pip install --quiet --python ~/gptjax-env/bin/python '$requirement'
if [ -n '$nfs' ] && ! mountpoint -q /shared; then
  command -v mount.nfs >/dev/null || { sudo apt-get update -q; sudo apt-get install -qy nfs-common; }
  sudo mkdir -p /shared
  sudo mount -t nfs '$nfs' /shared
fi"
}

run_train() { # exec: a signal must reach the run, not a shell
  on_all_hosts "cd ${nfs:+/shared} && exec ~/gptjax-env/bin/gptjax $(printf '%q ' "${train[@]}")"
}

case "${1:-run}" in
  run)
    failures=0
    while true; do
      wait_until_active
      code=0
      { setup && run_train; } || code=$?
      if [ "$code" -eq 0 ]; then
        echo "done; 'bash $0 delete' deletes the TPU"
        exit 0
      fi
      sleep 60 # until the state shows a preemption
      [ "$(state)" = ACTIVE ] || continue
      if [ "$code" -eq 75 ]; then
        echo "interrupted, all progress is saved; 'bash $0' resumes"
        exit 75
      fi
      failures=$((failures + 1))
      [ "$failures" -le "$max_failures" ] || exit "$code"
    done
    ;;
  stop) on_all_hosts "pkill -TERM -f '[g]ptjax train'" ;;
  delete) delete ;;
  *)
    echo "usage: bash $0 [stop|delete]" >&2
    exit 2
    ;;
esac
