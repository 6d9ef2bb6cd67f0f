"""The page in the browser: its logic on the tiny base model, and really, in Chromium."""

import concurrent.futures
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest
from test_qa import model  # noqa: F401

from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.evaluation.meter import Meter

pytest.importorskip('gradio')

from hyperlora.demo import engine as engines  # noqa: E402
from hyperlora.demo import page as pages  # noqa: E402
from hyperlora.demo.engine import Engine  # noqa: E402
from hyperlora.demo.shelf import FILES, Shelf  # noqa: E402

TEXTS = ('One thing. Another one, longer than that. Why? ', 'Ann has a red car. Bob has 3 cats. ')
CHROMIUM = '/usr/bin/chromium'


@pytest.fixture
def engine(model, monkeypatch):  # noqa: F811
    def load(checkpoint, base, quantization):
        assert quantization == 'none'  # or what is kept could not be merged
        return model

    monkeypatch.setattr(trained, 'load', load)
    monkeypatch.setitem(engines._LOADED, 'tasks', 'internalizer')  # there is no other model here
    return Engine('some', 'other')


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / 'shelf')


@pytest.fixture
def do(engine, shelf):
    return pages.Handlers(engine, shelf)


def last(handler, *values, outputs=0):
    """The last of what a guarded handler yields."""
    found = list(pages.guarded(handler, outputs)(*values))[-1]
    return found if outputs else (found,)


def zipped(path, contents, **more):
    with zipfile.ZipFile(path, 'w', **more) as archive:
        for name, content in contents:
            archive.writestr(name, content)
    return path


# ------------------------------------------------------------------------------------ documents


def test_a_browser_sees_its_own_documents_alone(engine, do):
    for me, text in zip('ab', TEXTS, strict=True):
        assert 'tokens in' in last(do.internalize, me, 'some', text, None, outputs=1)[-1]
    own, other = (engine.memory(me, 'some').documents for me in 'ab')
    assert not own.keys() & other.keys()
    answers = {me: last(do.ask_documents, me, 'some', 'Who?', outputs=2) for me in 'ab'}
    for me, text in zip('ab', TEXTS, strict=True):
        alone = engine.session.ask('Who?', engine.session.internalize(text))
        assert answers[me][:2] == (alone, engine.session.ask('Who?'))
    assert answers['a'][0] != answers['b'][0]
    status = last(do.ask_documents, 'c', 'some', 'Who?', outputs=2)[-1]
    assert status == 'no document is switched on; internalise one first'
    assert 'loading' in last(do.ask_documents, '', 'some', 'Who?', outputs=2)[-1]


def test_documents_are_switched_scaled_and_forgotten(engine, do):
    for name, text in zip('xy', TEXTS, strict=True):
        engine.internalize('a', 'some', name, text)

    def answer():
        return last(do.ask_documents, 'a', 'some', 'Who?', outputs=2)[0]

    both = answer()
    assert last(do.scale, 'a', 'some', 'x', False, 1.0) == ('x is switched off.',)
    alone = answer()
    assert alone == engine.session.ask('Who?', engine.session.internalize(TEXTS[1])) != both
    assert engine.documents_adapter('a', 'some').metadata['documents'] == 'y'
    assert 'counts 0.5 times' in last(do.scale, 'a', 'some', 'x', True, 0.5)[0]
    assert engine.memory('a', 'some').scales == {'x': 0.5, 'y': 1.0}
    last(do.scale, 'a', 'some', 'x', True, 1.0)
    assert answer() == both
    last(do.remove, 'a', 'some', 'x', outputs=1)
    assert answer() == alone
    assert 'no document' in last(do.remove, 'a', 'some', 'x', outputs=1)[-1]


def test_reading_is_reported_and_stopped(engine, do):
    seen = []

    def report(done, about):
        seen.append(done)
        if done:
            # From another thread, as clicks come: they must not wait for the reading to end.
            click = threading.Thread(target=last, args=(do.stop, 'a'), daemon=True)
            click.start()
            click.join(20)
            assert not click.is_alive() and engine.stops('a') == 1

    with pytest.raises(UserError, match='stopped; x was not'):
        engine.internalize('a', 'some', 'x', TEXTS[0] * 3 + TEXTS[1], report)
    assert seen[0] == 0 and not engine.memory('a', 'some').documents
    seen.clear()
    engine.internalize('a', 'some', 'x', TEXTS[0], lambda done, _: seen.append(done))
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen)
    # Stopped while it waited for its turn.
    asked = engine.stops('a')
    last(do.stop, 'a')
    stopped = last(do.internalize, 'a', 'some', TEXTS[1], None, asked, outputs=1)[-1]
    assert 'stopped; ' in stopped and list(engine.memory('a', 'some').documents) == ['x']


def test_pasted_documents_that_begin_alike(engine, do):
    texts = [f'{"a" * 40} {n}.' for n in range(3)]
    for text in [*texts, *texts[::-1]]:
        last(do.internalize, 'a', 'some', text, None, outputs=1)
    name = 'a' * 40
    names = [name, f'{name} (2)', f'{name} (3)']
    assert list(engine.memory('a', 'some').documents) == names
    last(do.remove, 'a', 'some', name, outputs=1)
    last(do.internalize, 'a', 'some', texts[1], None, outputs=1)
    assert list(engine.memory('a', 'some').documents) == names[1:]


def test_the_example_chooses_weights_that_find_it(engine, do):
    reader, document, *_, status = last(do.example, 'a', 'some', outputs=4)
    assert reader == 'smollm2-niah' and status.split()[0] in document


def test_memory_is_bounded(engine, monkeypatch):
    engine.internalize('a', 'some', 'x', TEXTS[0])
    size = engine.browser('a').nbytes
    monkeypatch.setattr(engines, '_BROWSER_BYTES', 2.2 * size)
    engine.internalize('a', 'some', 'y', TEXTS[0])
    with pytest.raises(UserError, match='no room for z'):
        engine.internalize('a', 'some', 'z', TEXTS[0])
    memory = engine.memory('a', 'some')
    memory.scale('x', 0.5)
    before = dict(memory.documents)
    with pytest.raises(UserError, match='no room for x'):  # a longer one than there is
        engine.internalize('a', 'some', 'x', TEXTS[0] + TEXTS[1])
    assert memory.documents == before and memory.scales == {'x': 0.5, 'y': 1.0}
    monkeypatch.setattr(engines, '_ALL_BYTES', 2.5 * size)
    engine.internalize('b', 'some', 'x', TEXTS[0])
    assert engine.browser('b').nbytes == size and not engine.browser('a').nbytes


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('big.txt', b'a' * (engines.MAX_FILE + 1), 'at most 20 MB'),
        ('program.exe', b'MZ\0\1', 'not a text but a binary'),
        ('latin.txt', b'caf\xe9', 'not UTF-8'),
        ('fake.pdf', b'no pdf', 'not a readable PDF'),
        ('empty.md', b' ', 'is empty'),
    ],
)
def test_refused_uploads(do, engine, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    *_, status = last(do.internalize, 'a', 'some', '', str(tmp_path / name), outputs=1)
    assert message in status and '\n' not in status and str(tmp_path) not in status
    assert not engine.memory('a', 'some').documents
    assert 'tokens in' in last(do.internalize, 'a', 'some', TEXTS[0], None, outputs=1)[-1]


def test_what_is_refused_or_fails_ends_in_a_sentence(do, engine, monkeypatch):
    assert 'paste' in last(do.internalize, 'a', 'some', ' ', None, outputs=1)[-1]
    assert 'not offered' in last(do.internalize, 'a', '/etc', TEXTS[0], None, outputs=1)[-1]
    last(do.internalize, 'a', 'some', TEXTS[0], None, outputs=1)
    assert 'write a question' in last(do.ask_documents, 'a', 'some', ' ', outputs=2)[-1]
    assert 'fit into the window' in last(do.ask_documents, 'a', 'some', 'a' * 300, outputs=2)[-1]
    monkeypatch.setattr(engine, 'internalize', lambda *_: 1 / 0)
    status = last(do.internalize, 'a', 'some', TEXTS[0], None, outputs=1)[-1]
    assert status.startswith('Something went wrong') and 'ZeroDivision' not in status


def test_twenty_at_once(engine, do):
    """Through the queue of the page's server: none is lost, and each gets its own answer."""
    import gradio as gr
    from gradio_client import Client

    def ask(question):
        return last(do.ask_documents, 'a', 'some', question, outputs=2)[0]

    engine.internalize('a', 'some', 'x', TEXTS[0])
    questions = [f'Who{n % 5}?' for n in range(20)]
    wanted = {question: ask(question) for question in questions}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, questions)) == [wanted[q] for q in questions]

    page = pages.build(engine, do.shelf)
    with page:  # the same worker, under a name that a client can call
        inputs, out = gr.Textbox(), gr.Textbox()
        inputs.submit(ask, inputs, out, api_name='ask', concurrency_id='model')
    _, url, _ = pages.launch(page, '127.0.0.1', None, False, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        jobs = [client.submit(question, api_name='/ask') for question in questions]
        assert [job.result(120) for job in jobs] == [wanted[q] for q in questions]
    finally:
        page.close()


def test_weights_for_tasks_are_found_out_at_once(engine, monkeypatch):
    def load(checkpoint, *_):
        if checkpoint == 'typo':
            raise UserError('unknown checkpoint')
        return engine.session.internalizer.trained

    monkeypatch.undo()
    monkeypatch.setattr(trained, 'load', load)
    with pytest.raises(UserError, match='unknown checkpoint'):
        Engine('some', 'typo')


def test_images(engine, do, tmp_path, monkeypatch):
    status = last(do.ask_image, 'a', 'none', None, 'What?', outputs=3)[-1]
    assert 'choose an image' in status
    (tmp_path / 'a.png').write_bytes(b'\x89PNG')
    refused = last(do.ask_image, 'a', 'none', str(tmp_path / 'a.png'), 'What?', outputs=3)[-1]
    assert 'not offered' in refused
    (tmp_path / 'b.png').write_bytes(b'a' * (engines.MAX_FILE + 1))
    status = last(do.ask_image, 'a', 'none', str(tmp_path / 'b.png'), 'What?', outputs=3)[-1]
    assert 'at most 20 MB' in status
    adapter = engine.session.internalize(TEXTS[0])
    monkeypatch.setattr(engine, 'image', lambda *_: adapter)
    seven = str(pages._PICTURES / 'digit seven.png')
    shown, *answers, _ = last(do.ask_image, 'a', 'some', seven, 'Who?', outputs=3)
    assert answers == [engine.session.ask('Who?', adapter), engine.session.ask('Who?')]
    assert shown.size == (64, 64)
    assert last(do.keep_image, 'a', 'some', 'a.png', 'cat') == ('Kept as cat; see Adapters.',)


def test_warming_up_leaves_no_trace(engine):
    engine.warm_up()
    assert not engine._browsers


# ---------------------------------------------------------------------------------------- tasks


def test_a_table_of_inputs(engine, do, tmp_path, monkeypatch):
    adapter = engine.session.internalize(TEXTS[0])
    monkeypatch.setattr(engine, 'task', lambda *_: adapter)
    path = tmp_path / 'in.csv'
    path.write_text('id,input\n1,Who?\n2,"Why, now?"\n3,\n')
    out, status = last(do.ask_table, 'a', 'other', 'A task.', str(path), outputs=1)
    rows = list(csv.DictReader(open(out.value['path'], newline='', encoding='utf-8')))
    inputs = ['Who?', 'Why, now?']
    assert [row['input'] for row in rows] == inputs and status.startswith('2 answers')
    assert [row['answer'] for row in rows] == engine.session.ask_all(inputs, adapter, 32)
    path.write_text('id\n')
    assert '0 inputs' in last(do.ask_table, 'a', 'other', 'A task.', str(path), outputs=1)[-1]
    path.write_text(f'id\nWho?\n{"a" * 300}\n')
    monkeypatch.setattr(engine.session, 'ask_all', lambda *_: 1 / 0)
    refused = last(do.ask_table, 'a', 'other', 'A task.', str(path), outputs=1)[-1]
    assert refused.startswith('row 2 (aaa') and 'do not fit into the window of 256' in refused
    assert 'choose a CSV' in last(do.ask_table, 'a', 'other', 'A task.', None, outputs=1)[-1]


# ------------------------------------------------------------------------------------- adapters


def test_kept_adapters_outlive_the_server(engine, shelf, do, tmp_path):
    engine.internalize('a', 'some', 'notes', TEXTS[0])
    assert last(do.keep_documents, 'a', 'some', 'first') == ('Kept as first; see Adapters.',)
    assert 'is taken' in last(do.keep_documents, 'a', 'some', 'first')[0]
    again = Shelf(shelf.folder)
    ((name, what, weights, date, _),) = again.rows()
    assert (name, what, weights) == ('first', 'documents: notes', 'some')
    assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d', date)
    asked = last(do.ask_adapter, 'b', 'first', 'Who?', outputs=2)[0]
    assert asked == last(do.ask_documents, 'a', 'some', 'Who?', outputs=2)[0]
    out, _ = last(do.download, 'b', 'first', outputs=1)
    out = out.value['path']
    assert sorted(zipfile.ZipFile(out).namelist()) == sorted(FILES)
    assert last(do.upload, 'b', 'second', out) == ('Kept as second.',)
    assert asked == last(do.ask_adapter, 'b', 'second', 'Who?', outputs=2)[0]
    (shelf.folder / 'second' / 'adapter_model.safetensors').write_bytes(b'broken')
    assert [row[1] for row in again.rows()] == ['documents: notes', 'damaged']
    assert 'damaged' in last(do.ask_adapter, 'b', 'second', 'Who?', outputs=2)[-1]


@pytest.mark.parametrize('name', ['', '..', '../x', 'a/b', '.hidden', 'a\\b', '<b>', 'x' * 64])
def test_names_that_are_no_folders(engine, shelf, name):
    with pytest.raises(UserError, match='give a name'):
        shelf.keep(name, engine.session.internalize(TEXTS[0]), engine.session)
    with pytest.raises(UserError, match='choose an adapter'):
        shelf.load(name, engine.session)
    assert not list(shelf.folder.iterdir())


def test_hostile_zip_files(engine, shelf, tmp_path):
    shelf.keep('good', engine.session.internalize(TEXTS[0]), engine.session)
    good = [(name, (shelf.folder / 'good' / name).read_bytes()) for name in FILES]
    path = tmp_path / 'a.zip'

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            shelf.unpack('new', path, engine.session)
        assert str(tmp_path) not in str(caught.value)
        assert shelf.names() == ['good'] and len(list(shelf.folder.iterdir())) == 1

    for more in (('../evil', b''), ('/etc/x', b''), ('README.md', b''), good[0]):
        with pytest.warns(UserWarning) if more is good[0] else io.StringIO():
            zipped(path, [*good, more])
        refused('nothing else')
    zipped(path, [(f'../{name}', content) for name, content in good])
    refused('nothing else')
    bomb = b' ' * (FILES['adapter_config.json'] + 1)
    zipped(path, [good[1], ('adapter_config.json', bomb)], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < len(bomb) // 2
    refused('unpacks to more')
    path.write_bytes(b'PK nothing')
    refused('not a zip file')
    config = json.loads(dict(good)['adapter_config.json'])
    for change in ({'r': 'x'}, {'r': 10**400, 'use_rslora': True}, {'peft_type': 'IA3'}):
        zipped(path, [good[1], ('adapter_config.json', json.dumps({**config, **change}))])
        refused('adapter')
    zipped(path, [good[1], ('adapter_config.json', '[' * 100_000)])
    refused('damaged')
    zipped(path, [good[0], ('adapter_model.safetensors', b'x' * 100)])
    refused('damaged')
    zipped(path, good)
    shelf.unpack('new', path, engine.session)


# ------------------------------------------------------------------------------------- browsers

_PATIENCE = 400_000  # ms; the machine may be busy
_NEEDLE = 'The special magic number is {}. '
_QUESTION = 'What is the special magic number? Reply with only the number.'
_HOSTILE = '<img src=x onerror=document.title=1> & **bold**'


@pytest.fixture(scope='module')
def url(tmp_path_factory):
    """Of a real server: SmolLM2 and the shipped weights."""
    pytest.importorskip('playwright')
    if not os.path.exists(CHROMIUM):
        pytest.skip(f'{CHROMIUM} is missing')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp('server')
    command = [sys.executable, '-m', 'launch.demo', '--documents=smollm2-niah']
    command += [f'--adapters={folder}', f'--port={port}']
    with open(folder / '.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while True:
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / '.log').read_text()
                time.sleep(1)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert 'Traceback' not in (folder / '.log').read_text().split('KeyboardInterrupt')[0]


@pytest.fixture(scope='module')
def chromium(url):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url):
    """Opens the page in a browser of its own."""
    contexts = []

    def open_page(**more):
        contexts.append(chromium.new_context(**more))
        contexts[-1].set_default_timeout(_PATIENCE)
        page = contexts[-1].new_page()
        page.goto(url)
        page.get_by_label('Paste a document').wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def field(page, label):
    return page.get_by_label(label, exact=True)


def press(page, name):
    page.get_by_role('button', name=name, exact=True).click()


def says(page, label, pattern):
    from playwright.sync_api import expect

    expect(field(page, label)).to_have_value(re.compile(pattern, re.S), timeout=_PATIENCE)


def give(page, name, content):
    """Uploads a file to the tab that is shown."""
    panel = page.get_by_role('tabpanel').filter(visible=True)
    upload = {'name': name, 'mimeType': 'application/octet-stream', 'buffer': content}
    panel.locator('input[type=file]').last.set_input_files(upload)  # a table has one too
    page.get_by_role('button', name='Clear', exact=True).wait_for()


def teach(page, text):
    field(page, 'Paste a document').fill(text)
    press(page, 'Internalise')
    says(page, 'Status of documents', 'Internalised in')


def ask_about(page):
    field(page, 'Question').fill(_QUESTION)
    press(page, 'Ask')


def open_from_menu(page, tab):
    """Opens a tab that a phone has no room for."""
    page.locator('.overflow-menu > button').click()
    page.locator('.overflow-dropdown').get_by_text(tab, exact=True).click()


@pytest.mark.slow
def test_a_document_in_the_browser(visit, tmp_path):
    from playwright.sync_api import expect

    page = visit()
    give(page, 'x.exe', b'MZ' + bytes(9))
    press(page, 'Internalise')
    says(page, 'Status of documents', 'not a text but a binary file')
    press(page, 'Clear')
    teach(page, _HOSTILE + ' ' + _NEEDLE.format(4711))
    page.get_by_role('checkbox').first.wait_for()
    ask_about(page)
    says(page, 'Status of documents', 'First word after')
    page.reload()
    page.get_by_role('checkbox').first.wait_for()  # the documents are still there
    expect(page.get_by_text(_HOSTILE[:20]).first).to_be_visible()
    ask_about(page)
    says(page, 'Status of documents', 'side by side in')
    assert field(page, 'Answer with the documents').input_value() == '4711'
    assert '4711' not in field(page, 'Answer without them').input_value()
    page.screenshot(path=tmp_path / 'document.png', full_page=True)
    page.set_viewport_size({'width': 390, 'height': 800})
    page.screenshot(path=tmp_path / 'document_phone.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert page.title() == 'HyperLoRA' and not page.locator('img[src=x]').count()
    page.get_by_role('checkbox').first.focus()
    page.keyboard.press('Space')
    says(page, 'Status of documents', 'is switched off')
    press(page, 'Ask')
    says(page, 'Status of documents', 'no document is switched on')
    field(page, 'Paste a document').focus()
    press(page, 'Example: a number hidden in 10,000 tokens')
    says(page, 'Status of documents', 'is hidden in the document')
    assert len(field(page, 'Paste a document').input_value()) > 20_000


@pytest.mark.slow
def test_two_thousand_tokens_are_answered_in_seconds(visit):
    """After warm-up, from the click on Internalise to the answer."""
    from playwright.sync_api import expect

    page = visit()
    for number in (1234, 5678, 9012):
        filler = 'The grass is green and the sky is blue. ' * 100
        field(page, 'Paste a document').fill(filler + _NEEDLE.format(number) + ' ' + filler)
        field(page, 'Question').fill(_QUESTION)
        start = time.monotonic()
        press(page, 'Internalise')
        says(page, 'Status of documents', 'Internalised in')
        read = time.monotonic() - start, field(page, 'Status of documents').input_value()
        press(page, 'Ask')
        answer = field(page, 'Answer with the documents')
        expect(answer).to_have_value(str(number), timeout=_PATIENCE)
        seconds = time.monotonic() - start
        says(page, 'Status of documents', 'side by side in')
        print(f'{read}, answered after {seconds:.1f} s')
        page.get_by_role('button', name=re.compile('^Remove ')).click()
        says(page, 'Status of documents', 'is forgotten')
    assert seconds < 3


@pytest.mark.slow
def test_memory_over_a_hundred_documents(monkeypatch):
    """Browsers come and go; what the process holds stays within what the page allows them."""
    monkeypatch.setattr(engines, '_ALL_BYTES', 100e6)
    engine = Engine('smollm2-niah', 'smollm2-t2l')

    def internalize(numbers):
        for number in numbers:
            text = f'Document {number}. ' + _NEEDLE.format(1000 + number)
            engine.internalize(f'browser {number % 40}', engine.documents[0], f'{number}', text)

    internalize(range(50))
    with Meter() as more:
        internalize(range(50, 150))
    print(f'100 more documents: {more.bytes / 1e6:.0f} MB at most')
    assert more.bytes < 100e6


@pytest.mark.slow
def test_two_browsers_at_once(visit):
    one, two = visit(), visit()
    for page, number in ((one, 1111), (two, 2222)):
        field(page, 'Paste a document').fill(_NEEDLE.format(number))
        press(page, 'Internalise')
    for page in (one, two):
        says(page, 'Status of documents', 'Internalised in')
        ask_about(page)
    for page, own, other in ((one, '1111', '2222'), (two, '2222', '1111')):
        says(page, 'Status of documents', 'side by side in')
        assert field(page, 'Answer with the documents').input_value() == own
        assert page.get_by_role('checkbox').count() == 1
        assert other not in page.content()


@pytest.mark.slow
def test_a_task_and_adapters_in_the_browser(visit, tmp_path):
    page = visit(viewport={'width': 390, 'height': 800})
    page.get_by_role('tab', name='Task').click()
    press(page, 'Example: Write the plural of the noun.')
    says(page, 'Input', 'city')
    press(page, 'Answer')
    says(page, 'Status of the task', 'side by side in')
    assert field(page, 'With the LoRA').input_value() == 'cities'
    page.screenshot(path=tmp_path / 'task.png', full_page=True)
    field(page, 'Name to keep the LoRA of the task under').fill('plural')
    press(page, 'Keep the LoRA')
    says(page, 'Status of the task', 'Kept as plural')
    panel = page.get_by_role('tabpanel').filter(visible=True)
    give(page, 'in.csv', b'input\ncity\nwolf\n')
    press(page, 'Answer them all')
    says(page, 'Status of the task', '2 answers in')
    with page.expect_download() as answers:
        panel.locator('a[download]').last.click()
    assert 'city,cities' in answers.value.path().read_text()

    open_from_menu(page, 'Adapters')
    panel.get_by_text('task: Write the plural').filter(visible=True).first.wait_for()
    page.get_by_label('Adapter', exact=True).click()
    page.get_by_role('option', name='plural').click()
    field(page, 'Question or input').fill('city')
    press(page, 'Ask the adapter')
    says(page, 'Status of adapters', 'side by side in')
    assert field(page, 'Answer with the adapter').input_value() == 'cities'
    press(page, 'Prepare as a zip file for PEFT')
    says(page, 'Status of adapters', 'ready to download')
    with page.expect_download() as packed:
        panel.locator('a[download]').first.click()
    packed.value.save_as(tmp_path / 'plural.zip')
    page.screenshot(path=tmp_path / 'adapters.png', full_page=True)
    bad = zipped(tmp_path / 'bad.zip', [('../evil', 'x')])
    for path, name, answer in (
        (bad, 'evil', 'nothing else'),
        (tmp_path / 'plural.zip', 'again', 'Kept as again'),
    ):
        page.reload()
        open_from_menu(page, 'Adapters')
        give(page, path.name, path.read_bytes())
        field(page, 'Name to keep it under').fill(name)
        press(page, 'Bring it')
        says(page, 'Status of adapters', answer)
    page.get_by_label('Adapter', exact=True).click()
    page.get_by_role('option', name='again').click()
    press(page, 'Merge into the model')
    says(page, 'Status of adapters', 'merged into the model')


@pytest.mark.slow
def test_an_image_in_the_browser(visit, tmp_path):
    page = visit(viewport={'width': 390, 'height': 800})
    open_from_menu(page, 'Image')
    give(page, 'x.png', b'MZ' + bytes(9))
    press(page, 'Ask the model, which sees no images')
    says(page, 'Status of the image', 'this file is not an image')
    press(page, 'Clear')
    press(page, 'Example: digit seven')
    page.get_by_role('button', name='Clear', exact=True).wait_for()
    press(page, 'Ask the model, which sees no images')
    says(page, 'Status of the image', 'side by side in')
    assert field(page, 'Answer with the image').input_value() == 'digit seven'
    assert 'seven' not in field(page, 'Answer without the image').input_value().split()
    page.screenshot(path=tmp_path / 'image.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    field(page, 'Name to keep the LoRA of the image under').fill('seven')
    press(page, 'Keep the LoRA of the image')
    says(page, 'Status of the image', 'Kept as seven')
