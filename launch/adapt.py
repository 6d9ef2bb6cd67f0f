"""Writes a LoRA: of a document that it internalises, or of a task that is described to it.

    python -m launch.adapt --document=FILE --output=DIR [--iterative]
    python -m launch.adapt --task="DESCRIPTION" --output=DIR

Both take [--checkpoint=NAME_OR_DIR] [--format=peft] [--base_quantization=int8]. The LoRA is a PEFT
adapter; ask it with launch.ask.
"""

import time

from absl import flags

from d2l import files
from hyperlora.errors import UserError
from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'Shipped weights or a folder; by default smollm2-docs for documents, smollm2-t2l for tasks.',
)
_DOCUMENT = flags.DEFINE_string('document', None, 'Text, Markdown, HTML or PDF.')
_TASK = flags.DEFINE_string('task', None, 'Description of a task.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the adapter.', required=True)
_FORMAT = flags.DEFINE_enum('format', 'peft', ['peft'], 'Layout of the adapter.')
_ITERATIVE = flags.DEFINE_bool('iterative', False, 'Less memory, slower; of documents.')
_QUANTIZATION = flags.DEFINE_string(
    'base_quantization', None, 'Of the frozen base model; by default as in the training.'
)


def main(_):
    if (_DOCUMENT.value is None) == (_TASK.value is None):
        raise UserError('give one of --document and --task')
    if _ITERATIVE.value and _DOCUMENT.value is None:
        raise UserError('--iterative is for documents: leave it out')
    document = _TASK.value is None
    text = files.read(_DOCUMENT.value) if document else _TASK.value
    output = cli.writable_directory(_OUTPUT.value)
    from hyperlora.session import Session

    session = Session(
        documents=_CHECKPOINT.value or 'smollm2-docs',
        tasks=_CHECKPOINT.value or 'smollm2-t2l',
        quantization=_QUANTIZATION.value,
        iterative=_ITERATIVE.value,
    )
    model = (session.internalizer if document else session.specializer).trained
    read = f'{len(text)} characters'
    if document:
        tokens = model.hypernetwork.encoder.tokenizer.encode(text)
        read = f'{len(tokens)} tokens in {len(session.internalizer.split(tokens))} chunks'
    start = told = time.perf_counter()

    def report(done: float) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told > 10:
            told = now
            left = (now - start) / done * (1 - done)
            print(f'{done:.0%} read  ETA {left / 60:.1f} min', flush=True)

    adapter = session.internalize(text, report) if document else session.specialize(text)
    seconds = time.perf_counter() - start
    session.save(adapter, output)
    print(
        f'{read} -> LoRA of rank {adapter.lora.rank}, {adapter.lora.nbytes} bytes, in {output}; '
        f'{seconds:.1f} s with compilation'
    )


if __name__ == '__main__':
    cli.run(main)
