"""Asks the base model a question with an adapter from launch.adapt; prints the answer.

python -m launch.ask --adapter=DIR --question=TEXT [--max_new_tokens=64] [--base=NAME_OR_DIR]
    [--base_quantization=int8]
"""

from absl import flags

from launch import cli

_ADAPTER = flags.DEFINE_string('adapter', None, 'Folder of the adapter.', required=True)
_QUESTION = flags.DEFINE_string('question', None, 'What to ask.', required=True)
_BASE = flags.DEFINE_string('base', None, 'Base model; default: the one the adapter names.')
_QUANTIZATION = flags.DEFINE_string('base_quantization', 'none', 'Of the frozen base model.')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 64, 'Limit of the answer.', lower_bound=1)


def main(_):
    from hyperlora import adapters
    from hyperlora.session import Session

    base = _BASE.value or adapters.base_name(_ADAPTER.value)
    session = Session(base=base, quantization=_QUANTIZATION.value)
    print(session.ask(_QUESTION.value, session.load(_ADAPTER.value), _MAX_NEW_TOKENS.value))


if __name__ == '__main__':
    cli.run(main)
