"""A page in the browser: documents and tasks become LoRAs, which are asked, kept and downloaded.

python -m launch.demo [--documents=smollm2-docs] [--tasks=smollm2-t2l] [--adapters=DIR]
    [--host=127.0.0.1] [--port=7860] [--share]
"""

import threading

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_DOCUMENTS = flags.DEFINE_string(
    'documents', 'smollm2-docs', 'Doc-to-LoRA: shipped weights or a folder.'
)
_TASKS = flags.DEFINE_string('tasks', 'smollm2-t2l', 'Text-to-LoRA: shipped weights or a folder.')
_ADAPTERS = flags.DEFINE_string(
    'adapters', '~/.cache/hyperlora/adapters', 'Folder of the adapters that are kept.'
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; 0.0.0.0 for all.')
_PORT = flags.DEFINE_integer('port', 7860, 'Port.', lower_bound=1, upper_bound=65535)
_SHARE = flags.DEFINE_bool('share', False, 'Also through a public address of Gradio.')


def main(_):
    try:
        from hyperlora.demo import page
    except ImportError as error:
        raise UserError("the page needs pip install 'hyperlora[demo]'") from error
    from hyperlora.demo.engine import Engine
    from hyperlora.demo.shelf import Shelf

    shelf = Shelf(cli.writable_directory(_ADAPTERS.value))
    engine = Engine(_DOCUMENTS.value, _TASKS.value)
    # In the background: the page is there at once.
    threading.Thread(target=engine.warm_up, daemon=True).start()
    page.launch(page.build(engine, shelf), _HOST.value, _PORT.value, _SHARE.value)


if __name__ == '__main__':
    cli.run(main)
