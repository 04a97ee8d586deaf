"""Trackers: what their own readers find equals the events of the run."""

import json
import math
import struct

import numpy as np
import pytest

from gptjax.plots.curves import new_figure
from gptjax.tracking.follow import follow_run
from gptjax.training.metrics import log_event, read_events

pytestmark = pytest.mark.peers

STEPS, RESUMED_AT = 6, 3


def log_steps(run_dir, first, last, offset):
    for step in range(first, last + 1):
        values = {"loss": 3 - step / 7 + offset, "lr": 1e-3}
        log_event(run_dir / "metrics.jsonl", "train", step, **values)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """Run of which one part was sent before it was resumed, and one part after."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.toml").write_text("[optim]\npeak_lr = 0.25\n")
    log_steps(folder, 1, 4, 0.0)
    return folder


def send_in_two_parts(run_dir, tracker):
    """Sends before and after a resume; returns the events that count."""
    path = run_dir / "metrics.jsonl"
    follow_run(run_dir, tracker, lambda: False)
    log_event(path, "resume", RESUMED_AT)
    log_steps(run_dir, RESUMED_AT + 1, STEPS, 0.5)
    nested = {"loss": math.nan, "tasks": {"copy": 0.75}}
    log_event(path, "eval", STEPS, split="test", **nested)
    log_event(path, "sample", STEPS, text="a sample")
    new_figure("x", "y")[0].savefig(run_dir / "loss.png")
    assert follow_run(run_dir, tracker, lambda: False) > 0
    assert follow_run(run_dir, tracker, lambda: False) == 0  # nothing twice
    return read_events(path)


def log_records(data):
    """Records of a LevelDB log, which a .wandb file is behind its 7 bytes of header.

    wandb 0.31 reads such files in Go only; the messages in them are parsed by wandb.
    """
    assert data[:4] == b":W&B"
    record, block_size, at = b"", 32_768, 7
    while at + 7 <= len(data):
        if block_size - at % block_size < 7:  # padding at the end of a block
            at += block_size - at % block_size
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)  # the CRC, the length, the kind
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


def expected_scalars(events):
    """Values by metric and step."""
    scalars = {"eval/test/loss": {STEPS: math.nan}, "eval/test/tasks/copy": {STEPS: 0.75}}
    for name in ("loss", "lr"):
        scalars[f"train/{name}"] = {e["step"]: e[name] for e in events if e["event"] == "train"}
    return scalars


def test_tensorboard_reads_all_scalars_texts_and_pictures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = expected_scalars(send_in_two_parts(run_dir, "tensorboard"))

    reader = EventAccumulator(str(run_dir / "tracking" / "tensorboard"))
    reader.Reload()
    found = {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        rounded = [(step, np.float32(value)) for step, value in values.items()]
        np.testing.assert_array_equal(found[tag], rounded, tag)
    assert b"0.25" in reader.Tensors("config")[0].tensor_proto.string_val[0]
    assert b"a sample" in reader.Tensors("sample")[0].tensor_proto.string_val[0]
    (picture,) = reader.Images("pictures/loss")
    assert picture.encoded_image_string == (run_dir / "loss.png").read_bytes()
    assert picture.width > picture.height > 0


def test_wandb_reads_all_scalars_texts_and_pictures(run_dir):
    from wandb.proto.wandb_internal_pb2 import Record

    expected = expected_scalars(send_in_two_parts(run_dir, "wandb"))

    files = sorted((run_dir / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    found, own_steps, configs = {}, [], []
    for file in files:
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if row:
                own_steps.append(row.pop("_step"))
                for name in row.keys() - {"step"}:
                    found.setdefault(name, {})[row["step"]] = row[name]
            configs += [x.value_json for x in record.run.config.update if x.key == "optim"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=0, abs=0, nan_ok=True), name
    assert own_steps == sorted(set(own_steps))  # the service drops smaller ones
    assert json.loads(configs[0]) == {"peak_lr": 0.25}
    assert found["sample/_type"][STEPS] == "html-file"
    assert found["pictures/loss/_type"][STEPS] == "image-file"


def test_trackio_reads_all_scalars_texts_and_pictures(run_dir):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    expected = expected_scalars(send_in_two_parts(run_dir, "trackio"))

    (run,) = trackio.Api().runs("gptjax")
    assert run.name.startswith("mine-")
    assert run.config["optim"] == {"peak_lr": 0.25}
    found = {}
    for row in SQLiteStorage.get_logs("gptjax", run.name):
        for name in row.keys() - {"step", "timestamp"}:
            found.setdefault(name, {})[row["step"]] = row[name]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=0, abs=0, nan_ok=True), name
    assert "a sample" in found["sample"][STEPS]["_value"]
    assert found["pictures/loss"][STEPS]["_type"] == "trackio.image"
