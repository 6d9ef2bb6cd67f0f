"""Adapters that are kept under a name in a folder, and go in and out as zip files."""

from __future__ import annotations

import datetime
import re
import secrets
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from hyperlora import adapters
from hyperlora.errors import UserError
from hyperlora.session import Adapter, Session

# Files of an adapter -> the most bytes of them that are unpacked.
FILES = {'adapter_config.json': 2**20, 'adapter_model.safetensors': 256 * 2**20}
_MAX_KEPT = 500
_NAME = re.compile(r'\w[\w .-]{0,62}')


class Shelf:
    """A folder of adapters; whoever may use the page sees all of them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Names of what is kept."""
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name[0] != '.')

    def rows(self) -> list[list[str]]:
        """(name, what it was made of, weights that made it, date, MB) of what is kept."""
        return [self._row(name) for name in self.names()]

    def _row(self, name: str) -> list[str]:
        try:
            about = adapters.read_metadata(self.folder / name)
            size = sum(path.stat().st_size for path in (self.folder / name).iterdir())
        except Exception:  # of a damaged file, which must not hide the others
            return [name, 'damaged', '', '', '']
        kind = next(
            (key for key in ('documents', 'image_sha256', 'task') if key in about), 'uploaded'
        )
        made = datetime.datetime.fromtimestamp((self.folder / name).stat().st_mtime)
        what = f'{kind.removesuffix("_sha256")}: {about[kind]}' if kind in about else kind
        weights = about.get('hypernetwork', '')
        return [name, what, weights, f'{made:%Y-%m-%d %H:%M}', f'{size / 1e6:.1f}']

    def keep(self, name: str, adapter: Adapter, session: Session) -> None:
        """Writes an adapter.

        Raises:
          UserError: the name is taken or cannot be one of a folder, or the shelf is full.
        """
        self._add(name, lambda folder: session.save(adapter, folder))

    def load(self, name: str, session: Session) -> Adapter:
        """Reads what is kept.

        Raises:
          UserError: nothing is kept under that name, or see `adapters.load`.
        """
        return session.load(self._path(name))

    def pack(self, name: str, output: Path) -> None:
        """Writes an adapter of the shelf as a zip file that `unpack` and PEFT take."""
        _zip([self._path(name) / file for file in FILES], output)

    def unpack(self, name: str, path: str | Path, session: Session) -> None:
        """Keeps an adapter of PEFT that comes as a zip file.

        Raises:
          UserError: it is not a zip file of the two files of an adapter, which unpack to no more
            than `FILES` says, or the adapter is damaged or for another model.
        """

        def fill(folder):
            for file, content in _contents(path).items():
                (folder / file).write_bytes(content)
            try:
                session.load(folder)
            except (OverflowError, RecursionError, AttributeError) as error:
                raise UserError(f'adapter_config.json is damaged ({error!r})') from error

        self._add(name, fill)

    def merge(self, name: str, session: Session, dtype: str, output: Path) -> None:
        """Writes base model and adapter in one as the zip of a Hugging Face folder."""
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            session.save_merged(self.load(name, session), folder, dtype)
            _zip(sorted(Path(folder).iterdir()), output)

    def _path(self, name: str) -> Path:
        if name not in self.names():
            raise UserError('choose an adapter that is kept here first')
        return self.folder / name

    def _add(self, name, fill) -> None:
        name = name.strip()
        if not _NAME.fullmatch(name):
            raise UserError('give a name of 1 to 63 letters, digits, spaces, dots and dashes')
        kept = self.names()
        if name in kept:
            raise UserError(f'{name} is taken; choose another name')
        if len(kept) >= _MAX_KEPT:
            raise UserError(f'{self.folder} is full: it holds {_MAX_KEPT} adapters')
        partial = self.folder / f'.{secrets.token_hex(8)}'
        try:
            partial.mkdir()
            fill(partial)
            partial.rename(self.folder / name)
        except OSError as error:
            raise UserError(f'cannot keep {name} ({error.strerror})') from error
        except UserError as error:  # nobody's business where the shelf is
            message = str(error).replace(f'{partial}/', '').replace(str(partial), name)
            raise UserError(message) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _contents(path: str | Path) -> dict[str, bytes]:
    """The two files of a zipped adapter."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sorted(info.filename for info in infos) != sorted(FILES):
                raise UserError(f'the zip file must hold {" and ".join(FILES)}, nothing else')
            for info in infos:
                limit = FILES[info.filename]
                with archive.open(info) as file:
                    # The size that the archive claims may be a lie.
                    content = file.read(limit + 1)
                if len(content) > limit:
                    raise UserError(f'{info.filename} unpacks to more than {limit / 2**20:.0f} MB')
                found[info.filename] = content
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as error:
        # RuntimeError: encrypted, or packed in a way that is not known here.
        raise UserError(f'not a zip file that can be read ({error})') from error
    return found


def _zip(paths, output: Path) -> None:
    with zipfile.ZipFile(output, 'w') as archive:  # stored: weights do not shrink
        for path in paths:
            archive.write(path, path.name)
