"""Asks the base model a question with an adapter from launch.adapt; prints the answer.

python -m launch.ask --adapter=DIR --question=TEXT [--max_new_tokens=64]
"""

import json
import pathlib

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_ADAPTER = flags.DEFINE_string('adapter', None, 'Folder of the adapter.', required=True)
_QUESTION = flags.DEFINE_string('question', None, 'What to ask.', required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 64, 'Limit of the answer.', lower_bound=1)


def base_name(adapter: pathlib.Path) -> str:
    """The base model that an adapter names.

    Raises:
      UserError: the folder is not an adapter.
    """
    path = adapter / 'adapter_config.json'
    try:
        return json.loads(path.read_text(encoding='utf-8'))['base_model_name_or_path']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{adapter} is not an adapter: cannot read its base model from {path.name} '
            f'({e!r}); make one with launch.adapt'
        ) from e


def main(_):
    adapter = pathlib.Path(_ADAPTER.value)
    name = base_name(adapter)
    from hyperlora import generation
    from hyperlora import lora as lora_lib
    from hyperlora.models.base import load_base

    base = load_base(name)
    lora = lora_lib.load(adapter, base.fingerprint)
    prompt = base.tokenizer.prompt(_QUESTION.value)
    print(generation.answer(base, [prompt], _MAX_NEW_TOKENS.value, lora)[0])


if __name__ == '__main__':
    cli.run(main)
