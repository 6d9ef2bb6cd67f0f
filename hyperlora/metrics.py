"""Training metrics: a JSONL file, TensorBoard scalars, and a progress line."""

import collections
import contextlib
import json
import math
import os
import pathlib
import tempfile
import time

import tensorboardX
from etils import epath

from hyperlora.errors import Outage, UserError


class MetricWriter:
    """Writes scalars to `workdir/metrics.jsonl` and to TensorBoard events in `workdir`.

    In a multi-process run, create it on process 0 only.

    Args:
      workdir: an existing local directory, or a gs:// URL. Objects there cannot grow: files are
        written locally, and copied at `flush` and every half minute.
      resume_step: the step the run resumes from. What an earlier, killed run wrote for later steps
        is dropped, so that each step appears once.
    """

    def __init__(self, workdir, resume_step: int = 0):
        self._url = epath.Path(workdir) if '://' in str(workdir) else None
        self._copied = time.monotonic()
        if self._url:
            self._local = tempfile.TemporaryDirectory()
            workdir = self._local.name
        path = pathlib.Path(workdir) / 'metrics.jsonl'
        if self._url and (self._url / path.name).exists():
            path.write_text((self._url / path.name).read_text())
        if path.exists():
            _drop_later_steps(path, resume_step)
        self._file = path.open('a', encoding='utf-8')
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=resume_step + 1)

    def write(self, step: int, scalars: dict):
        """Appends one line `{"step": step, ...}`; JSON has no NaN or infinity, these become null.

        Args:
          step: the training step.
          scalars: name to number (or scalar array).

        Raises:
          UserError: the disk is full; Outage if it is a bucket that cannot be written to.
        """
        scalars = {name: float(value) for name, value in scalars.items()}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        line = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        with self._writing():
            self._file.write(json.dumps({'step': step, **line}) + '\n')
            self._file.flush()
        if self._url and time.monotonic() - self._copied > 30:
            self.flush()

    def flush(self):
        """Makes sure that all that was written is in the workdir; raises as `write`."""
        with self._writing():
            self._file.flush()
            self._board.flush()
            if self._url:
                for path in pathlib.Path(self._local.name).iterdir():
                    (self._url / path.name).write_bytes(path.read_bytes())
                self._copied = time.monotonic()

    def close(self):
        """Flushes and closes both files; raises as `write`."""
        with self._writing(), contextlib.ExitStack() as at_end:
            if self._url:
                at_end.callback(self._local.cleanup)
            at_end.callback(self._board.close)
            at_end.callback(self._file.close)
            self.flush()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (UserError, Outage):  # of `flush`, in `close`
            raise
        except Exception as error:  # gcsfs passes on those of its HTTP library
            kind, remedy = (Outage, '') if self._url else (UserError, 'make room there, then ')
            where = self._url / 'metrics.jsonl' if self._url else self._file.name
            raise kind(
                f'{where}: cannot write ({getattr(error, "strerror", None) or error}): {remedy}'
                'start again to continue from the last checkpoint'
            ) from error


class Progress:
    """Rate and remaining time of a run, over its latest steps (stages differ in cost).

    Counted from the end of the first step, which compiles.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step it starts from (0, or the step of the checkpoint).
      window: over how many steps the rate is taken.
    """

    def __init__(self, total_steps: int, start_step: int = 0, window: int = 50):
        self._total = total_steps
        self._step = start_step
        self._ends = collections.deque(maxlen=window + 1)  # (step, time)

    def update(self, step: int):
        """Notes that `step` (the number of steps done) ended."""
        self._step = step
        self._ends.append((step, time.monotonic()))

    def rates(self) -> dict[str, float]:
        """`steps_per_second`; empty before the second step has ended."""
        if len(self._ends) < 2:
            return {}
        steps, seconds = (b - a for a, b in zip(self._ends[0], self._ends[-1], strict=True))
        return {'steps_per_second': steps / max(seconds, 1e-9)}

    def line(self, loss: float) -> str:
        """One line of text: step, loss and, once known, rate and remaining time."""
        text = f'step {self._step}/{self._total}  loss {float(loss):.4f}'
        rates = self.rates()
        if rates:
            left = round((self._total - self._step) / rates['steps_per_second'])
            text += (
                f'  {rates["steps_per_second"]:.2f} steps/s'
                f'  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
            )
        return text


def _drop_later_steps(path, last_step):
    kept = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        try:
            if json.loads(line)['step'] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # A line cut short when the run was killed.
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(kept), encoding='utf-8')
    os.replace(temporary, path)
