"""A frozen model learns a document, tasks and pictures, in one forward pass each.

    python -m launch.quickstart [--document=FILE --question=TEXT] [--task=TEXT --input=TEXT]
        [--image=FILE]

Doc-to-LoRA: hides a number in a document longer than the base model's window, internalises it, and
asks; then does so with a short text and questions about it. Text-to-LoRA: describes tasks, and
answers inputs of them. Then pictures go into the model, which sees none, and it is asked what they
show. With --document and --question, --task and --input, or --image, the same is done for yours.
"""

import pathlib
import time

from absl import flags

import hyperlora
from d2l import files
from d2l.pictures import QUESTION
from hyperlora.errors import UserError
from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'smollm2-docs', 'Doc-to-LoRA: shipped weights or a folder.'
)
_TASK_CHECKPOINT = flags.DEFINE_string(
    'task_checkpoint', 'smollm2-t2l', 'Text-to-LoRA: shipped weights or a folder.'
)
_DOCUMENT = flags.DEFINE_string('document', None, 'Text, Markdown, HTML or PDF.')
_QUESTION = flags.DEFINE_string('question', None, 'What to ask about the document.')
_TASK = flags.DEFINE_string('task', None, 'Description of a task.')
_INPUT = flags.DEFINE_multi_string('input', None, 'Input of that task; may be given repeatedly.')
_IMAGE = flags.DEFINE_multi_string('image', [], 'A picture; may be given repeatedly.')
_SEED = flags.DEFINE_integer(
    'seed', None, 'Of the number and its place; default: the clock.', lower_bound=0
)

_TEXT = (
    'The Eiffel Tower in Oakville was painted green in 1987. The mayor of Oakville is Maria '
    'Santos. The town has 12,000 inhabitants and is famous for its cheese festival, held every May.'
)
_QUESTIONS = ('Who is the mayor of Oakville?', 'How many inhabitants does the town have?')
_TOKENS = 10_000  # of the generated document: past SmolLM2's window of 8192
# Kinds of tasks that `smollm2-t2l` was trained on, as a user would put them.
_TASKS = {
    'Write the plural of the noun.': ('city', 'wolf'),
    'Turn the sentence into its negative.': ('The cat likes milk.', 'Anna went home.'),
    'Name the capital of the country.': ('Japan', 'Italy'),
}
_PICTURES = pathlib.Path(hyperlora.__file__).parent / 'demo/pictures'


def compare(session, document, questions, max_new_tokens):
    """Internalises a document, then asks with the LoRA, with nothing, and with the document in the
    prompt; prints a table for each question."""
    tokens = len(session.base.tokenizer.encode(document))
    start = time.perf_counter()
    adapter = session.internalize(document)
    size, cache = adapter.lora.nbytes, session.cache_nbytes(document)
    print(f'{tokens} tokens -> LoRA of {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s')
    cut = ', cut' if tokens > session.base.config.max_length else ''
    for question in questions:
        print(f'\n{question}\n{"document":26}{"answer s":>10}{"MB":>10}  answer')
        for name, size_of, lora, where in (
            ('internalised (LoRA)', size, adapter, {}),
            ('nowhere', 0, None, {}),
            (f'in the prompt{cut}', cache, None, {'document': document}),
        ):
            start = time.perf_counter()
            text = ' '.join(session.ask(question, lora, max_new_tokens, **where).split())
            seconds = time.perf_counter() - start
            print(f'{name:26}{seconds:10.1f}{size_of / 1e6:10.1f}  {text}', flush=True)


def specialise(session, task, inputs):
    """Answers inputs of a task with the LoRA of its description, and with the description in the
    prompt; prints a table."""
    start = time.perf_counter()
    adapter = session.specialize(task)
    print(
        f'\n{task} -> LoRA of {adapter.lora.nbytes / 1e6:.1f} MB in '
        f'{time.perf_counter() - start:.1f} s with compilation'
    )

    def answers(inputs, adapter=None):
        return [' '.join(text.split()) for text in session.ask_all(inputs, adapter, 16)]

    prompted = [f'{task}\n\n{text}' for text in inputs]
    print(f'{"input":24}{"with the LoRA":32}with the description in the prompt')
    for row in zip(inputs, answers(inputs, adapter), answers(prompted), strict=True):
        print('{:24}{:32}{}'.format(*row), flush=True)


def look(session, paths):
    """What the model, which sees no pictures, answers with the LoRA of each; prints a table."""
    print(f'\n{QUESTION}\n{"picture":24}{"LoRA s":>8}  {"with the LoRA":24}without')
    without = ' '.join(session.ask(QUESTION, None, 16).split())
    for path in paths:
        start = time.perf_counter()
        adapter = session.internalize_image(path)
        seconds = time.perf_counter() - start
        answer = ' '.join(session.ask(QUESTION, adapter, 16).split())
        print(f'{path.name:24}{seconds:8.1f}  {answer:24}{without}', flush=True)


def main(_):
    if (_DOCUMENT.value is None) != (_QUESTION.value is None):
        raise UserError('--document and --question belong together: give both or neither')
    if (_TASK.value is None) != (_INPUT.value is None):
        raise UserError('--task and --input belong together: give both or neither')
    text = None if _DOCUMENT.value is None else files.read(_DOCUMENT.value)
    pictures = [pathlib.Path(path) for path in _IMAGE.value]
    from d2l import niah
    from hyperlora.models import images
    from hyperlora.session import Session

    for path in pictures:
        images.read(path)  # whether it can be, before anything takes long

    needles = Session('smollm2-niah')
    tokenizer = needles.internalizer.trained.hypernetwork.encoder.tokenizer
    seed = time.time_ns() if _SEED.value is None else _SEED.value
    number, tokens = niah.hide(tokenizer, _TOKENS, seed)
    base = needles.base
    session = Session(_CHECKPOINT.value, _TASK_CHECKPOINT.value, base=base)
    if _TASK.value is not None:
        session.specializer.trained.hypernetwork.encoder.tokens(_TASK.value)  # it may be refused
    print(
        f'{number} is hidden in {len(tokens)} tokens; the window of {base.name} is '
        f'{base.config.max_length}. Seconds include compilation; MB are those of the LoRA, or of '
        f'the KV cache of the whole document. --seed={seed}'
    )
    compare(needles, tokenizer.decode(tokens), [niah.QUESTION], 16)
    print(f'\n{_TEXT}')
    compare(session, _TEXT, _QUESTIONS, 24)
    if text is not None:
        print(f'\n{_DOCUMENT.value}')
        compare(session, text, [_QUESTION.value], 64)
    for task, inputs in _TASKS.items():
        specialise(session, task, inputs)
    if _TASK.value is not None:
        specialise(session, _TASK.value, _INPUT.value)
    look(session, [*(_PICTURES / f'digit {name}.png' for name in ('four', 'seven')), *pictures])


if __name__ == '__main__':
    cli.run(main)
