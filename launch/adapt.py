"""Writes a LoRA: of a document that it internalises, or of a task that is described to it.

    python -m launch.adapt --document=FILE --output=DIR [--iterative]
    python -m launch.adapt --task="DESCRIPTION" --output=DIR

Both take [--checkpoint=NAME_OR_DIR] [--format=peft] [--base_quantization=int8]. The LoRA is a PEFT
adapter; ask it with launch.ask.
"""

import hashlib
import time

from absl import flags

from d2l import files
from hyperlora.errors import UserError
from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'Shipped weights or a folder; by default smollm2-niah for documents, smollm2-t2l for tasks.',
)
_DOCUMENT = flags.DEFINE_string('document', None, 'Text, Markdown, HTML or PDF.')
_TASK = flags.DEFINE_string('task', None, 'Description of a task.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the adapter.', required=True)
_FORMAT = flags.DEFINE_enum('format', 'peft', ['peft'], 'Layout of the adapter.')
_ITERATIVE = flags.DEFINE_bool('iterative', False, 'Less memory, slower; of documents.')
_QUANTIZATION = flags.DEFINE_enum(
    'base_quantization',
    None,
    ['none', 'int8', 'int4'],
    'Of the frozen base model; by default as in the training.',
)


def internalize(model, text):
    """(LoRA, what was read) of a document."""
    from d2l.internalize import Internalizer

    internalizer = Internalizer(model, _ITERATIVE.value)
    tokens = model.hypernetwork.encoder.tokenizer.encode(text)
    read = f'{len(tokens)} tokens in {len(internalizer.split(tokens))} chunks'
    return internalizer(tokens), read


def specialize(model, text):
    """(LoRA, what was read) of a description of a task."""
    from t2l.specialize import Specializer

    return Specializer(model)([text]), f'{len(text)} characters'


def main(_):
    if (_DOCUMENT.value is None) == (_TASK.value is None):
        raise UserError('give one of --document and --task')
    document = _TASK.value is None
    text = files.read(_DOCUMENT.value) if document else _TASK.value
    output = cli.writable_directory(_OUTPUT.value)
    import jax

    from hyperlora import adapters, trained

    checkpoint = _CHECKPOINT.value or ('smollm2-niah' if document else 'smollm2-t2l')
    model = trained.load(checkpoint, quantization=_QUANTIZATION.value)
    start = time.perf_counter()
    lora, read = (internalize if document else specialize)(model, text)
    jax.block_until_ready(lora)
    seconds = time.perf_counter() - start
    metadata = {
        'base_fingerprint': model.base.fingerprint,
        'hypernetwork': checkpoint,
    }
    if document:
        metadata['document_sha256'] = hashlib.sha256(text.encode()).hexdigest()
    else:
        metadata['task'] = text
    adapters.save(lora, output, model.base.name, metadata)
    print(
        f'{read} -> LoRA of rank {lora.rank}, {lora.nbytes} bytes, in {output}; '
        f'{seconds:.1f} s with compilation'
    )


if __name__ == '__main__':
    cli.run(main)
