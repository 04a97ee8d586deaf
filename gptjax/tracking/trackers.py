"""Trackers: one class per tracker, all with the methods of `Sink`.

Nothing is sent anywhere unless the user's environment says so: TensorBoard and trackio
write files; Weights & Biases writes files too, which `wandb sync` sends, unless
WANDB_API_KEY or WANDB_MODE is set.
"""

import html
import json
import os
import re
import socket
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gptjax.errors import ConfigError, ResourceError, install_command, is_installed
from gptjax.tracking.events import Record

LOSS_OF_DATA = re.compile("persisted|lost|dropped")  # in warnings of trackio
PROJECT = "gptjax"  # name of the project, where a tracker has projects


class TrackedRun(NamedTuple):
    """Run that is sent to a tracker."""

    name: str
    id: str  # the same in all processes that send this run
    config: dict[str, Any]  # its config.toml
    folder: Path  # for the files of the tracker
    is_new: bool  # False if a part was sent earlier


@runtime_checkable
class Sink(Protocol):
    """Connection to a tracker. Any method may raise any exception."""

    def log(self, record: Record) -> None:
        """Sends the values of one event."""
        ...

    def log_picture(self, path: Path, record: Record) -> None:
        """Sends a PNG file, drawn after the event `record`."""
        ...

    def close(self) -> None:
        """Sends all that is still pending."""
        ...


class TensorBoardSink:
    """Event files for TensorBoard, one per process.

    A value is rounded to float32, as TensorBoard stores it. After a resume, TensorBoard
    itself drops the superseded steps.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Creates an event file; TensorBoard reads the files in the order of names."""
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.protos: Any = event_pb2, summary_pb2, tensor_pb2, types_pb2
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.writer: Any = RecordWriter((folder / name).open("xb"))
        self.write(0, time.time(), file_version="brain.Event:2")
        if run.is_new:
            text = json.dumps(run.config, indent=2)
            value = self.text_value("config", f"```json\n{text}\n```")
            self.write(0, time.time(), summary=summary_pb2.Summary(value=[value]))

    def write(self, step: int, wall_time: float, **fields: Any) -> None:
        """Writes an event."""
        event = self.protos[0].Event(wall_time=wall_time, step=step, **fields)
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def text_value(self, tag: str, text: str) -> Any:
        """Value with a text in Markdown."""
        _, summary_pb2, tensor_pb2, types_pb2 = self.protos
        metadata = summary_pb2.SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        data = text.encode("utf-8", "replace")
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[data])
        return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)

    def log(self, record: Record) -> None:
        """Writes the values of an event."""
        event_pb2, summary_pb2, *_ = self.protos
        if record.kind == "resume":  # drops this step and later ones
            first = record.step + 1 if record.step else 0
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write(first, record.time, session_log=start)
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in record.scalars.items()
        ]
        values += [self.text_value(tag, f"```\n{text}\n```") for tag, text in record.texts.items()]
        if values:
            self.write(record.step, record.time, summary=summary_pb2.Summary(value=values))

    def log_picture(self, path: Path, record: Record) -> None:
        """Writes a picture."""
        summary_pb2, data = self.protos[1], path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of a PNG file's first chunk
        image = summary_pb2.Summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=data
        )
        value = summary_pb2.Summary.Value(tag=f"pictures/{path.stem}", image=image)
        self.write(record.step, record.time, summary=summary_pb2.Summary(value=[value]))

    def close(self) -> None:
        """Closes the event file."""
        self.writer.close()


class WandbSink:
    """Weights & Biases: a folder for `wandb sync`, or the service if a key is set.

    Its own step only grows, so it is the number of the line in metrics.jsonl; charts
    show the metrics over `step`, where the last value of a step counts.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Starts a run, or continues it."""
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if os.environ.get("GPTJAX_OFFLINE") == "1" and mode != "disabled":
            mode = "offline"
        run.folder.mkdir(parents=True, exist_ok=True)
        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.id,
            config=run.config,
            dir=run.folder,
            mode=mode,
            resume="allow" if mode != "offline" else None,
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        """Sends the values of an event."""
        pages = {
            name: self.wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
            for name, text in record.texts.items()
        }
        if record.scalars or pages:
            self.run.log({"step": record.step, **record.scalars, **pages}, step=record.number)

    def log_picture(self, path: Path, record: Record) -> None:
        """Sends a picture."""
        picture = {"step": record.step, f"pictures/{path.stem}": self.wandb.Image(str(path))}
        self.run.log(picture, step=record.number)

    def close(self) -> None:
        """Waits until all is written or sent."""
        self.run.finish()


class TrackioSink:
    """trackio: a database in $TRACKIO_DIR, by default in the cache of Hugging Face."""

    def __init__(self, run: TrackedRun) -> None:
        """Starts a run, or continues it."""
        if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else it asks for the user's name
        import trackio

        self.trackio: Any = trackio
        self.problems: list[str] = []
        warnings.showwarning = lambda text, *_, **__: self.problems.append(str(text))
        self.run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{run.name}-{run.id}",  # identifies a run
            config=run.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, record: Record) -> None:
        """Sends the values of an event."""
        pages = {
            name: self.trackio.Markdown(f"```\n{text}\n```") for name, text in record.texts.items()
        }
        if record.scalars or pages:
            self.run.log({**record.scalars, **pages}, step=record.step)
        self.check()

    def log_picture(self, path: Path, record: Record) -> None:
        """Sends a picture."""
        picture = {f"pictures/{path.stem}": self.trackio.Image(str(path))}
        self.run.log(picture, step=record.step)

    def close(self) -> None:
        """Waits until all is in the database."""
        self.run.finish()
        self.check()

    def check(self) -> None:
        """ResourceError for a failure, of which trackio itself only warns."""
        for text in self.problems:
            if LOSS_OF_DATA.search(text):
                raise ResourceError(text)


SinkFn = Callable[[TrackedRun], Sink]
SINKS: dict[str, SinkFn] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}
VIEW_COMMANDS = {
    "tensorboard": "tensorboard --logdir {folder}",
    "wandb": "wandb sync {folder}/wandb/offline-run-*",
    "trackio": "trackio show --project " + PROJECT,
}


def check_installed(tracker: str) -> None:
    """ConfigError unless the package of a tracker is installed."""
    if not is_installed(tracker):
        raise ConfigError(
            f"track.to={tracker!r} needs the package {tracker}, which is not installed. Run "
            f"{install_command(tracker)}."
        )
