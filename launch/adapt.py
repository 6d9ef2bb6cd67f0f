"""Internalises a document: writes a LoRA that lets the base model answer questions about it.

    python -m launch.adapt --checkpoint=NAME_OR_DIR --document=FILE --output=DIR [--iterative]

The LoRA is a PEFT adapter; ask it with launch.ask.
"""

import time

from absl import flags

from launch import cli

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_DOCUMENT = flags.DEFINE_string('document', None, 'UTF-8 text file.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the adapter.', required=True)
_ITERATIVE = flags.DEFINE_bool('iterative', False, 'Less memory, slower.')


def main(_):
    text = cli.read_text(_DOCUMENT.value)
    output = cli.writable_directory(_OUTPUT.value)
    import jax

    from d2l.internalize import Internalizer
    from hyperlora import lora as lora_lib
    from hyperlora import trained

    model = trained.load(_CHECKPOINT.value)
    tokens = model.base.tokenizer.encode(text)
    internalizer = Internalizer(model, _ITERATIVE.value)
    start = time.perf_counter()
    lora = jax.block_until_ready(internalizer(tokens))
    seconds = time.perf_counter() - start
    lora_lib.save(lora, output, model.base.name, model.base.fingerprint)
    print(
        f'{len(tokens)} tokens in {len(internalizer.split(tokens))} chunks -> LoRA of rank '
        f'{lora.rank}, {lora.nbytes} bytes, in {output}; {seconds:.1f} s with compilation'
    )


if __name__ == '__main__':
    cli.run(main)
