"""Documents of a user's, as text: plain text, Markdown, HTML, PDF."""

from __future__ import annotations

import io
import pathlib

from hyperlora.errors import UserError

_HTML = ('.html', '.htm', '.xhtml')
_BLOCKS = (
    'address article aside blockquote br dd div dl dt footer h1 h2 h3 h4 h5 h6 header hr li main '
    'nav ol p pre section table title tr ul'
).split()
SUFFIXES = ('.txt', '.md', '.rst', *_HTML, '.pdf')


def read(path: str | pathlib.Path) -> str:
    """The text of a file; see `text_of`.

    Raises:
      UserError: the file is missing, unreadable or a directory, or `text_of` refuses it.
    """
    try:
        data = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot read the document ({error.strerror})') from error
    return text_of(data, str(path))


def text_of(data: bytes, name: str) -> str:
    """Text as the ending of the name says: HTML without its tags, scripts and styles; the text of
    a PDF's pages; UTF-8 otherwise.

    Raises:
      UserError: not such a file: binary, encrypted, blank, or of pictures alone.
    """
    suffix = pathlib.Path(name).suffix.lower()
    if suffix == '.pdf':
        text = _pdf(data, name)
    else:
        text = _utf8(data, name)
        if suffix in _HTML:
            text = _html(text, name)
    if not text.strip():
        raise UserError(f'{name}: the document is empty')
    return text


def _utf8(data: bytes, name: str) -> str:
    if b'\0' in data:
        raise UserError(f'{name}: not a text but a binary file; known are {", ".join(SUFFIXES)}')
    try:
        return data.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{name}: not UTF-8 text (bad byte at offset {error.start})') from error


def _html(text: str, name: str) -> str:
    try:
        import bs4
    except ImportError as error:
        raise UserError(f"{name}: HTML needs pip install 'hyperlora[documents]'") from error
    page = bs4.BeautifulSoup(text, 'html.parser')
    for element in page(['script', 'style', 'template', 'noscript']):
        element.decompose()
    for element in page(_BLOCKS):
        element.append('\n')
    lines = (' '.join(line.split()) for line in page.get_text().splitlines())
    return '\n'.join(line for line in lines if line)


def _pdf(data: bytes, name: str) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise UserError(f"{name}: PDF needs pip install 'hyperlora[documents]'") from error
    try:
        pages = pypdf.PdfReader(io.BytesIO(data))
        locked = pages.is_encrypted and not pages.decrypt('')
        text = '' if locked else '\n'.join(page.extract_text() for page in pages.pages)
    except pypdf.errors.DependencyError as error:  # what AES needs
        raise UserError(f'{name}: the PDF is encrypted; decrypt it first ({error})') from error
    except Exception as error:  # whatever a broken file leads pypdf to
        raise UserError(f'{name}: not a readable PDF ({error})') from error
    if locked:
        raise UserError(f'{name}: the PDF is encrypted; remove its password first')
    if not text.strip():
        raise UserError(f'{name}: the PDF holds no text (only pictures?)')
    return text
