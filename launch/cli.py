"""What every command shares: one-line errors, exit codes, compilation cache, file checks."""

import os
import pathlib
import re
import sys
import tempfile
import uuid

from absl import app, flags, logging

from hyperlora.errors import Outage, UserError

STOPPED = 75  # exit code of a training that was told to stop, and saved: "try again" in sysexits.h
EXPLAINED = (UserError, ModuleNotFoundError, Outage)  # what is shown without a traceback


def run(main):
    """Runs `main(argv)` as a command: parses the flags, then exits the process.

    Exit codes: 0 on success; 2 after a user's mistake (a UserError, a bad flag, a bad config file
    or override, a package of an extra that is not installed), shown as one line `error: ...` on
    stderr; 1 after an Outage, shown likewise; `STOPPED`; 130 after Ctrl-C. Any other exception is a
    bug and keeps its traceback, with 1.
    Positional arguments are refused.

    Args:
      main: callable taking argv (the program name alone, once flags are parsed).
    """

    def configured_main(argv):
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # Orbax narrates every save.
        _enable_compilation_cache()
        main(argv)

    try:
        app.run(configured_main, flags_parser=_parse_flags)
    except EXPLAINED as error:
        print('error:', explained(error), file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def explained(error: Exception) -> str:
    """One of `EXPLAINED` in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f'the package {error.name} is not installed; the extras in setup.py hold it'
    return ' '.join(str(error).split())


def exit_code(error: Exception) -> int:
    """That of one of `EXPLAINED`."""
    return 1 if isinstance(error, Outage) else 2


def writable_directory(path) -> pathlib.Path:
    """Creates the local directory `path` (with its parents) and returns it.

    Raises:
      UserError: `path` is a URL, a file, or cannot be created or written to.
    """
    if '://' in str(path):
        raise UserError(f'{path}: not a local directory (mount the bucket, say with gcsfuse)')
    directory = pathlib.Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Creating a file is the only test that also sees read-only mounts and quotas.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f'{path}: not a writable directory ({error.strerror})') from error
    return directory


def writable_folder(path) -> str:
    """Creates the local directory or gs:// URL `path` and returns its absolute name.

    Raises:
      UserError: it is another URL, or cannot be created or written to.
      Outage: the bucket does not answer as it should.
    """
    if '://' not in str(path):
        return str(writable_directory(path).resolve())
    if not path.startswith('gs://'):
        raise UserError(f'{path}: neither a local directory nor a gs:// URL')
    from etils import epath

    try:
        folder = epath.Path(path)
        probe = folder / f'.probe-{uuid.uuid4().hex}'
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text('')
        probe.unlink()
    except ImportError as error:
        raise UserError(f"{path}: needs gcsfs: pip install 'hyperlora[gcs]'") from error
    except Exception as error:  # gcsfs passes on those of its HTTP and credentials libraries
        mistake = (
            isinstance(error, FileNotFoundError | PermissionError | ValueError)
            or getattr(error, 'code', None) in (400, 401, 403)
            or str(error).startswith('Forbidden')
        )
        raise (UserError if mistake else Outage)(
            f'{path}: cannot write there ({error or type(error).__name__}); check that the bucket '
            'exists and that this machine may write to it'
        ) from error
    return str(folder)


def _parse_flags(argv):
    """Parses the flags like absl, but turns every mistake in them into a UserError."""
    argv = [argv[0], *map(_expanded, argv[1:])]
    try:
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            if flags.FLAGS[name].flag_type() == 'config object':
                # ml_collections keeps the failure to open a config until its first use.
                getattr(flags.FLAGS[name].value, 'keys', None)
    except flags.Error as error:
        # When get_config raises, the message is a traceback whose last line is the mistake.
        first, *others = str(error).strip().splitlines()
        if others:
            first = first.removesuffix('Error whilst parsing config file:') + others[-1].strip()
        raise UserError(first) from error
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise UserError(f'cannot read the config file: {reason}') from error
    except SyntaxError as error:
        raise UserError(f'the config file is not valid Python: {error}') from error
    except (AttributeError, KeyError) as error:
        if 'get_config' in str(error):
            raise UserError('the config file has no function get_config') from error
        override = _unknown_override(error, argv)
        if override is None:
            raise
        raise UserError(f'{override}: no such setting in the config') from error
    for name in flags.FLAGS:
        if flags.FLAGS[name].present and flags.FLAGS[name].value == '' and '.' not in name:
            raise UserError(f'--{name} is empty (is a variable of the shell not set?)')
    if len(rest) > 1:
        raise UserError(f'unexpected argument {rest[1]!r} (settings are given as --name=value)')
    return rest


def _expanded(argument):
    """`~/` where a path of a flag begins, which shells leave as it is there: `--workdir=~/x`,
    `--config=config.py:variant,~/x+~/y`."""
    name, equals, value = argument.partition('=')
    start = '(^|[,+])' if name.lstrip('-').startswith('config') else '(^)'
    home = os.path.expanduser('~')
    return name + equals + re.sub(start + '~(?=/)', lambda at: at[1] + home, value)


def _unknown_override(error, argv):
    """The `--config.key` of `argv` that `error` complains about, None if it is about another."""
    # The message ends in the missing attribute ('nope') or in its whole path (lookup: model.nope).
    key = re.findall(r'[\w.]+', str(error.args[0]))[-1]
    for argument in argv[1:]:
        name = argument.split('=')[0]
        if argument.startswith('-') and f'.{key}.' in f'{name}.':
            return name
    return None


def _enable_compilation_cache():
    import jax  # Here, so that a mistake in the flags of a light command is shown at once.

    # JAX reads JAX_COMPILATION_CACHE_DIR itself.
    if jax.config.jax_compilation_cache_dir is None:
        directory = pathlib.Path('~/.cache/hyperlora/jax').expanduser()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # The cache only saves time: a read-only home must not stop a run.
        jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
