"""Hides a number in a document longer than the base model's window, internalises it, and asks.

    python -m launch.quickstart [--checkpoint=NAME_OR_DIR] [--document=FILE --question=TEXT]

With --document and --question the same is done for a document of yours.
"""

import time

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_DOCUMENT = flags.DEFINE_string('document', None, 'UTF-8 text file.')
_QUESTION = flags.DEFINE_string('question', None, 'What to ask about the document.')
_SEED = flags.DEFINE_integer(
    'seed', None, 'Of the number and its place; default: the clock.', lower_bound=0
)

_TOKENS = 10_000  # of the generated document: past SmolLM2's window of 8192


def compare(model, document, question, max_new_tokens):
    """Asks with the LoRA, with nothing, and with the document in the prompt; prints a table.

    Args:
      model: a `Trained`.
      document: tokens.
      question: text.
      max_new_tokens: limit of each answer.
    """
    import jax

    from d2l.evaluation import in_context_prompt
    from d2l.internalize import Internalizer
    from hyperlora.generation import answer

    base = model.base
    c = base.config

    def row(name, make_prompt, size='', make_lora=lambda: None):
        start = time.perf_counter()
        lora = jax.block_until_ready(make_lora())
        internalised = time.perf_counter()
        text = answer(base, [make_prompt()], max_new_tokens, lora)[0]
        answered = time.perf_counter()
        size = size or f'{lora.nbytes / 1e6:.1f}'
        print(
            f'{name:26}{internalised - start:13.1f}{answered - internalised:10.1f}{size:>10}  '
            f'{" ".join(text.split())}',
            flush=True,
        )

    def bare():
        return base.tokenizer.prompt(question)

    cache = (
        2
        * c.num_layers
        * c.num_kv_heads
        * c.head_dim
        * len(document)
        * base.params['embedder']['embedding'].dtype.itemsize
    )
    print(f'{"document":26}{"internalise s":>13}{"answer s":>10}{"MB":>10}  answer')
    row('internalised (LoRA)', bare, make_lora=lambda: Internalizer(model)(document))
    row('nowhere', bare, '0.0')
    cut = ', cut' if len(document) > c.max_length else ''
    row(
        f'in the prompt{cut}',
        lambda: in_context_prompt(base, document, question, max_new_tokens),
        f'{cache / 1e6:.1f}',
    )


def main(_):
    if (_DOCUMENT.value is None) != (_QUESTION.value is None):
        raise UserError('--document and --question belong together: give both or neither')
    text = None if _DOCUMENT.value is None else cli.read_text(_DOCUMENT.value)
    import numpy as np

    from d2l import haystacks, niah
    from hyperlora import trained

    model = trained.load(_CHECKPOINT.value)
    window = model.base.config.max_length
    seed = time.time_ns() if _SEED.value is None else _SEED.value
    rng = np.random.default_rng(seed)
    (number,) = niah.random_numbers(rng, 1)
    document = (
        niah.Writer(model.hypernetwork.encoder.tokenizer)
        .write(rng, haystacks.varied, _TOKENS, niah.NEEDLE.format(number))
        .tokens
    )
    print(
        f'{number} is hidden in {len(document)} tokens; the window of {model.base.name} is '
        f'{window}. Seconds include compilation; MB are those of the LoRA, or of the KV cache '
        f'of the whole document. --seed={seed}'
    )
    compare(model, document, niah.QUESTION, 16)
    if text is not None:
        document = model.hypernetwork.encoder.tokenizer.encode(text)
        print(f'\n{_DOCUMENT.value}, {len(document)} tokens: {_QUESTION.value}')
        compare(model, document, _QUESTION.value, 64)


if __name__ == '__main__':
    cli.run(main)
