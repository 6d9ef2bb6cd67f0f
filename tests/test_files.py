"""Documents of a user's as text."""

import io

import pypdf
import pytest

from d2l import files
from hyperlora.errors import UserError


def pdf(text='', password=''):
    """A PDF of one page that shows a text."""
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = pypdf.generic.DictionaryObject(
        {
            pypdf.generic.NameObject(f'/{key}'): pypdf.generic.NameObject(f'/{value}')
            for key, value in (('Type', 'Font'), ('Subtype', 'Type1'), ('BaseFont', 'Helvetica'))
        }
    )
    fonts = pypdf.generic.DictionaryObject({pypdf.generic.NameObject('/F1'): font})
    page[pypdf.generic.NameObject('/Resources')] = pypdf.generic.DictionaryObject(
        {pypdf.generic.NameObject('/Font'): fonts}
    )
    stream = pypdf.generic.DecodedStreamObject()
    stream.set_data(f'BT /F1 12 Tf 10 100 Td ({text}) Tj ET'.encode())
    page[pypdf.generic.NameObject('/Contents')] = writer._add_object(stream)
    if password:
        writer.encrypt(password)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


HTML = """<html><head><title>Ducks</title><style>p {color: red}</style></head><body>
<script>alert("no")</script><h1>Ducks &amp; geese</h1><p>They <b>swim</b>.</p></body></html>"""


@pytest.mark.parametrize(
    'name, data, wanted',
    [
        ('a.txt', 'grüße\n'.encode(), 'grüße\n'),
        ('a.md', '\ufeff# One'.encode(), '# One'),
        ('none', b'text', 'text'),
        ('a.HTML', HTML.encode(), 'Ducks\nDucks & geese\nThey swim.'),
        ('a.pdf', pdf('It rains.'), 'It rains.'),
    ],
)
def test_texts(tmp_path, name, data, wanted):
    (tmp_path / name).write_bytes(data)
    assert files.read(tmp_path / name) == wanted


@pytest.mark.parametrize(
    'name, data, message',
    [
        ('a.txt', b'ab\xff', 'bad byte at offset 2'),
        ('a.txt', b'\x7fELF\0\0', 'a binary file'),
        ('a.txt', b' \n', 'is empty'),
        ('a.html', b'<script>x()</script>', 'is empty'),
        ('a.pdf', b'%PDF-1.4 cut', 'not a readable PDF'),
        ('a.pdf', b'', 'not a readable PDF'),
        ('a.pdf', pdf(''), 'holds no text'),
        ('a.pdf', pdf('secret', 'key'), 'is encrypted'),
    ],
)
def test_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        files.read(tmp_path / name)
    assert name in str(error.value)


def test_pdfs_that_are_encrypted_otherwise(tmp_path, monkeypatch):
    """By AES, for which pypdf may lack a package; or by a handler that pypdf refuses so."""
    (tmp_path / 'a.pdf').write_bytes(pdf('secret'))
    for error, message in (
        (pypdf.errors.DependencyError('cryptography is required'), 'decrypt it first .crypto'),
        (NotImplementedError('unknown handler'), 'not a readable PDF .unknown handler'),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(pypdf, 'PdfReader', fail)
        with pytest.raises(UserError, match=message):
            files.read(tmp_path / 'a.pdf')


def test_missing(tmp_path):
    for path in (tmp_path / 'absent.txt', tmp_path):
        with pytest.raises(UserError, match='cannot read the document'):
            files.read(path)
