"""metrics.jsonl across kills and resumes, TensorBoard events, progress."""

import contextlib
import io
import json
import pathlib
import resource
import struct
import time

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from hyperlora import metrics
from hyperlora.errors import Outage, UserError
from hyperlora.evaluation import plots, record


def _lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_lines_are_readable_at_once_and_append(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {'loss': 2.5})
    assert _lines(tmp_path) == [{'step': 1, 'loss': 2.5}]
    writer.close()
    writer = metrics.MetricWriter(tmp_path, resume_step=1)
    writer.write(2, {'loss': 2.0})
    writer.close()
    assert _lines(tmp_path) == [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': 2.0}]
    assert list(tmp_path.glob('events.out.tfevents.*'))


def test_resume_drops_later_steps_and_a_line_cut_short(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {'loss': step})
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 3, "lo')
    writer = metrics.MetricWriter(tmp_path, resume_step=3)
    writer.write(4, {'loss': 40})
    writer.close()
    assert [(line['step'], line['loss']) for line in _lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    metrics.MetricWriter(tmp_path).close()
    assert _lines(tmp_path) == []


def test_a_url_receives_copies_and_gives_them_back(tmp_path, monkeypatch):
    """A bucket, of which a folder takes the place: files are replaced, never appended to."""
    bucket = tmp_path / 'bucket'
    bucket.mkdir()
    monkeypatch.setattr(
        metrics.epath,
        'Path',
        lambda url: pathlib.Path(str(url).replace('gs://bucket', str(bucket))),
    )
    writer = metrics.MetricWriter('gs://bucket')
    writer.write(1, {'loss': 2.0})
    assert not list(bucket.iterdir())
    writer.flush()
    assert _lines(bucket) == [{'step': 1, 'loss': 2.0}]
    writer.write(2, {'loss': 3.0})
    writer.close()
    writer = metrics.MetricWriter('gs://bucket', resume_step=1)
    writer.write(2, {'loss': 1.0})
    writer.close()
    assert _lines(bucket) == [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    assert list(bucket.glob('events.out.tfevents.*'))


def test_a_full_disk_is_named(tmp_path):
    """Also when what could not be written is tried again at the end."""
    message = 'metrics.jsonl: cannot write .File too large.: make room'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=message), contextlib.ExitStack() as at_end:
            writer = metrics.MetricWriter(tmp_path)
            at_end.callback(writer.close)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            with pytest.raises(UserError, match=message):
                writer.write(1, {'loss': 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_bucket_that_fails_may_be_back_later(tmp_path, monkeypatch):
    class Bucket(type(tmp_path)):
        def write_bytes(self, data):
            raise OSError('503')

    monkeypatch.setattr(metrics.epath, 'Path', lambda url: Bucket(tmp_path))
    writer = metrics.MetricWriter('gs://bucket')
    writer.write(1, {'loss': 2.0})
    with pytest.raises(Outage, match=r'^\S+metrics.jsonl: cannot write .503.: start [^:]*$'):
        writer.close()


def test_plots_on_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UserError, match='a.png: cannot write .File too large.: make room'):
            plots.layers(tmp_path / 'a.png', {'q_proj': [0.1, 0.2]}, 'norm', 'Title')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_not_a_number_stays_valid_json(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, {'loss': float('nan'), 'norm': float('inf')})
    writer.close()
    assert _lines(tmp_path) == [{'step': 1, 'loss': None, 'norm': None}]


def test_progress_leaves_out_the_first_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    progress = metrics.Progress(total_steps=110, start_step=10)
    now = 1000.0  # The compilation.
    progress.update(11)
    assert progress.rates() == {}
    assert progress.line(1.5) == 'step 11/110  loss 1.5000'
    now = 1002.0
    for step in (12, 13, 14, 15):
        progress.update(step)
    assert progress.rates() == {'steps_per_second': 2.0}
    assert progress.line(1.25) == 'step 15/110  loss 1.2500  2.00 steps/s  ETA 0:00:48'


def test_progress_forgets_how_fast_an_earlier_stage_was(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    progress = metrics.Progress(total_steps=100, window=2)
    for step, pause in enumerate([1, 1, 1, 4, 4], start=1):
        now += pause
        progress.update(step)
    assert progress.rates() == {'steps_per_second': 0.25}


def test_plots_are_shown_in_tensorboard(tmp_path):
    plots.bars(tmp_path / 'methods.png', {'seen': {'a': 0.5, 'b': 1.0}}, 'score', 'Title')
    plots.layers(tmp_path / 'norms.png', {'down_proj': [0.1, 0.2]}, 'norm', 'Title')
    plots.scatter(tmp_path / 'map.png', np.eye(4), list('aabb'), 'Title')
    plots.attention(tmp_path / 'attention.png', np.full((2, 3), 1 / 3), list('abc'), 'Title')
    plots.to_tensorboard(tmp_path)
    (events,) = tmp_path.glob('events.out.tfevents.*')
    shown = {}
    for event in tfrecords(events.read_bytes()):
        found = event_pb2.Event.FromString(event)
        shown |= {value.tag: value.image for value in found.summary.value}
    assert sorted(shown) == ['attention', 'map', 'methods', 'norms']
    for name, image in shown.items():
        with Image.open(tmp_path / f'{name}.png') as drawn:
            assert drawn.size == (image.width, image.height)
            sent = Image.open(io.BytesIO(image.encoded_image_string))
            assert np.array_equal(np.asarray(sent), np.asarray(drawn.convert('RGB')))


def tfrecords(data):
    """The records of a TFRecord file: length (8 bytes), its sum (4), the record, its sum (4)."""
    while data:
        (length,) = struct.unpack('<Q', data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_metrics_of_an_evaluation_on_a_full_disk(tmp_path):
    path = tmp_path / 'metrics.json'
    record.write(path, {'f1': 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=f'{path}: cannot write .File too large.: make room'):
            record.write(path, {'answers': ['x' * 200]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.json']
    assert json.loads(path.read_text()) == {'f1': 0.5}
