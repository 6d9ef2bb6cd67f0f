"""Internalises a document: writes a LoRA that lets the base model answer questions about it.

    python -m launch.adapt --checkpoint=NAME_OR_DIR --document=FILE --output=DIR
        [--iterative] [--format=peft] [--base_quantization=int8]

The LoRA is a PEFT adapter; ask it with launch.ask.
"""

import hashlib
import time

from absl import flags

from launch import cli

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_DOCUMENT = flags.DEFINE_string('document', None, 'UTF-8 text file.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the adapter.', required=True)
_FORMAT = flags.DEFINE_enum('format', 'peft', ['peft'], 'Layout of the adapter.')
_QUANTIZATION = flags.DEFINE_enum(
    'base_quantization',
    None,
    ['none', 'int8', 'int4'],
    'Of the frozen base model; default: as in the training.',
)
_ITERATIVE = flags.DEFINE_bool('iterative', False, 'Less memory, slower.')


def main(_):
    text = cli.read_text(_DOCUMENT.value)
    output = cli.writable_directory(_OUTPUT.value)
    import jax

    from d2l.internalize import Internalizer
    from hyperlora import adapters, trained

    model = trained.load(_CHECKPOINT.value, quantization=_QUANTIZATION.value)
    tokens = model.hypernetwork.encoder.tokenizer.encode(text)
    internalizer = Internalizer(model, _ITERATIVE.value)
    start = time.perf_counter()
    lora = jax.block_until_ready(internalizer(tokens))
    seconds = time.perf_counter() - start
    metadata = {
        'base_fingerprint': model.base.fingerprint,
        'hypernetwork': _CHECKPOINT.value,
        'document_sha256': hashlib.sha256(text.encode()).hexdigest(),
    }
    adapters.save(lora, output, model.base.name, metadata)
    print(
        f'{len(tokens)} tokens in {len(internalizer.split(tokens))} chunks -> LoRA of rank '
        f'{lora.rank}, {lora.nbytes} bytes, in {output}; {seconds:.1f} s with compilation'
    )


if __name__ == '__main__':
    cli.run(main)
