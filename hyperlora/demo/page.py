"""The page: tabs for documents, tasks, images and adapters.

Every text of a user's stands in a text box or a label, never in Markdown or HTML; what went wrong
is said in the status line of its tab. Handlers yield the values of their outputs and a status.
"""

from __future__ import annotations

import csv
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import gradio as gr
from absl import logging

from d2l.pictures import QUESTION
from hyperlora.demo import engine as engines
from hyperlora.demo.engine import Engine
from hyperlora.demo.shelf import Shelf
from hyperlora.errors import UserError
from hyperlora.models import images

_TASKS = {
    'Write the plural of the noun.': 'city',
    'Turn the sentence into its negative.': 'The cat likes milk.',
    'Name the capital of the country.': 'Japan',
}
# Of each digit the first of those that scikit-learn's last third holds.
_PICTURES = Path(__file__).parent / 'pictures'
_DOWNLOAD_SECONDS = 3600  # that a file to download is kept
_MAX_UPLOAD = 280 * 2**20  # bytes, of a zipped adapter


class Handlers:
    """What the buttons do: generators of (outputs..., status); `me` is the id of the browser."""

    def __init__(self, engine: Engine, shelf: Shelf):
        self.engine, self.shelf = engine, shelf
        self._downloads = tempfile.TemporaryDirectory(prefix='hyperlora-')

    # ---- documents

    def internalize(self, me, checkpoint, text, path, stops=None):
        """Yields (a mark that the list of documents has changed, status)."""
        name, text = engines.read_document(text, path)
        if not path:  # the name is but how the text begins
            name = self.engine.free_name(me, checkpoint, name, text)
        progress, start = gr.Progress(), time.perf_counter()
        about = self.engine.internalize(
            me,
            checkpoint,
            name,
            text,
            lambda done, about: progress(done, f'Reading {about}'),
            stops,
        )
        seconds = time.perf_counter() - start
        yield secrets.token_hex(4), f'{name}: {about}. Internalised in {seconds:.1f} s.'

    def stop(self, me):
        self.engine.stop(me)
        yield ('Stopping.',)

    def example(self, me, checkpoint):
        """Yields (weights that find needles, document, no file, question, status)."""
        document, question, number = self.engine.example(time.time_ns())
        reader = next(iter(self.engine.needles), checkpoint)
        status = f'{number} is hidden in the document; internalise it, ask.'
        yield reader, document, None, question, status

    def scale(self, me, checkpoint, name, on, factor):
        self.engine.memory(me, checkpoint).scale(name, factor if on else 0.0)
        yield (f'{name} counts {factor:g} times.' if on else f'{name} is switched off.',)

    def remove(self, me, checkpoint, name):
        memory = self.engine.memory(me, checkpoint)
        with self.engine.lock:
            memory.remove(name)
        yield secrets.token_hex(4), f'{name} is forgotten.'

    def ask_documents(self, me, checkpoint, question):
        """Yields (answer with the documents, answer without, status)."""
        adapter = self.engine.documents_adapter(me, checkpoint)
        if adapter is None:
            raise UserError('no document is switched on; internalise one first')
        yield from self._answers((question, adapter), (question, None))

    def keep_documents(self, me, checkpoint, name):
        adapter = self.engine.documents_adapter(me, checkpoint)
        if adapter is None:
            raise UserError('no document is switched on; internalise one first')
        self.shelf.keep(name, adapter, self.engine.session)
        yield (f'Kept as {name.strip()}; see Adapters.',)

    # ---- tasks

    def specialize(self, me, checkpoint, description):
        start = time.perf_counter()
        size = self.engine.task(me, checkpoint, description).lora.nbytes
        yield (f'LoRA of {size / 1e6:.1f} MB made in {time.perf_counter() - start:.2f} s.',)

    def ask_task(self, me, checkpoint, description, text):
        """Yields (answer with the LoRA, of the base model, with the description in the prompt,
        status)."""
        adapter = self.engine.task(me, checkpoint, description)
        yield from self._answers(
            (text, adapter), (text, None), (text and f'{description}\n\n{text}', None)
        )

    def ask_table(self, me, checkpoint, description, path):
        """Yields (CSV file of inputs and answers, status)."""
        if not path:
            raise UserError('choose a CSV file first')
        inputs, start, progress = engines.read_inputs(path), time.perf_counter(), gr.Progress()
        adapter = self.engine.task(me, checkpoint, description)
        answers = self.engine.answer_all(
            adapter, inputs, lambda done: progress(done, f'{len(inputs)} inputs')
        )
        output = self._download('answers.csv')
        with open(output, 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([('input', 'answer'), *zip(inputs, answers, strict=True)])
        yield (
            gr.File(str(output), visible=True, interactive=False),
            f'{len(inputs)} answers in {time.perf_counter() - start:.1f} s.',
        )

    def keep_task(self, me, checkpoint, description, name):
        adapter = self.engine.task(me, checkpoint, description)
        self.shelf.keep(name, adapter, self.engine.session)
        yield (f'Kept as {name.strip()}; see Adapters.',)

    # ---- images

    def ask_image(self, me, checkpoint, path, question):
        """Yields (the image, answer with it, answer without, status)."""
        adapter = self.engine.image(checkpoint, path)
        image = images.read(path, on_white=True)
        for found in self._answers((question, adapter), (question, None)):
            yield image, *found

    def keep_image(self, me, checkpoint, path, name):
        self.shelf.keep(name, self.engine.image(checkpoint, path), self.engine.session)
        yield (f'Kept as {name.strip()}; see Adapters.',)

    # ---- adapters

    def ask_adapter(self, me, name, question):
        """Yields (answer with the adapter, without, status)."""
        adapter = self.shelf.load(name, self.engine.session)
        yield from self._answers((question, adapter), (question, None))

    def download(self, me, name):
        output = self._download(f'{name}.zip')
        self.shelf.pack(name, output)
        yield (
            gr.File(str(output), visible=True, interactive=False),
            f'{name} is ready to download as an adapter of PEFT.',
        )

    def merge(self, me, name, dtype):
        output = self._download(f'{name}-merged.zip')
        with self.engine.lock:
            self.shelf.merge(name, self.engine.session, dtype, output)
        size = output.stat().st_size
        yield (
            gr.File(str(output), visible=True, interactive=False),
            f'{name} merged into the model, {size / 1e6:,.0f} MB, ready to download.',
        )

    def upload(self, me, name, path):
        if not path:
            raise UserError('choose a zip file first')
        self.shelf.unpack(name, path, self.engine.session)
        yield (f'Kept as {name.strip()}.',)

    # ----

    def _answers(self, *asked):
        start, first = time.perf_counter(), None
        for texts in self.engine.ask(*asked):
            first = first or time.perf_counter() - start
            yield *texts, f'First word after {first:.1f} s.'
        whole = time.perf_counter() - start
        yield *texts, f'First word after {first:.1f} s, answers side by side in {whole:.1f} s.'

    def _download(self, name: str) -> Path:
        folder = Path(self._downloads.name)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > _DOWNLOAD_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        output = folder / secrets.token_hex(8) / Path(name).name
        output.parent.mkdir()
        return output


def guarded(handler, outputs: int):
    """A handler that ends in a sentence, whatever happens, and leaves its outputs alone then.

    Args:
      outputs: how many there are before the status; without any, gradio takes the status bare.
    """

    def run(*values):
        for found in attempt(*values):
            yield found if outputs else found[0]

    def attempt(*values):
        try:
            yield from handler(*values)
        except UserError as error:
            yield *[gr.skip()] * outputs, ' '.join(str(error).split())
        except Exception:
            logging.exception('a request failed')
            yield (
                *[gr.skip()] * outputs,
                'Something went wrong here; the log of the server says what.',
            )

    return run


# An id that nobody can guess, made where it is used: no request can come before it.
_NEW_ID = """known => known || Array.from(
    crypto.getRandomValues(new Uint8Array(16)), x => x.toString(16).padStart(2, '0')).join('')"""


def build(engine: Engine, shelf: Shelf) -> gr.Blocks:
    """The page, not launched yet."""
    do = Handlers(engine, shelf)
    with gr.Blocks(title='HyperLoRA', analytics_enabled=False, delete_cache=(600, 3600)) as page:
        # An id that only this browser knows outlives a reload.
        me = gr.BrowserState('')
        changed = gr.State('')
        # Travels with each request, as a State of the server would not.
        stops = gr.BrowserState(0)

        def on(trigger, handler, inputs, outputs, status, queued=True):
            # One worker for all that computes, in the order of asking.
            model = {'concurrency_id': 'model', 'concurrency_limit': 1} if queued else {}
            outputs = [*outputs, status]
            return trigger(
                guarded(handler, len(outputs) - 1),
                [me, *inputs],
                outputs if len(outputs) > 1 else status,
                queue=queued,
                api_visibility='private',
                show_progress_on=status,
                **model,
            )

        def box(label, **more):
            return gr.Textbox(label=label, interactive=False, **more)

        gr.Markdown(
            '# HyperLoRA\nA document, a picture or a sentence about a task becomes a LoRA at once.'
        )
        with gr.Tab('Document'):
            reader = gr.Dropdown(engine.documents, label='Weights that read documents')
            text = gr.Textbox(label='Paste a document', lines=6, max_lines=12)
            file = gr.File(
                label='or choose a file: text, Markdown, HTML or PDF, at most 20 MB', height=120
            )
            with gr.Row():
                read = gr.Button('Internalise', variant='primary')
                stop = gr.Button('Stop')
                example = gr.Button('Example: a number hidden in 10,000 tokens')
            status = box('Status of documents', lines=2)

            @gr.render([me, reader], [changed.change, reader.change], show_progress='hidden')
            def documents(me_now, checkpoint):
                memory = engine.memory(me_now, checkpoint) if me_now else None
                notes = engine.browser(me_now).notes if memory else {}
                for name in list(memory.documents) if memory else ():
                    factor = memory.scales[name]
                    with gr.Group():
                        own = gr.State(name)
                        note = notes.get((checkpoint, name), '')
                        switch = gr.Checkbox(
                            factor != 0, label=f'{name} counts ({note})', interactive=True
                        )
                        strength = gr.Slider(
                            0.1,
                            2,
                            factor or 1,
                            step=0.1,
                            label=f'Strength of {name}',
                            interactive=True,
                        )
                        forget = gr.Button(f'Remove {name}', size='sm')
                    values = [reader, own, switch, strength]
                    on(switch.input, do.scale, values, [], status)
                    on(strength.release, do.scale, values, [], status)
                    on(forget.click, do.remove, [reader, own], [changed], status)

            question = gr.Textbox(label='Question')
            ask = gr.Button('Ask', variant='primary')
            with gr.Row():
                with_documents = box('Answer with the documents', lines=3, min_width=280)
                without = box('Answer without them', lines=3, min_width=280)
            with gr.Row():
                name = gr.Textbox(label='Name to keep the documents under, as one adapter')
                keep = gr.Button('Keep the documents')
            # Out of turn, so that Stop reaches what waits in the queue too.
            asked = read.click(
                lambda me: engine.stops(me) if me else 0,
                me,
                stops,
                queue=False,
                api_visibility='private',
            )
            on(asked.then, do.internalize, [reader, text, file, stops], [changed], status)
            on(stop.click, do.stop, [], [], status, queued=False)
            on(example.click, do.example, [reader], [reader, text, file, question], status)
            for trigger in (ask.click, question.submit):
                answers = [with_documents, without]
                on(trigger, do.ask_documents, [reader, question], answers, status)
            on(keep.click, do.keep_documents, [reader, name], [], status)

        with gr.Tab('Task'):
            teller = gr.Dropdown(engine.tasks, label='Weights that read descriptions')
            description = gr.Textbox(label='Description of the task')
            make = gr.Button('Make the LoRA')
            given = gr.Textbox(label='Input')
            with gr.Row():
                for task, value in _TASKS.items():
                    # The values are bound now; the loop goes on.
                    gr.Button(f'Example: {task}', min_width=200).click(
                        lambda task=task, value=value: (task, value),
                        None,
                        [description, given],
                        api_visibility='private',
                    )
            answer = gr.Button('Answer', variant='primary')
            task_status = box('Status of the task', lines=2)
            with gr.Row():
                three = [
                    box('With the LoRA', lines=3, min_width=280),
                    box('Base model, input alone', lines=3, min_width=280),
                    box('Base model, description in the prompt', lines=3, min_width=280),
                ]
            table = gr.File(
                label='Many inputs: a CSV file, in its column "input" or its first one', height=120
            )
            many = gr.Button('Answer them all')
            table_out = gr.File(label='CSV file with answers', visible=False)
            with gr.Row():
                task_name = gr.Textbox(label='Name to keep the LoRA of the task under')
                task_keep = gr.Button('Keep the LoRA')
            about = [teller, description]
            for trigger in (make.click, description.submit):
                on(trigger, do.specialize, about, [], task_status)
            for trigger in (answer.click, given.submit):
                on(trigger, do.ask_task, [*about, given], three, task_status)
            on(many.click, do.ask_table, [*about, table], [table_out], task_status)
            on(task_keep.click, do.keep_task, [*about, task_name], [], task_status)

        with gr.Tab('Image', visible=bool(engine.images)):
            gr.Markdown('The shipped weights know handwritten digits, dark on white.')
            looker = gr.Dropdown(engine.images, label='Weights that read images')
            image = gr.File(label='An image: PNG, JPEG, GIF or WebP, at most 20 MB', height=120)
            with gr.Row():
                for path in sorted(_PICTURES.glob('*.png')):
                    gr.Button(f'Example: {path.stem}', min_width=120).click(
                        lambda path=path: str(path), None, image, api_visibility='private'
                    )
            about_image = gr.Textbox(QUESTION, label='Question about the image')
            ask_image = gr.Button('Ask the model, which sees no images', variant='primary')
            image_status = box('Status of the image', lines=2)
            with gr.Row():
                seen = [
                    gr.Image(label='The image', interactive=False, height=160, buttons=[]),
                    box('Answer with the image', lines=3, min_width=280),
                    box('Answer without the image', lines=3, min_width=280),
                ]
            with gr.Row():
                image_name = gr.Textbox(label='Name to keep the LoRA of the image under')
                image_keep = gr.Button('Keep the LoRA of the image')
            for trigger in (ask_image.click, about_image.submit):
                on(trigger, do.ask_image, [looker, image, about_image], seen, image_status)
            on(image_keep.click, do.keep_image, [looker, image, image_name], [], image_status)

        with gr.Tab('Adapters') as tab:
            gr.Markdown('Everyone who may use this page sees the adapters that are kept here.')
            rows = gr.Dataframe(
                headers=['name', 'made of', 'by', 'date', 'MB'],
                datatype='str',
                type='array',
                interactive=False,
                wrap=True,
                label='Kept adapters',
            )
            chosen = gr.Dropdown([], label='Adapter')
            asked = gr.Textbox(label='Question or input')
            ask_it = gr.Button('Ask the adapter', variant='primary')
            shelf_status = box('Status of adapters', lines=2)
            with gr.Row():
                two = [
                    box('Answer with the adapter', lines=3, min_width=280),
                    box('Answer without the adapter', lines=3, min_width=280),
                ]
            pack = gr.Button('Prepare as a zip file for PEFT')
            with gr.Row():
                dtype = gr.Radio(
                    ['float32', 'bfloat16', 'float16'], value='bfloat16', label='Merged model in'
                )
                merge = gr.Button('Merge into the model')
            output = gr.File(label='File to download', visible=False)
            zipped = gr.File(
                label='Bring an adapter of PEFT: a zip file of its two files', height=120
            )
            with gr.Row():
                new_name = gr.Textbox(label='Name to keep it under')
                bring = gr.Button('Bring it')
            for trigger in (ask_it.click, asked.submit):
                on(trigger, do.ask_adapter, [chosen, asked], two, shelf_status)
            on(pack.click, do.download, [chosen], [output], shelf_status)
            on(merge.click, do.merge, [chosen, dtype], [output], shelf_status)
            lists = [rows, chosen]
            brought = on(bring.click, do.upload, [new_name, zipped], [], shelf_status)

            def relist():
                return shelf.rows(), gr.update(choices=shelf.names())

            for trigger in (brought.success, tab.select):
                trigger(relist, None, lists, queue=False, api_visibility='private')

        # Through the queue: only there is a change of `changed` noticed.
        page.load(None, me, me, js=_NEW_ID).then(
            lambda: secrets.token_hex(4), None, changed, api_visibility='private'
        )
    return page


def launch(page: gr.Blocks, host: str, port: int, share: bool, **more):
    """Serves the page.

    Raises:
      UserError: the port is taken.
    """
    try:
        return page.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            ssr_mode=False,
            max_file_size=_MAX_UPLOAD,
            footer_links=[],
            allowed_paths=[str(_PICTURES)],
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            **more,
        )
    except OSError as error:
        raise UserError(
            f'cannot serve at {host}:{port} ({error}); choose another --port'
        ) from error
