"""A frozen model learns a document, and tasks, in one forward pass each.

    python -m launch.quickstart [--document=FILE --question=TEXT] [--task=TEXT --input=TEXT]

Doc-to-LoRA: hides a number in a document longer than the base model's window, internalises it, and
asks. Text-to-LoRA: describes tasks, and answers inputs of them. With --document and --question, or
--task and --input, the same is done for yours.
"""

import time

from absl import flags

from d2l import files
from hyperlora.errors import UserError
from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'smollm2-niah', 'Doc-to-LoRA: shipped weights or a folder.'
)
_TASK_CHECKPOINT = flags.DEFINE_string(
    'task_checkpoint', 'smollm2-t2l', 'Text-to-LoRA: shipped weights or a folder.'
)
_DOCUMENT = flags.DEFINE_string('document', None, 'Text, Markdown, HTML or PDF.')
_QUESTION = flags.DEFINE_string('question', None, 'What to ask about the document.')
_TASK = flags.DEFINE_string('task', None, 'Description of a task.')
_INPUT = flags.DEFINE_multi_string('input', None, 'Input of that task; may be given repeatedly.')
_SEED = flags.DEFINE_integer(
    'seed', None, 'Of the number and its place; default: the clock.', lower_bound=0
)

_TOKENS = 10_000  # of the generated document: past SmolLM2's window of 8192
# Kinds of tasks that `smollm2-t2l` was trained on, as a user would put them.
_TASKS = {
    'Write the plural of the noun.': ('city', 'wolf'),
    'Turn the sentence into its negative.': ('The cat likes milk.', 'Anna went home.'),
    'Name the capital of the country.': ('Japan', 'Italy'),
}


def compare(model, document, question, max_new_tokens):
    """Asks with the LoRA, with nothing, and with the document in the prompt; prints a table.

    Args:
      model: a `Trained`.
      document: tokens.
      question: text.
      max_new_tokens: limit of each answer.
    """
    import jax

    from d2l.internalize import Internalizer
    from d2l.prompts import in_context_prompt
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


def specialise(model, task, inputs):
    """Answers inputs of a task with the LoRA of its description, and with the description in the
    prompt; prints a table.

    Args:
      model: a `Trained`.
      task: the description.
      inputs: texts.
    """
    import jax

    from hyperlora.generation import answer
    from t2l.specialize import Specializer

    start = time.perf_counter()
    lora = jax.block_until_ready(Specializer(model)([task]))
    print(
        f'\n{task} -> LoRA of {lora.nbytes / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s '
        'with compilation'
    )

    def answers(before='', lora=None):
        prompts = [model.base.tokenizer.prompt(before + text) for text in inputs]
        return [' '.join(text.split()) for text in answer(model.base, prompts, 16, lora)]

    print(f'{"input":24}{"with the LoRA":32}with the description in the prompt')
    for row in zip(inputs, answers(lora=lora), answers(f'{task}\n\n'), strict=True):
        print('{:24}{:32}{}'.format(*row), flush=True)


def main(_):
    if (_DOCUMENT.value is None) != (_QUESTION.value is None):
        raise UserError('--document and --question belong together: give both or neither')
    if (_TASK.value is None) != (_INPUT.value is None):
        raise UserError('--task and --input belong together: give both or neither')
    text = None if _DOCUMENT.value is None else files.read(_DOCUMENT.value)
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

    model = trained.load(_TASK_CHECKPOINT.value, model.base)
    for task, inputs in _TASKS.items():
        specialise(model, task, inputs)
    if _TASK.value is not None:
        specialise(model, _TASK.value, _INPUT.value)


if __name__ == '__main__':
    cli.run(main)
