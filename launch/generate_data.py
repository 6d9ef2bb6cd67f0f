"""Makes distillation data: documents -> questions -> the model's own answers -> records.

    python -m launch.generate_data --config=configs/documents.py:squad,FILE --output=DIR

Goes on after the last whole file when it was interrupted. Of several processes (`--distributed`)
each writes every n-th file of a folder that they share, on its own devices.
"""

import time

from absl import flags
from ml_collections import config_flags

from hyperlora.errors import UserError
from launch import cli, distributed

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Documents.', lock_config=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the records.')
flags.mark_flags_as_required(['config', 'output'])

_HARMLESS = ('mesh', 'tokens_per_pass')  # they do not change what is made


def main(_):
    with distributed.together():
        generate()


def generate():
    output = cli.writable_directory(_OUTPUT.value)
    config = _CONFIG.value
    import jax

    from d2l import distillation, documents, records
    from hyperlora import hosts, lora_table, sharding, trained
    from hyperlora.evaluation import record
    from hyperlora.models.base import load_base

    if 'source' not in config:
        raise UserError('this is no config of documents; see configs/documents.py')
    try:
        settings = distillation.Settings(**config.settings)
    except (TypeError, ValueError) as error:
        raise UserError(f'settings of the data: {error}') from error
    if config.shards < 1 or config.limit < 0:
        raise UserError('config.shards must be positive, and config.limit not negative')
    found = documents.read([config.source])
    found = found[: config.limit or None]
    if settings.questions in ('given', 'others') and not any(
        document.questions for document in found
    ):
        raise UserError(
            'no document has a question: let the model ask (--config.settings.questions=generated) '
            'or take passages'
        )
    meta = {
        'config': {k: v for k, v in config.to_dict().items() if k not in _HARMLESS},
        'reader': record.digest(trained.read(config.reader)[1]) if config.reader else None,
    }
    hosts.check_agreement({**meta, 'output': str(output.resolve())})
    hosts.check_shared(output)
    paths = [records.shard_path(output, shard, config.shards) for shard in range(config.shards)]
    others = set(output.glob('documents-*')) - {
        path.with_suffix(suffix)
        for path in paths
        for suffix in ('.array_record', '.json', '.partial')
    }
    if others:
        raise UserError(f'{output} holds other records ({min(others).name}): use another folder')
    todo = []
    # By number: what is unfinished changes while the others start.
    for shard, path in list(enumerate(paths))[jax.process_index() :: jax.process_count()]:
        if not records.is_complete(path):
            todo.append((shard, path))
        else:
            records.check_meta(path, meta)
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    base = load_base(config.base, config.base_dtype, mesh, config.base_quantization)
    encoder = base
    if config.encoder:
        encoder = load_base(config.encoder, config.base_dtype, mesh, images=True)
    made_with = {
        **meta,
        'base_fingerprint': base.fingerprint,
        'encoder_fingerprint': encoder.fingerprint,
    }
    reader = None
    if config.reader:
        reader = lora_table.single(trained.load(config.reader, base))
    teacher = distillation.Teacher(base, mesh, config.tokens_per_pass, reader)
    begun, done = time.perf_counter(), 0
    for number, (shard, path) in enumerate(todo, start=1):
        own = found[shard :: config.shards]
        made = distillation.records(teacher, encoder.tokenizer, own, settings)
        kept = records.write_shard(path, made, made_with)
        done += len(own)
        seconds = time.perf_counter() - begun
        left = seconds / number * (len(todo) - number)
        print(
            f'{path.name}: {kept} of {len(own)} documents  {done / seconds:.2f} documents/s  '
            f'ETA {left / 60:.0f} min',
            flush=True,
        )
    if all(map(records.is_complete, paths)):
        records.Records(str(output))  # refuses them if all are empty


if __name__ == '__main__':
    cli.run(main)
